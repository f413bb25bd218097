"""The functions that users of the original SpargeAttn package know, over the operators of this one.

Arguments have upstream's names and defaults; what an argument asks for is done, or refused with an error.
Blocks are 128 queries x 64 keys on every device. Tensors are ``[B, H, N, D]`` in the layout ``"HND"``,
``[B, N, H, D]`` in ``"NHD"``: any length and head dimension, fp16, bf16 or fp32, and fewer key heads than
query heads if the latter are a multiple. ``spas_sage2_*`` and ``block_sparse_sage2_*`` take INT8 scores and
FP8 weights and values (on GPUs without FP8 the latter as given), ``spas_sage_*`` INT8 scores alone. Causal
calls are computed in the precision of the tensors. All run on CUDA devices, and on CPUs in plain torch.

Thresholds per head are checked where they lie on a CPU. On a GPU they are trusted, since reading them would
wait for the device: a share up to 0 there is one block, above 1 all of them, and a NaN is undefined.
"""

import torch

from plugins.sparge.upstream_call import (
    NO_SKIP,
    Output,
    Threshold,
    attend_call,
    open_call,
    predict_blocks,
    read_mask,
    sage2_precision,
)


def spas_sage2_attn_meansim_topk_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: Threshold = -0.1,
    cdfthreshd: Threshold | None = None,
    topk: Threshold | None = 0.5,
    pvthreshd: Threshold = NO_SKIP,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
) -> Output:
    """SpargeAttn (arXiv 2502.18137) on SageAttention 2, with a share of key blocks for every row.

    Args:
        q (Tensor): queries.
        k (Tensor): keys.
        v (Tensor): values.
        attn_mask (Tensor, Optional): must be None.
        dropout_p (float): must be 0.
        is_causal (bool): no query sees a later key; needs as many keys as queries. Default: False
        scale (float, Optional): factor on the scores, of the prediction too. Default: ``1 / sqrt(D)``
        smooth_k (bool): must be True: keys are centred before they are rounded, which changes no exact
            result.
        simthreshd1 (float | Tensor): self-similarity up to which a block is never dropped, a number or one
            per head ``[H]``; below 0 none is held back. Default: -0.1
        cdfthreshd (float | Tensor, Optional): share of the estimated attention that kept blocks hold at most,
            in (0, 1], a number or ``[H]``; give it or ``topk``. Default: none
        topk (float | Tensor, Optional): share of all key blocks that a row keeps, likewise. Default: 0.5
        pvthreshd (float | Tensor): in log2 units: tiles whose scores are all that far or further below the
            largest before are not multiplied with their values; a number or ``[H]``. As a number, 50 and
            above skip none. Default: 50
        attention_sink (bool): every query sees the first key block. Default: False
        tensor_layout (str): ``"HND"`` or ``"NHD"``. Default: ``"HND"``
        output_dtype (dtype, Optional): of the output, floating. Default: that of ``q``
        return_sparsity (bool): also return the share of work left out. Default: False

    Returns:
        Tensor or tuple[Tensor, float]: output in the layout of ``q``; with ``return_sparsity`` also
        ``1 - (scores + products) / 2``, where ``scores`` is the share of the (query, key) pairs whose scores
        were computed and ``products`` that of the pairs multiplied with values, both of all pairs (of a
        causal call: of the visible blocks). In [0, 1]; reading it waits for the device.

    Raises:
        UnsupportedCallError: an argument asks for what is not computed.
        ParameterError: a threshold is out of range, or not exactly one rule is given.
        LayoutError: shapes, dtypes or devices do not fit together.
    """
    call = open_call(q, k, v, attn_mask, dropout_p, smooth_k, tensor_layout, is_causal=is_causal)
    mask = predict_blocks(call, scale, simthreshd1, cdfthreshd, topk, attention_sink)
    return attend_call(call, mask, scale, pvthreshd, sage2_precision(q), output_dtype, return_sparsity)


def spas_sage2_attn_meansim_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: Threshold = 0.6,
    cdfthreshd: Threshold = 0.98,
    pvthreshd: Threshold = NO_SKIP,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
) -> Output:
    """:func:`spas_sage2_attn_meansim_topk_cuda` by the share of estimated attention, ``cdfthreshd``."""
    call = open_call(q, k, v, attn_mask, dropout_p, smooth_k, tensor_layout, is_causal=is_causal)
    mask = predict_blocks(call, scale, simthreshd1, cdfthreshd, None, attention_sink)
    return attend_call(call, mask, scale, pvthreshd, sage2_precision(q), output_dtype, return_sparsity)


def spas_sage_attn_meansim_topk_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: Threshold = -0.1,
    cdfthreshd: Threshold | None = None,
    topk: Threshold | None = 0.5,
    pvthreshd: Threshold = NO_SKIP,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
) -> Output:
    """:func:`spas_sage2_attn_meansim_topk_cuda` with weights and values in the precision of the tensors."""
    call = open_call(q, k, v, attn_mask, dropout_p, smooth_k, tensor_layout, is_causal=is_causal)
    mask = predict_blocks(call, scale, simthreshd1, cdfthreshd, topk, attention_sink)
    return attend_call(call, mask, scale, pvthreshd, "int8_fp16", output_dtype, return_sparsity)


def spas_sage_attn_meansim_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    smooth_k: bool = True,
    simthreshd1: Threshold = 0.6,
    cdfthreshd: Threshold = 0.98,
    pvthreshd: Threshold = NO_SKIP,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
) -> Output:
    """:func:`spas_sage_attn_meansim_topk_cuda` by the share of estimated attention, ``cdfthreshd``."""
    call = open_call(q, k, v, attn_mask, dropout_p, smooth_k, tensor_layout, is_causal=is_causal)
    mask = predict_blocks(call, scale, simthreshd1, cdfthreshd, None, attention_sink)
    return attend_call(call, mask, scale, pvthreshd, "int8_fp16", output_dtype, return_sparsity)


def block_sparse_sage2_attn_cuda(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask_id: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    scale: float | None = None,
    smooth_k: bool = True,
    pvthreshd: Threshold = NO_SKIP,
    attention_sink: bool = False,
    tensor_layout: str = "HND",
    output_dtype: torch.dtype | None = None,
    return_sparsity: bool = False,
) -> Output:
    """Attention over the blocks of a mask, as :func:`spas_sage2_attn_meansim_topk_cuda` does it.

    Args:
        mask_id (Tensor): ``[B, H, ceil(Nq / 128), ceil(Nk / 64)]`` bool or integer, 0 for blocks to leave
            out. A row without any gives 0.

    The other arguments, the result and the errors are those of that function.
    """
    call = open_call(q, k, v, None, dropout_p, smooth_k, tensor_layout, is_causal=False)
    mask = read_mask(call, mask_id, attention_sink)
    return attend_call(call, mask, scale, pvthreshd, sage2_precision(q), output_dtype, return_sparsity)
