"""Gradients of the block-sparse operator against autograd of softmax attention in fp64 under a dense mask."""

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from core import BlockSparseMask, UnsupportedCallError
from kernels_common import block_sparse_attention, merge_by_lse
from kernels_common.block_sparse_backward_torch import block_sparse_attention_backward_torch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
# As in test_block_sparse_attention.py: weights and gradients of scores are rounded once, then the result;
# with fp32 the gradients pass through one more product than the output.
TOLERANCE = {
    torch.float64: 2.0**-46,
    torch.float32: 2.0**-17,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-10,
}


def _seen(query, key, mask, *, bias=None, key_lengths=(), causal=False, **_):
    """Which key takes part in which query's softmax, ``[B, Hq, Nq, Nk]``."""
    seen = mask.to_dense().expand(*query.shape[:3], key.shape[2]).clone()
    for entry, length in enumerate(key_lengths):
        seen[entry, :, :, int(length) :] = False
    if causal:
        seen = seen.tril(key.shape[2] - query.shape[2])
    if bias is not None:
        seen &= ~bias.isneginf().repeat_interleave(query.shape[1] // bias.shape[1], 1)[:, :, None]
    return seen


def _dense(query, key, value, mask, *, scale=None, bias=None, **extras):
    """Output and log-sum-exp under a dense mask; 0 with zero gradient where a query sees no key."""
    seen = _seen(query, key, mask, bias=bias, **extras)
    group = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(group, 1) for part in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scale is None else scale)
    if bias is not None:
        bias = bias.to(scores.dtype).masked_fill(bias.isneginf(), 0.0)
        scores = scores + bias.repeat_interleave(query.shape[1] // bias.shape[1], 1)[:, :, None]
    scores = scores.masked_fill(~seen, -1e30)  # finite: a row of -inf would have NaN gradients
    output = (torch.softmax(scores, -1) * seen) @ value
    return output, torch.logsumexp(scores, -1) * seen.any(-1)


@dataclass
class Call:
    """Tensors of one call, the gradients that arrive at its results, and its gradients."""

    tensors: tuple[torch.Tensor, ...]
    mask: BlockSparseMask
    grad_output: torch.Tensor
    grad_lse: torch.Tensor | None = None
    extras: dict[str, Any] = field(default_factory=dict)

    def run(self, backend: str) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in self.tensors]
        output, lse = block_sparse_attention(
            *inputs, self.mask, return_lse=True, backend=backend, **self.extras
        )
        if self.grad_lse is None:
            return torch.autograd.grad(output, inputs, self.grad_output)
        return torch.autograd.grad((output, lse), inputs, (self.grad_output, self.grad_lse))

    def expected(self) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.detach().double().requires_grad_() for tensor in self.tensors]
        output, lse = _dense(*inputs, self.mask, **self.extras)
        grad_lse = torch.zeros_like(lse) if self.grad_lse is None else self.grad_lse.double().nan_to_num()
        return torch.autograd.grad((output, lse), inputs, (self.grad_output.double(), grad_lse))

    def check(self, backend: str) -> None:
        self.compare(self.run(backend))

    def compare(self, gradients: tuple[torch.Tensor, ...]) -> None:
        query, key, _ = self.tensors
        seen = _seen(query, key, self.mask, **self.extras)
        key_is_seen = seen.any(-2).unflatten(1, (key.shape[1], -1)).any(2)
        takes_part = (seen.any(-1), key_is_seen, key_is_seen)
        for gradient, expected, tensor, used in zip(
            gradients, self.expected(), self.tensors, takes_part, strict=True
        ):
            assert gradient.dtype == tensor.dtype
            assert gradient.shape == tensor.shape
            assert not gradient[~used].any()
            error = (gradient.double() - expected).norm()
            assert error <= TOLERANCE[tensor.dtype] * expected.norm()


