"""Block-sparse attention: one operator, several backends.

`attend_blocks` checks the call, settles the backend and enters a custom operator; `block_sparse_attention` is
the same for those who want nothing but the output.
"""

from typing import Literal, NamedTuple, overload

import torch
import torch.nn.functional as F

from core.argument_checks import check_causal, check_tensors_given
from core.block_mask import BlockSparseMask
from core.errors import LayoutError, UnsupportedCallError
from kernels_common.block_sparse_backends import QUANTIZATIONS, CallFeatures, resolve_backend
from kernels_common.block_sparse_operator import (
    block_sparse_attention_op,
    block_sparse_attention_quantized_op,
)
from kernels_common.tensor_checks import check_extras, check_mask, check_tensors, resolve_scale
from kernels_common.token_orders import (
    TokenOrders,
    check_orders,
    gather_bias,
    gather_call,
    scatter_lse,
    scatter_output,
)


class BlockSparseOutput(NamedTuple):
    """What :func:`attend_blocks` returns.

    Args:
        output (Tensor): ``[B, Hq, Nq, D]`` in the dtype and memory order of the query.
        lse (Tensor, Optional): natural log-sum-exp of the scores, ``[B, Hq, Nq]`` fp32, if asked for.
        backend (str): the backend that ran.
        skipped (Tensor, Optional): tiles that ``skip_threshold`` left out, ``[B, Hq, Mq]`` int32.
    """

    output: torch.Tensor
    lse: torch.Tensor | None
    backend: str
    skipped: torch.Tensor | None = None


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float | None = ...,
    key_lengths: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    key_sizes: torch.Tensor | None = ...,
    query_order: torch.Tensor | None = ...,
    key_order: torch.Tensor | None = ...,
    causal: bool = ...,
    quantization: str = ...,
    return_lse: Literal[False] = ...,
    backend: str = ...,
) -> torch.Tensor: ...


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float | None = ...,
    key_lengths: torch.Tensor | None = ...,
    bias: torch.Tensor | None = ...,
    key_sizes: torch.Tensor | None = ...,
    query_order: torch.Tensor | None = ...,
    key_order: torch.Tensor | None = ...,
    causal: bool = ...,
    quantization: str = ...,
    return_lse: Literal[True],
    backend: str = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...


