"""Aggregation of result rows into one table row per strategy."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median, quantiles
from typing import Any

from harness.results import ResultRow


@dataclass(frozen=True)
class SummaryRow:
    """All jobs of one strategy spec; None where no job has the figure.

    Args:
        label (str): text of the strategy spec.
        strategy (str): registered name.
        parameters (dict): full parameters.
        jobs (int): finished jobs.
        failed (int): failed jobs; they are in no figure.
        density (float, Optional): mean executed density, 0 to 1.
        denoise_time_s (float, Optional): median.
        attention_time_s (float, Optional): median.
        speedup (float, Optional): median of the paired ratios dense / this.
        speedup_quartiles (tuple, Optional): first and third quartile of those ratios.
        attention_speedup (float, Optional): median of the paired attention time ratios.
        psnr_db (float, Optional): mean.
        ssim (float, Optional): mean.
        lpips (float, Optional): mean.
        identical (int): jobs whose video equals the dense one in every pixel.
        flow_warp_error (float, Optional): mean.
        flow_warp_error_dense (float, Optional): mean of the dense videos of the same jobs.
        peak_memory_bytes (int, Optional): maximum.
    """

    label: str
    strategy: str
    parameters: dict[str, Any]
    jobs: int
    failed: int
    density: float | None
    denoise_time_s: float | None
    attention_time_s: float | None
    speedup: float | None
    speedup_quartiles: tuple[float, float] | None
    attention_speedup: float | None
    psnr_db: float | None
    ssim: float | None
    lpips: float | None
    identical: int
    flow_warp_error: float | None
    flow_warp_error_dense: float | None
    peak_memory_bytes: int | None


def summarise(rows: Iterable[ResultRow]) -> list[SummaryRow]:
    """One row per label: dense first, then in order of first appearance.

    Args:
        rows (Iterable[ResultRow]): rows of one run, see `harness.results.read_rows`.
    """
    groups: dict[str, list[ResultRow]] = {}
    for row in rows:
        groups.setdefault(row.label, []).append(row)
    summaries = [_summarise_group(label, group) for label, group in groups.items()]
    return sorted(summaries, key=lambda summary: summary.label != "dense")


def _summarise_group(label: str, rows: Sequence[ResultRow]) -> SummaryRow:
    done = [row for row in rows if row.ok]

    def over(combine: Callable[[list[float]], float], name: str) -> float | None:
        values = [value for row in done if (value := getattr(row, name)) is not None]
        return combine(values) if values else None

    def temporal(name: str) -> float | None:
        values = [value for row in done if (value := row.temporal.get(name)) is not None]
        return fmean(values) if values else None

    peak = over(max, "peak_memory_bytes")
    return SummaryRow(
        label=label,
        strategy=rows[0].strategy,
        parameters=rows[0].parameters,
        jobs=len(done),
        failed=len(rows) - len(done),
        density=over(fmean, "density"),
        denoise_time_s=over(median, "denoise_time_s"),
        attention_time_s=over(median, "attention_time_s"),
        speedup=over(median, "speedup"),
        speedup_quartiles=_quartiles([row.speedup for row in done if row.speedup is not None]),
        attention_speedup=over(median, "attention_speedup"),
        psnr_db=over(fmean, "psnr_db"),
        ssim=over(fmean, "ssim"),
        lpips=over(fmean, "lpips"),
        identical=sum(row.identical is True for row in done),
        flow_warp_error=temporal("flow_warp_error"),
        flow_warp_error_dense=temporal("flow_warp_error_dense"),
        peak_memory_bytes=None if peak is None else int(peak),
    )


def _quartiles(values: list[float]) -> tuple[float, float] | None:
    if not values:
        return None
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = quantiles(values, n=4, method="inclusive")
    return first, third


def table_cells(summary: SummaryRow) -> list[str]:
    """The cells of one table row as text, in the order of `COLUMNS`."""
    return [cell(summary) for cell in COLUMNS.values()]


def to_markdown(summaries: Sequence[SummaryRow], provenance: str | None = None) -> str:
    """A Markdown table, with ``provenance`` as a line of its own below it."""
    lines = [
        "| " + " | ".join(COLUMNS) + " |",
        "| --- |" + " ---: |" * (len(COLUMNS) - 1),
        *("| " + " | ".join(table_cells(summary)) + " |" for summary in summaries),
    ]
    if provenance:
        lines += ["", provenance]
    return "\n".join(lines) + "\n"


def provenance_line(run: dict[str, Any], rows: Sequence[ResultRow] = ()) -> str:
    """Where the figures come from: device, model, settings, versions, commit and command.

    Args:
        run (dict): ``run.json``, see `harness.results.read_run`.
        rows (Sequence[ResultRow]): rows of the run; they add the number of tokens.
    """
    size = run["size"]
    tokens = next((row.tokens for row in rows if row.tokens), None)
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    commit = run["commit"][:12] if run["commit"] else "no commit"
    changed = " with uncommitted changes" if run["dirty"] else ""
    return (
        f"Measured on {run['device']}: {run['model']}, {size['num_frames']} frames of "
        f"{size['width']}x{size['height']}{f' ({tokens} tokens)' if tokens else ''}, {run['steps']} steps, "
        f"guidance {run['guidance_scale']:g}, {run['dtype']}; {versions}; {commit}{changed}; "
        f"`{run['command']}`"
    )


def format_time(seconds: float | None) -> str:
    """``0.123 s``, ``12.3 s``."""
    if seconds is None:
        return "-"
    return f"{seconds:.3f} s" if seconds < 1 else f"{seconds:.1f} s"


def format_bytes(size: float | None) -> str:
    """``1.23 GB`` (10^9 bytes)."""
    if size is None:
        return "-"
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.0f} MB"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}x"


def _jobs(summary: SummaryRow) -> str:
    return f"{summary.jobs} ({summary.failed} failed)" if summary.failed else str(summary.jobs)


def _speedup(summary: SummaryRow) -> str:
    if summary.speedup is None or summary.speedup_quartiles is None or summary.jobs < 2:
        return _ratio(summary.speedup)
    first, third = summary.speedup_quartiles
    return f"{summary.speedup:.2f}x ({first:.2f} to {third:.2f})"


def _psnr(summary: SummaryRow) -> str:
    if summary.jobs and summary.identical == summary.jobs:
        return "identical"
    return _number(summary.psnr_db, ".1f")


def _flow(summary: SummaryRow) -> str:
    if summary.flow_warp_error is None:
        return "-"
    own = f"{summary.flow_warp_error:.4f}"
    dense = summary.flow_warp_error_dense
    return own if dense is None or summary.label == "dense" else f"{own} ({dense:.4f})"


COLUMNS: dict[str, Callable[[SummaryRow], str]] = {
    "strategy": lambda summary: summary.label.replace("|", "\\|"),
    "jobs": _jobs,
    "density": lambda summary: _number(summary.density, ".3f"),
    "denoising": lambda summary: format_time(summary.denoise_time_s),
    "speedup (quartiles)": _speedup,
    "attention speedup": lambda summary: _ratio(summary.attention_speedup),
    "PSNR (dB)": _psnr,
    "SSIM": lambda summary: _number(summary.ssim, ".3f"),
    "LPIPS": lambda summary: _number(summary.lpips, ".3f"),
    "flow warp error (dense)": _flow,
    "peak memory": lambda summary: format_bytes(summary.peak_memory_bytes),
}