@pytest.fixture
def make_call(generator, device, poisoned_memory):
    def make(
        queries: int = 100,
        keys: int | None = None,
        *,
        batch: int = 2,
        heads: int = 2,
        kv_heads: int | None = None,
        head_dim: int = 32,
        blocks: tuple[int, int] = (64, 64),
        shared: tuple[bool, bool] = (False, False),
        dtype: torch.dtype = torch.float32,
    ) -> Call:
        keys = keys or queries
        shapes = [(heads, queries), *[(kv_heads or heads, keys)] * 2, (heads, queries)]
        tensors = [torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes]
        *tensors, grad_output = (tensor.to(device, dtype) for tensor in tensors)
        mask_shape = [1 if shared[0] else batch, 1 if shared[1] else heads]
        mask_shape += [-(-queries // blocks[0]), -(-keys // blocks[1])]
        kept = torch.rand(mask_shape, generator=generator) < 0.5
        kept[:, :, 0] = True
        if mask_shape[2] > 1:
            kept[:, :, 1] = False  # an empty row
        if mask_shape[3] > 2:
            kept[..., 2] = False  # a key block that nobody keeps
        mask = BlockSparseMask.from_blocks(kept.to(device), blocks, queries, keys)
        tail = torch.arange(mask.indices.shape[-1], device=device) >= mask.counts[..., None]
        mask.indices.masked_fill_(tail, 1 << 30)
        return Call(tuple(tensors), mask, grad_output)

    return make


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request, backend, device):
    if backend == "triton" and request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly; runs on a GPU")
    return request.param


@pytest.mark.parametrize(
    "lengths", [(1, 9), (63, 65), (200, 200), (70, 333)], ids=lambda pair: f"{pair[0]}x{pair[1]}"
)
def test_lengths_and_dtypes(make_call, backend, dtype, lengths):
    make_call(*lengths, dtype=dtype).check(backend)


def test_one_key_takes_all_weight(make_call, backend, dtype):
    """Its value gets the whole gradient; what query and key get cancels, down to rounding."""
    call = make_call(1, 1, dtype=dtype)
    (query, key, value), grad_output = call.tensors, call.grad_output
    grad_query, grad_key, grad_value = call.run(backend)
    torch.testing.assert_close(grad_value, grad_output)
    cancelled = grad_output.double().norm() * value.double().norm() * query.shape[-1] ** -0.5
    assert grad_query.norm() <= TOLERANCE[dtype] * cancelled * key.double().norm()
    assert grad_key.norm() <= TOLERANCE[dtype] * cancelled * query.double().norm()


@pytest.mark.parametrize("backend_", ["torch", "reference"])
def test_fp64_is_computed_in_fp64(make_call, backend_):
    make_call(100, 150, dtype=torch.float64).check(backend_)


@pytest.mark.parametrize("blocks", [(128, 64), (64, 128), (16, 48)], ids=str)
def test_block_sizes(make_call, backend, blocks):
    make_call(150, 200, batch=1, blocks=blocks).check(backend)


@pytest.mark.parametrize("dtype_", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 36, 192])
def test_head_dimensions(make_call, backend, head_dim, dtype_):
    make_call(100, batch=1, head_dim=head_dim, blocks=(128, 64), dtype=dtype_).check(backend)


@needs_gpu
@pytest.mark.parametrize("dtype_", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("blocks", [(16, 48), (128, 16), (16, 64), (128, 128)], ids=str)
def test_tiles_that_the_mask_block_cuts(make_call, head_dim, blocks, dtype_):
    make_call(300, 400, head_dim=head_dim, blocks=blocks, dtype=dtype_).check("triton")


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads_are_summed(make_call, backend, kv_heads):
    make_call(100, 200, heads=4, kv_heads=kv_heads).check(backend)


@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)], ids=str)
def test_masks_shared_by_batches_or_heads(make_call, backend, shared):
    make_call(130, shared=shared).check(backend)


