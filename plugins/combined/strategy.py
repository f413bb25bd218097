"""CombinedStrategy: each head runs by its class, frame patterns or another strategy."""

from collections.abc import Hashable, Sequence
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, field_validator

from core.assignment import require_heads_alike
from core.context import AttentionContext
from core.denoiser_record import InstalledDenoiser
from core.errors import ParameterError
from core.layout import TokenLayout
from core.parameters import StrategyParameters
from core.random import call_generator
from core.registry import create_strategy
from core.strategy import AttentionResult, AttentionStrategy, Capabilities, dense_result
from plugins.combined.anchors import Anchors, attend_by_anchors
from plugins.combined.classes import ClassOptions, HeadGroups, pattern_heads
from plugins.combined.columns import ColumnOptions, attend_by_columns
from plugins.combined.composition import load_composition
from plugins.combined.cost import decision_cost, pattern_cost
from plugins.combined.frame_attention import Heads, attend_text_queries, put_heads
from plugins.combined.frame_tables import draw_places, frame_tables

Share = Annotated[float, Field(gt=0, le=1)]
Bounds = tuple[Annotated[float, Field(gt=0, le=1)], Annotated[float, Field(ge=1)]]
# The first project's schedule of the energy mask, with its share of sampled tokens.
PUBLISHED_SCHEDULE = {"tau": (0.98, 0.9), "min_ratio": (0.12, 0.1), "max_ratio": (1.0, 0.8), "samples": 16}
DEFAULT_OPTIONS = {"gilbert-block": PUBLISHED_SCHEDULE}


class CombinedParameters(StrategyParameters):
    """Parameters of `CombinedStrategy`.

    Args:
        assignment (str): file of ``python -m harness.compose``, or the name of one that comes with this
            plugin (``"demo"``): which strategy runs which head. What follows is not used then. Default: none
        classes (str): which heads run by frame patterns: ``"tested"``, those that are not sparse and look
            alike from every frame; ``"pattern"``, all; ``"sparse"``, none. Default: ``"tested"``
        sparse (str): registered name of the strategy for the other heads. Default: ``"gilbert-block"``
        sparse_options (dict): its parameters, ``preset`` among them; its dense warm-up is not used.
            Default: its own, with the published schedule of the energy mask for ``"gilbert-block"``
        form (str): how frame patterns are made: ``"anchors"``, ``anchors`` frames attend exactly and those
            between them follow; ``"columns"``, one pattern for each key frame. Default: ``"anchors"``
        anchors (int): ``"anchors"``: frames that attend exactly. Default: 2
        exact_rows (float): ``"anchors"``: share of the video queries that attend exactly beside them, those
            that differ most from the anchors' at their place. Default: 0.1
        refresh_every (int): steps between two tests of a layer's heads. Default: 10
        places (int): places of a frame that tests and mass tables sample. Default: 64
        key_stride (int): the sparsity test looks at every so many keys. Default: 3
        sparse_mass (float): a head is sparse whose largest 20 % of weights hold more than this share.
            Default: 0.9
        similarity (float): a head looks alike from every frame above this mean cosine. Default: 0.9
        exact_mass (float): ``"columns"``: key frames that hold this share of the first frame's attention take
            its pattern itself. Default: 0.1
        bounds (tuple[float, float]): ``"columns"``: range of the row corrections of frames.
            Default: (0.05, 100)
        text_bounds (tuple[float, float]): ``"columns"``: range of those of the text. Default: (0.01, 100)
        seed (int): seed of the sampled places. Default: 0
    """

    assignment: str | None = Field(None, description="file or name of an assignment of heads")
    classes: Literal["tested", "pattern", "sparse"] = Field("tested", description="heads by frame patterns")
    sparse: str = Field("gilbert-block", description="strategy of the other heads")
    sparse_options: dict[str, Any] = Field(default_factory=dict, description="its parameters")
    form: Literal["anchors", "columns"] = Field("anchors", description="how frame patterns are made")
    anchors: int = Field(2, ge=1, description="anchors: frames that attend exactly")
    exact_rows: float = Field(0.1, ge=0, le=1, description="anchors: share of queries that attend exactly")
    refresh_every: int = Field(10, ge=1, description="steps between two tests of a layer's heads")
    places: int = Field(64, ge=1, description="sampled places of a frame")
    key_stride: int = Field(3, ge=1, description="the sparsity test looks at every so many keys")
    sparse_mass: Share = Field(0.9, description="mass of the largest weights above which a head is sparse")
    similarity: Share = Field(0.9, description="mean cosine above which a head looks alike from every frame")
    exact_mass: Share = Field(0.1, description="columns: mass from which the first frame's pattern is exact")
    bounds: Bounds = Field((0.05, 100.0), description="columns: range of row corrections")
    text_bounds: Bounds = Field((0.01, 100.0), description="columns: range of those of the text")
    seed: int = Field(0, ge=0, description="seed of the sampled places")

    @field_validator("sparse")
    @classmethod
    def _refuse_itself(cls, value: str) -> str:
        if value == "combined":
            raise ValueError("the strategy of the other heads must be another one")
        return value


