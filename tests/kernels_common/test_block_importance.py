"""Block importances against the softmax attention matrix in fp64, and what a sample is."""

import pytest
import torch

from core import LayoutError, ParameterError
from kernels_common import (
    block_importance,
    mean_pool_importance,
    sample_blocks,
    sampled_max_importance,
    sampled_sum_importance,
)

# Relative: scores of D terms in fp32, then an exponential.
TOLERANCE = {"rtol": 2.0**-16, "atol": 2.0**-24}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "triton"])
def form(request, monkeypatch):
    monkeypatch.setattr(block_importance, "runs_triton", lambda tensor: request.param == "triton")
    return request.param


@pytest.fixture
def make_tokens(generator, device):
    def make(queries, keys, *, batch=1, heads=2, kv_heads=2, dim=16, dtype=torch.float32):
        query = torch.randn(batch, heads, queries, dim, generator=generator)
        key = torch.randn(batch, kv_heads, keys, dim, generator=generator)
        return query.to(device, dtype), key.to(device, dtype)

    return make


def softmax_weights(query, key, scale=None):
    key = key.double().repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query.double() @ key.transpose(2, 3) * (scale or query.shape[3] ** -0.5)).softmax(-1)


def pooled(weights, rows, columns, reduce):
    """One number per block pair, by a loop over all pairs."""
    lines = [
        torch.stack([reduce(cell) for cell in line.split(columns, 3)], -1) for line in weights.split(rows, 2)
    ]
    return torch.stack(lines, 2)


def largest(cell):
    return cell.amax((2, 3))


def mass(cell):
    return cell.sum((2, 3)) / cell.shape[2]


METHODS = [(sampled_max_importance, largest), (sampled_sum_importance, mass)]


