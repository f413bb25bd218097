import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from core import (
    AttentionContext,
    ParameterError,
    TokenLayout,
    UnsupportedCallError,
    available_strategies,
    create_strategy,
)
from core.registry import installed
from core.testing import StrategyConformance, dense_fp64, random_qkv
from plugins.sliding_tile import strategy as module
from plugins.sliding_tile.mask import sliding_tile_mask
from plugins.sliding_tile.presets import PRESETS
from plugins.sliding_tile.reference import executed_pairs, sliding_tile_attention_reference
from plugins.sliding_tile.strategy import SlidingTileParameters, SlidingTileStrategy, layout_windows

EVEN = TokenLayout(16, 6, 8, 8)  # tiles of 2x4x8 tokens divide it and fill blocks of 64
UNEVEN = TokenLayout(5, 5, 6, 9, text_first=False)
DEMO = TokenLayout(16, 17, 12, 20)


class TestSlidingTileConformance(StrategyConformance):
    strategy = SlidingTileStrategy
    parameters = {"block_size": 64, "window": (1, 1, 1)}
    full_density = {"window": (99, 99, 99)}


class TestSlidingTileHeadsConformance(StrategyConformance):
    strategy = SlidingTileStrategy
    parameters = {"block_size": 64, "tile": (2, 3, 4), "heads": ((1, 3, 1), (3, 1, 1))}
    full_density = {"heads": ((99, 99, 99),)}


class TestSlidingTileDefaultConformance(StrategyConformance):
    strategy = SlidingTileStrategy
    full_density = {"density": 1.0}


def test_registered_through_the_entry_point():
    rows = {row.name: row for row in available_strategies()}
    assert rows["sliding-tile"].available and rows["sliding-tile"].summary.startswith("Sliding tile")
    assert isinstance(create_strategy("sliding-tile", density="0.5"), SlidingTileStrategy)


@pytest.mark.parametrize("window", [(1, 1, 1), (3, 1, 1), (1, 1, 3)])
@pytest.mark.parametrize("layout, tile", [(EVEN, (2, 4, 8)), (UNEVEN, (2, 4, 4))], ids=["even", "uneven"])
def test_output_equals_the_reference(layout, tile, window):
    query, key, value = random_qkv(layout)
    strategy = SlidingTileStrategy(tile=tile, window=window, block_size=64)
    output = strategy(query, key, value, AttentionContext(layout))
    expected = sliding_tile_attention_reference(
        query, key, value, layout, tile=tile, windows=[window], block=64
    )
    assert (output - expected).abs().max() < 5e-6
    assert (output - dense_fp64(query, key, value)).abs().max() > 1e-2  # something is left out
    executed = executed_pairs(layout, tile, window, 64).double().mean()
    assert strategy.report().density == pytest.approx(float(executed), abs=1e-9)


def test_heads_take_the_windows_in_turn():
    windows = ((1, 1, 1), (3, 1, 1))
    query, key, value = random_qkv(EVEN, heads=3)
    strategy = SlidingTileStrategy(tile=(2, 4, 8), heads=windows, block_size=64)
    output = strategy(query, key, value, AttentionContext(EVEN))
    densities = []
    for head in range(3):
        one = slice(head, head + 1)
        alone = SlidingTileStrategy(tile=(2, 4, 8), window=windows[head % 2], block_size=64)
        expected = alone(query[:, one], key[:, one], value[:, one], AttentionContext(EVEN))
        assert torch.allclose(output[:, one], expected, atol=1e-6)
        densities.append(alone.report().density)
    assert densities[0] < densities[1]
    assert strategy.report().density == pytest.approx(sum(densities) / 3)


def test_full_windows_run_the_block_sparse_operator_and_equal_dense():
    query, key, value = random_qkv(UNEVEN)
    strategy = SlidingTileStrategy(window=(99, 98, 3), tile=(2, 2, 4), block_size=64)
    output = strategy(query, key, value, AttentionContext(UNEVEN))
    assert (output - F.scaled_dot_product_attention(query, key, value)).abs().max() < 5e-6
    assert strategy.report().density == 1.0 and strategy.report().backends == {"torch": 1}


