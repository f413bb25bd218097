"""Every backend of the block-sparse operator against softmax attention in fp64 under a dense mask."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from core import BlockSparseMask
from kernels_common import block_sparse_attention

BACKENDS = ("reference", "torch", "triton")
# Unit roundoff 2^-9 and 2^-11: the softmax weights and the output are each rounded once; with fp32 the sums
# over D and over the keys grow as random walks of 2^-24.
OUTPUT_TOLERANCE = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Scores are summed in fp32; torch's 16-bit CPU kernel takes an exponential of about 14 bits.
LSE_TOLERANCE = {torch.float32: 2.0**-15, torch.bfloat16: 2.0**-13, torch.float16: 2.0**-13}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Call:
    """Tensors of one call and what it should give."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: BlockSparseMask
    extras: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return block_sparse_attention(
            self.query, self.key, self.value, self.mask, return_lse=True, backend=backend, **self.extras
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        group = self.query.shape[1] // self.key.shape[1]
        query = self.query.double()
        key, value = (part.double().repeat_interleave(group, 1) for part in (self.key, self.value))
        scores = query @ key.transpose(2, 3) * self.extras.get("scale", query.shape[-1] ** -0.5)
        bias = self.extras.get("bias")
        if (sizes := self.extras.get("key_sizes")) is not None:
            bias = F.pad(sizes.double().log(), (0, self.key.shape[2] - sizes.shape[2]))
        if bias is not None:
            scores += bias.double().repeat_interleave(query.shape[1] // bias.shape[1], 1)[:, :, None]
        kept = self.mask.to_dense().expand(scores.shape).clone()
        for entry, length in enumerate(self.extras.get("key_lengths", ())):
            kept[entry, :, :, int(length) :] = False
        scores.masked_fill_(~kept, float("-inf"))
        return torch.softmax(scores, -1).nan_to_num(0.0) @ value, torch.logsumexp(scores, -1)

    def check(self, backend: str) -> None:
        output, lse = self.run(backend)
        expected_output, expected_lse = self.expected()
        assert output.dtype == self.query.dtype
        assert lse.dtype == torch.float32
        empty = expected_lse.isneginf()
        assert torch.equal(lse.isneginf(), empty)
        assert not output[empty].any()
        error = (output.double() - expected_output).norm()
        assert error <= OUTPUT_TOLERANCE[output.dtype] * expected_output.norm()
        difference = (lse.double() - expected_lse)[~empty].abs()
        assert (difference <= LSE_TOLERANCE[output.dtype]).all()


@pytest.fixture
def make_call(generator, device):
    def make(
        queries: int = 200,
        keys: int | None = None,
        *,
        batch: int = 2,
        heads: int = 2,
        kv_heads: int | None = None,
        head_dim: int = 64,
        blocks: tuple[int, int] = (64, 64),
        shared: tuple[bool, bool] = (False, False),
        dtype: torch.dtype = torch.float32,
    ) -> Call:
        keys, kv_heads = keys or queries, kv_heads or heads
        mask_shape = [1 if shared[0] else batch, 1 if shared[1] else heads]
        mask_shape += [-(-queries // blocks[0]), -(-keys // blocks[1])]
        kept = torch.rand(mask_shape, generator=generator) < 0.5
        kept[:, :, 0] = True
        if mask_shape[2] > 1:
            kept[:, :, 1] = False  # an empty row
        mask = BlockSparseMask.from_blocks(kept.to(device), blocks, queries, keys)
        tail = torch.arange(mask.indices.shape[-1], device=device) >= mask.counts[..., None]
        mask.indices.masked_fill_(tail, 1 << 30)
        shapes = ((heads, queries), (kv_heads, keys), (kv_heads, keys))
        tensors = (torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes)
        return Call(*(tensor.to(device, dtype) for tensor in tensors), mask)

    return make


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request, backend, device):
    if backend == "triton" and request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly; runs on a GPU")
    return request.param


@pytest.mark.parametrize(
    "lengths", [(1, 1), (63, 63), (200, 200), (128, 256), (70, 333)], ids=lambda pair: f"{pair[0]}x{pair[1]}"
)
def test_lengths_and_dtypes(make_call, backend, dtype, lengths):
    make_call(*lengths, dtype=dtype).check(backend)


def test_a_thousand_tokens(make_call, backend):
    make_call(1000, batch=1, heads=2, blocks=(128, 128)).check(backend)


@pytest.mark.parametrize("blocks", [(64, 64), (128, 64), (64, 128), (128, 128), (16, 48)], ids=str)
def test_block_sizes(make_call, backend, blocks):
    make_call(200, 300, batch=1, blocks=blocks).check(backend)


@pytest.mark.parametrize("dtype_", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 40, 36, 192])
def test_head_dimensions(make_call, backend, head_dim, dtype_):
    make_call(100, batch=1, head_dim=head_dim, blocks=(128, 64), dtype=dtype_).check(backend)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads(make_call, backend, kv_heads):
    make_call(130, 200, heads=4, kv_heads=kv_heads).check(backend)


@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)], ids=str)
def test_masks_shared_by_batches_or_heads(make_call, backend, shared):
    call = make_call(130, shared=shared)
    call.check(backend)


