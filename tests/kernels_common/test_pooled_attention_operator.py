"""The public function around the backends of pooled attention, its parts, and what only a GPU shows."""

import pytest
import torch

from core import LayoutError, LevelMask, ParameterError, UnsupportedCallError
from core.level_mask import LEVELS
from kernels_common import pooled_attention, resolve_pooled_backend
from kernels_common.pooled_attention_torch import build_pyramid, fold_pyramid, pyramid_tokens, strip_lists

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def random_levels(generator, device, *shape):
    choice = torch.tensor([0, *LEVELS], dtype=torch.int8)
    return choice[torch.randint(5, shape, generator=generator)].to(device)


@pytest.fixture
def call(generator, device):
    """Query, key, value and mask of 100 x 150 tokens."""
    query = torch.randn(2, 4, 100, 16, generator=generator).to(device)
    key, value = torch.randn(2, 2, 2, 150, 16, generator=generator).to(device)
    levels = random_levels(generator, device, 4, 2, 3)
    levels[:, 0, 0] = 1
    return query, key, value, LevelMask.from_levels(levels, (64, 64), 100, 150)


def test_auto_resolves_by_device_and_dtype(call, device):
    query = call[0]
    assert resolve_pooled_backend(query) == ("triton" if device.type == "cuda" else "torch")
    assert resolve_pooled_backend(query.double()) == "torch"
    assert resolve_pooled_backend(query.half(), "reference") == "reference"


def test_lse_is_returned_on_request(call):
    output = pooled_attention(*call)
    again, lse = pooled_attention(*call, return_lse=True)
    assert torch.equal(output, again)
    assert lse.shape == output.shape[:3]


