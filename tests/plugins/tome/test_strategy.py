import logging
import random
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from core import AttentionContext, ParameterError, TokenLayout, available_strategies, create_strategy
from core.registry import installed
from core.testing import StrategyConformance, dense_fp64, random_qkv
from plugins.tome import strategy as module
from plugins.tome.matching import best_destinations
from plugins.tome.presets import PRESETS
from plugins.tome.reference import tome_attention_reference
from plugins.tome.strategy import TomeStrategy

LAYOUT = TokenLayout(7, 5, 7, 9)
LAYOUT_TEXT_LAST = TokenLayout(5, 4, 6, 8, text_first=False)
COGVIDEOX = TokenLayout(226, 13, 30, 45)
DEMO = TokenLayout(16, 17, 12, 20)
CELL = (2, 2, 2)


class TestTomeConformance(StrategyConformance):
    strategy = TomeStrategy
    parameters = {"ratio": 0.5, "cell": CELL}
    full_density = {"ratio": 0.0}
    keeps_tokens = False


class TestTomeMergedQueriesConformance(StrategyConformance):
    strategy = TomeStrategy
    parameters = {"r": 40, "cell": (1, 2, 3), "merge_queries": True, "metric": "mean_k", "gap": 3}
    full_density = {"r": 0}
    keeps_tokens = False


class TestTomeLocalConformance(StrategyConformance):
    strategy = TomeStrategy
    parameters = {"ratio": 1.0, "candidates": "local", "metric": "k", "seed": None}
    full_density = {"r": 0}
    keeps_tokens = False


class Recorder:
    """Counts matchings; stands in for `best_destinations`."""

    def __init__(self, monkeypatch):
        self.calls = 0
        monkeypatch.setattr(module, "best_destinations", self)

    def __call__(self, *arguments):
        self.calls += 1
        return best_destinations(*arguments)


def run(strategy, tensors, step=0, layer=0, layout=LAYOUT, **place):
    return strategy(*tensors, AttentionContext(layout, layer, 4, step, 12, **place))


def test_registered_through_the_entry_point():
    rows = {row.name: row for row in available_strategies()}
    assert rows["tome"].available and rows["tome"].summary.startswith("Token merging")
    assert isinstance(create_strategy("tome", r="12"), TomeStrategy)


@pytest.mark.parametrize("merge_queries", [False, True])
@pytest.mark.parametrize("candidates", ["all", "local"])
@pytest.mark.parametrize("metric", ["kv_norm", "k", "mean_k"])
@pytest.mark.parametrize("layout", [LAYOUT, LAYOUT_TEXT_LAST], ids=TokenLayout.describe)
def test_output_equals_the_reference(layout, metric, candidates, merge_queries):
    # A fixed seed: of two similarities that differ by less than fp32 resolves, either may be merged.
    query, key, value = random_qkv(layout, head_dim=32, seed=4)
    options = {"r": 70, "cell": CELL, "seed": 2, "metric": metric, "candidates": candidates}
    strategy = TomeStrategy(merge_queries=merge_queries, **options)
    output = run(strategy, (query, key, value), layout=layout)
    expected = tome_attention_reference(query, key, value, layout, merge_queries=merge_queries, **options)
    assert (output - expected).abs().max() < 5e-6
    assert (output - dense_fp64(query, key, value)).abs().max() > 1e-2  # something was merged


@pytest.mark.parametrize("none", [{"r": 0}, {"ratio": 0}, {"ratio": 0.001}], ids=str)
@pytest.mark.parametrize("merge_queries", [False, True])
def test_without_merging_it_is_the_dense_call_bit_by_bit(none, merge_queries):
    query, key, value = random_qkv(LAYOUT)
    strategy = TomeStrategy(merge_queries=merge_queries, **none)
    output = run(strategy, (query, key, value))
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
    assert strategy.report().density == 1.0 and strategy.report().backends == {"dense-sdpa": 1}


@pytest.mark.parametrize(
    "layout", [TokenLayout(7, 1, 5, 6), TokenLayout(0, 2, 5, 7)], ids=TokenLayout.describe
)
def test_one_and_two_frames(layout, caplog):
    query, key, value = random_qkv(layout)
    strategy = TomeStrategy(ratio=0.3, cell=CELL)
    output = run(strategy, (query, key, value), layout=layout)
    if layout.frames == 1:  # all of frame 0 is destinations
        assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))
        assert strategy.report().density == 1.0 and not caplog.records
    else:
        assert torch.isfinite(output).all() and strategy.report().density == (70 - 21) / 70