def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_sizes: torch.Tensor | None = None,
    query_order: torch.Tensor | None = None,
    key_order: torch.Tensor | None = None,
    causal: bool = False,
    quantization: str = "none",
    return_lse: bool = False,
    backend: str = "auto",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention over the kept blocks of ``block_mask``.

    ``softmax(scale * query @ key^T + bias)`` over the keys of the kept blocks, times ``value``. A query that
    sees no key (empty row, no valid key, bias -inf everywhere) gets output 0 and log-sum-exp -inf.
    Tensors may have any strides; lengths need not be multiples of the block. Output and log-sum-exp are
    differentiable in query, key and value, unless ``quantization`` is asked for.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]`` fp32, bf16, fp16 (fp64 with ``"reference"`` and ``"torch"``).
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        block_mask (BlockSparseMask): kept blocks; batch and head dimensions 1 or B and Hq; blocks of
            multiples of 16 tokens (64 and 128 are fast). Its lists are trusted: call
            ``block_mask.check()`` on lists of unknown origin.
        scale (float, Optional): factor on the scores, > 0. Default: ``1 / sqrt(D)``
        key_lengths (Tensor, Optional): ``[B]`` int32 or int64, 0 to Nk: only the first ``key_lengths[b]``
            keys of batch entry b take part. Trusted; what lies past them must be finite. Default: all
        bias (Tensor, Optional): ``[B or 1, 1 or Hkv or Hq, Nk]`` floats added to the scaled scores of every
            query, in natural log units, -inf for a key to leave out. Used in fp32. Default: none
        key_sizes (Tensor, Optional): ``[B or 1, 1 or Hkv, 0 to Nk]`` numbers >= 1: how many tokens each of
            the first keys and its value are the mean of; the others stand for one. They count as so many
            (proportional attention, ToMe, arXiv 2210.09461), as with a bias of ``log(key_sizes)``, which is
            slower on Hopper. Not with ``bias``; trusted. Default: one each
        query_order (Tensor, Optional): permutation ``[Nq]`` or ``[B or 1, Hq or 1, Nq]``, int32 or int64: the
            mask is about a sequence whose place i holds query ``query_order[i]``. Output and log-sum-exp stay
            in the order of ``query``. It is trusted. Not with ``causal`` or ``key_lengths``. Default: places
            are tokens
        key_order (Tensor, Optional): the same for ``key``, ``value``, ``bias`` and ``key_sizes``, ``[Nk]`` or
            ``[B or 1, Hkv or 1, Nk]``. An order of Hkv heads goes with a bias of 1 or Hkv heads; one of Hq is
            refused. Default: places are tokens
        causal (bool): query i sees keys up to ``i + Nk - Nq`` only; with equal lengths no later key. Kept
            blocks behind that are computed for nothing: leave them out of the mask. Default: False
        quantization (str): ``"none"``; ``"int8_fp8"``, INT8 query and key with FP8 weights and value;
            ``"int8_fp16"``, INT8 query and key with weights and value as given (SageAttention, arXiv
            2410.02367 and 2411.10958). Default: ``"none"``
        return_lse (bool): also return the log-sum-exp. Default: False
        backend (str): ``"auto"`` (see :func:`resolve_backend`) or one of `BACKENDS`. Default: ``"auto"``

    Returns:
        Tensor or tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``;
        with ``return_lse`` also the natural log-sum-exp of the scores ``[B, Hq, Nq]`` fp32.

    Raises:
        LayoutError: shapes, dtypes or devices do not fit together.
        ParameterError: ``scale`` is not positive and finite, or ``causal`` is no bool.
        UnsupportedCallError: the backend does not support the call, or there is no gradient for it.
    """
    result = attend_blocks(
        query, key, value, block_mask, scale=scale, key_lengths=key_lengths, bias=bias,
        key_sizes=key_sizes, query_order=query_order, key_order=key_order, causal=causal,
        quantization=quantization, return_lse=return_lse, backend=backend,
    )  # fmt: skip
    return result.output if result.lse is None else (result.output, result.lse)


def attend_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockSparseMask,
    *,
    scale: float | None = None,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    key_sizes: torch.Tensor | None = None,
    query_order: torch.Tensor | None = None,
    key_order: torch.Tensor | None = None,
    causal: bool = False,
    quantization: str = "none",
    skip_threshold: torch.Tensor | None = None,
    return_lse: bool = False,
    backend: str = "auto",
) -> BlockSparseOutput:
    """:func:`block_sparse_attention` with everything that is known about the call.

    Args:
        skip_threshold (Tensor, Optional): ``[Hq]`` fp32, >= 0, in log2 units: a tile of at most 64 queries x
            128 keys is left out of output and log-sum-exp if each of its rows has its largest score that far
            or further below the largest of the tiles before it (SpargeAttn, arXiv 2502.18137, second stage).
            Default: none is left out

    The other arguments and the errors are those of :func:`block_sparse_attention`.

    Returns:
        BlockSparseOutput: output and backend; the log-sum-exp with ``return_lse``, the skipped tiles with
        ``skip_threshold``.
    """
    check_tensors(query, key, value)
    check_mask(query, key, block_mask)
    check_extras(query, key, key_lengths, bias, key_sizes)
    check_causal(causal)
    orders = TokenOrders(query_order, key_order)
    check_orders(query, key, orders, key_lengths, causal)
    if key_sizes is not None and key_sizes.shape[2] == 0:
        key_sizes = None
    features = _features(query, key_lengths, bias, key_sizes, causal, quantization, skip_threshold)
    _check_gradients(query, key, value, {"bias": bias, "key_sizes": key_sizes}, features)
    scale = resolve_scale(scale, query.shape[3])
    backend = resolve_backend(query, block_mask, backend, features)
    if key_sizes is not None and (backend != "gluon" or orders.key is not None):
        key_sizes = F.pad(key_sizes, (0, key.shape[2] - key_sizes.shape[2]), value=1)
    if key_sizes is not None and backend != "gluon":
        bias, key_sizes = key_sizes.to(torch.promote_types(query.dtype, torch.float32)).log(), None
    bias, key_sizes = gather_bias(bias, orders), gather_bias(key_sizes, orders)
    in_loads = TokenOrders()
    if orders.given and _reads_orders(query, key, value, features, backend):
        orders, in_loads = in_loads, orders
    tensors = gather_call(query, key, value, orders)
    lists = (block_mask.counts, block_mask.indices, key_lengths, bias)
    numbers = (*block_mask.block_size, scale)
    if features.exact:
        output, lse = block_sparse_attention_op(
            *tensors, *lists, key_sizes, *in_loads, *numbers, causal, backend
        )
        skipped = None
    else:
        output, lse, skipped = block_sparse_attention_quantized_op(
            *tensors, *lists, skip_threshold, *numbers, quantization, backend
        )
    return BlockSparseOutput(
        scatter_output(output, orders.query, query),
        scatter_lse(lse, orders.query) if return_lse else None,
        backend,
        skipped if features.skip else None,
    )


def _reads_orders(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, features: CallFeatures, backend: str
) -> bool:
    """Whether the kernel reads tokens through their order; gradients are those of the copies."""
    if backend != "triton" or not features.exact:
        return False
    from kernels_common.triton_launch import reads_pointers

    wants_grad = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return not wants_grad and (query.device.type != "cuda" or reads_pointers(query))


def _features(
    query: torch.Tensor,
    key_lengths: torch.Tensor | None,
    bias: torch.Tensor | None,
    key_sizes: torch.Tensor | None,
    causal: bool,
    quantization: str,
    skip_threshold: torch.Tensor | None,
) -> CallFeatures:
    if quantization not in QUANTIZATIONS:
        raise UnsupportedCallError(
            f"quantization must be one of {', '.join(QUANTIZATIONS)}, got {quantization!r}"
        )
    if skip_threshold is not None:
        check_tensors_given(skip_threshold=skip_threshold)
    if skip_threshold is not None and (
        skip_threshold.shape != query.shape[1:2]
        or skip_threshold.dtype != torch.float32
        or skip_threshold.device != query.device
    ):
        raise LayoutError(
            f"skip_threshold must be [{query.shape[1]}] fp32 on {query.device}, got "
            f"{tuple(skip_threshold.shape)} {skip_threshold.dtype} on {skip_threshold.device}"
        )
    given = (key_lengths is not None, bias is not None)
    return CallFeatures(*given, causal, quantization, skip_threshold is not None, key_sizes is not None)


def _check_gradients(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    extras: dict[str, torch.Tensor | None],
    features: CallFeatures,
) -> None:
    if not torch.is_grad_enabled():
        return
    for name, extra in extras.items():
        if extra is not None and extra.requires_grad:
            raise UnsupportedCallError(
                f"block_sparse_attention gives no gradient for {name}; pass {name}.detach()"
            )
    if not features.exact and any(tensor.requires_grad for tensor in (query, key, value)):
        raise UnsupportedCallError(
            f"block_sparse_attention has no backward with {features.extra}; call it under torch.no_grad() or "
            "leave that out"
        )
