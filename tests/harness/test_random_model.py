"""``cogvideox-2b-random``: the true architecture without its weights, and the plumbing on a small one."""

import functools

import diffusers
import pytest
import torch

from core import TokenLayout, create_strategy
from core.apply import find_adapter
from harness.config import default_prompts
from harness.errors import BenchError
from harness.generate import denoise
from harness.models import check_request, load_model

NAME = "cogvideox-2b-random"
CPU = torch.device("cpu")


def test_architecture_and_settings_are_those_of_cogvideox_2b():
    check_request(NAME, {})
    model = load_model(NAME, {"steps": 10}, torch.device("meta"), "bfloat16")
    transformer, settings = model.pipeline.transformer, model.settings
    assert (settings.height, settings.width, settings.num_frames, settings.steps) == (480, 720, 49, 10)
    assert len(transformer.transformer_blocks) == 30
    assert 1.69e9 < sum(weight.numel() for weight in transformer.parameters()) < 1.70e9
    assert {weight.dtype for weight in transformer.parameters()} == {torch.bfloat16}
    assert torch.get_default_dtype() == torch.float32
    call = {
        "hidden_states": torch.empty(2, 13, 16, 60, 90, device="meta"),
        "encoder_hidden_states": torch.empty(2, 226, 4096, device="meta"),
        "timestep": torch.ones(2),
    }
    layout = find_adapter(transformer).read_call(transformer, (), call).layout
    assert layout == TokenLayout(226, 13, 30, 45) and layout.sequence_length == 17_776


def test_it_denoises(monkeypatch):
    original = diffusers.CogVideoXTransformer3DModel
    small = functools.partial(original, num_layers=1, num_attention_heads=2, time_embed_dim=16)
    with monkeypatch.context() as patch:
        patch.setattr(diffusers, "CogVideoXTransformer3DModel", small)
        states = torch.get_rng_state()
        model = load_model(NAME, {"height": 64, "width": 64, "num_frames": 5, "steps": 1}, CPU, "float32")
        assert torch.equal(torch.get_rng_state(), states)
    prompt = default_prompts(NAME).read_text().splitlines()[0]
    denoised = denoise(model, create_strategy("sparge"), prompt, 0)
    assert denoised.tokens == 226 + 2 * 4 * 4 and torch.isfinite(denoised.latents).all()


def test_unknown_names_list_it():
    with pytest.raises(BenchError, match=NAME):
        check_request("cogvideox-3b", {})