@pytest.mark.parametrize("text", [0, 7, 226])
@pytest.mark.parametrize("text_first", [True, False])
def test_text_is_never_merged(text, text_first):
    """With values that are one for a text token and zero elsewhere, the output is its weight."""
    layout = TokenLayout(text, 4, 5, 7, text_first)
    query, key, value = random_qkv(layout, heads=1)
    value = torch.zeros_like(value)
    text_tokens = range(layout.text_slice.start, layout.text_slice.stop)
    for column, token in enumerate(text_tokens[:64]):
        value[:, :, token, column] = 1
    strategy = TomeStrategy(ratio=1.0, cell=CELL, merge_queries=True)
    output = run(strategy, (query, key, value), layout=layout)
    assert torch.isfinite(output).all()
    partition = strategy.planned(query, AttentionContext(layout)).partition
    assert not set(text_tokens) & set(torch.cat([partition.sources, partition.destinations]).tolist())
    if text:
        key[:, :, layout.text_slice] = 0
        key[:, :, layout.video_slice] = 0  # every weight is 1 / S: a merged text token would have more
        output = run(strategy, (query, key, value), layout=layout)
        columns = output[..., : min(text, 64)]
        assert (columns - 1 / layout.sequence_length).abs().max() < 1e-6


def test_queries_of_merged_tokens_share_an_output():
    query, key, value = random_qkv(LAYOUT)
    strategy = TomeStrategy(ratio=0.6, cell=CELL, merge_queries=True)
    output = run(strategy, (query, key, value))
    rows = {tuple(row) for row in output[0, 0].tolist()}
    kept = LAYOUT.sequence_length - round(0.6 * LAYOUT.video_length)
    assert len(rows) == kept
    assert strategy.report().density == (kept / LAYOUT.sequence_length) ** 2


def test_count_and_ratio():
    tensors = random_qkv(LAYOUT)
    by_ratio, by_count = TomeStrategy(ratio=0.5, cell=CELL), TomeStrategy(r=158, ratio=0.1, cell=CELL)
    assert torch.equal(run(by_ratio, tensors), run(by_count, tensors))
    assert by_count.report().density == (LAYOUT.sequence_length - 158) / LAYOUT.sequence_length


def test_more_than_there_are_sources_merges_all_and_says_so(caplog):
    query, key, value = random_qkv(LAYOUT)
    strategy = TomeStrategy(r=300, cell=CELL)
    with caplog.at_level(logging.WARNING):
        output = run(strategy, (query, key, value))
        run(strategy, (query, key, value), layer=1)
    sources = LAYOUT.video_length - 63 - 2 * 3 * 4
    assert torch.isfinite(output).all()
    assert strategy.report().density == (LAYOUT.sequence_length - sources) / LAYOUT.sequence_length
    assert len(caplog.records) == 1
    assert f"300 tokens were to be merged, but 7 text + 5x7x9 video = 322 tokens has {sources}" in caplog.text


def test_the_backend_is_that_of_the_call(monkeypatch):
    original = module.merged_attention
    monkeypatch.setattr(module, "merged_attention", lambda *arguments: (original(*arguments)[0], "what ran"))
    for merge_queries in (False, True):
        strategy = TomeStrategy(cell=CELL, merge_queries=merge_queries)
        run(strategy, random_qkv(LAYOUT))
        assert strategy.report().backends == {"what ran": 1}


def test_the_error_grows_with_r():
    layout = TokenLayout(7, 6, 8, 10)
    query, key, value = random_qkv(layout, heads=8, seed=1)
    expected = dense_fp64(query, key, value)
    errors = []
    for ratio in (0.0, 0.1, 0.3, 0.5, 0.7, 1.0):
        output = run(TomeStrategy(ratio=ratio, cell=CELL), (query, key, value), layout=layout)
        assert torch.isfinite(output).all()
        errors.append((output - expected).norm().item())
    assert errors == sorted(errors) and errors[0] < 1e-4 < errors[1]


