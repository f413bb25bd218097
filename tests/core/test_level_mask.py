from itertools import chain

import pytest
import torch

from core import BlockSparseMask, LayoutError, LevelMask
from core.block_mask import block_count
from core.level_mask import LEVELS

SHAPES = [((64, 64), 256, 256), ((128, 64), 300, 1000), ((16, 32), 33, 1), ((64, 128), 63, 201)]


def random_levels(block_size, query_length, key_length, batch=2, heads=3):
    rows, columns = block_count(query_length, block_size[0]), block_count(key_length, block_size[1])
    choice = torch.randint(5, (batch, heads, rows, columns))
    return torch.tensor([0, *LEVELS], dtype=torch.int8)[choice]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_hold_every_level_in_ascending_order(shape):
    levels = random_levels(*shape)
    mask = LevelMask.from_levels(levels, *shape)
    mask.check()
    for b, h, row in torch.cartesian_prod(*map(torch.arange, levels.shape[:3])).tolist():
        expected = [(levels[b, h, row] == level).nonzero().flatten().tolist() for level in LEVELS]
        assert mask.counts[b, h, row].tolist() == [len(blocks) for blocks in expected]
        listed = mask.indices[b, h, row, : mask.counts[b, h, row].sum()].tolist()
        assert listed == list(chain(*expected))
    assert torch.equal(mask.to_levels(), levels)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_density_counts_pooled_keys(shape):
    block_size, query_length, key_length = shape
    levels = random_levels(*shape)
    pairs = 0
    for row in range(query_length):
        for level in LEVELS:
            starts = torch.arange(0, key_length, level) // block_size[1]
            pairs += (levels[:, :, row // block_size[0], starts] == level).sum().item()
    expected = pairs / (levels.shape[0] * levels.shape[1] * query_length * key_length)
    density = LevelMask.from_levels(levels, *shape).density()
    assert density.dtype == torch.float64
    assert density.item() == pytest.approx(expected, abs=1e-12)


def test_density_of_the_four_bounds():
    """Five, ten, ten and twenty-five of a hundred blocks cost (5 + 10/2 + 10/4 + 25/8) / 100."""
    row = torch.tensor([1] * 5 + [2] * 10 + [4] * 10 + [8] * 25 + [0] * 50, dtype=torch.int8)
    mask = LevelMask.from_levels(row[None], (64, 64), 64, 6400)
    assert mask.density().item() == pytest.approx(0.15625, abs=1e-15)


def test_other_values_leave_a_block_out():
    levels = torch.tensor([[8, 3, -1, 1, 0, 16, 2, 1]], dtype=torch.int8)
    mask = LevelMask.from_levels(levels, (64, 64), 64, 512)
    mask.check()
    assert mask.to_levels().flatten().tolist() == [8, 0, 0, 1, 0, 0, 2, 1]
    assert mask.indices.flatten()[: mask.counts.sum()].tolist() == [3, 7, 6, 0]


def test_garbage_past_the_counts_is_never_read():
    shape = ((64, 64), 300, 400)
    levels = random_levels(*shape)
    clean = LevelMask.from_levels(levels, *shape)
    poisoned = LevelMask(clean.counts, clean.indices.masked_fill(clean.listed_levels() == 0, 2**30), *shape)
    poisoned.check()
    assert torch.equal(poisoned.to_levels(), levels)
    assert poisoned.density() == clean.density()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_lists_are_those_of_the_transposed_matrix(shape):
    levels = random_levels(*shape)
    counts, indices = LevelMask.from_levels(levels, *shape).transposed_lists()
    for b, h, column in torch.cartesian_prod(*map(torch.arange, (2, 3, levels.shape[3]))).tolist():
        seen = [(levels[b, h, :, column] == level).nonzero().flatten().tolist() for level in LEVELS]
        assert counts[b, h, column].tolist() == [len(rows) for rows in seen]
        assert indices[b, h, column, : counts[b, h, column].sum()].tolist() == list(chain(*seen))


def test_a_block_mask_is_all_level_one():
    blocks = torch.rand(2, 1, 5, 7) < 0.5
    block_mask = BlockSparseMask.from_blocks(blocks, (64, 64), 300, 400)
    mask = LevelMask.from_block_mask(block_mask)
    mask.check()
    assert torch.equal(mask.to_levels(), blocks.to(torch.int8))
    assert mask.density() == block_mask.density()


def test_empty_rows_and_empty_masks():
    mask = LevelMask.from_levels(torch.zeros(2, 2, dtype=torch.int8), (64, 64), 100, 100)
    mask.check()
    assert mask.counts.shape == (1, 1, 2, 4)
    assert mask.density() == 0 and not mask.to_levels().any()
    for lengths in ((100, 0), (0, 100)):
        blocks = [block_count(length, 64) for length in lengths]
        empty = LevelMask.from_levels(torch.zeros(blocks, dtype=torch.int8), (64, 64), *lengths)
        assert empty.density() == 0


def test_wrong_shapes_are_refused():
    with pytest.raises(LayoutError, match=r"int8 \[..., 2, 2\]"):
        LevelMask.from_levels(torch.ones(3, 2, dtype=torch.int8), (64, 64), 100, 100)
    with pytest.raises(LayoutError, match=r"int8 \[..., 2, 2\]"):
        LevelMask.from_levels(torch.ones(2, 2, dtype=torch.int32), (64, 64), 100, 100)
    with pytest.raises(LayoutError, match="multiples of 8"):
        LevelMask.from_levels(torch.ones(2, 9, dtype=torch.int8), (64, 12), 100, 100)
    counts = torch.zeros(1, 1, 2, 4, dtype=torch.int32)
    with pytest.raises(LayoutError, match="int32"):
        LevelMask(counts.long(), counts, (64, 64), 100, 100)
    with pytest.raises(LayoutError, match="make 3 rows"):
        LevelMask(counts, counts, (64, 64), 150, 100)
    with pytest.raises(LayoutError, match="4 levels"):
        LevelMask(counts[..., :3], counts, (64, 64), 100, 100)
    for block_size, length in (((64,), 100), (64, 100), ((64, 0), 100), ((64, 64), 100.0), ((64, 64), -1)):
        with pytest.raises(LayoutError, match="expected the tokens of a"):
            LevelMask(counts, counts, block_size, 100, length)


@pytest.mark.parametrize(
    ("counts", "row", "message"),
    [
        ((2, 0, 0, 0), [1, 0], "ascend strictly"),
        ((0, 2, 0, 0), [0, 0], "ascend strictly"),
        ((0, 0, 0, 2), [0, 5], "ascend strictly"),
        ((1, 1, 0, 0), [-1, 0], "ascend strictly"),
        ((1, 1, 0, 0), [1, 1], "two levels"),
        ((1, 1, 1, 0), [0, 1], "sum to at most 2"),
        ((-1, 1, 1, 0), [0, 1], "negative"),
    ],
    ids=str,
)
def test_check_finds_bad_lists(counts, row, message):
    counts = torch.tensor([[[counts]]], dtype=torch.int32)
    indices = torch.tensor([[[row]]], dtype=torch.int32)
    with pytest.raises(LayoutError, match=message):
        LevelMask(counts, indices, (64, 64), 64, 192).check()


def test_levels_may_fall_back_to_lower_indices():
    counts = torch.tensor([[[[1, 0, 1, 0]]]], dtype=torch.int32)
    LevelMask(counts, torch.tensor([[[[2, 0]]]], dtype=torch.int32), (64, 64), 64, 192).check()
