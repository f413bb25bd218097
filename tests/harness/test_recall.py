"""Recall: what it measures, and what the command prints and refuses."""

import pytest
import torch

from core import AttentionContext, TokenLayout, create_strategy
from core.testing import random_qkv
from harness import recall
from harness.recall import RecallProbe, recall_of, true_mass

LAYOUT = TokenLayout(16, 4, 8, 11)
GILBERT = "gilbert-block:block_size=64,samples=8,selection=topk"


def test_mass_is_the_softmax_summed_over_blocks():
    query, key, _ = random_qkv(LAYOUT)
    weights = (query.double() @ key.double().transpose(-1, -2) / 8).softmax(-1)
    expected = torch.stack(
        [
            torch.stack([cell.sum(-1).mean(-1) for cell in rows.split(32, -1)], -1)
            for rows in weights.split(64, 2)
        ],
        2,
    )
    assert (true_mass(query, key, (64, 32)) - expected).abs().max() < 1e-6


@pytest.mark.parametrize(
    "name, options",
    [
        ("gilbert-block", {"samples": 8, "tau": 0.3}),
        ("gilbert-block", {"samples": 8, "selection": "rank", "key_block_size": 64}),
        ("sparge", {"topk": 0.3, "key_block_size": 64}),
        ("radial", {}),
    ],
)
def test_recall_is_the_mass_of_the_kept_pairs(name, options):
    query, key, _ = random_qkv(LAYOUT)
    strategy = create_strategy(name, block_size=64, **options)
    context = AttentionContext(LAYOUT)
    found = recall_of(strategy, 3 * query, key, context)
    pattern = strategy.pattern(3 * query, key, context)
    order = torch.arange(LAYOUT.sequence_length) if pattern.order is None else pattern.order
    blocks = pattern.mask.to_levels() > 0 if "selection" in options else pattern.mask.to_blocks()
    tokens = blocks.repeat_interleave(64, -2).repeat_interleave(pattern.mask.block_size[1], -1)
    seen = tokens[..., : LAYOUT.sequence_length, : LAYOUT.sequence_length]
    weights = (3 * query[:, :, order].double() @ key[:, :, order].double().transpose(-1, -2) / 8).softmax(-1)
    held = (weights * seen).sum(-1).mean(-1)
    assert float(found.held) == pytest.approx(float(held.mean()), abs=1e-5)
    assert float(found.worst) == pytest.approx(float(held.min()), abs=1e-5)
    assert found.held - 1e-6 <= found.best < 1 and float(found.density) == pytest.approx(
        float(pattern.density)
    )


def test_the_best_choice_is_the_truth_itself(monkeypatch):
    query, key, _ = random_qkv(LAYOUT)
    options = {"block_size": 64, "samples": 64, "importance": "sum", "selection": "topk"}
    strategy = create_strategy("gilbert-block", **options)
    monkeypatch.setattr("plugins.gilbert_block.strategy.forced_blocks", nothing_forced)
    found = recall_of(strategy, 3 * query, key, AttentionContext(LAYOUT))
    assert float(found.held) == pytest.approx(float(found.best), abs=1e-6) and found.held < 0.9


def nothing_forced(layout, block_size):
    blocks = [-(-layout.sequence_length // size) for size in block_size]
    return torch.zeros(blocks, dtype=torch.bool)


def test_probe_is_dense_and_asks_at_its_steps():
    tensors = random_qkv(LAYOUT)
    probe = RecallProbe([create_strategy("sparge", block_size=64)], {1})
    for step in range(3):
        output = probe(*tensors, AttentionContext(LAYOUT, step_index=step, num_steps=3))
        assert torch.equal(output, torch.nn.functional.scaled_dot_product_attention(*tensors))
    assert len(probe.found[0]) == 1


def test_command_prints_a_row_per_strategy(capsys):
    specs = [f"{GILBERT},keep_ratio=0.3", f"{GILBERT},keep_ratio=1.0"]
    arguments = ["--model", "tiny-random", "--steps", "2", "--steps-measured", "1"]
    assert recall.main(["--strategies", *specs, *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4 and lines[2].startswith(f"| {specs[0]} | 0.")
    assert lines[3].endswith("| 1.000 | 1.000 | 1.000 | 1.000 | 1.000 |")


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--strategies", "tome"], "strategy 'tome' does not decide by blocks"),
        (["--strategies", "sparge", "--prompts", "0"], "--prompts must be at least 1"),
        (["--strategies", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line(arguments, message, capsys):
    assert recall.main(arguments) == 2
    assert message in capsys.readouterr().err
