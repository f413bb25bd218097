import pytest
import torch

from core import BlockSparseMask, LayoutError
from core.block_mask import block_count, block_lengths

SHAPES = [((64, 64), 256, 256), ((128, 64), 300, 1000), ((16, 32), 33, 1), ((64, 128), 63, 200)]


def random_blocks(block_size, query_length, key_length, batch=2, heads=3, density=0.4):
    rows, columns = block_count(query_length, block_size[0]), block_count(key_length, block_size[1])
    return torch.rand(batch, heads, rows, columns) < density


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_lists_hold_exactly_the_kept_blocks(shape):
    blocks = random_blocks(*shape)
    mask = BlockSparseMask.from_blocks(blocks, *shape)
    mask.check()
    for b, h, row in torch.cartesian_prod(*map(torch.arange, blocks.shape[:3])).tolist():
        expected = blocks[b, h, row].nonzero().flatten().tolist()
        assert mask.indices[b, h, row, : mask.counts[b, h, row]].tolist() == expected
    assert torch.equal(mask.to_blocks(), blocks)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_density_counts_valid_token_pairs(shape):
    mask = BlockSparseMask.from_blocks(random_blocks(*shape), *shape)
    assert mask.to_dense().shape[-2:] == shape[1:]
    assert mask.density().item() == pytest.approx(mask.to_dense().double().mean().item(), abs=1e-12)


def test_garbage_past_the_count_is_never_read():
    shape = ((64, 64), 300, 400)
    blocks = random_blocks(*shape)
    clean = BlockSparseMask.from_blocks(blocks, *shape)
    listed = torch.arange(clean.indices.shape[-1]) < clean.counts[..., None]
    poisoned = BlockSparseMask(clean.counts, clean.indices.masked_fill(~listed, 2**30), *shape)
    poisoned.check()
    assert torch.equal(poisoned.to_blocks(), blocks)
    assert poisoned.density() == clean.density()
    assert torch.equal(poisoned.to_flex().to_dense().bool(), blocks)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transposed_lists_name_the_query_blocks_of_every_key_block(shape):
    blocks = random_blocks(*shape)
    mask = BlockSparseMask.from_blocks(blocks, *shape)
    listed = torch.arange(mask.indices.shape[-1]) < mask.counts[..., None]
    mask = BlockSparseMask(mask.counts, mask.indices.masked_fill(~listed, 2**30), *shape)
    transposed = mask.transposed()
    transposed.check()
    assert transposed.block_size == shape[0][::-1]
    assert (transposed.query_length, transposed.key_length) == shape[:0:-1]
    assert torch.equal(transposed.to_dense(), mask.to_dense().mT)
    assert torch.equal(transposed.transposed().to_blocks(), blocks)


def test_transposing_narrow_shared_and_empty_lists():
    counts = torch.tensor([[[1, 0]]], dtype=torch.int32)
    indices = torch.tensor([[[[2], [9]]]], dtype=torch.int32)
    transposed = BlockSparseMask(counts, indices, (64, 64), 100, 180).transposed()
    assert transposed.counts.tolist() == [[[0, 0, 1]]]
    assert transposed.indices[0, 0, 2, 0] == 0
    nothing = BlockSparseMask(counts * 0, indices[..., :0], (64, 64), 100, 180).transposed()
    assert not nothing.counts.any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_flex_round_trip(shape):
    blocks = random_blocks(*shape)
    flex = BlockSparseMask.from_blocks(blocks, *shape).to_flex()
    assert torch.equal(flex.to_dense().bool(), blocks)
    back = BlockSparseMask.from_flex(flex)
    back.check()
    assert torch.equal(back.to_blocks(), blocks)
    assert (back.block_size, back.query_length, back.key_length) == shape


def test_flex_partial_blocks_are_refused():
    from torch.nn.attention.flex_attention import create_block_mask

    causal = create_block_mask(lambda b, h, q, k: q >= k, 1, 1, 256, 256, device="cpu")
    with pytest.raises(LayoutError, match="partial blocks"):
        BlockSparseMask.from_flex(causal)


def test_dimensions_of_size_one_are_kept():
    mask = BlockSparseMask.from_blocks(torch.ones(2, 2, dtype=torch.bool), (64, 64), 100, 100)
    assert mask.counts.shape == (1, 1, 2) and mask.density() == 1.0
    assert BlockSparseMask.full((64, 64), 100, 100).density() == 1.0


def test_empty_rows_and_empty_masks():
    mask = BlockSparseMask.from_blocks(torch.zeros(2, 2, dtype=torch.bool), (64, 64), 100, 100)
    mask.check()
    assert mask.density() == 0 and not mask.to_dense().any()


def test_wrong_shapes_are_refused():
    with pytest.raises(LayoutError, match=r"bool \[..., 2, 2\]"):
        BlockSparseMask.from_blocks(torch.ones(3, 2, dtype=torch.bool), (64, 64), 100, 100)
    counts = torch.zeros(1, 1, 2, dtype=torch.int32)
    with pytest.raises(LayoutError, match="int32"):
        BlockSparseMask(counts.long(), counts[..., None], (64, 64), 100, 100)
    with pytest.raises(LayoutError, match="make 3 rows"):
        BlockSparseMask(counts, counts[..., None], (64, 64), 150, 100)


@pytest.mark.parametrize("row", [[1, 0], [0, 0], [0, 5], [-1, 0]])
def test_check_finds_bad_lists(row):
    counts = torch.tensor([[[2]]], dtype=torch.int32)
    indices = torch.tensor([[[row]]], dtype=torch.int32)
    with pytest.raises(LayoutError, match="ascend strictly"):
        BlockSparseMask(counts, indices, (64, 64), 64, 192).check()
    with pytest.raises(LayoutError, match="counts must lie"):
        BlockSparseMask(counts + 1, indices, (64, 64), 64, 192).check()


def test_block_lengths():
    assert block_lengths(130, 64).tolist() == [64, 64, 2]
    assert block_lengths(128, 64).tolist() == [64, 64]


@pytest.mark.parametrize(
    "blocks, size", [([[True]], (16, 16)), (torch.ones(1, 1).bool(), 16), (torch.ones(1, 1).bool(), (0, 16))]
)
def test_what_is_no_block_matrix_is_refused(blocks, size):
    with pytest.raises(LayoutError, match=r"blocks must be a tensor, got list|such as \(128, 128\), .*; got"):
        BlockSparseMask.from_blocks(blocks, size, 10, 10)
