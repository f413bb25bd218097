"""``python -m harness.low_rank``: what attention over fewer dimensions costs, whole calls on random tensors.

    python -m harness.low_rank --shape 2x30x17776x64 --ranks 16,32,48 --output low_rank.json

Queries and keys of R dimensions save scores; values of R dimensions, whose way back to all is folded into
the model's output projection, save the other product. Nothing is timed before it was compared with
attention by its definition over the same projected tokens.

Exit codes: 0 done, 1 a form is wrong, 2 bad input, 130 stopped with Ctrl-C.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.dense import attention, resolve_dense_backend
from harness.command import DONE, FAILED, make_parser, parse_options, run_command
from harness.environment import provenance, resolve_device
from harness.errors import BenchError
from harness.kernel_cases import Case, Shape, make_tensors, with_blocks
from harness.kernel_checks import median_seconds
from harness.kernel_operators import FORWARD
from harness.run_folder import check_writable, utc_now, write_text
from kernels_common.block_sparse_attention import block_sparse_attention
from kernels_common.block_sparse_backends import resolve_backend
from kernels_common.score_projection import (
    ScoreMoments,
    ScoreProjection,
    project_tokens,
    score_moments,
    score_projection,
)

BUDGET_S = 0.3
ROWS_CHECKED = 256
SPARSITY, BLOCK = 0.75, 128  # of the block-sparse calls
DENSE, SPARSE, PROJECTING = "dense", "block-sparse", "projecting"
KERNELS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "efficient": SDPBackend.EFFICIENT_ATTENTION}
Call = Callable[[], Any]


class Form(NamedTuple):
    """One way to make the call.

    Args:
        kind (str): ``"dense"``, ``"block-sparse"`` or ``"projecting"``.
        form (str): which tensors are whole.
        rank (int): dimensions of queries and keys.
        kernel (str): what runs.
        call (Callable): the call, without projecting.
        tokens (Sequence[Tensor], Optional): queries, keys and values that the output is of; None for
            projecting alone.
    """

    kind: str
    form: str
    rank: int
    kernel: str
    call: Call
    tokens: Sequence[torch.Tensor] | None


def reduced_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, projection: ScoreProjection
) -> torch.Tensor:
    """Dense attention with projected queries and keys and whole values, padded for kernels of one size.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        projection (ScoreProjection): of R directions.

    Returns:
        Tensor: ``[B, Hq, Nq, D]``.
    """
    dim = query.shape[3]
    query, key = (F.pad(part, (0, dim - part.shape[3])) for part in project_tokens(query, key, projection))
    return attention(query, key, value, scale=dim**-0.5)


def value_moments(moment: torch.Tensor, output_weight: torch.Tensor) -> ScoreMoments:
    """Values as the output projection sees them, in the form of scores between values and its rows.

    With them :func:`kernels_common.score_projection.score_spectrum` gives the energy of the outputs
    direction by direction, ``score_error`` what a projection loses of it, and ``optimal_projection`` the
    projection that loses least.

    Args:
        moment (Tensor): second moments of the values of each head, ``[1, H, D, D]`` fp64.
        output_weight (Tensor): ``[C, H * D]``, the weight of the layer behind attention.
    """
    heads, dim = moment.shape[1], moment.shape[3]
    per_head = output_weight.detach().double().unflatten(1, (heads, dim)).permute(1, 2, 0)[None]
    return ScoreMoments(moment, per_head @ per_head.mT)


def forms(case: Case, ranks: Sequence[int]) -> Iterator[Form]:
    """All calls that are measured: whole ones first, then those of each rank."""
    tensors, mask = (case.query, case.key, case.value), case.mask
    dim = case.query.shape[3]
    scale = dim**-0.5

    def dense(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[str, Call]:
        return resolve_dense_backend(query, key, value), partial(attention, query, key, value, scale=scale)

    def sparse(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[str, Call]:
        call = partial(block_sparse_attention, query, key, value, mask, scale=scale)
        return resolve_backend(query, mask), call

    yield Form(DENSE, "whole", dim, *dense(*tensors), tensors)
    yield Form(SPARSE, "whole", dim, *sparse(*tensors), tensors)
    for rank in ranks:
        projection = score_projection(score_moments(case.query, case.key), "optimal", rank)
        project = partial(project_tokens, case.query, case.key, projection)
        yield Form(PROJECTING, "queries and keys", rank, "matmul", project, None)
        query, key = project()
        low, low_all = (query, key, case.value), (query, key, case.value[..., :rank].contiguous())
        padded = (F.pad(query, (0, dim - rank)), F.pad(key, (0, dim - rank)))
        yield Form(DENSE, "padded", rank, *dense(*padded, case.value), low)
        for name in KERNELS:
            yield Form(DENSE, "whole values", rank, name, partial(_unequal, name, *low, scale), low)
        yield Form(DENSE, "values too", rank, *dense(*low_all), low_all)
        yield Form(SPARSE, "values too", rank, *sparse(*low_all), low_all)


def _unequal(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
) -> torch.Tensor:
    with sdpa_kernel(KERNELS[name]):
        return F.scaled_dot_product_attention(query, key, value, scale=scale)


def measure(shape: Shape, ranks: Sequence[int], device: torch.device) -> list[dict[str, Any]]:
    """Rows of all forms: time, error against the definition, and ratio to the whole call of the same kind."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    case = with_blocks(make_tensors(shape, dtype, device), (BLOCK, BLOCK), SPARSITY, empty_row=False)
    rows = [_measure_form(form, case) for form in forms(case, ranks)]
    whole = {row["kind"]: row["time_ms"] for row in rows if row["form"] == "whole"}
    projecting = {row["rank"]: row["time_ms"] for row in rows if row["kind"] == PROJECTING}
    for row in rows:
        row["speedup"] = None
        if row["time_ms"] and whole.get(row["kind"]):
            row["speedup"] = whole[row["kind"]] / (row["time_ms"] + projecting.get(row["rank"], 0.0))
    return rows


