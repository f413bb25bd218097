"""Both forms of a mask's density against its tokens, counted one by one."""

import pytest
import torch

from core import BlockSparseMask, LevelMask
from core.level_mask import LEVELS
from kernels_common import mask_density

# (query block, key block), queries, keys: whole blocks, ragged ones, one block only.
SHAPES = [((64, 64), 256, 192), ((64, 32), 130, 333), ((16, 64), 3, 65), ((128, 16), 100, 9)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "triton"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(mask_density, "runs_triton", lambda tensor: request.param == "triton")


def blocks_of(generator, values, shape):
    (rows, columns), queries, keys = shape
    choice = torch.randint(len(values), (2, 3, -(-queries // rows), -(-keys // columns)), generator=generator)
    return torch.tensor(values, dtype=torch.int8)[choice]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_block_mask_counts_its_pairs(generator, device, shape):
    blocks = blocks_of(generator, [0, 0, 1], shape) > 0
    mask = BlockSparseMask.from_blocks(blocks.to(device), *shape)
    expected = mask.to_dense().double().mean().item()
    density = mask_density.mask_density(mask)
    assert density.dtype == torch.float64 and density.dim() == 0 and density.device.type == device.type
    assert density.item() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("lengths", [(0, 65), (65, 0)], ids=str)
def test_without_a_pair_it_is_zero(lengths, device):
    assert mask_density.mask_density(BlockSparseMask.full((64, 64), *lengths, device)).item() == 0


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_level_mask_counts_its_pooled_pairs(generator, device, shape):
    (rows, columns), queries, keys = shape
    levels = blocks_of(generator, [0, *LEVELS], shape)
    mask = LevelMask.from_levels(levels.to(device), *shape)
    pairs = 0
    for row in range(queries):
        for level in LEVELS:
            blocks = torch.arange(0, keys, level) // columns  # of the first key of every pooled one
            pairs += (levels[:, :, row // rows, blocks] == level).sum().item()
    expected = pairs / (6 * queries * keys)
    assert mask_density.mask_density(mask).item() == pytest.approx(expected, rel=1e-14)


def test_many_rows_and_lists_of_one_width(generator, device):
    """More rows than one tile of the kernel, entries past the counts far out of range."""
    blocks = (torch.rand(3, 4, 100, 21, generator=generator) < 0.4).to(device)
    mask = BlockSparseMask.from_blocks(blocks, (16, 16), 1590, 333)
    listed = torch.arange(21, device=device) < mask.counts[..., None]
    poisoned = BlockSparseMask(mask.counts, mask.indices.masked_fill(~listed, 1 << 30), (16, 16), 1590, 333)
    assert mask_density.mask_density(poisoned).item() == pytest.approx(mask.density().item(), rel=1e-14)


def test_shared_batches_heads_and_empty_masks(device):
    band = torch.eye(5, dtype=torch.bool, device=device)
    mask = BlockSparseMask.from_blocks(band, (16, 16), 70, 70)
    assert mask_density.mask_density(mask).item() == pytest.approx((4 * 256 + 36) / 4900, rel=1e-14)
    nothing = BlockSparseMask.from_blocks(torch.zeros_like(band), (16, 16), 70, 70)
    assert mask_density.mask_density(nothing).item() == 0.0
