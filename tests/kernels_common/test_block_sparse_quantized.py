"""8-bit and tile-skipping attention: the reference against fp64 softmax, every form against the reference."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch

from core import BlockSparseMask, UnsupportedCallError
from kernels_common.block_sparse_quantized_reference import (
    QUANTIZATIONS,
    block_sparse_attention_quantized_reference,
    precise_operands,
    skip_tile,
)
from kernels_common.block_sparse_quantized_torch import block_sparse_attention_quantized_torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")

# Against the reference, which rounds its operands to the same numbers: sums in fp32, where a score of 60 has
# an error of 2^-15, and two roundings of 2^-9 or 2^-11 to 16 bits, as in test_block_sparse_attention.py. A
# weight at the border of two e4m3 numbers may fall to either side, 2^-3 apart; one in thousands does, which
# shows where a few weights make an output. Weights that are not rounded at all show as more than 2^-6.
FORM_TOLERANCE = {torch.float32: 2.0**-14, torch.float16: 2.0**-10, torch.bfloat16: 2.0**-8}
FP8_FORM_TOLERANCE = 2.0**-6
LSE_TOLERANCE = 2.0**-12
# Against exact attention on normal numbers.
ERROR = {"none": 2.0**-18, "int8_fp16": 1.4e-2, "int8_fp8": 3.9e-2}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Call:
    """Tensors of one call."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: BlockSparseMask
    extras: dict[str, Any] = field(default_factory=dict)

    def run(self, form, quantization: str = "none", **options: Any):
        return form(
            self.query,
            self.key,
            self.value,
            self.mask.counts,
            self.mask.indices,
            self.mask.block_size,
            quantization=quantization,
            **({"scale": self.query.shape[-1] ** -0.5} | self.extras | options),
        )

    def exact(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Softmax attention in fp64 under a dense mask."""
        group = self.query.shape[1] // self.key.shape[1]
        query = self.query.double()
        key, value = (part.double().repeat_interleave(group, 1) for part in (self.key, self.value))
        scores = query @ key.transpose(2, 3) * self.extras.get("scale", query.shape[-1] ** -0.5)
        if (bias := self.extras.get("bias")) is not None:
            scores += bias.double().repeat_interleave(query.shape[1] // bias.shape[1], 1)[:, :, None]
        kept = self.mask.to_dense().expand(scores.shape).clone()
        for entry, length in enumerate(self.extras.get("key_lengths", ())):
            kept[entry, :, :, int(length) :] = False
        scores.masked_fill_(~kept, float("-inf"))
        return torch.softmax(scores, -1).nan_to_num(0.0) @ value, torch.logsumexp(scores, -1)

    def check(self, form, quantization: str) -> torch.Tensor:
        """Output, log-sum-exp and skipped tiles are those of the reference; returns the last."""
        output, lse, skipped = self.run(form, quantization)
        expected, expected_lse, expected_skipped = self.run(
            block_sparse_attention_quantized_reference, quantization
        )
        assert output.dtype == self.query.dtype and lse.dtype == torch.float32
        assert torch.equal(skipped, expected_skipped)
        empty = expected_lse.isneginf()
        assert torch.equal(lse.isneginf(), empty)
        assert not output[empty].any()
        assert ((lse - expected_lse)[~empty].abs() <= LSE_TOLERANCE).all()
        tolerance = FORM_TOLERANCE[output.dtype]
        if quantization == "int8_fp8":
            tolerance = max(tolerance, FP8_FORM_TOLERANCE)
        assert _error(output, expected) <= tolerance
        return skipped


def _on_grid(tensor):
    """Multiples of 1 / 256, whose sums fp32 holds exactly: every form rounds the same centred keys."""
    return (tensor * 256).round() / 256


def _error(output, expected):
    return (output.double() - expected.double()).norm() / expected.double().norm()


@pytest.fixture
def make_call(generator, device):
    def make(
        queries: int = 200,
        keys: int | None = None,
        *,
        batch: int = 1,
        heads: int = 2,
        kv_heads: int | None = None,
        head_dim: int = 64,
        blocks: tuple[int, int] = (64, 64),
        shared: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> Call:
        keys, kv_heads = keys or queries, kv_heads or heads
        mask_shape = [1 if shared else batch, 1 if shared else heads]
        mask_shape += [-(-queries // blocks[0]), -(-keys // blocks[1])]
        kept = torch.rand(mask_shape, generator=generator) < 0.6
        kept[:, :, 0] = True
        if mask_shape[2] > 1:
            kept[:, :, 1] = False  # an empty row
        mask = BlockSparseMask.from_blocks(kept.to(device), blocks, queries, keys)
        tail = torch.arange(mask.indices.shape[-1], device=device) >= mask.counts[..., None]
        mask.indices.masked_fill_(tail, 1 << 30)
        shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
        tensors = (torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes)
        return Call(*(_on_grid(tensor).to(device, dtype) for tensor in tensors), mask)

    return make


@pytest.fixture
def make_peaked_call(make_call, generator, device):
    """Scores differ much more between runs of 16 keys than inside them, so that tiles are skipped."""

    def make(*lengths: int, **options: Any) -> Call:
        call = make_call(*lengths, **options)
        keys, head_dim = call.key.shape[2:]
        direction = torch.randn(head_dim, generator=generator)
        direction /= direction.norm()
        height = torch.randn(*call.key.shape[:2], -(-keys // 16), generator=generator).repeat_interleave(
            16, 2
        )
        offset = 12 * height[:, :, :keys, None] * direction
        call.key += _on_grid(offset).to(device, call.key.dtype)
        call.query += _on_grid(8 * direction).to(device, call.query.dtype)
        call.extras["skip_threshold"] = torch.linspace(2.0, 6.0, call.query.shape[1]).to(device)
        return call

    return make


@pytest.fixture(params=["torch", "triton"])
def form(request):
    if request.param == "torch":
        return block_sparse_attention_quantized_torch
    from kernels_common.block_sparse_quantized_triton import block_sparse_attention_quantized_triton

    return block_sparse_attention_quantized_triton


@pytest.fixture(params=QUANTIZATIONS)
def quantization(request, form, device):
    if request.param == "int8_fp8" and "triton" in form.__name__ and device.type == "cpu":
        pytest.skip("Triton's interpreter computes FP8 wrongly; runs on a GPU")
    return request.param


@pytest.mark.parametrize("mode", QUANTIZATIONS)
@pytest.mark.parametrize("blocks", [(64, 64), (128, 128), (16, 48)], ids=str)
def test_the_reference_is_attention(make_call, device, mode, blocks):
    call = make_call(500, 700, batch=2, heads=4, kv_heads=2, blocks=blocks)
    call.extras["bias"] = torch.arange(1, 701, device=device).log()[None, None]
    output, lse, skipped = call.run(block_sparse_attention_quantized_reference, mode)
    expected, expected_lse = call.exact()
    empty = expected_lse.isneginf()
    assert _error(output, expected) <= ERROR[mode]
    assert torch.equal(lse.isneginf(), empty) and not output[empty].any()
    assert ((lse - expected_lse)[~empty].abs() <= (2.0**-15 if mode == "none" else 2.0**-4)).all()
    assert not skipped.any()


@pytest.mark.parametrize("mode", ["int8_fp16", "int8_fp8"])
def test_the_reference_is_attention_over_its_rounded_operands(make_call, mode):
    call = make_call(130, 200)
    output, lse, _ = call.run(block_sparse_attention_quantized_reference, mode)
    query, key, value, mean_scores = precise_operands(call.query, call.key, call.value, None, mode)
    expected, expected_lse = Call(query, key, value, call.mask).exact()
    expected_lse += mean_scores * 64**-0.5
    kept = ~expected_lse.isneginf()
    # What is left is the rounding of the weights: 2^-4 at most and, as a random walk, 2^-5 of the output.
    assert _error(output, expected) <= (2.0**-5 if mode == "int8_fp8" else 2.0**-18)
    assert ((lse - expected_lse)[kept].abs() <= 2.0**-14).all()


def test_the_reference_in_fp64(make_call):
    call = make_call(130, 200)
    call = replace(call, query=call.query.double(), key=call.key.double(), value=call.value.double())
    for form in (block_sparse_attention_quantized_reference, block_sparse_attention_quantized_torch):
        output, *_ = call.run(form)
        assert output.dtype == torch.float64
        torch.testing.assert_close(output, call.exact()[0], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"]
)
@pytest.mark.parametrize("lengths", [(1, 1), (63, 65), (70, 200)], ids=str)
def test_lengths_and_dtypes(make_call, form, quantization, device, lengths, dtype):
    if dtype == torch.bfloat16 and "triton" in form.__name__ and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly; runs on a GPU")
    make_call(*lengths, batch=2, dtype=dtype).check(form, quantization)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 128), (128, 128), (256, 32)], ids=str)
def test_block_sizes(make_peaked_call, form, quantization, blocks):
    call = make_peaked_call(200, 400, blocks=blocks)
    if quantization == "none":
        assert call.check(form, quantization).any()
    call.extras["skip_threshold"] = None
    assert not call.check(form, quantization).any()


@pytest.mark.parametrize("mode", ["none", "int8_fp16"])
def test_blocks_of_16_tokens(make_peaked_call, form, mode):
    assert make_peaked_call(60, 300, blocks=(16, 48)).check(form, mode).any()


@pytest.mark.parametrize("head_dim", [16, 40, 72, 128, 256])
def test_head_dimensions(make_call, form, quantization, head_dim):
    make_call(100, head_dim=head_dim, blocks=(128, 64)).check(form, quantization)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads_and_a_shared_mask(make_call, form, quantization, kv_heads):
    make_call(100, 130, heads=4, kv_heads=kv_heads, shared=True).check(form, quantization)


@pytest.mark.parametrize("bias_shape", [(1, 2), (2, 4)], ids=str)
def test_key_bias_and_lengths(make_peaked_call, form, quantization, generator, device, bias_shape):
    call = make_peaked_call(100, 300, batch=2, heads=4, kv_heads=2, blocks=(64, 128))
    bias = torch.randint(1, 9, (*bias_shape, 300), generator=generator).log().to(device)
    bias[..., 10:40] = float("-inf")
    call.extras |= {"bias": bias, "scale": 0.2, "key_lengths": torch.tensor([77, 300], device=device)}
    call.check(form, quantization)
    call.extras["key_lengths"] = torch.tensor([0, 129], device=device)
    call.extras["skip_threshold"] = None
    call.check(form, quantization)


def test_keys_past_the_lengths_do_not_matter(make_call, form, quantization, device):
    call = make_call(70, 200, batch=2)
    call.extras["key_lengths"] = torch.tensor([77, 200], device=device)
    output, lse, _ = call.run(form, quantization)
    call.key[0, :, 77:] *= 1e4
    call.value[0, :, 77:] = 1e4
    again, lse_again, _ = call.run(form, quantization)
    assert torch.equal(output, again) and torch.equal(lse, lse_again)


def _transposed(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _strided_head_dim(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


@pytest.mark.parametrize("view", [_transposed, _strided_head_dim], ids=lambda view: view.__name__.strip("_"))
def test_strided_inputs_are_read_and_left_alone(make_call, form, quantization, view):
    call = make_call(130, 200, dtype=torch.float16)
    call.query, call.key, call.value = view(call.query), view(call.key), view(call.value)
    before = [part.clone() for part in (call.query, call.key, call.value)]
    call.check(form, quantization)
    assert call.run(form, quantization)[0].stride() == torch.empty_like(call.query).stride()
    assert all(map(torch.equal, before, (call.query, call.key, call.value)))


def test_a_shift_of_all_keys_moves_only_the_lse(make_call, form, quantization, generator, device):
    call = make_call(130, 256)
    shift = _on_grid(16 * torch.randn(1, 2, 1, 64, generator=generator)).to(device)
    output, lse, _ = call.run(form, quantization)
    shifted = replace(call, key=call.key + shift)
    shifted_output, shifted_lse, _ = shifted.run(form, quantization)
    moved = (call.query.double() * shift.double()).sum(-1) * 64**-0.5
    kept = ~lse.isneginf()
    assert _error(shifted_output, output) <= (2.0**-14 if quantization == "none" else 2.0**-20)
    assert ((shifted_lse - lse - moved)[kept].abs() <= 2.0**-12).all()


def test_an_outlier_channel_of_key_costs_nothing(make_call, form, quantization):
    call = make_call(256, 512)
    call.key[..., 5] += 50.0
    output, *_ = call.run(form, quantization)
    assert _error(output, call.exact()[0]) <= (2.0**-14 if quantization == "none" else ERROR[quantization])


def test_the_largest_fp16_values_do_not_overflow(make_call, form, quantization):
    call = make_call(130, 200, dtype=torch.float16)
    call.value = call.value.sign() * 6e4
    output, *_ = call.run(form, quantization)
    assert output.isfinite().all()
    call.check(form, quantization)


def test_zeros_everywhere(make_call, form, quantization):
    call = make_call(130, 200)
    call.query[:], call.key[:], call.value[:] = 0, 0, 0
    output, lse, _ = call.run(form, quantization)
    assert not output.any()
    torch.testing.assert_close(lse.double(), call.exact()[1], rtol=2.0**-20, atol=0)


def test_an_infinite_threshold_skips_nothing(make_peaked_call, form, quantization):
    call = make_peaked_call(200, 300)
    call.extras["skip_threshold"] = torch.full((2,), float("inf"), device=call.query.device)
    output, lse, skipped = call.run(form, quantization)
    call.extras["skip_threshold"] = None
    plain, plain_lse, _ = call.run(form, quantization)
    assert not skipped.any()
    tolerance = FP8_FORM_TOLERANCE if quantization == "int8_fp8" else 2.0**-20  # other tiles, other peaks
    assert _error(output, plain) <= tolerance
    kept = ~plain_lse.isneginf()
    assert ((lse - plain_lse)[kept].abs() <= 2.0**-16).all()


def _kept_tiles(call):
    """Tiles that are not skipped, as a mask of tiles: the definition, one tile after another."""
    tile_m, tile_n = skip_tile(call.mask.block_size)
    queries, keys = call.query.shape[2], call.key.shape[2]
    group = call.query.shape[1] // call.key.shape[1]
    scores = call.query.double() @ call.key.double().repeat_interleave(group, 1).transpose(2, 3)
    scores *= call.query.shape[-1] ** -0.5 * 1.4426950408889634
    dense = call.mask.to_dense().expand(scores.shape)
    kept = dense[:, :, ::tile_m, ::tile_n].clone()
    threshold = call.extras["skip_threshold"].tolist()
    for batch, head, row in torch.ones(kept.shape[:3]).nonzero().tolist():
        peak = torch.full((tile_m,), float("-inf"), device=scores.device)
        for column in range(kept.shape[3]):
            rows = slice(row * tile_m, min((row + 1) * tile_m, queries))
            tile = scores[batch, head, rows, column * tile_n : min((column + 1) * tile_n, keys)].amax(-1)
            peak_here = peak[: len(tile)]
            if kept[batch, head, row, column]:
                kept[batch, head, row, column] = bool((tile > peak_here - threshold[head]).any())
            if kept[batch, head, row, column]:
                peak[: len(tile)] = torch.maximum(peak_here, tile.to(peak.dtype))
    return BlockSparseMask.from_blocks(kept, (tile_m, tile_n), queries, keys)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 128)], ids=str)
def test_skipping_is_masking(make_peaked_call, form, blocks):
    call = make_peaked_call(200, 700, blocks=blocks)
    output, lse, skipped = call.run(form)
    tiles = _kept_tiles(call)
    expected, expected_lse = replace(call, mask=tiles).exact()
    kept = ~expected_lse.isneginf()
    assert skipped.any()
    assert _error(output, expected) <= 2.0**-14
    assert ((lse - expected_lse)[kept].abs() <= 2.0**-10).all()
    tile_m, tile_n = tiles.block_size
    all_tiles = call.mask.to_dense()[:, :, ::tile_m, ::tile_n]
    assert skipped.sum() == all_tiles.sum() - tiles.counts.sum()


def test_higher_thresholds_skip_less_and_err_less(make_peaked_call, form, quantization):
    call = make_peaked_call(70, 500)
    call.extras["skip_threshold"] = None
    plain, *_ = call.run(form, quantization)
    counts, errors = [], []
    for threshold in (1.0, 8.0, 25.0):
        call.extras["skip_threshold"] = torch.full((2,), threshold, device=call.query.device)
        output, _, skipped = call.run(form, quantization)
        counts.append(int(skipped.sum()))
        errors.append(float(_error(output, plain)))
    assert counts == sorted(counts, reverse=True) and counts[0] > counts[-1]
    assert errors[-1] <= (FP8_FORM_TOLERANCE if quantization == "int8_fp8" else 2.0**-14)


def test_rows_past_the_queries_do_not_keep_a_tile(make_peaked_call, form):
    """The second row of tiles has 6 queries; zero queries would score 0 everywhere and skip nothing."""
    call = make_peaked_call(70, 700)
    call.query[:, :, 64:] = call.query[:, :, :6]
    call.mask = BlockSparseMask.full((64, 64), 70, 700, call.query.device)
    skipped = call.check(form, "none")
    assert (skipped[:, :, 1] >= skipped[:, :, 0]).all() and skipped[:, :, 1].any()


def test_skip_tiles_divide_blocks():
    assert skip_tile((64, 64)) == (64, 64)
    assert skip_tile((128, 128)) == (64, 128)
    assert skip_tile((16, 48)) == (16, 16)
    assert skip_tile((256, 256)) == (64, 128)


@no_gpu
def test_what_the_interpreter_and_the_cpu_refuse(make_call):
    from kernels_common.block_sparse_quantized_triton import block_sparse_attention_quantized_triton

    call = make_call(70)
    with pytest.raises(UnsupportedCallError, match="FP8"):
        call.run(block_sparse_attention_quantized_triton, "int8_fp8")
    call = replace(call, query=call.query.bfloat16())
    with pytest.raises(UnsupportedCallError, match="bf16"):
        call.run(block_sparse_attention_quantized_triton, "int8_fp16")


def test_triton_refuses_to_skip_wide_fp32_tiles(make_call, device):
    from kernels_common.block_sparse_quantized_triton import block_sparse_attention_quantized_triton

    call = make_call(70, head_dim=192)
    call.extras["skip_threshold"] = torch.ones(2, device=device)
    with pytest.raises(UnsupportedCallError, match="up to 128 dimensions, got 192"):
        call.run(block_sparse_attention_quantized_triton)


@needs_gpu
def test_fp8_needs_wide_key_blocks_and_a_recent_gpu(make_call, monkeypatch):
    from kernels_common.block_sparse_quantized_triton import block_sparse_attention_quantized_triton

    with pytest.raises(UnsupportedCallError, match="multiple of 32"):
        make_call(70, blocks=(16, 48)).run(block_sparse_attention_quantized_triton, "int8_fp8")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 6))
    call = make_call(70)
    with pytest.raises(UnsupportedCallError, match=r"8\.9 for FP8, got 8\.6"):
        call.run(block_sparse_attention_quantized_triton, "int8_fp8")


@needs_gpu
@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_one_program_serves_all_lengths(make_call, mode):
    from kernels_common import block_sparse_quantized_triton as module

    kernel = module.block_sparse_quantized_fwd_kernel
    make_call(300, 500, dtype=torch.bfloat16).check(module.block_sparse_attention_quantized_triton, mode)
    compiled = len(kernel.device_caches[torch.cuda.current_device()][0])
    make_call(777, 1234, dtype=torch.bfloat16).check(module.block_sparse_attention_quantized_triton, mode)
    assert len(kernel.device_caches[torch.cuda.current_device()][0]) == compiled


@needs_gpu
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("mode", QUANTIZATIONS)
def test_long_sequences(make_call, head_dim, mode):
    from kernels_common.block_sparse_quantized_triton import block_sparse_attention_quantized_triton

    call = make_call(3000, 5000, heads=8, head_dim=head_dim, blocks=(128, 128), dtype=torch.bfloat16)
    call.check(block_sparse_attention_quantized_triton, mode)
    output, *_ = call.run(block_sparse_attention_quantized_triton, mode)
    assert _error(output, call.exact()[0]) <= max(ERROR[mode], 2.0**-8)
