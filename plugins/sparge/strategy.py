"""SpargeStrategy: block sparsity predicted from mean tokens at every call."""

from collections.abc import Collection, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import Field, model_validator

from core.context import AttentionContext
from core.denoiser_record import InstalledDenoiser
from core.errors import UnsupportedCallError
from core.layout import TokenLayout
from core.strategy import Capabilities
from kernels_common.gilbert import gilbert_order
from kernels_common.score_projection import PROJECTION_READS, Projection
from kernels_common.strategy import BlockSparseParameters, BlockSparseStrategy, SparsePattern
from plugins.sparge.budget import density_budget
from plugins.sparge.loading import load_calibration
from plugins.sparge.precision import resolve_quantization
from plugins.sparge.prediction import executed_density, forced_blocks, predict_mask

RULES = ("density", "topk", "cdf", "calibration")


class SpargeParameters(BlockSparseParameters):
    """Parameters of `SpargeStrategy`; at most one of ``density``, ``topk``, ``cdf`` and ``calibration``.

    Args:
        density (float): executed share of all (query, key) pairs, text and sink counted, in (0, 1]; what
            ``similarity_threshold`` keeps comes on top. Not for causal calls. Default: none
        topk (float): share of the key blocks that every row keeps beside the forced ones, in (0, 1].
            Default: 0.5 if no other rule is given
        cdf (float): share of the estimated attention that the kept blocks hold at most, in (0, 1].
            Default: none
        calibration (str): file of ``python -m harness.tune``, the name of one that comes with this plugin
            (``"demo"``), or a ``.pt`` file of thresholds that the authors of SpargeAttn published: values of
            every layer and head. The other parameters must be those that it was made with. Default: none
        similarity_threshold (float): self-similarity up to which a block is never dropped, in [0, 1].
            Default: none, every block may be dropped
        skip_threshold (float): in log2 units, >= 0: a tile of a kept block whose scores are all that far or
            further below the largest ones before is not multiplied with its values. It held at most ``128 * 2
            ** -skip_threshold`` of the weight of a row. Default: none, no tile is skipped
        quantization (str): ``"none"``; ``"int8_fp8"`` and ``"int8_fp16"``, see `block_sparse_attention`;
            ``"auto"``, ``"int8_fp8"`` where the GPU has it and tensors and call allow it (capability 8.9,
            bf16 or fp16, not causal, no gradients), else ``"none"``. Default: ``"auto"``
        attention_sink (bool): every query sees the first key block. Default: False
        order (str): order of the tokens in blocks: ``"model"``, or ``"gilbert"``, along a space-filling
            curve (the paper's permutation). Default: ``"model"``
        projection (str): dimensions in which mean tokens are compared: all (``"none"``), or the few that
            lose least of the scores (``"optimal"``), hold most of the keys (``"pca"``), are the largest
            channels (``"channels"``) or random ones (``"random"``); not in causal calls. Default: ``"none"``
        directions (int): number of dimensions that a projection leaves. Default: 16
        block_size (int): tokens of a query block, 64 or 128. Default: 128
        key_block_size (int): tokens of a key block, 64 or 128. Default: 64
    """

    read_by: ClassVar[Mapping[str, Mapping[str, Collection[str]]]] = {"projection": PROJECTION_READS}

    density: float | None = Field(None, gt=0, le=1, description="executed share of all pairs")
    topk: float | None = Field(None, gt=0, le=1, description="share of the key blocks that every row keeps")
    cdf: float | None = Field(None, gt=0, le=1, description="share of the estimated attention to keep")
    calibration: str | None = Field(None, description="file or name of a calibration per layer and head")
    similarity_threshold: float | None = Field(
        None, ge=0, le=1, description="self-similarity up to which a block is never dropped"
    )
    skip_threshold: float | None = Field(
        None, ge=0, le=1000, description="log2 distance from which a kept tile is skipped"
    )
    quantization: Literal["auto", "none", "int8_fp8", "int8_fp16"] = Field(
        "auto", description="precision of the operands"
    )
    attention_sink: bool = Field(False, description="every query sees the first key block")
    order: Literal["model", "gilbert"] = Field("model", description="order of the tokens in blocks")
    projection: Projection = Field("none", description="dimensions in which mean tokens are compared")
    directions: Literal[16, 32, 64] = Field(16, description="dimensions that a projection leaves")
    key_block_size: Literal[64, 128] = Field(64, description="tokens of a key block")

    @model_validator(mode="before")
    @classmethod
    def _one_rule(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        given = [name for name in RULES if values.get(name) is not None]
        if len(given) > 1:
            raise ValueError(f"give one of {', '.join(RULES)}")
        for name in ("key_block_size", "directions"):
            text = values.get(name)
            if isinstance(text, str) and text.isdecimal():
                values = values | {name: int(text)}
        return values if given else values | {"topk": 0.5}


class SpargePlan(NamedTuple):
    """What depends on the layout alone.

    Args:
        forced (Tensor): blocks kept in any case, ``[Mq, Mk]`` bool.
        order (Tensor, Optional): ``[S]`` int32 token order.
        keep (float | Tensor, Optional): share of the blocks that a row chooses, or their number per row,
            ``[1, Mq]`` int32; None for other rules.
        skip (Tensor, Optional): ``[H]`` fp32, the same threshold for every head.
        tables (dict[str, Tensor]): calibrated parameters, ``[layers, H]`` fp32 each.
    """

    forced: torch.Tensor
    order: torch.Tensor | None
    keep: float | torch.Tensor | None
    skip: torch.Tensor | None
    tables: dict[str, torch.Tensor]


class HeadNumbers(NamedTuple):
    """What decides about blocks and tiles of one call; None is off.

    One number for all heads or ``[H]``; ``top_k`` may also be ``[1, Mq]``, one for each row.
    """

    top_k: float | torch.Tensor | None
    cdf: float | torch.Tensor | None
    similarity: float | torch.Tensor | None
    skip: torch.Tensor | None


class SpargeStrategy(BlockSparseStrategy):
    """SpargeAttn: keeps the key blocks whose mean tokens carry most of the attention, predicted per call."""

    name: ClassVar[str] = "sparge"
    Parameters: ClassVar[type[SpargeParameters]] = SpargeParameters
    capabilities: ClassVar[Capabilities] = Capabilities(causal=True, gqa=True, backward=True)
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = MappingProxyType(
        {
            "topk": (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.35, 0.4, 0.45, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0),
            "cdf": (0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.85, 0.9, 0.93, 0.95, 0.97, 0.98, 0.99, 1.0),
        }
    )

    def __init__(self, **parameters: Any) -> None:
        super().__init__(**parameters)
        named = self.parameters.calibration
        self._calibration = None if named is None else load_calibration(named, self.parameters)

    @property
    def heads_alike(self) -> bool:
        """False with a calibration, which has values for each head."""
        return self.parameters.calibration is None

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Refuse the calibration of another model."""
        if self._calibration is not None:
            self._calibration.check_model(denoisers)

    def plan(
        self, layout: TokenLayout, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> SpargePlan:
        """Forced blocks, token order, and numbers of blocks and heads of a layout."""
        options = self.parameters
        forced = forced_blocks(layout, self._block_size, sink=options.attention_sink)
        keep = options.topk
        if options.density is not None:
            forced, numbers, _ = density_budget(layout, options.density, forced, self._block_size)
            keep = numbers.to(device)
        threshold = options.skip_threshold
        return SpargePlan(
            forced=forced.to(device),
            order=gilbert_order(layout).to(device, torch.int32) if options.order == "gilbert" else None,
            keep=keep,
            skip=None if threshold is None else torch.full((num_heads,), threshold, device=device),
            tables={} if self._calibration is None else self._calibration.tables(device),
        )

    def pattern(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> SparsePattern:
        """Predict the mask of this call, in the order of the plan."""
        if context.causal and self.parameters.order != "model":
            raise UnsupportedCallError(
                "sparge: a causal call has an order of its own; leave order at 'model'"
            )
        if context.causal and self.parameters.density is not None:
            raise UnsupportedCallError(
                "sparge: density counts blocks that a causal call does not have; set topk or cdf instead"
            )
        plan = self.planned(query, context)
        numbers = self._numbers(plan, query, context)
        mask = predict_mask(
            query,
            key,
            self._block_size,
            top_k=numbers.top_k,
            cdf=numbers.cdf,
            similarity_threshold=numbers.similarity,
            forced=plan.forced,
            causal=context.causal,
            order=plan.order,
            projection=self.parameters.projection,
            directions=self.parameters.directions,
        )
        return SparsePattern(
            mask,
            executed_density(mask, causal=True) if context.causal else None,
            plan.order,
            quantization=resolve_quantization(
                self.parameters.quantization, query, self.parameters.backend, causal=context.causal
            ),
            skip_threshold=numbers.skip,
        )

    def _numbers(self, plan: SpargePlan, query: torch.Tensor, context: AttentionContext) -> HeadNumbers:
        options = self.parameters
        if self._calibration is None:
            return HeadNumbers(plan.keep, options.cdf, options.similarity_threshold, plan.skip)
        self._calibration.check_call(query, context)
        own = {name: table[context.layer_index] for name, table in plan.tables.items()}
        return HeadNumbers(
            own.get("topk"),
            own.get("cdf"),
            own.get("similarity_threshold", options.similarity_threshold),
            own.get("skip_threshold", plan.skip),
        )

    @property
    def _block_size(self) -> tuple[int, int]:
        return self.parameters.block_size, self.parameters.key_block_size
