"""SvgSmartStrategy: every head runs the spatial or the temporal pattern, whichever suits it better."""

import logging
from collections.abc import Collection, Hashable, Mapping
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field

from core.block_mask import BlockSparseMask
from core.context import AttentionContext
from core.layout import TokenLayout
from core.notices import warn_once
from core.strategy import AttentionResult, AttentionStrategy, Capabilities, dense_result
from kernels_common.strategy import BlockSparseParameters, SparsePattern, attend_pattern
from plugins.svg_smart.bands import band_patterns
from plugins.svg_smart.patterns import (
    HeadPatterns,
    executed_blocks,
    forced_blocks,
    frame_patterns,
    head_patterns,
)
from plugins.svg_smart.profiling import pattern_errors, sample_rows
from plugins.svg_smart.semantic import Centroids, ClusterOptions, semantic_pattern

logger = logging.getLogger(__name__)

_JUDGED = ("keep", "sampled_rows", "refresh_every", "share_batch", "seed")
_CLUSTERED = (
    "query_clusters",
    "key_clusters",
    "mass",
    "least_share",
    "first_iterations",
    "iterations",
    "seed",
)


class SvgSmartParameters(BlockSparseParameters):
    """Parameters of `SvgSmartStrategy`.

    A parameter that the variant does not read must keep its default.

    Args:
        variant (str): ``"band"``, a diagonal band in frame-major or token-major order (Sparse VideoGen);
            ``"frames"``, the nearest frames and frame 0, or as many places (Smart attention);
            ``"semantic"``, clusters of similar tokens (SVG2). Default: ``"band"``
        density (float): ``"band"``: share of all pairs to execute, in (0, 1], text and sink counted. A band
            of whole blocks has it within 6 % of it or comes as near as it can, which is logged.
            Default: 0.25
        sink (bool): ``"band"``: every query sees frame 0. Default: False
        diagonal (int): ``"frames"``: largest distance of two frames that see each other. Default: 1
        keep (str): ``"band"`` and ``"frames"``: blocks that stay: ``"fraction"``, those with at least half of
            their pairs allowed; ``"cover"``, those with any. Default: ``"fraction"``
        sampled_rows (int): ``"band"`` and ``"frames"``: query rows by which a head is judged, 1 to 128.
            Default: 32
        refresh_every (int): ``"band"`` and ``"frames"``: steps between two judgements of a layer's heads.
            Default: 1
        share_batch (bool): ``"band"`` and ``"frames"``: one decision per head for the whole batch (both
            halves of classifier-free guidance). Default: False
        query_clusters (int): ``"semantic"``: clusters of queries. Default: 100
        key_clusters (int): ``"semantic"``: clusters of keys. Default: 500
        mass (float): ``"semantic"``: share of its predicted attention that the blocks of every query block
            hold, in (0, 1]. Default: 0.9
        least_share (float): ``"semantic"``: smallest share of key blocks to keep. Default: 0.1
        first_iterations (int): ``"semantic"``: k-means updates of a layer's first step. Default: 50
        iterations (int): ``"semantic"``: updates of later steps, from the last centroids. Default: 2
        seed (int): seed of sampled rows and of the first centroids. Default: 0
    """

    read_by: ClassVar[Mapping[str, Mapping[str, Collection[str]]]] = {
        "variant": {
            "band": ("density", "sink", *_JUDGED),
            "frames": ("diagonal", *_JUDGED),
            "semantic": _CLUSTERED,
        }
    }

    variant: Literal["band", "frames", "semantic"] = Field("band", description="kind of pattern")
    density: float = Field(0.25, gt=0, le=1, description="band: share of all pairs to execute")
    sink: bool = Field(False, description="band: every query sees frame 0")
    diagonal: int = Field(1, ge=0, description="frames: largest distance of frames that see each other")
    keep: Literal["fraction", "cover"] = Field("fraction", description="blocks that stay")
    sampled_rows: int = Field(32, ge=1, le=128, description="query rows by which a head is judged")
    refresh_every: int = Field(1, ge=1, description="steps between two judgements of a layer's heads")
    share_batch: bool = Field(False, description="one decision per head for the whole batch")
    query_clusters: int = Field(100, ge=1, description="semantic: clusters of queries")
    key_clusters: int = Field(500, ge=1, description="semantic: clusters of keys")
    mass: float = Field(0.9, gt=0, le=1, description="semantic: share of predicted attention to keep")
    least_share: float = Field(0.1, ge=0, le=1, description="semantic: smallest share of key blocks")
    first_iterations: int = Field(50, ge=0, description="semantic: k-means updates of the first step")
    iterations: int = Field(2, ge=0, description="semantic: k-means updates of later steps")
    seed: int = Field(0, ge=0, description="seed of sampled rows and first centroids")


