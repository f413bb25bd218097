"""Markdown of a run of `harness.spectrum`."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

SHARES = (0.9, 0.99)
Numbers = Sequence[float]


def tables(run: dict[str, Any]) -> str:
    """Errors of all projections, the spectrum of every layer and head, and where it was measured."""
    title = f"# Dimensions that the scores and values of model {run['model']} need"
    sections = [title, _error_table(run), _value_table(run), _spectrum_table(run), _provenance(run)]
    return "\n\n".join(sections) + "\n"


def rank_for(spectrum: Numbers, share: float) -> int:
    """Directions whose energy is at least ``share`` of the whole."""
    enough = share * sum(spectrum)
    return next((rank for rank, held in enumerate(accumulate(spectrum), 1) if held >= enough), len(spectrum))


def _error_table(run: dict[str, Any]) -> str:
    rows = []
    for entry in run["scores"]["errors"]:
        mean, worst = _mean_and_worst(entry["lost"])
        attention = (f"{entry['attention_error']:.3f}", f"{entry['attention_error_worst']:.3f}")
        rows.append((entry["method"], str(entry["rank"]), f"{mean:.4f}", f"{worst:.4f}", *attention))
    header = ("projection", "rank", "scores lost", "worst head", "attention error", "worst head and call")
    title = "Scores over fewer dimensions, on the held-out prompt:"
    return f"{title}\n\n{_table(header, rows)}"


def _value_table(run: dict[str, Any]) -> str:
    rows = []
    for entry in run["values"]["errors"]:
        tails = [[sum(own[entry["rank"] :]) for own in heads] for heads in run["values"]["spectrum"]]
        figures = (*_mean_and_worst(tails), *_mean_and_worst(entry["lost"]))
        rows.append((str(entry["rank"]), *(f"{figure:.4f}" for figure in figures)))
    header = ("rank", "tail of the values", "worst head", "output lost", "worst head")
    title = "Values over fewer dimensions, folded into the output projection:"
    return f"{title}\n\n{_table(header, rows)}"


def _spectrum_table(run: dict[str, Any]) -> str:
    lost = {entry["rank"]: entry["lost"] for entry in run["scores"]["errors"] if entry["method"] == "optimal"}
    rows = []
    for layer, heads in enumerate(run["scores"]["spectrum"]):
        for head, spectrum in enumerate(heads):
            ranks = [rank_for(spectrum, share) for share in SHARES]
            values = [rank_for(run["values"]["spectrum"][layer][head], share) for share in SHARES]
            errors = [f"{lost[rank][layer][head]:.4f}" for rank in run["ranks"]]
            rows.append((str(layer), str(head), *map(str, ranks), *errors, *map(str, values)))
    percents = [f"{100 * share:.0f} %" for share in SHARES]
    header = ["layer", "head", *percents, *(f"lost at {rank}" for rank in run["ranks"])]
    header += [f"values {percent}" for percent in percents]
    return f"Every layer and head, with the optimal projection:\n\n{_table(header, rows)}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _mean_and_worst(heads: Sequence[Numbers]) -> tuple[float, float]:
    flat = [number for row in heads for number in row]
    return sum(flat) / len(flat), max(flat)


def _provenance(run: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    state = " with uncommitted changes" if run["dirty"] else ""
    return (
        f"Model {run['model']}, {len(run['prompts'])} calibration prompt(s) and one held out, steps "
        f"{', '.join(map(str, run['steps']))}, all tokens. Percent columns: how many directions of the "
        "optimal projection hold so much of the mean squared score (keys from their mean) on the calibration "
        "prompts; for values, of the layer's output. Lost is the mean squared error over that energy. "
        "Attention error is the relative L1 error of the output where all scores are projected and values "
        f"are whole. Measured on {run['device']}, {run['created_at'][:10]}, {run['dtype']}; {versions}; "
        f"commit {run['commit'] or 'unknown'}{state}; `{run['command']}`."
    )
