"""TomeStrategy: attention over merged tokens."""

import logging
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, PositiveInt

from core.block_mask import BlockSparseMask
from core.context import AttentionContext, Branch
from core.layout import TokenLayout
from core.parameters import StrategyParameters
from core.strategy import AttentionResult, AttentionStrategy, Capabilities, dense_result
from plugins.tome.matching import Metric, best_destinations, matching_cost
from plugins.tome.merging import MergeMap, make_merge_map, merge_tokens, merged_attention, unmerge_tokens
from plugins.tome.partition import Partition, make_partition

BLOCK_SIZE = (128, 128)

logger = logging.getLogger(__name__)


class TomeParameters(StrategyParameters):
    """Parameters of `TomeStrategy`.

    Args:
        ratio (float): share of the video tokens that are merged away, 0 to 1; at most all sources are (see
            ``cell``). Default: 0.45
        r (int, Optional): tokens that are merged away, >= 0, in place of ``ratio``. Default: by ``ratio``
        ramp_steps (int): the number of merged tokens grows evenly over so many steps after the dense ones,
            then it is full. Default: 0
        merge_queries (bool): queries are merged too, by the groups of the keys, and every token of a group
            gets the same output (full mode); otherwise keys and values only. Default: False
        cell (tuple[int, int, int]): frames, rows and columns of the cells that hold one destination each,
            beside frame 0, which is all destinations. Default: (4, 3, 3)
        candidates (str): destinations that a source compares itself with: ``"all"``, or ``"local"``, those of
            its own and the neighbouring cells. Default: ``"all"``
        metric (str): similarity of two tokens: the cosine of ``[k, |k|, v, |v|]`` (``"kv_norm"``), of the
            keys (``"k"``), or of the keys' mean over the heads (``"mean_k"``: one matching for all).
            Default: ``"kv_norm"``
        gap (int): steps that use one matching, per layer; 1 matches at every call. Default: 1
        seed (int, Optional): seed of the destination's place in each cell; None takes the first place.
            Default: 0
    """

    ratio: float = Field(0.45, ge=0, le=1, description="share of the video tokens that are merged away")
    r: int | None = Field(None, ge=0, description="tokens that are merged away, in place of ratio")
    ramp_steps: int = Field(0, ge=0, description="steps over which the number of merged tokens grows")
    merge_queries: bool = Field(False, description="merge queries too")
    cell: tuple[PositiveInt, PositiveInt, PositiveInt] = Field(
        (4, 3, 3), description="frames, rows and columns of a cell"
    )
    candidates: Literal["all", "local"] = Field("all", description="destinations that a source looks at")
    metric: Metric = Field("kv_norm", description="similarity of two tokens")
    gap: int = Field(1, ge=1, description="steps that use one matching")
    seed: int | None = Field(0, ge=0, description="seed of the destinations' places in their cells")


@dataclass(frozen=True)
class TomePlan:
    """What depends on the shape alone: the partition, and full block masks by their lengths."""

    partition: Partition
    full_masks: dict[tuple[int, int], BlockSparseMask] = field(default_factory=dict)

    def full_mask(self, query_length: int, key_length: int) -> BlockSparseMask:
        """Every block, for attention over merged keys on a GPU."""
        lengths = (query_length, key_length)
        if lengths not in self.full_masks:
            device = self.partition.sources.device
            self.full_masks[lengths] = BlockSparseMask.full(BLOCK_SIZE, *lengths, device)
        return self.full_masks[lengths]


class Matched(NamedTuple):
    """Groups that a layer goes on using, and the step and kind of call that they were found in."""

    merge_map: MergeMap
    step_index: int
    call: tuple[TokenLayout, torch.Size, torch.device]


class TomeStrategy(AttentionStrategy):
    """Token merging: the most similar tokens are averaged, an average of n counts as n keys."""

    name: ClassVar[str] = "tome"
    Parameters: ClassVar[type[TomeParameters]] = TomeParameters
    capabilities: ClassVar[Capabilities] = Capabilities(gqa=True)

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        self._matched: dict[tuple[int, Branch, int], Matched] = {}

    def reset(self) -> None:
        """Forget the groups of all layers."""
        self._matched.clear()

    @property
    def heads_alike(self) -> bool:
        """False where all heads share the similarity of their mean keys."""
        return self.parameters.metric != "mean_k"

    def plan(
        self, layout: TokenLayout, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> TomePlan:
        """Destinations and sources of one layout."""
        given = self.parameters
        partition = make_partition(layout, given.cell, seed=given.seed, local=given.candidates == "local")
        wanted, most = self._wanted(layout), len(partition.sources)
        if wanted > most and layout.frames > 1:  # a single frame is dense: all of it are destinations
            logger.warning(
                "tome: %d tokens were to be merged, but %s has %d sources with cells of %s; all of them are",
                wanted, layout.describe(), most, given.cell,
            )  # fmt: skip
        return TomePlan(partition.to(device))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> AttentionResult:
        """Attention over merged keys and values, with merged queries if asked for; dense without merging."""
        plan = self.planned(query, context)
        merge_map, cost = self._merge_map(query, key, value, context, plan.partition)
        if merge_map is None:
            return dense_result(query, key, value)
        key, value = merge_tokens((key, value), merge_map)
        kept = merge_map.merged_length / merge_map.length
        shares = {"merged_length": kept, "matching_cost": cost}
        query_map = merge_map.for_heads(query.shape[1])
        if self.parameters.merge_queries:
            query = merge_tokens(query, query_map)
        mask = None if query.device.type == "cpu" else plan.full_mask(query.shape[2], key.shape[2])
        output, backend = merged_attention(query, key, value, merge_map.sizes(), mask)
        if not self.parameters.merge_queries:
            return AttentionResult(output, kept, backend, shares)
        return AttentionResult(unmerge_tokens(output, query_map), kept**2, backend, shares)

    def _wanted(self, layout: TokenLayout) -> int:
        """Tokens to merge after the ramp, as far as there are sources."""
        given = self.parameters
        return round(given.ratio * layout.video_length) if given.r is None else given.r

    def _tokens_to_merge(self, context: AttentionContext, partition: Partition) -> int:
        step = context.step_index - self.parameters.dense_timesteps + 1
        reached = min(1.0, step / (self.parameters.ramp_steps + 1))
        return min(round(reached * self._wanted(context.layout)), len(partition.sources))

    def _merge_map(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
        partition: Partition,
    ) -> tuple[MergeMap | None, float]:
        """Groups of this call, None to merge nothing, and the cost of finding them: see `matching_cost`."""
        place = context.place
        known = self._matched.get(place)
        call = (context.layout, key.shape, key.device)
        if known and known.call == call and 0 < context.step_index - known.step_index < self.parameters.gap:
            return known.merge_map, 0.0
        r = self._tokens_to_merge(context, partition)
        if r == 0:
            return None, 0.0
        metric = self.parameters.metric
        similarity, best = best_destinations(key, value, partition, metric)
        merge_map = make_merge_map(similarity, best, partition, r)
        if self.parameters.gap > 1:
            self._matched[context.place] = Matched(merge_map, context.step_index, call)
        return merge_map, matching_cost(query, key, partition, metric)
