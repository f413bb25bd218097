"""Triton kernels of token merging: best destination of every source, and means of groups of tokens.

Shape letters: S sources of a tile, C candidates of a step, R groups of a program, D head dimension
padded to a power of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_common.permutation import gather_tokens
from kernels_common.triton_launch import holds_large_tiles, reads_pointers
from plugins.tome.partition import Partition

SMALLEST_LENGTH = 1e-12  # as torch.nn.functional.normalize
LARGEST_ROW_BYTES = 512
MOST_CANDIDATES = 128


@triton.jit
def source_tile(base_ptr, tokens, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some tokens of one head, ``[S, D]``, and their squared lengths ``[S]``."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base_ptr + tokens[:, None] * stride + dims[None, :]
    tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    wide = tile.to(tl.float32)
    return tile, tl.sum(wide * wide, 1)


@triton.jit
def candidate_tile(
    near, program, start, rows, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, LISTED: tl.constexpr
):
    """Candidates ``[C, D]``: the given rows of all heads' together, or those of one head from ``start``."""
    if LISTED:
        dims = tl.arange(0, BLOCK_D)
        pointers = near + rows[:, None] * HEAD_DIM + dims[None, :]
        tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    else:
        tile = near.load([program, start, 0]).reshape(rows.shape[0], BLOCK_D)
    return tile


