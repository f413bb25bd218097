"""Projected scores: their error is the one that theory promises, and no projection beats the optimal one."""

import math

import pytest
import torch

from core import LayoutError, ParameterError
from kernels_common.score_projection import (
    ScoreMoments,
    project_tokens,
    random_projection,
    reduce_tokens,
    score_error,
    score_moments,
    score_projection,
    score_spectrum,
)

METHODS = ["optimal", "pca", "channels", "random"]
DIM = 32


@pytest.fixture
def make_tokens(generator, device):
    """Queries and keys whose strengths fall along axes of their own, and keys far from the origin."""

    def make(strengths, queries=301, keys=257, *, kv_heads=2, axes=None, dtype=torch.float64):
        turns = [torch.linalg.qr(torch.randn(DIM, DIM, generator=generator).double()).Q for _ in range(2)]
        turns = turns if axes is None else axes
        tokens = [
            torch.randn(2, heads, length, DIM, generator=generator).double() * strengths @ turn
            for heads, length, turn in zip((4, kv_heads), (queries, keys), turns, strict=True)
        ]
        offset = torch.randn(2, kv_heads, 1, DIM, generator=generator)
        return [part.to(device, dtype) for part in (tokens[0], tokens[1] + offset)], turns

    return make


def falling(start=0.0, end=-2.0):
    return torch.logspace(start, end, DIM, dtype=torch.float64)


def centred_scores(query, key):
    """Scores as softmax sees them, all pairs, ``[B, Hkv, G * Nq, Nk]`` fp64."""
    key = key.double() - key.double().mean(2, keepdim=True)
    return query.double().reshape(*key.shape[:2], -1, query.shape[3]) @ key.mT


def pair_error(query, key, projection):
    exact = centred_scores(query, key)
    return (centred_scores(*project_tokens(query, key, projection)) - exact).square().mean((2, 3))


