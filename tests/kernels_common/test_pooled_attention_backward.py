"""Gradients of pooled attention against autograd of the reference in fp64."""

from dataclasses import dataclass

import pytest
import torch

from core import LevelMask, UnsupportedCallError
from core.level_mask import LEVELS
from kernels_common import pooled_attention
from kernels_common.pooled_attention_reference import pooled_attention_reference

# As in test_pooled_attention.py: weights, pooled keys and gradients of scores are rounded once, then the
# result; with fp32 the gradients pass through one more product than the output.
TOLERANCE = {
    torch.float64: 2.0**-46,
    torch.float32: 2.0**-17,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-9,
}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@dataclass
class Call:
    """Tensors of one call, the gradients that arrive at its results, and its gradients."""

    tensors: tuple[torch.Tensor, ...]
    mask: LevelMask
    grad_output: torch.Tensor
    grad_lse: torch.Tensor

    def run(self, backend: str) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.detach().requires_grad_() for tensor in self.tensors]
        results = pooled_attention(*inputs, self.mask, return_lse=True, backend=backend)
        return torch.autograd.grad(results, inputs, (self.grad_output, self.grad_lse))

    def expected(self) -> tuple[torch.Tensor, ...]:
        inputs = [tensor.detach().double().requires_grad_() for tensor in self.tensors]
        scale = inputs[0].shape[-1] ** -0.5
        output, lse = pooled_attention_reference(*inputs, self.mask, scale=scale)
        seen = ~lse.isneginf()
        loss = (output * self.grad_output).sum() + (lse.double()[seen] * self.grad_lse[seen]).sum()
        return torch.autograd.grad(loss, inputs)

    def check(self, backend: str) -> None:
        for gradient, expected, tensor in zip(self.run(backend), self.expected(), self.tensors, strict=True):
            assert gradient.dtype == tensor.dtype
            assert gradient.shape == tensor.shape
            error = (gradient.double() - expected).norm()
            assert error <= TOLERANCE[tensor.dtype] * expected.norm()
            # A token that no listed block reads or feeds has gradient 0, not merely a small one.
            assert not gradient[(expected == 0).all(-1)].any()


