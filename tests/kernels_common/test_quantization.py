"""INT8 and FP8 operands: every form against the arithmetic of its definition."""

import pytest
import torch

from kernels_common.quantization import (
    AMAX_FLOOR,
    dequantize_tokens,
    dequantize_value,
    quantize_query_key,
    quantize_query_key_torch,
    quantize_value_fp8,
    quantize_value_fp8_torch,
)

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "triton"])
def quantize(request):
    if request.param == "torch":
        return quantize_query_key_torch
    from kernels_common.quantization_triton import quantize_query_key_triton

    return quantize_query_key_triton


@pytest.fixture(params=["torch", "triton"])
def quantize_value(request, device):
    if request.param == "torch":
        return quantize_value_fp8_torch
    if device.type == "cpu":
        pytest.skip("Triton's interpreter computes FP8 wrongly; runs on a GPU")
    from kernels_common.quantization_triton import quantize_value_fp8_triton

    return quantize_value_fp8_triton


@pytest.fixture
def make(generator, device):
    def tensor(*shape, grid=False, dtype=torch.float32):
        """Normal numbers; on a grid, sums of thousands of them are exact in fp32."""
        numbers = torch.randn(*shape, generator=generator)
        return ((numbers * 256).round() / 256 if grid else numbers).to(device, dtype)

    return tensor