def test_equal_tokens_everywhere():
    """A still picture: all sources join one group, whose mean is a sum of 229 equal terms in fp32."""
    query, key, value = random_qkv(LAYOUT)
    for part in (key, value):
        part[:, :, LAYOUT.video_slice] = part[:, :, LAYOUT.video_start :][:, :, :1]
    output = run(TomeStrategy(r=228, cell=CELL), (query, key, value))
    assert (output - dense_fp64(query, key, value)).abs().max() < 229 * 2.0**-22


def test_heads_and_batches_are_independent():
    query, key, value = random_qkv(LAYOUT, batch=2, heads=3, seed=6)
    together = run(TomeStrategy(cell=CELL), (query, key, value))
    flipped = run(TomeStrategy(cell=CELL), [part.flip(0, 1) for part in (query, key, value)])
    assert (flipped.flip(0, 1) - together).abs().max() < 1e-6
    for batch in range(2):
        for head in range(3):
            one = [part[batch : batch + 1, head : head + 1] for part in (query, key, value)]
            alone = run(TomeStrategy(cell=CELL), one)
            assert (together[batch, head] - alone[0, 0]).abs().max() < 1e-6


@pytest.mark.parametrize("merge_queries", [False, True])
@pytest.mark.parametrize("metric", ["kv_norm", "mean_k"])
def test_fewer_key_heads(metric, merge_queries):
    query, key, value = random_qkv(LAYOUT, heads=4, seed=8)
    options = {"cell": CELL, "metric": metric, "merge_queries": merge_queries}
    output = run(TomeStrategy(**options), (query, key[:, :2], value[:, :2]))
    repeated = (part[:, :2].repeat_interleave(2, dim=1) for part in (key, value))
    expected = run(TomeStrategy(**options), (query, *repeated))
    assert (output - expected).abs().max() < 1e-5


def test_a_matching_is_used_for_gap_steps_by_each_layer(monkeypatch):
    recorder = Recorder(monkeypatch)
    strategy = TomeStrategy(cell=CELL, gap=3)
    for step in range(7):
        for layer in range(2):
            run(strategy, random_qkv(LAYOUT), step, layer)
    assert recorder.calls == 3 * 2  # at steps 0, 3 and 6
    costs = strategy.report().shares_by_layer["matching_cost"]
    assert [cost > 0 for cost in costs[1]] == [True, False, False, True, False, False, True]


def test_reuse_is_by_step_and_not_by_call(monkeypatch):
    recorder = Recorder(monkeypatch)
    strategy = TomeStrategy(cell=CELL, gap=3)
    for step in (0, 0, 5, 6, 6, 7, 8, 2):  # repeats match anew; gaps and going back do too
        run(strategy, random_qkv(LAYOUT), step)
    assert recorder.calls == 5  # at 0, 0, 5, 8 and 2


def test_layers_and_branches_share_nothing():
    """Two layers and two branches in turn give what each gives alone."""
    places = [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    inputs = {place: [random_qkv(LAYOUT) for _ in range(4)] for place in places}
    alone = {}
    for layer, branch in places:
        strategy = TomeStrategy(cell=CELL, gap=3)
        alone[layer, branch] = [
            run(strategy, tensors, step, layer, branch=branch)
            for step, tensors in enumerate(inputs[layer, branch])
        ]
    strategy = TomeStrategy(cell=CELL, gap=3)
    for step in range(4):
        for layer, branch in places:
            output = run(strategy, inputs[layer, branch][step], step, layer, branch=branch)
            assert torch.equal(output, alone[layer, branch][step])


def test_videos_share_nothing():
    first, second, later = (random_qkv(LAYOUT) for _ in range(3))
    strategy = TomeStrategy(cell=CELL, gap=10)
    run(strategy, first, 0)
    strategy.start_video()
    strategy.record.clear()
    outputs = [run(strategy, second, 1), run(strategy, later, 2)]
    fresh = TomeStrategy(cell=CELL, gap=10)
    assert torch.equal(outputs[0], run(fresh, second, 1)) and torch.equal(outputs[1], run(fresh, later, 2))


def test_another_shape_is_matched_anew(monkeypatch):
    recorder = Recorder(monkeypatch)
    strategy = TomeStrategy(cell=CELL, gap=10)
    run(strategy, random_qkv(LAYOUT), 0)
    run(strategy, random_qkv(LAYOUT, batch=2), 1)
    turned = TokenLayout(7, 5, 9, 7)  # as many tokens
    run(strategy, random_qkv(turned, batch=2), 2, layout=turned)
    assert recorder.calls == 3


def test_nothing_is_kept_without_reuse():
    strategy = TomeStrategy(cell=CELL)
    run(strategy, random_qkv(LAYOUT), 0)
    assert not strategy._matched


def test_ramp():
    tensors = random_qkv(LAYOUT)
    strategy = TomeStrategy(r=120, cell=CELL, ramp_steps=3, dense_timesteps=2)
    for step in range(8):
        run(strategy, tensors, step)
    densities = strategy.report().density_by_layer[0]
    merged = [round((1 - density) * LAYOUT.sequence_length) for density in densities]
    assert merged == [0, 0, 30, 60, 90, 120, 120, 120]


def test_global_generators_are_untouched_and_the_seed_decides():
    tensors = random_qkv(LAYOUT)
    torch.manual_seed(3)
    before, python_before = torch.get_rng_state(), random.getstate()
    outputs = [run(TomeStrategy(cell=CELL, seed=seed), tensors) for seed in (1, 1, 2, None)]
    assert torch.equal(torch.get_rng_state(), before) and random.getstate() == python_before
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2]) and not torch.equal(outputs[0], outputs[3])