@pytest.mark.parametrize("bias_shape", [(1, 1), (2, 2), (1, 4)], ids=str)
def test_key_bias_and_scale(make_call, generator, device, backend, bias_shape):
    call = make_call(100, 200, heads=4, kv_heads=2)
    bias = torch.randint(1, 9, (*bias_shape, 200), generator=generator).log().to(device)
    bias[..., 10:40] = float("-inf")
    call.extras = {"bias": bias, "scale": 0.2}
    call.check(backend)


@pytest.mark.parametrize("lengths", [(0, 200), (65, 199)], ids=str)
def test_key_lengths(make_call, device, backend, lengths):
    call = make_call(100, 200)
    call.extras["key_lengths"] = torch.tensor(lengths, device=device)
    call.check(backend)


@pytest.mark.parametrize("lengths", [(100, 150), (150, 100), (200, 200)], ids=str)
def test_causal(make_call, backend, lengths):
    """Called as functions; with more queries than keys, the first queries see nothing."""
    call = make_call(*lengths, heads=4, kv_heads=2)
    call.extras = {"scale": 0.3, "causal": True}
    lists = (call.mask.counts, call.mask.indices, call.mask.block_size)
    if backend == "torch":
        gradients = block_sparse_attention_backward_torch(
            call.grad_output, None, *call.tensors, *lists, **call.extras
        )
    else:
        from kernels_common.block_sparse_backward_triton import block_sparse_attention_backward_triton
        from kernels_common.block_sparse_triton import block_sparse_attention_triton

        results = block_sparse_attention_triton(*call.tensors, *lists, **call.extras)
        gradients = block_sparse_attention_backward_triton(
            call.grad_output, None, *call.tensors, *results, *lists, **call.extras
        )
    call.compare(gradients)


def test_gradient_of_the_log_sum_exp(make_call, generator, device, backend):
    call = make_call(130, 200, heads=4, kv_heads=2)
    call.grad_lse = torch.randn(2, 4, 130, generator=generator).to(device)
    call.extras["key_lengths"] = torch.tensor([0, 200], device=device)
    # Nothing depends on rows without a key, of batch entry 0 or of the block that keeps nothing.
    call.grad_lse[0] = call.grad_lse[:, :, 64:128] = float("nan")
    call.check(backend)


def test_gradient_of_the_log_sum_exp_alone(make_call, generator, device, backend):
    call = make_call(100)
    call.grad_lse = torch.randn(2, 2, 100, generator=generator).to(device)
    inputs = [tensor.requires_grad_() for tensor in call.tensors]
    _, lse = block_sparse_attention(*inputs, call.mask, return_lse=True, backend=backend)
    gradients = torch.autograd.grad(lse, inputs, call.grad_lse)
    call.grad_output = torch.zeros_like(call.grad_output)
    expected = call.expected()
    assert not gradients[2].any()
    for gradient, other in zip(gradients[:2], expected[:2], strict=True):
        assert (gradient - other).norm() <= TOLERANCE[torch.float32] * other.norm()


def test_merging_two_halves_differentiates_as_one_attention(make_call, backend):
    call = make_call(100, 256, shared=(True, True))
    blocks = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.bool, device=call.mask.device)
    left = torch.tensor([1, 1, 0, 0], dtype=torch.bool, device=call.mask.device)
    inputs = [tensor.requires_grad_() for tensor in call.tensors]
    parts = (
        block_sparse_attention(
            *inputs,
            BlockSparseMask.from_blocks(blocks & side, (64, 64), 100, 256),
            return_lse=True,
            backend=backend,
        )
        for side in (left, ~left)
    )
    (output, lse), (other_output, other_lse) = parts
    merged, _ = merge_by_lse(output, lse, other_output, other_lse)
    call.mask = BlockSparseMask.from_blocks(blocks, (64, 64), 100, 256)
    gradients = torch.autograd.grad(merged, inputs, call.grad_output)
    for gradient, expected in zip(gradients, call.expected(), strict=True):
        assert (gradient - expected).norm() <= 2 * TOLERANCE[torch.float32] * expected.norm()