def test_spectrum_sums_to_the_energy_of_the_scores(make_tokens):
    tokens, _ = make_tokens(falling())
    spectrum = score_spectrum(score_moments(*tokens))
    energy = centred_scores(*tokens).square().mean((2, 3))
    assert torch.allclose(spectrum.sum(-1), energy, rtol=1e-10)
    assert (spectrum.diff(dim=-1) <= 0).all() and (spectrum >= 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_error_of_the_moments_is_that_of_all_pairs(make_tokens, method):
    tokens, _ = make_tokens(falling())
    moments = score_moments(*tokens)
    projection = score_projection(moments, method, 8)
    assert torch.allclose(score_error(moments, projection), pair_error(*tokens, projection), rtol=1e-8)


@pytest.mark.parametrize("directions", [4, 8, 16])
def test_least_error_is_the_tail_of_the_spectrum(make_tokens, generator, directions):
    """A gap behind the last direction lets the power iterations converge."""
    axes = [torch.linalg.qr(torch.randn(DIM, DIM, generator=generator).double()).Q] * 2
    strengths = torch.where(torch.arange(DIM) < directions, 1.0, 0.02) * falling(0.0, -0.5)
    tokens, _ = make_tokens(strengths, axes=axes)
    moments = score_moments(*tokens)
    tail = score_spectrum(moments)[..., directions:].sum(-1)
    error = pair_error(*tokens, score_projection(moments, "optimal", directions))
    assert torch.allclose(error, tail, rtol=1e-5)


def test_without_a_gap_the_error_is_close_to_the_tail(make_tokens):
    tokens, _ = make_tokens(falling())
    moments = score_moments(*tokens)
    for directions in (4, 8, 16):
        tail = score_spectrum(moments)[..., directions:].sum(-1)
        error = score_error(moments, score_projection(moments, "optimal", directions))
        assert (error > (1 - 1e-6) * tail).all() and error.sum() < 1.3 * tail.sum()


@pytest.mark.parametrize("directions", [4, 8, 16])
def test_order_of_methods_on_held_out_tokens(make_tokens, directions):
    tokens, axes = make_tokens(falling())
    held_out, _ = make_tokens(falling(), axes=axes)
    moments = score_moments(*tokens)
    errors = [
        pair_error(*held_out, score_projection(moments, method, directions)).mean()
        for method in ("optimal", "pca", "random")
    ]
    assert errors[0] < errors[1] < errors[2]


@pytest.mark.parametrize("method", METHODS)
def test_all_directions_are_exact(make_tokens, method):
    tokens, _ = make_tokens(falling(), dtype=torch.float32)
    projection = score_projection(score_moments(*tokens), method, DIM)
    exact = centred_scores(*tokens)
    found = centred_scores(*project_tokens(*tokens, projection))
    assert (found - exact).abs().max() < 1e-5 * exact.abs().max()
    assert all(a is b for a, b in zip(reduce_tokens(*tokens, method, DIM), tokens, strict=True))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype, error", [(torch.float32, 2.0**-20), (torch.float16, 2.0**-9)], ids=str)
def test_tokens_keep_their_dtype_and_heads_their_group(make_tokens, method, dtype, error):
    tokens, _ = make_tokens(falling(), kv_heads=1, dtype=dtype)
    low = reduce_tokens(*tokens, method, 8)
    assert [part.shape for part in low] == [(2, 4, 301, 8), (2, 1, 257, 8)]
    assert {part.dtype for part in low} == {dtype}
    projection = score_projection(score_moments(*tokens), method, 8)
    exact = (tokens[0].double() @ projection.query, tokens[1].double() @ projection.key)
    for part, expected in zip(low, exact, strict=True):
        assert (part - expected).abs().max() <= error * expected.abs().max()


@pytest.mark.parametrize("method", METHODS)
def test_softmax_does_not_see_an_offset_of_the_keys(make_tokens, generator, method):
    (query, key), _ = make_tokens(falling())
    offset = torch.randn(2, 2, 1, DIM, generator=generator, dtype=torch.float64).to(key.device)
    weights = []
    for keys in (key, key + offset):
        low_query, low_key = reduce_tokens(query, keys, method, 8)
        weights.append((low_query @ low_key.repeat_interleave(2, 1).mT).softmax(-1))
    assert (weights[0] - weights[1]).abs().max() < 1e-9


def test_principal_directions_are_those_of_the_keys(make_tokens):
    """However unequal they are."""
    strengths = torch.cat([torch.logspace(0, -2.5, 8), torch.full((DIM - 8,), 1e-5)])
    (query, key), _ = make_tokens(strengths)
    basis = score_projection(score_moments(query, key), "pca", 8).query
    centred = key - key.mean(2, keepdim=True)
    leading = torch.linalg.svd(centred, full_matrices=False).Vh[..., :8, :]
    assert (basis.mT @ basis - torch.eye(8, device=key.device)).abs().max() < 1e-9
    assert (basis @ basis.mT - leading.mT @ leading).abs().max() < 1e-6


def test_channels_are_the_strong_ones(make_tokens):
    eye = torch.eye(DIM, dtype=torch.float64)
    strengths = torch.ones(DIM)
    strengths[[3, 10, 11, 30]] = 4.0
    tokens, _ = make_tokens(strengths, axes=[eye, eye])
    tokens[0][..., 5] *= 8  # large, but not where keys are large too
    tokens[1][..., 5] /= 8
    tokens[1][..., 6] *= 8
    tokens[0][..., 6] /= 8
    projection = score_projection(score_moments(*tokens), "channels", 4)
    chosen = projection.query.sum(-1)
    assert (chosen[..., [3, 10, 11, 30]] == 1).all() and chosen.sum() == 4 * 4
    low = project_tokens(*tokens, projection)
    assert {float(x) for x in low[0][0, 0, 0]} == {float(x) for x in tokens[0][0, 0, 0, [3, 10, 11, 30]]}


def test_random_products_are_unbiased(generator):
    query, key = torch.randn(2, 1, 1, 1, DIM, generator=generator).double()
    moments = ScoreMoments(*torch.eye(DIM, dtype=torch.float64).expand(2, 1, 1, DIM, DIM))
    products = torch.stack(
        [
            (low_query * low_key).sum()
            for low_query, low_key in (
                project_tokens(query, key, random_projection(moments, 8, generator)) for _ in range(3000)
            )
        ]
    )
    assert abs(products.mean() - (query * key).sum()) < 5 * products.std() / math.sqrt(len(products))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rank", [0, 3, 8])
@pytest.mark.parametrize("directions", [8, 31])
def test_tokens_of_few_dimensions_lose_nothing_and_stay_finite(make_tokens, method, rank, directions):
    (query, key), _ = make_tokens(torch.where(torch.arange(DIM) < rank, 1.0, 0.0))
    low = reduce_tokens(query, key, method, directions)
    assert all(part.isfinite().all() for part in low)
    if method in ("optimal", "pca"):
        assert (centred_scores(*low) - centred_scores(query, key)).abs().max() < 1e-6


def test_wrong_calls_are_refused():
    tokens = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(ParameterError, match="directions must be from 1 to the head dimension 8, got 0"):
        reduce_tokens(*tokens, "pca", 0)
    with pytest.raises(ParameterError, match="must be optimal, pca, channels or random, got 'best'"):
        reduce_tokens(*tokens, "best", 4)
    for key in (tokens[1][:, :, :0], tokens[1][0], tokens[1][..., :4], tokens[1].expand(2, -1, -1, -1)):
        with pytest.raises(LayoutError, match="queries and keys must"):
            score_moments(tokens[0], key)
