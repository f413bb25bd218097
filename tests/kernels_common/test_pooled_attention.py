"""Every backend of pooled attention against the sums written out, block by block, in fp64."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from core import BlockSparseMask, LevelMask
from core.level_mask import LEVELS
from kernels_common import block_sparse_attention, pooled_attention

BACKENDS = ("reference", "torch", "triton")
# Unit roundoff 2^-9 and 2^-11: the softmax weights, the pooled values and the output are each rounded once;
# with fp32 the sums over D and over the keys grow as random walks of 2^-24.
OUTPUT_TOLERANCE = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
# Scores are summed in fp32; each is off by what rounding the D entries of its pooled key adds up to, about
# the unit roundoff times a score of a few units.
LSE_TOLERANCE = {torch.float32: 2.0**-15, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-9}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Call:
    """Tensors of one call and what it should give."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: LevelMask
    extras: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
        return pooled_attention(
            self.query, self.key, self.value, self.mask, return_lse=True, backend=backend, **self.extras
        )

    def expected(self) -> tuple[torch.Tensor, torch.Tensor]:
        scale = self.extras.get("scale", self.query.shape[-1] ** -0.5)
        group = self.query.shape[1] // self.key.shape[1]
        rows, columns = self.mask.block_size
        levels = self.mask.to_levels().expand(*self.query.shape[:2], -1, -1).tolist()
        output = torch.zeros(self.query.shape, dtype=torch.float64, device=self.query.device)
        lse = torch.full(self.query.shape[:3], float("-inf"), dtype=torch.float64, device=self.query.device)
        for b, heads in enumerate(levels):
            for h, matrix in enumerate(heads):
                key, value = (part[b, h // group].double().split(columns) for part in (self.key, self.value))
                for row, chosen in enumerate(matrix):
                    runs = [
                        (keys.mean(0), values.mean(0), len(keys))
                        for block, level in enumerate(chosen)
                        if level > 0
                        for keys, values in zip(
                            key[block].split(level), value[block].split(level), strict=True
                        )
                    ]
                    if runs:
                        span = slice(row * rows, (row + 1) * rows)
                        keys, values, sizes = zip(*runs, strict=True)
                        scores = self.query[b, h, span].double() @ torch.stack(keys).T * scale
                        scores += torch.tensor(sizes, device=scores.device).double().log()
                        output[b, h, span] = torch.softmax(scores, -1) @ torch.stack(values)
                        lse[b, h, span] = torch.logsumexp(scores, -1)
        return output, lse

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
        batch: int = 1,
        heads: int = 2,
        kv_heads: int | None = None,
        head_dim: int = 16,
        blocks: tuple[int, int] = (64, 64),
        shared: tuple[bool, bool] = (False, False),
        dtype: torch.dtype = torch.float32,
        level: int | None = None,
    ) -> Call:
        """A row in three is empty where there are several; ``level`` puts all listed blocks at one level."""
        keys, kv_heads = keys or queries, kv_heads or heads
        shape = [1 if shared[0] else batch, 1 if shared[1] else heads]
        shape += [-(-queries // blocks[0]), -(-keys // blocks[1])]
        choice = torch.tensor([0, *LEVELS] if level is None else [0, level, level], dtype=torch.int8)
        levels = choice[torch.randint(len(choice), shape, generator=generator)]
        levels[:, :, 0, -1] = choice[-1]  # the ragged block is seen
        levels[:, :, 1::3] = 0
        mask = LevelMask.from_levels(levels.to(device), blocks, queries, keys)
        mask.indices.masked_fill_(mask.listed_levels() == 0, 1 << 30)
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


@pytest.mark.parametrize("length", [1, 16, 100, 127, 128, 129])
def test_lengths_and_dtypes(make_call, backend, dtype, length):
    make_call(length, heads=1, dtype=dtype, blocks=(64, 32), head_dim=64).check(backend)


@pytest.mark.parametrize("blocks", [(128, 128), (128, 32)], ids=str)
def test_a_thousand_tokens(make_call, backend, blocks):
    make_call(1000, heads=1, blocks=blocks).check(backend)


@pytest.mark.parametrize("key_block", [16, 32, 64, 128])
@pytest.mark.parametrize("level", LEVELS)
def test_every_key_block_at_every_level(make_call, backend, key_block, level):
    make_call(64, 3 * key_block + 5, heads=1, blocks=(64, key_block), level=level).check(backend)


@pytest.mark.parametrize("key_block", [16, 32, 48, 64, 128])
def test_all_levels_in_one_row(make_call, backend, key_block):
    make_call(64, 7 * key_block - 11, blocks=(64, key_block)).check(backend)


@pytest.mark.parametrize("tail", [1, 2, 3, 5, 7, 8, 9])
def test_the_last_pooled_key_stands_for_the_tokens_that_there_are(make_call, backend, tail):
    for level in LEVELS:
        make_call(16, 16 + tail, heads=1, blocks=(16, 16), level=level).check(backend)


@pytest.mark.parametrize("query_block", [16, 64, 128])
def test_query_blocks(make_call, backend, query_block):
    make_call(200, 70, blocks=(query_block, 64)).check(backend)


@pytest.mark.parametrize("head_dim", [64, 128, 40, 36, 192])
def test_head_dimensions(make_call, backend, head_dim):
    make_call(40, 70, heads=1, blocks=(64, 32), head_dim=head_dim, dtype=torch.float16).check(backend)
    make_call(40, 70, heads=1, blocks=(64, 32), head_dim=head_dim).check(backend)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads(make_call, backend, kv_heads):
    make_call(64, 100, batch=2, heads=4, kv_heads=kv_heads).check(backend)


@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)], ids=str)
def test_masks_shared_by_batches_or_heads(make_call, backend, shared):
    make_call(70, batch=2, shared=shared).check(backend)


