"""BlockSparseMask: the block-sparse pattern that every operator and strategy exchanges."""

from dataclasses import dataclass, replace

import torch
from torch.nn.attention.flex_attention import BlockMask

from core.argument_checks import check_block_shape, check_tensors_given
from core.errors import LayoutError


def block_count(length: int, block: int) -> int:
    """Blocks of ``block`` tokens that cover ``length`` tokens; the last one may be ragged."""
    return -(-length // block)


def block_lengths(length: int, block: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Valid tokens of every block, ``[ceil(length / block)]`` int64; only the last is shorter."""
    starts = torch.arange(0, length, block, device=device)
    return (length - starts).clamp(max=block)


@dataclass(frozen=True)
class BlockSparseMask:
    """Kept key blocks of every (batch, head, query block).

    Batch and head dimensions of size 1 stand for all batches or heads. Entries of ``indices`` past
    a row's count are undefined and never read. Every kept block is executed whole; only tokens past
    ``query_length`` and ``key_length`` are left out.

    Args:
        counts (Tensor): kept key blocks per row, ``[B or 1, H or 1, Mq]`` int32.
        indices (Tensor): ascending key block indices, ``[B or 1, H or 1, Mq, Kmax]`` int32.
        block_size (tuple[int, int]): tokens of a (query block, key block).
        query_length (int): query tokens; ``Mq = ceil(query_length / block_size[0])``.
        key_length (int): key tokens.

    Raises:
        LayoutError: shapes or dtypes do not fit together.
    """

    counts: torch.Tensor
    indices: torch.Tensor
    block_size: tuple[int, int]
    query_length: int
    key_length: int

    def __post_init__(self) -> None:
        check_tensors_given(counts=self.counts, indices=self.indices)
        check_block_shape(self.block_size, self.query_length, self.key_length)
        for label, tensor, dims in (("counts", self.counts, 3), ("indices", self.indices, 4)):
            if tensor.dtype != torch.int32 or tensor.dim() != dims:
                raise LayoutError(
                    f"BlockSparseMask.{label} must be int32 with {dims} dimensions, "
                    f"got {tensor.dtype} of shape {tuple(tensor.shape)}"
                )
        if self.indices.shape[:3] != self.counts.shape or self.counts.shape[2] != self.query_blocks:
            raise LayoutError(
                f"{self.query_length} queries in blocks of {self.block_size[0]} make "
                f"{self.query_blocks} rows; got counts {tuple(self.counts.shape)} and indices "
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
    def from_blocks(
        cls, blocks: torch.Tensor, block_size: tuple[int, int], query_length: int, key_length: int
    ) -> "BlockSparseMask":
        """Lists from a dense boolean block matrix, without a device synchronisation.

        Args:
            blocks (Tensor): ``[Mq, Mk]``, ``[H, Mq, Mk]`` or ``[B, H, Mq, Mk]`` bool; True is kept.
            block_size (tuple[int, int]): tokens of a (query block, key block).
            query_length (int): query tokens.
            key_length (int): key tokens.

        Raises:
            LayoutError: the matrix has another number of blocks than the lengths ask for, or is no matrix.
        """
        check_tensors_given(blocks=blocks)
        check_block_shape(block_size, query_length, key_length)
        expected = (block_count(query_length, block_size[0]), block_count(key_length, block_size[1]))
        if blocks.dtype != torch.bool or not 2 <= blocks.dim() <= 4 or tuple(blocks.shape[-2:]) != expected:
            raise LayoutError(
                f"a block matrix for {query_length} x {key_length} tokens in blocks of {block_size} must be "
                f"bool [..., {expected[0]}, {expected[1]}], got {blocks.dtype} {tuple(blocks.shape)}"
            )
        blocks = blocks[(None,) * (4 - blocks.dim())]
        counts = blocks.sum(-1, dtype=torch.int32)
        # A stable sort of "dropped" moves the kept columns to the front and leaves them ascending.
        indices = torch.argsort((~blocks).to(torch.int8), dim=-1, stable=True).to(torch.int32)
        return cls(counts, indices.contiguous(), block_size, query_length, key_length)

    @classmethod
    def full(
        cls,
        block_size: tuple[int, int],
        query_length: int,
        key_length: int,
        device: torch.device | str = "cpu",
    ) -> "BlockSparseMask":
        """The mask that keeps every block (density 1)."""
        check_block_shape(block_size, query_length, key_length)
        rows, columns = block_count(query_length, block_size[0]), block_count(key_length, block_size[1])
        blocks = torch.ones(rows, columns, dtype=torch.bool, device=device)
        return cls.from_blocks(blocks, block_size, query_length, key_length)

    def to_blocks(self) -> torch.Tensor:
        """Dense boolean block matrix, ``[B or 1, H or 1, Mq, Mk]``."""
        width = self.indices.shape[-1]
        listed = torch.arange(width, device=self.device) < self.counts[..., None]
        # Undefined entries past the count are sent to a spare column that is cut off.
        columns = self.indices.to(torch.int64).masked_fill(~listed, self.key_blocks)
        blocks = torch.zeros(*self.counts.shape, self.key_blocks + 1, dtype=torch.bool, device=self.device)
        return blocks.scatter_(-1, columns, True)[..., : self.key_blocks]

    def to_dense(self) -> torch.Tensor:
        """Token mask ``[B or 1, H or 1, Nq, Nk]`` bool. Quadratic memory: for references and tests."""
        rows, columns = self.block_size
        tokens = self.to_blocks().repeat_interleave(rows, -2).repeat_interleave(columns, -1)
        return tokens[..., : self.query_length, : self.key_length]

    def density(self) -> torch.Tensor:
        """Executed share of the (query, key) pairs, a 0-d float64 tensor on the mask's device.

        Ragged last blocks count with their valid tokens only; batches and heads weigh the same. Without a
        pair it is 0.
        """
        rows = block_lengths(self.query_length, self.block_size[0], self.device)
        columns = block_lengths(self.key_length, self.block_size[1], self.device)
        areas = self.to_blocks().to(torch.float64) @ columns.to(torch.float64)  # [B, H, Mq]
        kept = (areas @ rows.to(torch.float64)).mean()
        return kept / max(1, self.query_length * self.key_length)

    def transposed(self) -> "BlockSparseMask":
        """The mask with queries and keys exchanged: of every key block, the query blocks that keep it.

        Stays on the device, without a synchronisation.
        """
        rows, columns = self.block_size
        return BlockSparseMask.from_blocks(
            self.to_blocks().mT, (columns, rows), self.key_length, self.query_length
        )

    def to(self, device: torch.device | str) -> "BlockSparseMask":
        """The same mask on another device."""
        return replace(self, counts=self.counts.to(device), indices=self.indices.to(device))

    def to_flex(self) -> BlockMask:
        """torch's FlexAttention ``BlockMask`` with all blocks full (no ``mask_mod``)."""
        listed = torch.arange(self.indices.shape[-1], device=self.device) < self.counts[..., None]
        safe = self.indices.masked_fill(~listed, 0)
        width = self.key_blocks
        padded = torch.zeros(*self.counts.shape, width, dtype=torch.int32, device=self.device)
        padded[..., : safe.shape[-1]] = safe[..., :width]
        return BlockMask.from_kv_blocks(
            torch.zeros_like(self.counts),
            torch.zeros_like(padded),
            full_kv_num_blocks=self.counts,
            full_kv_indices=padded,
            BLOCK_SIZE=self.block_size,
            seq_lengths=(self.query_length, self.key_length),
        )

    @classmethod
    def from_flex(cls, block_mask: BlockMask) -> "BlockSparseMask":
        """Lists of a FlexAttention ``BlockMask``.

        Raises:
            LayoutError: it is no ``BlockMask``, or has partial blocks, which a ``BlockSparseMask`` cannot
                express.
        """
        if not isinstance(block_mask, BlockMask):
            raise LayoutError(f"expected a BlockMask of FlexAttention, got {type(block_mask).__name__}")
        counts, indices = block_mask.full_kv_num_blocks, block_mask.full_kv_indices
        if counts is None or indices is None or block_mask.kv_num_blocks.any():
            raise LayoutError(
                "a BlockSparseMask keeps or drops whole blocks; this BlockMask has partial blocks with a "
                "mask_mod. Round them to whole blocks first (BlockSparseMask.from_blocks)."
            )
        query_length, key_length = block_mask.seq_lengths
        rows, columns = block_mask.BLOCK_SIZE
        mask = cls(counts.to(torch.int32), indices.to(torch.int32), (rows, columns), query_length, key_length)
        return cls.from_blocks(mask.to_blocks(), mask.block_size, query_length, key_length)

    def check(self) -> None:
        """Test the lists themselves; synchronises with the device.

        Raises:
            LayoutError: a count is outside [0, Kmax], or a row is not strictly ascending in range.
        """
        width = self.indices.shape[-1]
        if bool(((self.counts < 0) | (self.counts > width)).any()):
            raise LayoutError(f"counts must lie in [0, {width}], got up to {int(self.counts.max())}")
        listed = torch.arange(width, device=self.device) < self.counts[..., None]
        inside = (self.indices >= 0) & (self.indices < self.key_blocks)
        rising = torch.ones_like(listed)
        rising[..., 1:] = self.indices[..., 1:] > self.indices[..., :-1]
        if bool((listed & ~(inside & rising)).any()):
            raise LayoutError(
                f"listed key blocks must ascend strictly within [0, {self.key_blocks}); "
                "sort each row and drop repeats"
            )
