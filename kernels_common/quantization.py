"""8-bit operands of attention: INT8 query and key, FP8 value.

After SageAttention (arXiv 2410.02367, section 4; arXiv 2411.10958, section 3). Query and key are INT8 with
one scale per 64 tokens, counted from the start of the sequence, so that any block size can use them: scale
``amax / 127``, ``x / scale`` rounded to nearest even. The key is centred by its mean first. That lowers every
score of a query by the same number, which no softmax sees, and takes away the shared offset that would spend
most of the 8 bits. Value is e4m3 with one scale per channel.

Shape letters: B batch, H heads, N tokens, D head dimension, C groups of 64 tokens.
"""

import importlib.util
from typing import NamedTuple

import torch
import torch.nn.functional as F

GROUP = 64
INT8_MAX = 127.0
FP8_MAX = 448.0
FP8_DTYPE = torch.float8_e4m3fn
# Multiple of the tokens of a prepared value, zero-filled.
VALUE_MULTIPLE = 128
# Smallest amax that is told from zero: a group of zeros has a positive scale and no 0 / 0.
AMAX_FLOOR = 1e-12

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class QuantizedQueryKey(NamedTuple):
    """INT8 query and key with the scales and the mean that restore their scores.

    ``query . key = query_scale * key_scale * (query_int8 . key_int8) + mean_scores`` up to rounding, where
    the scales are those of the two tokens' groups.
    """

    query: torch.Tensor  # [B, Hq, Nq, D] int8
    query_scale: torch.Tensor  # [B, Hq, ceil(Nq / 64)] fp32
    key: torch.Tensor  # [B, Hkv, Nk, D] int8, centred; 0 for keys that are not valid
    key_scale: torch.Tensor  # [B, Hkv, ceil(Nk / 64)] fp32
    key_mean: torch.Tensor  # [B, Hkv, 1, D] fp32
    mean_scores: torch.Tensor  # [B, Hq, Nq] fp32, query . key_mean: what centring took from every score


def quantize_query_key(
    query: torch.Tensor, key: torch.Tensor, *, key_lengths: torch.Tensor | None = None
) -> QuantizedQueryKey:
    """INT8 query and centred INT8 key; the inputs are left as they are.

    Every valid key counts in the mean, whether a block mask keeps it or not, so all must be finite.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]`` floats, any strides.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        key_lengths (Tensor, Optional): ``[B]`` int32 or int64, valid keys of each batch entry. Default: all

    Returns:
        QuantizedQueryKey: the operands, contiguous.
    """
    if query.device.type == "cuda" and _TRITON_INSTALLED:
        from kernels_common.quantization_triton import quantize_query_key_triton

        return quantize_query_key_triton(query, key, key_lengths=key_lengths)
    return quantize_query_key_torch(query, key, key_lengths=key_lengths)


def quantize_value_fp8(
    value: torch.Tensor, *, key_lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Value in e4m3 with its tokens contiguous, as 8-bit tensor cores read it.

    Args:
        value (Tensor): ``[B, Hkv, Nk, D]`` floats, any strides.
        key_lengths (Tensor, Optional): ``[B]`` int32 or int64, valid keys of each batch entry. Default: all

    Returns:
        tuple[Tensor, Tensor]: ``[B, Hkv, D, Npad]`` e4m3 with Npad the next multiple of 128, 0 where no valid
        key is; and the scale of each channel, ``[B, Hkv, D]`` fp32, its amax / 448.
    """
    if value.device.type == "cuda" and _TRITON_INSTALLED:
        from kernels_common.quantization_triton import quantize_value_fp8_triton

        return quantize_value_fp8_triton(value, key_lengths=key_lengths)
    return quantize_value_fp8_torch(value, key_lengths=key_lengths)


def quantize_query_key_torch(
    query: torch.Tensor, key: torch.Tensor, *, key_lengths: torch.Tensor | None = None
) -> QuantizedQueryKey:
    """:func:`quantize_query_key` in plain PyTorch, with fp32 copies of both tensors."""
    key_BHND = _valid_only(key, key_lengths)
    valid_keys = valid_key_counts(key, key_lengths).clamp(min=1)
    key_mean = key_BHND.sum(2, keepdim=True) / valid_keys[:, None, None, None]
    centred = _valid_only(key_BHND - key_mean, key_lengths)
    query_int8, query_scale = _quantize_groups(query.to(torch.float32))
    key_int8, key_scale = _quantize_groups(centred)
    mean_BHND = key_mean.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    mean_scores = (query.to(torch.float32) * mean_BHND).sum(-1)
    return QuantizedQueryKey(query_int8, query_scale, key_int8, key_scale, key_mean, mean_scores)


def quantize_value_fp8_torch(
    value: torch.Tensor, *, key_lengths: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`quantize_value_fp8` in plain PyTorch, with an fp32 copy of the tensor."""
    value_BHDN = _valid_only(value, key_lengths).transpose(2, 3)
    amax = value_BHDN.abs().amax(-1).clamp(min=AMAX_FLOOR)  # [B, H, D]
    limit = torch.full_like(amax, FP8_MAX)
    padded = F.pad(value_BHDN * (limit / amax)[..., None], (0, -value.shape[2] % VALUE_MULTIPLE))
    return padded.to(FP8_DTYPE).contiguous(), amax / limit


def dequantize_tokens(tokens_int8: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """INT8 query or key ``[B, H, N, D]`` times the scale of its groups ``[B, H, C]``, in fp32."""
    per_token = scale.repeat_interleave(GROUP, dim=2)[:, :, : tokens_int8.shape[2], None]
    return tokens_int8.to(torch.float32) * per_token


def dequantize_value(value_fp8: torch.Tensor, scale: torch.Tensor, length: int) -> torch.Tensor:
    """FP8 value ``[B, H, D, Npad]`` times the scale of its channels, as ``[B, H, length, D]`` fp32."""
    value_BHDN = value_fp8[..., :length].to(torch.float32) * scale[..., None]
    return value_BHDN.transpose(2, 3).contiguous()


def valid_key_counts(key: torch.Tensor, key_lengths: torch.Tensor | None) -> torch.Tensor:
    """Valid keys of each batch entry, ``[B]`` int32."""
    if key_lengths is None:
        return torch.full(key.shape[:1], key.shape[2], dtype=torch.int32, device=key.device)
    return key_lengths.clamp(0, key.shape[2]).to(torch.int32)


def _valid_only(tensor: torch.Tensor, key_lengths: torch.Tensor | None) -> torch.Tensor:
    """``[B, H, N, D]`` in fp32 with 0 past the key lengths."""
    if key_lengths is None:
        return tensor.to(torch.float32)
    inside = torch.arange(tensor.shape[2], device=tensor.device) < key_lengths[:, None]  # [B, N]
    return tensor.to(torch.float32).masked_fill(~inside[:, None, :, None], 0.0)


def _quantize_groups(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``[B, H, N, D]`` fp32 as INT8 and the scale of each group of 64 tokens, ``[B, H, C]``."""
    grouped = F.pad(tensor, (0, 0, 0, -tensor.shape[2] % GROUP)).unflatten(2, (-1, GROUP))
    amax = grouped.abs().amax((3, 4)).clamp(min=AMAX_FLOOR)  # [B, H, C]
    limit = torch.full_like(amax, INT8_MAX)  # division by a number is rounded twice on a GPU
    rounded = (grouped * (limit / amax)[..., None, None]).round().to(torch.int8)
    return rounded.flatten(2, 3)[:, :, : tensor.shape[2]].contiguous(), amax / limit
