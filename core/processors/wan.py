"""Wan 2.1 and 2.2, text-to-video, image-to-video and VACE: strategies in ``WanTransformer3DModel``."""

from typing import Any, ClassVar

import torch
from torch import nn

from core.adapter import AttendFunction, DenoiserCall, ModelAdapter
from core.errors import UnsupportedCallError
from core.layout import TokenLayout
from core.processors.processor import StrategyProcessor, check_original


class WanProcessor(StrategyProcessor):
    """Self-attention processor of one Wan layer with a strategy in place of dense attention.

    Projections, query and key norm and rotary embedding follow
    ``diffusers.models.transformers.transformer_wan.WanAttnProcessor`` operation by operation, so that dense
    attention gives bit-identical results. Text and image keys belong to cross-attention, which stays the
    model's own.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        """Attention among the video tokens.

        Args:
            attn (WanAttention): the layer.
            hidden_states (Tensor): video tokens ``[B, S, C]``.
            encoder_hidden_states (Tensor, Optional): not supported; self-attention has no other tokens.
            attention_mask (Tensor, Optional): not supported; Wan pipelines never pass one.
            rotary_emb (tuple, Optional): cosines and sines ``[1, S, 1, D]``, each number twice.

        Returns:
            Tensor: video tokens ``[B, S, C]``.
        """
        if attention_mask is not None:
            raise UnsupportedCallError("Wan self-attention with a token mask is not supported; pass none")
        if encoder_hidden_states is not None:
            raise UnsupportedCallError("Wan self-attention takes no encoder_hidden_states; pass none")
        query, key, value = self._project(attn, hidden_states)
        if rotary_emb is not None:
            query, key = rotate(query, rotary_emb), rotate(key, rotary_emb)
        output = self.attend(query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2))
        output = output.transpose(1, 2).flatten(2, 3).type_as(query)
        return attn.to_out[1](attn.to_out[0](output))

    def _project(self, attn: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value, ``[B, S, H, D]``; the norms are over all heads together."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(tokens).chunk(3, dim=-1)
        else:
            query, key, value = attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens)
        parts = (attn.norm_q(query), attn.norm_k(key), value)
        return [part.unflatten(2, (attn.heads, -1)) for part in parts]


def rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotary embedding of neighbouring dimensions in pairs.

    Args:
        states (Tensor): ``[B, S, H, D]``.
        rotary (tuple): cosines and sines ``[1, S, 1, D]``, each number twice.
    """
    cosines, sines = rotary[0][..., 0::2], rotary[1][..., 1::2]
    first, second = states.unflatten(-1, (-1, 2)).unbind(-1)
    turned = (first * cosines - second * sines, first * sines + second * cosines)
    return torch.stack(turned, dim=-1).flatten(-2).type_as(states)


class WanAdapter(ModelAdapter):
    """Adapter of ``diffusers.WanTransformer3DModel`` and ``WanVACETransformer3DModel``."""

    name: ClassVar[str] = "wan"

    def matches(self, denoiser: nn.Module) -> bool:
        from diffusers import WanTransformer3DModel, WanVACETransformer3DModel

        return isinstance(denoiser, WanTransformer3DModel | WanVACETransformer3DModel)

    def attention_layers(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.blocks
        control: Any = getattr(denoiser, "vace_blocks", ())
        return [block.attn1 for block in (*blocks, *control)]  # layer n is block n, with VACE as without

    def make_processor(self, original: Any, attend: AttendFunction) -> WanProcessor:
        from diffusers.models.transformers.transformer_wan import WanAttnProcessor

        check_original(original, WanAttnProcessor, family="Wan")
        return WanProcessor(original, attend)

    def read_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> DenoiserCall:
        named = dict(zip(("hidden_states", "timestep"), args, strict=False)) | kwargs
        config: Any = denoiser.config
        sizes = zip(named["hidden_states"].shape[2:], config.patch_size, strict=True)
        layout = TokenLayout(0, *(size // patch for size, patch in sizes))
        # With a timestep for every token (Wan 2.2 5B), those of a given first frame are at 0.
        return DenoiserCall(layout=layout, timestep=float(torch.as_tensor(named["timestep"]).max()))
