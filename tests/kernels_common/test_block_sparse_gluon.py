"""The Gluon kernel against softmax attention in fp32 under a dense mask; needs a Hopper GPU."""

import pytest
import torch
import torch.nn.functional as F

from core import BlockSparseMask, UnsupportedCallError

pytest.importorskip("triton.experimental.gluon.nvidia.hopper", reason="needs triton with Gluon")

from kernels_common.block_sparse_attention import attend_blocks, block_sparse_attention, resolve_backend
from kernels_common.block_sparse_gluon import (
    block_sparse_attention_gluon,
    gluon_obstacle,
    prefers_gluon,
)
from kernels_common.block_sparse_gluon_sizes import sized_values

needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0),
    reason="needs a GPU of compute capability 9.0",
)
# As in test_block_sparse_attention.py.
OUTPUT_TOLERANCE = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}
LSE_TOLERANCE = 2.0**-13


def _attention(query, key, value, mask, sizes=None):
    group = query.shape[1] // key.shape[1]
    key, value = (part.float().repeat_interleave(group, 1) for part in (key, value))
    scores = (query.float() @ key.transpose(2, 3)) * query.shape[-1] ** -0.5
    if sizes is not None:
        bias = F.pad(sizes.double().log().float(), (0, key.shape[2] - sizes.shape[2]))
        scores += bias.repeat_interleave(query.shape[1] // sizes.shape[1], 1)[:, :, None]
    scores.masked_fill_(~mask.to_dense(), float("-inf"))
    return torch.softmax(scores, -1).nan_to_num(0.0) @ value, torch.logsumexp(scores, -1)


def _run(query, key, value, mask, sizes=None):
    scale = query.shape[-1] ** -0.5
    return block_sparse_attention_gluon(
        query, key, value, mask.counts, mask.indices, mask.block_size, scale=scale, key_sizes=sizes
    )


def _check(query, key, value, mask, sizes=None):
    output, lse = _run(query, key, value, mask, sizes)
    expected_output, expected_lse = _attention(query, key, value, mask, sizes)
    empty = expected_lse.isneginf()
    assert torch.equal(lse.isneginf(), empty)
    assert not output[empty].any()
    error = (output.float() - expected_output).norm()
    assert error <= OUTPUT_TOLERANCE[output.dtype] * expected_output.norm()
    assert ((lse - expected_lse)[~empty].abs() <= LSE_TOLERANCE).all()


@pytest.fixture
def make_call(generator, device, poisoned_memory):
    def make(
        queries, keys, *, block=128, head_dim=64, batch=1, heads=2, kv_heads=None, density=0.5, shared=False,
        dtype=torch.bfloat16,
    ):  # fmt: skip
        """Tensors ``[B, N, H, D]`` seen as ``[B, H, N, D]`` and a mask with empty rows and poisoned tails."""
        shapes = ((queries, heads), (keys, kv_heads or heads), (keys, kv_heads or heads))
        tensors = (torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes)
        rows, columns = -(-queries // 128), -(-keys // block)
        kept = torch.rand(1 if shared else batch, 1 if shared else heads, rows, columns, generator=generator)
        kept = kept < density
        kept[:, :, 0] = density == 1  # an empty row, unless all is kept
        kept[:, :, -1, -1] = True  # the ragged block
        mask = BlockSparseMask.from_blocks(kept.to(device), (128, block), queries, keys)
        tail = torch.arange(mask.indices.shape[-1], device=device) >= mask.counts[..., None]
        mask.indices.masked_fill_(tail, 1 << 30)
        return *(tensor.to(device, dtype).transpose(1, 2) for tensor in tensors), mask

    return make


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("lengths", [(1, 63), (200, 200), (257, 641), (300, 1000)], ids=str)
def test_lengths_blocks_and_dtypes(make_call, lengths, block, head_dim, dtype):
    _check(*make_call(*lengths, block=block, head_dim=head_dim, dtype=dtype))


@needs_hopper
@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_programs_that_walk_many_tiles(make_call, density, head_dim, block):
    for _ in range(3):  # a race shows as an error that moves
        _check(*make_call(1700, 1900, batch=2, heads=24, block=block, head_dim=head_dim, density=density))


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_scores_that_rise_from_tile_to_tile(make_call, head_dim):
    """Lists are walked from their end: earlier keys are larger, by steps below and above the slack."""
    for step in (0.5, 3.0, 12.0):
        query, key, value, mask = make_call(300, 640, head_dim=head_dim, density=1.0)
        query[..., 0], key[..., 0] = head_dim**0.5, step * torch.arange(640, 0, -1, device=key.device) / 64
        _check(query, key, value, mask)


@pytest.fixture
def make_sizes(generator, device):
    def make(batch, heads, length, largest=300):
        sizes = torch.randint(1, largest, (batch, heads, length), generator=generator)
        sizes[torch.rand(batch, heads, length, generator=generator) < 0.5] = 1
        return sizes.to(device, torch.int32)

    return make


@needs_hopper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [128, 64])
@pytest.mark.parametrize("lengths", [(1, 63), (200, 200), (257, 641), (1700, 1900)], ids=str)
def test_sizes(make_call, make_sizes, lengths, block, head_dim, dtype):
    query, key, value, mask = make_call(
        *lengths, block=block, head_dim=head_dim, dtype=dtype, batch=2, heads=6, kv_heads=2
    )
    for shape in ((1, 1), (2, 2), (2, 1), (1, 2)):
        _check(query, key, value, mask, make_sizes(*shape, lengths[1]))
    for sized in (1, lengths[1] // 3, lengths[1] - 1):  # keys past them have size 1
        _check(query, key, value, mask, make_sizes(1, 2, max(1, sized)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (2, 3)], ids=str)
def test_values_times_sizes(device, generator, poisoned_memory, dtype, shape):
    if dtype == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly; runs on a GPU")
    value = torch.randn(2, 150, 3, 128, generator=generator).to(device, dtype).transpose(1, 2)
    value[:, 1] *= 100
    sizes = torch.randint(1, 15000, (*shape, 130), generator=generator, dtype=torch.int32).to(device)
    found = sized_values(value, sizes)
    divisor = torch.ones(2, 3, device=device, dtype=torch.float64)
    if dtype == torch.float16:
        divisor = found.log_divisor.double().exp()
        assert (divisor[:, 1] > 10).all() and found.value.isfinite().all()
    else:
        assert found.log_divisor is None
    exact = F.pad(sizes, (0, 20), value=1).double().expand(2, 3, -1) / divisor[..., None]
    assert found.sizes.shape == (2, 3, 1, 192) and found.sizes.isfinite().all()
    assert ((found.sizes[:, :, 0, :150] - exact).abs() <= 2.0**-21 * exact).all()
    products = value.double() * exact[..., None]
    rounding = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}[dtype]
    assert ((found.value.double() - products).abs() <= rounding * products.abs() + 2.0**-24).all()


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_products_of_values_and_sizes_fit_into_fp16(make_call, make_sizes, head_dim):
    query, key, value, mask = make_call(300, 1500, head_dim=head_dim, dtype=torch.float16)
    value[:, 0] *= 100  # one head alone
    sizes = make_sizes(1, 2, 1500, largest=15000)
    _check(query, key, value, mask, sizes)
    _check(query, key, value, mask, sizes[:, :1])


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sizes_of_many_tiles_repeat_bit_for_bit(make_call, make_sizes, head_dim):
    query, key, value, mask = make_call(1700, 1900, batch=2, heads=24, head_dim=head_dim, density=1.0)
    sizes = make_sizes(2, 24, 1900)
    first = _run(query, key, value, mask, sizes)
    for _ in range(20):
        assert all(map(torch.equal, _run(query, key, value, mask, sizes), first))


@needs_hopper
def test_grouped_query_heads_and_a_shared_mask(make_call):
    _check(*make_call(300, 500, batch=2, heads=6, kv_heads=2, shared=True))


@needs_hopper
def test_dropped_blocks_are_not_read(make_call):
    query, key, value, mask = make_call(300, 600, block=64, density=1.0, shared=True)
    kept = mask.to_blocks()
    kept[..., 2:5] = False
    mask = BlockSparseMask.from_blocks(kept, (128, 64), 300, 600)
    key, value = key.clone(), value.clone()
    key[:, :, 128:320] = value[:, :, 128:320] = float("nan")
    output, lse = _run(query, key, value, mask)
    assert output.isfinite().all()
    assert lse.isfinite().all()


@needs_hopper
def test_memory_order_of_query_is_kept(make_call):
    query, key, value, mask = make_call(300, 300)
    for layout in (query, query.contiguous(), query.transpose(2, 3).contiguous().transpose(2, 3)):
        _check(layout, key, value, mask)
        assert _run(layout, key, value, mask)[0].stride() == torch.empty_like(layout).stride()


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
def test_one_program_serves_all_lengths(make_call, head_dim):
    from kernels_common.block_sparse_gluon_64 import block_sparse_fwd_kernel_sm90_64
    from kernels_common.block_sparse_gluon_128 import block_sparse_fwd_kernel_sm90

    kernel = block_sparse_fwd_kernel_sm90_64 if head_dim == 64 else block_sparse_fwd_kernel_sm90
    _check(*make_call(300, 500, head_dim=head_dim))
    compiled = len(kernel.device_caches[torch.cuda.current_device()][0])
    assert compiled > 0
    _check(*make_call(777, 1234, heads=3, head_dim=head_dim))
    assert len(kernel.device_caches[torch.cuda.current_device()][0]) == compiled


@needs_hopper
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("block", [128, 64])
def test_results_repeat_bit_for_bit(make_call, block, head_dim):
    query, key, value, mask = make_call(1700, 1900, batch=2, heads=24, block=block, head_dim=head_dim)
    first = _run(query, key, value, mask)
    for _ in range(20):  # a race shows as an output that changes
        assert all(map(torch.equal, _run(query, key, value, mask), first))


@needs_hopper
def test_obstacles_on_hopper(device):
    query = torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16, device=device)
    assert gluon_obstacle(query, (128, 128)) is None
    assert gluon_obstacle(query[..., :32], (128, 64)).endswith("got 32")
    assert "fp16 and bf16" in gluon_obstacle(query.float(), (128, 64))
    assert "128 x 64" in gluon_obstacle(query, (64, 64))


