"""The public function around the backends: choice, refusals, compilation, and what only a GPU shows."""

import os
import subprocess
import sys

import pytest
import torch

import kernels_common
from core import BlockSparseMask, LayoutError, ParameterError, UnsupportedCallError
from kernels_common import block_sparse_attention, resolve_backend

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def call(generator, device):
    """Query, key, value and mask of 100 x 150 tokens."""
    query = torch.randn(2, 4, 100, 64, generator=generator).to(device)
    key, value = torch.randn(2, 2, 2, 150, 64, generator=generator).to(device)
    return query, key, value, BlockSparseMask.full((64, 64), 100, 150, device)


def test_exports_are_sorted_and_real():
    assert kernels_common.__all__ == sorted(kernels_common.__all__)
    assert all(hasattr(kernels_common, name) for name in kernels_common.__all__)


def test_auto_resolves_by_device_and_dtype(call, device):
    query, *_, mask = call
    fast = "triton" if device.type == "cuda" else "torch"
    assert resolve_backend(query, mask) == fast
    assert resolve_backend(query.double(), mask) == "torch"
    assert resolve_backend(query.half(), mask, "reference") == "reference"


def test_lse_is_returned_on_request(call):
    output = block_sparse_attention(*call)
    again, lse = block_sparse_attention(*call, return_lse=True)
    assert torch.equal(output, again)
    assert lse.shape == output.shape[:3]


@pytest.mark.parametrize("backend", ["reference", "torch"])
def test_fp64_is_computed_in_fp64(call, backend):
    query, key, value, mask = call
    doubles = [part.double() for part in (query, key, value)]
    output = block_sparse_attention(*doubles, mask, backend=backend)
    dense = torch.nn.functional.scaled_dot_product_attention(*doubles, enable_gqa=True)
    torch.testing.assert_close(output, dense, rtol=1e-12, atol=1e-12)


def test_requires_grad_is_refused_unless_gradients_are_off(call):
    query, key, value, mask = call
    for backend in ("reference", "torch", "triton"):
        with pytest.raises(UnsupportedCallError, match="no backward"):
            block_sparse_attention(query, key.clone().requires_grad_(), value, mask, backend=backend)
    with torch.no_grad():
        block_sparse_attention(query.clone().requires_grad_(), key, value, mask)


def test_unsupported_calls_are_named(call):
    query, key, value, mask = call
    with pytest.raises(UnsupportedCallError, match="cudnn"):
        block_sparse_attention(*call, backend="cudnn")
    with pytest.raises(UnsupportedCallError, match="float64"):
        resolve_backend(query.double(), mask, "triton")
    with pytest.raises(UnsupportedCallError, match="up to 256"):
        resolve_backend(query.new_empty(1, 1, 100, 300), mask, "triton")
    with pytest.raises(UnsupportedCallError, match="fp16"):
        block_sparse_attention(*(part.to(torch.int32) for part in (query, key, value)), mask)
    with pytest.raises(UnsupportedCallError, match="multiples of 16"):
        block_sparse_attention(query, key, value, BlockSparseMask.full((10, 64), 100, 150, query.device))
    assert issubclass(UnsupportedCallError, NotImplementedError)


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_triton_without_a_gpu_says_so(call):
    query, key, value, mask = call
    with pytest.raises(UnsupportedCallError, match="bf16"):
        block_sparse_attention(*(part.bfloat16() for part in (query, key, value)), mask, backend="triton")
    code = (
        "import torch\n"
        "from core import BlockSparseMask, UnsupportedCallError\n"
        "from kernels_common import block_sparse_attention\n"
        "x = torch.randn(1, 1, 64, 64)\n"
        "try:\n"
        "    block_sparse_attention(x, x, x, BlockSparseMask.full((64, 64), 64, 64), backend='triton')\n"
        "except UnsupportedCallError as error:\n"
        "    print(error)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "needs a CUDA device" in run.stdout


def _other_lengths(query, key, value, mask):
    return query[:, :, 1:], key, value, mask


def _other_value(query, key, value, mask):
    return query, key, value[:, :, 1:], mask


def _other_heads(query, key, value, mask):
    return query[:, :3], key, value, mask


def _other_dtype(query, key, value, mask):
    return query.double(), key, value, mask


def _three_dimensions(query, key, value, mask):
    return query[0], key, value, mask


def _mask_of_other_heads(query, key, value, mask):
    blocks = mask.to_blocks().expand(2, 2, -1, -1)
    return query, key, value, BlockSparseMask.from_blocks(blocks, (64, 64), 100, 150)


@pytest.mark.parametrize(
    "change",
    [_other_lengths, _other_value, _other_heads, _other_dtype, _three_dimensions, _mask_of_other_heads],
    ids=lambda function: function.__name__.strip("_"),
)
def test_tensors_that_do_not_fit_are_refused(call, change):
    with pytest.raises(LayoutError):
        block_sparse_attention(*change(*call))


def test_extras_that_do_not_fit_are_refused(call, device):
    for lengths in (torch.ones(3, dtype=torch.int64), torch.ones(2)):
        with pytest.raises(LayoutError, match="key_lengths"):
            block_sparse_attention(*call, key_lengths=lengths.to(device))
    for bias in (torch.zeros(1, 1, 149), torch.zeros(2, 3, 150), torch.zeros(2, 2, 150, dtype=torch.int64)):
        with pytest.raises(LayoutError, match="bias"):
            block_sparse_attention(*call, bias=bias.to(device))
    for scale in (0.0, -1.0, float("nan")):
        with pytest.raises(ParameterError, match="scale"):
            block_sparse_attention(*call, scale=scale)


@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "triton"])
def test_compiles_to_one_graph(call, backend):
    query, key, value, mask = call

    def layer(query, key, value, counts, indices):
        mask = BlockSparseMask(counts, indices, (64, 64), query.shape[2], key.shape[2])
        output, lse = block_sparse_attention(query * 2, key, value, mask, return_lse=True, backend=backend)
        return output.transpose(1, 2).flatten(2) + 1, lse

    inputs = (query.transpose(1, 2).contiguous().transpose(1, 2), key, value, mask.counts, mask.indices)
    compiled = torch.compile(layer, fullgraph=True)(*inputs)
    for result, expected in zip(compiled, layer(*inputs), strict=True):
        torch.testing.assert_close(result, expected)


