import math

import pytest
import torch

from core import TokenLayout
from core.testing import random_qkv
from plugins.gilbert_block import reference
from plugins.gilbert_block.importance import block_importance, principal_directions
from plugins.gilbert_block.rearranger import GilbertRearranger

LAYOUT = TokenLayout(10, 4, 7, 11)


def source(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("blocks", [(64, 64), (32, 64), (64, 32)], ids=str)
@pytest.mark.parametrize("estimator", ["max", "sum"])
def test_all_tokens_give_the_definition(estimator, blocks):
    query, key, _ = random_qkv(LAYOUT)
    order = GilbertRearranger(LAYOUT).order
    found = block_importance(
        query, key, blocks, source(), order=order, estimator=estimator, samples=blocks[0]
    )
    for head in range(2):
        moved = query[0, head, order], key[0, head, order]
        expected = reference.importance(*moved, blocks, maximum=estimator == "max")
        assert (found[0, head] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("estimator", ["max", "sum", "mean"])
@pytest.mark.parametrize("projection", ["none", "pca", "random"])
def test_rows_sum_to_one_and_repeat_with_the_seed(estimator, projection):
    query, key, _ = random_qkv(LAYOUT, heads=4)
    state = torch.get_rng_state()
    options = {"estimator": estimator, "projection": projection, "samples": 8}
    first, again, other = (
        block_importance(query, key[:, ::2], (64, 32), source(seed), **options) for seed in (0, 0, 1)
    )
    assert first.shape == (1, 4, 5, 10) and (first >= 0).all()
    assert (first.sum(-1) - 1).abs().max() < 1e-5
    assert torch.equal(first, again)
    assert torch.equal(first, other) == (estimator == "mean" and projection == "none")
    assert torch.equal(torch.get_rng_state(), state)


def test_mean_importance_reads_the_order():
    query, key, _ = random_qkv(LAYOUT)
    order = GilbertRearranger(LAYOUT).order
    found = block_importance(query, key, (64, 64), source(), order=order, estimator="mean")
    queries, keys = (
        torch.stack([block.mean(1) for block in part[0, :, order].double().split(64, 1)], 1)
        for part in (query, key)
    )
    expected = (queries @ keys.transpose(1, 2) / 8).softmax(-1)
    assert (found[0] - expected).abs().max() < 1e-6


@pytest.mark.parametrize("estimator", ["max", "sum", "mean"])
def test_principal_directions_lose_nothing_of_tokens_that_live_in_them(estimator):
    """Queries and keys of a 16-dimensional space, with an offset of the keys that no softmax sees."""
    query, key, _ = random_qkv(LAYOUT)
    space = torch.linalg.qr(torch.randn(64, 64, generator=source())).Q
    query, key = query @ space[:, :16] @ space[:, :16].T, key @ space[:, :16] @ space[:, :16].T
    query, key = 4 * query, key + space[:, 16]
    options = {"estimator": estimator, "samples": 16}
    whole = block_importance(query, key, (64, 64), source(3), **options)
    low = block_importance(query, key, (64, 64), source(3), projection="pca", directions=16, **options)
    random = block_importance(query, key, (64, 64), source(3), projection="random", directions=16, **options)
    assert (whole - low).abs().max() < 1e-5
    assert (whole - random).abs().max() > 1e-3


def test_random_directions_keep_products_on_average():
    from plugins.gilbert_block.importance import _projected

    generator = source()
    query, key = torch.randn(2, 1, 1, 1, 64, generator=generator)
    products = [
        float((low_query * low_key).sum())
        for low_query, low_key in (_projected(query, key, "random", 16, generator) for _ in range(4000))
    ]
    exact, spread = float((query * key).sum()), float(torch.tensor(products).std())
    assert abs(sum(products) / 4000 - exact) < 4 * spread / math.sqrt(4000)


def test_principal_directions_are_the_leading_eigenvectors():
    generator = source()
    strengths = torch.tensor([8.0, 6.0, 5.0, 4.0] + [0.1] * 28)
    tokens = torch.randn(1, 1, 500, 32, generator=generator) * strengths
    start = torch.linalg.qr(torch.randn(32, 4, generator=generator)).Q
    basis = principal_directions(tokens, tokens, start)[0, 0]
    assert (basis.T @ basis - torch.eye(4)).abs().max() < 1e-5
    assert (basis[:4].square().sum() - 4).abs() < 1e-3
