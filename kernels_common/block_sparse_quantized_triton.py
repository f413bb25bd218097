"""8-bit and tile-skipping block-sparse attention in Triton.

The loop is that of :mod:`kernels_common.block_sparse_triton`, with integer scores (SageAttention, arXiv
2410.02367), FP8 weights and value on request (arXiv 2411.10958), and tiles that are left out after their
scores (SpargeAttn, arXiv 2502.18137). Value is prepared as ``[D, N]`` for FP8: 8-bit tensor cores want the
summed dimension contiguous.

Scores are ``[M, G, W]``: a row maximum is taken in each group of 64 keys and scaled by the group's factor, so
that dequantisation is part of the multiply-add before the exponential and costs nothing by score.

Shape letters: M and N tokens of a query and a key tile, G groups of W keys in a key tile (N = G x W), D head
dimension padded to a power of two.
"""

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from core.errors import UnsupportedCallError
from kernels_common.block_sparse_quantized_reference import skip_tile
from kernels_common.quantization import GROUP, VALUE_MULTIPLE
from kernels_common.quantization_triton import quantize_query_key_triton, quantize_value_fp8_triton
from kernels_common.triton_launch import (
    LN_2,
    LOG2_E,
    TileConfig,
    aligned,
    bias_strides,
    divide_tile,
    holds_large_tiles,
    list_strides,
    load_tile,
    reads_pointers,
    tile_source,
)

FP8_CAPABILITY = (8, 9)
FP8_KEY_BLOCK = 32  # tokens that one FP8 instruction sums
SKIP_MAX_FP32_HEAD_DIM = 128  # tiles of more do not fit into shared memory
# Weights are scaled by 448, so that 1 is the largest e4m3.
LOG2_FP8_MAX = tl.constexpr(math.log2(448.0))
PADDED = tl.constexpr(VALUE_MULTIPLE)


