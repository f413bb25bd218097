"""Wan in the harness: loading, settings, decoding, two denoisers, every command on ``tiny-random-wan``."""

import importlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from core import create_strategy
from harness import bench
from harness.distillation import record_teacher
from harness.errors import BenchError
from harness.generate import denoise, generate
from harness.model_families import FAMILIES, WAN, CallSettings
from harness.models import BUILT_IN, LoadedModel, find_family, load_model, preset_names
from harness.results import read_rows, read_run
from harness.timing import DenoiseClock
from harness.tiny_model import build_tiny_wan_pipeline

NAME = "tiny-random-wan"
CPU = torch.device("cpu")
SIZE = {"height": 64, "width": 96, "num_frames": 9, "steps": 2}
TOKENS = 3 * 4 * 6


@pytest.fixture(scope="module")
def model():
    return load_model(NAME, SIZE, CPU)


def model_of_two_denoisers(boundary_ratio):
    """The first runs at timesteps from ``1000 * boundary_ratio``, the second below."""
    from diffusers import WanTransformer3DModel

    pipeline = build_tiny_wan_pipeline()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        second = WanTransformer3DModel.from_config(pipeline.transformer.config).eval()
    pipeline.register_modules(transformer_2=second)
    pipeline.register_to_config(boundary_ratio=boundary_ratio)
    pipeline.set_progress_bar_config(disable=True)
    settings = CallSettings(64, 96, 9, steps=4, guidance_scale=5.0, fps=8)
    return LoadedModel("two", pipeline, settings, CPU, "float32")


@pytest.fixture(scope="module")
def two_denoisers():
    """High noise for steps 0 and 1 of 4, then low noise."""
    return model_of_two_denoisers(0.8)


@pytest.fixture(scope="module")
def folder(two_denoisers, tmp_path_factory):
    """A folder with the pipeline of two denoisers."""
    path = tmp_path_factory.mktemp("models") / "Mine"
    two_denoisers.pipeline.save_pretrained(path)
    return path


def own_frames(pipeline, **options):
    call = {"height": 64, "width": 96, "num_frames": 9, "num_inference_steps": 2, "guidance_scale": 6.0}
    generator = torch.Generator().manual_seed(3)
    frames = pipeline("a red ball", **(call | options), generator=generator, output_type="np").frames[0]
    return np.rint(frames * 255).astype(np.uint8)


def test_the_frames_are_the_pipelines_own(model):
    made = generate(model, create_strategy("dense"), "a red ball", seed=3)
    assert made.frames.shape == (9, 64, 96, 3) and made.frames.std() > 10
    assert np.array_equal(made.frames, own_frames(model.pipeline))
    assert made.denoised.tokens == TOKENS
    assert made.denoised.report.calls == 2 * 2 * 2  # layers, steps, halves of guidance
    assert made.denoised.latents.shape == (1, 16, 3, 8, 12)


def test_in_half_precision_the_autoencoder_stays_exact():
    model = load_model(NAME, SIZE, CPU, "bfloat16")
    parts = {name: getattr(model.pipeline, name) for name in ("transformer", "text_encoder", "vae")}
    dtypes = {name: next(part.parameters()).dtype for name, part in parts.items()}
    assert dtypes == {"transformer": torch.bfloat16, "text_encoder": torch.bfloat16, "vae": torch.float32}
    made = generate(model, create_strategy("dense"), "a red ball", seed=3)
    assert np.array_equal(made.frames, own_frames(model.pipeline))


def test_the_model_is_the_same_in_every_process_and_loading_it_keeps_the_global_generator():
    before = torch.get_rng_state()
    one, other = build_tiny_wan_pipeline(), build_tiny_wan_pipeline()
    assert torch.equal(torch.get_rng_state(), before)
    for mine, yours in zip(one.transformer.parameters(), other.transformer.parameters(), strict=True):
        assert torch.equal(mine, yours)
    assert sum(weight.numel() for weight in one.transformer.parameters()) < 1e6