def test_unsupported_calls_are_named(call):
    query, key, value, _ = call
    with pytest.raises(UnsupportedCallError, match="gluon"):
        pooled_attention(*call, backend="gluon")
    with pytest.raises(UnsupportedCallError, match="float64"):
        resolve_pooled_backend(query.double(), "triton")
    with pytest.raises(UnsupportedCallError, match="fp16"):
        pooled_attention(*(part.to(torch.int32) for part in (query, key, value)), call[3])
    small = LevelMask.from_levels(torch.ones(2, 19, dtype=torch.int8, device=query.device), (64, 8), 100, 150)
    with pytest.raises(UnsupportedCallError, match="multiples of 16"):
        pooled_attention(query, key, value, small)
    with pytest.raises(ParameterError, match="scale"):
        pooled_attention(*call, scale=0.0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_bf16_in_the_interpreter_is_refused(call):
    query, key, value, mask = call
    with pytest.raises(UnsupportedCallError, match="bf16"):
        pooled_attention(*(part.bfloat16() for part in (query, key, value)), mask, backend="triton")


def _other_lengths(query, key, value, mask):
    return query[:, :, 1:], key, value, mask


def _other_value(query, key, value, mask):
    return query, key, value[:, :, 1:], mask


def _other_dtype(query, key, value, mask):
    return query.double(), key, value, mask


def _mask_of_other_heads(query, key, value, mask):
    return query, key, value, LevelMask.from_levels(mask.to_levels()[0, :2], (64, 64), 100, 150)


@pytest.mark.parametrize(
    "change",
    [_other_lengths, _other_value, _other_dtype, _mask_of_other_heads],
    ids=lambda function: function.__name__.strip("_"),
)
def test_tensors_that_do_not_fit_are_refused(call, change):
    with pytest.raises(LayoutError):
        pooled_attention(*change(*call))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_compiles_to_one_graph(call, backend):
    query, key, value, mask = call

    def layer(query, key, value, levels):
        mask = LevelMask.from_levels(levels, (64, 64), query.shape[2], key.shape[2])
        output, lse = pooled_attention(query * 2, key, value, mask, return_lse=True, backend=backend)
        return output.transpose(1, 2).flatten(2) + 1, lse

    inputs = (query.transpose(1, 2).contiguous().transpose(1, 2), key, value, mask.to_levels())
    for result, expected in zip(torch.compile(layer, fullgraph=True)(*inputs), layer(*inputs), strict=True):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_fake_kernels_agree_with_the_real_ones(call, backend):
    query, key, value = (part[:1, :, :30] for part in call[:3])
    mask = LevelMask.from_levels(call[3].to_levels()[:, :, :1, :1], (64, 64), 30, 30)
    tensors = [query.transpose(1, 2).contiguous().transpose(1, 2), key, value]
    tensors = [tensor.requires_grad_() for tensor in tensors]
    arguments = (*tensors, mask.counts, mask.indices, 64, 64, 0.25, backend)
    torch.library.opcheck(torch.ops.sparse_attn.pooled_attention, arguments)


def test_autocast_does_not_round_the_products(call, device):
    expected = pooled_attention(*call, backend="torch")
    with torch.autocast(device.type, torch.bfloat16):
        assert torch.equal(pooled_attention(*call, backend="torch"), expected)


@pytest.mark.parametrize("length", [1, 37, 64, 100])
def test_folding_is_the_transpose_of_pooling(generator, length):
    tensor = torch.randn(1, 2, length, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    pyramid = build_pyramid(tensor, 32)
    gradient = torch.randn(pyramid.shape, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad(pyramid, tensor, gradient)
    torch.testing.assert_close(fold_pyramid(gradient, length, 32), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("length", [1, 77])
@pytest.mark.parametrize("key_block", [16, 48, 64])
def test_both_forms_pool_alike(generator, device, poisoned_memory, length, key_block):
    from kernels_common.pooled_attention_triton import pool_triton

    tensor = torch.randn(2, length, 3, 12, generator=generator).transpose(1, 2).to(device)
    level_one = -(-length // key_block) * key_block
    expected = torch.nn.functional.pad(build_pyramid(tensor, key_block)[:, :, level_one:], (0, 4))
    pooled = pool_triton(tensor, key_block, 16)
    torch.testing.assert_close(pooled, expected, rtol=2.0**-22, atol=2.0**-22)


def test_strips_of_listed_blocks():
    """Three key blocks: 24 strips of level 1, then 12, 6 and 3."""
    mask = LevelMask.from_levels(torch.tensor([[8, 1, 4], [2, 0, 0]], dtype=torch.int8), (16, 16), 32, 48)
    lists = strip_lists(mask)
    assert lists.block_size == (16, 2)
    assert lists.counts.flatten().tolist() == [11, 4]
    assert lists.indices[0, 0, 0, :11].tolist() == [*range(8, 16), 40, 41, 42]
    assert lists.indices[0, 0, 1, :4].tolist() == [24, 25, 26, 27]


@needs_gpu
@pytest.mark.parametrize(("key_block", "head_dim"), [(128, 64), (64, 64), (32, 64), (128, 128)], ids=str)
def test_real_video_length_on_the_gpu(generator, device, key_block, head_dim):
    """17,776 tokens (CogVideoX at 480 x 720 x 49) against fp64 for a sample of query blocks."""
    length = 17776
    query, key, value = (
        torch.randn(1, 2, length, head_dim, generator=generator).to(device, torch.bfloat16) for _ in range(3)
    )
    levels = random_levels(generator, device, 2, -(-length // 128), -(-length // key_block))
    mask = LevelMask.from_levels(levels, (128, key_block), length, length)
    output, lse = pooled_attention(query, key, value, mask, return_lse=True)
    pyramids = [build_pyramid(part[0].double()[None], key_block)[0] for part in (key, value)]
    tokens = pyramid_tokens(length, key_block, device)
    for row in (0, 70, 138):
        span = slice(row * 128, (row + 1) * 128)
        seen = [(levels[:, row] == level).repeat_interleave(key_block // level, -1) for level in LEVELS]
        bias = tokens.double().log().masked_fill(~torch.cat(seen, -1), float("-inf"))
        scores = query[0, :, span].double() @ pyramids[0].mT * head_dim**-0.5 + bias[:, None]
        expected = torch.softmax(scores, -1) @ pyramids[1]
        assert (output[0, :, span].double() - expected).norm() <= 2.0**-8 * expected.norm()
        assert ((lse[0, :, span].double() - scores.logsumexp(-1)).abs() <= 2.0**-7).all()


@needs_gpu
def test_lengths_do_not_recompile_the_kernels(generator, device):
    from kernels_common.pooled_attention_backward_triton import (
        pooled_attention_bwd_key_kernel,
        pooled_attention_bwd_query_kernel,
        unpool_kernel,
    )
    from kernels_common.pooled_attention_triton import pool_kernel, pooled_attention_fwd_kernel

    kernels = (
        pool_kernel,
        pooled_attention_fwd_kernel,
        pooled_attention_bwd_query_kernel,
        pooled_attention_bwd_key_kernel,
        unpool_kernel,
    )

    def attend(length):
        blocks = -(-length // 64)
        query = torch.randn(2, 4, length, 64, generator=generator).to(device, torch.float16).requires_grad_()
        levels = random_levels(generator, device, blocks, blocks)
        mask = LevelMask.from_levels(levels, (64, 64), length, length)
        pooled_attention(query, query, query, mask, backend="triton").sum().backward()

    def compiled():
        return [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]

    attend(100)
    before = compiled()
    for length in (1, 16, 64, 65, 1000, 1024, 4321):
        attend(length)
    assert compiled() == before


@needs_gpu
def test_nothing_waits_for_the_device(call):
    """Lists, forward and backward pass; the first call compiles."""
    query, key, value, mask = call
    query.requires_grad_()
    levels = mask.to_levels()
    for mode in ("default", "error"):
        torch.cuda.set_sync_debug_mode(mode)
        try:
            lists = LevelMask.from_levels(levels, (64, 64), 100, 150)
            pooled_attention(query, key, value, lists).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
