"""The 8-bit Gluon kernel against softmax attention under a dense mask; needs a Hopper GPU."""

import math

import pytest
import torch
import torch.nn.functional as F

from core import BlockSparseMask, LayoutError, UnsupportedCallError

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="needs triton with Gluon")

from kernels_common.block_sparse_quantized_gluon import (
    block_sparse_attention_quantized_gluon,
    interleave_tokens,
    quantized_gluon_obstacle,
)

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
# Relative, in the Frobenius norm. Exact weights leave the rounding of the output and the short
# accumulator of an FP8 product; other weights are rounded to E4M3's three bits.
EXACT_TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
WEIGHT_TOLERANCE = 2.0**-5
QUANTIZATION_TOLERANCE = 3.9e-2
MEAN_TOLERANCE = 2.0**-7
LSE_TOLERANCE = 2.0**-13


def _rows(scale, length):
    """A scale per token ``[B, H, N, 1]`` of a scale per group of 64."""
    return scale.repeat_interleave(64, 2)[:, :, :length, None]


def _quantize(tensor):
    """INT8 with one scale per group of 64 tokens."""
    batch, heads, length, head_dim = tensor.shape
    padded = F.pad(tensor.float(), (0, 0, 0, -length % 64)).view(batch, heads, -1, 64, head_dim)
    scale = padded.abs().amax((3, 4)).clamp(min=1e-6) / 127
    codes = (padded / scale[..., None, None]).round().to(torch.int8)
    return codes.view(batch, heads, -1, head_dim)[:, :, :length].contiguous(), scale


def _transpose_value(value):
    """E4M3 ``[B, H, D, Npad]`` in token order, one scale per channel."""
    scale = value.float().abs().amax(2) / 448
    codes = (value.float() / scale[:, :, None]).transpose(2, 3)
    return F.pad(codes, (0, -codes.shape[3] % 128)).to(torch.float8_e4m3fn), scale


