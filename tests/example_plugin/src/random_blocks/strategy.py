"""RandomBlocksStrategy: every query block looks at itself and at random key blocks."""

from typing import ClassVar

import torch
from pydantic import Field

from core import AttentionContext, BlockSparseMask, call_generator
from core.block_mask import block_count
from kernels_common.strategy import BlockSparseParameters, BlockSparseStrategy, SparsePattern


class RandomBlocksParameters(BlockSparseParameters):
    """Parameters of `RandomBlocksStrategy`.

    Args:
        keep_ratio (float): chance of each key block to be kept, (0, 1]. Default: 0.5
        seed (int): seed of the choice. Default: 0
    """

    keep_ratio: float = Field(0.5, gt=0, le=1, description="chance of each key block to be kept")
    seed: int = Field(0, ge=0, description="seed of the choice")


class RandomBlocksStrategy(BlockSparseStrategy):
    """Keeps the diagonal and random key blocks, drawn anew for every head, layer and step."""

    name: ClassVar[str] = "random-blocks"
    Parameters: ClassVar[type[RandomBlocksParameters]] = RandomBlocksParameters

    @property
    def heads_alike(self) -> bool:
        """False: what is drawn belongs to a place among the heads."""
        return False

    def pattern(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> SparsePattern:
        length, size = query.shape[2], self.parameters.block_size
        rows = block_count(length, size)
        generator = call_generator(self.parameters.seed, context, query.device)
        chances = torch.rand(query.shape[1], rows, rows, generator=generator, device=query.device)
        diagonal = torch.eye(rows, dtype=torch.bool, device=query.device)
        kept = (chances < self.parameters.keep_ratio) | diagonal
        mask = BlockSparseMask.from_blocks(kept, (size, size), length, length)
        return SparsePattern(mask, mask.density())
