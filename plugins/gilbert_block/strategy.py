"""GilbertBlockStrategy: curve, importance, selection; differentiable."""

from collections.abc import Collection, Hashable, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator, model_validator

from core.block_mask import BlockSparseMask
from core.context import AttentionContext
from core.layout import TokenLayout
from core.level_mask import LevelMask
from core.random import call_generator
from core.strategy import Capabilities
from kernels_common.permutation import gather_tokens
from kernels_common.pooled_attention import POOLED_BACKENDS
from kernels_common.score_projection import PROJECTION_READS
from kernels_common.selection import lists_from_levels, select_mass, select_top_k
from kernels_common.strategy import BlockSparseParameters, BlockSparseStrategy, SparsePattern
from plugins.gilbert_block.importance import Estimator, Projection, block_importance
from plugins.gilbert_block.levels import level_caps, levels_by_mass, levels_by_rank, with_remainder
from plugins.gilbert_block.mask import adaptive_top_k, forced_blocks
from plugins.gilbert_block.rearranger import GilbertRearranger, rearranged
from plugins.gilbert_block.schedule import scheduled

Share = Annotated[float, Field(gt=0, le=1)]
Cosine = Annotated[float, Field(ge=-1, le=1)]
Schedule = tuple[Share, Share]
Bounds = tuple[Share, Share, Share, Share]
DEFAULT_BOUNDS = {"rank": (0.05, 0.15, 0.25, 0.5), "mass": (0.5, 0.6, 0.7, 0.8)}


