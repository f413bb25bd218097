"""The columns of the summary table: what each one says, how it was measured, and its cells."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from harness.tables import SummaryRow, format_bytes

TIMES = "\N{MULTIPLICATION SIGN}"

Cell = dict[str, Any]


@dataclass(frozen=True)
class Column:
    """One column of the summary: heading, direction, how it is measured, and its cell."""

    name: str
    note: str
    cell: Callable[[SummaryRow], Cell]
    unit: str = ""
    better: str = ""


def is_baseline(label: str) -> bool:
    """Whether a label is the one that all others are compared with."""
    return label == "dense"


def _cell(text: str | None, detail: str = "", share: float | None = None) -> Cell:
    return {"text": text, "detail": detail, "share": share}


def number(value: float | None, form: str, suffix: str = "") -> str | None:
    """The value as text; None stays None."""
    return None if value is None else format(value, form) + suffix


def percent(value: float | None) -> str | None:
    """``23.4 %`` of a fraction."""
    return number(None if value is None else 100 * value, ".1f", " %")


def seconds(value: float | None) -> str | None:
    """``0.968 s``, ``1.20 s``, ``123 s``: three digits that can be compared down a column."""
    if value is None:
        return None
    digits = 3 if value < 1 else 2 if value < 10 else 1 if value < 100 else 0
    return f"{value:.{digits}f} s"


def _density_cell(summary: SummaryRow) -> Cell:
    share = None if summary.density is None else round(100 * min(max(summary.density, 0.0), 1.0), 1)
    return _cell(percent(summary.density), share=share)


def _time_cell(summary: SummaryRow) -> Cell:
    return _cell(seconds(summary.denoise_time_s))


def _speedup_cell(summary: SummaryRow) -> Cell:
    if is_baseline(summary.label):
        return _cell(f"1.00{TIMES}", "by definition")
    quartiles = summary.speedup_quartiles if summary.jobs > 1 else None
    detail = f"{quartiles[0]:.2f} to {quartiles[1]:.2f}" if quartiles else ""
    return _cell(number(summary.speedup, ".2f", TIMES), detail)


def _attention_cell(summary: SummaryRow) -> Cell:
    return (
        _cell(f"1.00{TIMES}")
        if is_baseline(summary.label)
        else _cell(number(summary.attention_speedup, ".2f", TIMES))
    )


def _psnr_cell(summary: SummaryRow) -> Cell:
    if is_baseline(summary.label):
        return _cell("reference")
    if summary.jobs and summary.identical == summary.jobs:
        return _cell("identical", "every pixel")
    return _cell(
        number(summary.psnr_db, ".1f"), f"{summary.identical} identical" if summary.identical else ""
    )


def _temporal_cell(summary: SummaryRow) -> Cell:
    dense = None if is_baseline(summary.label) else summary.flow_warp_error_dense
    return _cell(number(summary.flow_warp_error, ".4f"), f"dense {dense:.4f}" if dense is not None else "")


def _memory_cell(summary: SummaryRow) -> Cell:
    return _cell(None if summary.peak_memory_bytes is None else format_bytes(summary.peak_memory_bytes))


COLUMNS = [
    Column(
        "Density",
        "Executed share of all (query, key) pairs, mean over layers, steps and jobs; dense warm-up "
        "and fallbacks count as 100 %.",
        _density_cell,
    ),
    Column(
        "Denoising",
        "Time of the denoising loop, median over the jobs; text encoder and video decoder are not in it.",
        _time_cell,
        better="lower",
    ),
    Column(
        "Speedup",
        "Denoising time of the dense pass paired with the same job, divided by this one's: median "
        "of the ratios, first and third quartile below.",
        _speedup_cell,
        better="higher",
    ),
    Column(
        "Attention speedup",
        "The same ratio for the time inside the attention calls alone; predicting, "
        "reordering and merging count.",
        _attention_cell,
        better="higher",
    ),
    Column(
        "PSNR",
        "Peak signal-to-noise ratio against the dense video of the same prompt and seed, mean over the "
        "jobs, before compression. It measures closeness to dense, not beauty.",
        _psnr_cell,
        "dB",
        "higher",
    ),
    Column(
        "SSIM",
        "Structural similarity to the dense video, 0 to 1, mean over frames and jobs.",
        lambda summary: _cell(number(summary.ssim, ".3f")),
        better="higher",
    ),
    Column(
        "LPIPS",
        "Learned perceptual distance to the dense video; measured only where the optional package "
        "lpips is installed.",
        lambda summary: _cell(number(summary.lpips, ".3f")),
        better="lower",
    ),
    Column(
        "Flow warp error",
        "Temporal consistency: what remains when each frame is warped onto the next along "
        "the optical flow; the dense videos of the same jobs below. Best near the dense value: a "
        "motionless video would score 0.",
        _temporal_cell,
    ),
    Column(
        "Peak memory",
        "Largest over the jobs: GPU memory on CUDA, resident memory of the process on a CPU.",
        _memory_cell,
        better="lower",
    ),
]