class QuantizedTileConfig(NamedTuple):
    """Kernel tile and launch parameters."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int
    max_registers: int | None


@triton.jit
def _row_factor(
    query_scale_ptr, place, rows, query_length, scale,
    TILE_M: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr,
):  # fmt: skip
    """What the queries' side of a score is multiplied by, to base 2, ``[M]``."""
    factor = tl.full([TILE_M], LOG2_E, dtype=tl.float32) * scale
    if INT8:
        scale_ptr = query_scale_ptr + place * tl.cdiv(query_length, GROUP)
        factor *= tl.load(scale_ptr + rows // GROUP, mask=rows < query_length, other=1.0)
    return factor


@triton.jit
def _scores(
    query_tile, key_tile, row_factor, key_scale_ptr, bias_ptr, kv_place, start_n, valid_keys, key_length,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, GROUP: tl.constexpr, INT8: tl.constexpr,
    HAS_BIAS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Scores ``[M, G, W]``, -inf for keys that are not valid, and the factor to base 2 of each ``[M, G]``."""
    groups: tl.constexpr = (TILE_N + GROUP - 1) // GROUP
    width: tl.constexpr = TILE_N // groups
    columns = (start_n + tl.arange(0, TILE_N)).reshape(groups, width)
    if INT8:
        scores = tl.dot(query_tile, key_tile.T, out_dtype=tl.int32).to(tl.float32)  # [M, N]
        # The last block may hold tiles past the keys, all of them masked.
        group = tl.minimum(start_n // GROUP + tl.arange(0, groups), (key_length - 1) // GROUP)
        scale_ptr = key_scale_ptr + kv_place * tl.cdiv(key_length, GROUP)
        factor = row_factor[:, None] * tl.load(scale_ptr + group)[None, :]
    else:
        scores = tl.dot(query_tile, key_tile.T, input_precision=PRECISION)  # [M, N]
        factor = row_factor[:, None].broadcast_to(TILE_M, groups)
    scores = scores.reshape(TILE_M, groups, width)
    if HAS_BIAS:
        key_bias = tl.load(bias_ptr + columns, mask=columns < key_length, other=0.0)
        scores = scores * factor[:, :, None] + (key_bias * LOG2_E)[None]
        factor = tl.full([TILE_M, groups], 1.0, dtype=tl.float32)
    if start_n + TILE_N > valid_keys:
        scores = tl.where((columns < valid_keys)[None], scores, float("-inf"))
    return scores, factor


@triton.jit
def _load_value(
    source, strides, batch, kv_head, start_n, key_length,
    TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr,
    POINTERS: tl.constexpr,
):  # fmt: skip
    """Value tile ``[N, D]``; FP8 values are stored as ``[D, N]``."""
    if not FP8:
        value_tile = load_tile(
            source, strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
        )
    elif POINTERS:
        channels, columns = tl.arange(0, BLOCK_D)[None, :], (start_n + tl.arange(0, TILE_N))[:, None]
        base = source + batch.to(tl.int64) * strides[0] + kv_head.to(tl.int64) * strides[1]
        # Stored up to whole groups of zeros: a mask at their end cuts no vector.
        inside = (channels < HEAD_DIM) & (columns < tl.cdiv(key_length, PADDED) * PADDED)
        value_tile = tl.load(base + channels.to(tl.int64) * strides[2] + columns, mask=inside, other=0.0)
    else:
        value_tile = source.load([batch, kv_head, 0, start_n]).reshape(BLOCK_D, TILE_N).T
    return value_tile


@triton.jit
def _accumulate(
    scores, factor, tile_peak, value_tile, acc, peak, total,
    HAS_EMPTY_TILES: tl.constexpr, FP8: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax: new accumulator ``[M, D]``, peak and total ``[M]``."""
    new_peak = tl.maximum(peak, tile_peak)
    base = new_peak
    if HAS_EMPTY_TILES:
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)  # no -inf - -inf
    rescale = tl.exp2(peak - base)
    if FP8:
        base -= LOG2_FP8_MAX
    weights = tl.exp2(scores * factor[:, :, None] - base[:, None, None])
    weights = weights.reshape(scores.shape[0], value_tile.shape[0])  # [M, N]
    total = total * rescale + tl.sum(weights, 1)
    # Not accumulated by the tensor cores, which sum FP8 products with fewer bits than fp32 has.
    products = tl.dot(weights.to(value_tile.dtype), value_tile, input_precision=PRECISION)
    return acc * rescale[:, None] + products, new_peak, total


@triton.jit
def _store_lse(lse_ptr, mean_scores_ptr, offset, peak, total, scale, inside, INT8: tl.constexpr):
    """Natural log-sum-exp of the scores before the key was centred."""
    empty = total == 0.0
    lse = tl.where(empty, float("-inf"), peak + tl.log2(tl.where(empty, 1.0, total))) * LN_2
    if INT8:
        lse += tl.load(mean_scores_ptr + offset, mask=inside, other=0.0) * scale
    tl.store(lse_ptr + offset, lse, mask=inside)


@triton.jit
def _store_output(
    output_ptr, acc, rows, query_length, stride_on, value_scale_ptr, kv_place,
    HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, FP8: tl.constexpr,
):  # fmt: skip
    columns = tl.arange(0, BLOCK_D)
    if FP8:
        scale_ptr = value_scale_ptr + kv_place * HEAD_DIM
        acc *= tl.load(scale_ptr + columns, mask=columns < HEAD_DIM, other=0.0)[None, :]
    tl.store(
        output_ptr + rows.to(tl.int64)[:, None] * stride_on + columns[None, :],
        acc.to(output_ptr.dtype.element_ty),
        mask=(rows < query_length)[:, None] & (columns < HEAD_DIM)[None, :],
    )


# Lengths and strides of lists change with every size; specialising on them would recompile.
@triton.jit(
    do_not_specialize=[
        "query_length", "key_length", "mask_rows", "scale",
        "stride_cb", "stride_ch", "stride_ib", "stride_ih", "stride_ir", "stride_bb", "stride_bh",
    ]
)  # fmt: skip
def block_sparse_quantized_fwd_kernel(
    query_source,
    query_strides,
    key_source,
    key_strides,
    value_source,
    value_strides,
    query_scale_ptr,
    key_scale_ptr,
    value_scale_ptr,
    mean_scores_ptr,
    output_ptr,
    lse_ptr,
    skipped_ptr,
    counts_ptr,
    indices_ptr,
    key_lengths_ptr,
    bias_ptr,
    skip_threshold_ptr,
    stride_ob,
    stride_oh,
    stride_on,
    stride_cb,
    stride_ch,
    stride_ib,
    stride_ih,
    stride_ir,
    stride_bb,
    stride_bh,
    query_length,
    key_length,
    mask_rows,
    scale,
    QUERY_HEADS: tl.constexpr,
    KV_GROUP: tl.constexpr,
    BIAS_GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    MASK_M: tl.constexpr,
    MASK_N: tl.constexpr,
    GROUP: tl.constexpr,
    INT8: tl.constexpr,
    FP8: tl.constexpr,
    HAS_KEY_LENGTHS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SKIP: tl.constexpr,
    POINTERS: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Output, log-sum-exp and skipped tiles of one query tile: grid ``(ceil(Nq / TILE_M), B * Hq)``."""
    start_m = tl.program_id(0) * TILE_M
    row = start_m // MASK_M
    place = tl.program_id(1)
    batch = place // QUERY_HEADS
    head = place % QUERY_HEADS
    kv_head = head // KV_GROUP
    kv_place = place // KV_GROUP
    batch_64, head_64 = batch.to(tl.int64), head.to(tl.int64)
    rows = start_m + tl.arange(0, TILE_M)

    count = tl.load(counts_ptr + batch_64 * stride_cb + head_64 * stride_ch + row)
    list_ptr = indices_ptr + batch_64 * stride_ib + head_64 * stride_ih + row.to(tl.int64) * stride_ir
    valid_keys = key_length
    if HAS_KEY_LENGTHS:
        valid_keys = tl.minimum(tl.load(key_lengths_ptr + batch).to(tl.int32), key_length)
    if HAS_BIAS:
        bias_ptr += batch_64 * stride_bb + (head_64 // BIAS_GROUP) * stride_bh
    if HAS_SKIP:
        skip_threshold = tl.load(skip_threshold_ptr + head)

    row_factor = _row_factor(query_scale_ptr, place, rows, query_length, scale, TILE_M, GROUP, INT8)
    query_tile = load_tile(
        query_source, query_strides, batch, head, start_m, query_length, TILE_M, HEAD_DIM, BLOCK_D, POINTERS
    )  # fmt: skip
    acc = tl.zeros([TILE_M, BLOCK_D], dtype=tl.float32)
    peak = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    skipped = 0
    tiles_per_block: tl.constexpr = MASK_N // TILE_N
    for step in range(count * tiles_per_block):
        block = tl.load(list_ptr + step // tiles_per_block)
        start_n = block * MASK_N + (step % tiles_per_block) * TILE_N
        key_tile = load_tile(
            key_source, key_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM, BLOCK_D, POINTERS
        )  # fmt: skip
        scores, factor = _scores(
            query_tile, key_tile, row_factor, key_scale_ptr, bias_ptr, kv_place, start_n, valid_keys,
            key_length, TILE_M, TILE_N, GROUP, INT8, HAS_BIAS, PRECISION,
        )  # fmt: skip
        tile_peak = tl.max(tl.max(scores, 2) * factor, 1)
        if HAS_SKIP:
            idle = (tile_peak <= peak - skip_threshold) | (rows >= query_length)
            if tl.min(idle.to(tl.int32), 0) == 0:
                value_tile = _load_value(
                    value_source, value_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM,
                    BLOCK_D, FP8, POINTERS,
                )  # fmt: skip
                acc, peak, total = _accumulate(
                    scores, factor, tile_peak, value_tile, acc, peak, total,
                    HAS_BIAS or HAS_KEY_LENGTHS, FP8, PRECISION,
                )  # fmt: skip
            else:
                skipped += 1
        else:
            value_tile = _load_value(
                value_source, value_strides, batch, kv_head, start_n, key_length, TILE_N, HEAD_DIM,
                BLOCK_D, FP8, POINTERS,
            )  # fmt: skip
            acc, peak, total = _accumulate(
                scores, factor, tile_peak, value_tile, acc, peak, total,
                HAS_BIAS or HAS_KEY_LENGTHS, FP8, PRECISION,
            )  # fmt: skip

    if FP8:
        peak -= LOG2_FP8_MAX  # the total was scaled as the weights were
    row_offset = place.to(tl.int64) * query_length + rows
    _store_lse(lse_ptr, mean_scores_ptr, row_offset, peak, total, scale, rows < query_length, INT8)
    acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    output_ptr += batch_64 * stride_ob + head_64 * stride_oh
    _store_output(
        output_ptr, acc, rows, query_length, stride_on, value_scale_ptr, kv_place, HEAD_DIM, BLOCK_D, FP8
    )
    if HAS_SKIP:
        tl.atomic_add(skipped_ptr + place * mask_rows + row, skipped)


def select_quantized_config(
    block_d: int,
    block_size: tuple[int, int],
    dtype: torch.dtype,
    quantization: str,
    *,
    skips: bool,
    large: bool = True,
) -> QuantizedTileConfig:
    """Tile for a padded head dimension, mask block, dtype and quantisation; it divides the mask block.

    With FP8 or skipping it is that of :func:`kernels_common.block_sparse_quantized_reference.skip_tile`:
    what is skipped, and how weights are rounded under the running maximum, depends on the tile. The other
    ``large`` ones (:func:`holds_large_tiles`) are the fastest of those tried on an H200. A limit on
    registers lets one more program share a multiprocessor there.
    """
    tile_m, tile_n = skip_tile(block_size)
    narrow = dtype != torch.float32 and block_d <= 128
    if not narrow:
        if not skips and quantization != "int8_fp8":
            tile_n = math.gcd(tile_n, 32)
        return QuantizedTileConfig(tile_m, tile_n, 8 if block_d > 128 else 4, 1, None)
    if skips:
        return QuantizedTileConfig(tile_m, tile_n, 4, 2, None)
    if not large:
        warps = 4
        if quantization != "int8_fp8":
            tile_m, tile_n, warps = (tile_m, 64, 4) if block_d <= 64 else (128, 64, 8)
        tile = divide_tile(TileConfig(tile_m, tile_n, warps, 2), block_size)
        return QuantizedTileConfig(*tile, None)
    if quantization != "int8_fp8" and block_d == 128:
        return QuantizedTileConfig(math.gcd(block_size[0], 128), math.gcd(tile_n, 64), 4, 3, None)
    stages = 2 if tile_n == 128 else 3
    return QuantizedTileConfig(tile_m, tile_n, 4, stages, 128 if block_d <= 64 else 168)


def quantized_triton_obstacle(
    query: torch.Tensor, block_size: tuple[int, int], quantization: str, *, skips: bool = False
) -> str | None:
    """Why :func:`block_sparse_attention_quantized_triton` cannot take such a call, or None."""
    interpreted = not isinstance(block_sparse_quantized_fwd_kernel, triton.JITFunction)
    on_cuda, fp8 = query.device.type == "cuda", quantization == "int8_fp8"
    capability = torch.cuda.get_device_capability(query.device) if on_cuda and fp8 else FP8_CAPABILITY
    large = query.dtype == torch.float32 and query.shape[-1] > SKIP_MAX_FP32_HEAD_DIM
    checks = (
        (on_cuda or interpreted, f"needs a CUDA device (or TRITON_INTERPRET=1), got {query.device}"),
        (not interpreted or not fp8, "takes no FP8 in Triton's interpreter, which computes it wrongly"),
        (
            not interpreted or query.dtype != torch.bfloat16,
            "takes no bf16 in Triton's interpreter, which computes it wrongly",
        ),
        (
            capability >= FP8_CAPABILITY,
            f"needs compute capability 8.9 for FP8, got {capability[0]}.{capability[1]}",
        ),
        (
            not fp8 or block_size[1] % FP8_KEY_BLOCK == 0,
            f"needs key blocks of a multiple of {FP8_KEY_BLOCK} for FP8, got {tuple(block_size)}",
        ),
        (
            fp8 or not (skips and large),
            f"skips tiles of fp32 up to {SKIP_MAX_FP32_HEAD_DIM} dimensions, got {query.shape[-1]}",
        ),
    )
    return next((f"backend 'triton' {message}" for passed, message in checks if not passed), None)


def block_sparse_attention_quantized_triton(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    quantization: str,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    skip_threshold: torch.Tensor | None = None,
    config: QuantizedTileConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Quantise the operands and launch the kernel.

    Arguments and results as in
    :func:`kernels_common.block_sparse_quantized_reference.block_sparse_attention_quantized_reference`; the
    output has the memory order of ``query``.

    Args:
        config (QuantizedTileConfig, Optional): tile and launch parameters, tiles dividing ``block_size``;
            with ``skip_threshold`` the tile is what is skipped. Default: the choice of
            :func:`select_quantized_config`

    Raises:
        UnsupportedCallError: :func:`quantized_triton_obstacle` names a reason.
    """
    skips = skip_threshold is not None
    if (obstacle := quantized_triton_obstacle(query, block_size, quantization, skips=skips)) is not None:
        raise UnsupportedCallError(f"{obstacle}; use backend='torch'")
    batch, heads, queries, head_dim = query.shape
    keys = key.shape[2]
    output = torch.empty_like(query)  # keeps the memory order of a dense query, whatever it is
    target = output if output.stride(3) == 1 else output.new_empty(output.shape)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    skipped = torch.zeros(batch, heads, counts.shape[2], dtype=torch.int32, device=query.device)
    block_d = max(32, triton.next_power_of_2(head_dim))
    config = config or select_quantized_config(
        block_d, block_size, query.dtype, quantization, skips=skips, large=holds_large_tiles(query)
    )
    query_scale = key_scale = value_scale = mean_scores = None
    precision = "tf32x3" if query.dtype == torch.float32 else "ieee"
    if quantization != "none":
        operands = quantize_query_key_triton(query, key, key_lengths=key_lengths)
        query, query_scale, key, key_scale, _, mean_scores = operands
    value_box = (config.tile_n, block_d)
    if quantization == "int8_fp8":
        value, value_scale = quantize_value_fp8_triton(value, key_lengths=key_lengths)
        value_box = (block_d, config.tile_n)
    query, key, value = (aligned(part) for part in (query, key, value))
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    key_lengths = None if key_lengths is None else key_lengths.contiguous()
    bias = None if bias is None else bias.to(torch.float32).contiguous()
    skip_threshold = None if skip_threshold is None else skip_threshold.contiguous()
    pointers = reads_pointers(query)
    with torch.cuda.device_of(query):
        block_sparse_quantized_fwd_kernel[(triton.cdiv(queries, config.tile_m), batch * heads)](
            *tile_source(query, config.tile_m, block_d, pointers),
            *tile_source(key, config.tile_n, block_d, pointers),
            *tile_source(value, *value_box, pointers), query_scale, key_scale, value_scale, mean_scores,
            target, lse, skipped, counts, indices, key_lengths, bias, skip_threshold,
            *target.stride()[:3],
            *list_strides(counts)[:2], *list_strides(indices)[:3], *bias_strides(bias),
            queries, keys, counts.shape[2], scale,
            QUERY_HEADS=heads, KV_GROUP=heads // key.shape[1],
            BIAS_GROUP=1 if bias is None else heads // bias.shape[1],
            HEAD_DIM=head_dim, BLOCK_D=block_d, TILE_M=config.tile_m, TILE_N=config.tile_n,
            MASK_M=block_size[0], MASK_N=block_size[1], GROUP=GROUP,
            INT8=quantization != "none", FP8=quantization == "int8_fp8",
            HAS_KEY_LENGTHS=key_lengths is not None, HAS_BIAS=bias is not None,
            HAS_SKIP=skips, POINTERS=pointers, PRECISION=precision,
            num_warps=config.num_warps, num_stages=config.num_stages, maxnreg=config.max_registers,
        )  # fmt: skip
    return (output if target is output else output.copy_(target)), lse, skipped