def test_compiles_with_a_mask_built_inside_and_dynamic_lengths(generator, device):
    @torch.compile(fullgraph=True, dynamic=True)
    def layer(query, blocks):
        length = query.shape[2]
        mask = BlockSparseMask.from_blocks(blocks, (64, 64), length, length)
        return block_sparse_attention(query, query, query, mask, backend="torch")

    for length in (200, 260):
        query = torch.randn(1, 2, length, 64, generator=generator).to(device)
        blocks = torch.ones(-(-length // 64), -(-length // 64), dtype=torch.bool, device=device)
        dense = torch.nn.functional.scaled_dot_product_attention(query, query, query)
        torch.testing.assert_close(layer(query, blocks), dense, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_fake_kernel_agrees_with_the_real_one(call, backend):
    query, key, value, mask = call
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    lengths = torch.tensor([150, 9], device=query.device)
    bias = torch.zeros(1, 2, 150, device=query.device)
    arguments = (query, key, value, mask.counts, mask.indices, lengths, bias, 64, 64, 0.125, backend)
    torch.library.opcheck(torch.ops.sparse_attn.block_sparse_attention, arguments)


@needs_gpu
@pytest.mark.parametrize(
    ("blocks", "head_dim"), [((64, 64), 64), ((128, 128), 64), ((128, 128), 128)], ids=str
)
def test_real_video_length_on_the_gpu(generator, device, blocks, head_dim):
    """17,776 tokens (CogVideoX at 480 x 720 x 49) against fp64 for a sample of query blocks."""
    length = 17776
    rows, columns = -(-length // blocks[0]), -(-length // blocks[1])
    query, key, value = (
        torch.randn(1, 4, length, head_dim, generator=generator).to(device, torch.bfloat16) for _ in range(3)
    )
    kept = torch.rand(4, rows, columns, generator=generator).to(device) < 0.25
    mask = BlockSparseMask.from_blocks(kept, blocks, length, length)
    output, lse = block_sparse_attention(query, key, value, mask, return_lse=True)
    for row in (0, rows // 2, rows - 1):
        span = slice(row * blocks[0], (row + 1) * blocks[0])
        tokens = kept[:, row].repeat_interleave(blocks[1], -1)[:, None, :length]
        scores = (query[0, :, span].double() @ key[0].double().mT) * head_dim**-0.5
        scores.masked_fill_(~tokens, float("-inf"))
        expected = torch.softmax(scores, -1) @ value[0].double()
        assert (output[0, :, span].double() - expected).norm() <= 2.0**-8 * expected.norm()
        torch.testing.assert_close(lse[0, :, span].double(), scores.logsumexp(-1), rtol=0, atol=1e-4)


@needs_gpu
def test_lengths_do_not_recompile_the_kernel(generator, device):
    from kernels_common.block_sparse_triton import block_sparse_fwd_kernel

    def attend(length):
        query = torch.randn(2, 4, length, 64, generator=generator).to(device, torch.float16)
        mask = BlockSparseMask.full((64, 64), length, length, device)
        block_sparse_attention(query, query, query, mask, backend="triton")

    def compiled():
        return len(block_sparse_fwd_kernel.device_caches[torch.cuda.current_device()][0])

    attend(100)
    before = compiled()
    for length in (1, 16, 64, 65, 1000, 1024, 4321):
        attend(length)
    assert compiled() == before
