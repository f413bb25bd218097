"""Trains the video transformer and, along with it, the text encoder.

Shape legend: B clips, F of the 17 frames, C = 12 channels, h x w = 24 x 40 latents, 240 tokens a frame, S =
16 text tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import nn
from transformers import T5EncoderModel

from harness.demo_model.dataset import LatentClips
from harness.demo_model.pipeline import build_scheduler
from harness.demo_model.text_binding import BindingHeads
from harness.demo_model.training import AveragedWeights, StageClock, adamw, muon, set_learning_rate


@dataclass(frozen=True)
class TransformerTraining:
    """Settings of one stage.

    Args:
        seconds: length of the stage.
        max_steps: upper limit on steps, or None.
        frames: frames trained on, one from each of as many equal parts of the clip; None for all.
        batch_size: clips per step.
        learning_rate: peak rate of Muon and AdamW.
        flat: fraction of the stage before the rate decays linearly to 0.
        average_decay: decay per step of the averaged weights.
        text_weight: weight of the word order loss that keeps the text encoder in shape.
    """

    seconds: float
    max_steps: int | None = None
    frames: int | None = None
    batch_size: int = 32
    learning_rate: float = 1.5e-3
    flat: float = 0.3
    average_decay: float = 0.998
    text_weight: float = 0.05


class TrainableTransformer(nn.Module):
    """The shipped transformer with trainable positions, run on any subset of frames, and the text encoder.

    Args:
        transformer: model with RoPE and learned positions.
        text_encoder: T5 encoder.
        heads: readers for the word order loss.
    """

    def __init__(
        self, transformer: CogVideoXTransformer3DModel, text_encoder: T5EncoderModel, heads: BindingHeads
    ):
        super().__init__()
        self.transformer, self.text_encoder, self.heads = transformer, text_encoder, heads
        config = transformer.config
        grid = (config.sample_height // config.patch_size, config.sample_width // config.patch_size)
        self.text_length, self.frame_tokens = config.max_text_seq_length, grid[0] * grid[1]
        self.positions = nn.Parameter(transformer.patch_embed.pos_embedding.detach()[0].float().clone())
        rotary = get_3d_rotary_pos_embed(
            embed_dim=config.attention_head_dim,
            crops_coords=((0, 0), grid),
            grid_size=grid,
            temporal_size=config.sample_frames,
        )
        for name, table in zip(("cosines", "sines"), rotary, strict=False):
            self.register_buffer(
                name, table.float().view(config.sample_frames, self.frame_tokens, -1), persistent=False
            )

    def initialise(self) -> None:
        """Zeroes the modulations and the output layer, in place, so that training starts from the
        identity.
        """
        model = self.transformer
        for block in model.transformer_blocks:
            for norm in (block.norm1, block.norm2):
                nn.init.zeros_(norm.linear.weight)
                nn.init.zeros_(norm.linear.bias)
        for layer in (model.norm_out.linear, model.proj_out):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def store_positions(self) -> None:
        """Copies the trained positions into the transformer's own buffer."""
        self.transformer.patch_embed.pos_embedding.copy_(self.positions.detach()[None])

    def forward(self, latents, tokens, timestep, frames):
        """Predicts v.

        Args:
            latents: noised latents `(B, F, C, h, w)`.
            tokens: token ids `(B, S)`.
            timestep: `(B,)`, 0 to 999.
            frames: indices of the F frames within the clip, int64 `(F,)`.

        Returns:
            The prediction, shaped as `latents`, and the text encoder's hidden states `(B, S, 128)`.
        """
        model = self.transformer
        text = self.text_encoder(tokens)[0]
        embedding = model.time_embedding(model.time_proj(timestep))
        video = model.patch_embed.proj(latents.flatten(0, 1)).flatten(2).transpose(1, 2)
        video = video.unflatten(0, latents.shape[:2]).flatten(1, 2)
        places = self.positions[self.text_length :].view(-1, self.frame_tokens, self.positions.shape[-1])
        video = video + places[frames].flatten(0, 1)
        words = model.patch_embed.text_proj(text) + self.positions[: self.text_length]
        rotary = self.cosines[frames].flatten(0, 1), self.sines[frames].flatten(0, 1)
        for block in model.transformer_blocks:
            video, words = block(video, words, embedding, rotary)
        video = model.proj_out(model.norm_out(model.norm_final(video), temb=embedding))
        return self._to_latents(video, latents.shape), text

    def _to_latents(self, video, shape):
        patch = self.transformer.config.patch_size
        batch, frames, channels, height, width = shape
        video = video.view(batch, frames, height // patch, width // patch, channels, patch, patch)
        return video.permute(0, 1, 4, 2, 5, 3, 6).reshape(shape)


def build_optimizers(model: TrainableTransformer, learning_rate: float) -> list[torch.optim.Optimizer]:
    """Returns Muon for the attention and feed-forward matrices and AdamW for everything else."""
    matrices = []
    for block in model.transformer.transformer_blocks:
        attention = block.attn1
        matrices += [
            attention.to_q.weight,
            attention.to_k.weight,
            attention.to_v.weight,
            attention.to_out[0].weight,
        ]
        matrices += [layer.weight for layer in block.ff.modules() if isinstance(layer, nn.Linear)]
    chosen = {id(value) for value in matrices}
    others = [value for value in model.parameters() if id(value) not in chosen]
    return [muon(matrices, learning_rate), adamw(others, learning_rate, beta2=0.98)]


def compile_blocks(model: TrainableTransformer) -> None:
    """Compiles the transformer blocks one by one; all of them share one compiled graph per shape."""
    for block in model.transformer.transformer_blocks:
        block.compile(dynamic=False)


def pick_frames(total: int, count: int | None, device) -> torch.Tensor:
    """Draws one frame from each of `count` equal parts of `total` frames, ascending; all frames for None."""
    if count is None or count >= total:
        return torch.arange(total, device=device)
    edges = torch.linspace(0, total, count + 1, device=device).floor()
    drawn = edges[:-1] + torch.rand(count, device=device) * (edges[1:] - edges[:-1])
    return drawn.long().clamp(max=total - 1)


def diffusion_loss(model, clips: LatentClips, picked, frames, alphas, text_weight: float):
    """Returns (total, v-prediction loss) for the clips `picked`, int64 `(B,)`, with stratified timesteps."""
    clean = clips.latents[picked][:, frames].float()
    count = len(alphas)
    strata = (
        torch.randperm(len(picked), device=clean.device) + torch.rand(len(picked), device=clean.device)
    ) / len(picked)
    timestep = (strata * count).long().clamp(max=count - 1)
    signal = alphas[timestep].view(-1, 1, 1, 1, 1)
    noise = torch.randn_like(clean)
    noised = signal.sqrt() * clean + (1 - signal).sqrt() * noise
    target = signal.sqrt() * noise - (1 - signal).sqrt() * clean
    cuda = clean.is_cuda
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=cuda):
        output, text = model(noised, clips.tokens[picked], timestep, frames)
    loss = (output.float() - target).square().mean()
    return loss + text_weight * model.heads.loss(text.float(), clips.labels[picked]), loss


