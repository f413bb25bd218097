"""HunyuanVideo and LTX-Video in the harness: settings, decoding, every command on the tiny models."""

import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core import create_strategy
from harness import bench
from harness.errors import BenchError
from harness.generate import decode, denoise, generate
from harness.model_families import HUNYUAN_VIDEO, LTX_VIDEO, CallSettings
from harness.models import LoadedModel, load_model, preset_names
from harness.results import read_rows, read_run
from harness.small_models import TINY
from harness.tiny_hunyuan_video import build_tiny_hunyuan_video_pipeline
from harness.tiny_ltx_video import build_tiny_ltx_video_pipeline

HUNYUAN, LTX = "tiny-random-hunyuan-video", "tiny-random-ltx-video"
NAMES = (HUNYUAN, LTX)
CPU = torch.device("cpu")
SIZES = {
    HUNYUAN: {"height": 64, "width": 96, "num_frames": 9},
    LTX: {"height": 128, "width": 192, "num_frames": 17},
}
GRID_TOKENS = {HUNYUAN: 3 * 4 * 6, LTX: 3 * 4 * 6}
LATENTS = {HUNYUAN: (1, 4, 3, 8, 12), LTX: (1, 72, 8)}
LAYERS = {HUNYUAN: 3, LTX: 2}


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return load_model(request.param, SIZES[request.param] | {"steps": 2}, CPU)


def draw(model, output_type, prompt="a red ball", **options):
    """What the untouched pipeline itself gives."""
    call = model.settings.size | {"num_inference_steps": model.settings.steps, "guidance_scale": 6.0}
    generator = torch.Generator().manual_seed(3)
    return model.pipeline(prompt, **call | options, generator=generator, output_type=output_type).frames


def own_frames(model):
    return np.rint(draw(model, "np")[0] * 255).astype(np.uint8)


def test_latents_become_the_pipelines_own_frames(model):
    size, frames = model.settings.size, own_frames(model)
    assert frames.shape == (size["num_frames"], size["height"], size["width"], 3) and frames.std() > 10
    assert np.array_equal(decode(model, draw(model, "latent")), frames)


def test_a_dense_video_is_the_pipelines_own(model):
    made = generate(model, create_strategy("dense"), "a red ball", seed=3)
    assert made.denoised.latents.shape == LATENTS[model.name]
    assert made.denoised.report.calls == LAYERS[model.name] * 2  # guidance takes no call of its own
    text = made.denoised.tokens - GRID_TOKENS[model.name]
    if model.name == LTX:
        assert text == 0 and np.array_equal(made.frames, own_frames(model))
    else:  # padding is left out, not masked: the last place of a sum may be another
        assert 0 < text < 256 and np.abs(made.frames.astype(int) - own_frames(model)).max() <= 1


def test_the_pipelines_defaults_are_the_calls_own(model):
    """Nothing that the harness passes changes what the pipeline does by itself."""
    extra = model.family.call_arguments(model.pipeline)
    assert torch.equal(draw(model, "latent", **extra), draw(model, "latent"))


def test_in_half_precision(model):
    half = load_model(model.name, SIZES[model.name] | {"steps": 2}, CPU, "bfloat16")
    parts = [part for part in half.pipeline.components.values() if isinstance(part, torch.nn.Module)]
    assert {next(part.parameters()).dtype for part in parts} == {torch.bfloat16}
    assert np.array_equal(decode(half, draw(half, "latent")), own_frames(half))


def test_parts_of_two_dtypes_are_decoded_as_in_the_pipeline(model):
    mixed = load_model(model.name, SIZES[model.name] | {"steps": 2}, CPU)
    mixed.pipeline.text_encoder.to(torch.bfloat16)
    mixed.pipeline.transformer.to(torch.bfloat16)
    assert np.array_equal(decode(mixed, draw(mixed, "latent")), own_frames(mixed))


def test_a_decoder_that_takes_a_timestep():
    pipeline = build_tiny_ltx_video_pipeline(timestep_conditioning=True)
    pipeline.set_progress_bar_config(disable=True)
    settings = CallSettings(**SIZES[LTX], steps=2, guidance_scale=6.0, fps=8)
    model = LoadedModel("timed", pipeline, settings, CPU, "float32")
    assert np.array_equal(decode(model, draw(model, "latent")), own_frames(model))


@pytest.mark.parametrize("build", [build_tiny_hunyuan_video_pipeline, build_tiny_ltx_video_pipeline])
def test_the_model_is_the_same_in_every_process_and_loading_it_keeps_the_global_generator(build):
    before = torch.get_rng_state()
    one, other = build(), build()
    assert torch.equal(torch.get_rng_state(), before)
    for mine, yours in zip(one.transformer.parameters(), other.transformer.parameters(), strict=True):
        assert torch.equal(mine, yours)
    assert sum(weight.numel() for weight in one.transformer.parameters()) < 2e6


def test_the_prompt_is_what_is_left_of_hunyuans_template():
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE as TEMPLATE

    tokenizer = build_tiny_hunyuan_video_pipeline().tokenizer
    whole = tokenizer(TEMPLATE["template"].format("A red ball")).input_ids
    kept = tokenizer.decode(whole[TEMPLATE["crop_start"] :])
    assert kept.replace(" ", "").startswith("aredball")


