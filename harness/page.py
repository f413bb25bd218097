"""The values that ``page.html`` shows: result rows turned into text, pictures and addresses."""

import json
from collections.abc import Iterator, Sequence
from statistics import median
from typing import Any

from harness.columns import COLUMNS, TIMES, Column, is_baseline, number, percent, seconds
from harness.curves import curve_names
from harness.notices import times_notice
from harness.plots import COLOURS, AxisLabel, Point, density_map, mean_map, scatter
from harness.results import ResultRow
from harness.tables import SummaryRow, summarise

MOST_PLAYERS = 60
"""Above this number of videos the page loads only those near the view: browsers refuse about 75 players."""


class Strategies:
    """Identity, colour, curve and name of every label, in the order of the summary."""

    def __init__(self, summaries: Sequence[SummaryRow]) -> None:
        labels = [summary.label for summary in summaries]
        self.compared = [label for label in labels if not is_baseline(label)]
        self._keys = {label: f"strategy-{index}" for index, label in enumerate(labels)}
        self._curves = curve_names(self.compared)
        self._drawn = list(dict.fromkeys(self.curve(label) or label for label in self.compared))

    def curve(self, label: str) -> str:
        """Label of the curve that the strategy is a point of, "" if it stands alone."""
        return self._curves.get(label, "")

    def slot(self, label: str) -> int:
        """Index of its colour; the points of a curve share one."""
        return self._drawn.index(self.curve(label) or label)

    def tag(self, label: str) -> dict[str, Any]:
        """What every mention of a strategy on the page needs."""
        baseline = is_baseline(label)
        colour = "base" if baseline else f"s{self.slot(label) % COLOURS}"
        return {"key": self._keys[label], "label": label, "colour": colour, "baseline": baseline}

    def place(self, label: str) -> int:
        return list(self._keys).index(label)


def describe_page(settings: dict[str, Any], rows: Sequence[ResultRow]) -> dict[str, Any]:
    """Everything that ``page.html`` shows.

    Args:
        settings (dict): ``run.json``.
        rows (Sequence[ResultRow]): rows of the run whose videos are relative to the page.
    """
    summaries = summarise(rows)
    strategies = Strategies(summaries)
    done = [row for row in rows if row.ok]
    groups = list(_groups(rows, strategies))
    columns = [column for column in COLUMNS if any(column.cell(summary)["text"] for summary in summaries)]
    return {
        "title": "Sparse attention, side by side",
        "statement": _statement(summaries, groups),
        "provenance": _provenance(settings, rows),
        "command": settings["command"],
        "notice": times_notice(settings),
        "summary_note": _summary_note(summaries, settings.get("unavailable_metrics") or {}),
        "columns": columns,
        "rows": [_summary_line(summary, columns, strategies) for summary in summaries],
        "plots": _plots(summaries, done, strategies),
        "maps": list(_maps(done, strategies)),
        "groups": groups,
        "many_seeds": len({group["seed"] for group in groups}) > 1,
        "has_baseline": any(is_baseline(summary.label) for summary in summaries),
        "frames": max(row.size["num_frames"] for row in rows),
        "lazy": sum(bool(row.video) for row in done) > MOST_PLAYERS,
        "jobs": len(rows),
        "failures": [_failure(row, strategies) for row in rows if not row.ok],
    }


def _failure(row: ResultRow, strategies: Strategies) -> dict[str, Any]:
    error = row.error or "no message"
    return {**strategies.tag(row.label), "prompt": row.prompt, "seed": row.seed, "error": error}


def _statement(summaries: Sequence[SummaryRow], groups: Sequence[dict[str, Any]]) -> str:
    compared = sum(not is_baseline(summary.label) for summary in summaries)
    prompts = len({group["prompt"] for group in groups})
    if not compared:
        subject = "Dense attention draws"
    elif compared == 1:
        subject = "One way to thin out attention draws"
    else:
        subject = f"{_count(compared).capitalize()} ways to thin out attention draw"
    object_ = "one prompt" if prompts == 1 else f"the same {_count(prompts)} prompts"
    measured = "Speed, density and fidelity are measured against dense attention."
    return f"{subject} {object_} from the same noise. {measured}"