def test_finite_differences_in_fp64(generator, device):
    tensors = [
        torch.randn(1, heads, length, 4, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for heads, length in ((2, 18), (1, 20), (1, 20))
    ]
    kept = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [0, 0]]], dtype=torch.bool, device=device)
    mask = BlockSparseMask.from_blocks(kept, (16, 16), 18, 20)
    extras = {"bias": torch.randn(1, 2, 20, generator=generator).to(device), "scale": 0.7}
    torch.autograd.gradcheck(lambda *inputs: block_sparse_attention(*inputs, mask, **extras), tensors)


def test_finite_differences_along_one_direction(make_call, generator, device, backend):
    call = make_call(70, 100, batch=1)
    directions = [torch.randn(tensor.shape, generator=generator).to(device) for tensor in call.tensors]

    def loss(step: float) -> torch.Tensor:
        moved = (tensor + step * way for tensor, way in zip(call.tensors, directions, strict=True))
        output = block_sparse_attention(*moved, call.mask, backend=backend)
        return (output.double() * call.grad_output).sum()

    step = 2.0**-8
    slope = (loss(step) - loss(-step)) / (2 * step)
    pairs = list(zip(call.run(backend), directions, strict=True))
    expected = sum((gradient.double() * way).sum() for gradient, way in pairs)
    size = sum(gradient.norm() * way.norm() for gradient, way in pairs)
    assert (slope - expected).abs() <= 1e-3 * size