class PatternOutput(NamedTuple):
    """What heads by frame patterns give: output ``[n, N, D]`` and the executed share of all pairs."""

    output: torch.Tensor
    density: float | torch.Tensor


class CombinedStrategy(AttentionStrategy):
    """Frame patterns for heads that look alike from every frame, another strategy for the rest."""

    name: ClassVar[str] = "combined"
    Parameters: ClassVar[type[CombinedParameters]] = CombinedParameters
    capabilities: ClassVar[Capabilities] = Capabilities()

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        named = self.parameters.assignment
        if named is not None:
            self._refuse_unread()
        self._composition = None if named is None else load_composition(named)
        sparse = self.parameters.sparse
        options = self.parameters.sparse_options or DEFAULT_OPTIONS.get(sparse, {})
        self._sparse = create_strategy(sparse, **options)
        if self.parameters.classes != "sparse":
            require_heads_alike(self._sparse, f"strategy 'combined': sparse={sparse}, {options}")
        self._groups: dict[Hashable, HeadGroups] = {}

    @property
    def heads_alike(self) -> bool:
        """False with an assignment, and where the other strategy tells heads apart."""
        return self._composition is None and self._sparse.heads_alike

    def _refuse_unread(self) -> None:
        """An assignment decides everything but the dense warm-up and the guard."""
        own = CombinedParameters.model_fields.keys() - StrategyParameters.model_fields.keys() - {"assignment"}
        if given := sorted(own & self.parameters.model_fields_set):
            raise ParameterError(
                f"strategy 'combined': an assignment decides for every head, so {', '.join(given)} would be "
                "ignored; leave out either"
            )

    def reset(self) -> None:
        """Forget the classes of all layers, and what the other strategy keeps."""
        self._groups.clear()
        self._sparse.reset()
        if self._composition is not None:
            self._composition.reset()

    def plan(
        self, layout: TokenLayout, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> Anchors:
        """Anchor frames of a layout."""
        return Anchors.spread(layout.frames, self.parameters.anchors, device)

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Refuse the assignment of another model, and one that a strategy of some heads is not for."""
        if self._composition is None:
            self._sparse.check_model(denoisers)
        else:
            self._composition.check_model(denoisers)

    def check_supported(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> None:
        """Refuse what any part cannot do."""
        if self._composition is None:
            super().check_supported(query, key, context)
        else:
            self._composition.check_supported(query, key, context)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> AttentionResult:
        """Attention by the class of each head."""
        if self._composition is not None:
            return self._composition.attend(query, key, value, context)
        groups, test_cost = self._head_groups(query, key, context)
        share = len(groups.pattern) / len(groups.flags)
        shares = {"pattern_heads": share, "tests": test_cost}
        if share == 1.0 and not self._worthwhile(context.layout):
            return dense_result(query, key, value)
        if share == 0.0:
            result = self._attend_others(query, key, value, context)
            return result._replace(density=result.density + test_cost, shares=shares)
        tensors = (query, key, value)
        anchors = self.planned(query, context)
        alike = Heads.of(tensors, groups.pattern, context.layout)
        by_pattern = self._attend_by_pattern(alike, anchors, context)
        if share == 1.0:
            output = by_pattern.output.view(query.shape)
            return AttentionResult(output, by_pattern.density + test_cost, self._form, shares)
        others = Heads.of(tensors, groups.others, context.layout)
        result = self._attend_others(
            others.query[:, None], others.key[:, None], others.value[:, None], context
        )
        output = torch.empty_like(query)
        put_heads(output, groups.pattern, by_pattern.output)
        put_heads(output, groups.others, result.output[:, 0])
        density = share * by_pattern.density + (1 - share) * result.density + test_cost
        return AttentionResult(output, density, f"{self._form} + {result.backend}", shares)

    @property
    def _form(self) -> str:
        return f"frame-{self.parameters.form}"

    def _worthwhile(self, layout: TokenLayout) -> bool:
        """Whether frame patterns cost less than dense attention, however many turn out to be computed."""
        return float(self._pattern_cost(layout, layout.frames)) < 1

    def _pattern_cost(self, layout: TokenLayout, computed: float | torch.Tensor) -> float | torch.Tensor:
        """Executed share of all pairs; ``computed`` patterns are read by the column form only."""
        options = self.parameters
        if options.form == "columns":
            return pattern_cost(layout, options.places, 1, computed)
        rows = int(options.exact_rows * layout.video_length) / layout.sequence_length
        return rows + pattern_cost(layout, options.places, min(options.anchors, layout.frames))

    @torch.no_grad()
    def _head_groups(
        self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext
    ) -> tuple[HeadGroups, float]:
        """Heads by class, of a recent step of the layer or tested now, and what the tests cost."""
        options = self.parameters
        tested = options.classes == "tested" and self._worthwhile(context.layout)
        lasting = options.refresh_every if tested else float("inf")
        place = (context.place, query.shape[:2], query.device, context.layout)
        known = self._groups.get(place)
        if known is not None and known.step <= context.step_index < known.step + lasting:
            return known, 0.0
        cost = 0.0
        flags = [options.classes == "pattern"] * (query.shape[0] * query.shape[1])
        if tested:
            numbers = ClassOptions(
                options.places, options.key_stride, options.sparse_mass, options.similarity, options.seed
            )
            flags = pattern_heads(query, key, context, numbers).flatten().tolist()
            cost = decision_cost(context.layout, numbers)
        if known is not None and known.flags != tuple(flags):
            self._sparse.reset()  # what it keeps of this layer belongs to other heads
        groups = HeadGroups.from_flags(flags, context.step_index, query.device)
        self._groups[place] = groups
        return groups, cost

    def _attend_others(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> AttentionResult:
        self._sparse.check_supported(query, key, context)
        return self._sparse.attend(query, key, value, context)

    def _attend_by_pattern(self, heads: Heads, anchors: Anchors, context: AttentionContext) -> PatternOutput:
        """Heads by frame patterns; text queries are dense."""
        options, layout = self.parameters, heads.layout
        places = draw_places(
            layout, options.places, call_generator(options.seed, context, heads.query.device)
        )
        tables = frame_tables(heads.query, heads.key, layout, places)
        computed: float | torch.Tensor = 0.0
        if options.form == "anchors":
            video = attend_by_anchors(heads, tables, anchors, options.exact_rows)
        else:
            numbers = ColumnOptions(options.exact_mass, options.bounds, options.text_bounds)
            video, needed = attend_by_columns(heads, tables, numbers)
            computed = needed.sum(1, dtype=torch.float64).mean()
        output = torch.empty_like(heads.query)
        output[:, layout.video_slice] = video.flatten(1, 2)
        if layout.text_length:
            output[:, layout.text_slice] = attend_text_queries(heads)
        return PatternOutput(output, self._pattern_cost(layout, computed))
