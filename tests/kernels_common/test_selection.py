"""Both forms of the selection against a sort of every row in exact arithmetic."""

import math

import pytest
import torch

from core import BlockSparseMask, LayoutError, LevelMask, ParameterError
from core.level_mask import LEVELS
from kernels_common import lists_from_blocks, select_mass, select_top_k, selection

BLOCKS = (16, 16)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "triton"])
def form(request, monkeypatch):
    monkeypatch.setattr(selection, "runs_triton", lambda tensor: request.param == "triton")
    return request.param


@pytest.fixture
def importance(generator, device):
    """Rows of 21 key blocks for 2 query blocks, the first of each head with many ties."""
    rows = torch.rand(2, 2, 2, 21, generator=generator).pow(4)
    rows[:, :, 0] = (rows[:, :, 0] * 3).round() + 1
    return (rows / rows.sum(-1, keepdim=True)).to(device)


@pytest.fixture(params=[False, True], ids=["free", "forced"])
def forced(request, generator, device):
    if not request.param:
        return None
    blocks = torch.rand(2, 2, 2, 21, generator=generator) < 0.3
    blocks[0, 0, 1] = True
    return blocks.to(device)


def lengths(importance):
    """Token counts that make the last blocks ragged."""
    return importance.shape[2] * 16 - 5, importance.shape[3] * 16 - 9


def expected_blocks(importance, forced, number):
    """Kept blocks where ``number(importances of the candidates, head)`` gives how many to choose.

    The candidates come in order of rank; their importances are counted in multiples of 2^-36.
    """
    kept = torch.zeros(importance.shape, dtype=torch.bool) if forced is None else forced.cpu().clone()
    for batch, head, row in torch.cartesian_prod(*map(torch.arange, importance.shape[:3])).tolist():
        values = importance[batch, head, row].tolist()
        free = [column for column in range(len(values)) if not kept[batch, head, row, column]]
        ranked = sorted(free, key=lambda column: (-values[column], column))
        count = number([int(values[column] * 2**36) for column in ranked], head)
        kept[batch, head, row, ranked[:count]] = True
    return kept


def check(mask, expected):
    mask.check()
    assert torch.equal(mask.to_blocks().cpu(), expected)


@pytest.mark.parametrize(
    ("keep", "counts"),
    [(1, [1, 1]), (5, [5, 5]), (99, [21, 21]), (0.3, [6, 6]), (1.0, [21, 21]), (0.01, [1, 1]),
     ([4, 30], [4, 21]), ([0.0, 0.5], [1, 10])],
    ids=str,
)  # fmt: skip
def test_top_k(importance, forced, device, form, keep, counts):
    keep = torch.tensor(keep, device=device) if isinstance(keep, list) else keep
    mask = select_top_k(importance, keep, BLOCKS, *lengths(importance), forced=forced)
    check(mask, expected_blocks(importance, forced, lambda ranked, head: counts[head]))


@pytest.mark.parametrize("heads", [1, 2])
def test_top_k_of_every_row(importance, forced, device, form, heads):
    rows = importance.shape[2]
    keep = torch.arange(1, heads * rows + 1, device=device).view(heads, rows) * 2 % 7
    mask = select_top_k(importance, keep, BLOCKS, *lengths(importance), forced=forced)
    whole = [
        select_top_k(importance, number, BLOCKS, *lengths(importance), forced=forced).to_blocks()
        for number in range(1, 7)
    ]
    expected = torch.stack(
        [
            torch.stack(
                [whole[max(1, int(keep[head % heads, row])) - 1][:, head, row] for row in range(rows)], 1
            )
            for head in range(importance.shape[1])
        ],
        1,
    )
    check(mask, expected.cpu())


@pytest.mark.parametrize("include_crossing", [False, True], ids=["below", "reach"])
@pytest.mark.parametrize(
    ("mass", "bounds"),
    [(0.6, (1, 1.0)), (0.95, (3, 7)), (0.2, (5, 0.5)), (1.0, (1, 1.0)), (7.0, (1, 4)), ([0.3, 0.9], (1, 21))],
    ids=str,
)
def test_mass(importance, forced, device, form, mass, bounds, include_crossing):
    def number(ranked, head):
        share = mass[head] if isinstance(mass, list) else mass
        if share >= 1.0:
            return min(len(ranked), most)
        target, held, found = share * sum(ranked), 0, 0
        for value in ranked:
            held += value
            if held > target or (include_crossing and held == target):
                found += include_crossing
                break
            found += 1
        return min(max(found, fewest), most)

    fewest, most = (int(bound * 21) if isinstance(bound, float) else bound for bound in bounds)
    shares = torch.tensor(mass, dtype=torch.float64, device=device) if isinstance(mass, list) else mass
    mask = select_mass(
        importance, shares, BLOCKS, *lengths(importance), include_crossing=include_crossing,
        min_blocks=bounds[0], max_blocks=bounds[1], forced=forced,
    )  # fmt: skip
    check(mask, expected_blocks(importance, forced, number))


