"""SlidingTileStrategy: a fixed block mask, a window of whole tiles around every tile."""

from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator

from core.block_mask import BlockSparseMask
from core.context import AttentionContext
from core.layout import TokenLayout
from core.strategy import Capabilities
from kernels_common.strategy import BlockSparseParameters, BlockSparseStrategy, SparsePattern
from plugins.sliding_tile.mask import half_window, sliding_tile_mask, window_for_density
from plugins.sliding_tile.tiles import Box, Tiling, fitting_tile

RULES = ("window", "density", "heads")


def _read_box(value: Any) -> Any:
    whole = isinstance(value, list | tuple) and all(type(side) is int and side > 0 for side in value)
    if not whole or len(value) != 3:
        raise ValueError("expected three whole numbers [frames, rows, columns], each at least 1")
    return tuple(value)


BoxField = Annotated[Box, BeforeValidator(_read_box)]


class SlidingTileParameters(BlockSparseParameters):
    """Parameters of `SlidingTileStrategy`; at most one of ``window``, ``density`` and ``heads``.

    Args:
        tile (tuple[int, int, int]): tokens of a tile along frames, rows and columns; ``"auto"`` takes the
            tile of ``block_size`` tokens of which most fit whole into the grid. Default: ``"auto"``
        window (tuple[int, int, int]): tiles along frames, rows and columns that every tile sees, odd, or at
            least as many as the axis has. Default: at least half of each axis if no other rule is given
        density (float): largest executed share of all pairs, text counted, in (0, 1]; takes the evenest
            window within it. Default: none
        heads (tuple[tuple[int, int, int], ...]): windows of different heads: head h takes number h modulo
            their count. Default: none
    """

    tile: Literal["auto"] | BoxField = Field("auto", description="tokens of a tile: frames, rows, columns")
    window: BoxField | None = Field(None, description="tiles that every tile sees: frames, rows, columns")
    density: float | None = Field(None, gt=0, le=1, description="largest executed share of all pairs")
    heads: tuple[BoxField, ...] | None = Field(None, min_length=1, description="windows of the heads in turn")

    @model_validator(mode="after")
    def _check_rules(self) -> "SlidingTileParameters":
        given = [name for name in RULES if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(
                f"give one of {', '.join(RULES)} and None for those of a preset; got {' and '.join(given)}"
            )
        return self


class SlidingTileStrategy(BlockSparseStrategy):
    """Sliding tile attention: every tile of neighbouring tokens sees a 3-D window of whole tiles."""

    name: ClassVar[str] = "sliding-tile"
    Parameters: ClassVar[type[SlidingTileParameters]] = SlidingTileParameters
    capabilities: ClassVar[Capabilities] = Capabilities(gqa=True, backward=True)

    @property
    def heads_alike(self) -> bool:
        """False where heads have windows of their own."""
        return self.parameters.heads is None

    def plan(
        self, layout: TokenLayout, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> SparsePattern:
        """Order and mask of one layout and their executed density.

        Raises:
            ParameterError: tile, window or density do not fit the layout.
        """
        options = self.parameters
        tiling = layout_tiling(layout, options)
        windows = layout_windows(tiling, options)
        mask = sliding_tile_mask(tiling, windows, options.block_size)
        if len(windows) > 1:
            mask = _mask_of_heads(mask, num_heads)
        return SparsePattern(mask.to(device), float(mask.density()), tiling.order().to(device))

    def pattern(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> SparsePattern:
        """The plan of the layout: order and mask are fixed before sampling."""
        return self.planned(query, context)


def layout_tiling(layout: TokenLayout, parameters: SlidingTileParameters) -> Tiling:
    """The tiles of a layout.

    Raises:
        ParameterError: the tile is too small for the grid.
    """
    tile = parameters.tile
    return Tiling(layout, fitting_tile(layout, parameters.block_size) if tile == "auto" else tile)


def layout_windows(tiling: Tiling, parameters: SlidingTileParameters) -> list[Box]:
    """The windows of a layout, one for all heads or several that the heads take in turn.

    Raises:
        ParameterError: the density is out of reach.
    """
    if parameters.heads is not None:
        return list(parameters.heads)
    if parameters.density is not None:
        return [window_for_density(tiling, parameters.density, parameters.block_size)]
    return [parameters.window or half_window(tiling)]


def _mask_of_heads(mask: BlockSparseMask, num_heads: int) -> BlockSparseMask:
    """The masks of several windows, in turn to the heads; fewer heads take the first ones."""
    turns = torch.arange(num_heads) % mask.counts.shape[1]
    return BlockSparseMask(
        mask.counts[:, turns], mask.indices[:, turns], mask.block_size, mask.query_length, mask.key_length
    )
