"""FLUX.1: strategies in ``FluxTransformer2DModel``; an image is a video of one frame."""

from typing import Any, ClassVar

import torch
from torch import nn

from core.adapter import AttendFunction, DenoiserCall, ModelAdapter
from core.errors import UnsupportedCallError
from core.layout import TokenLayout
from core.processors.processor import StrategyProcessor, check_original

TIMESTEPS = 1000.0  # the model takes timesteps divided by this


class FluxProcessor(StrategyProcessor):
    """Attention processor of one FLUX layer with a strategy in place of dense attention.

    Projections, query and key norm and rotary embedding follow
    ``diffusers.models.transformers.transformer_flux.FluxAttnProcessor`` operation by operation, so that dense
    attention gives bit-identical results. Blocks with two streams pass text beside the image, the others
    pass both in one sequence; text stands first in either.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Attention over text and image tokens together.

        Args:
            attn (FluxAttention): the layer.
            hidden_states (Tensor): image tokens ``[B, V, C]``, or all tokens ``[B, S, C]``.
            encoder_hidden_states (Tensor, Optional): text tokens ``[B, T, C]`` of a block with two streams.
            attention_mask (Tensor, Optional): not supported; FLUX pipelines never pass one.
            image_rotary_emb (tuple, Optional): cosines and sines ``[S, D]``.

        Returns:
            Tensor or tuple[Tensor, Tensor]: all tokens, or image and text.
        """
        if attention_mask is not None:
            raise UnsupportedCallError("FLUX attention with a token mask is not supported; pass none")
        parts = self._project(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            from diffusers.models.embeddings import apply_rotary_emb

            query, key = (apply_rotary_emb(part, image_rotary_emb, sequence_dim=1) for part in parts[:2])
            parts = [query, key, parts[2]]
        output = self.attend(*(part.transpose(1, 2) for part in parts))
        output = output.transpose(1, 2).flatten(2, 3).to(parts[0].dtype)
        if encoder_hidden_states is None:
            return output
        text_length = encoder_hidden_states.shape[1]
        text, image = output.split_with_sizes([text_length, output.shape[1] - text_length], dim=1)
        return attn.to_out[1](attn.to_out[0](image.contiguous())), attn.to_add_out(text.contiguous())

    def _project(self, attn: Any, image: torch.Tensor, text: torch.Tensor | None) -> list[torch.Tensor]:
        """Query, key and value of all tokens, ``[B, S, H, D]``."""
        if attn.fused_projections:
            projected = attn.to_qkv(image).chunk(3, dim=-1)
        else:
            projected = (attn.to_q(image), attn.to_k(image), attn.to_v(image))
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in projected)
        parts = [attn.norm_q(query), attn.norm_k(key), value]
        if text is None:
            return parts
        if attn.fused_projections:
            projected = attn.to_added_qkv(text).chunk(3, dim=-1)
        else:
            projected = (attn.add_q_proj(text), attn.add_k_proj(text), attn.add_v_proj(text))
        query, key, value = (part.unflatten(-1, (-1, attn.head_dim)) for part in projected)
        added = (attn.norm_added_q(query), attn.norm_added_k(key), value)
        return [torch.cat(pair, dim=1) for pair in zip(added, parts, strict=True)]


class FluxAdapter(ModelAdapter):
    """Adapter of ``diffusers.FluxTransformer2DModel``."""

    name: ClassVar[str] = "flux"

    def matches(self, denoiser: nn.Module) -> bool:
        from diffusers import FluxTransformer2DModel

        return isinstance(denoiser, FluxTransformer2DModel)

    def attention_layers(self, denoiser: nn.Module) -> list[Any]:
        double: Any = denoiser.transformer_blocks
        single: Any = denoiser.single_transformer_blocks
        return [block.attn for block in (*double, *single)]

    def output_weights(self, denoiser: nn.Module) -> list[torch.Tensor]:
        double: Any = denoiser.transformer_blocks
        single: Any = denoiser.single_transformer_blocks
        # Blocks of one stream project the attention's output and, behind it, that of their MLP together.
        joint = [block.proj_out.weight[:, : block.attn.inner_dim] for block in single]
        return [block.attn.to_out[0].weight for block in double] + joint

    def make_processor(self, original: Any, attend: AttendFunction) -> FluxProcessor:
        from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

        check_original(original, FluxAttnProcessor, family="FLUX", hint=" (unload IP adapters)")
        return FluxProcessor(original, attend)

    def read_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> DenoiserCall:
        names = ("hidden_states", "encoder_hidden_states", "pooled_projections", "timestep", "img_ids")
        named = dict(zip(names, args, strict=False)) | kwargs
        ids = named["img_ids"]
        # Row and column of every image token, and the timestep, in one read.
        last_row, last_column, timestep = torch.stack(
            [ids[..., 1].max().float(), ids[..., 2].max().float(), named["timestep"].flatten()[0].float()]
        ).tolist()
        layout = TokenLayout(
            text_length=named["encoder_hidden_states"].shape[1],
            frames=1,
            height=int(last_row) + 1,
            width=int(last_column) + 1,
        )
        if layout.video_length != named["hidden_states"].shape[1]:
            raise UnsupportedCallError(
                f"img_ids span {layout.height} x {layout.width} places for {named['hidden_states'].shape[1]} "
                "image tokens; only one image per sequence, without reference images, is supported"
            )
        return DenoiserCall(layout=layout, timestep=timestep * TIMESTEPS)
