"""The flash-attn-4 backend; its results need a Hopper GPU with the package, its refusals need nothing."""

import pytest
import torch

from core import BlockSparseMask, UnsupportedCallError
from core.dense_packages import load_function
from kernels_common.block_sparse_flash4 import block_sparse_attention_flash4, flash4_obstacle

needs_package = pytest.mark.skipif(
    not torch.cuda.is_available()
    or torch.cuda.get_device_capability() != (9, 0)
    or isinstance(load_function("flash4"), str),
    reason="needs a GPU of compute capability 9.0 and flash-attn-4",
)


@needs_package
@pytest.mark.parametrize("blocks", [(64, 64), (64, 128), (128, 64), (128, 128), (192, 128)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_ragged_lengths(generator, device, blocks, head_dim):
    shape = (3, 1, 2, 1000, head_dim)
    query, key, value = torch.randn(shape, generator=generator).to(device, torch.bfloat16)
    kept = torch.rand(2, -(-1000 // blocks[0]), -(-1000 // blocks[1]), generator=generator) < 0.5
    kept[:, 0] = False
    kept[:, -1, -1] = True
    mask = BlockSparseMask.from_blocks(kept.to(device), blocks, 1000, 1000)
    output, lse = block_sparse_attention_flash4(
        query, key, value, mask.counts, mask.indices, blocks, scale=head_dim**-0.5
    )
    scores = (query.float() @ key.float().transpose(2, 3)) * head_dim**-0.5
    scores.masked_fill_(~mask.to_dense(), float("-inf"))
    expected = torch.softmax(scores, -1).nan_to_num(0.0) @ value.float()
    assert (output.float() - expected).norm() <= 2.0**-8 * expected.norm()
    expected_lse = torch.logsumexp(scores, -1)
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    assert ((lse - expected_lse)[~lse.isneginf()].abs() <= 2.0**-13).all()


def test_the_cpu_is_an_obstacle():
    query = torch.zeros(1, 1, 128, 64)
    mask = BlockSparseMask.full((128, 128), 128, 128)
    assert "CUDA device" in flash4_obstacle(query, (128, 128))
    with pytest.raises(UnsupportedCallError, match="CUDA device"):
        block_sparse_attention_flash4(
            query, query, query, mask.counts, mask.indices, mask.block_size, scale=1.0
        )
