import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from core import AttentionContext, ParameterError, TokenLayout, available_strategies, create_strategy
from core.registry import installed
from core.testing import StrategyConformance, dense_fp64, random_qkv
from kernels_common import block_sparse_attention
from plugins.radial import strategy as module
from plugins.radial.mask import radial_mask
from plugins.radial.presets import PRESETS
from plugins.radial.reference import radial_attention_reference
from plugins.radial.strategy import RadialStrategy

LAYOUT = TokenLayout(16, 4, 16, 20)
LAYOUT_TEXT_LAST = TokenLayout(5, 4, 17, 19, text_first=False)
DEMO = TokenLayout(16, 17, 12, 20)


class TestRadialConformance(StrategyConformance):
    strategy = RadialStrategy
    parameters = {"block_size": 64}
    full_density = {"decay_factor": 1e6}


class TestRadialPaperConformance(StrategyConformance):
    strategy = RadialStrategy
    parameters = {"block_size": 64, "rule": "paper", "sink": False, "threshold": 0.25}
    full_density = {"decay_factor": 1e6}


class TestRadialStrictConformance(StrategyConformance):
    strategy = RadialStrategy
    parameters = {"block_size": 64, "rule": "official", "keep": "strict"}


def test_registered_through_the_entry_point():
    rows = {row.name: row for row in available_strategies()}
    assert rows["radial"].available and rows["radial"].summary.startswith("Radial attention")
    assert isinstance(create_strategy("radial", decay_factor="0.5"), RadialStrategy)


@pytest.mark.parametrize("keep", ["cover", "fraction", "strict"])
@pytest.mark.parametrize("rule", ["cogvideox", "official", "paper"])
@pytest.mark.parametrize("layout", [LAYOUT, LAYOUT_TEXT_LAST], ids=TokenLayout.describe)
def test_output_equals_the_reference(layout, rule, keep):
    query, key, value = random_qkv(layout)
    options = {"rule": rule, "decay_factor": 0.3, "sink": False, "keep": keep, "threshold": 0.5}
    output = RadialStrategy(block_size=64, **options)(query, key, value, AttentionContext(layout))
    expected = radial_attention_reference(query, key, value, layout, block_size=(64, 64), **options)
    assert (output - expected).abs().max() < 5e-6
    assert (output - dense_fp64(query, key, value)).abs().max() > 1e-2  # something is left out


def test_operator_equals_sdpa_with_the_token_mask():
    query, key, value = random_qkv(LAYOUT)
    mask = radial_mask(LAYOUT, block_size=(64, 64), decay_factor=0.2)
    output = block_sparse_attention(query, key, value, mask)
    expected = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to_dense())
    assert float(mask.density()) < 0.9 and (output - expected).abs().max() < 1e-5


def test_full_bands_run_the_block_sparse_operator_and_equal_dense():
    query, key, value = random_qkv(LAYOUT)
    strategy = RadialStrategy(block_size=64, decay_factor=2 * LAYOUT.frames)
    output = strategy(query, key, value, AttentionContext(LAYOUT))
    assert (output - F.scaled_dot_product_attention(query, key, value)).abs().max() < 5e-6
    assert strategy.report().density == 1.0 and strategy.report().backends == {"torch": 1}


def test_eight_bits_stay_close_to_the_same_mask():
    query, key, value = random_qkv(LAYOUT)
    exact, rounded = (
        RadialStrategy(block_size=64, decay_factor=0.3, use_sage_attention=use)(
            query, key, value, AttentionContext(LAYOUT)
        )
        for use in (False, True)
    )
    error = (rounded - exact).norm() / exact.norm()
    assert 1e-3 < error < 3.9e-2


@pytest.mark.parametrize("text", [1, 16, 77])
@pytest.mark.parametrize("text_first", [True, False])
def test_text_rows_equal_dense_attention(text, text_first):
    layout = TokenLayout(text, 4, 16, 20, text_first)
    query, key, value = random_qkv(layout)
    strategy = RadialStrategy(block_size=64, decay_factor=0.2)
    output = strategy(query, key, value, AttentionContext(layout))
    rows = layout.text_slice
    assert strategy.report().density < 1.0
    assert (output[:, :, rows] - dense_fp64(query, key, value)[:, :, rows]).abs().max() < 5e-6


def test_heads_are_independent():
    query, key, value = random_qkv(LAYOUT, heads=3)
    together = RadialStrategy(block_size=64)(query, key, value, AttentionContext(LAYOUT))
    for head in range(3):
        one = slice(head, head + 1)
        alone = RadialStrategy(block_size=64)(
            query[:, one], key[:, one], value[:, one], AttentionContext(LAYOUT)
        )
        assert torch.allclose(together[:, one], alone, atol=1e-6)


def test_fewer_key_heads():
    query, key, value = random_qkv(LAYOUT, heads=4)
    key, value = key[:, :2], value[:, :2]
    output = RadialStrategy(block_size=64)(query, key, value, AttentionContext(LAYOUT))
    repeated = (part.repeat_interleave(2, dim=1) for part in (key, value))
    expected = RadialStrategy(block_size=64)(query, *repeated, AttentionContext(LAYOUT))
    assert torch.allclose(output, expected, atol=1e-6)


