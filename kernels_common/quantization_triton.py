"""8-bit operands of attention in Triton: two reads of key and value, one of query, one write of each.

A first kernel reduces key to its sums and value to its largest magnitudes; a second one per tensor quantises.

Shape letters: M tokens of a tile, D head dimension padded to a power of two.
"""

import torch
import triton
import triton.language as tl

from kernels_common.quantization import (
    AMAX_FLOOR,
    FP8_DTYPE,
    FP8_MAX,
    GROUP,
    INT8_MAX,
    VALUE_MULTIPLE,
    QuantizedQueryKey,
    valid_key_counts,
)

# Tokens that one program of the reduction reads, and how many of them at a time.
REDUCED_TOKENS = 512
REDUCED_TILE = 64
# Adding and subtracting 1.5 * 2^23 rounds a small fp32 number to the nearest even integer. Kernels that
# round so are compiled without fusing the multiplication before it, so that they round as torch does.
ROUNDING_SHIFT = tl.constexpr(12582912.0)


@triton.jit
def _load_tile(
    source_ptr, batch, head, rows, valid_rows, strides, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr
):
    """Rows of one head in fp32, 0 where ``rows`` reaches ``valid_rows``, ``[M, D]``."""
    stride_b, stride_h, stride_n, stride_d = strides
    columns = tl.arange(0, BLOCK_D)
    base = source_ptr + batch.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h
    pointers = base + rows.to(tl.int64)[:, None] * stride_n + columns[None, :] * stride_d
    inside = (rows < valid_rows)[:, None] & (columns < HEAD_DIM)[None, :]
    return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_int8(
    tile, target_ptr, scale_ptr, place, rows, length, AMAX_FLOOR: tl.constexpr, INT8_MAX: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Quantise one group ``[M, D]`` and store it with its scale; ``place`` is its head among all."""
    amax = tl.maximum(tl.max(tl.abs(tile)), AMAX_FLOOR)
    scaled = tile * tl.div_rn(INT8_MAX, amax)
    rounded = (scaled + ROUNDING_SHIFT) - ROUNDING_SHIFT
    columns = tl.arange(0, BLOCK_D)
    offsets = (place.to(tl.int64) * length + rows)[:, None] * HEAD_DIM + columns[None, :]
    inside = (rows < length)[:, None] & (columns < HEAD_DIM)[None, :]
    tl.store(target_ptr + offsets, rounded.to(tl.int8), mask=inside)
    tl.store(scale_ptr + place * tl.num_programs(0) + tl.program_id(0), tl.div_rn(amax, INT8_MAX))


@triton.jit
def reduce_tokens_kernel(
    source_ptr,
    lengths_ptr,
    partial_ptr,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TOKENS: tl.constexpr,
    TILE: tl.constexpr,
    MAGNITUDE: tl.constexpr,
):
    """Sum, or largest magnitude, of ``TOKENS`` tokens of each channel: grid ``(parts, B * H)``."""
    batch, head = tl.program_id(1) // HEADS, tl.program_id(1) % HEADS
    valid = tl.load(lengths_ptr + batch)
    columns = tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_n, stride_d)
    reduced = tl.zeros([TILE, BLOCK_D], dtype=tl.float32)
    for start in range(0, TOKENS, TILE):
        rows = tl.program_id(0) * TOKENS + start + tl.arange(0, TILE)
        tile = _load_tile(source_ptr, batch, head, rows, valid, strides, HEAD_DIM, BLOCK_D)
        reduced = tl.maximum(reduced, tl.abs(tile)) if MAGNITUDE else reduced + tile
    result = tl.max(reduced, 0) if MAGNITUDE else tl.sum(reduced, 0)
    place = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    tl.store(partial_ptr + place * HEAD_DIM + columns, result, mask=columns < HEAD_DIM)


@triton.jit(do_not_specialize=["length"])
def quantize_query_kernel(
    query_ptr,
    mean_ptr,
    target_ptr,
    scale_ptr,
    mean_scores_ptr,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    length,
    HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    INT8_MAX: tl.constexpr,
):
    """One group of queries and their products with the key mean: grid ``(ceil(Nq / 64), B * Hq)``."""
    place = tl.program_id(1)
    batch, head = place // HEADS, place % HEADS
    rows = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    columns = tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_n, stride_d)
    tile = _load_tile(query_ptr, batch, head, rows, length, strides, HEAD_DIM, BLOCK_D)
    mean = tl.load(mean_ptr + place // KV_GROUP * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    mean_scores = tl.sum(tile * mean[None, :], 1)
    tl.store(mean_scores_ptr + place.to(tl.int64) * length + rows, mean_scores, mask=rows < length)
    _store_int8(tile, target_ptr, scale_ptr, place, rows, length, AMAX_FLOOR, INT8_MAX, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["length"])
def quantize_key_kernel(
    key_ptr,
    lengths_ptr,
    mean_ptr,
    target_ptr,
    scale_ptr,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP: tl.constexpr,
    AMAX_FLOOR: tl.constexpr,
    INT8_MAX: tl.constexpr,
):
    """One group of keys, centred: grid ``(ceil(Nk / 64), B * Hkv)``."""
    place = tl.program_id(1)
    batch, head = place // HEADS, place % HEADS
    valid = tl.load(lengths_ptr + batch)
    rows = tl.program_id(0) * GROUP + tl.arange(0, GROUP)
    columns = tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_n, stride_d)
    tile = _load_tile(key_ptr, batch, head, rows, valid, strides, HEAD_DIM, BLOCK_D)
    mean = tl.load(mean_ptr + place * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=0.0)
    centred = tl.where((rows < valid)[:, None], tile - mean[None, :], 0.0)
    _store_int8(centred, target_ptr, scale_ptr, place, rows, length, AMAX_FLOOR, INT8_MAX, HEAD_DIM, BLOCK_D)


@triton.jit(do_not_specialize=["padded_length"])
def quantize_value_kernel(
    value_ptr,
    lengths_ptr,
    amax_ptr,
    target_ptr,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    padded_length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE: tl.constexpr,
    FP8_MAX: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    """One tile of values, transposed: grid ``(Npad / TILE, B * Hkv)``."""
    place = tl.program_id(1)
    batch, head = place // HEADS, place % HEADS
    valid = tl.load(lengths_ptr + batch)
    places = tl.program_id(0) * TILE + tl.arange(0, TILE)
    rows = places
    if INTERLEAVED:  # place 4 t + 2 h + i of every 16 holds token 8 h + 2 t + i
        inside = places % 16
        rows = places - inside + inside // 2 % 2 * 8 + inside // 4 * 2 + inside % 2
    columns = tl.arange(0, BLOCK_D)
    strides = (stride_b, stride_h, stride_n, stride_d)
    tile = _load_tile(value_ptr, batch, head, rows, valid, strides, HEAD_DIM, BLOCK_D)
    amax = tl.load(amax_ptr + place * HEAD_DIM + columns, mask=columns < HEAD_DIM, other=1.0)
    scaled = tile * tl.div_rn(FP8_MAX, amax)[None, :]
    channels = place.to(tl.int64) * HEAD_DIM + columns
    offsets = channels[:, None] * padded_length + places[None, :]
    tl.store(target_ptr + offsets, scaled.to(tl.float8e4nv).T, mask=(columns < HEAD_DIM)[:, None])


def _reduce_tokens(tensor: torch.Tensor, lengths: torch.Tensor, magnitude: bool) -> torch.Tensor:
    """Sums, or largest magnitudes, of parts of the valid tokens, ``[B, H, parts, D]`` fp32."""
    batch, heads, length, head_dim = tensor.shape
    parts = triton.cdiv(length, REDUCED_TOKENS)
    partial = torch.empty(batch, heads, parts, head_dim, dtype=torch.float32, device=tensor.device)
    reduce_tokens_kernel[(parts, batch * heads)](
        tensor, lengths, partial, *tensor.stride(), HEADS=heads, HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim), TOKENS=REDUCED_TOKENS, TILE=REDUCED_TILE,
        MAGNITUDE=magnitude,
    )  # fmt: skip
    return partial


def _int8_targets(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    batch, heads, length, _ = tensor.shape
    groups = triton.cdiv(length, GROUP)
    return (
        torch.empty(tensor.shape, dtype=torch.int8, device=tensor.device),
        torch.empty(batch, heads, groups, dtype=torch.float32, device=tensor.device),
    )


def quantize_query_key_triton(
    query: torch.Tensor, key: torch.Tensor, *, key_lengths: torch.Tensor | None = None
) -> QuantizedQueryKey:
    """:func:`kernels_common.quantization.quantize_query_key` on a GPU; no tensor has an fp32 copy."""
    batch, heads, queries, head_dim = query.shape
    kv_heads, keys = key.shape[1:3]
    query_int8, query_scale = _int8_targets(query)
    key_int8, key_scale = _int8_targets(key)
    mean_scores = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    lengths = valid_key_counts(key, key_lengths)
    shared = {
        "HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim), "GROUP": GROUP,
        "AMAX_FLOOR": AMAX_FLOOR, "INT8_MAX": INT8_MAX,
    }  # fmt: skip
    with torch.cuda.device_of(query):
        sums = _reduce_tokens(key, lengths, magnitude=False).sum(2, keepdim=True)
        key_mean = sums / lengths.clamp(min=1)[:, None, None, None]
        quantize_query_kernel[(query_scale.shape[2], batch * heads)](
            query, key_mean, query_int8, query_scale, mean_scores, *query.stride(), queries,
            HEADS=heads, KV_GROUP=heads // kv_heads, **shared, enable_fp_fusion=False,
        )  # fmt: skip
        quantize_key_kernel[(key_scale.shape[2], batch * kv_heads)](
            key, lengths, key_mean, key_int8, key_scale, *key.stride(), keys,
            HEADS=kv_heads, **shared, enable_fp_fusion=False,
        )  # fmt: skip
    return QuantizedQueryKey(query_int8, query_scale, key_int8, key_scale, key_mean, mean_scores)


def quantize_value_fp8_triton(
    value: torch.Tensor, *, key_lengths: torch.Tensor | None = None, interleaved: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`kernels_common.quantization.quantize_value_fp8` on a GPU; no fp32 copy.

    Args:
        interleaved (bool): tokens of every 16 in the order of
            `block_sparse_quantized_gluon.interleave_tokens`. Default: False
    """
    batch, heads, length, head_dim = value.shape
    padded_length = triton.cdiv(length, VALUE_MULTIPLE) * VALUE_MULTIPLE
    value_fp8 = torch.empty(batch, heads, head_dim, padded_length, dtype=FP8_DTYPE, device=value.device)
    lengths = valid_key_counts(value, key_lengths)
    with torch.cuda.device_of(value):
        amax = _reduce_tokens(value, lengths, magnitude=True).amax(2).clamp(min=AMAX_FLOOR)
        quantize_value_kernel[(padded_length // VALUE_MULTIPLE, batch * heads)](
            value, lengths, amax, value_fp8, *value.stride(), padded_length, HEADS=heads, HEAD_DIM=head_dim,
            BLOCK_D=triton.next_power_of_2(head_dim), TILE=VALUE_MULTIPLE, FP8_MAX=FP8_MAX,
            INTERLEAVED=interleaved, num_warps=2,
        )  # fmt: skip
    return value_fp8, amax / torch.full_like(amax, FP8_MAX)  # rounded once, as in the kernel
