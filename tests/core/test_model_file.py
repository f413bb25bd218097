"""What files of a model know of it: records of denoisers, and which models and calls they are for."""

from types import SimpleNamespace

import pytest
import torch

from core import (
    AttentionContext,
    DenoiserRecord,
    InstalledDenoiser,
    ParameterError,
    TokenLayout,
    apply_strategy,
    create_strategy,
)
from core.calibration import Calibration
from core.denoiser_record import FREE
from core.language_model import apply_to_language_model
from core.testing import random_qkv, tiny_transformer
from harness.composing import CandidateProbe, Disturbance
from harness.recall import RecallProbe
from harness.tuning import ProbeStrategy

LAYOUT = TokenLayout(5, 3, 7, 9)
VALUES = {"topk": [[0.2, 0.6], [0.4, 1.0]]}
BLOCKS = {"block_size": 64}


def wan(**changes):
    from diffusers import WanTransformer3DModel

    sizes = {"num_attention_heads": 2, "attention_head_dim": 32, "num_layers": 2, "text_dim": 8}
    return WanTransformer3DModel(**sizes | {"freq_dim": 8, "ffn_dim": 8} | changes)


def calibration_of(*denoisers, **facts):
    records = [DenoiserRecord.of(denoiser) for denoiser in denoisers] or None
    own = {"strategy": "sparge", "parameters": BLOCKS, "values": VALUES, "model": "org/Mine"}
    return Calibration(**own | {"denoisers": records} | facts)


@pytest.fixture
def saved(tmp_path):
    """A strategy with the calibration of such denoisers, written and read."""

    def save(*denoisers, **facts):
        calibration_of(*denoisers, **facts).save(tmp_path / "c.json")
        return create_strategy("sparge", calibration=str(tmp_path / "c.json"), **BLOCKS)

    return save


def installs(target, strategy):
    with apply_strategy(target, strategy):
        return True


def test_a_record_is_the_same_wherever_the_model_comes_from(tmp_path):
    denoiser = wan(patch_size=(1, 2, 2))
    own = DenoiserRecord.of(denoiser)
    assert own.kind == "WanTransformer3DModel" and own.config["patch_size"] == [1, 2, 2]
    denoiser.save_pretrained(tmp_path)
    loaded = type(denoiser).from_pretrained(tmp_path)
    assert DenoiserRecord.of(loaded) == own
    assert InstalledDenoiser.of(loaded, 2, 2).source == str(tmp_path)
    assert InstalledDenoiser.of(denoiser, 2, 2).source is None
    denoiser.register_to_config(quantization_config=object(), _diffusers_version="9")
    assert DenoiserRecord.of(denoiser) == own


def test_what_inputs_and_training_choose_is_not_recorded():
    free = {"sample_width": 8, "sample_height": 8, "sample_frames": 5, "dropout": 0.1}
    changed = tiny_transformer(**free, max_text_seq_length=8)
    assert DenoiserRecord.of(changed) == DenoiserRecord.of(tiny_transformer())
    assert DenoiserRecord.of(wan(rope_max_seq_len=64)) == DenoiserRecord.of(wan())
    assert {*free, "max_text_seq_length", "rope_max_seq_len"} == FREE


def test_a_model_without_a_configuration_of_diffusers_has_its_class():
    denoiser = torch.nn.Linear(1, 1)
    assert DenoiserRecord.of(denoiser) == DenoiserRecord(kind="Linear", config={})
    denoiser.config = SimpleNamespace(in_features=1)
    assert DenoiserRecord.of(denoiser).config == {}


def test_the_same_configuration_passes_with_other_weights(saved):
    one, other = tiny_transformer(), tiny_transformer()
    torch.nn.init.ones_(other.proj_out.weight)
    assert installs(other, saved(one))


def test_another_configuration_is_refused_by_name(saved, tmp_path):
    image_to_video = tiny_transformer(in_channels=8)
    message = (
        "the calibration is of org/Mine, a CogVideoXTransformer3DModel with in_channels 4; this model is a "
        "CogVideoXTransformer3DModel with in_channels 8; run python -m harness.tune for it, or leave"
    )
    strategy = saved(tiny_transformer())
    with pytest.raises(ParameterError, match=message):
        apply_strategy(image_to_video, strategy)
    assert not strategy.installed and not image_to_video._forward_pre_hooks
    image_to_video.save_pretrained(tmp_path / "i2v")
    loaded = type(image_to_video).from_pretrained(tmp_path / "i2v")
    with pytest.raises(ParameterError, match=rf"this model \({tmp_path}/i2v\) is a CogVideoX"):
        apply_strategy(loaded, strategy)


