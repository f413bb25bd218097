"""Training: the frame-wise network equals the shipped one, losses fall, and a smoke run of every stage
exports and resumes.
"""

import random

import pytest
import torch
from diffusers import CogVideoXPipeline

from harness.demo_model.pipeline import (
    build_scheduler,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    build_vae,
)
from harness.demo_model.text_binding import (
    BindingHeads,
    binding_labels,
    encode_captions,
    random_scenes,
    train_text,
)
from harness.demo_model.train import main
from harness.demo_model.training import AveragedWeights, StageClock
from harness.demo_model.transformer import TrainableTransformer, pick_frames
from harness.demo_model.vae import decode_frames, encode_frames, fold_latent_scale, prepare_vae


@torch.no_grad()
def test_frame_network_equals_the_3d_network():
    torch.manual_seed(0)
    vae = build_vae()
    prepare_vae(vae)
    fold_latent_scale(vae, torch.randint(0, 256, (4, 3, 64, 96), dtype=torch.uint8))
    images = torch.rand(2, 3, 64, 96) * 2 - 1
    latents = encode_frames(vae, images)
    assert torch.allclose(latents, vae.encode(images[:, :, None]).latent_dist.mode()[:, :, 0], atol=1e-4)
    assert torch.allclose(
        decode_frames(vae, latents), vae.decode(latents[:, :, None]).sample[:, :, 0], atol=1e-4
    )


@torch.no_grad()
def test_training_forward_equals_the_pipeline():
    torch.manual_seed(0)
    transformer, text_encoder = build_transformer(num_layers=1), build_text_encoder(num_layers=1)
    model = TrainableTransformer(transformer, text_encoder, BindingHeads(128))
    model.positions.normal_()
    model.store_positions()
    pipeline = CogVideoXPipeline(
        build_tokenizer(), text_encoder, build_vae((8, 8, 8, 8)), transformer, build_scheduler()
    )
    latents, tokens, timestep = (
        torch.randn(1, 17, 12, 24, 40),
        torch.randint(0, 30, (1, 16)),
        torch.tensor([500]),
    )
    rotary = pipeline._prepare_rotary_positional_embeddings(192, 320, 17, torch.device("cpu"))
    expected = transformer(
        latents, text_encoder(tokens)[0], timestep, image_rotary_emb=rotary, return_dict=False
    )[0]
    assert torch.allclose(model(latents, tokens, timestep, torch.arange(17))[0], expected, atol=1e-5)


def test_word_order_is_learned():
    torch.manual_seed(0)
    encoder = build_text_encoder(num_layers=2)
    heads = BindingHeads(128)
    scenes = random_scenes(random.Random(3), 64, 1.0)
    before = heads.loss(encoder(encode_captions(scenes))[0], binding_labels(scenes)).item()
    train_text(encoder, heads, 60, 20, 0, lambda line: None)
    after = heads.loss(encoder(encode_captions(scenes))[0], binding_labels(scenes)).item()
    assert after < 0.7 * before


def test_frames_are_drawn_one_from_each_part():
    torch.manual_seed(0)
    for _ in range(50):
        frames = pick_frames(17, 5, "cpu")
        assert (frames.diff() > 0).all() and frames[0] >= 0 and frames[-1] <= 16
    assert pick_frames(17, None, "cpu").tolist() == list(range(17))


def test_clock_ends_by_steps_and_by_time():
    clock = StageClock(1000, max_steps=2)
    assert clock.tick() and not clock.tick()
    assert not StageClock(10, elapsed=11).tick()


def test_averaged_weights_follow_and_swap():
    layer = torch.nn.Linear(1, 1)
    average = AveragedWeights(layer, 0.75)
    start = layer.weight.item()
    with torch.no_grad():
        layer.weight += 4
    average.update()
    average.swap()
    assert layer.weight.item() == pytest.approx(start + 1)
    average.swap()
    assert layer.weight.item() == pytest.approx(start + 4)


def test_smoke_run_exports_and_resumes(tmp_path):
    main(["--smoke", "--device", "cpu", "--output", str(tmp_path / "first")])
    pipeline = CogVideoXPipeline.from_pretrained(tmp_path / "first" / "weights")
    assert pipeline.transformer.dtype == torch.float32
    assert (tmp_path / "first" / "weights" / "README.md").exists()
    again = ["--smoke", "--device", "cpu", "--stage", "text", "--output", str(tmp_path / "second")]
    main([*again, "--resume", str(tmp_path / "first" / "weights")])
    resumed = CogVideoXPipeline.from_pretrained(tmp_path / "second" / "weights")
    for name in ("vae", "transformer"):
        for key, value in getattr(pipeline, name).state_dict().items():
            assert torch.equal(value, getattr(resumed, name).state_dict()[key]), key
    key = "encoder.block.0.layer.0.SelfAttention.q.weight"
    assert not torch.equal(pipeline.text_encoder.state_dict()[key], resumed.text_encoder.state_dict()[key])
