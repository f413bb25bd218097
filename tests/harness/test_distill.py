"""Distillation: what is trained, what is left alone, what the folder holds, what is refused."""

import json
from pathlib import Path

import pytest
import torch

from core import UnsupportedCallError, apply_strategy, create_strategy
from harness import distill as command
from harness.distillation import DistillSettings, call_error, distill, merge_calls, record_teacher, trapezoid
from harness.models import load_model

SPEC = "gilbert-block:block_size=64,samples=8,selection=topk,keep_ratio=0.1"
TINY = ["--model", "tiny-random", "--steps", "2", "--prompts", "1", "--held-out", "1"]


@pytest.fixture
def model():
    return load_model("tiny-random", {"steps": 2}, torch.device("cpu"))


def strategy(**options):
    return create_strategy(
        "gilbert-block", block_size=64, samples=8, selection="topk", keep_ratio=0.1, **options
    )


def test_teacher_calls_are_the_dense_ones(model):
    calls = record_teacher(model, ["a red ball", "a cube"], 0)
    assert len(calls) == 4
    transformer = model.pipeline.transformer
    with torch.no_grad():
        for call in calls:
            assert torch.equal(transformer(**call.arguments)[0], call.output)
    assert not torch.equal(calls[0].arguments["hidden_states"], calls[2].arguments["hidden_states"])
    assert not transformer._forward_hooks
    assert [call.step for call in calls] == [0, 1, 0, 1]


def test_calls_of_one_step_are_learned_from_together(model):
    calls = record_teacher(model, ["a red ball"], 0, videos=3)
    assert len(calls) == 6
    merged = merge_calls(calls[1::2])
    with torch.no_grad():
        output = model.pipeline.transformer(**merged.arguments)[0]
    assert merged.step == 1 and len(output) == 3 * len(calls[1].output)
    torch.testing.assert_close(output, merged.output, rtol=1e-4, atol=1e-4)
    noise = [call.arguments["hidden_states"] for call in calls[::2]]
    assert not torch.equal(noise[0], noise[1])


def test_error_of_single_calls(model):
    calls = record_teacher(model, ["a red ball"], 0)
    assert call_error(model, create_strategy("dense"), calls) < 1e-6
    with torch.no_grad(), apply_strategy(model.pipeline, strategy()):
        outputs = [model.pipeline.transformer(**call.arguments)[0] for call in calls]
    pairs = zip(outputs, calls, strict=True)
    each = [float((output - call.output).norm() / call.output.norm()) for output, call in pairs]
    assert call_error(model, strategy(), calls) == pytest.approx(sum(each) / len(each), rel=1e-3)


def test_every_call_comes_once_before_any_comes_twice(model, monkeypatch):
    calls = record_teacher(model, ["a red ball"], 0, videos=3)
    merged = []
    monkeypatch.setattr(
        "harness.distillation.merge_calls", lambda part: merged.append(part) or merge_calls(part)
    )
    distill(model, strategy(), calls, DistillSettings(4, 1e-4, batch=2), lambda *_: None)
    assert sorted(len(part) for part in merged) == [1, 1, 2, 2]
    assert len({id(call.output) for part in merged for call in part}) == 6
    assert all(len({call.step for call in part}) == 1 for part in merged)


def test_the_denoiser_learns_and_the_error_falls(model):
    transformer = model.pipeline.transformer
    before = {name: value.clone() for name, value in transformer.state_dict().items()}
    calls = record_teacher(model, ["a red ball"], 0)
    told = []
    settings = DistillSettings(updates=24, learning_rate=1e-4)
    errors = distill(model, strategy(), calls, settings, lambda *update: told.append(update))
    assert told == list(enumerate(errors, start=1))
    assert sum(errors[-2:]) < 0.8 * sum(errors[:2]), errors
    changed = {name for name, value in transformer.state_dict().items() if not value.equal(before[name])}
    assert changed == {name for name, _ in transformer.named_parameters()}
    assert all(part.requires_grad and part.grad is None for part in transformer.parameters())
    processors = {type(processor).__name__ for processor in transformer.attn_processors.values()}
    assert processors == {"CogVideoXAttnProcessor2_0"}


def test_no_update_sees_the_selections_of_another(model, monkeypatch):
    from plugins.gilbert_block import strategy as module

    drawn = []
    original = module.block_importance
    monkeypatch.setattr(module, "block_importance", lambda *a, **o: drawn.append(1) or original(*a, **o))
    calls = record_teacher(model, ["a red ball"], 0)
    distill(model, strategy(refresh_every=9), calls, DistillSettings(6, 1e-4), lambda *_: None)
    assert len(drawn) == 6 * len(model.pipeline.transformer.transformer_blocks)


def test_training_needs_a_backward_pass(model):
    with pytest.raises(UnsupportedCallError, match="'tome' has no backward pass"):
        distill(model, create_strategy("tome"), [], DistillSettings(1, 1e-4), lambda *_: None)


def test_rate_rises_then_falls_to_zero():
    factors = [trapezoid(done, 20) for done in range(21)]
    assert factors[0] == 0.5 and max(factors) == factors[1] == 1.0 and factors[20] == 0.0
    assert factors[2:] == sorted(factors[2:], reverse=True)


def test_command_writes_everything(tmp_path, capsys):
    folder = tmp_path / "distilled"
    assert command.main(["--strategy", SPEC, *TINY, "--updates", "2", "--output", str(folder)]) == 0
    record = json.loads((folder / "distill.json").read_text())
    assert len(record["relative_errors"]) == record["updates"] == 2
    assert set(record["call_error"]) == {"before", "after"} and all(record["call_error"].values())
    likeness = record["psnr_to_dense_db"]
    assert set(likeness) == {"before", "after", "dense_with_trained_weights"}
    assert all(0 < values[0] < 100 for values in likeness.values())
    assert 0 < record["density"] < 1 and record["command"].startswith("python -m harness.distill")
    assert {path.name for path in folder.iterdir()} == {
        ".lock", "distill.json", "curve.png", "clip_0.mp4", "clips.webp", "transformer",
    }  # fmt: skip
    from diffusers import CogVideoXTransformer3DModel

    CogVideoXTransformer3DModel.from_pretrained(folder / "transformer")
    printed = capsys.readouterr().out
    assert "2 dense calls of 1 videos recorded" in printed and "PSNR to dense, after:" in printed


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--strategy", "tome"], "'tome' has no backward pass"),
        (["--strategy", SPEC, "--updates", "0"], "--updates must be at least 1"),
        (["--strategy", SPEC, "--learning-rate", "0"], "--learning-rate must be above 0"),
        (["--strategy", SPEC, "--prompts", "9999"], "--prompts and --held-out need 10001 prompts"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, capsys):
    assert command.main([*arguments, "--output", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_the_committed_run_is_what_its_page_says():
    folder = Path(__file__).parents[2] / "docs" / "distillation"
    record, page = json.loads((folder / "distill.json").read_text()), (folder / "README.md").read_text()
    likeness = list(record["psnr_to_dense_db"].values())
    for prompt, *values in zip(record["held_out"], *likeness, strict=True):
        assert f"| {prompt} | " + " | ".join(f"{value:.1f}" for value in values) + " |" in page
    means = [sum(values) / len(values) for values in likeness]
    assert "| mean | " + " | ".join(f"{value:.1f}" for value in means) + " |" in page
    assert f"gain {means[1] - means[0]:.1f} dB" in page and record["command"] in page
    assert all(f"{error:.3f}" in page for error in record["call_error"].values())