def test_another_class_is_refused(saved):
    with pytest.raises(ParameterError, match="a CogVideoXTransformer3DModel; this model is a Wan"):
        apply_strategy(
            wan(), saved(denoisers=[DenoiserRecord(kind="CogVideoXTransformer3DModel", config={})])
        )


def test_a_file_of_another_version_of_diffusers_is_compared_by_what_both_know(saved):
    record = DenoiserRecord.of(tiny_transformer())
    fewer = {name: value for name, value in record.config.items() if name != "patch_bias"}
    for config in (fewer, record.config | {"novelty": 1}):
        assert installs(
            tiny_transformer(), saved(denoisers=[DenoiserRecord(kind=record.kind, config=config)])
        )


def test_a_file_without_a_record_is_checked_by_its_sizes(saved):
    assert installs(tiny_transformer(in_channels=8), saved())
    with pytest.raises(ParameterError, match="2 layers of 2 heads; this model has 3 layers of 2 heads"):
        apply_strategy(tiny_transformer(num_layers=3), saved())


def pair(first, second):
    return SimpleNamespace(transformer=first, transformer_2=second, scheduler=None)


def test_each_of_two_denoisers_is_checked(saved):
    strategy = saved(wan(), wan())
    assert installs(pair(wan(), wan()), strategy)
    other = pair(wan(), wan(in_channels=36))
    with pytest.raises(ParameterError, match="with in_channels 16; this model is a .* with in_channels 36"):
        apply_strategy(other, strategy)
    assert not other.transformer._forward_pre_hooks


def test_a_model_of_two_denoisers_is_not_one_of_one(saved):
    """Wan 2.1 14B and the two of Wan 2.2 A14B have one configuration."""
    kind = "WanTransformer3DModel"
    message = rf"whose denoisers are 1 \({kind}\); this model has 2 \({kind}, {kind}\)"
    with pytest.raises(ParameterError, match=message):
        apply_strategy(pair(wan(), wan()), saved(wan()))
    with pytest.raises(ParameterError, match=rf"are 2 \({kind}, {kind}\); this model has 1 \({kind}\)"):
        apply_strategy(wan(), saved(wan(), wan()))


@pytest.mark.parametrize("text_length", [0, 4, 5, 40])
def test_calls_with_other_numbers_of_text_tokens_are_of_the_same_model(saved, text_length):
    strategy = saved(tiny_transformer(), layout=vars(LAYOUT), head_dim=64)
    layout = TokenLayout(text_length, 3, 7, 9)
    tensors = random_qkv(layout)
    alone = [create_strategy("sparge", topk=share, **BLOCKS) for share in VALUES["topk"][0]]
    output = strategy(*tensors, AttentionContext(layout, 0, 2))
    for head, one in enumerate(alone):
        part = [tensor[:, head : head + 1] for tensor in tensors]
        expected = one(*part, AttentionContext(layout, 0, 2))
        assert torch.allclose(output[:, head : head + 1], expected, atol=1e-6)


@pytest.mark.parametrize(
    "layout", [TokenLayout(5, 3, 9, 7), TokenLayout(5, 3, 7, 9, text_first=False)], ids=["grid", "place"]
)
def test_another_grid_or_place_of_the_text_is_refused(saved, layout):
    strategy = saved(layout=vars(LAYOUT))
    message = "org/Mine: 3x7x9 video tokens, text first, 2 layers of 2 heads of 64; this call has 3x"
    with pytest.raises(ParameterError, match=message):
        strategy(*random_qkv(layout), AttentionContext(layout, 0, 2))


def test_strategies_that_call_others_ask_them(saved):
    strategy, other = saved(tiny_transformer()), tiny_transformer(in_channels=8)
    callers = {
        "combined": create_strategy(
            "combined", classes="sparse", sparse="sparge", sparse_options=strategy.parameters.model_dump()
        ),
        "tune": ProbeStrategy([strategy], {0}),
        "compose": CandidateProbe([strategy], []),
        "disturbance": Disturbance(strategy, {0}),
        "recall": RecallProbe([strategy], {0}),
    }
    for name, caller in callers.items():
        with pytest.raises(ParameterError, match="with in_channels 4; this model is a"):
            apply_strategy(other, caller)
        assert installs(tiny_transformer(), caller), name


def test_a_language_model_is_another_model(saved):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes))
    before = model.config._attn_implementation
    with pytest.raises(ParameterError, match="a CogVideoXTransformer3DModel; this model is a LlamaForCausal"):
        apply_to_language_model(model, saved(tiny_transformer()))
    assert model.config._attn_implementation == before and not model._forward_hooks


def test_an_empty_list_of_denoisers_is_no_record(tmp_path):
    with pytest.raises(ValueError, match="denoisers"):
        calibration_of(denoisers=[])