def _transposed(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _strided_head_dim(tensor):
    return torch.stack([tensor, tensor], -1)[..., 0]


def _head_dim_not_last(tensor):
    return tensor.mT.contiguous().mT


def _unaligned_rows(tensor):
    return torch.cat([tensor, tensor[..., :1]], -1)[..., : tensor.shape[-1]]


def _one_batch_for_all(tensor):
    return tensor[:1].expand_as(tensor)


@pytest.mark.parametrize(
    "view",
    [_transposed, _strided_head_dim, _head_dim_not_last, _unaligned_rows, _one_batch_for_all],
    ids=lambda function: function.__name__.strip("_"),
)
def test_strided_inputs_and_gradients(make_call, backend, view):
    call = make_call(100, 130, dtype=torch.float16)
    call.tensors = tuple(view(tensor) for tensor in call.tensors)
    call.grad_output = view(call.grad_output)
    call.check(backend)


def test_gradients_keep_the_memory_order_of_their_tensors(make_call, backend):
    call = make_call(100)
    call.tensors = tuple(_transposed(tensor) for tensor in call.tensors)
    assert [part.stride() for part in call.run(backend)] == [part.stride() for part in call.tensors]


def test_a_gradient_expanded_from_a_sum(make_call, backend):
    call = make_call(100)
    call.grad_output = torch.ones((), device=call.mask.device).expand(call.grad_output.shape)
    call.check(backend)


def test_two_runs_agree_bit_for_bit(make_call, backend, device):
    if backend == "torch" and device.type == "cuda":
        pytest.skip("on CUDA this form sums with atomics; the triton form does not")
    call = make_call(200, 300, heads=4, kv_heads=2, dtype=torch.float16)
    for first, second in zip(call.run(backend), call.run(backend), strict=True):
        assert torch.equal(first, second)


def test_one_graph_may_be_differentiated_twice(make_call, backend):
    call = make_call(100)
    inputs = [tensor.requires_grad_() for tensor in call.tensors]
    output = block_sparse_attention(*inputs, call.mask, backend=backend)
    first = torch.autograd.grad(output, inputs, call.grad_output, retain_graph=True)
    second = torch.autograd.grad(output, inputs, 2 * call.grad_output)
    for gradient, doubled in zip(first, second, strict=True):
        torch.testing.assert_close(2 * gradient, doubled)


def test_one_tensor_may_ask_alone(make_call, backend):
    call = make_call(100)
    query, key, value = call.tensors
    output = block_sparse_attention(query, key, value.requires_grad_(), call.mask, backend=backend)
    (gradient,) = torch.autograd.grad(output, value, call.grad_output)
    torch.testing.assert_close(gradient, call.run(backend)[2])


def test_no_gradient_nothing_saved(make_call, backend):
    call = make_call(100)
    inputs = [tensor.requires_grad_() for tensor in call.tensors]
    with torch.no_grad():
        assert not block_sparse_attention(*inputs, call.mask, backend=backend).requires_grad
    with torch.autograd.graph.saved_tensors_hooks(lambda _: pytest.fail("saved"), lambda _: None):
        block_sparse_attention(*(tensor.detach() for tensor in inputs), call.mask, backend=backend)


def test_without_keys_gradients_are_zero(make_call, device, backend):
    call = make_call(70)
    call.tensors = (call.tensors[0], *(part[:, :, :0] for part in call.tensors[1:]))
    no_lists = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    call.mask = BlockSparseMask(no_lists, no_lists[..., None], (64, 64), 70, 0)
    grad_query, grad_key, grad_value = call.run(backend)
    assert not grad_query.any()
    assert grad_key.shape == grad_value.shape == (2, 2, 0, 32)


def test_a_mask_that_keeps_nothing(make_call, device, backend):
    call = make_call(70)
    no_lists = torch.zeros(1, 1, 2, dtype=torch.int32, device=device)
    call.mask = BlockSparseMask(no_lists, no_lists[..., None][..., :0], (64, 64), 70, 70)
    assert not any(gradient.any() for gradient in call.run(backend))


def test_what_has_no_gradient_says_so(make_call, device):
    call = make_call(100)
    bias = torch.zeros(1, 1, 100, device=device, requires_grad=True)
    with pytest.raises(UnsupportedCallError, match=r"bias\.detach"):
        block_sparse_attention(*call.tensors, call.mask, bias=bias)
    with torch.no_grad():
        block_sparse_attention(*call.tensors, call.mask, bias=bias)
    query = call.tensors[0].requires_grad_()
    output = block_sparse_attention(query, *call.tensors[1:], call.mask)
    (gradient,) = torch.autograd.grad(output.square().sum(), query, create_graph=True)
    with pytest.raises(UnsupportedCallError, match="second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("backend_", ["auto", "torch", "triton"])
def test_compiles_to_one_graph_in_both_directions(make_call, backend_):
    call = make_call(100, 150)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(query, key, value, counts, indices):
        mask = BlockSparseMask(counts, indices, (64, 64), query.shape[2], key.shape[2])
        return block_sparse_attention(query * 2, key, value, mask, backend=backend_).square()

    inputs = [tensor.requires_grad_() for tensor in call.tensors]
    compiled = torch.autograd.grad(layer(*inputs, call.mask.counts, call.mask.indices).sum(), inputs)
    output = block_sparse_attention(inputs[0] * 2, *inputs[1:], call.mask, backend=backend_)
    for result, expected in zip(compiled, torch.autograd.grad(output.square().sum(), inputs), strict=True):
        torch.testing.assert_close(result, expected)


def test_checkpointing_changes_nothing(generator, device, backend):
    tensors = (torch.randn(1, 2, 100, 32, generator=generator) for _ in range(3))
    inputs = [tensor.to(device).requires_grad_() for tensor in tensors]
    mask = BlockSparseMask.full((64, 64), 100, 100, device)

    def layer(query, key, value):
        return block_sparse_attention(query, key, value, mask, backend=backend)

    checkpointed = torch.autograd.grad(checkpoint(layer, *inputs, use_reentrant=False).sum(), inputs)
    for gradient, expected in zip(
        checkpointed, torch.autograd.grad(layer(*inputs).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("backend_", ["reference", "torch", "triton"])
def test_autocast_does_not_lower_the_precision(make_call, device, backend_):
    call = make_call(100)
    with torch.autocast(device.type, torch.bfloat16):
        call.check(backend_)


@pytest.mark.parametrize("backend_", ["reference", "torch", "triton"])
def test_operators_are_well_formed(make_call, device, backend_):
    call = make_call(70, 100)
    query, key, value = (_transposed(tensor).detach().requires_grad_() for tensor in call.tensors)
    lengths, bias = torch.tensor([100, 9], device=device), torch.zeros(1, 2, 100, device=device)
    lists, sizes = (call.mask.counts, call.mask.indices, lengths, bias), (64, 64, 0.1, False, backend_)
    forward = torch.ops.sparse_attn.block_sparse_attention
    torch.library.opcheck(forward, (query, key, value, *lists, None, None, None, *sizes))
    with torch.no_grad():
        results = forward(query, key, value, *lists, None, None, None, *sizes)
    tensors = (call.grad_output, results[1], *call.tensors, *results)
    backward = torch.ops.sparse_attn.block_sparse_attention_backward
    torch.library.opcheck(backward, (*tensors, *lists, *sizes))


@needs_gpu
@pytest.mark.parametrize(
    ("blocks", "head_dim"), [((64, 64), 64), ((128, 128), 64), ((128, 64), 128)], ids=str
)
def test_real_video_length_on_the_gpu(generator, device, blocks, head_dim):
    """17,776 tokens (CogVideoX at 480 x 720 x 49) against fp32 computed one head at a time."""
    length = 17776
    shape = (2, length, 1, head_dim)
    tensors = [torch.randn(shape, generator=generator).to(device, torch.bfloat16) for _ in range(4)]
    *inputs, grad_output = (tensor.permute(2, 0, 1, 3).requires_grad_() for tensor in tensors)
    rows, columns = -(-length // blocks[0]), -(-length // blocks[1])
    kept = torch.rand(2, rows, columns, generator=generator).to(device) < 0.25
    mask = BlockSparseMask.from_blocks(kept, blocks, length, length)
    gradients = torch.autograd.grad(block_sparse_attention(*inputs, mask), inputs, grad_output)
    for head in range(2):
        one = slice(head, head + 1)
        parts = [tensor[:, one].detach().float().requires_grad_() for tensor in inputs]
        output, _ = _dense(*parts, BlockSparseMask.from_blocks(kept[one], blocks, length, length))
        expected = torch.autograd.grad(output, parts, grad_output[:, one].float())
        for gradient, other in zip(gradients, expected, strict=True):
            error = (gradient[:, one].float() - other).norm()
            assert error <= TOLERANCE[torch.bfloat16] * other.norm()


@needs_gpu
def test_launches_do_not_synchronise_or_recompile(generator, device):
    from kernels_common import block_sparse_backward_triton as module

    kernels = (
        module.block_sparse_bwd_rows_kernel,
        module.block_sparse_bwd_query_kernel,
        module.block_sparse_bwd_key_kernel,
    )

    def differentiate(length):
        query = torch.randn(1, 2, length, 64, generator=generator).to(device, torch.float16).requires_grad_()
        mask = BlockSparseMask.full((64, 64), length, length, device)
        output = block_sparse_attention(query, query, query, mask, backend="triton")
        torch.cuda.set_sync_debug_mode("error")
        try:
            torch.autograd.grad(output, query, torch.ones_like(output))
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def compiled():
        device_index = torch.cuda.current_device()
        return [len(kernel.device_caches[device_index][0]) for kernel in kernels]

    differentiate(100)
    before = compiled()
    for length in (1, 16, 64, 65, 1000, 1024, 4321):
        differentiate(length)
    assert compiled() == before
