"""BlockSparseStrategy: the common case of a method that is a block mask and perhaps a token order."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from core.block_mask import BlockSparseMask
from core.context import AttentionContext
from core.parameters import StrategyParameters
from core.strategy import AttentionResult, AttentionStrategy
from kernels_common.block_sparse_attention import attend_blocks
from kernels_common.permutation import gather_tokens, scatter_tokens


class BlockSparseParameters(StrategyParameters):
    """Parameters of every block-sparse strategy.

    Args:
        block_size (int): tokens of a query block and of a key block. Default: 128
        backend (str): form of the block-sparse operator. Default: ``"auto"``, the fastest for the call
    """

    block_size: Literal[64, 128] = Field(128, description="tokens of a query block and of a key block")
    backend: Literal["auto", "reference", "torch", "triton", "gluon", "flex", "flash4"] = Field(
        "auto", description="form of the block-sparse operator"
    )

    @field_validator("block_size", mode="before")
    @classmethod
    def _read_text(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdecimal() else value


@dataclass(frozen=True)
class SparsePattern:
    """What a block-sparse method decides for one call.

    Args:
        mask (BlockSparseMask): kept blocks, in the reordered sequence if there is an ``order``.
        density (float | Tensor): executed density of ``mask``; a float where it is known beforehand.
        order (Tensor, Optional): ``[S]`` or ``[B or 1, H or 1, S]`` int64; place ``i`` of the reordered
            sequence holds token ``order[i]``. Default: the model's order
        key_order (Tensor, Optional): order of keys and values where it is another one. Default: ``order``
        shares (Mapping[str, float | Tensor]): further figures for the report, see `AttentionResult`.
    """

    mask: BlockSparseMask
    density: float | torch.Tensor
    order: torch.Tensor | None = None
    key_order: torch.Tensor | None = None
    shares: Mapping[str, float | torch.Tensor] = field(default_factory=dict)


class BlockSparseStrategy(AttentionStrategy):
    """Reorder, attend over a block mask, restore the order; a method writes `pattern`."""

    Parameters: ClassVar[type[BlockSparseParameters]] = BlockSparseParameters

    @abstractmethod
    def pattern(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> SparsePattern:
        """The blocks and the token order of one call; tensors come in the model's order."""

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> AttentionResult:
        pattern = self.pattern(query, key, context)
        return attend_pattern(query, key, value, pattern, self.parameters.backend, causal=context.causal)


def attend_pattern(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    backend: str,
    *,
    causal: bool = False,
) -> AttentionResult:
    """Reorder the tokens, attend over the mask and restore the order.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        pattern (SparsePattern): mask and orders of this call.
        backend (str): form of the block-sparse operator, as in `block_sparse_attention`.
        causal (bool): no query sees a later key; not with an order. Default: False

    Returns:
        AttentionResult: output in the model's order.
    """
    if pattern.key_order is not None:
        key, value = gather_tokens((key, value), pattern.key_order)
        query = query if pattern.order is None else gather_tokens(query, pattern.order)
    elif pattern.order is not None:
        query, key, value = gather_tokens((query, key, value), pattern.order)
    result = attend_blocks(query, key, value, pattern.mask, causal=causal, backend=backend)
    output = result.output
    if pattern.order is not None:
        output = scatter_tokens(output, pattern.order)
    return AttentionResult(output, pattern.density, result.backend, pattern.shares)
