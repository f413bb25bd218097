"""The public function around the backends: choice, refusals, compilation, and what only a GPU shows."""

import os
import subprocess
import sys

import pytest
import torch

import kernels_common
from core import BlockSparseMask, LayoutError, ParameterError, UnsupportedCallError
from kernels_common import attend_blocks, block_sparse_attention, resolve_backend

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


def test_gradients_that_do_not_exist_are_refused_unless_they_are_off(call):
    query, key, value, mask = call
    with pytest.raises(UnsupportedCallError, match="no backward with quantization"):
        block_sparse_attention(query, key.clone().requires_grad_(), value, mask, quantization="int8_fp16")
    with torch.no_grad():
        block_sparse_attention(query.clone().requires_grad_(), key, value, mask, quantization="int8_fp16")


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("extra", ["none", "bias", "key_lengths"])
@pytest.mark.parametrize("lengths", [(100, 100), (37, 150), (150, 60)], ids=str)
def test_causal_equals_the_reference(generator, device, lengths, extra, backend):
    queries, keys = lengths
    query = torch.randn(2, 4, queries, 32, generator=generator)
    key, value = torch.randn(2, 2, 2, keys, 32, generator=generator)
    kept = torch.rand(2, 4, -(-queries // 16), -(-keys // 32), generator=generator) < 0.6
    mask = BlockSparseMask.from_blocks(kept.to(device), (16, 32), queries, keys)
    options = {
        "none": {},
        "bias": {"bias": torch.randn(2, 1, keys, generator=generator).to(device)},
        "key_lengths": {"key_lengths": torch.tensor([keys - 5, keys // 2], device=device)},
    }[extra]
    tensors = [part.to(device) for part in (query, key, value)]
    output, lse = block_sparse_attention(
        *tensors, mask, causal=True, return_lse=True, backend=backend, **options
    )
    seen = mask.to_dense() & torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)
    if extra == "key_lengths":
        seen = seen & (torch.arange(keys, device=device) < options["key_lengths"][:, None])[:, None, None]
    key, value = (part.double().repeat_interleave(2, 1) for part in tensors[1:])
    scores = tensors[0].double() @ key.transpose(2, 3) * 32**-0.5
    if extra == "bias":
        scores = scores + options["bias"][:, :, None]
    scores = scores.masked_fill(~seen, float("-inf"))
    expected = scores.softmax(-1).nan_to_num(0.0) @ value
    torch.testing.assert_close(output.double(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)


def test_a_later_key_never_changes_an_earlier_row(call):
    query, key, value, _ = call
    query = query[:, :, :90]
    key, value = key[:, :, :90].clone(), value[:, :, :90].clone()
    full = BlockSparseMask.full((16, 16), 90, 90, query.device)
    before = block_sparse_attention(query, key, value, full, causal=True)
    key[:, :, 50:], value[:, :, 50:] = 7.0, -7.0
    after = block_sparse_attention(query, key, value, full, causal=True)
    assert torch.equal(before[:, :, :50], after[:, :, :50])
    assert not torch.equal(before[:, :, 50:], after[:, :, 50:])


def test_everything_about_a_call_comes_back(call, device):
    query, key, value, mask = call
    plain = attend_blocks(query, key, value, mask)
    assert plain.backend == resolve_backend(query, mask) and plain.skipped is None
    threshold = torch.full(query.shape[1:2], 1e4, device=device)
    result = attend_blocks(query, key, value, mask, skip_threshold=threshold)
    assert result.skipped.shape == (*query.shape[:2], mask.query_blocks) and not result.skipped.any()
    torch.testing.assert_close(result.output, plain.output, rtol=1e-4, atol=1e-5)
    with pytest.raises(LayoutError, match=r"skip_threshold must be \[\d+\] fp32"):
        attend_blocks(query, key, value, mask, skip_threshold=threshold[:1].double())
    with pytest.raises(UnsupportedCallError, match="quantization must be one of none, int8_fp8, int8_fp16"):
        attend_blocks(query, key, value, mask, quantization="int4")
    with pytest.raises(UnsupportedCallError, match="backend 'flex' does not support quantization"):
        attend_blocks(query, key, value, mask, quantization="int8_fp16", backend="flex")


@pytest.mark.parametrize("wrong", [None, torch.ones(2, 3, dtype=torch.bool)], ids=["none", "tensor"])
def test_anything_but_a_mask_is_refused(call, wrong):
    query, key, value, _ = call
    with pytest.raises(LayoutError, match="expected a BlockSparseMask, got (NoneType|Tensor)"):
        block_sparse_attention(query, key, value, wrong)
    with pytest.raises(LayoutError, match="expected a LevelMask, got (NoneType|Tensor)"):
        kernels_common.pooled_attention(query, key, value, wrong)


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


def _no_dimensions(query, key, value, mask):
    return query[..., :0], key[..., :0], value[..., :0], mask


def _mask_of_other_heads(query, key, value, mask):
    blocks = mask.to_blocks().expand(2, 2, -1, -1)
    return query, key, value, BlockSparseMask.from_blocks(blocks, (64, 64), 100, 150)


@pytest.mark.parametrize(
    "change",
    [
        _other_lengths,
        _other_value,
        _other_heads,
        _other_dtype,
        _three_dimensions,
        _no_dimensions,
        _mask_of_other_heads,
    ],
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


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_orders_compile_to_one_graph(call, generator, device, backend):
    query, key, value, mask = call
    orders = [torch.randperm(length, generator=generator).to(device) for length in (100, 150)]

    @torch.compile(fullgraph=True)
    def layer(query, key, value, query_order, key_order):
        return block_sparse_attention(
            query, key, value, mask, query_order=query_order, key_order=key_order, backend=backend
        )

    found = layer(query, key, value, *orders)
    wanted = block_sparse_attention(
        query, key, value, mask, query_order=orders[0], key_order=orders[1], backend="reference"
    )
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "torch", "triton"])
def test_fake_kernel_agrees_with_the_real_one(call, backend):
    query, key, value, mask = call
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    lengths = torch.tensor([150, 9], device=query.device)
    bias = torch.zeros(1, 2, 150, device=query.device)
    tensors = (query, key, value, mask.counts, mask.indices, lengths, bias)
    arguments = (*tensors, None, None, None, 64, 64, 0.125, False, backend)
    torch.library.opcheck(torch.ops.sparse_attn.block_sparse_attention, arguments)
    threshold = torch.ones(4, device=query.device)
    quantized = (*tensors, threshold, 64, 64, 0.125, "int8_fp16", backend)
    torch.library.opcheck(torch.ops.sparse_attn.block_sparse_attention_quantized, quantized)


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
