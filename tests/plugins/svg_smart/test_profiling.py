import math

import pytest
import torch

from core import AttentionContext, TokenLayout
from core.testing import dense_fp64, random_qkv
from plugins.svg_smart.bands import band_patterns
from plugins.svg_smart.patterns import executed_blocks, frame_patterns, head_patterns
from plugins.svg_smart.profiling import allowed_keys, pattern_errors, sample_rows
from plugins.svg_smart.reference import attention_reference

LAYOUT = TokenLayout(6, 6, 4, 8)


def plan(layout=LAYOUT, diagonal=0, block=16):
    return head_patterns(
        [
            executed_blocks(layout, pattern, block_size=(block, block), keep="fraction")
            for pattern in frame_patterns(layout, diagonal=diagonal)
        ]
    )


def executed_pairs(patterns, index):
    """Pairs of the executed blocks in the model's order, ``[S, S]`` bool."""
    order = patterns.orders[index]
    pairs = torch.empty(len(order), len(order), dtype=torch.bool)
    pairs[order[:, None], order] = patterns.masks.to_dense()[0, index]
    return pairs


def test_allowed_keys_are_the_executed_blocks():
    patterns, rows = plan(), torch.tensor([6, 50, 197, 50])
    allowed = allowed_keys(patterns, rows)
    for index in range(2):
        assert torch.equal(allowed[index], executed_pairs(patterns, index)[rows])


def test_errors_over_all_rows_are_the_exhaustive_error():
    query, key, value = random_qkv(LAYOUT, heads=3)
    patterns, rows = plan(), torch.arange(LAYOUT.sequence_length)
    errors = pattern_errors(query, key, value, rows, patterns)
    exact = dense_fp64(query, key, value)
    for index in range(2):
        output = attention_reference(query, key, value, executed_pairs(patterns, index))
        expected = (output - exact).square().mean((-1, -2))
        assert (expected > 1e-4).all() and torch.allclose(errors[index].double(), expected, rtol=1e-4)


def test_the_batch_is_judged_entry_by_entry():
    first, second = random_qkv(LAYOUT), [part * 2 for part in random_qkv(LAYOUT)]
    both = [torch.cat(pair) for pair in zip(first, second, strict=True)]
    rows = sample_rows(8, 0, AttentionContext(LAYOUT), torch.device("cpu"))
    patterns = plan()
    together = pattern_errors(*both, rows, patterns)
    for entry, alone in enumerate((first, second)):
        one = pattern_errors(*alone, rows, patterns)
        assert torch.allclose(together[:, entry], one[:, 0], rtol=1e-5)


def test_full_patterns_have_no_error():
    query, key, value = random_qkv(LAYOUT)
    full = head_patterns(band_patterns(LAYOUT, density=1.0, sink=False, block=16, keep="fraction"))
    rows = torch.arange(0, LAYOUT.sequence_length, 5)
    assert pattern_errors(query, key, value, rows, full).max() == 0


def test_rows_are_video_tokens_and_repeat():
    for layout in (LAYOUT, TokenLayout(50, 2, 1, 3, text_first=False)):
        drawn = [
            sample_rows(64, 3, AttentionContext(layout, layer, 4, step), torch.device("cpu"))
            for layer in range(2)
            for step in (0, 0, 1)
        ]
        assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[0], drawn[2])
        assert not torch.equal(drawn[0], drawn[3])
        for rows in drawn:
            assert (rows >= layout.video_start).all()
            assert (rows < layout.video_start + layout.video_length).all()


@pytest.mark.parametrize("temporal", [False, True], ids=["spatial", "temporal"])
def test_planted_heads_are_recognised(temporal):
    """Keys share a code with queries of the same frame (spatial) or of the same place (temporal)."""
    layout = TokenLayout(4, 8, 4, 8)
    patterns = plan(layout)
    group = layout.token_places() if temporal else layout.token_frames()
    wrong = 0
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        codes = torch.randn(int(group.max()) + 2, 64, generator=generator)
        code = codes[group]
        noise = [torch.randn(1, 1, layout.sequence_length, 64, generator=generator) for _ in range(3)]
        query, key = (3 * code + 0.5 * part for part in noise[:2])
        context = AttentionContext(layout, step_index=seed)
        rows = sample_rows(32, seed, context, torch.device("cpu"))
        errors = pattern_errors(query, key, noise[2], rows, patterns)
        wrong += int((errors[1] < errors[0]).item() != temporal)
    assert wrong <= 1  # over 99 % right


@pytest.mark.parametrize("rows_count, dim", [(1, 64), (40, 48)])
def test_kernels_give_the_errors_in_fp32(rows_count, dim):
    # A GPU multiplies fp32 in TF32 here.
    _check_kernels(rows_count, dim, torch.float32, 2e-2 if torch.cuda.is_available() else 1e-5)


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device (bf16 is wrong in the interpreter)"
)
@pytest.mark.parametrize("dim", [64, 128])
def test_kernels_give_the_errors_in_bf16(dim):
    _check_kernels(32, dim, torch.bfloat16, 5e-2)


@pytest.mark.parametrize("log2_weight", [0, 26])
def test_patterns_far_below_the_peak_keep_their_weights_in_fp16(log2_weight):
    """One peak serves all: beside a key that neither pattern sees, their weights are 2^-26 of it."""
    _check_kernels(1, 64, torch.float16, 2e-2, log2_weight)


def _check_kernels(rows_count, dim, dtype, tolerance, log2_weight=0):
    """``log2_weight`` goes to one key that no pattern shows to the first sampled row."""
    kernels = pytest.importorskip("plugins.svg_smart.kernels", reason="needs triton")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parts = [part.to(device, dtype) for part in random_qkv(LAYOUT, heads=3, head_dim=dim)]
    rows = sample_rows(rows_count, 0, AttentionContext(LAYOUT), device)
    patterns = plan().to(device)
    if log2_weight:
        unseen = int((~allowed_keys(patterns, rows)[:, 0].any(0)).nonzero()[0])
        query = parts[0][:, :, rows[0]].float()
        scale = log2_weight * math.log(2) * dim**0.5 / query.square().sum(-1, keepdim=True)
        parts[1][:, :, unseen] = (query * scale).to(dtype)
        parts[2][:, :, unseen] = 0  # so that the error is the pattern's output
    errors = kernels.sampled_errors(*parts, rows, patterns)
    exact = dense_fp64(*parts)[:, :, rows]
    for found, pairs in zip(errors, allowed_keys(patterns, rows), strict=True):
        output = attention_reference(parts[0][:, :, rows], parts[1], parts[2], pairs)
        expected = (output - exact).square().mean((-1, -2))
        assert (expected > 1e-4).all() and torch.allclose(found.double(), expected, rtol=tolerance)
