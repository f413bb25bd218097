import mmap
import sys

import numpy as np
import pytest
import torch

from core import create_strategy
from harness.generate import decode, denoise, generate
from harness.models import CallSettings, LoadedModel, load_model, preset_name, preset_names
from harness.timing import DenoiseClock, peak_memory_bytes, ratio, reset_peak_memory
from harness.tiny_model import build_tiny_pipeline

CPU = torch.device("cpu")
SIZE = {"height": 64, "width": 64, "num_frames": 9, "steps": 2}


@pytest.fixture(scope="module")
def model():
    return load_model("tiny-random", SIZE, CPU)


@pytest.fixture(scope="module")
def made(model):
    return generate(model, create_strategy("dense"), "a red ball", seed=3)


def test_the_frames_are_the_pipelines_own(model, made):
    pipeline = model.pipeline
    frames = pipeline(
        "a red ball",
        height=64,
        width=64,
        num_frames=9,
        num_inference_steps=2,
        guidance_scale=6.0,
        max_sequence_length=16,
        generator=torch.Generator().manual_seed(3),
        output_type="np",
    ).frames[0]
    assert np.array_equal(made.frames, np.rint(frames * 255).astype(np.uint8))


def test_padding_of_the_temporal_patch_is_cut_off_before_decoding():
    """CogVideoX 1.5: 3 latent frames are padded to 4, and the pipeline drops the first of them."""
    pipeline = build_tiny_pipeline()
    pipeline.transformer.config.patch_size_t = 2
    settings = CallSettings(height=64, width=64, num_frames=9, steps=1, guidance_scale=1.0, fps=8)
    model = LoadedModel("x", pipeline, settings, CPU, "float32")
    latents = torch.randn(1, 4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipeline.video_processor.postprocess_video(
        pipeline.decode_latents(latents[:, 1:]).detach(), output_type="np"
    )[0]
    assert np.array_equal(decode(model, latents), np.rint(expected * 255).astype(np.uint8))


def test_figures_of_one_generation(made):
    denoised = made.denoised
    assert made.frames.shape == (9, 64, 64, 3)
    assert denoised.tokens == 3 * 4 * 4 + 16
    assert 0 < denoised.report.attention_time_s < denoised.denoise_time_s < made.wall_time_s
    assert denoised.report.calls == 2 * 2
    assert made.peak_memory_bytes > 1e8


def test_the_same_seed_gives_the_same_noise_to_every_strategy(model, made):
    again = denoise(model, create_strategy("dense", backend="sdpa"), "a red ball", 3)
    other = denoise(model, create_strategy("dense"), "a red ball", 4)
    assert torch.equal(again.latents, made.denoised.latents)
    assert not torch.equal(other.latents, made.denoised.latents)


def test_the_model_is_the_same_in_every_process_and_loading_it_keeps_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = build_tiny_pipeline(), build_tiny_pipeline()
    assert torch.equal(torch.get_rng_state(), before)
    for mine, yours in zip(one.transformer.parameters(), other.transformer.parameters(), strict=True):
        assert torch.equal(mine, yours)


def test_steps_are_told_one_by_one(model):
    steps = []
    denoise(model, create_strategy("dense"), "a red ball", 0, steps=3, on_step=steps.append)
    assert steps == [1, 2, 3]


def test_the_clock_starts_at_the_first_call_and_leaves_no_hook(monkeypatch):
    times = iter([10.0, 12.5])
    monkeypatch.setattr("harness.timing.time.perf_counter", lambda: next(times))
    denoiser = torch.nn.Identity()
    with DenoiseClock(denoiser, CPU, num_steps=2) as clock:
        for step in range(2):
            denoiser(torch.zeros(1))
            clock.on_step_end(None, step, None, {})
    assert clock.elapsed_s == 2.5
    assert not denoiser._forward_pre_hooks


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux can reset the peak of a process")
def test_peak_memory_can_be_reset():
    size = 200_000_000
    with mmap.mmap(-1, size) as block:  # goes back to the system at once, unlike freed heap
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
        high = peak_memory_bytes(CPU)
    reset_peak_memory(CPU)
    assert peak_memory_bytes(CPU) < high - size / 2


def test_ratio():
    assert ratio(6.0, 2.0) == 3.0
    assert ratio(None, 2.0) is ratio(6.0, None) is ratio(6.0, 0.0) is None


def test_the_preset_of_a_model_is_called_after_it():
    assert preset_name("zai-org/CogVideoX-2b") == "cogvideox-2b"
    assert preset_name("/data/models/CogVideoX-5b/") == "cogvideox-5b"
    assert preset_name("demo") == "demo"
    assert preset_names("demo") == ("demo",)
    assert preset_names("zai-org/CogVideoX-2b") == ("cogvideox-2b", "cogvideox")


def test_a_folder_is_loaded_like_a_hub_model(tmp_path):
    build_tiny_pipeline().save_pretrained(tmp_path / "mine")
    model = load_model(str(tmp_path / "mine"), {"steps": 2}, CPU, low_memory=True)
    assert model.settings == CallSettings(
        height=128, width=128, num_frames=9, steps=2, guidance_scale=6.0, fps=8
    )
    assert model.dtype == "float32"
    assert model.pipeline.vae.use_tiling