def test_figures_of_the_report():
    strategy = TomeStrategy(r=100, cell=CELL, dense_layers=1)
    for layer in range(2):
        run(strategy, random_qkv(LAYOUT), layer=layer)
    kept = (LAYOUT.sequence_length - 100) / LAYOUT.sequence_length
    report = strategy.report()
    sources, destinations = 315 - 63 - 24, 63 + 24
    assert report.shares_by_layer["merged_length"][1] == [kept]
    cost = report.shares_by_layer["matching_cost"][1][0]
    assert cost == pytest.approx(sources * destinations / LAYOUT.sequence_length**2)
    assert report.density == (1 + kept) / 2 and report.backends == {"dense-sdpa": 1, "sdpa": 1}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_registered_and_run(preset):
    assert installed().preset("tome", preset.name) == preset
    strategy = create_strategy("tome", preset=preset.name)
    for name, value in preset.parameters.items():
        assert getattr(strategy.parameters, name) == value
    context = AttentionContext(DEMO, 7, 8, 7, 8)
    output = strategy(*random_qkv(DEMO, heads=1, head_dim=16), context)
    assert torch.isfinite(output).all() and 0.5 < strategy.report().density < 0.96


@pytest.mark.parametrize("r", range(1000, 9000, 1000))
def test_the_sweep_merges_as_many_of_cogvideox_as_its_name_says(r):
    strategy = create_strategy("tome", preset=f"r{r}")
    assert strategy._wanted(COGVIDEOX) == r
    assert strategy._wanted(DEMO) == round(r / COGVIDEOX.video_length * DEMO.video_length)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"ratio": 1.1}, "ratio"),
        ({"ratio": float("nan")}, "ratio"),
        ({"r": -1}, "r: Input should be greater than or equal to 0"),
        ({"r": 0.5}, "r: Input should be a valid integer"),
        ({"cell": (4, 3)}, "cell"),
        ({"cell": (4, 0, 3)}, "cell.1: Input should be greater than 0"),
        ({"gap": 0}, "gap"),
        ({"metric": "hidden"}, "metric: Input should be 'kv_norm', 'k' or 'mean_k'"),
        ({"candidates": "near"}, "candidates: Input should be 'all' or 'local'"),
        ({"ration": 0.5}, "unknown parameter 'ration', did you mean 'ratio'"),
    ],
)
def test_wrong_parameters(wrong, message):
    with pytest.raises(ParameterError, match=message):
        TomeStrategy(**wrong)


def test_importing_the_plugin_is_light():
    code = "import sys, plugins.tome; print(*(name for name in sys.modules if name in HEAVY))"
    heavy = (
        "HEAVY = ('plugins.tome.matching', 'plugins.tome.strategy', 'kernels_common', 'triton', 'matplotlib')"
    )
    command = [sys.executable, "-c", f"{heavy}; {code}"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == ""
