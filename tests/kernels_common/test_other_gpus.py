"""What GPUs other than Hopper's run: tiles through pointers, and tiles that fit into less shared memory."""

from importlib import import_module

import pytest
import torch

from core import BlockSparseMask, LevelMask
from kernels_common import block_sparse_attention, pooled_attention
from kernels_common.block_importance_triton import pooled_softmax_triton
from kernels_common.block_sparse_quantized_triton import block_sparse_attention_quantized_triton
from kernels_common.block_sparse_triton import block_sparse_attention_triton

MODULES = [
    import_module(f"kernels_common.{name}_triton")
    for name in (
        "block_importance",
        "block_sparse",
        "block_sparse_backward",
        "block_sparse_quantized",
        "pooled_attention",
        "pooled_attention_backward",
    )
]
BATCH, HEADS, KV_HEADS, QUERIES, KEYS = 2, 2, 1, 130, 200
BLOCKS = (64, 64)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def answer(monkeypatch, name, value):
    for module in MODULES:
        if hasattr(module, name):
            monkeypatch.setattr(module, name, lambda _: value)


@pytest.fixture(params=[64, 40, 128])
def tokens(request, generator, device):
    shapes = ((HEADS, QUERIES), (KV_HEADS, KEYS), (KV_HEADS, KEYS))
    return [torch.randn(BATCH, *shape, request.param, generator=generator).to(device) for shape in shapes]


@pytest.fixture
def mask(generator, device):
    blocks = torch.rand(BATCH, HEADS, 3, 4, generator=generator) < 0.6
    return BlockSparseMask.from_blocks(blocks.to(device), BLOCKS, QUERIES, KEYS)


def block_sparse(tokens, mask):
    bias = torch.linspace(-1, 1, KEYS, device=mask.device)[None, None]
    lengths = torch.tensor([KEYS, 77], device=mask.device)
    return with_gradients(
        tokens,
        lambda *parts: block_sparse_attention(
            *parts, mask, bias=bias, key_lengths=lengths, return_lse=True, backend="triton"
        ),
    )


def pooled(tokens, mask):
    levels = torch.ones(BATCH, HEADS, 3, 4, dtype=torch.int8, device=mask.device)
    levels[:, :, :, 1], levels[:, 0, :, 2], levels[:, 1, 1] = 2, 8, 4
    level_mask = LevelMask.from_levels(levels * mask.to_blocks(), BLOCKS, QUERIES, KEYS)
    return with_gradients(
        tokens, lambda *parts: pooled_attention(*parts, level_mask, return_lse=True, backend="triton")
    )


def quantized(tokens, mask):
    half = [part.half() for part in tokens]
    lists = (mask.counts, mask.indices, BLOCKS)
    options = {"quantization": "int8_fp16", "skip_threshold": torch.full((HEADS,), 2.0, device=mask.device)}
    return block_sparse_attention_quantized_triton(*half, *lists, scale=0.2, **options)


def importance(tokens, mask):
    query, key, _ = tokens
    return (pooled_softmax_triton(query, key, (16, 16), 0.2, maximum=False),)


def with_gradients(tokens, function):
    leaves = [part.clone().requires_grad_() for part in tokens]
    output, lse = function(*leaves)
    seen = ~lse.isneginf()
    rows = torch.linspace(0.5, 1, QUERIES, device=output.device)[:, None]
    loss = (output * rows).sum() + lse[seen].sum()
    return output, lse, *torch.autograd.grad(loss, leaves)


OPERATORS = (block_sparse, pooled, quantized, importance)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda function: function.__name__)
def test_pointers_read_what_descriptors_read(operator, tokens, mask, monkeypatch):
    expected = operator(tokens, mask)
    answer(monkeypatch, "reads_pointers", True)
    for found, wanted in zip(operator(tokens, mask), expected, strict=True):
        if wanted.is_cuda:  # the compiler may add in another order
            close(found, wanted)
        else:
            assert torch.equal(found, wanted)


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda function: function.__name__)
def test_smaller_tiles_compute_the_same(operator, tokens, mask, monkeypatch):
    expected = operator(tokens, mask)
    answer(monkeypatch, "reads_pointers", True)
    answer(monkeypatch, "holds_large_tiles", False)
    for found, wanted in zip(operator(tokens, mask), expected, strict=True):
        close(found, wanted)


def test_orders_in_the_loads(tokens, mask, generator):
    """By the launcher: the operator copies tokens where there is a tensor memory accelerator."""
    device = mask.device
    orders = [torch.randperm(length, generator=generator).to(device) for length in (QUERIES, KEYS)]
    lists = (mask.counts, mask.indices, BLOCKS)
    named = dict(zip(("query_order", "key_order"), orders, strict=True))
    found = block_sparse_attention_triton(*tokens, *lists, scale=0.2, **named)
    copies = [part[:, :, order] for part, order in zip(tokens, (orders[0], *orders[1:] * 2), strict=True)]
    wanted = block_sparse_attention_triton(*copies, *lists, scale=0.2)
    for moved, straight in zip(found, wanted, strict=True):
        close(moved[:, :, orders[0]], straight)


def close(found, wanted):
    rounded = 2.0**-9 if wanted.dtype == torch.float16 else 2.0**-19
    finite = wanted.isfinite()
    assert torch.equal(finite, found.isfinite())
    error = (found[finite].double() - wanted[finite].double()).norm()
    assert error <= rounded * wanted[finite].double().norm()