@pytest.mark.parametrize("dense_layers, dense_steps", [(0, 0), (1, 2), (2, 0), (0, 3)])
def test_dense_warm_up_calls(dense_layers, dense_steps):
    layers, steps = 3, 4
    query, key, value = random_qkv(LAYOUT)
    strategy = RadialStrategy(block_size=64, dense_layers=dense_layers, dense_timesteps=dense_steps)
    for step in range(steps):
        for layer in range(layers):
            strategy(query, key, value, AttentionContext(LAYOUT, layer, layers, step, steps))
    report = strategy.report()
    dense = dense_layers * steps + dense_steps * (layers - dense_layers)
    assert sum(report.dense_calls.values()) == dense
    sparse = float(radial_mask(LAYOUT, block_size=(64, 64)).density())
    assert report.density == pytest.approx((dense + (layers * steps - dense) * sparse) / (layers * steps))


def test_masks_are_built_once_per_layout(monkeypatch):
    built = []

    def record(layout, **options):
        built.append(layout)
        return radial_mask(layout, **options)

    other = TokenLayout(3, 4, 6, 8)
    expected, inputs = {}, {layout: random_qkv(layout) for layout in (LAYOUT, other)}
    for layout, tensors in inputs.items():
        expected[layout] = RadialStrategy(block_size=64)(*tensors, AttentionContext(layout))
    monkeypatch.setattr(module, "radial_mask", record)
    strategy = RadialStrategy(block_size=64)
    for layout in (LAYOUT, other, LAYOUT, other):
        strategy.start_video()
        for layer in range(2):
            output = strategy(*inputs[layout], AttentionContext(layout, layer, 2))
            assert torch.equal(output, expected[layout])
    assert built == [LAYOUT, other]


def test_one_frame_is_dense():
    layout = TokenLayout(7, 1, 20, 30)
    query, key, value = random_qkv(layout)
    strategy = RadialStrategy(keep="strict")
    output = strategy(query, key, value, AttentionContext(layout))
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
    assert strategy.report().density == 1.0 and strategy.report().backends == {"dense-sdpa": 1}


def test_dense_sparsity_type_runs_dense_and_says_so():
    query, key, value = random_qkv(LAYOUT)
    strategy = RadialStrategy(sparsity_type="dense", block_size=64)
    output = strategy(query, key, value, AttentionContext(LAYOUT))
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
    assert strategy.report().density == 1.0 and strategy.report().backends == {"dense-sdpa": 1}


def test_density_does_not_fall_with_the_decay_factor():
    query = torch.zeros(1, 1, DEMO.sequence_length, 64)
    for rule in ("cogvideox", "official", "paper"):
        plans = [
            RadialStrategy(rule=rule, block_size=64, decay_factor=g).planned(query, AttentionContext(DEMO))
            for g in (0.1, 0.5, 1, 2, 4, 34)
        ]
        densities = [plan.density for plan in plans]
        assert densities == sorted(densities) and densities[0] < densities[-2] < densities[-1] == 1.0


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_registered_and_run(preset):
    assert installed().preset("radial", preset.name) == preset
    strategy = create_strategy("radial", preset=preset.name)
    for name, value in preset.parameters.items():
        assert getattr(strategy.parameters, name) == value
    query = torch.zeros(1, 1, DEMO.sequence_length, 64)
    assert 0.3 < strategy.planned(query, AttentionContext(DEMO)).density < 0.7


def test_demo_preset_leaves_out_more_than_half():
    query = torch.zeros(1, 1, DEMO.sequence_length, 64)
    density = create_strategy("radial", preset="demo").planned(query, AttentionContext(DEMO)).density
    assert 0.35 <= density <= 0.5


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"decay_factor": 0}, "decay_factor"),
        ({"decay_factor": float("inf")}, "decay_factor"),
        ({"threshold": 0}, "threshold"),
        ({"threshold": 1.1}, "threshold"),
        ({"keep": "cover", "threshold": 0.4}, "threshold is read by keep 'fraction', not by 'cover'"),
        ({"keep": "most"}, "keep: Input should be 'cover', 'fraction' or 'strict'"),
        ({"rule": "wan"}, "rule: Input should be 'cogvideox', 'official' or 'paper'"),
        ({"sparsity_type": "log"}, "sparsity_type: Input should be 'radial' or 'dense'"),
        ({"block_size": 100}, "block_size"),
        ({"temporal_patch": 0}, "temporal_patch"),
        ({"decay_facto": 1}, "unknown parameter 'decay_facto', did you mean 'decay_factor'"),
    ],
)
def test_wrong_parameters(wrong, message):
    with pytest.raises(ParameterError, match=message):
        RadialStrategy(**wrong)


def test_importing_the_plugin_is_light():
    code = "import sys, plugins.radial; print(*(name for name in sys.modules if name in HEAVY))"
    heavy = (
        "HEAVY = ('plugins.radial.mask', 'plugins.radial.strategy', 'kernels_common', 'triton', 'matplotlib')"
    )
    command = [sys.executable, "-c", f"{heavy}; {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""