def _attention(query, key, value, mask, scale):
    group = query.shape[1] // key.shape[1]
    key, value = (part.double().repeat_interleave(group, 1) for part in (key, value))
    scores = query.double() @ key.transpose(2, 3) * scale
    scores.masked_fill_(~mask.to_dense(), float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value, torch.logsumexp(scores, -1)


def _run(operands, mask, *, scale, dtype=torch.bfloat16):
    *operands, value, value_scale = operands
    return block_sparse_attention_quantized_gluon(
        *operands, interleave_tokens(value), value_scale, mask.counts, mask.indices, mask.block_size,
        scale=scale, dtype=dtype,
    )  # fmt: skip


def _dequantize(operands):
    query, query_scale, key, key_scale, value, value_scale = operands
    query, key = query * _rows(query_scale, query.shape[2]), key * _rows(key_scale, key.shape[2])
    return query, key, (value.float() * value_scale[..., None]).transpose(2, 3)[:, :, : key.shape[2]]


def _check(output, lse, expected_output, expected_lse, tolerance):
    empty = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert not output[empty].any()
    assert (output - expected_output).norm() <= tolerance * expected_output.norm()
    assert ((lse - expected_lse)[~empty].abs() <= LSE_TOLERANCE).all()


@pytest.fixture
def make_mask(generator, device):
    def make(queries, keys, *, block=128, batch=1, heads=2, density=0.5, shared=False):
        """Random blocks with empty rows and a poisoned tail of every list."""
        rows, columns = -(-queries // 128), -(-keys // block)
        kept = torch.rand(1 if shared else batch, 1 if shared else heads, rows, columns, generator=generator)
        kept = kept < density
        kept[:, :, 0] = density == 1  # an empty row, unless all is kept
        kept[:, :, -1, -1] = True  # the ragged block
        mask = BlockSparseMask.from_blocks(kept.to(device), (128, block), queries, keys)
        tail = torch.arange(mask.indices.shape[-1], device=device) >= mask.counts[..., None]
        mask.indices.masked_fill_(tail, 1 << 30)
        return mask

    return make


@pytest.fixture
def make_tensors(generator, device, poisoned_memory):
    def make(queries, keys, *, head_dim=64, batch=1, heads=2, kv_heads=None):
        shapes = ((heads, queries), (kv_heads or heads, keys), (kv_heads or heads, keys))
        return [torch.randn(batch, *shape, head_dim, generator=generator).to(device) for shape in shapes]

    return make


@pytest.fixture
def make_exact_operands(generator, device, poisoned_memory):
    def make(queries, keys, *, head_dim=64, batch=1, heads=2, kv_heads=None):
        """Operands whose scores are small integers in base 2, so that E4M3 holds every weight exactly."""

        def draw(low, high, *shape):
            return torch.randint(low, high, shape, generator=generator)

        kv_heads = kv_heads or heads
        place = draw(0, head_dim, batch, heads, queries)
        query = F.one_hot(place, head_dim) * (2 * draw(0, 2, batch, heads, queries, 1) - 1)
        key = draw(-1, 2, batch, kv_heads, keys, head_dim)
        query_scale = draw(1, 3, batch, heads, -(-queries // 64)).float()
        key_scale = draw(1, 3, batch, kv_heads, -(-keys // 64)).float()
        value = torch.randn(batch, kv_heads, head_dim, keys, generator=generator)
        value = F.pad(value, (0, -keys % 128)).to(torch.float8_e4m3fn)
        value_scale = torch.rand(batch, kv_heads, head_dim, generator=generator) + 0.5
        operands = (query.to(torch.int8), query_scale, key.to(torch.int8), key_scale, value, value_scale)
        return [operand.to(device) for operand in operands]

    return make


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("lengths", [(1, 63), (200, 200), (257, 641), (300, 1000)], ids=str)
def test_exact_weights(make_exact_operands, make_mask, lengths, block, head_dim, dtype):
    operands, mask = make_exact_operands(*lengths, head_dim=head_dim), make_mask(*lengths, block=block)
    scale = math.log(2.0)
    expected = _attention(*_dequantize(operands), mask, scale)
    _check(*_run(operands, mask, scale=scale, dtype=dtype), *expected, EXACT_TOLERANCE[dtype])


@needs_hopper
@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_programs_that_walk_many_tiles(make_exact_operands, make_mask, density, head_dim, block):
    for _ in range(3):  # a race shows as an error that moves
        operands = make_exact_operands(1700, 1900, batch=2, heads=24, head_dim=head_dim)
        mask = make_mask(1700, 1900, batch=2, heads=24, block=block, density=density)
        expected = _attention(*_dequantize(operands), mask, math.log(2.0))
        output = _run(operands, mask, scale=math.log(2.0))
        _check(*output, *expected, EXACT_TOLERANCE[torch.bfloat16])


@needs_hopper
def test_grouped_query_heads_and_a_shared_mask(make_exact_operands, make_mask):
    operands = make_exact_operands(300, 500, batch=2, heads=6, kv_heads=2)
    mask = make_mask(300, 500, batch=2, heads=6, shared=True)
    expected = _attention(*_dequantize(operands), mask, math.log(2.0))
    _check(*_run(operands, mask, scale=math.log(2.0)), *expected, EXACT_TOLERANCE[torch.bfloat16])


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("lengths", [(300, 1000), (515, 2000)], ids=str)
def test_random_input(make_tensors, make_mask, lengths, block, head_dim):
    """Near attention of the quantised operands, and near enough to attention of the given ones."""
    query, key, value = make_tensors(*lengths, head_dim=head_dim)
    mask = make_mask(*lengths, block=block)
    mean = key.mean(2, keepdim=True)
    operands = (*_quantize(query), *_quantize(key - mean), *_transpose_value(value))
    scale = head_dim**-0.5
    output, lse = _run(operands, mask, scale=scale)
    _check(output, lse, *_attention(*_dequantize(operands), mask, scale), WEIGHT_TOLERANCE)
    expected, _ = _attention(query, key, value, mask, scale)
    assert (output - expected).norm() <= QUANTIZATION_TOLERANCE * expected.norm()


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_the_mean_of_many_values_is_kept(make_tensors, make_mask, head_dim):
    """FP8 products cut off what falls below their short accumulator; over many tiles that would add up."""
    query, key, value = make_tensors(200, 4096, head_dim=head_dim)
    mask = make_mask(200, 4096, density=1.0)
    operands = (*_quantize(query), *_quantize(key), *_transpose_value(value + 1))
    scale = head_dim**-0.5
    expected, _ = _attention(*_dequantize(operands), mask, scale)
    output, _ = _run(operands, mask, scale=scale)
    assert (output - expected).norm() <= MEAN_TOLERANCE * expected.norm()


@needs_hopper
def test_sharp_rows_and_large_scores(make_tensors, make_mask):
    """Rows that one key dominates, whose other weights fall below E4M3's range."""
    query, key, value = make_tensors(300, 1000)
    mask = make_mask(300, 1000, density=1.0)
    operands = (*_quantize(query * 8), *_quantize(key * 8), *_transpose_value(value))
    output, lse = _run(operands, mask, scale=0.125)
    expected, expected_lse = _attention(*_dequantize(operands), mask, 0.125)
    assert (output - expected).norm() <= WEIGHT_TOLERANCE * expected.norm()
    assert ((lse - expected_lse).abs() <= LSE_TOLERANCE * expected_lse.abs().clamp(min=1)).all()


@needs_hopper
def test_dropped_blocks_are_not_read(make_tensors, make_mask):
    query, key, value = make_tensors(300, 600)
    mask = make_mask(300, 600, block=64, density=1.0, shared=True)
    kept = mask.to_blocks()
    kept[..., 2:5] = False
    mask = BlockSparseMask.from_blocks(kept, (128, 64), 300, 600)
    value_codes, value_scale = _transpose_value(value)
    operands = [*_quantize(query), *_quantize(key), value_codes, value_scale]
    clean, _ = _run(operands, mask, scale=0.125)
    operands[3][:, :, 2:5] = float("nan")
    operands[4].view(torch.uint8)[..., 128:320] = 0x7F  # NaN
    output, lse = _run(operands, mask, scale=0.125)
    assert torch.equal(output, clean)
    assert lse.isfinite().all()


@needs_hopper
def test_operands_of_another_shape_or_dtype(make_exact_operands, make_mask):
    operands, mask = make_exact_operands(300, 500), make_mask(300, 500)
    for place, wrong in ((1, operands[1][:, :, :-1]), (2, operands[2].short()), (4, operands[4][..., :500])):
        changed = [*operands[:place], wrong, *operands[place + 1 :]]
        with pytest.raises(LayoutError, match="kernels_common.quantization"):
            block_sparse_attention_quantized_gluon(
                *changed, mask.counts, mask.indices, mask.block_size, scale=1.0
            )


@needs_hopper
def test_one_program_serves_all_lengths(make_exact_operands, make_mask):
    from kernels_common.block_sparse_quantized_sm90 import quantized_fwd_kernel_sm90 as kernel

    _run(make_exact_operands(300, 500), make_mask(300, 500), scale=1.0)
    compiled = len(kernel.device_caches[torch.cuda.current_device()][0])
    _run(make_exact_operands(777, 1234, heads=3), make_mask(777, 1234, heads=3), scale=1.0)
    assert len(kernel.device_caches[torch.cuda.current_device()][0]) == compiled


def test_interleaving_exchanges_pairs_of_tokens():
    value = torch.arange(32, dtype=torch.uint8).expand(1, 1, 1, 32).contiguous()
    mixed = interleave_tokens(value.view(torch.float8_e4m3fn)).view(torch.uint8)
    expected = [0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15]
    assert mixed.flatten().tolist() == expected + [16 + place for place in expected]


@needs_hopper
def test_obstacles_on_hopper(device):
    query = torch.zeros(1, 2, 300, 64, dtype=torch.int8, device=device)
    assert quantized_gluon_obstacle(query, (128, 128), torch.float16) is None
    assert quantized_gluon_obstacle(query[..., :32], (128, 64), torch.float16).endswith("got 32")
    assert "fp16 and bf16" in quantized_gluon_obstacle(query, (128, 64), torch.float32)
    assert "128 x 64" in quantized_gluon_obstacle(query, (64, 128), torch.float16)


def test_the_cpu_is_an_obstacle():
    query = torch.zeros(1, 2, 300, 64, dtype=torch.int8)
    assert "CUDA device" in quantized_gluon_obstacle(query, (128, 128), torch.bfloat16)
    mask = BlockSparseMask.full((128, 128), 300, 300)
    operands = (
        query,
        torch.ones(1, 2, 5),
        query,
        torch.ones(1, 2, 5),
        *_transpose_value(torch.ones(1, 2, 300, 64)),
    )
    with pytest.raises(UnsupportedCallError, match="CUDA device"):
        _run(operands, mask, scale=1.0)
