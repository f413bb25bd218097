"""RadialStrategy: a fixed block mask whose bands narrow with the distance between frames."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, ValidationInfo, field_validator

from core.block_mask import BlockSparseMask
from core.context import AttentionContext
from core.layout import TokenLayout
from core.strategy import AttentionResult, Capabilities, dense_result
from kernels_common.strategy import BlockSparseParameters, BlockSparseStrategy, SparsePattern
from plugins.radial.mask import radial_mask
from plugins.radial.scenes import check_scenes, visible_frames


class RadialParameters(BlockSparseParameters):
    """Parameters of `RadialStrategy`; ``s`` tokens make one frame, ``d`` is the distance of two frames.

    Args:
        sparsity_type (str): ``"radial"``, or ``"dense"``, which runs and reports every call as dense.
            Default: ``"radial"``
        rule (str): half-width of the band. ``"cogvideox"``: whole frame at d = 0, ``s // 2`` at d = 1, then a
            power of two that halves whenever d doubles; ``"official"``: the same with the whole frame at d =
            1; ``"paper"``: the paper's ``s / 2^floor(log2 d)``. Default: ``"cogvideox"``
        decay_factor (float): factor on the half-widths from d = 2 on, > 0. Small values narrow the band to
            one block (``"paper"``: to one place); from ``2 * frames`` on every pair is allowed. Default: 1
        sink (bool): every query sees all of frame 0. Default: True
        keep (str): blocks that stay: ``"cover"``, those with any allowed pair; ``"fraction"``, those with at
            least ``threshold`` of their pairs allowed; ``"strict"``, as the official code judges them (only
            for comparison: it leaves holes). Default: ``"fraction"``
        threshold (float): share of allowed pairs that keeps a block, in (0, 1]; read with ``keep="fraction"``
            only. Default: 0.5
        scene_boundaries (tuple[int, ...], Optional): frames where scenes start, ascending from 0; with one
            more entry than scenes the last is the end. Default: one scene
        scene_adjacency (tuple[tuple[bool, ...], ...], Optional): row i tells which scenes scene i may look
            at; its own always. Default: its own only
        scene_unit (str): unit of ``scene_boundaries``, ``"latent"`` or ``"pixel"`` frames. Default:
            ``"latent"``
        temporal_compression (int): pixel frames per latent of the autoencoder; read with pixel boundaries.
            Default: 4
        temporal_patch (int): latents per token frame, 2 for CogVideoX1.5; read with boundaries. Default: 1
        front_padding (int): latents that the model puts in front, 1 for CogVideoX1.5 with an odd number of
            latents; read with boundaries. Default: 0
        use_sage_attention (bool): INT8 scores and FP8 values (SageAttention, arXiv 2411.10958); gradients are
            then not available. Default: False
    """

    read_by: ClassVar[Mapping[str, Mapping[str, Collection[str]]]] = {
        "keep": {"cover": (), "fraction": ("threshold",), "strict": ()}
    }

    sparsity_type: Literal["radial", "dense"] = Field("radial", description="radial mask, or dense attention")
    rule: Literal["cogvideox", "official", "paper"] = Field("cogvideox", description="half-width of the band")
    decay_factor: float = Field(
        1.0, gt=0, allow_inf_nan=False, description="factor on the half-widths from frame distance 2 on"
    )
    sink: bool = Field(True, description="every query sees all of frame 0")
    keep: Literal["cover", "fraction", "strict"] = Field("fraction", description="blocks that stay")
    threshold: float = Field(0.5, gt=0, le=1, description="share of allowed pairs that keeps a block")
    scene_boundaries: tuple[int, ...] | None = Field(None, description="frames where scenes start")
    scene_adjacency: tuple[tuple[bool, ...], ...] | None = Field(
        None, description="row i: scenes that scene i may look at"
    )
    scene_unit: Literal["latent", "pixel"] = Field("latent", description="unit of scene_boundaries, frames")
    temporal_compression: int = Field(4, ge=1, description="pixel frames per latent")
    temporal_patch: int = Field(1, ge=1, description="latents per token frame")
    front_padding: int = Field(0, ge=0, description="latents that the model puts in front")
    use_sage_attention: bool = Field(False, description="INT8 scores and FP8 values")

    @field_validator("scene_boundaries")
    @classmethod
    def _check_boundaries(cls, boundaries: tuple[int, ...] | None) -> tuple[int, ...] | None:
        if boundaries is not None:
            check_scenes(boundaries, None)
        return boundaries

    @field_validator("scene_adjacency")
    @classmethod
    def _check_adjacency(cls, adjacency: Any, info: ValidationInfo) -> Any:
        boundaries = info.data.get("scene_boundaries")
        if adjacency is not None and boundaries is not None:
            check_scenes(boundaries, adjacency)
        elif adjacency is not None and "scene_boundaries" in info.data:
            raise ValueError("needs scene_boundaries")
        return adjacency


class RadialStrategy(BlockSparseStrategy):
    """Radial attention: the further apart two frames are, the narrower the band of places they see."""

    name: ClassVar[str] = "radial"
    Parameters: ClassVar[type[RadialParameters]] = RadialParameters
    capabilities: ClassVar[Capabilities] = Capabilities(gqa=True, backward=True)

    def plan(
        self, layout: TokenLayout, num_heads: int, head_dim: int, device: torch.device, dtype: torch.dtype
    ) -> SparsePattern:
        """The mask of one layout and its executed density.

        Raises:
            ParameterError: the scenes do not fit the frames of the layout.
        """
        mask = layout_mask(layout, self.parameters)
        quantization = "int8_fp8" if self.parameters.use_sage_attention else "none"
        return SparsePattern(mask.to(device), float(mask.density()), quantization=quantization)

    def pattern(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> SparsePattern:
        """The plan of the layout: the mask is fixed before sampling."""
        return self.planned(query, context)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> AttentionResult:
        """Attention over the mask; dense with ``sparsity_type="dense"`` and for a single frame."""
        # One frame has no distance to decay with.
        if self.parameters.sparsity_type == "dense" or context.layout.frames == 1:
            return dense_result(query, key, value)
        return super().attend(query, key, value, context)


def scene_frames(layout: TokenLayout, parameters: RadialParameters) -> torch.Tensor | None:
    """Frames that each frame may look at, ``[F, F]`` bool; None without scenes.

    Raises:
        ParameterError: the scenes do not fit the frames of the layout.
    """
    if parameters.scene_boundaries is None:
        return None
    return visible_frames(
        layout.frames,
        parameters.scene_boundaries,
        parameters.scene_adjacency,
        unit=parameters.scene_unit,
        temporal_compression=parameters.temporal_compression,
        temporal_patch=parameters.temporal_patch,
        front_padding=parameters.front_padding,
    )


def layout_mask(layout: TokenLayout, parameters: RadialParameters) -> BlockSparseMask:
    """The radial mask of a layout on the CPU.

    Raises:
        ParameterError: the scenes do not fit the frames of the layout.
    """
    return radial_mask(
        layout,
        block_size=(parameters.block_size, parameters.block_size),
        rule=parameters.rule,
        decay_factor=parameters.decay_factor,
        sink=parameters.sink,
        keep=parameters.keep,
        threshold=parameters.threshold,
        visible=scene_frames(layout, parameters),
    )