@pytest.mark.parametrize("text", [1, 16, 77])
@pytest.mark.parametrize("text_first", [True, False])
def test_text_is_seen_by_all_and_sees_all(text, text_first):
    layout = TokenLayout(text, 6, 8, 8, text_first)
    query, key, value = random_qkv(layout)
    strategy = SlidingTileStrategy(window=(1, 1, 1), block_size=64)
    output = strategy(query, key, value, AttentionContext(layout))
    rows = layout.text_slice
    assert strategy.report().density < 1.0
    assert (output[:, :, rows] - dense_fp64(query, key, value)[:, :, rows]).abs().max() < 5e-6
    silent = key.clone()
    silent[:, :, rows] = -1e4 * query.sum(2, keepdim=True).sign()  # another text key moves every query
    moved = strategy(query, silent, value, AttentionContext(layout))
    assert ((moved - output).abs().amax(-1) > 1e-6).all()


def test_fewer_key_heads():
    query, key, value = random_qkv(EVEN, heads=4)
    key, value = key[:, :2], value[:, :2]
    options = {"tile": (2, 4, 8), "heads": ((1, 1, 1), (3, 1, 1)), "block_size": 64}
    output = SlidingTileStrategy(**options)(query, key, value, AttentionContext(EVEN))
    repeated = (part.repeat_interleave(2, dim=1) for part in (key, value))
    expected = SlidingTileStrategy(**options)(query, *repeated, AttentionContext(EVEN))
    assert torch.allclose(output, expected, atol=1e-6)


def test_causal_and_cross_calls_are_refused():
    query, key, value = random_qkv(EVEN)
    with pytest.raises(UnsupportedCallError, match="causal"):
        SlidingTileStrategy()(query, key, value, AttentionContext(EVEN, causal=True))
    with pytest.raises(UnsupportedCallError, match="different query and key lengths"):
        SlidingTileStrategy()(query, key[:, :, 1:], value[:, :, 1:], AttentionContext(EVEN))


def test_masks_are_built_once_per_layout(monkeypatch):
    built = []

    def record(tiling, *options):
        built.append(tiling.layout)
        return sliding_tile_mask(tiling, *options)

    monkeypatch.setattr(module, "sliding_tile_mask", record)
    strategy = SlidingTileStrategy(block_size=64)
    inputs = {layout: random_qkv(layout) for layout in (EVEN, UNEVEN)}
    for layout in (EVEN, UNEVEN, EVEN, UNEVEN):
        strategy.start_video()
        for layer in range(2):
            strategy(*inputs[layout], AttentionContext(layout, layer, 2))
    assert built == [EVEN, UNEVEN]


@pytest.mark.parametrize("density", [0.15, 0.3, 0.5, 0.9, 1.0])
def test_density_is_kept_and_used(density):
    query = torch.zeros(1, 1, DEMO.sequence_length, 64)
    strategy = SlidingTileStrategy(density=density, block_size=64)
    executed = strategy.planned(query, AttentionContext(DEMO)).density
    assert 0.6 * density < executed <= density


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_registered_and_run(preset):
    assert installed().preset("sliding-tile", preset.name) == preset
    strategy = create_strategy("sliding-tile", preset=preset.name)
    for name, value in preset.parameters.items():
        assert getattr(strategy.parameters, name) == value
    query = torch.zeros(1, 3, DEMO.sequence_length, 64)
    assert 0.25 < strategy.planned(query, AttentionContext(DEMO)).density <= 1.0


def test_a_rule_takes_the_place_of_a_presets():
    with pytest.raises(ParameterError, match="None for those of a preset; got density and heads"):
        create_strategy("sliding-tile", preset="demo", density=0.3)
    strategy = create_strategy("sliding-tile", preset="demo", density=0.3, heads=None)
    assert strategy.parameters.density == 0.3 and strategy.parameters.block_size == 64


def test_demo_preset_leaves_out_more_than_half():
    query = torch.zeros(1, 3, DEMO.sequence_length, 64)
    density = create_strategy("sliding-tile", preset="demo").planned(query, AttentionContext(DEMO)).density
    assert 0.25 <= density <= 0.5


