import pytest
import torch
import torch.nn.functional as F

from core import AttentionContext, ParameterError, TokenLayout, available_strategies, create_strategy
from core.registry import installed
from core.testing import dense_fp64, random_qkv
from harness.structured_inputs import structured_query_key
from kernels_common.strategy import BlockSparseParameters
from plugins.svg_smart import strategy as module
from plugins.svg_smart.presets import PRESETS
from plugins.svg_smart.reference import attention_reference
from plugins.svg_smart.strategy import SvgSmartParameters, SvgSmartStrategy
from tests.plugins.svg_smart.conformance import (
    BandConformance,
    FramesConformance,
    SemanticConformance,
    SinkConformance,
)

LAYOUT = TokenLayout(16, 6, 8, 20)
LAYOUT_TEXT_LAST = TokenLayout(5, 6, 9, 19, text_first=False)
DEMO = TokenLayout(16, 17, 12, 20)


class TestBand(BandConformance): ...


class TestSink(SinkConformance): ...


class TestFrames(FramesConformance): ...


class TestSemantic(SemanticConformance): ...


def test_registered_through_the_entry_point():
    rows = {row.name: row for row in available_strategies()}
    assert rows["svg-smart"].available and rows["svg-smart"].summary.startswith("Sparse VideoGen")
    assert isinstance(create_strategy("svg-smart", density="0.5"), SvgSmartStrategy)


def executed(strategy, query, classes, layout):
    """Executed pairs of every head in the model's order, ``[1, H, S, S]`` bool."""
    plan = strategy.planned(query, AttentionContext(layout))
    pairs = torch.empty(1, len(classes), layout.sequence_length, layout.sequence_length, dtype=torch.bool)
    for head, kind in enumerate(classes):
        order = plan.orders[kind]
        pairs[0, head][order[:, None], order] = plan.masks.to_dense()[0, kind]
    return pairs