def _check_int8(source, integers, scale):
    """Scales are group maxima / 127 and no number is further than half a step from its integer."""
    assert integers.dtype == torch.int8 and scale.dtype == torch.float32
    groups = source.double().abs().amax(3).split(64, dim=2)
    amax = torch.stack([group.amax(2) for group in groups], 2).clamp(min=AMAX_FLOOR)
    torch.testing.assert_close(scale.double(), amax / 127, rtol=2.0**-20, atol=0)
    step = scale.double().repeat_interleave(64, 2)[:, :, : source.shape[2], None]
    assert ((source.double() - integers * step).abs() <= step * (0.5 + 2.0**-14)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("lengths", [(1, 1), (63, 65), (200, 600), (64, 128)], ids=str)
def test_integers_scales_and_means(make, quantize, lengths, dtype):
    query, key = make(2, 4, lengths[0], 64, dtype=dtype), make(2, 2, lengths[1], 64, dtype=dtype) + 3
    operands = quantize(query, key)
    mean = key.double().mean(2, keepdim=True)
    torch.testing.assert_close(operands.key_mean.double(), mean, rtol=2.0**-20, atol=2.0**-20)
    _check_int8(query, operands.query, operands.query_scale)
    _check_int8(key.float() - operands.key_mean, operands.key, operands.key_scale)
    mean_scores = (query.double() * mean.repeat_interleave(2, 1)).sum(-1)
    torch.testing.assert_close(operands.mean_scores.double(), mean_scores, rtol=2.0**-18, atol=2.0**-14)


@pytest.mark.parametrize("head_dim", [40, 64, 128, 256])
def test_triton_gives_the_integers_of_torch(make, head_dim):
    from kernels_common.quantization_triton import quantize_query_key_triton

    query, key = make(1, 2, 100, head_dim, grid=True), make(1, 2, 130, head_dim, grid=True)
    expected = quantize_query_key_torch(query, key)
    result = quantize_query_key_triton(query, key)
    for name in ("query", "query_scale", "key", "key_scale", "key_mean"):
        assert torch.equal(getattr(result, name), getattr(expected, name)), name


def test_a_shift_of_all_keys_changes_only_the_mean(make, quantize):
    query, key = make(1, 2, 100, 64, grid=True), make(1, 2, 256, 64, grid=True)
    shift = make(1, 2, 1, 64, grid=True) * 16
    plain, shifted = quantize(query, key), quantize(query, key + shift)
    assert torch.equal(shifted.key, plain.key)
    assert torch.equal(shifted.key_scale, plain.key_scale)
    assert torch.equal(shifted.key_mean, plain.key_mean + shift)


def test_only_valid_keys_count(make, quantize, device):
    query, key = make(2, 2, 100, 64), make(2, 2, 200, 64)
    lengths = torch.tensor([77, 200], device=device)
    key[0, :, 77:] = float("nan")
    operands = quantize(query, key, key_lengths=lengths)
    alone = quantize(query[:1], key[:1, :, :77].contiguous())
    torch.testing.assert_close(operands.key_mean[:1], alone.key_mean)
    _check_int8(
        key[:1, :, :77] - operands.key_mean[:1], operands.key[:1, :, :77], operands.key_scale[:1, :, :2]
    )
    assert not operands.key[0, :, 77:].any()
    assert operands.mean_scores.isfinite().all() and operands.key_scale.isfinite().all()


def test_a_batch_entry_without_valid_keys(make, quantize, device):
    operands = quantize(
        make(2, 2, 70, 64), make(2, 2, 70, 64), key_lengths=torch.tensor([0, 70], device=device)
    )
    assert not operands.key[0].any() and not operands.key_mean[0].any()
    assert all(part.isfinite().all() for part in operands)


def test_groups_of_zeros(make, quantize):
    query, key = make(1, 2, 200, 64), make(1, 2, 200, 64)
    query[:, :, 64:128] = 0
    operands = quantize(query, torch.full_like(key, 5.0))
    assert not operands.query[:, :, 64:128].any() and not operands.key.any()
    assert (operands.query_scale > 0).all() and (operands.key_scale > 0).all()


def _transposed(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _strided_head_dim(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("view", [_transposed, _strided_head_dim], ids=lambda view: view.__name__.strip("_"))
def test_strided_inputs_are_read_and_left_alone(make, quantize, view):
    query, key = view(make(2, 2, 100, 64, grid=True)), view(make(2, 2, 130, 64, grid=True))
    before = query.clone(), key.clone()
    operands = quantize(query, key)
    contiguous = quantize(query.contiguous(), key.contiguous())
    assert all(torch.equal(one, other) for one, other in zip(operands[:5], contiguous[:5], strict=True))
    torch.testing.assert_close(operands.mean_scores, contiguous.mean_scores, rtol=2.0**-18, atol=2.0**-16)
    assert torch.equal(query, before[0]) and torch.equal(key, before[1])


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("shape", [(1, 1, 1, 64), (2, 2, 200, 64), (1, 2, 600, 40)], ids=str)
def test_values_are_e4m3_by_channel(make, quantize_value, shape, dtype):
    value = make(*shape, dtype=dtype) * torch.logspace(-2, 4, shape[3], device=make(1).device).to(dtype)
    value_fp8, scale = quantize_value(value)
    padded = -(-shape[2] // 128) * 128
    assert value_fp8.shape == (*shape[:2], shape[3], padded) and value_fp8.dtype == torch.float8_e4m3fn
    amax = value.double().abs().amax(2)
    torch.testing.assert_close(scale.double(), amax / 448, rtol=2.0**-20, atol=0)
    assert not value_fp8[..., shape[2] :].float().any()
    # Half a step of a 3-bit mantissa, or of the smallest e4m3.
    error = (dequantize_value(value_fp8, scale, shape[2]).double() - value.double()).abs()
    bound = torch.maximum(value.double().abs() * 2.0**-4, scale.double()[:, :, None] * 2.0**-10)
    assert (error <= bound * (1 + 2.0**-14)).all()


def test_only_valid_values_count(make, quantize_value, device):
    value = make(2, 2, 200, 64)
    value[0, :, 77:] = float("nan")
    value_fp8, scale = quantize_value(value, key_lengths=torch.tensor([77, 200], device=device))
    alone_fp8, alone_scale = quantize_value(value[:1, :, :77].contiguous())
    assert torch.equal(value_fp8[:1, ..., :77].float(), alone_fp8[..., :77].float())
    assert torch.equal(scale[:1], alone_scale)
    assert not value_fp8[0, ..., 77:].float().any()


def test_a_channel_of_zeros_and_the_largest_fp16(make, quantize_value):
    value = make(1, 2, 100, 64).clamp(-1, 1).half() * 6e4
    value[..., 3] = 0
    value_fp8, scale = quantize_value(value)
    assert value_fp8.float().isfinite().all() and (scale > 0).all()
    assert not value_fp8[:, :, 3].float().any()


def test_dequantised_tokens_are_close(make, quantize):
    query, key = make(1, 2, 300, 64), make(1, 2, 300, 64)
    operands = quantize(query, key)
    restored = dequantize_tokens(operands.key, operands.key_scale) + operands.key_mean
    assert (restored - key).norm() <= 2.0**-6 * key.norm()


@needs_gpu
def test_a_gpu_runs_triton(make):
    query, key = make(1, 2, 300, 64, grid=True), make(1, 2, 300, 64, grid=True)
    for result, expected in (
        (quantize_query_key(query, key), quantize_query_key_torch(query, key)),
        (quantize_value_fp8(key), quantize_value_fp8_torch(key)),
    ):
        for one, other in zip(result, expected, strict=True):
            torch.testing.assert_close(one.float(), other.float(), rtol=2.0**-20, atol=2.0**-16)


@needs_gpu
def test_one_program_serves_all_lengths(make):
    from kernels_common import quantization_triton

    kernels = [getattr(quantization_triton, f"quantize_{part}_kernel") for part in ("query", "key", "value")]
    for length in (300, 777):
        quantize_query_key(make(1, 2, length, 64), make(1, 2, length + 1, 64))
        quantize_value_fp8(make(1, 2, length, 64))
        compiled = [len(kernel.device_caches[torch.cuda.current_device()][0]) for kernel in kernels]
        if length == 300:
            before = compiled
    assert compiled == before