# Lengths change with every size; specialising on them would recompile. Strides of tokens are multiples of the
# head dimension whatever the size, and must be known as such for loads of 16 bytes.
@triton.jit(do_not_specialize=["num_sources", "num_near", "num_candidates", "candidate_stride"])
def best_destination_kernel(
    key_ptr,
    value_ptr,
    near_key,
    near_value,
    near_lengths_ptr,
    sources_ptr,
    tiles_ptr,
    candidates_ptr,
    similarity_ptr,
    place_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    num_sources,
    num_near,
    num_candidates,
    candidate_stride,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_C: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    LISTED: tl.constexpr,
    SMALLEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running maximum over the candidates of one tile of sources: grid ``(tiles, B * H)``.

    ``near_key`` and ``near_value`` hold the destinations: pointers where the candidates of a tile are LISTED,
    otherwise descriptors of all of them in order. The dot products of keys and of values share one
    accumulator; the products of lengths are a rank-2 term, so feature vectors are never written.
    """
    tile = tl.program_id(0)
    program = tl.program_id(1)
    row = program.to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    places = tl.load(tiles_ptr + tile * TILE_S + tl.arange(0, TILE_S))
    tokens = tl.load(sources_ptr + places)  # int64
    key_base = key_ptr + batch * stride_kb + head * stride_kh
    key_tile, key_square = source_tile(key_base, tokens, stride_kn, HEAD_DIM, BLOCK_D)
    length = tl.sqrt(key_square)
    if WITH_VALUES:
        value_base = value_ptr + batch * stride_vb + head * stride_vh
        value_tile, value_square = source_tile(value_base, tokens, stride_vn, HEAD_DIM, BLOCK_D)
        key_length, value_length = length, tl.sqrt(value_square)
        length = tl.sqrt(2.0 * (key_square + value_square))

    near_lengths_ptr += row * num_near * 3  # [3, num_near], see _near_lengths
    candidates_ptr += tile * candidate_stride
    best = tl.full([TILE_S], float("-inf"), dtype=tl.float32)
    found = tl.zeros([TILE_S], dtype=tl.int32)
    columns = tl.arange(0, TILE_C)
    for start in range(0, num_candidates, TILE_C):
        near = start + columns
        if LISTED:  # past the end the last candidate comes again: it does not beat itself
            near = tl.load(candidates_ptr + tl.minimum(near, num_candidates - 1))
        rows = row * num_near + near
        near_tile = candidate_tile(near_key, program, start, rows, HEAD_DIM, BLOCK_D, LISTED)
        scores = tl.dot(key_tile, near_tile.T, input_precision=PRECISION)  # [S, C]
        scale = tl.load(near_lengths_ptr + near)
        if WITH_VALUES:
            near_tile = candidate_tile(near_value, program, start, rows, HEAD_DIM, BLOCK_D, LISTED)
            scores = tl.dot(value_tile, near_tile.T, scores, input_precision=PRECISION)
            key_share = tl.load(near_lengths_ptr + num_near + near)
            value_share = tl.load(near_lengths_ptr + 2 * num_near + near)
            # As fused multiply-adds onto the scores; outer products alone would change their layout.
            scores = tl.fma(key_length[:, None], key_share[None, :], scores * scale[None, :])
            scores = tl.fma(value_length[:, None], value_share[None, :], scores)
        else:
            scores = scores * scale[None, :]
        top = tl.max(scores, 1)
        first = tl.min(tl.where(scores == top[:, None], columns[None, :], TILE_C), 1)
        found = tl.where(top > best, start + first, found)
        best = tl.maximum(top, best)

    destinations = tl.load(candidates_ptr + tl.minimum(found, num_candidates - 1))
    outputs = row * num_sources + places
    tl.store(similarity_ptr + outputs, best / tl.maximum(length, SMALLEST))
    tl.store(place_ptr + outputs, destinations.to(tl.int64))


@triton.jit(do_not_specialize=["merged_length", "stride_ob", "stride_oh", "stride_sb", "stride_sh"])
def group_mean_kernel(
    tokens_ptr,
    merged_ptr,
    order_ptr,
    starts_ptr,
    stride_tb,
    stride_th,
    stride_tn,
    stride_ob,
    stride_oh,
    stride_sb,
    stride_sh,
    merged_length,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_R: tl.constexpr,
    STEP: tl.constexpr,
):
    """Mean of the members of each group, summed in fp32: grid ``(ceil(K / TILE_R), B * H)``."""
    rows = tl.program_id(0) * TILE_R + tl.arange(0, TILE_R)
    in_range = rows < merged_length
    program = tl.program_id(1).to(tl.int64)
    batch, head = program // HEADS, program % HEADS
    order_ptr += batch * stride_ob + head * stride_oh
    starts_ptr += batch * stride_sb + head * stride_sh
    begin = tl.load(starts_ptr + rows, mask=in_range, other=0)
    count = tl.load(starts_ptr + rows + 1, mask=in_range, other=0) - begin
    dims = tl.arange(0, BLOCK_D)
    in_head = dims < HEAD_DIM
    base = tokens_ptr + batch * stride_tb + head * stride_th
    total = tl.zeros([TILE_R, BLOCK_D], dtype=tl.float32)
    for start in range(0, tl.max(count), STEP):
        for place in tl.static_range(STEP):  # loads that do not wait for each other
            inside = start + place < count
            member = tl.load(order_ptr + begin + start + place, mask=inside, other=0).to(tl.int64)
            pointers = base + member[:, None] * stride_tn + dims[None, :]
            values = tl.load(pointers, mask=inside[:, None] & in_head[None, :], other=0.0)
            total += values.to(tl.float32)
    mean = total / tl.maximum(count, 1).to(tl.float32)[:, None]
    targets = merged_ptr + (program * merged_length + rows)[:, None] * HEAD_DIM + dims[None, :]
    tl.store(targets, mean.to(merged_ptr.dtype.element_ty), mask=in_range[:, None] & in_head[None, :])


class MatchConfig(NamedTuple):
    """Candidates per step and launch parameters of the matching kernel."""

    tile_c: int
    num_warps: int = 4
    num_stages: int = 2


class MeanConfig(NamedTuple):
    """Groups per program, members per step and launch parameters of the mean kernel."""

    tile_r: int = 16
    step: int = 2
    num_warps: int = 1


def supports_matching(key: torch.Tensor) -> bool:
    """Whether tiles of sources and candidates fit into shared memory, in fp32 those of both."""
    row_bytes = padded_head_dim(key.shape[3]) * key.element_size()
    small = key.dtype == torch.float32 and not holds_large_tiles(key)
    return row_bytes <= (LARGEST_ROW_BYTES // 2 if small else LARGEST_ROW_BYTES)


def select_match_config(key: torch.Tensor) -> MatchConfig:
    """The longer the rows, the fewer candidates per step, so that a step needs the same shared memory.

    A third stage is faster on an H200. Two tiles of sources per program, which would halve the reads of
    candidates, are slower there.
    """
    row_bytes = padded_head_dim(key.shape[3]) * key.element_size()
    tile_c = min(MOST_CANDIDATES, MOST_CANDIDATES * 128 // row_bytes)
    return MatchConfig(tile_c, num_stages=3 if holds_large_tiles(key) else 2)


def best_destinations_triton(
    key: torch.Tensor,
    value: torch.Tensor | None,
    partition: Partition,
    *,
    config: MatchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the matching kernel; see `plugins.tome.matching.best_destinations_torch`.

    Args:
        config (MatchConfig, Optional): tile and launch parameters. Default: `select_match_config`
    """
    batch, heads, _, head_dim = key.shape
    config = config or select_match_config(key)
    own = tuple(
        part if part.stride(3) == 1 else part.contiguous() for part in (key, value) if part is not None
    )
    tiles, candidates = partition.tiles, partition.candidates
    aligned = head_dim * key.element_size() % 16 == 0  # what a descriptor can address
    listed = len(candidates) > 1 or not aligned or reads_pointers(key)
    near = _gather_near(own, partition.destinations, 1 if listed else config.tile_c)
    shape = (batch, heads, len(partition.sources))
    similarity = torch.empty(shape, dtype=torch.float32, device=key.device)
    place = torch.empty(shape, dtype=torch.int64, device=key.device)
    block_d = padded_head_dim(head_dim)
    near_tiles = near if listed else tuple(_descriptor(part, config.tile_c, block_d) for part in near)
    with torch.cuda.device_of(key):
        # Without values the last of each pair is the key again, and not read.
        best_destination_kernel[(len(tiles), batch * heads)](
            own[0], own[-1], near_tiles[0], near_tiles[-1], _near_lengths(near),
            partition.sources, tiles, candidates, similarity, place,
            *own[0].stride()[:3], *own[-1].stride()[:3],
            len(partition.sources), near[0].shape[2], candidates.shape[1],
            candidates.stride(0) if len(candidates) > 1 else 0,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=block_d, TILE_S=tiles.shape[1], TILE_C=config.tile_c,
            WITH_VALUES=value is not None, LISTED=listed, SMALLEST=SMALLEST_LENGTH,
            PRECISION="tf32x3" if key.dtype == torch.float32 else "ieee",
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return similarity, place


def group_means_triton(
    tokens: torch.Tensor, order: torch.Tensor, starts: torch.Tensor, *, config: MeanConfig | None = None
) -> torch.Tensor:
    """Launch the mean kernel; arguments as the fields of `plugins.tome.merging.MergeMap`."""
    config = config or MeanConfig()
    batch, heads, _, head_dim = tokens.shape
    tokens = tokens if tokens.stride(3) == 1 else tokens.contiguous()
    order, starts = (part.contiguous().expand(batch, heads, -1) for part in (order, starts))
    length = starts.shape[2] - 1
    merged = torch.empty(batch, heads, length, head_dim, dtype=tokens.dtype, device=tokens.device)
    with torch.cuda.device_of(tokens):
        group_mean_kernel[(triton.cdiv(length, config.tile_r), batch * heads)](
            tokens, merged, order, starts,
            *tokens.stride()[:3], *order.stride()[:2], *starts.stride()[:2], length,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
            TILE_R=config.tile_r, STEP=config.step, num_warps=config.num_warps,
        )  # fmt: skip
    return merged


def padded_head_dim(head_dim: int) -> int:
    """Head dimension of a tile: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(head_dim))


def _gather_near(
    own: tuple[torch.Tensor, ...], destinations: torch.Tensor, multiple: int
) -> tuple[torch.Tensor, ...]:
    """Destinations side by side, ``[B, H, N, D]``, filled up with the first, which does not beat itself."""
    filling = destinations[:1].expand(-len(destinations) % multiple)
    return gather_tokens(own, torch.cat([destinations, filling]))


def _descriptor(near: torch.Tensor, tile_c: int, block_d: int) -> TensorDescriptor:
    """Tiles of one head of a contiguous ``[B, H, N, D]`` tensor."""
    rows = near.flatten(0, 1)
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), [1, tile_c, block_d])


def _near_lengths(near: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Per destination 1 / |m| and, with values, |k| / |m| and |v| / |m|; ``[B, H, 3, Nd]`` fp32.

    ``m`` is the feature vector before it is normalised: ``[k, |k|, v, |v|]``, or ``k`` alone.
    """
    lengths = [part.norm(dim=-1, dtype=torch.float32) for part in near]
    if len(lengths) == 1:
        return torch.stack([1 / lengths[0].clamp(min=SMALLEST_LENGTH)] * 3, dim=2)
    scale = 1 / (2 * (lengths[0].square() + lengths[1].square())).sqrt().clamp(min=SMALLEST_LENGTH)
    return torch.stack([scale, lengths[0] * scale, lengths[1] * scale], dim=2)
