"""Attention over fewer dimensions: what it computes, what folding loses, and what the command prints."""

import json

import pytest
import torch

from core import TokenLayout
from core.testing import dense_fp64, random_qkv
from harness import low_rank
from harness.low_rank import reduced_attention, value_moments
from kernels_common.score_projection import (
    score_error,
    score_moments,
    score_projection,
    score_spectrum,
    second_moment,
)

LAYOUT = TokenLayout(5, 3, 7, 9)
SHAPE = ["--shape", "1x2x300x64", "--device", "cpu"]


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(low_rank, "BUDGET_S", 0.001)


def test_reduced_attention_is_attention_over_projected_scores():
    query, key, value = random_qkv(LAYOUT, batch=2)
    projection = score_projection(score_moments(query, key), "optimal", 16)
    middle = projection.query @ projection.key.mT  # A^T B
    weights = (query.double() @ middle @ key.double().mT / 8).softmax(-1)
    assert (reduced_attention(query, key, value, projection) - weights @ value.double()).abs().max() < 1e-5
    whole = score_projection(score_moments(query, key), "optimal", 64)
    assert (reduced_attention(query, key, value, whole) - dense_fp64(query, key, value)).abs().max() < 1e-5


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_folded_values_lose_the_tail_of_their_spectrum(rank):
    """Squared error of the layer's output, head by head, against what the moments say."""
    generator = torch.Generator().manual_seed(0)
    strengths = torch.where(torch.arange(64) < rank, 1.0, 0.02)
    value = (
        torch.randn(1, 2, 500, 64, generator=generator) * strengths @ torch.randn(64, 64, generator=generator)
    )
    weight = torch.randn(96, 128, generator=generator)
    moments = value_moments(second_moment(value), weight)
    projection = score_projection(moments, "optimal", rank)
    low = value.double() @ projection.query
    for head in range(2):
        own = weight[:, 64 * head : 64 * head + 64].double()
        folded = own @ projection.key[0, head]  # [C, R]
        exact = value[0, head].double() @ own.T
        error = (low[0, head] @ folded.T - exact).square().sum(-1).mean()
        assert error == pytest.approx(float(score_error(moments, projection)[0, head]), rel=1e-4, abs=1e-6)
        tail = float(score_spectrum(moments)[0, head, rank:].sum())
        assert error == pytest.approx(tail, rel=1e-3, abs=1e-6)


def test_command_checks_times_and_prints_every_form(tmp_path, capsys):
    path = tmp_path / "run.json"
    assert low_rank.main([*SHAPE, "--ranks", "16,32", "--output", str(path)]) == 0
    run, printed = json.loads(path.read_text()), capsys.readouterr().out
    assert low_rank.table(run) == printed
    rows = {(row["kind"], row["form"], row["kernel"], row["rank"]): row for row in run["rows"]}
    assert len(rows) == len(run["rows"]) == 2 + 2 * 6
    whole, short = rows["dense", "whole", "sdpa", 64], rows["dense", "values too", "sdpa", 16]
    projecting = rows["projecting", "queries and keys", "matmul", 16]
    assert short["speedup"] == pytest.approx(whole["time_ms"] / (short["time_ms"] + projecting["time_ms"]))
    assert rows["dense", "whole values", "cudnn", 16]["status"].startswith("unavailable: ")
    assert all(row["error"] < 2.0**-18 for row in run["rows"] if row["error"] is not None)


def test_a_wrong_form_is_never_timed(monkeypatch, capsys):
    exact = low_rank.attention
    monkeypatch.setattr(low_rank, "attention", lambda *tensors, **options: exact(*tensors, **options) * 1.01)
    assert low_rank.main([*SHAPE, "--ranks", "16"]) == 1
    printed = capsys.readouterr().out
    assert "| dense | values too | 16 | sdpa | wrong | - | 1.0e-02 |" in printed
    assert "| block-sparse | values too | 16 | torch | wrong" not in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--shape", "2x30x64"], "--shape must be"),
        (["--shape", "2x30x0x64"], "--shape must be"),
        (["--ranks", "16,64"], "--ranks must be multiples of 8 below 64"),
        (["--ranks", "12"], "--ranks must be"),
        (["--device", "tpu"], "--device must be"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert low_rank.main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
