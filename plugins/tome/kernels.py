"""Triton kernels of matching: best destinations of sources, and the most similar sources.

Shape letters: S sources of a program, C candidates of a step, D head dimension padded to a power of two.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from kernels_common.selection_triton import MAX_KEY_BLOCKS, first_ranks, nth_largest, row_launch
from kernels_common.triton_launch import holds_large_tiles, reads_pointers
from plugins.tome.partition import Partition

SMALLEST_LENGTH = 1e-12  # as torch.nn.functional.normalize
LARGEST_ROW_BYTES = 512
CANDIDATES = 64
NEAR_ROWS = 32


@triton.jit
def token_tile(base_ptr, tokens, stride, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Some tokens of one head, ``[S, D]``, and their squared lengths ``[S]``."""
    dims = tl.arange(0, BLOCK_D)
    pointers = base_ptr + tokens[:, None] * stride + dims[None, :]
    tile = tl.load(pointers, mask=(dims < HEAD_DIM)[None, :], other=0.0)
    wide = tile.to(tl.float32)
    return tile, tl.sum(wide * wide, 1)


@triton.jit
def length_tile(key_length, value_length, MIDDLE: tl.constexpr, dtype: tl.constexpr):
    """Lengths of keys and values as one factor of a matrix product, ``[S, 16]``, 8 columns for each.

    A length is the sum of three parts in ``dtype``: high, middle and low. The product of two lengths is the
    sum of the six largest products of their parts, right to about 2^-23 in bf16: those of columns ``hmhmhl``,
    which ``MIDDLE`` 1 gives, and ``hhmmlh``, which ``MIDDLE`` 2 gives.
    """
    columns = tl.arange(0, 16)[None, :]
    length = tl.where(columns < 8, key_length[:, None], value_length[:, None])
    high = length.to(dtype)
    rest = length - high.to(tl.float32)
    middle = rest.to(dtype)
    low = (rest - middle.to(tl.float32)).to(dtype)
    columns %= 8
    part = tl.where(columns & MIDDLE == 0, high, middle)
    part = tl.where(columns == 6 - MIDDLE, low, part)
    return tl.where(columns < 6, part, 0.0).to(dtype)


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
@triton.jit(do_not_specialize=["num_destinations", "num_near"])
def near_kernel(
    key_ptr,
    value_ptr,
    destinations_ptr,
    near_key_ptr,
    near_value_ptr,
    lengths_ptr,
    scale_ptr,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_vb,
    stride_vh,
    stride_vn,
    num_destinations,
    num_near,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    SMALLEST: tl.constexpr,
):
    """Destinations side by side and what the matching needs of their lengths: grid ``(tiles, B * H)``."""
    places = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = places < num_near
    tokens = tl.load(destinations_ptr + tl.where(places < num_destinations, places, 0))  # int64
    program = tl.program_id(1).to(tl.int64)
    batch, head = program // HEADS, program % HEADS
    rows = program * num_near + places
    dims = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (dims < HEAD_DIM)
    key_base = key_ptr + batch * stride_kb + head * stride_kh
    tile, key_square = token_tile(key_base, tokens, stride_kn, HEAD_DIM, BLOCK_D)
    tl.store(near_key_ptr + rows[:, None] * HEAD_DIM + dims, tile, mask=mask)
    length = tl.sqrt(key_square)
    if WITH_VALUES:
        value_base = value_ptr + batch * stride_vb + head * stride_vh
        tile, value_square = token_tile(value_base, tokens, stride_vn, HEAD_DIM, BLOCK_D)
        tl.store(near_value_ptr + rows[:, None] * HEAD_DIM + dims, tile, mask=mask)
        lengths = length_tile(length, tl.sqrt(value_square), 2, lengths_ptr.dtype.element_ty)
        targets = lengths_ptr + rows[:, None] * 16 + tl.arange(0, 16)[None, :]
        tl.store(targets, lengths, mask=inside[:, None])
        length = tl.sqrt(2.0 * (key_square + value_square))
    tl.store(scale_ptr + rows, 1.0 / tl.maximum(length, SMALLEST), mask=inside)