@pytest.mark.parametrize(
    ("mass", "below", "reach"),
    [(0.5, 1, 1), (0.7, 1, 2), (0.75, 2, 2), (0.8, 2, 3), (0.1, 1, 1), (1.0, 4, 4)],
)
def test_the_block_that_crosses_the_mass(device, form, mass, below, reach):
    row = torch.tensor([0.125, 0.5, 0.125, 0.25], device=device).view(1, 1, 1, 4)
    for include_crossing, count in ((False, below), (True, reach)):
        mask = select_mass(row, mass, BLOCKS, 16, 64, include_crossing=include_crossing)
        assert mask.indices[0, 0, 0, : mask.counts.item()].tolist() == sorted([1, 3, 0, 2][:count])


@pytest.mark.parametrize("include_crossing", [False, True])
def test_rows_without_mass_keep_the_fewest_blocks(device, form, include_crossing):
    rows = torch.zeros(1, 1, 2, 5, device=device)
    mask = select_mass(rows, 0.9, BLOCKS, 32, 80, include_crossing=include_crossing, min_blocks=2)
    assert mask.counts.tolist() == [[[2, 2]]]
    assert mask.indices[..., :2].tolist() == [[[[0, 1], [0, 1]]]]


def test_lists_of_levels(generator, device, form):
    choice = torch.randint(7, (2, 3, 2, 21), generator=generator)
    levels = torch.tensor([0, *LEVELS, 3, -1], dtype=torch.int8)[choice]
    levels[0, 0, 0] = 0
    levels[0, 0, 1] = 8
    counts, indices = selection.lists_from_levels(levels.to(device))
    mask = LevelMask(counts, indices, BLOCKS, 30, 330)
    mask.check()
    known = torch.isin(levels, torch.tensor(LEVELS, dtype=torch.int8))
    assert torch.equal(mask.to_levels().cpu(), levels * known)


def test_lists_of_levels_refuse_other_matrices(form):
    with pytest.raises(LayoutError, match=r"int8 \[B, H, Mq, Mk\]"):
        selection.lists_from_levels(torch.zeros(2, 3, dtype=torch.int8))
    with pytest.raises(LayoutError, match=r"int8 \[B, H, Mq, Mk\]"):
        selection.lists_from_levels(torch.zeros(1, 1, 2, 3))


def test_selections_are_nested(importance, form):
    def kept(mask):
        return mask.to_blocks()

    for smaller, larger in ((0.1, 0.4), (0.4, 0.9)):
        ranks = [select_top_k(importance, keep, BLOCKS, *lengths(importance)) for keep in (smaller, larger)]
        masses = [
            select_mass(importance, mass, BLOCKS, *lengths(importance), include_crossing=True)
            for mass in (smaller, larger)
        ]
        for first, second in (ranks, masses):
            assert (kept(first) <= kept(second)).all()
            assert (kept(first) != kept(second)).any()


@pytest.mark.parametrize("shape", [(21,), (2, 1), (2, 1, 21), (2, 1, 1, 1)], ids=str)
def test_forced_blocks_may_be_shared(importance, generator, device, form, shape):
    forced = (torch.rand(shape, generator=generator) < 0.5).to(device)
    mask = select_top_k(importance, 2, BLOCKS, *lengths(importance), forced=forced)
    whole = forced.expand(importance.shape)
    check(mask, expected_blocks(importance, whole, lambda ranked, head: 2))


def test_rows_of_many_blocks(generator, device, form):
    """More blocks than one warp of the kernel takes."""
    rows = torch.rand(1, 1, 1, 700, generator=generator).to(device).softmax(-1)
    mask = select_top_k(rows, 0.29, (16, 16), 16, 700 * 16)
    check(mask, expected_blocks(rows, None, lambda ranked, head: 203))
    mask = select_mass(rows, 0.5, (16, 16), 16, 700 * 16, include_crossing=True)
    kept = mask.to_blocks()
    assert rows[kept].sum() >= 0.5
    assert rows[kept].sum() - rows[kept].min() < 0.5
    assert rows[kept].min() > rows[~kept].max()


