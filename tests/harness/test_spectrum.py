"""Spectra of scores and values: what is measured, and what the command says and refuses."""

import json
from pathlib import Path

import pytest
import torch

from core import AttentionContext, TokenLayout
from core.testing import random_qkv
from harness import spectrum
from harness.spectrum_probes import HeldOutProbe, MomentProbe
from harness.spectrum_tables import rank_for, tables
from kernels_common.score_projection import score_projection

LAYOUT = TokenLayout(5, 3, 7, 9)
COMMITTED = Path(__file__).parents[2] / "docs" / "benchmarks"
TINY = ["--model", "tiny-random", "--steps", "2", "--steps-measured", "1"]


def test_moments_are_means_over_tokens_batch_and_chosen_calls():
    probe = MomentProbe({0, 2})
    calls = [random_qkv(LAYOUT, batch=2) for _ in range(3)]
    for step, tensors in enumerate(calls):
        output = probe(*tensors, AttentionContext(LAYOUT, 1, 2, step, 3))
        assert torch.equal(output, torch.nn.functional.scaled_dot_product_attention(*tensors))
    (layer,) = probe.layers()
    query, key, value = (torch.cat([call[part] for call in (calls[0], calls[2])]) for part in range(3))
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value)
    key = key - key.mean(2, keepdim=True)
    for found, tokens in zip(layer, (query, key, value, output), strict=True):
        expected = torch.einsum("bhnd,bhne->hde", tokens.double(), tokens.double()) / (4 * tokens.shape[2])
        assert (found[0] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_attention_errors_fall_with_the_rank():
    known, tensors = MomentProbe({0}), random_qkv(LAYOUT, batch=2)
    known(*tensors, AttentionContext(LAYOUT))
    (layer,) = known.layers()
    projections = {
        ("optimal", rank): [score_projection(layer.scores, "optimal", rank)] for rank in (16, 48, 64)
    }
    probe = HeldOutProbe({0}, projections)
    probe(*random_qkv(LAYOUT, batch=2), AttentionContext(LAYOUT))
    errors = torch.stack([torch.cat(probe.errors["optimal", rank]) for rank in (16, 48, 64)])
    assert errors.shape == (3, 2)
    assert (errors[0] > errors[1]).all() and (errors[1] > 0.05).all() and (errors[2] < 1e-5).all()


def test_rank_for_a_share():
    assert [rank_for([0.5, 0.25, 0.25, 0.0], share) for share in (0.4, 0.5, 0.6, 0.75, 1.0)] == [
        1,
        1,
        2,
        2,
        3,
    ]


def test_command_judges_on_a_prompt_it_has_not_seen(tmp_path, capsys):
    files = tmp_path / "run.json", tmp_path / "run.md"
    assert spectrum.main([*TINY, "--output", str(files[0]), "--markdown", str(files[1])]) == 0
    printed, run = capsys.readouterr().out, json.loads(files[0].read_text())
    assert printed == files[1].read_text() == tables(run)
    assert len(run["prompts"]) == 1 and run["held_out"] not in run["prompts"] and run["steps"] == [0]
    lost = {
        (entry["method"], entry["rank"]): torch.tensor(entry["lost"]) for entry in run["scores"]["errors"]
    }
    assert len(lost) == 12 and lost["pca", 32].shape == (2, 2)
    for rank in (16, 32, 48):
        assert (lost["optimal", rank] < lost["pca", rank]).all()
        assert (lost["pca", rank] < lost["random", rank]).all()
    for kind in ("scores", "values"):
        shares = torch.tensor(run[kind]["spectrum"])
        assert shares.shape == (2, 2, 64) and (shares.sum(-1) - 1).abs().max() < 1e-3
    assert "| 1 | 1 |" in printed and "`python -m harness.spectrum --model tiny-random" in printed


def test_the_committed_tables_are_those_of_the_committed_run():
    (path,) = COMMITTED.glob("spectrum_demo_*.json")
    assert path.with_suffix(".md").read_text() == tables(json.loads(path.read_text()))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--prompts", "0"], "--prompts must be at least 1"),
        (["--prompts", "1000"], "need 1001 prompts"),
        (["--steps-measured", "0"], "--steps-measured must be at least 1"),
        (["--ranks", "16"], "ranks"),
        (["--model", "nothing"], "there is no model 'nothing'"),
    ],
    ids=str,
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert spectrum.main(arguments) == 2
    assert message in capsys.readouterr().err