def _count(amount: int) -> str:
    words = (
        "no",
        "one",
        "two",
        "three",
        "four",
        "five",
        "six",
        "seven",
        "eight",
        "nine",
        "ten",
        "eleven",
        "twelve",
    )
    return words[amount] if amount < len(words) else str(amount)


def _provenance(settings: dict[str, Any], rows: Sequence[ResultRow]) -> list[tuple[str, str]]:
    size = settings["size"]
    tokens = next((row.tokens for row in rows if row.tokens), None)
    changed = ", with uncommitted changes" if settings["dirty"] else ""
    seeds = sorted({row.seed for row in rows})
    finished = sum(row.ok for row in rows)
    guidance = f"guidance {settings['guidance_scale']:g}"
    facts = {
        "Model": settings["model"],
        "Device": settings["device"],
        "Video": f"{size['num_frames']} frames of {size['width']} {TIMES} {size['height']}",
        "Sequence": f"{tokens:,} tokens" if tokens else "",
        "Denoising": f"{settings['steps']} steps, {guidance}, {settings['dtype']}",
        "Seeds" if len(seeds) > 1 else "Seed": ", ".join(map(str, seeds)),
        "Jobs": f"{finished} of {len(rows)} finished",
        "Measured": str(settings.get("created_at") or "")[:16].replace("T", " "),
        "Commit": settings["commit"][:12] + changed if settings["commit"] else "",
        "Versions": ", ".join(
            f"{name}\N{NO-BREAK SPACE}{version}" for name, version in settings["versions"].items() if version
        ),
    }
    return [(name, text) for name, text in facts.items() if text]


def _summary_note(summaries: Sequence[SummaryRow], unavailable: dict[str, str]) -> str:
    jobs = max((summary.jobs for summary in summaries), default=0)
    each = "one job" if jobs == 1 else f"{jobs} jobs each"
    if any(summary.failed for summary in summaries):
        each += ", fewer where some failed"
    baseline = "Dense attention, in its fastest exact form here, is the baseline."
    missing = [f"{name.upper()} was not measured: {reason}." for name, reason in unavailable.items()]
    return " ".join([f"One line per strategy, over {each}.", baseline, *missing])


def _summary_line(summary: SummaryRow, columns: Sequence[Column], strategies: Strategies) -> dict[str, Any]:
    parts = ["baseline"] if is_baseline(summary.label) else []
    parts.append(f"{summary.jobs} job{'' if summary.jobs == 1 else 's'}")
    if summary.failed:
        parts.append(f"{summary.failed} failed")
    parameters = ", ".join(f"{name}={value}" for name, value in sorted(summary.parameters.items()))
    return {
        **strategies.tag(summary.label),
        "detail": ", ".join(parts),
        "parameters": parameters,
        "cells": [column.cell(summary) for column in columns],
    }


def _plots(
    summaries: Sequence[SummaryRow], done: Sequence[ResultRow], strategies: Strategies
) -> list[dict[str, str]]:
    drawn = (
        ("Speed against quality", "speedup", AxisLabel(f"speedup over dense ({TIMES})", 1.0, span=0.5), 1),
        ("Density against quality", "density", AxisLabel("executed density (%)", span=20), 100),
    )
    plots = []
    for title, figure, axis, scale in drawn:
        points, missing = [], []
        for summary in summaries:
            if is_baseline(summary.label):
                continue
            own = [row for row in done if row.label == summary.label]
            cloud = _cloud(own, figure, scale)
            if cloud:
                x, y = (median(values) for values in zip(*cloud, strict=True))
                label = summary.label
                points.append(Point(label, strategies.slot(label), x, y, cloud, strategies.curve(label)))
            else:
                same = any(row.identical for row in own)
                missing.append(f"{summary.label} ({'identical to dense' if same else 'not measured'})")
        if svg := scatter(points, axis, AxisLabel("PSNR to dense (dB)", span=4), title):
            plots.append({"title": title, "svg": svg, "missing": ", ".join(missing)})
    return plots


