"""Trains the autoencoder on single frames, through the modules of the real 3-D network.

Only the last (current-time) tap of every causal convolution carries weight and the others stay 0, so that
training can run
2-D convolutions and the 3-D network still gives these frames for clips of any length.
Shape legend: B frames, H x W pixels, h x w = H/8 x W/8 latents, C = 12 latent channels.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLCogVideoX
from torch import nn
from torch.nn import functional as F

from harness.demo_model.captions import sample_scene
from harness.demo_model.clips import render_clips, to_uint8
from harness.demo_model.training import AveragedWeights, StageClock, adamw, set_learning_rate

_SILENT_LOG_VARIANCE = -20.0


@dataclass(frozen=True)
class VaeTraining:
    """Settings of the stage.

    Args:
        seconds: length of the stage.
        max_steps: upper limit on steps, or None.
        num_frames: size of the pool of rendered frames.
        batch_size: frames per step.
        learning_rate: peak rate of AdamW.
        latent_noise: largest standard deviation of the noise that the decoder must forgive.
        object_weight: extra loss weight on objects and their edges.
    """

    seconds: float = 120.0
    max_steps: int | None = None
    num_frames: int = 12000
    batch_size: int = 16
    learning_rate: float = 2e-3
    latent_noise: float = 0.15
    object_weight: float = 6.0


def prepare_vae(vae: AutoencoderKLCogVideoX) -> None:
    """Zeroes all past taps and silences the variance half of the encoder's output, in place."""
    with torch.no_grad():
        for module in vae.modules():
            if isinstance(module, nn.Conv3d) and module.kernel_size[0] > 1:
                module.weight[:, :, :-1] = 0
        channels = vae.config.latent_channels
        vae.encoder.conv_out.conv.weight[channels:] = 0
        vae.encoder.conv_out.conv.bias[channels:] = _SILENT_LOG_VARIANCE


def _conv(module, x):
    conv = getattr(module, "conv", module)
    return F.conv2d(x, conv.weight[:, :, -1], conv.bias, padding=conv.kernel_size[-1] // 2)


def _norm(norm, x, latents):
    if isinstance(norm, nn.GroupNorm):
        return norm(x)
    scale, shift = (
        F.interpolate(_conv(conv, latents), size=x.shape[-2:]) for conv in (norm.conv_y, norm.conv_b)
    )
    return norm.norm_layer(x) * scale + shift


def _resnet(block, x, latents=None):
    hidden = _conv(block.conv1, F.silu(_norm(block.norm1, x, latents)))
    hidden = _conv(block.conv2, F.silu(_norm(block.norm2, hidden, latents)))
    return hidden + (x if block.in_channels == block.out_channels else _conv(block.conv_shortcut, x))


def encode_frames(vae: AutoencoderKLCogVideoX, images: torch.Tensor) -> torch.Tensor:
    """Encodes frames `(B, 3, H, W)` in -1..1 to latent means `(B, C, h, w)` with 2-D convolutions."""
    encoder = vae.encoder
    x = _conv(encoder.conv_in, images)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x)
        for down in block.downsamplers or ():
            x = down.conv(F.pad(x, (0, 1, 0, 1)))
    for resnet in encoder.mid_block.resnets:
        x = _resnet(resnet, x)
    x = _conv(encoder.conv_out, F.silu(encoder.norm_out(x)))
    return x[:, : vae.config.latent_channels]


def decode_frames(vae: AutoencoderKLCogVideoX, latents: torch.Tensor) -> torch.Tensor:
    """Decodes latents `(B, C, h, w)` to frames `(B, 3, H, W)` in about -1..1 with 2-D convolutions."""
    decoder = vae.decoder
    x = _conv(decoder.conv_in, latents)
    for resnet in decoder.mid_block.resnets:
        x = _resnet(resnet, x, latents)
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = _resnet(resnet, x, latents)
        for up in block.upsamplers or ():
            x = up.conv(F.interpolate(x, scale_factor=2.0))
    return _conv(decoder.conv_out, F.silu(_norm(decoder.norm_out, x, latents)))


