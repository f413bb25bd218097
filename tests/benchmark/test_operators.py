"""Time of every operator of ``kernels_common``, each backend that runs on the device."""

import pytest
import torch

from core import BlockSparseMask
from core.errors import UnsupportedCallError
from kernels_common import (
    attention,
    block_sparse_attention,
    gather_tokens,
    invert_permutation,
    merge_by_lse,
    scatter_tokens,
)

BLOCK = (128, 128)


def random_mask(call, density):
    """Random blocks per head, the diagonal always kept."""
    length, heads = call.query.shape[2], call.query.shape[1]
    count = -(-length // BLOCK[0])
    draw = torch.rand(heads, count, count, generator=torch.Generator().manual_seed(1))
    kept = (draw < density) | torch.eye(count, dtype=torch.bool)
    return BlockSparseMask.from_blocks(kept.to(call.query.device), BLOCK, length, length)


@torch.inference_mode()
def test_dense(call, timed, error_of):
    error = error_of(call, attention(call.query, call.key, call.value))
    assert error < call.tolerance
    facts = {"density": 1.0, "max_error": error}
    timed(lambda: attention(call.query, call.key, call.value), call, "attention", **facts)


@pytest.mark.parametrize("density", [0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@torch.inference_mode()
def test_block_sparse_attention(call, backend, density, timed, error_of):
    if backend == "triton" and call.query.device.type == "cpu":
        pytest.skip("triton runs on a CPU in its interpreter only, where a time means nothing")
    mask = random_mask(call, density)

    def run():
        return block_sparse_attention(call.query, call.key, call.value, mask, backend=backend)

    try:
        error = error_of(call, run(), mask)
    except UnsupportedCallError as reason:
        pytest.skip(str(reason))
    assert error < call.tolerance
    timed(run, call, "attention", density=float(mask.density()), max_error=error, backend=backend)


@torch.inference_mode()
def test_reordering_and_back(call, timed):
    length = call.query.shape[2]
    order = torch.randperm(length, generator=torch.Generator().manual_seed(2)).to(call.query.device)

    def run():
        return scatter_tokens(gather_tokens(call.query, order), order)

    assert torch.equal(run(), call.query)
    assert torch.equal(gather_tokens(gather_tokens(call.query, order), invert_permutation(order)), call.query)
    timed(run, call, "reordering")


@torch.inference_mode()
def test_merge_by_lse(call, timed, error_of):
    """Attention to the two halves of the keys, merged, is attention to all of them."""
    half = call.key.shape[2] // 2
    parts = [attend_half(call, slice(0, half)), attend_half(call, slice(half, None))]
    outputs, sums = zip(*parts, strict=True)

    def run():
        return merge_by_lse(outputs[0], sums[0], outputs[1], sums[1])[0]

    assert error_of(call, run()) < call.tolerance
    timed(run, call, "merging")


def attend_half(call, part):
    key, value = call.key[:, :, part], call.value[:, :, part]
    mask = BlockSparseMask.full(BLOCK, call.query.shape[2], key.shape[2], call.query.device)
    return block_sparse_attention(call.query, key, value, mask, return_lse=True)