def test_scale(make_call, backend):
    call = make_call()
    call.extras["scale"] = 0.7
    call.check(backend)


@pytest.mark.parametrize("key_block", [16, 32, 64, 128])
def test_weights_sum_to_one(make_call, backend, key_block):
    """Values of 1 pool to 1, so that the output is the sum of the weights."""
    call = make_call(64, 3 * key_block + 13, blocks=(64, key_block))
    call.value.fill_(1.0)
    output, lse = call.run(backend)
    seen = output[~lse.isneginf()]
    assert len(seen)
    torch.testing.assert_close(seen, torch.ones_like(seen), rtol=0, atol=2.0**-20)


@pytest.mark.parametrize("key_block", [16, 64])
def test_equal_keys_weigh_blocks_by_their_tokens(make_call, backend, key_block):
    call = make_call(64, 5 * key_block + 3, heads=1, blocks=(64, key_block))
    call.key = call.key[:, :, :1].expand_as(call.key)
    owner = torch.arange(call.key.shape[2]) // key_block
    call.value = torch.eye(16)[owner].to(call.value)[None, None]
    output, _ = call.run(backend)
    listed = call.mask.to_levels()[0, 0, 0].cpu() > 0
    tokens = torch.bincount(owner) * listed
    expected = (tokens / tokens.sum()).to(output)
    torch.testing.assert_close(output[0, 0, 0, :6], expected, rtol=0, atol=2.0**-20)


@pytest.mark.parametrize("key_block", [32, 128])
def test_level_one_is_block_sparse_attention(make_call, backend, key_block):
    call = make_call(100, 150, blocks=(64, key_block), level=1)
    block_mask = BlockSparseMask.from_blocks(call.mask.to_levels() == 1, (64, key_block), 100, 150)
    call.mask = LevelMask.from_block_mask(block_mask)
    output, lse = call.run(backend)
    expected, expected_lse = block_sparse_attention(
        call.query, call.key, call.value, block_mask, return_lse=True, backend=backend
    )
    torch.testing.assert_close(output, expected, rtol=0, atol=2.0**-18)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=2.0**-18)


