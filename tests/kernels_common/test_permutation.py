"""Both forms of the reordering against indexing head by head."""

import pytest
import torch

from core import LayoutError
from kernels_common import gather_tokens, invert_permutation, permutation, scatter_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "triton"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(permutation, "runs_triton", lambda tensor: request.param == "triton")
    return request.param


@pytest.fixture(params=[torch.int32, torch.int64], ids=["int32", "int64"])
def index_dtype(request):
    return request.param


@pytest.fixture(params=[(), (1, 3), (2, 1), (2, 3)], ids=str)
def order(request, generator, device, index_dtype):
    return torch.rand(*request.param, 37, generator=generator).argsort(-1).to(device, index_dtype)


@pytest.fixture
def tokens(generator, device):
    return torch.randn(2, 37, 3, 4, generator=generator).to(device).transpose(1, 2)


def test_gather_takes_the_listed_tokens(tokens, order):
    gathered = gather_tokens(tokens, order)
    places = order.expand(2, 3, 37)
    for batch in range(2):
        for head in range(3):
            assert torch.equal(gathered[batch, head], tokens[batch, head, places[batch, head]])


def test_scatter_and_inverse_undo_gather(tokens, order):
    gathered = gather_tokens(tokens, order)
    assert torch.equal(scatter_tokens(gathered, order), tokens)
    inverse = invert_permutation(order)
    assert inverse.dtype == order.dtype and torch.equal(gather_tokens(gathered, inverse), tokens)


def test_gather_may_take_fewer_tokens(tokens):
    order = torch.tensor([3, 3, 0], device=tokens.device)
    assert torch.equal(gather_tokens(tokens, order), tokens[:, :, [3, 3, 0]])


def test_several_tensors_move_together(tokens, order):
    parts = (tokens, tokens.contiguous() + 1, tokens.flip(3))
    gathered = gather_tokens(parts, order)
    assert isinstance(gathered, tuple)
    for part, single in zip(parts, gathered, strict=True):
        assert torch.equal(single, gather_tokens(part, order))
    for part, back in zip(parts, scatter_tokens(gathered, order), strict=True):
        assert torch.equal(back, part)


@pytest.mark.parametrize("shape", [(37,), (2, 1, 37)], ids=str)
def test_keys_may_have_fewer_heads(tokens, generator, shape):
    order = torch.rand(shape, generator=generator).argsort(-1).to(tokens.device)
    parts = (tokens[:, :1], tokens, tokens[:, 1:])
    for part, single in zip(parts, gather_tokens(parts, order), strict=True):
        assert torch.equal(single, gather_tokens(part.contiguous(), order))


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.float8_e4m3fn], ids=str
)
def test_every_bit_of_every_dtype_arrives(generator, device, form, dtype):
    if form == "torch" and dtype == torch.float8_e4m3fn:
        pytest.skip("torch does not index 8-bit floats on every device")
    size = torch.empty(0, dtype=dtype).element_size()
    bits = torch.randint(-128, 128, (1, 2, 20, 6 * size), generator=generator, dtype=torch.int8).to(device)
    order = torch.randperm(20, generator=generator).to(device)
    gathered = gather_tokens(bits.view(dtype), order)
    assert torch.equal(gathered.view(torch.int8), bits[:, :, order])
    assert torch.equal(scatter_tokens(gathered, order).view(torch.int8), bits)


def test_scattered_tokens_keep_their_memory_order(tokens, order):
    assert scatter_tokens(tokens, order).stride() == tokens.stride()
    like = tokens.transpose(2, 3).contiguous().transpose(2, 3)
    scattered = scatter_tokens(tokens, order, like=like)
    assert scattered.stride() == like.stride() and torch.equal(scattered, scatter_tokens(tokens, order))
    assert gather_tokens(tokens, order).is_contiguous()


def test_gradients_pass(tokens, order):
    leaf = tokens.clone().requires_grad_()
    weights = torch.randn_like(tokens)
    (gather_tokens(leaf, order) * weights).sum().backward()
    assert torch.equal(leaf.grad, scatter_tokens(weights, order))


def test_wrong_calls_are_refused(tokens):
    order = torch.arange(37, device=tokens.device)
    with pytest.raises(LayoutError, match="int32 or int64"):
        gather_tokens(tokens, order.float())
    with pytest.raises(LayoutError, match="int64"):
        gather_tokens(tokens, order.expand(2, 2, 37))
    with pytest.raises(LayoutError, match="alike but for H"):
        gather_tokens((tokens, tokens[:, :, 1:]), order)
    with pytest.raises(LayoutError, match="each once"):
        scatter_tokens(tokens, order[:5])