class GilbertBlockParameters(BlockSparseParameters):
    """Parameters of `GilbertBlockStrategy`.

    ``tau``, ``min_ratio``, ``max_ratio`` and ``keep_ratio`` are one number, or a pair: the values before the
    first and after the last denoising step, with a sigmoid in between. Blocks with text and those on the
    diagonal are always kept, beside what these numbers say. A parameter that the chosen ``selection``,
    ``importance`` or ``projection`` does not read must have its default.

    Args:
        order (str): order of the tokens in blocks: ``"gilbert"``, along the space-filling curve, or
            ``"model"``. Default: ``"gilbert"``
        selection (str): ``"energy"``, the fewest key blocks of each row that hold ``tau`` of its importance;
            ``"topk"``, ``keep_ratio`` of the key blocks; ``"adaptive-topk"``, two or three times as many in
            rows where these hold little; ``"rank"`` and ``"mass"``, pooling levels by rank and by share of
            the importance, see ``bounds``. Default: ``"energy"``
        importance (str): ``"sum"`` or ``"max"`` of the attention weights between sampled tokens, or
            ``"mean"``, the weight between mean tokens. Default: ``"sum"``
        samples (int): ``"sum"`` and ``"max"``: sampled tokens of a query block, a power of two; of a key
            block in proportion. Default: 32
        projection (str): dimensions that importance looks at: all (``"none"``), or the few that lose least
            of the scores (``"optimal"``), hold most of the keys (``"pca"``), are the largest channels
            (``"channels"``) or random ones (``"random"``). Default: ``"none"``
        directions (int): every projection but ``"none"``: dimensions that it leaves. Default: 16
        tau (float): ``"energy"``: share of the importance that a row keeps, in (0, 1]. Default: 0.95
        min_ratio (float): ``"energy"``: fewest key blocks of a row, as a share, in (0, 1]; ``"mass"``: fewest
            of level 1. Default: 0.05
        max_ratio (float): ``"energy"``: most key blocks of a row, as a share, in (0, 1]. Default: 1.0
        keep_ratio (float): ``"topk"`` and ``"adaptive-topk"``: key blocks that are kept, as a share, in
            (0, 1]. Default: 0.2
        bounds (tuple[float, float, float, float]): levels 1, 2, 4 and 8 (means of so many keys): the share of
            the key blocks (``"rank"``) or of the importance (``"mass"``) that is seen at the level or a
            finer one. Default: (0.05, 0.15, 0.25, 0.5) by rank, (0.5, 0.6, 0.7, 0.8) by mass
        similarity_thresholds (tuple[float, float, float], Optional): ``"rank"`` and ``"mass"``: mean cosines
            of neighbouring keys above which a key block may be pooled by 2, 4 and 8; not with ``remainder``.
            Default: any block may be
        remainder (bool): every selection: blocks that would be left out are seen at level 8. Default: False
        refresh_every (int): steps that use one selection, per layer. Default: 1
        block_size (int): tokens of a query block, 64 or 128. Default: 128
        key_block_size (int): tokens of a key block, 64 or 128. Default: 64
        seed (int): ``"sum"`` and ``"max"``: seed of the samples. Default: 0
    """

    read_by: ClassVar[Mapping[str, Mapping[str, Collection[str]]]] = {
        "selection": {
            "energy": ("tau", "min_ratio", "max_ratio"),
            "topk": ("keep_ratio",),
            "adaptive-topk": ("keep_ratio",),
            "rank": ("bounds", "similarity_thresholds"),
            "mass": ("bounds", "min_ratio", "similarity_thresholds"),
        },
        "importance": {"sum": ("samples", "seed"), "max": ("samples", "seed"), "mean": ()},
        "projection": PROJECTION_READS,
    }

    order: Literal["gilbert", "model"] = Field("gilbert", description="order of the tokens in blocks")
    selection: Literal["energy", "topk", "adaptive-topk", "rank", "mass"] = Field(
        "energy", description="rule by which blocks are chosen"
    )
    importance: Estimator = Field("sum", description="estimate of a block's importance")
    samples: Literal[1, 2, 4, 8, 16, 32, 64, 128] = Field(32, description="sampled tokens of a query block")
    projection: Projection = Field("none", description="dimensions that importance looks at")
    directions: Literal[16, 32, 64] = Field(16, description="dimensions that a projection leaves")
    tau: Schedule = Field((0.95, 0.95), description="share of the importance that a row keeps")
    min_ratio: Schedule = Field((0.05, 0.05), description="fewest key blocks of a row, as a share")
    max_ratio: Schedule = Field((1.0, 1.0), description="most key blocks of a row, as a share")
    keep_ratio: Schedule = Field((0.2, 0.2), description="key blocks kept by topk, as a share")
    bounds: Bounds | None = Field(None, description="shares seen at levels 1, 2, 4 and 8")
    similarity_thresholds: tuple[Cosine, Cosine, Cosine] | None = Field(
        None, description="cosines above which a key block may be pooled by 2, 4 and 8"
    )
    remainder: bool = Field(False, description="blocks that would be left out are seen at level 8")
    refresh_every: int = Field(1, ge=1, description="steps that use one selection")
    key_block_size: Literal[64, 128] = Field(64, description="tokens of a key block")
    seed: int = Field(0, ge=0, description="seed of the samples")

    @field_validator("key_block_size", "samples", "directions", mode="before")
    @classmethod
    def _read_number(cls, value: object) -> object:
        return int(value) if isinstance(value, str) and value.isdecimal() else value

    @field_validator("tau", "min_ratio", "max_ratio", "keep_ratio", mode="before")
    @classmethod
    def _constant(cls, value: object) -> object:
        return (value, value) if isinstance(value, str | int | float) else value

    @model_validator(mode="after")
    def _check(self) -> "GilbertBlockParameters":
        if any(low > high for low, high in zip(self.min_ratio, self.max_ratio, strict=True)):
            raise ValueError(f"min_ratio {self.min_ratio} must not exceed max_ratio {self.max_ratio}")
        if self.samples > self.block_size:
            raise ValueError(f"samples must be at most block_size {self.block_size}, not {self.samples}")
        if self.remainder and self.similarity_thresholds is not None:
            raise ValueError(
                "remainder pools blocks at level 8 that similarity_thresholds would keep from being pooled; "
                "take one of them"
            )
        if self.bounds is not None and list(self.bounds) != sorted(self.bounds):
            raise ValueError(f"bounds must not decrease, not {self.bounds}")
        if (self.by_level or self.remainder) and self.backend not in ("auto", *POOLED_BACKENDS):
            raise ValueError(
                f"backend '{self.backend}' has no pooled keys; take auto or {', '.join(POOLED_BACKENDS)}"
            )
        return self

    @property
    def by_level(self) -> bool:
        """Whether the rule itself assigns pooling levels."""
        return self.selection in DEFAULT_BOUNDS


class GilbertBlockPlan(NamedTuple):
    """What depends on the layout alone.

    Args:
        order (Tensor, Optional): ``[S]`` int32 token order; None keeps the model's.
        forced (Tensor): blocks kept in any case, ``[Mq, Mk]`` bool.
    """

    order: torch.Tensor | None
    forced: torch.Tensor


class Selected(NamedTuple):
    """A pattern that a layer goes on using, and the step that it was found in."""

    step_index: int
    pattern: SparsePattern