def reconstruction_loss(vae, images, masks, latent_noise: float, object_weight: float) -> torch.Tensor:
    """Returns the loss of one batch: images `(B, 3, H, W)` in -1..1, masks `(B, 1, H, W)` in 0..1."""
    latents = encode_frames(vae, images)
    level = latent_noise * torch.rand(len(images), 1, 1, 1, device=images.device)
    output = decode_frames(vae, latents + level * torch.randn_like(latents)).float()
    weight = 1 + object_weight * F.max_pool2d(masks, 9, stride=1, padding=4)
    error = output - images
    loss = (weight * (error.abs() + 2 * error.square())).mean() / weight.mean()
    for dim in (-1, -2):
        slope = error.diff(dim=dim).abs() * weight.narrow(dim, 0, weight.shape[dim] - 1)
        loss = loss + 0.5 * slope.mean() / weight.mean()
    latents = latents.float()
    anchor = (latents[:, :3] - 2 * F.avg_pool2d(images, 8)).square().mean()
    return loss + 0.02 * anchor + 1e-4 * latents.square().mean()


def render_frames(count: int, seed: int, device, batch_size: int = 250) -> tuple[torch.Tensor, torch.Tensor]:
    """Renders single frames of random clips.

    Returns:
        uint8 frames `(count, 3, H, W)` and uint8 object masks `(count, 1, H, W)` of 0 or 255.
    """
    rng = random.Random(seed)
    frames, masks = [], []
    for start in range(0, count, batch_size):
        size = min(batch_size, count - start)
        scenes = [sample_scene(rng, 1 + (rng.random() < 0.4), 0.2) for _ in range(size)]
        times = torch.tensor([[rng.random()] for _ in range(size)])
        clips = render_clips(scenes, [rng.randrange(2**31) for _ in range(size)], times, device)
        frames.append(to_uint8(clips.frames[:, 0]))
        masks.append(to_uint8(clips.masks[:, :, 0].amax(1, keepdim=True)))
    return torch.cat(frames), torch.cat(masks)


def train_vae(
    vae: AutoencoderKLCogVideoX, settings: VaeTraining, seed: int, log: Callable[[str], None]
) -> None:
    """Trains the autoencoder in place, on its device, and scales its latents to unit variance."""
    device = vae.device
    frames, masks = render_frames(settings.num_frames, seed, device)
    log(f"vae: {len(frames)} frames rendered")
    prepare_vae(vae)
    average = AveragedWeights(vae, 0.998)
    optimizer = adamw(vae.parameters(), settings.learning_rate, weight_decay=0.0)
    loss_of = torch.compile(reconstruction_loss) if device.type == "cuda" else reconstruction_loss

    def batch_loss():
        picked = torch.randint(len(frames), (settings.batch_size,), device=device)
        images = frames[picked].float().div_(127.5).sub_(1).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return loss_of(
                vae, images, masks[picked].float() / 255, settings.latent_noise, settings.object_weight
            )

    batch_loss().backward()  # compiles, before the clock starts
    clock = StageClock(settings.seconds, settings.max_steps)
    running = True
    while running:
        set_learning_rate([optimizer], clock, warmup=100, flat=0.2)
        optimizer.zero_grad()
        loss = batch_loss()
        loss.backward()
        nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        _keep_variance_silent(vae)
        optimizer.step()
        average.update()
        if clock.step % 200 == 0:
            log(f"vae: step {clock.step} at {clock.elapsed:.0f} s, loss {loss.item():.4f}")
        running = clock.tick()
    average.swap()
    fold_latent_scale(vae, frames[: min(len(frames), 256)])
    log(f"vae: {clock.step} steps in {clock.elapsed:.0f} s")


def _keep_variance_silent(vae) -> None:
    for parameter in (vae.encoder.conv_out.conv.weight, vae.encoder.conv_out.conv.bias):
        if parameter.grad is not None:
            parameter.grad[vae.config.latent_channels :] = 0


@torch.no_grad()
def fold_latent_scale(vae: AutoencoderKLCogVideoX, frames: torch.Tensor) -> None:
    """Rescales the convolutions around the latents, in place, so that each channel has unit variance.

    Args:
        vae: the trained autoencoder.
        frames: uint8 sample frames `(B, 3, H, W)`.
    """
    chunks = [encode_frames(vae, chunk.float() / 127.5 - 1) for chunk in frames.split(16)]
    spread = torch.cat(chunks).std(dim=(0, 2, 3)).clamp(min=1e-4)
    out = vae.encoder.conv_out.conv
    out.weight[: len(spread)] /= spread.view(-1, 1, 1, 1, 1)
    out.bias[: len(spread)] /= spread
    readers = [vae.decoder.conv_in.conv]
    for module in vae.decoder.modules():
        if hasattr(module, "conv_y"):
            readers += [module.conv_y.conv, module.conv_b.conv]
    for conv in readers:
        conv.weight *= spread.view(1, -1, 1, 1, 1)