def test_a_share_that_is_a_whole_number_of_blocks(device, form):
    rows = torch.full((1, 1, 1, 100), 0.01, device=device)
    for keep in (0.29, torch.tensor([0.29], device=device)):  # 0.29 * 100 = 28.999...
        assert select_top_k(rows, keep, BLOCKS, 16, 1600).counts.item() == 29
    assert math.floor(0.29 * 100) == 28


@pytest.mark.parametrize("density", [0.0, 0.4, 1.0])
def test_lists_from_blocks(generator, device, form, density):
    blocks = (torch.rand(2, 1, 3, 37, generator=generator) < density).to(device)
    counts, indices = lists_from_blocks(blocks)
    expected = BlockSparseMask.from_blocks(blocks, BLOCKS, 48, 37 * 16)
    assert torch.equal(counts, expected.counts)
    assert counts.dtype == indices.dtype == torch.int32
    for row, wanted, count in zip(
        indices.flatten(0, 2), expected.indices.flatten(0, 2), counts.flatten(), strict=True
    ):
        assert torch.equal(row[:count], wanted[:count])


def test_wrong_calls_are_refused(importance, device):
    sizes = (BLOCKS, *lengths(importance))
    for keep in (0, -3, 0.0, 1.5):
        with pytest.raises(ParameterError, match="keep"):
            select_top_k(importance, keep, *sizes)
    for mass in (0.0, -1.0, float("nan")):
        with pytest.raises(ParameterError, match="mass"):
            select_mass(importance, mass, *sizes, include_crossing=True)
    with pytest.raises(ParameterError, match="must not exceed"):
        select_mass(importance, 0.5, *sizes, include_crossing=True, min_blocks=5, max_blocks=4)
    with pytest.raises(LayoutError, match=r"\[B, H, 4, 21\]"):
        select_top_k(importance, 1, BLOCKS, 64, 336)
    with pytest.raises(LayoutError, match="forced"):
        select_top_k(importance, 1, *sizes, forced=importance[0, 0, 0, :3] > 0)
    for wrong in (torch.ones(3, device=device), torch.ones(2, 3, device=device)):
        with pytest.raises(LayoutError, match=r"keep must be a number or \[2\] or \[2, 2\]"):
            select_top_k(importance, wrong, *sizes)
    with pytest.raises(LayoutError, match="bool"):
        lists_from_blocks(importance)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_agree_with_the_sort_on_large_masks(generator, device, monkeypatch):
    """Every choice, ties included, at the sizes of a real video."""
    rows = (
        torch.randn(2, 30, 139, 278, generator=generator).to(device).half().softmax(-1, dtype=torch.float32)
    )
    forced = (torch.rand(2, 30, 139, 278, generator=generator) < 0.05).to(device)
    shares = torch.rand(30, generator=generator, dtype=torch.float64).to(device)
    sizes = ((128, 64), 17776, 17776)
    results = []
    for triton in (False, True):
        monkeypatch.setattr(selection, "runs_triton", lambda tensor, triton=triton: triton)
        results.append([
            select_top_k(rows, shares, *sizes, forced=forced).to_blocks(),
            select_mass(rows, shares, *sizes, include_crossing=False, forced=forced).to_blocks(),
            select_mass(rows, shares, *sizes, include_crossing=True, max_blocks=0.4).to_blocks(),
        ])  # fmt: skip
    for plain, fast in zip(*results, strict=True):
        assert torch.equal(plain, fast)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_prediction_does_not_synchronise(generator, device):
    from kernels_common import (
        block_means,
        mean_pool_importance,
        sample_blocks,
        sampled_max_importance,
        token_mean,
    )

    query, key = torch.randn(2, 1, 2, 300, 64, generator=generator).to(device)
    shares = torch.tensor([0.3, 0.8], device=device)
    source = torch.Generator(device).manual_seed(1)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        queries, keys = block_means(query, 64), block_means(key, 64, subtract=token_mean(key))
        importance = mean_pool_importance(queries.mean, keys.mean, excluded=keys.similarity < 0.1)
        forced = (queries.similarity < 0.1)[..., None]
        select_top_k(importance, 0.5, (64, 64), 300, 300, forced=forced)
        select_mass(importance, shares, (64, 64), 300, 300, include_crossing=False)
        sample = sample_blocks(300, 64, 8, source)
        lists_from_blocks(sampled_max_importance(query, key, sample, sample) > 0.2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