@pytest.mark.parametrize("level", LEVELS[1:])
def test_nothing_is_lost_where_runs_are_constant(make_call, backend, level):
    call = make_call(64, 133, heads=1, blocks=(64, 32), level=level)
    for part in (call.key, call.value):
        part.copy_(part[:, :, ::8].clone().repeat_interleave(8, 2)[:, :, :133])
    pooled, pooled_lse = call.run(backend)
    levels = call.mask.to_levels().clamp(max=1)
    call.mask = LevelMask.from_levels(levels, (64, 32), 64, 133)
    exact, exact_lse = call.run(backend)
    torch.testing.assert_close(pooled, exact, rtol=0, atol=2.0**-18)
    torch.testing.assert_close(pooled_lse, exact_lse, rtol=0, atol=2.0**-18)


@pytest.mark.parametrize("backend_", ["torch", "triton"])
def test_blocks_that_are_left_out_are_not_read(make_call, device, backend_):
    call = make_call(100, 200, blocks=(64, 32))
    levels = torch.tensor([[0, 1, 0, 2, 4, 8, 0], [0, 0, 0, 0, 8, 0, 0]], dtype=torch.int8, device=device)
    call.mask = LevelMask.from_levels(levels, (64, 32), 100, 200)
    for block in (0, 2, 6):
        call.key[:, :, block * 32 : (block + 1) * 32] = float("nan")
        call.value[:, :, block * 32 : (block + 1) * 32] = float("nan")
    output, lse = call.run(backend_)
    assert output.isfinite().all()
    assert lse.isfinite().all()


def _transposed(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _strided_head_dim(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def _unaligned_rows(tensor):
    return torch.cat([tensor, tensor[..., :1]], -1)[..., : tensor.shape[-1]]


def _one_batch_for_all(tensor):
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize(
    "view",
    [_transposed, _strided_head_dim, _unaligned_rows, _one_batch_for_all],
    ids=lambda function: function.__name__.strip("_"),
)
def test_strided_inputs(make_call, backend, view):
    call = make_call(40, 100, batch=2, dtype=torch.float16)
    call.query, call.key, call.value = view(call.query), view(call.key), view(call.value)
    call.check(backend)


def test_output_keeps_the_memory_order_of_query(make_call, backend):
    call = make_call(130)
    call.query = _transposed(call.query)
    output, lse = call.run(backend)
    assert output.stride() == call.query.stride()
    assert lse.is_contiguous()


def test_lists_may_be_narrow_and_views_of_larger_tensors(make_call, device, backend):
    call = make_call(100, 300, blocks=(64, 64))
    levels = torch.tensor([[0, 8, 0, 1, 0], [4, 0, 2, 0, 2]], dtype=torch.int8, device=device)
    whole = LevelMask.from_levels(levels, (64, 64), 100, 300)
    counts, indices = (
        torch.stack([part, part + (1 << 20)], -1)[..., 0] for part in (whole.counts, whole.indices[..., :3])
    )
    call.mask = LevelMask(counts, indices, (64, 64), 100, 300)
    call.check(backend)


def test_without_keys_everything_is_empty(make_call, device, backend):
    call = make_call(70)
    call.key, call.value = call.key[:, :, :0], call.value[:, :, :0]
    no_lists = torch.zeros(1, 1, 2, 4, dtype=torch.int32, device=device)
    call.mask = LevelMask(no_lists, no_lists, (64, 64), 70, 0)
    output, lse = call.run(backend)
    assert not output.any()
    assert lse.isneginf().all()


def test_two_runs_agree_bit_for_bit(make_call, backend, dtype):
    call = make_call(100, 200, heads=1, dtype=dtype)
    for first, second in zip(call.run(backend), call.run(backend), strict=True):
        assert torch.equal(first, second)
