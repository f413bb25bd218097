"""FlexAttention over our lists against softmax attention in fp64 under a dense mask."""

import pytest
import torch

from core import BlockSparseMask, UnsupportedCallError
from kernels_common import block_sparse_attention
from kernels_common.block_sparse_flex import block_sparse_attention_flex, flex_obstacle

on_gpu = torch.cuda.is_available()
# As in test_block_sparse_attention.py.
OUTPUT_TOLERANCE = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LSE_TOLERANCE = {torch.float32: 2.0**-15, torch.bfloat16: 2.0**-13, torch.float16: 2.0**-13}
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")


@pytest.fixture(autouse=True)
def poison(request):
    if not on_gpu:  # torch's compiler cannot trace the poisoned functions
        request.getfixturevalue("poisoned_memory")


@pytest.fixture
def make_call(generator, device):
    def make(queries, keys, blocks, *, kv_heads=2, shared=False, dtype=torch.float32):
        """Query, key, value and a mask with an empty row and poisoned list tails."""
        shape = (2, 1 if shared else 2, -(-queries // blocks[0]), -(-keys // blocks[1]))
        kept = torch.rand(shape, generator=generator) < 0.5
        kept[:, :, 0] = False
        kept[:, :, -1, -1] = True
        mask = BlockSparseMask.from_blocks(kept.to(device), blocks, queries, keys)
        tail = torch.arange(mask.indices.shape[-1], device=device) >= mask.counts[..., None]
        mask.indices.masked_fill_(tail, 1 << 30)
        shapes = ((2, queries), (kv_heads, keys), (kv_heads, keys))
        tensors = (torch.randn(2, *shape, 64, generator=generator) for shape in shapes)
        return *(tensor.to(device, dtype) for tensor in tensors), mask

    return make


def _check(query, key, value, mask, scale=0.2):
    output, lse = block_sparse_attention_flex(
        query, key, value, mask.counts, mask.indices, mask.block_size, scale=scale
    )
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = (query.double() @ key.transpose(2, 3)) * scale
    scores.masked_fill_(~mask.to_dense(), float("-inf"))
    expected, expected_lse = torch.softmax(scores, -1).nan_to_num(0.0) @ value, torch.logsumexp(scores, -1)
    empty = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty) and not output[empty].any()
    assert output.dtype == query.dtype and output.stride() == query.stride()
    assert (output.double() - expected).norm() <= OUTPUT_TOLERANCE[query.dtype] * expected.norm()
    assert ((lse.double() - expected_lse)[~empty].abs() <= LSE_TOLERANCE[query.dtype]).all()


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 128), (128, 128)], ids=str)
def test_blocks_and_ragged_lengths(make_call, blocks):
    _check(*make_call(300, 333, blocks))


def test_grouped_heads_and_a_shared_mask(make_call):
    _check(*make_call(200, 150, (64, 64), kv_heads=1, shared=True))


def test_memory_order_of_query_is_kept(make_call):
    query, key, value, mask = make_call(200, 200, (64, 64))
    _check(query.transpose(1, 2).contiguous().transpose(1, 2), key, value, mask)


def test_gradients_are_those_of_the_reference(make_call, generator):
    *tensors, mask = make_call(200, 150, (64, 64), kv_heads=1)
    slope = torch.randn(tensors[0].shape, generator=generator).to(mask.device)

    def gradients(backend):
        inputs = [part.clone().requires_grad_() for part in tensors]
        output, lse = block_sparse_attention(*inputs, mask, return_lse=True, backend=backend)
        seen = lse.masked_fill(lse.isneginf(), 0.0)
        return output, *torch.autograd.grad((output * slope).sum() + seen.sum(), inputs)

    for found, expected in zip(gradients("flex"), gradients("reference"), strict=True):
        assert found.abs().max() > 0
        assert (found - expected).norm() <= 2.0**-17 * expected.norm()


def test_autocast_does_not_lower_the_precision(make_call, device):
    *tensors, mask = make_call(200, 150, (64, 64))
    expected = block_sparse_attention(*tensors, mask, backend="flex")
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(block_sparse_attention(*tensors, mask, backend="flex"), expected)


@pytest.mark.skipif(not on_gpu, reason="needs a CUDA device: the compiled form")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_sixteen_bits_and_many_lengths(make_call, dtype):
    for length in range(500, 1500, 99):  # more lengths than torch compiles variants for by default
        _check(*make_call(length, length + 7, (128, 64), dtype=dtype))


def test_obstacles(device):
    query = torch.zeros(1, 1, 64, 64, device=device)
    assert flex_obstacle(query, (64, 128)) is None
    assert flex_obstacle(query[..., :48], (64, 64)).endswith("head dimension 48")
    assert "float64" in flex_obstacle(query.double(), (64, 64))
    assert "multiples of 64" in flex_obstacle(query, (64, 32))


@pytest.mark.parametrize("extra", ["key_lengths", "bias"])
def test_what_flex_lacks_is_refused(make_call, extra):
    query, key, value, mask = make_call(100, 100, (64, 64))
    with pytest.raises(UnsupportedCallError, match="neither key_lengths nor bias"):
        block_sparse_attention_flex(
            query, key, value, mask.counts, mask.indices, (64, 64), scale=1.0, **{extra: torch.zeros(2)}
        )