class HeadClasses(NamedTuple):
    """Decision of one layer: step of the judgement, and ``[B, H]`` int64, 0 spatial and 1 temporal."""

    step: int
    classes: torch.Tensor


class SvgSmartStrategy(AttentionStrategy):
    """Sparse VideoGen and Smart attention: a spatial or a temporal pattern for each head, chosen online."""

    name: ClassVar[str] = "svg-smart"
    Parameters: ClassVar[type[SvgSmartParameters]] = SvgSmartParameters
    capabilities: ClassVar[Capabilities] = Capabilities(backward=True)

    def __init__(self, **parameters: object) -> None:
        super().__init__(**parameters)
        self._classes: dict[Hashable, HeadClasses] = {}
        self._centroids: dict[Hashable, Centroids] = {}

    def reset(self) -> None:
        """Forget the decisions and the centroids of all layers."""
        self._classes.clear()
        self._centroids.clear()

    def plan(
        self, layout: TokenLayout, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> HeadPatterns | torch.Tensor | None:
        """Orders and masks of both classes of heads; for clusters the blocks that stay, ``[Mq, Mk]`` bool.

        None for a single frame, which is dense.
        """
        if layout.frames == 1:
            warn_once(
                logger,
                f"svg-smart: a single frame has no two patterns, so {layout.describe()} run "
                "dense (density 1.000)",
            )
            return None
        options = self.parameters
        size = (options.block_size, options.block_size)
        if options.variant == "semantic":
            return forced_blocks(layout, size, diagonal=False).to(device)
        if options.variant == "band":
            patterns = band_patterns(
                layout,
                density=options.density,
                sink=options.sink,
                block=options.block_size,
                keep=options.keep,
            )
        else:
            patterns = [
                executed_blocks(layout, pattern, block_size=size, keep=options.keep)
                for pattern in frame_patterns(layout, diagonal=options.diagonal)
            ]
        return head_patterns(patterns).to(device)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> AttentionResult:
        """Attention by the pattern of each head; dense for a single frame, which has no such choice."""
        if self.planned(query, context) is None:
            return dense_result(query, key, value)
        backend = self.parameters.backend
        if self.parameters.variant == "semantic":
            return attend_pattern(query, key, value, self._semantic_pattern(query, key, context), backend)
        classes = self._head_classes(query, key, value, context)
        pattern = select_patterns(self.planned(query, context), classes)
        result = attend_pattern(query, key, value, pattern, backend)
        return result._replace(shares={"temporal_heads": classes.mean(dtype=torch.float32)})

    @torch.no_grad()
    def _head_classes(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        """The decision for this call, ``[B, H]`` int64: a recent one of the layer, or a new one."""
        place = (context.place, query.shape[:2], context.layout)
        known = self._classes.get(place)
        if (
            known is not None
            and known.step <= context.step_index < known.step + self.parameters.refresh_every
        ):
            return known.classes
        rows = sample_rows(self.parameters.sampled_rows, self.parameters.seed, context, query.device)
        errors = pattern_errors(query, key, value, rows, self.planned(query, context))
        if self.parameters.share_batch:
            errors = errors.mean(1, keepdim=True).expand_as(errors)
        classes = (errors[1] < errors[0]).long()
        if self.parameters.refresh_every > 1:
            self._classes[place] = HeadClasses(context.step_index, classes)
        return classes

    @torch.no_grad()
    def _semantic_pattern(
        self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext
    ) -> SparsePattern:
        options = self.parameters
        place = (context.place, query.shape[:2], context.layout)
        numbers = ClusterOptions(
            query_clusters=options.query_clusters,
            key_clusters=options.key_clusters,
            mass=options.mass,
            least_share=options.least_share,
            first_iterations=options.first_iterations,
            iterations=options.iterations,
            seed=options.seed,
        )
        size = (options.block_size, options.block_size)
        known = self._centroids.get(place)
        previous = known if known is not None and known.step < context.step_index else None
        pattern, self._centroids[place] = semantic_pattern(
            query, key, context, numbers, size, self.planned(query, context), previous
        )
        return pattern


def select_patterns(patterns: HeadPatterns, classes: torch.Tensor) -> SparsePattern:
    """Order and mask of every head by its class.

    Args:
        patterns (HeadPatterns): what the two classes execute.
        classes (Tensor): ``[B, H]`` int64, 0 spatial and 1 temporal.
    """
    masks = patterns.masks
    mask = BlockSparseMask(
        masks.counts[0][classes],
        masks.indices[0][classes],
        masks.block_size,
        masks.query_length,
        masks.key_length,
    )
    return SparsePattern(mask, order=patterns.orders[classes])