def test_a_pipeline_of_two_denoisers(two_denoisers):
    made = generate(two_denoisers, create_strategy("dense"), "a red ball", seed=3)
    expected = own_frames(two_denoisers.pipeline, num_inference_steps=4, guidance_scale=5.0)
    assert np.array_equal(made.frames, expected)
    assert made.denoised.report.calls == 2 * 4 * 2 and made.denoised.tokens == TOKENS
    for denoiser in (two_denoisers.pipeline.transformer, two_denoisers.pipeline.transformer_2):
        assert not denoiser._forward_pre_hooks
    assert [record.kind for record in two_denoisers.records] == ["WanTransformer3DModel"] * 2
    with pytest.raises(BenchError, match="model 'two' has 2 denoisers for different steps"):
        two_denoisers.denoiser  # noqa: B018


def test_a_video_of_the_second_denoiser_alone():
    model = model_of_two_denoisers(2.0)
    denoised = denoise(model, create_strategy("dense"), "a red ball", 0)
    assert denoised.denoise_time_s > 0 and denoised.tokens == TOKENS and denoised.report.calls == 2 * 4 * 2


def test_a_folder_is_loaded_with_the_dtype_of_its_parts(folder):
    model = load_model(str(folder), SIZE | {"steps": None}, CPU, "bfloat16", low_memory=True)
    pipeline = model.pipeline
    assert pipeline.transformer_2.proj_out.weight.dtype == torch.bfloat16
    assert next(pipeline.vae.parameters()).dtype == torch.float32 and pipeline.vae.use_tiling
    assert model.settings == CallSettings(64, 96, 9, steps=40, guidance_scale=4.0, fps=16)
    denoised = denoise(model, create_strategy("dense"), "a red ball", 0, steps=2)
    assert torch.isfinite(denoised.latents).all()


def test_the_clock_starts_at_the_first_call_of_any_denoiser(monkeypatch):
    times = iter([10.0, 12.5])
    monkeypatch.setattr("harness.timing.time.perf_counter", lambda: next(times))
    first, second, called = torch.nn.Identity(), torch.nn.Identity(), []

    def on_first_call(denoiser, args, kwargs):
        called.append(denoiser)

    with DenoiseClock(first, CPU, num_steps=1, others=[second], on_first_call=on_first_call) as clock:
        second(torch.zeros(1))
        first(torch.zeros(1))
        clock.on_step_end(None, 0, None, {})
    assert clock.elapsed_s == 2.5 and called == [second]
    assert not first._forward_pre_hooks and not second._forward_pre_hooks


def wan_pipeline(heads=40, scale=8, **config):
    """What settings are read from."""
    denoiser = torch.nn.Identity()
    denoiser.config = SimpleNamespace(num_attention_heads=heads, patch_size=(1, 2, 2))
    own = {"expand_timesteps": False, "boundary_ratio": None} | config
    return SimpleNamespace(
        transformer=denoiser,
        config=SimpleNamespace(**own),
        vae_scale_factor_spatial=scale,
        vae_scale_factor_temporal=4,
    )


CHECKPOINTS = {
    "2.1 1.3B": (wan_pipeline(heads=12), (480, 832, 81, 50, 5.0, 16)),
    "2.1 14B": (wan_pipeline(), (720, 1280, 81, 50, 5.0, 16)),
    "2.2 A14B": (wan_pipeline(boundary_ratio=0.875), (720, 1280, 81, 40, 4.0, 16)),
    "2.2 5B": (wan_pipeline(heads=24, scale=16, expand_timesteps=True), (704, 1280, 121, 50, 5.0, 24)),
}


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_settings_are_the_authors_own(checkpoint):
    pipeline, numbers = CHECKPOINTS[checkpoint]
    settings = WAN.own_settings(pipeline)
    assert settings == CallSettings(*numbers)
    WAN.check_settings("x", pipeline, settings)


