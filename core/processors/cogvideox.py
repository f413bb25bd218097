"""CogVideoX 1.0, 1.5 and image-to-video: strategies in ``CogVideoXTransformer3DModel``."""

from typing import Any, ClassVar

import torch
from torch import nn

from core.adapter import AttendFunction, DenoiserCall, ModelAdapter
from core.errors import UnsupportedCallError
from core.layout import TokenLayout
from core.processors.processor import StrategyProcessor, check_original


class CogVideoXProcessor(StrategyProcessor):
    """Attention processor of one CogVideoX layer with a strategy in place of dense attention.

    Projections, query and key norm and rotary embedding follow
    ``diffusers.models.attention_processor.CogVideoXAttnProcessor2_0`` and its fused form operation
    by operation, so that dense attention gives bit-identical results.

    Args:
        original (Any): the processor this one stands in for.
        attend (AttendFunction): attention over ``[B, H, S, D]`` tensors.
        fused (bool): one matrix projects query, key and value.
    """

    def __init__(self, original: Any, attend: AttendFunction, fused: bool) -> None:
        super().__init__(original, attend)
        self.fused = fused

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over text and video tokens together.

        Args:
            attn (Attention): the layer.
            hidden_states (Tensor): video tokens ``[B, V, C]``.
            encoder_hidden_states (Tensor): text tokens ``[B, T, C]``; they stand first.
            attention_mask (Tensor, Optional): not supported; CogVideoX pipelines never pass one.
            image_rotary_emb (tuple, Optional): cosines and sines ``[V, D]``; None without RoPE (2b).

        Returns:
            tuple[Tensor, Tensor]: video ``[B, V, C]`` and text ``[B, T, C]``.
        """
        if attention_mask is not None:
            raise UnsupportedCallError("CogVideoX attention with a token mask is not supported; pass none")
        text_length = encoder_hidden_states.size(1)
        tokens = torch.cat([encoder_hidden_states, hidden_states], dim=1)
        query, key, value = self._project(attn, tokens)
        if image_rotary_emb is not None:
            self._rotate(query, text_length, image_rotary_emb)
            self._rotate(key, text_length, image_rotary_emb)
        output = self.attend(query, key, value)
        output = output.transpose(1, 2).reshape(tokens.shape[0], -1, query.shape[1] * query.shape[3])
        output = attn.to_out[1](attn.to_out[0](output))
        text, video = output.split([text_length, output.size(1) - text_length], dim=1)
        return video, text

    def _project(self, attn: Any, tokens: torch.Tensor) -> list[torch.Tensor]:
        if self.fused:
            fused = attn.to_qkv(tokens)
            projected = torch.split(fused, fused.shape[-1] // 3, dim=-1)
        else:
            projected = (attn.to_q(tokens), attn.to_k(tokens), attn.to_v(tokens))
        head_dim = projected[1].shape[-1] // attn.heads
        split = (tokens.shape[0], -1, attn.heads, head_dim)
        query, key, value = (part.view(split).transpose(1, 2) for part in projected)
        if attn.norm_q is not None:
            query = attn.norm_q(query)
        if attn.norm_k is not None:
            key = attn.norm_k(key)
        return [query, key, value]

    @staticmethod
    def _rotate(states: torch.Tensor, text_length: int, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        from diffusers.models.embeddings import apply_rotary_emb

        states[:, :, text_length:] = apply_rotary_emb(states[:, :, text_length:], rotary)


class CogVideoXAdapter(ModelAdapter):
    """Adapter of ``diffusers.CogVideoXTransformer3DModel``."""

    name: ClassVar[str] = "cogvideox"

    def matches(self, denoiser: nn.Module) -> bool:
        from diffusers import CogVideoXTransformer3DModel

        return isinstance(denoiser, CogVideoXTransformer3DModel)

    def attention_layers(self, denoiser: nn.Module) -> list[Any]:
        blocks: Any = denoiser.transformer_blocks
        return [block.attn1 for block in blocks]

    def make_processor(self, original: Any, attend: AttendFunction) -> CogVideoXProcessor:
        from diffusers.models.attention_processor import (
            CogVideoXAttnProcessor2_0,
            FusedCogVideoXAttnProcessor2_0,
        )

        own = (CogVideoXAttnProcessor2_0, FusedCogVideoXAttnProcessor2_0)
        check_original(original, *own, family="CogVideoX")
        return CogVideoXProcessor(original, attend, fused=type(original) is FusedCogVideoXAttnProcessor2_0)

    def read_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> DenoiserCall:
        named = dict(zip(("hidden_states", "encoder_hidden_states", "timestep"), args, strict=False)) | kwargs
        _, latent_frames, _, height, width = named["hidden_states"].shape
        config: Any = denoiser.config
        temporal_patch = config.patch_size_t or 1
        layout = TokenLayout(
            text_length=named["encoder_hidden_states"].shape[1],
            frames=-(-latent_frames // temporal_patch),
            height=height // config.patch_size,
            width=width // config.patch_size,
        )
        timestep = torch.as_tensor(named["timestep"]).flatten()[0].item()
        return DenoiserCall(layout=layout, timestep=float(timestep))