@pytest.mark.parametrize(("importance_of", "reduce"), METHODS, ids=["max", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize(
    ("queries", "keys", "heads", "samples"),
    [
        (1, 1, (2, 2), (8, 4)),
        (50, 77, (4, 2), (16, 8)),
        (70, 130, (2, 1), (32, 64)),
        (130, 40, (1, 1), (1, 2)),
    ],
    ids=str,
)
def test_sampling_every_token_is_exact(
    make_tokens, generator, form, importance_of, reduce, dtype, queries, keys, heads, samples
):
    query, key = make_tokens(queries, keys, heads=heads[0], kv_heads=heads[1], dtype=dtype)
    source = torch.Generator(query.device).manual_seed(1)
    query_sample = sample_blocks(queries, samples[0], samples[0], source)
    key_sample = sample_blocks(keys, samples[1], samples[1], source)
    importance = importance_of(query, key, query_sample, key_sample, scale=0.7)
    expected = pooled(softmax_weights(query, key, 0.7), *samples, reduce)
    expected /= expected.sum(-1, keepdim=True)
    assert importance.dtype == torch.float32
    torch.testing.assert_close(importance.double(), expected, **TOLERANCE)
    torch.testing.assert_close(importance.sum(-1), torch.ones_like(importance[..., 0]))


@pytest.mark.parametrize(("importance_of", "reduce"), METHODS, ids=["max", "sum"])
def test_a_sample_is_the_whole_answer(make_tokens, device, form, importance_of, reduce):
    """Importances depend on the sampled tokens only, and are those of their attention matrix."""
    query, key = make_tokens(100, 90, batch=2, dim=20)
    source = torch.Generator(device).manual_seed(2)
    query_sample, key_sample = sample_blocks(100, 32, 8, source), sample_blocks(90, 16, 4, source)
    rows, columns = query_sample.positions, key_sample.positions
    expected = pooled(softmax_weights(query[:, :, rows], key[:, :, columns]), 8, 4, reduce)
    for tokens, positions in ((query, rows), (key, columns)):
        others = torch.ones(tokens.shape[2], dtype=torch.bool, device=device)
        others[positions] = False
        tokens[:, :, others] = float("nan")
    importance = importance_of(query, key, query_sample, key_sample)
    torch.testing.assert_close(importance.double(), expected / expected.sum(-1, keepdim=True), **TOLERANCE)


def test_large_scores_do_not_overflow(make_tokens, device, form):
    query, key = make_tokens(20, 20)
    sample = sample_blocks(20, 4, 4, torch.Generator(device).manual_seed(3))
    for importance_of in (sampled_max_importance, sampled_sum_importance):
        importance = importance_of(query * 100, key * 100, sample, sample)
        torch.testing.assert_close(importance.sum(-1), torch.ones_like(importance[..., 0]))


def test_chunks_do_not_change_the_result(make_tokens, device, monkeypatch):
    query, key = make_tokens(50, 50)
    sample = sample_blocks(50, 8, 4, torch.Generator(device).manual_seed(4))
    monkeypatch.setattr(block_importance, "runs_triton", lambda tensor: False)
    whole = sampled_sum_importance(query, key, sample, sample)
    monkeypatch.setattr(block_importance, "SCORES_PER_CHUNK", 1)
    torch.testing.assert_close(sampled_sum_importance(query, key, sample, sample), whole)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_mean_pool(make_tokens, generator, device, kv_heads):
    query, key = make_tokens(5, 9, batch=2, heads=4, kv_heads=kv_heads)
    torch.testing.assert_close(
        mean_pool_importance(query, key).double(), softmax_weights(query, key), **TOLERANCE
    )
    excluded = torch.rand(2, kv_heads, 9, generator=generator).to(device) < 0.5
    excluded[0, 0] = True
    importance = mean_pool_importance(query, key, scale=2.0, excluded=excluded)
    outside = excluded.repeat_interleave(4 // kv_heads, 1)[:, :, None].expand_as(importance)
    expected = softmax_weights(query, key, 2.0).masked_fill(outside, 0.0)
    expected /= expected.sum(-1, keepdim=True)
    expected[0, : 4 // kv_heads] = 1 / 9
    torch.testing.assert_close(importance.double(), expected, **TOLERANCE)


@pytest.mark.parametrize(
    ("length", "block", "samples", "tail"), [(1, 8, 4, 1), (37, 16, 8, 3), (64, 16, 16, 16), (65, 64, 2, 1)]
)
def test_a_sample_has_its_share_of_every_block(length, block, samples, tail):
    sample = sample_blocks(length, block, samples, torch.Generator().manual_seed(5))
    places = sample.positions.split(samples)
    assert [len(part) for part in places] == [samples] * (-(-length // block) - 1) + [tail]
    for index, part in enumerate(places):
        assert part.unique().numel() == part.numel()
        assert (part // block == index).all()
        assert (part < length).all()


def test_a_sample_depends_on_its_generator_only():
    state = torch.get_rng_state()
    first, again, other = (
        sample_blocks(1000, 64, 8, torch.Generator().manual_seed(seed)).positions for seed in (6, 6, 7)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_every_token_can_be_drawn():
    source = torch.Generator().manual_seed(8)
    drawn = torch.cat([sample_blocks(20, 8, 2, source).positions for _ in range(200)])
    assert drawn.unique().tolist() == list(range(20))


def test_wrong_calls_are_refused(make_tokens, device):
    query, key = make_tokens(8, 8)
    source = torch.Generator(device).manual_seed(9)
    for samples in (0, 3, 16):
        with pytest.raises(ParameterError, match="power of two"):
            sample_blocks(100, 8, samples, source)
    with pytest.raises(ParameterError, match="positive"):
        mean_pool_importance(query, key, scale=-1.0)
    with pytest.raises(LayoutError, match="multiple"):
        mean_pool_importance(query[:, :1], key)
    with pytest.raises(LayoutError, match="share B and D"):
        mean_pool_importance(query, key[..., :4])
    with pytest.raises(LayoutError, match=r"queries torch.float32 on \w+.*, keys torch.float16 on"):
        mean_pool_importance(query, key.half())
    with pytest.raises(LayoutError, match=r"\[B, H, N, D\]; got queries \(.*\), keys \("):
        mean_pool_importance(query, key[0])
    with pytest.raises(LayoutError, match="excluded"):
        mean_pool_importance(query, key, excluded=torch.zeros(8, dtype=torch.bool, device=device))