@needs_hopper
def test_it_is_preferred_where_it_is_faster(device):
    query = torch.zeros(1, 2, 300, 128, dtype=torch.bfloat16, device=device)
    assert prefers_gluon(query, (128, 128)) and prefers_gluon(query.half(), (128, 64))
    assert not prefers_gluon(query, (64, 64))  # unsupported
    assert prefers_gluon(query[..., :64], (128, 128))


def test_it_is_never_preferred_off_hopper():
    assert not prefers_gluon(torch.zeros(1, 2, 300, 128, dtype=torch.bfloat16), (128, 128))


def test_the_cpu_is_an_obstacle():
    query = torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)
    assert "CUDA device" in gluon_obstacle(query, (128, 128))
    mask = BlockSparseMask.full((128, 128), 300, 300)
    with pytest.raises(UnsupportedCallError, match="CUDA device"):
        _run(query, query, query, mask)


@pytest.mark.parametrize("extra", ["key_lengths", "bias"])
def test_the_operator_refuses_what_the_kernel_lacks(extra):
    query = torch.zeros(1, 2, 300, 64, dtype=torch.bfloat16)
    mask = BlockSparseMask.full((128, 128), 300, 300)
    extras = {"key_lengths": torch.tensor([3]), "bias": torch.zeros(1, 1, 300)}
    with pytest.raises(UnsupportedCallError, match=f"does not support {extra}"):
        block_sparse_attention(query, query, query, mask, backend="gluon", **{extra: extras[extra]})
    with pytest.raises(UnsupportedCallError, match="CUDA device"):
        resolve_backend(query, mask, "gluon")