@pytest.mark.parametrize("dtype_", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("bias_shape", [(1, 1), (2, 1), (1, 2), (2, 4)], ids=str)
def test_key_bias(make_call, generator, device, backend, bias_shape, dtype_):
    call = make_call(130, 200, heads=4, kv_heads=2, dtype=dtype_)
    bias = torch.randint(1, 9, (*bias_shape, 200), generator=generator).log().to(device)
    bias[..., 10:40] = float("-inf")
    call.extras = {"bias": bias, "scale": 0.2}
    call.check(backend)


@pytest.mark.parametrize("dtype_", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("sizes_dtype", [torch.int32, torch.float64], ids=["int32", "fp64"])
@pytest.mark.parametrize("shape", [(1, 1, 200), (2, 1, 70), (2, 2, 1), (1, 2, 0)], ids=str)
def test_key_sizes(make_call, generator, device, backend, shape, sizes_dtype, dtype_):
    call = make_call(130, 200, heads=4, kv_heads=2, dtype=dtype_)
    sizes = torch.randint(1, 300, shape, generator=generator).to(device, sizes_dtype)
    call.extras = {"key_sizes": sizes, "scale": 0.2}
    call.check(backend)


@pytest.mark.parametrize("lengths", [(0, 200), (1, 64), (65, 199)], ids=str)
@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_key_lengths(make_call, device, backend, lengths, index_dtype):
    call = make_call(130, 200)
    call.extras["key_lengths"] = torch.tensor(lengths, dtype=index_dtype, device=device)
    call.check(backend)


def test_a_head_dimension_that_is_not_contiguous(make_call, backend):
    call = make_call(130, 200)
    call.query = call.query.transpose(2, 3).contiguous().transpose(2, 3)  # [B, H, N, D] over [B, H, D, N]
    assert call.query.stride(3) != 1
    call.check(backend)


def test_key_lengths_with_bias(make_call, generator, device, backend):
    call = make_call(130, 200, blocks=(128, 128))
    call.extras["key_lengths"] = torch.tensor([77, 200], device=device)
    call.extras["bias"] = torch.randn(2, 2, 200, generator=generator).to(device)
    call.check(backend)


def test_a_row_without_any_allowed_key_is_zero(make_call, device, backend):
    call = make_call(130)
    call.extras["bias"] = torch.full((1, 1, 130), float("-inf"), device=device)
    output, lse = call.run(backend)
    assert not output.any()
    assert lse.isneginf().all()


@pytest.mark.parametrize("dtype_", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_dropped_blocks_are_not_read(make_call, device, dtype_):
    call = make_call(200, dtype=dtype_, shared=(True, True))
    blocks = torch.eye(4, dtype=torch.bool, device=device)
    blocks[3, 3], blocks[3, 1] = False, True
    call.mask = BlockSparseMask.from_blocks(blocks, (64, 64), 200, 200)
    call.key[:, :, 192:] = call.value[:, :, 192:] = float("nan")
    for backend in ("torch", "triton"):
        output, lse = call.run(backend)
        assert output.isfinite().all()
        assert lse.isfinite().all()


def _transposed(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _part_of_fused_projection(tensor):
    wide = torch.cat([tensor, tensor, tensor], 1).transpose(1, 2).contiguous().transpose(1, 2)
    return wide[:, tensor.shape[1] : 2 * tensor.shape[1]]


def _strided_head_dim(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def _unaligned_rows(tensor):
    return torch.cat([tensor, tensor[..., :1]], -1)[..., : tensor.shape[-1]]


def _one_batch_for_all(tensor):
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize(
    "view",
    [_transposed, _part_of_fused_projection, _strided_head_dim, _unaligned_rows, _one_batch_for_all],
    ids=lambda function: function.__name__.strip("_"),
)
def test_strided_inputs(make_call, backend, view):
    call = make_call(130, 200, dtype=torch.float16)
    call.query, call.key, call.value = view(call.query), view(call.key), view(call.value)
    call.check(backend)


def test_output_keeps_the_memory_order_of_query(make_call, backend):
    call = make_call(130)
    call.query = _transposed(call.query)
    output, lse = call.run(backend)
    assert output.stride() == call.query.stride()
    assert lse.is_contiguous()


def test_full_mask_is_dense_attention(make_call, backend, device):
    call = make_call(150)
    call.mask = BlockSparseMask.full((64, 64), 150, 150, device)
    output, _ = call.run(backend)
    dense = torch.nn.functional.scaled_dot_product_attention(call.query, call.key, call.value)
    assert (output - dense).norm() <= 2 * OUTPUT_TOLERANCE[torch.float32] * dense.norm()


def test_widths_below_the_number_of_key_blocks(make_call, backend):
    """Lists need only be as wide as the fullest row."""
    call = make_call(200)
    kept = call.mask.to_blocks()
    kept[..., 0, :] = kept[..., 0, :] & (torch.arange(4, device=kept.device) < 3)
    kept[..., 3] = False
    whole = BlockSparseMask.from_blocks(kept, (64, 64), 200, 200)
    call.mask = BlockSparseMask(whole.counts, whole.indices[..., :3].contiguous(), (64, 64), 200, 200)
    call.check(backend)


def test_without_keys_everything_is_empty(make_call, device, backend):
    call = make_call(70)
    call.key, call.value = call.key[:, :, :0], call.value[:, :, :0]
    no_lists = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    call.mask = BlockSparseMask(no_lists, no_lists[..., None], (64, 64), 70, 0)
    output, lse = call.run(backend)
    assert not output.any()
    assert lse.isneginf().all()


def test_lists_may_be_views_of_larger_tensors(make_call, backend):
    call = make_call(200)
    counts, indices = (
        torch.stack([part, part + (1 << 20)], -1)[..., 0] for part in (call.mask.counts, call.mask.indices)
    )
    call.mask = BlockSparseMask(counts, indices, (64, 64), 200, 200)
    call.check(backend)