class GilbertBlockStrategy(BlockSparseStrategy):
    """Adaptive blocks along a space-filling curve, whole, pooled or skipped by estimated importance."""

    name: ClassVar[str] = "gilbert-block"
    Parameters: ClassVar[type[GilbertBlockParameters]] = GilbertBlockParameters
    capabilities: ClassVar[Capabilities] = Capabilities(gqa=True, backward=True)

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        self._selected: dict[Hashable, Selected] = {}

    def reset(self) -> None:
        """Forget the selections of all layers."""
        self._selected.clear()

    def plan(
        self, layout: TokenLayout, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> GilbertBlockPlan:
        """Token order and forced blocks of a layout."""
        if self.parameters.order == "model":
            return GilbertBlockPlan(None, forced_blocks(layout, self._block_size).to(device))
        order = GilbertRearranger(layout, device).order
        return GilbertBlockPlan(order, forced_blocks(rearranged(layout), self._block_size).to(device))

    def pattern(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> SparsePattern:
        """Blocks of this call: those of a recent step of the layer, or a new selection, without gradients."""
        place = (context.place, query.shape, key.shape[1], query.device, context.layout)
        known = self._selected.get(place)
        lasting = self.parameters.refresh_every
        if known is not None and 0 < context.step_index - known.step_index < lasting:
            return known.pattern
        plan = self.planned(query, context)
        with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
            mask = self._select(query.detach(), key.detach(), plan, context)
            pattern = SparsePattern(mask, order=plan.order)
        if lasting > 1:
            self._selected[place] = Selected(context.step_index, pattern)
        return pattern

    def _select(
        self, query: torch.Tensor, key: torch.Tensor, plan: GilbertBlockPlan, context: AttentionContext
    ) -> BlockSparseMask | LevelMask:
        options = self.parameters
        importance = block_importance(
            query,
            key,
            self._block_size,
            call_generator(options.seed, context, query.device),
            order=plan.order,
            estimator=options.importance,
            samples=options.samples,
            projection=options.projection,
            directions=options.directions,
        )
        shape = (self._block_size, query.shape[2], key.shape[2])
        if options.by_level:
            levels = self._levels(importance, key, plan, context)
        else:
            mask = self._blocks(importance, shape, plan.forced, context)
            if not options.remainder:
                return mask
            levels = mask.to_blocks().to(torch.int8)
        counts, indices = lists_from_levels(with_remainder(levels) if options.remainder else levels)
        return LevelMask(counts, indices, *shape)

    def _blocks(
        self,
        importance: torch.Tensor,
        shape: tuple[tuple[int, int], int, int],
        forced: torch.Tensor,
        context: AttentionContext,
    ) -> BlockSparseMask:
        options = self.parameters
        if options.selection == "energy":
            return select_mass(
                importance,
                self._now(options.tau, context),
                *shape,
                include_crossing=True,
                min_blocks=self._now(options.min_ratio, context),
                max_blocks=self._now(options.max_ratio, context),
                forced=forced,
            )
        keep_ratio = self._now(options.keep_ratio, context)
        if options.selection == "topk":
            return select_top_k(importance, keep_ratio, *shape, forced=forced)
        return adaptive_top_k(importance, keep_ratio, *shape, forced)

    def _levels(
        self, importance: torch.Tensor, key: torch.Tensor, plan: GilbertBlockPlan, context: AttentionContext
    ) -> torch.Tensor:
        """Levels by rank or mass, ``[B, Hq, Mq, Mk]`` int8, no coarser than the keys allow."""
        options = self.parameters
        bounds = options.bounds or DEFAULT_BOUNDS[options.selection]
        if options.selection == "rank":
            levels = levels_by_rank(importance, bounds, plan.forced)
        else:
            least = self._now(options.min_ratio, context)
            levels = levels_by_mass(importance, bounds, least, plan.forced)
        if options.similarity_thresholds is None:
            return levels
        keys = key if plan.order is None else gather_tokens(key, plan.order)
        caps = level_caps(keys, options.key_block_size, options.similarity_thresholds)
        return levels.minimum(caps.repeat_interleave(levels.shape[1] // caps.shape[1], 1)[:, :, None])

    @staticmethod
    def _now(ends: tuple[float, float], context: AttentionContext) -> float:
        return scheduled(ends, context.step_index, context.num_steps)

    @property
    def _block_size(self) -> tuple[int, int]:
        return self.parameters.block_size, self.parameters.key_block_size
