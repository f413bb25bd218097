import pytest
import torch
import torch.nn.functional as F

from core import AttentionContext, ParameterError, TokenLayout, available_strategies, create_strategy
from core.registry import installed
from core.testing import StrategyConformance, dense_fp64, random_qkv
from plugins.svg_smart import strategy as module
from plugins.svg_smart.presets import PRESETS
from plugins.svg_smart.reference import attention_reference
from plugins.svg_smart.strategy import SvgSmartStrategy

LAYOUT = TokenLayout(16, 6, 8, 20)
LAYOUT_TEXT_LAST = TokenLayout(5, 6, 9, 19, text_first=False)
DEMO = TokenLayout(16, 17, 12, 20)


class TestBandConformance(StrategyConformance):
    strategy = SvgSmartStrategy
    # The suite probes a call again with other values; the decision of a step then stands.
    parameters = {"density": 0.95, "block_size": 64, "refresh_every": 2}
    full_density = {"density": 1.0}


class TestSinkConformance(StrategyConformance):
    strategy = SvgSmartStrategy
    parameters = {"density": 0.97, "block_size": 64, "sink": True, "keep": "cover", "refresh_every": 2}
    full_density = {"density": 1.0}


class TestFramesConformance(StrategyConformance):
    strategy = SvgSmartStrategy
    parameters = {"variant": "frames", "block_size": 64, "refresh_every": 2}
    full_density = {"diagonal": 100}


class TestSemanticConformance(StrategyConformance):
    strategy = SvgSmartStrategy
    parameters = {"variant": "semantic", "block_size": 64, "query_clusters": 4, "key_clusters": 8}
    full_density = {"mass": 1.0}


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


@pytest.mark.parametrize("options", [{"density": 0.4}, {"density": 0.6, "sink": True}, {"variant": "frames"}])
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


def test_a_shared_batch_has_one_decision_per_head(monkeypatch):
    errors = torch.tensor([[[0.1, 0.5], [0.5, 0.1]], [[0.2, 0.2], [0.2, 0.2]]])
    monkeypatch.setattr(module, "pattern_errors", lambda *_: errors)
    query, key, value = (torch.cat([part, part]) for part in random_qkv(LAYOUT))
    for share, expected in ((False, 0.5), (True, 1.0)):
        strategy = SvgSmartStrategy(block_size=64, density=0.5, share_batch=share)
        output = strategy(query, key, value, AttentionContext(LAYOUT))
        assert strategy.report().shares_by_layer["temporal_heads"][0][0] == expected
        assert torch.equal(output[0], output[1]) == share


def test_semantic_order_follows_the_content():
    """Tokens in clusters that attend to themselves: a fraction of the blocks holds all of the attention."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 8, (LAYOUT.sequence_length,), generator=generator)
    codes = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:8] * 12
    noise = [0.1 * torch.randn(1, 2, LAYOUT.sequence_length, 64, generator=generator) for _ in range(3)]
    query, key = codes[group] + noise[0], codes[group] + noise[1]
    value = torch.randn(1, 2, LAYOUT.sequence_length, 64, generator=generator)
    strategy = SvgSmartStrategy(
        variant="semantic", block_size=64, query_clusters=16, key_clusters=16, least_share=0.0
    )
    output = strategy(query, key, value, AttentionContext(LAYOUT))
    exact = dense_fp64(query, key, value)
    assert strategy.report().density < 0.6
    assert (output - exact).norm() < 0.05 * exact.norm()


def test_semantic_centroids_are_kept_per_layer(monkeypatch):
    starts = []
    original = module.semantic_pattern
    monkeypatch.setattr(module, "semantic_pattern", lambda *a: starts.append(a[-1] is None) or original(*a))
    tensors = random_qkv(LAYOUT)
    strategy = SvgSmartStrategy(variant="semantic", block_size=64, query_clusters=4, key_clusters=4)
    for _ in range(2):
        strategy.start_video()
        for step in range(2):
            for layer in range(2):
                strategy(*tensors, AttentionContext(LAYOUT, layer, 2, step, 2))
    assert starts == [True, True, False, False] * 2


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
    strategy = create_strategy("svg-smart", preset=preset.name)
    query = torch.zeros(1, 1, DEMO.sequence_length, 64)
    assert 0.2 < float(strategy.planned(query, AttentionContext(DEMO)).masks.density()) < 0.5


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"density": 0}, "density"),
        ({"variant": "spatial"}, "variant: Input should be 'band', 'frames' or 'semantic'"),
        ({"sampled_rows": 0}, "sampled_rows"),
        ({"mass": 1.5}, "mass"),
        ({"variant": "semantic", "refresh_every": 3}, "refresh_every belongs to the variants"),
        ({"densit": 1}, "unknown parameter 'densit', did you mean 'density'"),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        SvgSmartStrategy(**wrong)
