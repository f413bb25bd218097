"""The shipped weights: size, loading, determinism, and what their attention looks like."""

import json

import pytest
import torch
from diffusers import CogVideoXPipeline

from harness.demo_model import DEMO_DEFAULTS, WEIGHTS_DIR
from harness.demo_model.attention_mass import block_mass
from harness.demo_model.captions import parse
from harness.demo_model.evaluate import REPORT_DIR
from harness.demo_model.export import SIZE_LIMIT_BYTES, folder_bytes
from harness.demo_model.judge import Judge, compare
from harness.demo_model.text_binding import encode_captions


@pytest.fixture(scope="module")
def pipeline():
    loaded = CogVideoXPipeline.from_pretrained(WEIGHTS_DIR)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def generate(pipeline, seed: int, steps: int, output_type: str) -> torch.Tensor:
    arguments = {**DEMO_DEFAULTS.call_arguments(), "num_inference_steps": steps}
    generator = torch.Generator().manual_seed(seed)
    prompt = "a large red ball moves right in the desert"
    return pipeline(prompt, generator=generator, output_type=output_type, **arguments).frames


def test_size():
    assert folder_bytes(WEIGHTS_DIR) <= SIZE_LIMIT_BYTES


def test_loads_in_float32_with_enough_tokens(pipeline):
    assert {pipeline.text_encoder.dtype, pipeline.vae.dtype, pipeline.transformer.dtype} == {torch.float32}
    config = pipeline.transformer.config
    tokens = config.sample_frames * (config.sample_height // 2) * (config.sample_width // 2)
    assert tokens >= 4000
    assert config.attention_head_dim == 64


def test_tokenizer_agrees_with_training(pipeline):
    sentence = "a large red ball moves right and a small blue cube moves left by the sea"
    ids = pipeline.tokenizer(sentence + ".", padding="max_length", max_length=16).input_ids
    assert ids == encode_captions([parse(sentence)])[0].tolist()


def test_one_seed_reproduces_bit_for_bit(pipeline):
    first, second, other = (generate(pipeline, seed, 1, "latent") for seed in (0, 0, 1))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


def test_a_video_shows_its_caption(pipeline):
    video = generate(pipeline, 0, 4, "pt")[0]
    assert video.shape == (17, 3, 192, 320)
    outcome = compare(parse("a large red ball moves right in the desert"), Judge().judge(video, 1))
    assert outcome["all"], outcome


def test_block_mass_of_even_and_of_peaked_attention():
    even = block_mass(torch.zeros(1, 640, 64), torch.zeros(1, 640, 64))
    assert torch.allclose(even, torch.tensor([[0.1, 0.2, 0.5]]), atol=1e-5)
    own_block = torch.eye(10).repeat_interleave(64, 0)
    own_block = torch.nn.functional.pad(own_block, (0, 54))[None]
    assert block_mass(40 * own_block, 40 * own_block)[0, 0] > 0.999


def test_report_is_of_these_weights_and_reaches_the_bars():
    report = json.loads((REPORT_DIR / "evaluation.json").read_text())
    assert report["weights"]["bytes"] <= SIZE_LIMIT_BYTES
    quality = report["quality"]
    assert quality["autoencoder"]["psnr_object_db"] >= 32
    assert min(quality[name]["all"] for name in ("judge_one_object", "judge_two_objects")) >= 0.99
    captions = quality["captions"][str(DEMO_DEFAULTS.num_inference_steps)]
    assert (captions["one_object"]["clips"], captions["two_objects"]["clips"]) == (96, 48)
    assert captions["one_object"]["all"] >= 0.97
    assert captions["two_objects"]["all"] >= 0.60
    assert report["speed"]["same_seed_identical"]
    assert max(report["speed"]["seconds_per_video"]) <= 40
    assert len(report["attention"]["mass"]) == 8