@triton.jit(
    do_not_specialize=[
        "num_sources", "num_entries", "num_near", "num_candidates", "candidate_stride", "step_bits",
    ]
)  # fmt: skip
def best_destination_kernel(
    key_ptr,
    value_ptr,
    near_key,
    near_value,
    near_lengths,
    near_scale_ptr,
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
    num_entries,
    num_near,
    num_candidates,
    candidate_stride,
    step_bits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TILE_S: tl.constexpr,
    TILE_C: tl.constexpr,
    WITH_VALUES: tl.constexpr,
    LISTED: tl.constexpr,
    PACKED: tl.constexpr,
    SMALLEST: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Running maximum over the candidates of some sources: grid ``(ceil(entries / TILE_S), B * H)``.

    ``near_key``, ``near_value`` and ``near_lengths`` hold the destinations: pointers where the candidates of
    a tile are LISTED, otherwise descriptors of all of them in order. The products of keys, of values and of
    lengths share one accumulator, so feature vectors are never written. Scores are ``[C, S]``, so that what
    belongs to a candidate is one number per row of registers.

    Each of the C rows has a maximum of its own, and remembers the step of it; only after the last step they
    are compared. PACKED keeps that step in the lowest bits of the score, those of the mask ``step_bits``: a
    maximum is then one comparison, and scores that differ by less count as equal. The first of equals wins,
    but of negative ones that are PACKED the last.
    """
    tile = tl.program_id(0)
    program = tl.program_id(1)
    row = program.to(tl.int64)
    batch, head = row // HEADS, row % HEADS
    entries = tl.minimum(tile * TILE_S + tl.arange(0, TILE_S), num_entries - 1)
    places = tl.load(tiles_ptr + entries)
    tokens = tl.load(sources_ptr + places)  # int64
    key_base = key_ptr + batch * stride_kb + head * stride_kh
    key_tile, key_square = token_tile(key_base, tokens, stride_kn, HEAD_DIM, BLOCK_D)
    length = tl.sqrt(key_square)
    if WITH_VALUES:
        value_base = value_ptr + batch * stride_vb + head * stride_vh
        value_tile, value_square = token_tile(value_base, tokens, stride_vn, HEAD_DIM, BLOCK_D)
        lengths = length_tile(length, tl.sqrt(value_square), 1, key_ptr.dtype.element_ty)
        length = tl.sqrt(2.0 * (key_square + value_square))

    candidates_ptr += tile * candidate_stride
    best = tl.full([TILE_C, TILE_S], float("-inf"), dtype=tl.float32)
    found = tl.zeros([TILE_C, TILE_S], dtype=tl.int32)
    columns = tl.arange(0, TILE_C)
    for step in range(0, tl.cdiv(num_candidates, TILE_C)):
        start = step * TILE_C
        near = start + columns
        if LISTED:  # past the end the first candidate comes again
            near = tl.load(candidates_ptr + tl.where(near < num_candidates, near, 0))
        rows = row * num_near + near
        scale = tl.load(near_scale_ptr + rows)
        near_tile = candidate_tile(near_key, program, start, rows, HEAD_DIM, BLOCK_D, LISTED)
        scores = tl.dot(near_tile, key_tile.T, input_precision=PRECISION)  # [C, S]
        if WITH_VALUES:
            near_tile = candidate_tile(near_value, program, start, rows, HEAD_DIM, BLOCK_D, LISTED)
            scores = tl.dot(near_tile, value_tile.T, scores, input_precision=PRECISION)
            near_tile = candidate_tile(near_lengths, program, start, rows, 16, 16, LISTED)
            scores = tl.dot(near_tile, lengths.T, scores, input_precision=PRECISION)
        scores *= scale[:, None]
        if PACKED:
            scores = ((scores.to(tl.int32, bitcast=True) & ~step_bits) | (step_bits - step)).to(
                tl.float32, bitcast=True
            )
        else:
            found = tl.where(scores > best, step, found)
        best = tl.maximum(scores, best)

    if PACKED:
        bits = best.to(tl.int32, bitcast=True)
        found = step_bits - (bits & step_bits)
        best = (bits & ~step_bits).to(tl.float32, bitcast=True)
    top = tl.max(best, 0)
    found = found * TILE_C + columns[:, None]
    first = tl.min(tl.where(best == top[None, :], found, num_candidates), 0)
    # Candidates past the end repeat the first, and where nothing is a number none is found.
    first = tl.where(first < num_candidates, first, 0)
    outputs = row * num_sources + places
    tl.store(similarity_ptr + outputs, top / tl.maximum(length, SMALLEST))
    tl.store(place_ptr + outputs, tl.load(candidates_ptr + first).to(tl.int64))


@triton.jit(do_not_specialize=["num_sources", "number"])
def most_similar_kernel(similarity_ptr, merged_ptr, num_sources, number, K: tl.constexpr):
    """Choice of ``number`` sources of one head, which stay in registers: grid ``(B * H,)``.

    Similarities become patterns that order as they do: those below 2 have 30 bits and a sign. What is larger,
    or no number, counts as equal and largest.
    """
    columns = tl.arange(0, K)
    inside = columns < num_sources
    places = tl.program_id(0).to(tl.int64) * num_sources + columns
    values = tl.load(similarity_ptr + places, mask=inside, other=0.0)
    size = tl.minimum(values.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x3FFFFFFF)
    patterns = 0x40000000 + tl.where(values < 0, -size, size)
    patterns = tl.where(inside, patterns, -1)
    kept = first_ranks(patterns, nth_largest(patterns, number), number)
    tl.store(merged_ptr + places, kept.to(tl.int8), mask=inside)


class MatchConfig(NamedTuple):
    """Candidates per step, tiles of sources per program and launch parameters of the matching kernel."""

    tile_c: int
    tiles: int = 1
    num_warps: int = 4
    num_stages: int = 2


class Near(NamedTuple):
    """Destinations side by side: N of them.

    Args:
        tokens (tuple[Tensor, ...]): keys, and values where they are compared, ``[B, H, N, D]``.
        lengths (Tensor): `length_tile` of the destinations, ``[B, H, N, 16]`` in the dtype of the tokens; not
            filled without values.
        scale (Tensor): 1 / |m|, ``[B, H, N]`` fp32, where ``m`` is the feature vector before it is
            normalised: ``[k, |k|, v, |v|]``, or ``k`` alone.
    """

    tokens: tuple[torch.Tensor, ...]
    lengths: torch.Tensor
    scale: torch.Tensor


def supports_matching(key: torch.Tensor) -> bool:
    """Whether tiles of sources and candidates fit into shared memory, in fp32 those of both."""
    row_bytes = padded_head_dim(key.shape[3]) * key.element_size()
    small = key.dtype == torch.float32 and not holds_large_tiles(key)
    return row_bytes <= (LARGEST_ROW_BYTES // 2 if small else LARGEST_ROW_BYTES)


def select_match_config(key: torch.Tensor) -> MatchConfig:
    """Tiles that fit into shared memory; the longer the rows, the fewer tokens.

    Every program reads all candidates of a head, so two tiles of sources halve what comes from the L2 cache.
    In 16 bits and head dimension 64, 64 candidates a step then fill the registers of four warps, and three
    programs fit on a multiprocessor. Exact products in fp32 take more registers.
    """
    exact = key.dtype == torch.float32
    row_bytes = padded_head_dim(key.shape[3]) * key.element_size()
    if not holds_large_tiles(key):
        return MatchConfig(CANDIDATES // 2 if exact or row_bytes > 256 else CANDIDATES)
    if exact:
        return MatchConfig(CANDIDATES, num_warps=8)
    return MatchConfig(CANDIDATES, tiles=2 if row_bytes <= 256 else 1)


def best_destinations_triton(
    key: torch.Tensor,
    value: torch.Tensor | None,
    partition: Partition,
    *,
    config: MatchConfig | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the matching kernel; see `plugins.tome.matching.best_destinations_torch`.

    With 16-bit tokens a similarity loses its lowest bits, as many as the number of steps has, and of the
    destinations that differ by less any may be taken: by 2^-18 of it with 1,800 destinations. In fp16, tokens
    whose key or value is longer than 65,504 compare as no numbers do.

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
    near = near_triton(own, partition.destinations, 1 if listed else config.tile_c)
    shape = (batch, heads, len(partition.sources))
    similarity = torch.empty(shape, dtype=torch.float32, device=key.device)
    place = torch.empty(shape, dtype=torch.int64, device=key.device)
    # Without values the last of each pair is the key again, and not read.
    near_tiles = (near.tokens[0], near.tokens[-1], near.lengths)
    if not listed:
        near_tiles = tuple(_descriptor(part, config.tile_c) for part in near_tiles)
    tile_s = tiles.shape[1] * (config.tiles if len(candidates) == 1 else 1)
    steps = triton.cdiv(candidates.shape[1], config.tile_c)
    with torch.cuda.device_of(key):
        best_destination_kernel[(triton.cdiv(tiles.numel(), tile_s), batch * heads)](
            own[0], own[-1], *near_tiles, near.scale,
            partition.sources, tiles, candidates, similarity, place,
            *own[0].stride()[:3], *own[-1].stride()[:3],
            len(partition.sources), tiles.numel(), near.scale.shape[2], candidates.shape[1],
            candidates.stride(0) if len(candidates) > 1 else 0, (1 << (steps - 1).bit_length()) - 1,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
            TILE_S=tile_s, TILE_C=config.tile_c, WITH_VALUES=value is not None, LISTED=listed,
            PACKED=key.element_size() == 2, SMALLEST=SMALLEST_LENGTH,
            PRECISION="tf32x3" if key.dtype == torch.float32 else "ieee",
            num_warps=config.num_warps, num_stages=config.num_stages,
        )  # fmt: skip
    return similarity, place


def near_triton(own: tuple[torch.Tensor, ...], destinations: torch.Tensor, multiple: int) -> Near:
    """Launch the kernel that gathers destinations, filled up with the first to a multiple of a length.

    Args:
        own (tuple[Tensor, ...]): keys, and values where they are compared, ``[B, H, S, D]``, last dimension
            contiguous.
        destinations (Tensor): tokens, ``[Nd]`` int64.
        multiple (int): of which N shall be.
    """
    key, value = own[0], own[-1]
    batch, heads, _, head_dim = key.shape
    number = triton.cdiv(len(destinations), multiple) * multiple
    near = Near(
        tuple(key.new_empty(batch, heads, number, head_dim) for _ in own),
        key.new_empty(batch, heads, number, 16),
        key.new_empty(batch, heads, number, dtype=torch.float32),
    )
    with torch.cuda.device_of(key):
        near_kernel[(triton.cdiv(number, NEAR_ROWS), batch * heads)](
            key, value, destinations, near.tokens[0], near.tokens[-1], near.lengths, near.scale,
            *key.stride()[:3], *value.stride()[:3], len(destinations), number,
            HEADS=heads, HEAD_DIM=head_dim, BLOCK_D=padded_head_dim(head_dim),
            ROWS=NEAR_ROWS, WITH_VALUES=len(own) > 1, SMALLEST=SMALLEST_LENGTH,
        )  # fmt: skip
    return near


def supports_choice(similarity: torch.Tensor) -> bool:
    """Whether the similarities of a head fit into the registers of a program."""
    return similarity.shape[2] <= MAX_KEY_BLOCKS


def most_similar_triton(similarity: torch.Tensor, r: int) -> torch.Tensor:
    """Launch the kernel; see `plugins.tome.merging.most_similar`."""
    similarity = similarity.contiguous()
    merged = torch.empty(similarity.shape, dtype=torch.bool, device=similarity.device)
    with torch.cuda.device_of(similarity):
        most_similar_kernel[(similarity.shape[:2].numel(),)](
            similarity, merged.view(torch.int8), similarity.shape[2], r, **row_launch(similarity.shape[2])
        )
    return merged


def padded_head_dim(head_dim: int) -> int:
    """Head dimension of a tile: a power of two that a matrix product takes."""
    return max(16, triton.next_power_of_2(head_dim))


def _descriptor(near: torch.Tensor, tile_c: int) -> TensorDescriptor:
    """Tiles of one head of a contiguous ``[B, H, N, D]`` tensor."""
    rows = near.flatten(0, 1)
    return TensorDescriptor(
        rows, list(rows.shape), list(rows.stride()), [1, tile_c, padded_head_dim(rows.shape[2])]
    )
