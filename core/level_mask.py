"""LevelMask: which key blocks each query block sees, and how coarsely each of them is pooled."""

from dataclasses import dataclass, replace

import torch

from core.argument_checks import check_block_shape, check_tensors_given
from core.block_mask import BlockSparseMask, block_count, block_lengths
from core.errors import LayoutError

LEVELS = (1, 2, 4, 8)


@dataclass(frozen=True)
class LevelMask:
    """Key blocks of every (batch, head, query block), each at its own pooling level.

    A key block of level 1 is seen as it is; one of level 2, 4 or 8 through the means of runs of so many
    consecutive keys and values. Batch and head dimensions of size 1 stand for all batches or heads.
    Entries of ``indices`` past a row's counts are undefined and never read.

    Args:
        counts (Tensor): listed key blocks per row and level of ``LEVELS``, ``[B or 1, H or 1, Mq, 4]``
            int32.
        indices (Tensor): key block indices, those of level 1 first, then 2, 4 and 8, ascending within
            a level, ``[B or 1, H or 1, Mq, Kmax]`` int32.
        block_size (tuple[int, int]): tokens of a (query block, key block); the latter a multiple of 8.
            `kernels_common.pooled_attention` takes multiples of 16 for both.
        query_length (int): query tokens; ``Mq = ceil(query_length / block_size[0])``.
        key_length (int): key tokens.

    Raises:
        LayoutError: shapes, dtypes, block size or lengths do not fit together.
    """

    counts: torch.Tensor
    indices: torch.Tensor
    block_size: tuple[int, int]
    query_length: int
    key_length: int

    def __post_init__(self) -> None:
        check_tensors_given(counts=self.counts, indices=self.indices)
        check_block_shape(self.block_size, self.query_length, self.key_length)
        for label, tensor in (("counts", self.counts), ("indices", self.indices)):
            if tensor.dtype != torch.int32 or tensor.dim() != 4:
                raise LayoutError(
                    f"LevelMask.{label} must be int32 with 4 dimensions, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if self.block_size[1] % LEVELS[-1]:
            raise LayoutError(
                f"key blocks must be multiples of {LEVELS[-1]} tokens, so that no pooled key straddles two "
                f"of them; got {self.block_size}"
            )
        rows = (*self.indices.shape[:2], self.query_blocks)
        if self.indices.shape[:3] != rows or self.counts.shape != (*rows, len(LEVELS)):
            raise LayoutError(
                f"{self.query_length} queries in blocks of {self.block_size[0]} make {self.query_blocks} "
                f"rows of {len(LEVELS)} levels; got counts {tuple(self.counts.shape)} and indices "
                f"{tuple(self.indices.shape)}"
            )

    @property
    def query_blocks(self) -> int:
        return block_count(self.query_length, self.block_size[0])

    @property
    def key_blocks(self) -> int:
        return block_count(self.key_length, self.block_size[1])

    @property
    def device(self) -> torch.device:
        return self.counts.device

    @classmethod
    def from_levels(
        cls, levels: torch.Tensor, block_size: tuple[int, int], query_length: int, key_length: int
    ) -> "LevelMask":
        """Lists from a dense matrix of levels, without a device synchronisation.

        Args:
            levels (Tensor): ``[Mq, Mk]``, ``[H, Mq, Mk]`` or ``[B, H, Mq, Mk]`` int8: 1, 2, 4 or 8; any
                other value, by custom 0, leaves the block out.
            block_size (tuple[int, int]): tokens of a (query block, key block).
            query_length (int): query tokens.
            key_length (int): key tokens.

        Raises:
            LayoutError: the matrix has another number of blocks than the lengths ask for.
        """
        check_tensors_given(levels=levels)
        check_block_shape(block_size, query_length, key_length)
        expected = (block_count(query_length, block_size[0]), block_count(key_length, block_size[1]))
        if levels.dtype != torch.int8 or not 2 <= levels.dim() <= 4 or tuple(levels.shape[-2:]) != expected:
            raise LayoutError(
                f"a level matrix for {query_length} x {key_length} tokens in blocks of {block_size} must be "
                f"int8 [..., {expected[0]}, {expected[1]}], got {levels.dtype} {tuple(levels.shape)}"
            )
        counts, indices = level_lists(levels[(None,) * (4 - levels.dim())])
        return cls(counts, indices, block_size, query_length, key_length)

    @classmethod
    def from_block_mask(cls, block_mask: BlockSparseMask) -> "LevelMask":
        """The same blocks, all at level 1.

        Raises:
            LayoutError: it is no ``BlockSparseMask``.
        """
        if not isinstance(block_mask, BlockSparseMask):
            raise LayoutError(f"expected a BlockSparseMask, got {type(block_mask).__name__}")
        counts = torch.zeros(
            *block_mask.counts.shape, len(LEVELS), dtype=torch.int32, device=block_mask.device
        )
        counts[..., 0] = block_mask.counts
        return cls(
            counts,
            block_mask.indices,
            block_mask.block_size,
            block_mask.query_length,
            block_mask.key_length,
        )

    def listed_levels(self) -> torch.Tensor:
        """Level of every entry of ``indices``, int8 of its shape; 0 past a row's counts."""
        place = torch.arange(self.indices.shape[-1], device=self.device)[:, None]
        rank = (place >= self.counts.cumsum(-1)[..., None, :]).sum(-1)  # 4 past all levels
        return (1 << rank).masked_fill(rank == len(LEVELS), 0).to(torch.int8)

    def to_levels(self) -> torch.Tensor:
        """Dense matrix of levels, ``[B or 1, H or 1, Mq, Mk]`` int8; 0 is left out."""
        listed = self.listed_levels()
        # Undefined entries past the counts are sent to a spare column that is cut off.
        columns = self.indices.to(torch.int64).masked_fill(listed == 0, self.key_blocks)
        levels = listed.new_zeros(*self.counts.shape[:3], self.key_blocks + 1)
        return levels.scatter_(-1, columns, listed)[..., : self.key_blocks]

    def density(self) -> torch.Tensor:
        """Executed share of the (query, key) pairs, a 0-d float64 tensor on the mask's device.

        A pooled key is one key, also the one that stands for fewer tokens at the end. Ragged last blocks
        count with their valid tokens and pooled keys only; batches and heads weigh the same. Without a pair
        it is 0.
        """
        rows = block_lengths(self.query_length, self.block_size[0], self.device).to(torch.float64)
        columns = block_lengths(self.key_length, self.block_size[1], self.device)
        levels = self.to_levels()
        areas = torch.zeros(levels.shape[:3], dtype=torch.float64, device=self.device)
        for level in LEVELS:
            pooled = (columns + level - 1) // level
            areas += (levels == level).to(torch.float64) @ pooled.to(torch.float64)
        return (areas @ rows).mean() / max(1, self.query_length * self.key_length)

    def transposed_lists(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The query blocks that see each key block, level by level, without a synchronisation.

        Returns:
            tuple[Tensor, Tensor]: ``counts`` ``[B or 1, H or 1, Mk, 4]`` and ``indices``
            ``[B or 1, H or 1, Mk, Mq]``, int32, in the order of the mask's own lists.
        """
        return level_lists(self.to_levels().transpose(-1, -2))

    def to(self, device: torch.device | str) -> "LevelMask":
        """The same mask on another device."""
        return replace(self, counts=self.counts.to(device), indices=self.indices.to(device))

    def check(self) -> None:
        """Test the lists themselves; synchronises with the device.

        Raises:
            LayoutError: counts are negative or exceed Kmax together, a level's list is not strictly
                ascending in range, or a row lists a block at two levels.
        """
        width = self.indices.shape[-1]
        if bool(((self.counts < 0).any(-1) | (self.counts.sum(-1) > width)).any()):
            raise LayoutError(
                f"counts must not be negative and sum to at most {width} over the levels, got "
                f"{int(self.counts.min())} to {int(self.counts.sum(-1).max())}"
            )
        listed = self.listed_levels()
        inside = (self.indices >= 0) & (self.indices < self.key_blocks)
        rising = torch.ones_like(inside)
        rising[..., 1:] = (self.indices[..., 1:] > self.indices[..., :-1]) | (
            listed[..., 1:] != listed[..., :-1]
        )
        if bool(((listed > 0) & ~(inside & rising)).any()):
            raise LayoutError(
                f"listed key blocks must ascend strictly within [0, {self.key_blocks}) in each level; "
                "sort each level and drop repeats"
            )
        if bool(((self.to_levels() > 0).sum(-1) != self.counts.sum(-1)).any()):
            raise LayoutError("a row lists a key block at two levels; keep one of them")


def level_lists(levels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Lists of a matrix of levels ``[..., M, N]`` int8.

    Returns:
        tuple[Tensor, Tensor]: ``counts`` per row and level ``[..., M, 4]``, and ``indices`` of the columns,
        level by level and ascending, ``[..., M, N]``; int32.
    """
    counts = torch.stack([(levels == level).sum(-1, dtype=torch.int32) for level in LEVELS], -1)
    rank = torch.full_like(levels, len(LEVELS), memory_format=torch.contiguous_format)
    for place, level in enumerate(LEVELS):
        rank.masked_fill_(levels == level, place)
    # A stable sort moves the columns that are left out to the end and keeps each level ascending.
    return counts, torch.argsort(rank, dim=-1, stable=True).to(torch.int32).contiguous()