def test_lists_and_text_from_a_command_line():
    parameters = SlidingTileParameters.build(
        "sliding-tile", {"tile": [2, 4, 8], "heads": [[1, 3, 1], [3, 1, 1]], "block_size": "64"}
    )
    assert parameters.tile == (2, 4, 8) and parameters.heads == ((1, 3, 1), (3, 1, 1))
    assert SlidingTileParameters.build("sliding-tile", {"tile": "auto"}).tile == "auto"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"tile": [0, 4, 4]}, "tile.*three whole numbers .frames, rows, columns., each at least 1"),
        ({"tile": [4, 4]}, "three whole numbers"),
        ({"tile": "best"}, "Input should be 'auto'"),
        ({"window": [3, 3, 2.5]}, "window: expected three whole numbers"),
        ({"window": 3}, "window: expected three whole numbers"),
        ({"window": [3, True, 3]}, "window: expected a number, not true or false"),
        ({"heads": []}, "heads"),
        ({"heads": [[1, 1, 1], [3]]}, "heads.1: expected three whole numbers"),
        ({"density": 0}, "density"),
        ({"density": 1.1}, "density"),
        (
            {"density": 0.5, "window": [1, 1, 1]},
            "give one of window, density, heads .* got window and density",
        ),
        ({"heads": [[1, 1, 1]], "window": [1, 1, 1]}, "got window and heads"),
        ({"block_size": 96}, "block_size"),
        ({"windw": [1, 1, 1]}, "unknown parameter 'windw', did you mean 'window'"),
    ],
)
def test_wrong_parameters(wrong, message):
    with pytest.raises(ParameterError, match=message):
        SlidingTileStrategy(**wrong)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"tile": (2, 4, 4), "window": (2, 1, 1)}, "must be odd .* got 2 of 3 tiles; take 1 or 3"),
        ({"density": 0.1, "block_size": 64}, "density 0.1 is out of reach .* execute 0.*; ask for at least"),
    ],
)
def test_parameters_that_do_not_fit_the_call(wrong, message):
    with pytest.raises(ParameterError, match=message):
        SlidingTileStrategy(**wrong)(*random_qkv(EVEN), AttentionContext(EVEN))


def test_the_error_names_a_density_within_reach():
    query = torch.zeros(1, 1, DEMO.sequence_length, 64)
    with pytest.raises(ParameterError) as error:
        SlidingTileStrategy(density=0.01, block_size=64).planned(query, AttentionContext(DEMO))
    least = float(str(error.value).split("execute ")[1].split(";")[0])
    plan = SlidingTileStrategy(density=least, block_size=64).planned(query, AttentionContext(DEMO))
    assert least - 0.001 < plan.density <= least


def test_fewer_heads_than_windows_take_the_first_ones():
    windows = ((1, 1, 1), (3, 1, 1), (1, 3, 1))
    query = torch.zeros(1, 2, DEMO.sequence_length, 64)
    three, two = (SlidingTileStrategy(heads=part, block_size=64) for part in (windows, windows[:2]))
    masks = [one.planned(query, AttentionContext(DEMO)).mask.to_blocks() for one in (three, two)]
    assert torch.equal(*masks)


def test_a_wrong_density_shows_before_the_dense_warm_up():
    query = torch.zeros(1, 1, DEMO.sequence_length, 64)
    strategy = SlidingTileStrategy(density=0.01, block_size=64, dense_timesteps=5)
    with pytest.raises(ParameterError, match="out of reach"):
        strategy(query, query, query, AttentionContext(DEMO, step_index=0))


def test_half_of_each_axis_by_default():
    tiling = module.layout_tiling(DEMO, SlidingTileParameters(block_size=64))
    assert tiling.counts == (5, 3, 5)
    assert layout_windows(tiling, SlidingTileParameters(block_size=64)) == [(3, 3, 3)]


def test_importing_the_plugin_is_light():
    heavy = (
        "HEAVY = ('plugins.sliding_tile.mask', 'plugins.sliding_tile.strategy', 'kernels_common', 'triton')"
    )
    code = "import sys, plugins.sliding_tile; print(*(name for name in sys.modules if name in HEAVY))"
    command = [sys.executable, "-c", f"{heavy}; {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""