@pytest.fixture
def make_call(generator, device):
    def make(
        queries: int = 100,
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
        """The second row is empty and nobody sees the second key block, where there are that many."""
        keys = keys or queries
        shapes = [(heads, queries), *[(kv_heads or heads, keys)] * 2, (heads, queries)]
        tensors = [torch.randn(batch, *shape, head_dim, generator=generator) for shape in shapes]
        *tensors, grad_output = (tensor.to(device, dtype) for tensor in tensors)
        grad_lse = torch.randn(batch, heads, queries, generator=generator).to(device)
        shape = [1 if shared[0] else batch, 1 if shared[1] else heads]
        shape += [-(-queries // blocks[0]), -(-keys // blocks[1])]
        choice = torch.tensor([0, *LEVELS] if level is None else [0, level, level], dtype=torch.int8)
        levels = choice[torch.randint(len(choice), shape, generator=generator)]
        levels[:, :, 0, -1] = choice[-1]  # the ragged block is seen
        levels[:, :, 1:2] = 0
        if shape[3] > 2:
            levels[..., 1] = 0
        mask = LevelMask.from_levels(levels.to(device), blocks, queries, keys)
        mask.indices.masked_fill_(mask.listed_levels() == 0, 1 << 30)
        return Call(tuple(tensors), mask, grad_output, grad_lse)

    return make


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float16, torch.bfloat16], ids=["fp32", "fp16", "bf16"])
def dtype(request, backend, device):
    if backend == "triton" and request.param == torch.bfloat16 and device.type == "cpu":
        pytest.skip("Triton's interpreter computes bf16 wrongly; runs on a GPU")
    return request.param


@pytest.mark.parametrize("lengths", [(1, 9), (63, 65), (70, 130)], ids=lambda pair: f"{pair[0]}x{pair[1]}")
def test_lengths_and_dtypes(make_call, backend, dtype, lengths):
    make_call(*lengths, heads=1, dtype=dtype, blocks=(64, 32)).check(backend)


@pytest.mark.parametrize("backend_", ["torch", "reference"])
@pytest.mark.parametrize("blocks", [(64, 16), (64, 64), (128, 128)], ids=str)
def test_fp64_is_computed_in_fp64(make_call, backend_, blocks):
    call = make_call(150, 333, batch=2, heads=4, kv_heads=2, blocks=blocks, dtype=torch.float64)
    call.grad_lse.zero_()  # the log-sum-exp is fp32
    call.check(backend_)


@pytest.mark.parametrize("key_block", [16, 48, 64, 128])
@pytest.mark.parametrize("level", LEVELS)
def test_every_key_block_at_every_level(make_call, backend, key_block, level):
    make_call(32, 2 * key_block + 5, heads=1, blocks=(32, key_block), level=level).check(backend)


@pytest.mark.parametrize("tail", [1, 3, 7])
def test_the_last_pooled_key_gives_its_tokens_equal_shares(make_call, backend, tail):
    for level in LEVELS[1:]:
        call = make_call(16, 16 + tail, heads=1, blocks=(16, 16), level=level)
        call.check(backend)
        run = min(level, (tail - 1) % level + 1)
        for gradient in call.run(backend)[1:]:
            last = gradient[0, 0, -run:]
            assert torch.equal(last, last[:1].expand_as(last))


@pytest.mark.parametrize("query_block", [16, 128])
def test_query_blocks(make_call, backend, query_block):
    make_call(150, 70, heads=1, blocks=(query_block, 32)).check(backend)


@pytest.mark.parametrize("dtype_", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("head_dim", [64, 128, 36, 192])
def test_head_dimensions(make_call, backend, head_dim, dtype_):
    make_call(40, 70, heads=1, head_dim=head_dim, blocks=(64, 32), dtype=dtype_).check(backend)


@pytest.mark.parametrize("kv_heads", [1, 2])
def test_grouped_query_heads_are_summed(make_call, backend, kv_heads):
    make_call(64, 100, batch=2, heads=4, kv_heads=kv_heads).check(backend)


@pytest.mark.parametrize("shared", [(True, True), (True, False), (False, True)], ids=str)
def test_masks_shared_by_batches_or_heads(make_call, backend, shared):
    make_call(70, batch=2, shared=shared).check(backend)


def test_empty_rows_ignore_their_log_sum_exp(make_call, backend):
    call = make_call(130)
    call.grad_lse[:, :, 64:128] = float("nan")
    call.check(backend)


def test_finite_differences_in_fp64(generator, device):
    tensors = [
        torch.randn(1, heads, length, 4, generator=generator, dtype=torch.float64).to(device).requires_grad_()
        for heads, length in ((2, 18), (1, 35), (1, 35))
    ]
    levels = torch.tensor([[[8, 2, 1], [0, 0, 4]], [[1, 0, 8], [0, 0, 0]]], dtype=torch.int8, device=device)
    mask = LevelMask.from_levels(levels, (16, 16), 18, 35)
    torch.autograd.gradcheck(lambda *inputs: pooled_attention(*inputs, mask, scale=0.7), tensors)


def _transposed(tensor):
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _head_dim_not_last(tensor):
    return tensor.mT.contiguous().mT


def _unaligned_rows(tensor):
    return torch.cat([tensor, tensor[..., :1]], -1)[..., : tensor.shape[-1]]


@pytest.mark.parametrize(
    "view",
    [_transposed, _head_dim_not_last, _unaligned_rows],
    ids=lambda function: function.__name__.strip("_"),
)
def test_strided_inputs_and_gradients(make_call, backend, view):
    call = make_call(64, 100, batch=2, heads=1, dtype=torch.float16)
    call.tensors = tuple(view(tensor) for tensor in call.tensors)
    call.grad_output = view(call.grad_output)
    call.check(backend)
    if view is _transposed:
        assert [part.stride() for part in call.run(backend)] == [part.stride() for part in call.tensors]


def test_two_runs_agree_bit_for_bit(make_call, backend, device):
    if backend == "torch" and device.type == "cuda":
        pytest.skip("on CUDA this form sums with atomics; the triton form does not")
    call = make_call(64, 130, heads=4, kv_heads=2, dtype=torch.float16)
    for first, second in zip(call.run(backend), call.run(backend), strict=True):
        assert torch.equal(first, second)


def test_without_keys_gradients_are_zero(make_call, device, backend):
    call = make_call(70)
    call.tensors = (call.tensors[0], *(part[:, :, :0] for part in call.tensors[1:]))
    no_lists = torch.zeros(1, 1, 2, 4, dtype=torch.int32, device=device)
    call.mask = LevelMask(no_lists, no_lists, (64, 64), 70, 0)
    gradients = call.run(backend)
    assert not gradients[0].any()
    assert [part.shape for part in gradients] == [part.shape for part in call.tensors]


def test_one_tensor_may_ask_alone(make_call, backend):
    call = make_call(100)
    call.grad_lse.zero_()
    query, key, value = call.tensors
    output = pooled_attention(query, key, value.requires_grad_(), call.mask, backend=backend)
    (gradient,) = torch.autograd.grad(output, value, call.grad_output)
    assert torch.equal(gradient, call.run(backend)[2])


def test_second_derivatives_are_refused(make_call):
    call = make_call(20)
    inputs = [tensor.requires_grad_() for tensor in call.tensors]
    output = pooled_attention(*inputs, call.mask)
    (gradient,) = torch.autograd.grad(output, inputs[0], call.grad_output, create_graph=True)
    with pytest.raises(UnsupportedCallError, match="second derivative"):
        gradient.sum().backward()


def test_compiles_with_its_gradient(make_call):
    call = make_call(100, 150)

    def loss(query, key, value, counts, indices):
        mask = LevelMask(counts, indices, (64, 64), query.shape[2], key.shape[2])
        output, lse = pooled_attention(query * 2, key, value, mask, return_lse=True)
        return (output * call.grad_output).sum() + lse[:, :, :64].sum()

    gradients = []
    for function in (loss, torch.compile(loss, fullgraph=True)):
        inputs = [tensor.detach().requires_grad_() for tensor in call.tensors]
        function(*inputs, call.mask.counts, call.mask.indices).backward()
        gradients.append([part.grad for part in inputs])
    for plain, compiled in zip(*gradients, strict=True):
        torch.testing.assert_close(compiled, plain)
