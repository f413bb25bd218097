"""The custom operators behind block-sparse attention, with fake kernels and gradients.

Their arguments are taken as checked, the backend as resolved. ``torch.compile(fullgraph=True)`` holds around
them: a graph always runs what was resolved when it was traced.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from core.block_mask import BlockSparseMask
from core.errors import UnsupportedCallError
from kernels_common.block_sparse_backward_torch import block_sparse_attention_backward_torch
from kernels_common.block_sparse_quantized_reference import block_sparse_attention_quantized_reference
from kernels_common.block_sparse_quantized_torch import block_sparse_attention_quantized_torch
from kernels_common.block_sparse_reference import block_sparse_attention_reference
from kernels_common.block_sparse_torch import block_sparse_attention_torch

GPU_BACKENDS = ("triton", "gluon", "flash4")
PLAIN_ONLY = ("flex", "flash4")  # these take nothing but a mask


@torch.library.custom_op("sparse_attn::block_sparse_attention", mutates_args=())
def block_sparse_attention_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_sizes: torch.Tensor | None,
    query_order: torch.Tensor | None,
    key_order: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp ``[B, Hq, Nq]`` fp32; orders are for Triton alone, sizes for Gluon."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
    block_size = (query_block, key_block)
    tensors, lists = (query, key, value), (counts, indices)
    extras: dict[str, Any] = {"scale": scale, "key_lengths": key_lengths, "bias": bias}
    if backend == "reference":
        block_mask = BlockSparseMask(counts, indices, block_size, query.shape[2], key.shape[2])
        with _exact(query):
            output, lse = block_sparse_attention_reference(*tensors, block_mask, causal=causal, **extras)
        return torch.empty_like(query).copy_(output), lse
    if backend == "torch":
        with _exact(query):
            return block_sparse_attention_torch(*tensors, *lists, block_size, causal=causal, **extras)
    if backend in PLAIN_ONLY:
        with _exact(query):
            return _plain_form(backend)(*tensors, *lists, block_size, scale=scale)
    if backend == "gluon":
        from kernels_common.block_sparse_gluon import block_sparse_attention_gluon

        return block_sparse_attention_gluon(*tensors, *lists, block_size, scale=scale, key_sizes=key_sizes)
    from kernels_common.block_sparse_triton import block_sparse_attention_triton

    return block_sparse_attention_triton(
        *tensors, *lists, block_size, query_order=query_order, key_order=key_order, causal=causal, **extras
    )


@block_sparse_attention_op.register_fake
def _(query, *_):
    return torch.empty_like(query), query.new_empty(query.shape[:3], dtype=torch.float32)


@torch.library.custom_op("sparse_attn::block_sparse_attention_backward", mutates_args=())
def block_sparse_attention_backward_op(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    causal: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value: in Triton for the backends of GPUs, else in plain torch."""
    if query.numel() == 0 or key.numel() == 0:
        return torch.zeros_like(query), torch.zeros_like(key), torch.zeros_like(value)
    block_size = (query_block, key_block)
    extras: dict[str, Any] = {"scale": scale, "key_lengths": key_lengths, "bias": bias, "causal": causal}
    gradients, inputs, lists = (grad_output, grad_lse), (query, key, value), (counts, indices)
    if backend in GPU_BACKENDS:
        from kernels_common.block_sparse_backward_triton import block_sparse_attention_backward_triton

        return block_sparse_attention_backward_triton(
            *gradients, *inputs, output, lse, *lists, block_size, **extras
        )
    with _exact(query):
        return block_sparse_attention_backward_torch(*gradients, *inputs, *lists, block_size, **extras)


@block_sparse_attention_backward_op.register_fake
def _(grad_output, grad_lse, query, key, value, *_):
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


@torch.library.custom_op("sparse_attn::block_sparse_attention_quantized", mutates_args=())
def block_sparse_attention_quantized_op(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    skip_threshold: torch.Tensor | None,
    query_block: int,
    key_block: int,
    scale: float,
    quantization: str,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output, log-sum-exp, and skipped tiles of every row of the mask ``[B, Hq, Mq]`` int32."""
    if query.numel() == 0 or key.numel() == 0:
        lse = query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
        return torch.zeros_like(query), lse, _no_tiles(query, counts).zero_()
    arguments = (query, key, value, counts, indices, (query_block, key_block))
    extras: dict[str, Any] = {
        "scale": scale,
        "quantization": quantization,
        "key_lengths": key_lengths,
        "bias": bias,
        "skip_threshold": skip_threshold,
    }
    if backend == "reference":
        with _exact(query):
            output, lse, skipped = block_sparse_attention_quantized_reference(*arguments, **extras)
        return torch.empty_like(query).copy_(output), lse, skipped
    if backend == "torch":
        with _exact(query):
            return block_sparse_attention_quantized_torch(*arguments, **extras)
    if backend == "gluon":
        from kernels_common.block_sparse_quantized_gluon import block_sparse_attention_int8_fp8_gluon

        output, lse = block_sparse_attention_int8_fp8_gluon(*arguments, scale=scale)
        return output, lse, _no_tiles(query, counts)
    from kernels_common.block_sparse_quantized_triton import block_sparse_attention_quantized_triton

    return block_sparse_attention_quantized_triton(*arguments, **extras)


@block_sparse_attention_quantized_op.register_fake
def _(query, key, value, counts, *_):
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    return torch.empty_like(query), lse, _no_tiles(query, counts)


def _plain_form(backend: str) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """The launcher of one of ``PLAIN_ONLY``, imported on use: the rest works without its package."""
    module = importlib.import_module(f"kernels_common.block_sparse_{backend}")
    return getattr(module, f"block_sparse_attention_{backend}")


def _no_tiles(query: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    return query.new_empty((*query.shape[:2], counts.shape[2]), dtype=torch.int32)


def _exact(tensor: torch.Tensor) -> torch.autocast:
    """Autocast off: it would round the matrix products of what is written in torch."""
    return torch.autocast(tensor.device.type, enabled=False)


def _refuse_second_derivative(ctx: Any, *_: Any) -> None:
    raise UnsupportedCallError(
        "block_sparse_attention has no second derivative; take its gradient without create_graph"
    )


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    *tensors, key_sizes, _, _, query_block, key_block, scale, causal, backend = (
        inputs  # copies have no orders
    )
    if key_sizes is not None:
        key_length, sized = tensors[1].shape[2], key_sizes.shape[2]
        tensors[-1] = F.pad(key_sizes.log(), (0, key_length - sized))  # the bias of the backward pass
    ctx.set_materialize_grads(False)  # the gradient of a log-sum-exp that nobody uses stays None
    ctx.save_for_backward(*tensors, *output)
    ctx.parameters = (query_block, key_block, scale, causal, backend)


def _backward(ctx: Any, grad_output: torch.Tensor | None, grad_lse: torch.Tensor | None) -> tuple[Any, ...]:
    query, key, value, counts, indices, key_lengths, bias, output, lse = ctx.saved_tensors
    gradients = block_sparse_attention_backward_op(
        torch.zeros_like(output) if grad_output is None else grad_output,
        grad_lse, query, key, value, output, lse, counts, indices, key_lengths, bias, *ctx.parameters,
    )  # fmt: skip
    return *gradients, *(None,) * 12


block_sparse_attention_backward_op.register_autograd(_refuse_second_derivative)
block_sparse_attention_op.register_autograd(_backward, setup_context=_save_for_backward)
