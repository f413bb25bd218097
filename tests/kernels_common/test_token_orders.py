"""Masks about a permutation of the tokens, in every backend, against softmax attention in fp64."""

import pytest
import torch

from core import BlockSparseMask, LayoutError, UnsupportedCallError
from kernels_common import attend_blocks, block_sparse_attention, token_orders

BATCH, HEADS, KV_HEADS, QUERIES, KEYS = 2, 4, 2, 130, 200
PLACES = {"one for all": (), "per batch entry": (BATCH, 1), "per head": (1, None), "all": (BATCH, None)}
# Sums over D and over the keys grow as random walks of 2^-24; with fp16, weights and output are rounded once.
TOLERANCE = {torch.float32: 2.0**-18, torch.float16: 2.0**-10}
# Scores are summed in fp32; torch's 16-bit CPU kernel takes an exponential of about 14 bits.
LSE_TOLERANCE = {torch.float32: 2.0**-15, torch.float16: 2.0**-13}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def mask(generator, device):
    blocks = torch.rand(BATCH, HEADS, 3, 4, generator=generator) < 0.5
    blocks[:, :, 0], blocks[:, :, 1] = True, False  # a full row and an empty one
    return BlockSparseMask.from_blocks(blocks.to(device), (64, 64), QUERIES, KEYS)


