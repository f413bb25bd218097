"""8-bit block-sparse attention for Hopper: INT8 scores, FP8 (E4M3) weights and values, a Gluon kernel.

`block_sparse_attention_int8_fp8_gluon` prepares the operands and runs the kernel;
`block_sparse_attention_quantized_gluon` takes prepared ones (:mod:`kernels_common.quantization`). How the
kernel works is told in :mod:`kernels_common.block_sparse_quantized_sm90`.
"""

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.errors import LayoutError, UnsupportedCallError
from kernels_common.block_sparse_quantized_sm90 import quantized_fwd_kernel_sm90
from kernels_common.quantization_triton import quantize_query_key_triton, quantize_value_fp8_triton
from kernels_common.triton_launch import LOG2_E, list_strides

BLOCK_SIZES = ((128, 128), (128, 64))
OUTPUT_DTYPES = (torch.float16, torch.bfloat16)
STAGES = {64: 8, 128: 4}  # key and value tiles in flight, by head dimension; powers of two


def interleave_tokens(value_fp8: torch.Tensor) -> torch.Tensor:
    """Value ``[B, Hkv, D, Npad]`` with the tokens of every 16 in the order the kernel reads them.

    Token ``8 h + 2 t + i`` goes to place ``4 t + 2 h + i``, for h and i in 0 to 1 and t in 0 to 3.
    """
    pairs = value_fp8.view(torch.uint8).unflatten(-1, (-1, 2, 4, 2))
    return pairs.transpose(-2, -3).flatten(-4).contiguous().view(value_fp8.dtype)


def quantized_gluon_obstacle(
    query: torch.Tensor, block_size: tuple[int, int], dtype: torch.dtype
) -> str | None:
    """Why :func:`block_sparse_attention_quantized_gluon` cannot take such a call, or None."""
    if query.device.type != "cuda":
        return f"the 8-bit Gluon kernel needs a CUDA device, got {query.device}"
    properties = torch.cuda.get_device_properties(query.device)
    capability = (properties.major, properties.minor)
    checks = (
        (capability == (9, 0), f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"),
        (dtype in OUTPUT_DTYPES, f"writes fp16 and bf16, got {dtype}"),
        (query.shape[-1] in STAGES, f"supports head dimensions 64 and 128, got {query.shape[-1]}"),
        (
            tuple(block_size) in BLOCK_SIZES,
            f"supports mask blocks of 128 x 128 and 128 x 64, got {tuple(block_size)}",
        ),
    )
    return next((f"the 8-bit Gluon kernel {message}" for passed, message in checks if not passed), None)


def _check_operands(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scales: tuple[torch.Tensor, ...]
) -> None:
    kinds = (query.dtype, key.dtype, value.dtype, *(scale.dtype for scale in scales))
    expected_kinds = (torch.int8, torch.int8, torch.float8_e4m3fn, *3 * (torch.float32,))
    padded = triton.cdiv(key.shape[2], 128) * 128
    shapes = (value.shape, *(scale.shape for scale in scales))
    expected_shapes = (
        (*key.shape[:2], key.shape[3], padded),
        (*query.shape[:2], triton.cdiv(query.shape[2], 64)),
        (*key.shape[:2], triton.cdiv(key.shape[2], 64)),
        (*key.shape[:2], key.shape[3]),
    )
    if kinds != expected_kinds or shapes != expected_shapes:
        raise LayoutError(
            "value and the scales of query, key and value must have shapes "
            f"{expected_shapes} and, after int8 query and key, dtypes {expected_kinds[2:]}; got "
            f"{tuple(tuple(shape) for shape in shapes)} and {kinds}: prepare them with "
            "kernels_common.quantization"
        )


def _boxes(tensor: torch.Tensor, columns: int) -> TensorDescriptor:
    """Boxes of 64 rows of one head."""
    tensor = tensor.contiguous()
    row_bytes, bits = columns * tensor.element_size(), 8 * tensor.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=row_bytes, element_bitwidth=bits, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), list(tensor.stride()), [1, 1, 64, columns], layout)


