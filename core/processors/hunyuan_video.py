"""HunyuanVideo, text-to-video and image-to-video: strategies in ``HunyuanVideoTransformer3DModel``."""

from typing import Any, ClassVar

import torch
from torch import nn

from core.adapter import AttendFunction, DenoiserCall, ModelAdapter
from core.errors import UnsupportedCallError
from core.layout import TokenLayout
from core.processors.processor import StrategyProcessor, check_original

ARGUMENTS = ("hidden_states", "timestep", "encoder_hidden_states", "encoder_attention_mask")


class HunyuanVideoProcessor(StrategyProcessor):
    """Attention processor of one HunyuanVideo layer with a strategy in place of dense attention.

    Projections, query and key norm and rotary embedding follow
    ``diffusers.models.transformers.transformer_hunyuan_video.HunyuanVideoAttnProcessor2_0`` operation by
    operation, so that dense attention over text without padding gives bit-identical results. Blocks with two
    streams project video and text apart, the others together; text stands last in either.
    """

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        image_rotary_emb: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Attention over video and text tokens together.

        Args:
            attn (Attention): the layer.
            hidden_states (Tensor): video tokens ``[B, V, C]``.
            encoder_hidden_states (Tensor): text tokens ``[B, T, C]``, padding last.
            attention_mask (Tensor, Optional): ``[B, 1, 1, V + T]``, False at padding. Not looked at: the
                model makes it from the mask that `HunyuanVideoAdapter.read_call` reads, and ``attend``
                leaves padding out.
            image_rotary_emb (tuple, Optional): cosines and sines ``[V, D]``.

        Returns:
            tuple[Tensor, Tensor]: video ``[B, V, C]`` and text ``[B, T, C]``; what stands in padded rows
            reaches nothing.
        """
        video_length = hidden_states.shape[1]
        query, key, value = self._project(attn, hidden_states, encoder_hidden_states)
        if image_rotary_emb is not None:
            self._rotate(query[:, :video_length], image_rotary_emb)
            self._rotate(key[:, :video_length], image_rotary_emb)
        output = self.attend(*(part.transpose(1, 2) for part in (query, key, value)))
        output = output.transpose(1, 2).flatten(2, 3).to(query.dtype)
        video, text = output[:, :video_length], output[:, video_length:]
        if attn.to_out is not None:
            video = attn.to_out[1](attn.to_out[0](video))
        return video, text if attn.to_add_out is None else attn.to_add_out(text)

    def _project(self, attn: Any, video: torch.Tensor, text: torch.Tensor) -> list[torch.Tensor]:
        """Query, key and value of all tokens, ``[B, S, H, D]``."""
        own = (attn.to_q, attn.norm_q), (attn.to_k, attn.norm_k), (attn.to_v, None)
        if attn.add_q_proj is None:
            tokens = torch.cat([video, text], dim=1)
            return [_heads(attn, tokens, *layers) for layers in own]
        added = (
            (attn.add_q_proj, attn.norm_added_q),
            (attn.add_k_proj, attn.norm_added_k),
            (attn.add_v_proj, None),
        )
        return [
            torch.cat([_heads(attn, video, *own_layers), _heads(attn, text, *added_layers)], dim=1)
            for own_layers, added_layers in zip(own, added, strict=True)
        ]

    @staticmethod
    def _rotate(states: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> None:
        from diffusers.models.embeddings import apply_rotary_emb

        states.copy_(apply_rotary_emb(states, rotary, sequence_dim=1))


def _heads(attn: Any, tokens: torch.Tensor, projection: Any, norm: Any) -> torch.Tensor:
    """One projection split into heads and normed, ``[B, N, H, D]``."""
    states = projection(tokens).unflatten(2, (attn.heads, -1))
    return states if norm is None else norm(states)


class HunyuanVideoAdapter(ModelAdapter):
    """Adapter of ``diffusers.HunyuanVideoTransformer3DModel``, whatever way it is given an image.

    Padded text takes no part: a call's layout counts the valid tokens of the mask.
    """

    name: ClassVar[str] = "hunyuan-video"

    def matches(self, denoiser: nn.Module) -> bool:
        from diffusers import HunyuanVideoTransformer3DModel

        return isinstance(denoiser, HunyuanVideoTransformer3DModel)

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

    def make_processor(self, original: Any, attend: AttendFunction) -> HunyuanVideoProcessor:
        from diffusers.models.transformers.transformer_hunyuan_video import HunyuanVideoAttnProcessor2_0

        check_original(original, HunyuanVideoAttnProcessor2_0, family="HunyuanVideo")
        return HunyuanVideoProcessor(original, attend)

    def read_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> DenoiserCall:
        named = dict(zip(ARGUMENTS, args, strict=False)) | kwargs
        timestep, valid, padding = _read_text(named["timestep"], named["encoder_attention_mask"])
        frames, height, width = named["hidden_states"].shape[2:]
        config: Any = denoiser.config
        layout = TokenLayout(
            text_length=valid,
            frames=frames // config.patch_size_t,
            height=height // config.patch_size,
            width=width // config.patch_size,
            text_first=False,
        )
        return DenoiserCall(layout=layout, timestep=timestep, padding=padding)


def _read_text(timestep: torch.Tensor, mask: torch.Tensor) -> tuple[float, int, int]:
    """Timestep, valid and padded text tokens, in one read.

    Args:
        timestep (Tensor): ``[B]``.
        mask (Tensor): ``[B, T]``, 1 at valid text tokens and 0 at padding, of any dtype.

    Raises:
        UnsupportedCallError: batch entries differ in their valid tokens, or padding stands before text.
    """
    valid = mask.sum(dim=1, dtype=torch.int)
    expected = torch.arange(mask.shape[1], device=mask.device) < valid[:, None]
    facts = (timestep.flatten()[0], valid.amin(), valid.amax(), (expected == mask).all())
    step, fewest, most, valid_first = torch.stack([fact.double() for fact in facts]).tolist()
    if not valid_first:
        raise UnsupportedCallError(
            "HunyuanVideo with a strategy needs an encoder_attention_mask of ones, then zeros, for every "
            "batch entry: valid text first, padding last; let the tokenizer pad on the right"
        )
    if fewest != most:
        raise UnsupportedCallError(
            "HunyuanVideo with a strategy needs as many valid text tokens in every batch entry, got "
            f"{fewest:.0f} to {most:.0f}; draw one prompt at a time, or prompts of equal length"
        )
    return step, int(most), mask.shape[1] - int(most)