@pytest.mark.parametrize(
    "options",
    [
        {"density": 0.4},
        {"density": 0.4, "keep": "cover"},
        {"density": 0.6, "sink": True},
        {"variant": "frames"},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [LAYOUT, LAYOUT_TEXT_LAST], ids=TokenLayout.describe)
def test_output_is_attention_over_the_chosen_blocks(layout, options, monkeypatch):
    errors = torch.tensor([[[0.1, 0.3, 0.2]], [[0.2, 0.2, 0.2]]])  # a tie is spatial
    monkeypatch.setattr(module, "pattern_errors", lambda *_: errors)
    query, key, value = random_qkv(layout, heads=3)
    strategy = SvgSmartStrategy(block_size=64, **options)
    output = strategy(query, key, value, AttentionContext(layout))
    pairs = executed(strategy, query, [0, 1, 0], layout)
    assert (output - attention_reference(query, key, value, pairs)).abs().max() < 5e-6
    assert (output - dense_fp64(query, key, value)).abs().max() > 1e-2
    report = strategy.report()
    assert report.density == pytest.approx(float(pairs.float().mean()), abs=1e-6) and report.density < 0.9
    assert report.shares_by_layer["temporal_heads"][0][0] == pytest.approx(1 / 3)


def test_the_chosen_class_has_the_smaller_error(monkeypatch):
    seen = []
    original = module.pattern_errors

    def record(*arguments):
        seen.append(original(*arguments))
        return seen[-1]

    monkeypatch.setattr(module, "pattern_errors", record)
    query, key, value = random_qkv(LAYOUT, heads=6)
    strategy = SvgSmartStrategy(block_size=64, density=0.4, sampled_rows=8)
    strategy(query, key, value, AttentionContext(LAYOUT))
    share = strategy.report().shares_by_layer["temporal_heads"][0][0]
    assert share == pytest.approx(float((seen[0][1] < seen[0][0]).float().mean()))


@pytest.mark.parametrize("refresh_every, judged", [(1, 12), (2, 6), (100, 2)])
def test_decisions_are_kept_per_layer_and_dropped_with_the_video(refresh_every, judged, monkeypatch):
    calls = []
    original = module.pattern_errors
    monkeypatch.setattr(module, "pattern_errors", lambda *a: calls.append(1) or original(*a))
    tensors = random_qkv(LAYOUT)
    strategy = SvgSmartStrategy(block_size=64, density=0.5, refresh_every=refresh_every)
    for video in (1, 2):
        strategy.start_video()
        for step in range(6):
            for layer in range(2):
                strategy(*tensors, AttentionContext(LAYOUT, layer, 2, step, 6))
        assert len(calls) == judged * video


def test_decisions_belong_to_a_place_a_shape_and_a_layout(monkeypatch):
    calls = []
    original = module.pattern_errors
    monkeypatch.setattr(module, "pattern_errors", lambda *a: calls.append(1) or original(*a))
    strategy = SvgSmartStrategy(block_size=64, density=0.5, refresh_every=100)
    turned = TokenLayout(16, 6, 20, 8)  # as many tokens
    for number, (layout, batch, place) in enumerate(
        [
            (LAYOUT, 1, {}),
            (LAYOUT, 1, {"branch": "cond"}),
            (LAYOUT, 1, {"branch": "uncond"}),
            (LAYOUT, 1, {"branch": "uncond", "call_in_step": 1}),
            (LAYOUT, 2, {}),
            (turned, 1, {}),
        ],
        start=1,
    ):
        for step in (3, 4):
            tensors = random_qkv(layout, batch=batch)
            strategy(*tensors, AttentionContext(layout, step_index=step, **place))
        assert len(calls) == number
    strategy(*random_qkv(LAYOUT), AttentionContext(LAYOUT, step_index=5))
    assert len(calls) == number


def test_an_earlier_step_is_judged_anew(monkeypatch):
    calls = []
    original = module.pattern_errors
    monkeypatch.setattr(module, "pattern_errors", lambda *a: calls.append(1) or original(*a))
    strategy = SvgSmartStrategy(block_size=64, density=0.5, refresh_every=3)
    for step, judged in ((5, 1), (7, 1), (4, 2), (6, 2), (7, 3)):
        strategy(*random_qkv(LAYOUT), AttentionContext(LAYOUT, step_index=step))
        assert len(calls) == judged


def test_a_shared_batch_has_one_decision_per_head(monkeypatch):
    errors = torch.tensor([[[0.1, 0.5], [0.5, 0.1]], [[0.2, 0.2], [0.2, 0.2]]])
    monkeypatch.setattr(module, "pattern_errors", lambda *_: errors)
    query, key, value = (torch.cat([part, part]) for part in random_qkv(LAYOUT))
    for share, expected in ((False, 0.5), (True, 1.0)):
        strategy = SvgSmartStrategy(block_size=64, density=0.5, share_batch=share)
        output = strategy(query, key, value, AttentionContext(LAYOUT))
        assert strategy.report().shares_by_layer["temporal_heads"][0][0] == expected
        assert torch.equal(output[0], output[1]) == share


def test_one_frame_is_dense():
    layout = TokenLayout(7, 1, 10, 30)
    query, key, value = random_qkv(layout)
    strategy = SvgSmartStrategy()
    output = strategy(query, key, value, AttentionContext(layout))
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
    assert strategy.report().density == 1.0 and strategy.report().backends == {"dense-sdpa": 1}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_registered_and_run(preset):
    assert installed().preset("svg-smart", preset.name) == preset
    strategy = create_strategy("svg-smart", preset=preset.name, block_size=64)
    for name, value in preset.parameters.items():
        assert name == "block_size" or getattr(strategy.parameters, name) == value
    generator = torch.Generator().manual_seed(0)
    query, key = structured_query_key(DEMO, 1, 4, 64, generator)
    output = strategy(query, key, query, AttentionContext(DEMO, 20, 30, 20, 50))
    assert torch.isfinite(output).all()
    assert 0.2 < strategy.report().density < 0.42 and not strategy.report().dense_calls


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"density": 0}, "density"),
        ({"variant": "spatial"}, "variant: Input should be 'band', 'frames' or 'semantic'"),
        ({"sampled_rows": 0}, "sampled_rows"),
        ({"mass": 1.5}, "mass"),
        (
            {"variant": "semantic", "refresh_every": 3},
            "refresh_every is read by variant 'band' or 'frames', not by 'semantic'; .* default 1",
        ),
        ({"densit": 1}, "unknown parameter 'densit', did you mean 'density'"),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        SvgSmartStrategy(**wrong)


def test_every_parameter_is_read_by_some_variant():
    own = set(SvgSmartParameters.model_fields) - set(BlockSparseParameters.model_fields) - {"variant"}
    assert own == {name for names in SvgSmartParameters.read_by["variant"].values() for name in names}


@pytest.mark.parametrize("variant", SvgSmartParameters.read_by["variant"])
def test_parameters_that_are_not_read_are_refused(variant):
    other = {
        "density": 0.5,
        "sink": True,
        "diagonal": 2,
        "keep": "cover",
        "sampled_rows": 8,
        "refresh_every": 2,
        "share_batch": True,
        "query_clusters": 8,
        "key_clusters": 8,
        "mass": 0.5,
        "least_share": 0.2,
        "first_iterations": 3,
        "iterations": 3,
        "seed": 1,
    }
    for name, value in other.items():
        if name in SvgSmartParameters.read_by["variant"][variant]:
            assert getattr(SvgSmartStrategy(variant=variant, **{name: value}).parameters, name) == value
            continue
        with pytest.raises(ParameterError, match=f"{name} is read by variant .*, not by '{variant}'; "):
            SvgSmartStrategy(variant=variant, **{name: value})
        default = SvgSmartParameters.model_fields[name].default
        SvgSmartStrategy(variant=variant, **{name: default})


def test_a_preset_of_another_variant_is_named():
    with pytest.raises(
        ParameterError, match=r"density is read by variant 'band', not by 'frames'; .* default 0\.25"
    ):
        create_strategy("svg-smart", preset="demo", variant="frames")
    strategy = create_strategy("svg-smart", preset="demo", variant="frames", density=0.25)
    assert strategy.parameters.variant == "frames"