@pytest.fixture
def make_tokens(generator, device):
    def make(head_dim: int = 64, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
        shapes = ((HEADS, QUERIES), (KV_HEADS, KEYS), (KV_HEADS, KEYS))
        tokens = (torch.randn(BATCH, *shape, head_dim, generator=generator) for shape in shapes)
        return [part.to(device, dtype) for part in tokens]

    return make


@pytest.fixture
def make_orders(generator, device):
    def make(kind: str = "all", dtype: torch.dtype = torch.int32) -> dict[str, torch.Tensor]:
        orders = {}
        for name, heads, length in (("query_order", HEADS, QUERIES), ("key_order", KV_HEADS, KEYS)):
            shape = [heads if size is None else size for size in PLACES[kind]]
            orders[name] = torch.rand(*shape, length, generator=generator).argsort(-1).to(device, dtype)
        return orders

    return make


def expected(tokens, mask, query_order=None, key_order=None, bias=None):
    """Dense attention in fp64 under the mask between tokens; the LSE beside it."""
    query, key, value = (part.double() for part in tokens)
    key, value = (part.repeat_interleave(HEADS // KV_HEADS, 1) for part in (key, value))
    scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias.double().repeat_interleave(HEADS // bias.shape[1], 1)[:, :, None]
    kept = mask.to_dense().expand(scores.shape)
    for dim, order in ((2, query_order), (3, key_order)):
        if order is not None:
            place = order.long().argsort(-1)  # of every token
            if place.dim() == 3:
                place = place.repeat_interleave(HEADS // place.shape[1], 1) if place.shape[1] > 1 else place
            view = place[..., None] if dim == 2 else place[..., None, :]
            kept = kept.take_along_dim(view.expand(scores.shape), dim)
    scores = scores.masked_fill(~kept, float("-inf"))
    return scores.softmax(-1).nan_to_num(0.0) @ value, scores.logsumexp(-1)


def check(tokens, mask, backend, **options):
    output, lse = block_sparse_attention(*tokens, mask, return_lse=True, backend=backend, **options)
    expected_output, expected_lse = expected(tokens, mask, **options)
    assert torch.equal(lse.isneginf(), expected_lse.isneginf())
    assert not output[lse.isneginf()].any()
    error = (output.double() - expected_output).norm()
    assert error <= TOLERANCE[output.dtype] * expected_output.norm()
    seen = ~lse.isneginf()
    assert (lse.double() - expected_lse)[seen].abs().max() <= LSE_TOLERANCE[output.dtype]


@pytest.fixture(params=["reference", "torch", "triton"])
def backend(request):
    return request.param


@pytest.mark.parametrize("kind", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_orders_of_queries_and_keys(make_tokens, make_orders, mask, backend, kind, dtype):
    check(make_tokens(dtype=dtype), mask, backend, **make_orders(kind))


@pytest.mark.parametrize("name", ["query_order", "key_order"])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=["int32", "int64"])
def test_one_of_the_two(make_tokens, make_orders, mask, backend, name, dtype):
    check(make_tokens(), mask, backend, **{name: make_orders("per head", dtype)[name]})


@pytest.mark.parametrize("head_dim", [40, 128])
def test_head_dimensions(make_tokens, make_orders, mask, backend, head_dim):
    check(make_tokens(head_dim), mask, backend, **make_orders())


@pytest.mark.parametrize("kind", ["one for all", "per batch entry", "per head"])
@pytest.mark.parametrize("shape", [(1, 1), (BATCH, KV_HEADS)], ids=str)
def test_a_bias_belongs_to_the_token(make_tokens, make_orders, mask, backend, generator, device, shape, kind):
    bias = torch.randn(*shape, KEYS, generator=generator).to(device)
    bias[..., 7:31] = float("-inf")
    check(make_tokens(), mask, backend, bias=bias, **make_orders(kind))


def test_sizes_belong_to_the_token(make_tokens, make_orders, mask, backend, generator, device):
    sizes = torch.randint(1, 300, (BATCH, KV_HEADS, KEYS), generator=generator).to(device)
    sizes[..., 50:] = 1
    tokens, orders = make_tokens(), make_orders()
    output = block_sparse_attention(*tokens, mask, backend=backend, key_sizes=sizes[..., :50], **orders)
    same = block_sparse_attention(*tokens, mask, backend=backend, bias=sizes.float().log(), **orders)
    assert torch.equal(output, same)


def test_strided_tokens_and_orders(make_tokens, make_orders, mask, backend):
    tokens = [part.transpose(1, 2).contiguous().transpose(1, 2) for part in make_tokens()]
    orders = {name: torch.stack([order, order], -1)[..., 0] for name, order in make_orders().items()}
    check(tokens, mask, backend, **orders)
    output = block_sparse_attention(*tokens, mask, backend=backend, **orders)
    assert output.stride() == tokens[0].stride()
    check([part.transpose(2, 3).contiguous().transpose(2, 3) for part in tokens], mask, backend, **orders)


def test_triton_copies_nothing(make_tokens, make_orders, mask, monkeypatch, device):
    if device.type == "cuda" and torch.cuda.get_device_capability() >= (9, 0):
        pytest.skip("from compute capability 9.0 on tokens are copied: its copy engine gathers no rows")

    def refuse(*_):
        raise AssertionError("tokens were copied")

    monkeypatch.setattr(token_orders, "gather_tokens", refuse)
    monkeypatch.setattr(token_orders, "scatter_tokens", refuse)
    block_sparse_attention(*make_tokens(), mask, return_lse=True, backend="triton", **make_orders())


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_gradients(make_tokens, make_orders, mask, backend):
    tokens, orders = [part.requires_grad_() for part in make_tokens()], make_orders("per batch entry")
    output, lse = block_sparse_attention(*tokens, mask, return_lse=True, backend=backend, **orders)
    direction = torch.randn_like(output)
    seen = ~lse.isneginf()
    found = torch.autograd.grad((output * direction).sum() + lse[seen].sum(), tokens)
    precise = [part.detach().double().requires_grad_() for part in tokens]
    wanted_output, wanted_lse = expected(precise, mask, **orders)
    wanted = torch.autograd.grad((wanted_output * direction).sum() + wanted_lse[seen].sum(), precise)
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 2.0**-17 * other.norm()


@pytest.mark.parametrize("quantization", ["int8_fp16", "int8_fp8"])
def test_eight_bits_and_skipped_tiles_are_those_of_the_copies(
    make_tokens, make_orders, mask, device, quantization
):
    tokens, orders = make_tokens(), make_orders("per batch entry")
    first = orders["key_order"].long()[..., :64, None].expand(-1, KV_HEADS, -1, 64)
    tokens[0] = tokens[0].abs()
    tokens[1] = tokens[1].scatter_add(
        2, first, torch.full_like(tokens[1], 4.0)
    )  # what comes later is skipped
    options = {"quantization": quantization, "skip_threshold": torch.full((HEADS,), 3.0, device=device)}
    found = attend_blocks(*tokens, mask, return_lse=True, **options, **orders)
    pairs = zip(tokens, ("query_order", "key_order", "key_order"), strict=True)
    copies = [part.take_along_dim(orders[name].long()[..., None], 2) for part, name in pairs]
    wanted = attend_blocks(*copies, mask, return_lse=True, **options)
    order = orders["query_order"].long()
    assert torch.equal(found.output.take_along_dim(order[..., None], 2), wanted.output)
    assert torch.equal(found.lse.take_along_dim(order, 2), wanted.lse)
    assert torch.equal(found.skipped, wanted.skipped) and found.skipped.any()


def test_orders_that_do_not_fit_are_refused(make_tokens, make_orders, mask, device):
    tokens, orders = make_tokens(), make_orders()
    wrong = {
        "of another length": {"key_order": orders["key_order"][..., 1:]},
        "of other heads": {"key_order": orders["key_order"].repeat(1, 2, 1)},
        "of two dimensions": {"query_order": orders["query_order"][0]},
        "of a wrong type": {"query_order": orders["query_order"].float()},
    }
    for options in wrong.values():
        name = next(iter(options))
        with pytest.raises(LayoutError, match=f"{name} must be int32 or int64"):
            block_sparse_attention(*tokens, mask, **options)
    with pytest.raises(LayoutError, match="query_order must be a tensor"):
        block_sparse_attention(*tokens, mask, query_order=[0, 1])
    bias = torch.zeros(1, HEADS, KEYS, device=device)
    with pytest.raises(LayoutError, match="must have as many heads, or 1"):
        block_sparse_attention(*tokens, mask, bias=bias, key_order=orders["key_order"])


def test_what_is_about_the_tokens_own_sequence_is_refused(make_tokens, make_orders, mask, device):
    tokens, orders = make_tokens(), make_orders()
    lengths = torch.tensor([KEYS, 5], device=device)
    for options, name in (({"causal": True}, "causal"), ({"key_lengths": lengths}, "key_lengths")):
        with pytest.raises(UnsupportedCallError, match=f"{name} is about the tensors' own sequence"):
            block_sparse_attention(*tokens, mask, **options, **orders)
