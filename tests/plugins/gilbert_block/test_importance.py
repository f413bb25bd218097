import pytest
import torch

from core import TokenLayout
from core.testing import random_qkv
from plugins.gilbert_block import reference
from plugins.gilbert_block.importance import block_importance
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
@pytest.mark.parametrize("projection", ["none", "optimal", "pca", "channels", "random"])
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
    assert torch.equal(first, other) == (estimator == "mean")
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
@pytest.mark.parametrize("projection", ["optimal", "pca"])
def test_projections_lose_nothing_of_tokens_of_few_dimensions(estimator, projection):
    """Queries and keys of a 16-dimensional space, with an offset of the keys that no softmax sees."""
    query, key, _ = random_qkv(LAYOUT)
    space = torch.linalg.qr(torch.randn(64, 64, generator=source())).Q
    query, key = query @ space[:, :16] @ space[:, :16].T, key @ space[:, :16] @ space[:, :16].T
    query, key = 4 * query, key + space[:, 16]
    options = {"estimator": estimator, "samples": 16}
    whole = block_importance(query, key, (64, 64), source(3), **options)
    low = block_importance(query, key, (64, 64), source(3), projection=projection, directions=16, **options)
    random = block_importance(query, key, (64, 64), source(3), projection="random", directions=16, **options)
    assert (whole - low).abs().max() < 1e-5
    assert (whole - random).abs().max() > 1e-3


@pytest.mark.parametrize("estimator", ["sum", "mean"])
def test_recall_of_few_dimensions(estimator):
    """True mass in the best tenth of the blocks: more directions find more, and the optimal ones most."""
    layout = TokenLayout(0, 4, 16, 16)
    coarse = torch.randn(2, 64, 2, 4, 4, generator=source()) * torch.logspace(0, -1.5, 64).view(-1, 1, 1, 1)
    fields = torch.nn.functional.interpolate(coarse, (4, 16, 16), mode="trilinear").flatten(2).mT[:, None]
    noise, turns = (
        torch.randn(2, 1, 1024, 64, generator=source(1)),
        torch.randn(2, 64, 64, generator=source(2)),
    )
    turns[1] = torch.linalg.inv(turns[0]).T  # scores stay, while the strong directions are no channels
    query, key = (4 * (fields + 0.1 * noise) @ turns[:, None])[:, None]
    order = GilbertRearranger(layout).order
    true = reference.importance(query[0, 0, order], key[0, 0, order], (64, 64), maximum=False)

    def recall(projection, directions):
        options = {"order": order, "estimator": estimator, "projection": projection, "directions": directions}
        found = block_importance(query, key, (64, 64), source(3), **options)[0, 0]
        return float(true.gather(1, found.topk(2, -1).indices).sum(-1).mean())

    whole = recall("none", 64)
    curve = [recall("optimal", directions) for directions in (1, 4, 16, 32)]
    assert curve == sorted(curve) and curve[0] < 0.9 * whole and curve[-1] > 0.995 * whole
    assert curve[2] > max(recall(name, 16) for name in ("pca", "channels", "random")) - 1e-6