def _measure_form(form: Form, case: Case) -> dict[str, Any]:
    row: dict[str, Any] = {"kind": form.kind, "form": form.form, "rank": form.rank, "kernel": form.kernel}
    row |= {"status": "right", "error": None, "time_ms": None}
    if form.tokens is not None:
        try:
            row["error"] = _error(form.call(), form.tokens, case, form.kind == SPARSE)
        except RuntimeError as reason:  # torch has no such kernel for these dimensions
            return row | {"status": f"unavailable: {str(reason).split('. ')[0]}"}
        if not row["error"] <= FORWARD[case.query.dtype]:
            return row | {"status": "wrong"}
    return row | {"time_ms": 1e3 * median_seconds(lambda: (form.call(),), case.query.device, BUDGET_S)[0]}


def _error(output: torch.Tensor, tokens: Sequence[torch.Tensor], case: Case, is_sparse: bool) -> float:
    """Largest error of the last queries of the last head against the definition, relative."""
    query, key, value = (part[-1, -1].double() for part in tokens)
    rows = torch.arange(len(query), device=query.device)[-ROWS_CHECKED:]
    scores = query[rows] @ key.T * case.query.shape[3] ** -0.5
    if is_sparse:
        columns = torch.arange(len(key), device=query.device)
        kept = case.mask.to_blocks()[-1, -1]
        scores.masked_fill_(~kept[rows // BLOCK][:, columns // BLOCK], float("-inf"))
    exact = scores.softmax(-1) @ value
    return float((output[-1, -1, rows] - exact).norm() / exact.norm())


def table(run: dict[str, Any]) -> str:
    """Markdown of a run, with where it was measured."""
    lines = [
        f"One call at {run['shape']} (batch, heads, tokens, head dimension), {run['dtype']}:",
        "",
        "| call | form | rank | kernel | median | against whole | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in run["rows"]:
        time = f"{row['time_ms']:.3f} ms" if row["time_ms"] else row["status"]
        ratio = f"{row['speedup']:.2f}x" if row["speedup"] else "-"
        error = "-" if row["error"] is None else f"{row['error']:.1e}"
        cells = (row["kind"], row["form"], str(row["rank"]), row["kernel"], time, ratio, error)
        lines.append("| " + " | ".join(cells) + " |")
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items() if version)
    state = " with uncommitted changes" if run["dirty"] else ""
    lines += [
        "",
        f"Measured on {run['device']}, {run['created_at'][:10]}; {versions}; commit "
        f"{run['commit'] or 'unknown'}{state}; `{run['command']}`. Random tensors. The ratio to "
        "the whole call of its kind counts the time of projecting. Every output was first compared with "
        "attention by its definition over the same projected tokens; the error is relative.",
    ]
    return "\n".join(lines) + "\n"


def parse_shape(text: str) -> Shape:
    """``BxHxNxD``.

    Raises:
        BenchError: not four positive numbers.
    """
    parts = text.split("x")
    if len(parts) != 4 or not all(part.isdecimal() and int(part) for part in parts):
        raise BenchError(
            f"--shape must be batch x heads x tokens x head dimension, as 2x30x17776x64: '{text}'"
        )
    return Shape(*map(int, parts))


def parse_ranks(text: str, head_dim: int) -> list[int]:
    """Numbers between commas.

    Raises:
        BenchError: one is not a multiple of 8 below the head dimension, which kernels need.
    """
    parts = text.split(",")
    if not all(part.isdecimal() and 0 < int(part) < head_dim and int(part) % 8 == 0 for part in parts):
        raise BenchError(f"--ranks must be multiples of 8 below {head_dim}, as 16,32,48: '{text}'")
    return [int(part) for part in parts]


def main(argv: list[str] | None = None) -> int:
    """Measure and print.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Returns:
        int: exit code, see the module.
    """
    return run_command("harness.low_rank", argv, _low_rank)


def _low_rank(arguments: list[str], command: str) -> int:
    parser = make_parser("harness.low_rank", __doc__)
    parser.add_argument("--shape", default="1x4x4096x64", help="batch x heads x tokens x head dimension")
    parser.add_argument("--ranks", default="16,32,48", help="dimensions that a projection leaves")
    parser.add_argument("--device", default="auto", help="auto, cpu or cuda[:INDEX]")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    options = parse_options(parser, arguments)
    shape, device = parse_shape(options.shape), resolve_device(options.device)
    ranks = parse_ranks(options.ranks, shape.head_dim)
    check_writable(options.output)
    run: dict[str, Any] = provenance(device, command) | {
        "created_at": utc_now(),
        "dtype": "bfloat16" if device.type == "cuda" else "float32",
        "shape": str(shape),
        "rows": measure(shape, ranks, device),
    }
    if options.output:
        write_text(options.output, json.dumps(run, indent=1) + "\n")
    print(table(run), end="")
    return FAILED if any(row["status"] == "wrong" for row in run["rows"]) else DONE


if __name__ == "__main__":
    sys.exit(main())
