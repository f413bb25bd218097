"""BlockSparseStrategy: the common case of a method that is a block mask and perhaps a token order."""

import functools
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from pydantic import Field, field_validator

from core.block_mask import BlockSparseMask, block_lengths
from core.context import AttentionContext
from core.errors import UnsupportedCallError
from core.level_mask import LevelMask
from core.parameters import StrategyParameters
from core.strategy import AttentionResult, AttentionStrategy
from kernels_common.block_sparse_attention import BlockSparseOutput, attend_blocks
from kernels_common.block_sparse_quantized_reference import skip_tile
from kernels_common.mask_density import mask_density
from kernels_common.pooled_attention import pooled_attention, resolve_pooled_backend
from kernels_common.token_orders import TokenOrders, gather_call, scatter_output


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
        mask (BlockSparseMask | LevelMask): kept blocks, whole or each at its level, in the reordered sequence
            if there is an ``order``.
        known_density (float | Tensor, Optional): executed density where it is known beforehand or is not that
            of ``mask``. Default: counted from ``mask`` when it is asked for
        order (Tensor, Optional): ``[S]`` or ``[B or 1, H or 1, S]`` int32 or int64; place ``i`` of the
            reordered sequence holds token ``order[i]``. Default: the model's order
        key_order (Tensor, Optional): order of keys and values where it is another one. Default: ``order``
        shares (Mapping[str, float | Tensor]): further figures for the report, see `AttentionResult`.
        quantization (str): precision of the operands, see `block_sparse_attention`. Default: ``"none"``
        skip_threshold (Tensor, Optional): ``[H]`` fp32, see `attend_blocks`. Default: no tile is skipped
    """

    mask: BlockSparseMask | LevelMask
    known_density: float | torch.Tensor | None = None
    order: torch.Tensor | None = None
    key_order: torch.Tensor | None = None
    shares: Mapping[str, float | torch.Tensor] = field(default_factory=dict)
    quantization: str = "none"
    skip_threshold: torch.Tensor | None = None

    @functools.cached_property
    def density(self) -> float | torch.Tensor:
        """Executed share of all (query, key) pairs; `attend_pattern` asks behind its attention."""
        return mask_density(self.mask) if self.known_density is None else self.known_density


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
        backend (str): form of the operator, as in `block_sparse_attention` or `pooled_attention`.
        causal (bool): no query sees a later key; not with an order or pooled blocks. Default: False

    Returns:
        AttentionResult: output in the model's order. Where tiles may be skipped, the density is the mean of
        the two shares ``qk_density``, tiles whose scores were computed, and ``pv_density``, those that were
        multiplied with their values too.
    """
    mask = pattern.mask
    orders = TokenOrders(pattern.order, pattern.order if pattern.key_order is None else pattern.key_order)
    if isinstance(mask, LevelMask):
        result = _attend_levels(query, key, value, pattern, mask, orders, backend, causal)
    else:
        result = attend_blocks(
            query, key, value, mask, query_order=orders.query, key_order=orders.key, causal=causal,
            quantization=pattern.quantization, skip_threshold=pattern.skip_threshold, backend=backend,
        )  # fmt: skip
    if result.skipped is None or isinstance(mask, LevelMask):
        return AttentionResult(result.output, pattern.density, result.backend, pattern.shares)
    multiplied = pattern.density * multiplied_share(mask, result.skipped)
    shares = {**pattern.shares, "qk_density": pattern.density, "pv_density": multiplied}
    return AttentionResult(result.output, (pattern.density + multiplied) / 2, result.backend, shares)


def _attend_levels(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pattern: SparsePattern,
    mask: LevelMask,
    orders: TokenOrders,
    backend: str,
    causal: bool,
) -> BlockSparseOutput:
    """Attention over pooled blocks, which knows neither causal calls nor 8-bit operands nor skipped tiles."""
    if causal or pattern.quantization != "none" or pattern.skip_threshold is not None:
        raise UnsupportedCallError(
            "pooled blocks are for plain attention, not causal, quantized or with a skip threshold; use a "
            "BlockSparseMask"
        )
    backend = resolve_pooled_backend(query, backend)
    output = pooled_attention(*gather_call(query, key, value, orders), mask, backend=backend)
    return BlockSparseOutput(scatter_output(output, orders.query, query), None, backend)


def multiplied_share(mask: BlockSparseMask, skipped: torch.Tensor) -> torch.Tensor:
    """Share of the tiles of kept blocks that were not skipped, a 0-d float64 tensor; 1 where none is kept.

    Args:
        mask (BlockSparseMask): the mask of the call.
        skipped (Tensor): skipped tiles of every row, ``[B, H, Mq]`` int32, of `attend_blocks`.
    """
    tile = skip_tile(mask.block_size)
    tile_rows = block_lengths(mask.query_length, mask.block_size[0], mask.device).add_(tile[0] - 1) // tile[0]
    tiles = mask.counts * tile_rows * (mask.block_size[1] // tile[1])
    total = tiles.expand_as(skipped).sum(dtype=torch.float64)
    return 1.0 - skipped.sum(dtype=torch.float64) / total.clamp(min=1)