def train_transformer(
    model: TrainableTransformer,
    average: AveragedWeights,
    clips: LatentClips,
    settings: TransformerTraining,
    log: Callable[[str], None],
    elapsed: float = 0.0,
    on_timer: Callable[[float], None] | None = None,
    timer_seconds: float = 120.0,
) -> None:
    """Trains one stage in place.

    Args:
        model: the model; its device is used.
        average: averaged weights of `model`, updated every step.
        clips: training clips.
        settings: the stage.
        log: called with progress lines.
        elapsed: seconds of this stage done in earlier runs.
        on_timer: called with the seconds of this stage done, every `timer_seconds`; to save checkpoints.
        timer_seconds: time between two calls of `on_timer`.
    """
    alphas = build_scheduler().alphas_cumprod.float().to(clips.latents.device)
    optimizers = build_optimizers(model, settings.learning_rate)
    average.decay = settings.average_decay
    clock = StageClock(settings.seconds, settings.max_steps, elapsed)
    running, smooth, saved = True, None, clock.elapsed
    while running:
        set_learning_rate(optimizers, clock, warmup=50, flat=settings.flat)
        picked = torch.randint(len(clips.latents), (settings.batch_size,), device=alphas.device)
        frames = pick_frames(clips.latents.shape[1], settings.frames, alphas.device)
        total, loss = diffusion_loss(model, clips, picked, frames, alphas, settings.text_weight)
        for optimizer in optimizers:
            optimizer.zero_grad()
        total.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        average.update()
        smooth = loss.detach() if smooth is None else smooth.lerp(loss.detach(), 0.02)
        if clock.step % 100 == 0:
            log(f"transformer: step {clock.step} at {clock.elapsed:.0f} s, loss {smooth.item():.5f}")
        if on_timer and clock.elapsed - saved > timer_seconds:
            saved = clock.elapsed
            on_timer(clock.elapsed)
        running = clock.tick()
    log(f"transformer: {clock.step} steps, {clock.elapsed:.0f} s, loss {smooth.item():.5f}")