def _cloud(rows: Sequence[ResultRow], figure: str, scale: float) -> list[tuple[float, float]]:
    """Figure and PSNR of every job that has both; a video identical to dense has no finite PSNR."""
    pairs = [(getattr(row, figure), row.psnr_db) for row in rows if not row.identical]
    return [(scale * x, y) for x, y in pairs if x is not None and y is not None]


def _maps(done: Sequence[ResultRow], strategies: Strategies) -> Iterator[dict[str, Any]]:
    for label in strategies.compared:
        own = [row for row in done if row.label == label]
        yield from _map(label, "density", [row.density_by_layer or [] for row in own], strategies)
        for figure in dict.fromkeys(name for row in own for name in row.shares_by_layer):
            tables = [row.shares_by_layer.get(figure, []) for row in own]
            yield from _map(label, figure.replace("_", " "), tables, strategies)


def _map(
    label: str, figure: str, tables: Sequence[list[list[float | None]]], strategies: Strategies
) -> Iterator[dict[str, Any]]:
    """The mean of one figure over the jobs of one strategy, nothing if no job has it."""
    cells = mean_map(tables)
    given = [value for row in cells for value in row if value is not None]
    if given:
        mean = percent(sum(given) / len(given))
        size = f"{len(cells)} layers and {len(cells[0])} steps"
        yield {
            **strategies.tag(label),
            "figure": figure,
            "image": density_map(cells),
            "data": json.dumps(cells, separators=(",", ":")),
            "layers": len(cells),
            "steps": len(cells[0]),
            "mean": mean,
            "alt": f"{figure.capitalize()} of {label} for {size}, {mean} on average",
        }


def _groups(rows: Sequence[ResultRow], strategies: Strategies) -> Iterator[dict[str, Any]]:
    """One group per prompt and seed, in the order of the prompts; dense first in each."""
    places = sorted({(row.prompt_index, row.seed, row.prompt) for row in rows})
    for position, place in enumerate(places, start=1):
        own = [row for row in rows if (row.prompt_index, row.seed, row.prompt) == place]
        own.sort(key=lambda row: strategies.place(row.label))
        if any(row.video for row in own):
            yield {
                "id": f"prompt-{position}",
                "prompt": place[2],
                "seed": place[1],
                "columns": _columns(len(own)),
                "tiles": [_tile(row, strategies) for row in own],
            }


def _columns(tiles: int) -> int:
    """Videos side by side on a wide screen: at most five, and rows as equal as they can be."""
    rows = -(-tiles // 5)
    return -(-tiles // rows)


def _merged_tokens(row: ResultRow) -> int | None:
    """Tokens of the sequence where the strategy merged some, mean over those calls; None without merging."""
    cells = [cell for layer in row.shares_by_layer.get("merged_length", []) for cell in layer]
    shares = [cell for cell in cells if cell is not None]
    return round(row.tokens * sum(shares) / len(shares)) if shares and row.tokens else None


def _tile(row: ResultRow, strategies: Strategies) -> dict[str, Any]:
    facts: list[tuple[str, str | None]]
    if is_baseline(row.label):
        facts = [
            ("what the others are compared with", "baseline"),
            ("denoising time", seconds(row.denoise_time_s)),
            ("sequence length", number(row.tokens, ",d", " tokens")),
        ]
    else:
        quality = "identical" if row.identical else number(row.psnr_db, ".1f", " dB")
        facts = [
            ("executed density", percent(row.density)),
            ("speedup over the dense pass of this job", number(row.speedup, ".2f", TIMES)),
            ("PSNR to the dense video", quality),
            ("mean sequence length after merging", number(_merged_tokens(row), ",d", " tokens")),
        ]
    return {
        **strategies.tag(row.label),
        "video": row.video,
        "absent": "did not finish" if not row.ok else "no video was kept",
        "width": row.size["width"],
        "height": row.size["height"],
        "facts": [{"name": name, "text": text} for name, text in facts if text] if row.ok else [],
    }