def block_sparse_attention_quantized_gluon(
    query: torch.Tensor,
    query_scale: torch.Tensor,
    key: torch.Tensor,
    key_scale: torch.Tensor,
    value: torch.Tensor,
    value_scale: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    dtype: torch.dtype = torch.bfloat16,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of prepared 8-bit operands over the kept blocks.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]`` int8, D 64 or 128.
        query_scale (Tensor): ``[B, Hq, ceil(Nq / 64)]`` fp32, positive, one for 64 tokens.
        key (Tensor): ``[B, Hkv, Nk, D]`` int8, in general of keys centred by their mean.
        key_scale (Tensor): ``[B, Hkv, ceil(Nk / 64)]`` fp32, positive.
        value (Tensor): ``[B, Hkv, D, Npad]`` E4M3, Npad the next multiple of 128, zero past Nk, tokens in
            the order of :func:`interleave_tokens`.
        value_scale (Tensor): ``[B, Hkv, D]`` fp32, one for a channel.
        counts (Tensor): as in :class:`core.BlockSparseMask`.
        indices (Tensor): as in :class:`core.BlockSparseMask`.
        block_size (tuple[int, int]): queries and keys of a mask block, 128 x 128 or 128 x 64.
        scale (float): factor of the scores.
        dtype (torch.dtype, Optional): of the output, fp16 or bf16. Default: ``torch.bfloat16``

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]``, contiguous, and the natural log-sum-exp
        ``[B, Hq, Nq]`` fp32 of the scores as given: where keys were centred, those of the centred keys.

    Raises:
        UnsupportedCallError: :func:`quantized_gluon_obstacle` names a reason.
        LayoutError: an operand has another dtype or shape than stated.
    """
    if (obstacle := quantized_gluon_obstacle(query, block_size, dtype)) is not None:
        raise UnsupportedCallError(obstacle)
    scales = (query_scale, key_scale, value_scale)
    _check_operands(query, key, value, scales)
    batch, heads, queries, head_dim = query.shape
    output = torch.empty(query.shape, dtype=dtype, device=query.device)
    lse = torch.empty(query.shape[:3], dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0 or indices.numel() == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    row_tiles = triton.cdiv(queries, block_size[0])
    items = batch * heads * row_tiles
    programs = min(items, torch.cuda.get_device_properties(query.device).multi_processor_count)
    with torch.cuda.device_of(query):
        counter = torch.zeros(1, dtype=torch.int32, device=query.device)
        quantized_fwd_kernel_sm90[(programs,)](
            _boxes(query, head_dim), _boxes(key, head_dim), _boxes(value, 64),
            *(part.contiguous() for part in scales), _boxes(output, 64), lse, counts, indices, counter,
            *list_strides(counts)[:2], *list_strides(indices)[:3],
            items, row_tiles, heads, heads // key.shape[1], queries, key.shape[2], scale * LOG2_E.value,
            D=head_dim, STAGES=STAGES[head_dim], MASK_N=block_size[1], num_warps=4,
        )  # fmt: skip
    return output, lse


def block_sparse_attention_int8_fp8_gluon(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise and attend; arguments as in :func:`kernels_common.block_sparse_attention`.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32 of the scores before centring.

    Raises:
        UnsupportedCallError: :func:`quantized_gluon_obstacle` names a reason.
    """
    if (obstacle := quantized_gluon_obstacle(query, block_size, query.dtype)) is not None:
        raise UnsupportedCallError(obstacle)
    operands = quantize_query_key_triton(query, key)
    value_fp8, value_scale = quantize_value_fp8_triton(value, interleaved=True)
    output, lse = block_sparse_attention_quantized_gluon(
        operands.query, operands.query_scale, operands.key, operands.key_scale, value_fp8, value_scale,
        counts, indices, block_size, scale=scale, dtype=query.dtype,
    )  # fmt: skip
    lse.add_(operands.mean_scores, alpha=scale)
    target = torch.empty_like(query)
    return (output if output.stride() == target.stride() else target.copy_(output)), lse