@needs_hopper
def test_the_operator_runs_it_on_request(make_call):
    query, key, value, mask = make_call(300, 500)
    output, lse = block_sparse_attention(query, key, value, mask, backend="gluon", return_lse=True)
    expected_output, expected_lse = _run(query, key, value, mask)
    assert torch.equal(output, expected_output) and torch.equal(lse, expected_lse)


@needs_hopper
def test_the_operator_runs_it_with_sizes(make_call, make_sizes):
    query, key, value, mask = make_call(300, 500)
    sizes = make_sizes(1, 2, 500)
    result = attend_blocks(query, key, value, mask, key_sizes=sizes, return_lse=True)
    expected_output, expected_lse = _run(query, key, value, mask, sizes)
    assert result.backend == "gluon"
    assert torch.equal(result.output, expected_output) and torch.equal(result.lse, expected_lse)


@needs_hopper
def test_gradients_with_sizes(make_call, make_sizes):
    query, key, value, mask = (*make_call(300, 500, density=1.0),)
    sizes = make_sizes(1, 2, 500)
    gradients = []
    for extra in ({"key_sizes": sizes}, {"bias": sizes.float().log()}):
        inputs = [part.detach().clone().requires_grad_() for part in (query, key, value)]
        output = block_sparse_attention(*inputs, mask, **extra)
        gradients.append(torch.autograd.grad(output.float().square().sum(), inputs))
    for one, other in zip(*gradients, strict=True):
        assert (one - other).float().norm() <= 2.0**-6 * other.float().norm()