def test_videos_depend_on_the_prompt(model):
    assert not torch.equal(draw(model, "latent"), draw(model, "latent", prompt="a blue cube at night"))


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_is_loaded(name, tmp_path):
    TINY[name].build().save_pretrained(tmp_path / "Mine")
    model = load_model(str(tmp_path / "Mine"), SIZES[name], CPU, "bfloat16", low_memory=True)
    family = TINY[name].family
    assert model.family is family and model.pipeline.vae.use_tiling
    assert model.settings == family.own_settings(model.pipeline).changed(SIZES[name])
    denoised = denoise(model, create_strategy("dense"), "a red ball", 0, steps=2)
    assert torch.isfinite(denoised.latents).all()
    assert preset_names(str(tmp_path / "Mine")) == ("mine", family.name)


HUNYUAN_PIPELINE = SimpleNamespace(
    vae_scale_factor_spatial=8,
    vae_scale_factor_temporal=4,
    transformer=SimpleNamespace(config=SimpleNamespace(patch_size=2)),
)
LTX_PIPELINE = SimpleNamespace(
    vae_spatial_compression_ratio=32,
    vae_temporal_compression_ratio=8,
    transformer_spatial_patch_size=1,
)
USUAL = {
    "hunyuan": (HUNYUAN_VIDEO, HUNYUAN_PIPELINE, (720, 1280, 129, 50, 6.0, 15)),
    "ltx": (LTX_VIDEO, LTX_PIPELINE, (512, 704, 161, 50, 3.0, 25)),
}


@pytest.mark.parametrize("checkpoint", USUAL)
def test_settings_are_the_pipelines_defaults(checkpoint):
    import inspect

    import diffusers

    family, pipeline, numbers = USUAL[checkpoint]
    settings = family.own_settings(pipeline)
    assert settings == CallSettings(*numbers)
    family.check_settings("x", pipeline, settings)
    defaults = inspect.signature(getattr(diffusers, family.pipeline_class).__call__).parameters
    names = ("height", "width", "num_frames", "num_inference_steps", "guidance_scale")
    assert [defaults[name].default for name in names] == list(numbers[:5])


@pytest.mark.parametrize(
    "checkpoint, change, message",
    [
        ("hunyuan", {"height": 728}, "height and width are multiples of 16, got 1280x728"),
        ("hunyuan", {"num_frames": 130}, r"model 'x' makes videos of 4k \+ 1 frames, got 130"),
        ("ltx", {"width": 720}, "height and width are multiples of 32, got 720x512"),
        ("ltx", {"num_frames": 165}, r"model 'x' makes videos of 8k \+ 1 frames, got 165"),
    ],
)
def test_sizes_that_the_pipeline_would_change_are_refused(checkpoint, change, message):
    family, pipeline, numbers = USUAL[checkpoint]
    with pytest.raises(BenchError, match=message):
        family.check_settings("x", pipeline, CallSettings(*numbers).changed(change))


@pytest.mark.parametrize(
    ("model", "presets"),
    [
        ("hunyuanvideo-community/HunyuanVideo", ("hunyuanvideo", "hunyuan")),
        ("Lightricks/LTX-Video", ("ltx-video", "ltx-video")),
        ("a-r-r-o-w/LTX-Video-0.9.1-diffusers", ("ltx-video-0.9.1-diffusers", "ltx-video")),
        (HUNYUAN, (HUNYUAN,)),
        (LTX, (LTX,)),
    ],
)
def test_presets_of_a_model(model, presets):
    assert preset_names(model) == presets


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_run_with_its_page(name, tmp_path):
    label = "sparge:block_size=64,topk=0.5"
    options = f"--steps 2 --prompts 1 --strategies {label}"
    assert bench.main(["--model", name, *options.split(), "--output", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.label for row in rows] == ["dense", label]
    assert all(row.ok and row.tokens >= 192 and row.model == name for row in rows)
    assert rows[1].density < 1 and not rows[1].identical
    assert read_run(tmp_path)["guidance_scale"] == 6.0
    assert name in (tmp_path / "gallery" / "index.html").read_text()


COMMANDS = {
    "call_errors": "--strategies sparge:block_size=64,topk=0.5 tome:gap=2",
    "recall": "--strategies sparge:block_size=64,topk=0.5",
    "spectrum": "--steps-measured 1",
    "tune": "--strategy sparge:block_size=64 --prompts 1 --steps-measured 1 --output {}/tuned.json",
    "compose": "--candidates sparge:block_size=64,topk=0.3 tome --held-out 1 --cost density --budgets 0.01 "
    "--output {}/composed",
    "distill": "--strategy gilbert-block:block_size=64,selection=topk --prompts 1 --held-out 1 --updates 2 "
    "--output {}/distilled",
}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_it(command, name, tmp_path):
    options = COMMANDS[command].format(tmp_path).split()
    main = importlib.import_module(f"harness.{command}").main
    assert main(["--model", name, "--steps", "2", *options]) == 0
