"""LTX-Video: strategies in the self-attention of ``LTXVideoTransformer3DModel``."""

from typing import Any, ClassVar

import torch
from torch import nn

from core.adapter import AttendFunction, DenoiserCall, ModelAdapter
from core.errors import UnsupportedCallError
from core.layout import TokenLayout
from core.processors.processor import StrategyProcessor, check_original

ARGUMENTS = (
    "hidden_states",
    "encoder_hidden_states",
    "timestep",
    "encoder_attention_mask",
    "num_frames",
    "height",
    "width",
    "rope_interpolation_scale",
    "video_coords",
)


class LTXVideoProcessor(StrategyProcessor):
    """Attention processor of one LTX-Video self-attention with a strategy in place of dense attention.

    Projections, query and key norm and rotary embedding (before the heads are split) follow
    ``diffusers.models.transformers.transformer_ltx.LTXVideoAttnProcessor`` operation by operation, so that
    dense attention gives bit-identical results.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Self-attention over video tokens.

        Args:
            attn (LTXAttention): the layer.
            hidden_states (Tensor): video tokens ``[B, S, C]``.
            encoder_hidden_states (Tensor, Optional): not supported; cross-attention keeps its own processor.
            attention_mask (Tensor, Optional): not supported; LTX-Video masks only its cross-attention.
            image_rotary_emb (tuple, Optional): cosines and sines ``[B, S, H * D]``.

        Returns:
            Tensor: ``[B, S, C]``.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            raise UnsupportedCallError(
                "LTX-Video self-attention with text or a token mask is not supported; pass neither"
            )
        query = attn.norm_q(attn.to_q(hidden_states))
        key = attn.norm_k(attn.to_k(hidden_states))
        value = attn.to_v(hidden_states)
        if image_rotary_emb is not None:
            from diffusers.models.transformers.transformer_ltx import apply_rotary_emb

            query, key = apply_rotary_emb(query, image_rotary_emb), apply_rotary_emb(key, image_rotary_emb)
        parts = (part.unflatten(2, (attn.heads, -1)).transpose(1, 2) for part in (query, key, value))
        output = self.attend(*parts).transpose(1, 2).flatten(2, 3).to(query.dtype)
        return attn.to_out[1](attn.to_out[0](output))


class LTXVideoAdapter(ModelAdapter):
    """Adapter of ``diffusers.LTXVideoTransformer3DModel``: its self-attention; text has layers of its own."""

    name: ClassVar[str] = "ltx-video"

    def matches(self, denoiser: nn.Module) -> bool:
        from diffusers import LTXVideoTransformer3DModel

        return isinstance(denoiser, LTXVideoTransformer3DModel)

    def attention_layers(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.transformer_blocks
        return [block.attn1 for block in blocks]

    def make_processor(self, original: Any, attend: AttendFunction) -> LTXVideoProcessor:
        from diffusers.models.transformers.transformer_ltx import LTXVideoAttnProcessor

        check_original(original, LTXVideoAttnProcessor, family="LTX-Video")
        return LTXVideoProcessor(original, attend)

    def read_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> DenoiserCall:
        named = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        # Tokens of a given image have earlier timesteps of their own; the others have the step's.
        timestep = named["timestep"].max()
        tokens = named["hidden_states"].shape[1]
        coordinates = named.get("video_coords")
        if coordinates is None:
            sizes = tuple(named.get(size) for size in ("num_frames", "height", "width"))
            return DenoiserCall(layout=_given_grid(sizes, tokens), timestep=timestep.item())
        # Timestep and coordinates in one read.
        facts = torch.cat([timestep.double().view(1), coordinates.double().flatten()]).cpu()
        layout = _grid_of(facts[1:].view(coordinates.shape), tokens)
        return DenoiserCall(layout=layout, timestep=facts[0].item())


def _given_grid(sizes: tuple[Any, ...], tokens: int) -> TokenLayout:
    if None in sizes:
        raise UnsupportedCallError(
            "LTX-Video with a strategy needs the grid of its tokens; pass num_frames, height and width of "
            "the latents, or video_coords"
        )
    layout = TokenLayout(0, *sizes)
    if layout.video_length != tokens:
        raise UnsupportedCallError(
            f"num_frames, height and width are a grid of {layout.frames} x {layout.height} x {layout.width}, "
            f"but hidden_states has {tokens} tokens; pass the sizes of the latents in tokens"
        )
    return layout


def _grid_of(coordinates: torch.Tensor, tokens: int) -> TokenLayout:
    """The grid whose places have these coordinates.

    Args:
        coordinates (Tensor): time, row and column of every token, ``[B, 3, S]``, in any units.
        tokens (int): S of ``hidden_states``.

    Raises:
        UnsupportedCallError: they are not one grid, frame by frame and row by row, for every batch entry.
    """
    (times, frame), (rows, row), (columns, column) = (
        part.unique(return_inverse=True) for part in coordinates.unbind(1)
    )
    layout = TokenLayout(0, len(times), len(rows), len(columns))
    order = (frame * layout.height + row) * layout.width + column
    if coordinates.shape[2] != tokens or not (order == torch.arange(tokens)).all():
        raise UnsupportedCallError(
            f"video_coords of {coordinates.shape[2]} tokens are not one grid of frames in order for the "
            f"{tokens} tokens of hidden_states; an image or a clip can be given at frame 0 only, where it "
            "takes the place of the video's own tokens"
        )
    return layout