def test_sizes_that_the_pipeline_would_change_are_refused():
    pipeline, numbers = CHECKPOINTS["2.2 5B"]
    settings = CallSettings(*numbers)
    with pytest.raises(BenchError, match="height and width are multiples of 32, got 1280x720"):
        WAN.check_settings("x", pipeline, settings.changed({"height": 720}))
    with pytest.raises(BenchError, match="height and width are multiples of 32, got 848x704"):
        WAN.check_settings("x", pipeline, settings.changed({"width": 848}))
    with pytest.raises(BenchError, match=r"model 'x' makes videos of 4k \+ 1 frames, got 80"):
        WAN.check_settings("x", pipeline, settings.changed({"num_frames": 80}))


@pytest.mark.parametrize(
    ("model", "presets"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", ("wan2.1-t2v-1.3b-diffusers", "wan2.1-1.3b", "wan")),
        ("Wan-AI/Wan2.2-T2V-A14B-Diffusers", ("wan2.2-t2v-a14b-diffusers", "wan2.2-a14b", "wan")),
        ("Wan-AI/Wan2.2-TI2V-5B-Diffusers", ("wan2.2-ti2v-5b-diffusers", "wan2.2-5b", "wan")),
        ("somebody/wan2.1-14b", ("wan2.1-14b", "wan")),
        ("cogvideox-2b-random", ("cogvideox-2b-random", "cogvideox")),
        (NAME, (NAME,)),
    ],
)
def test_presets_of_a_model(model, presets):
    assert preset_names(model) == presets


def test_presets_of_a_folder_are_those_of_its_class(folder, tmp_path):
    assert preset_names(str(folder)) == ("mine", "wan")
    misnamed = tmp_path / "cogvideox-like"
    misnamed.mkdir()
    (misnamed / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    assert preset_names(str(misnamed)) == ("cogvideox-like", "wan")


def test_a_pipeline_of_another_kind_is_refused_before_its_weights_are_read(tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "WanImageToVideoPipeline"}))
    message = "is a WanImageToVideoPipeline; expected one for text to video: CogVideoXP.*, WanPipeline$"
    with pytest.raises(BenchError, match=message):
        load_model(str(tmp_path), {}, CPU)
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(
        BenchError, match="is a pipeline without a class; expected one for text to video: Cog"
    ):
        find_family(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(BenchError, match=f"cannot load model '{tmp_path}'"):
        find_family(str(tmp_path))


def test_families_are_told_apart_by_name_and_class():
    assert len({family.name for family in FAMILIES}) == len({family.pipeline_class for family in FAMILIES})
    assert set(BUILT_IN.values()) <= set(FAMILIES)


def test_a_whole_run_with_its_page(tmp_path):
    label = "sparge:block_size=64,topk=0.5"
    options = f"--height 64 --width 64 --num-frames 5 --steps 2 --prompts 1 --strategies {label}"
    assert bench.main(["--model", NAME, *options.split(), "--output", str(tmp_path)]) == 0
    rows = read_rows(tmp_path / "results.jsonl")
    assert [row.label for row in rows] == ["dense", label]
    assert all(row.ok and row.tokens == 2 * 4 * 4 and row.model == NAME for row in rows)
    assert read_run(tmp_path)["guidance_scale"] == 6.0
    assert NAME in (tmp_path / "gallery" / "index.html").read_text()


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
OF_ONE_DENOISER = ("spectrum", "compose", "distill")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_takes_it(command, tmp_path):
    options = COMMANDS[command].format(tmp_path).split()
    assert (
        importlib.import_module(f"harness.{command}").main(["--model", NAME, "--steps", "2", *options]) == 0
    )


@pytest.mark.parametrize("command", OF_ONE_DENOISER)
def test_commands_for_one_denoiser_refuse_two(command, two_denoisers, tmp_path, capsys, monkeypatch):
    module = importlib.import_module(f"harness.{command}")
    monkeypatch.setattr("harness.model_options.load_model", lambda *_: two_denoisers)
    options = COMMANDS[command].format(tmp_path).split()
    assert module.main(["--model", NAME, *options]) == 2
    assert "2 denoisers for different steps" in capsys.readouterr().err


def test_both_halves_of_guidance_are_calls_of_one_step(model):
    calls = record_teacher(model, ["a red ball"], first_seed=0, videos=2)
    assert [call.step for call in calls] == [0, 0, 1, 1] * 2
