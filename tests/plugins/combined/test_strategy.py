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
from core.strategy import Capabilities
from core.testing import StrategyConformance, dense_fp64, random_qkv
from plugins.combined import strategy as module
from plugins.combined.presets import PRESETS
from plugins.combined.strategy import CombinedStrategy
from plugins.gilbert_block.strategy import GilbertBlockStrategy

LAYOUT = TokenLayout(6, 8, 6, 8)
TEXT_LAST = TokenLayout(5, 9, 5, 7, text_first=False)
COGVIDEOX_15 = TokenLayout(226, 11, 48, 85)
SPARSE = {"tau": 0.5, "block_size": 64, "samples": 4}


class TestTestedConformance(StrategyConformance):
    strategy = CombinedStrategy
    # A layout's few heads would all be of one class at the usual threshold.
    parameters = {"similarity": 0.3, "places": 2, "key_stride": 40, "anchors": 1, "sparse_options": SPARSE}
    keeps_tokens = False


class TestAnchorsConformance(StrategyConformance):
    strategy = CombinedStrategy
    parameters = {"classes": "pattern", "anchors": 2, "places": 8}
    full_density = {"anchors": 1000}
    keeps_tokens = False


class TestColumnsConformance(StrategyConformance):
    strategy = CombinedStrategy
    parameters = {"classes": "pattern", "form": "columns", "places": 8}
    keeps_tokens = False


class TestSparseConformance(StrategyConformance):
    strategy = CombinedStrategy
    parameters = {"classes": "sparse", "sparse_options": SPARSE}
    full_density = {"sparse": "sparge", "sparse_options": {"density": 1.0}}


def call(layout=LAYOUT, **options):
    return AttentionContext(layout, **{"num_layers": 2, "num_steps": 20, "step_index": 7} | options)


def test_registered_through_the_entry_point():
    rows = {row.name: row for row in available_strategies()}
    assert rows["combined"].available and rows["combined"].summary.startswith("Frame patterns")
    assert isinstance(create_strategy("combined", anchors="2"), CombinedStrategy)


def with_classes(monkeypatch, chosen):
    """Tests that find these heads ``[B, H]`` alike."""
    monkeypatch.setattr(module, "pattern_heads", lambda *_: torch.tensor(chosen))


@pytest.mark.parametrize("form", ["anchors", "columns"])
@pytest.mark.parametrize("layout", [LAYOUT, TEXT_LAST], ids=TokenLayout.describe)
@pytest.mark.parametrize(
    "chosen",
    [[[True, False, True], [False, False, True]], [[False] * 3] * 2, [[True] * 3] * 2],
    ids=["mixed", "none", "all"],
)
def test_each_head_gets_what_its_branch_alone_would_give(chosen, layout, form, monkeypatch):
    tensors = random_qkv(layout, batch=2, heads=3)
    options = {"form": form, "places": 8, "sparse_options": SPARSE}
    alone = {kind: CombinedStrategy(classes=kind, **options) for kind in ("pattern", "sparse")}
    outputs = {kind: one(*tensors, call(layout)) for kind, one in alone.items()}
    with_classes(monkeypatch, chosen)
    mixed = CombinedStrategy(**options)
    output = mixed(*tensors, call(layout))
    flags = torch.tensor(chosen)
    expected = torch.where(flags[..., None, None], outputs["pattern"], outputs["sparse"])
    assert torch.allclose(output, expected, atol=1e-5)
    assert (outputs["pattern"] - outputs["sparse"]).abs().amax((2, 3)).min() > 1e-3
    share = flags.double().mean().item()
    report = mixed.report()
    assert report.shares_by_layer["pattern_heads"][0][7] == pytest.approx(share)
    if form == "anchors":  # whose cost does not depend on the head
        others = [part[~flags][:, None] for part in tensors]
        result = GilbertBlockStrategy(**SPARSE).attend(*others, call(layout)) if share < 1 else None
        parts = share * alone["pattern"].report().density + (1 - share) * float(
            result.density if result else 0
        )
        assert report.density == pytest.approx(parts + report.shares_by_layer["tests"][0][7])


def test_all_heads_by_the_other_strategy_are_that_strategy():
    tensors = random_qkv(LAYOUT, batch=2)
    strategy = CombinedStrategy(classes="sparse", sparse_options=SPARSE)
    other = GilbertBlockStrategy(**SPARSE)
    assert torch.equal(strategy(*tensors, call()), other(*tensors, call()))
    assert strategy.report().density == other.report().density < 1


def test_any_registered_strategy_takes_the_other_heads():
    tensors = random_qkv(LAYOUT)
    options = {"block_size": 64, "density": 0.4}
    strategy = CombinedStrategy(classes="sparse", sparse="sparge", sparse_options=options)
    assert torch.equal(strategy(*tensors, call()), create_strategy("sparge", **options)(*tensors, call()))


@pytest.mark.parametrize("layout", [LAYOUT, TEXT_LAST], ids=TokenLayout.describe)
def test_text_queries_are_dense_under_every_form(layout):
    tensors = random_qkv(layout, batch=2)
    for form in ("anchors", "columns"):
        strategy = CombinedStrategy(classes="pattern", form=form, places=8)
        output = strategy(*tensors, call(layout))[:, :, layout.text_slice]
        assert (output - dense_fp64(*tensors)[:, :, layout.text_slice]).abs().max() < 5e-6


@pytest.mark.parametrize(
    "layout, options",
    [(LAYOUT, {"anchors": 8}), (LAYOUT, {"anchors": 100}), (TokenLayout(9, 2, 6, 8), {"form": "columns"})],
    ids=str,
)
def test_patterns_that_cost_as_much_as_dense_attention_are_not_used(layout, options):
    tensors = random_qkv(layout)
    strategy = CombinedStrategy(classes="pattern", places=8, **options)
    assert torch.equal(strategy(*tensors, call(layout)), F.scaled_dot_product_attention(*tensors))
    assert strategy.report().density == 1.0 and strategy.report().backends == {"dense-sdpa": 1}
    tested = CombinedStrategy(places=8, similarity=0.01, sparse_options=SPARSE, **options)
    tested(*tensors, call(layout))
    shares = tested.report().shares_by_layer
    assert shares["pattern_heads"][0][7] == shares["tests"][0][7] == 0


def test_one_frame_is_dense():
    layout = TokenLayout(7, 1, 10, 30)
    query, key, value = random_qkv(layout)
    for form in ("anchors", "columns"):
        strategy = CombinedStrategy(classes="pattern", form=form)
        assert torch.equal(
            strategy(query, key, value, call(layout)), F.scaled_dot_product_attention(query, key, value)
        )
        assert strategy.report().density == 1.0 and strategy.report().backends == {"dense-sdpa": 1}


@pytest.mark.parametrize("refresh_every, tested", [(1, 12), (2, 6), (100, 2)])
def test_classes_are_kept_per_layer_and_dropped_with_the_video(refresh_every, tested, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "pattern_heads", lambda *a: calls.append(1) or torch.tensor([[True, False]]))
    tensors = random_qkv(LAYOUT)
    strategy = CombinedStrategy(refresh_every=refresh_every, places=8, sparse_options=SPARSE)
    for video in (1, 2):
        strategy.start_video()
        for step in range(6):
            for layer in range(2):
                strategy(*tensors, call(layer_index=layer, step_index=step))
        assert len(calls) == tested * video
        tests = strategy.report().shares_by_layer["tests"]
        assert [cost > 0 for cost in tests[1]] == [step % refresh_every == 0 for step in range(6)]


def test_calls_of_one_step_have_classes_of_their_own(monkeypatch):
    calls = []
    monkeypatch.setattr(module, "pattern_heads", lambda *a: calls.append(1) or torch.tensor([[True, False]]))
    strategy = CombinedStrategy(places=8, sparse_options=SPARSE)
    tensors = random_qkv(LAYOUT)
    for step in (0, 1):
        for other in ({"branch": "cond"}, {"branch": "uncond"}, {"call_in_step": 1}):
            strategy(*tensors, call(step_index=step, **other))
    assert len(calls) == 3


def test_a_new_video_resets_the_other_strategy():
    sparse = SPARSE | {"refresh_every": 10}
    strategy = CombinedStrategy(classes="sparse", sparse_options=sparse)
    strategy(*random_qkv(LAYOUT), call(step_index=0))
    strategy.start_video()
    tensors = random_qkv(LAYOUT)
    fresh = CombinedStrategy(classes="sparse", sparse_options=sparse)
    assert torch.equal(strategy(*tensors, call(step_index=1)), fresh(*tensors, call(step_index=1)))


def test_the_seed_reaches_the_tests_of_heads(monkeypatch):
    seeds = []
    original = module.pattern_heads
    monkeypatch.setattr(module, "pattern_heads", lambda *a: seeds.append(a[3].seed) or original(*a))
    CombinedStrategy(seed=5, places=8, sparse_options=SPARSE)(*random_qkv(LAYOUT), call())
    assert seeds == [5]


def test_second_video_behaves_like_the_first():
    tensors = random_qkv(LAYOUT, heads=4)
    strategy = CombinedStrategy(similarity=0.4, places=8, sparse_options=SPARSE, dense_timesteps=1)

    def video():
        strategy.start_video()
        outputs = [
            strategy(*tensors, call(layer_index=layer, step_index=step))
            for step in range(3)
            for layer in range(2)
        ]
        return torch.stack(outputs), strategy.report()

    first, second = video(), video()
    assert torch.equal(first[0], second[0])
    assert str(first[1]) == str(second[1]) and first[1].dense_calls == {"dense warm-up": 2}


def test_what_the_other_strategy_keeps_goes_with_the_heads_it_belongs_to(monkeypatch):
    """It keeps its blocks over steps; a layer whose classes change must not get those of other heads."""
    tensors = random_qkv(LAYOUT, heads=3)
    sparse = SPARSE | {"refresh_every": 10}
    flags = [[True, False, False], [False, True, False]]
    results = []
    strategy = CombinedStrategy(refresh_every=2, places=8, sparse_options=sparse)
    for step, chosen in ((0, flags[0]), (1, flags[0]), (2, flags[1])):
        with_classes(monkeypatch, [chosen])
        results.append(strategy(*tensors, call(step_index=step)))
    fresh = CombinedStrategy(places=8, sparse_options=sparse)
    assert torch.equal(results[2], fresh(*tensors, call(step_index=2)))


def test_dense_warm_up_of_the_other_strategy_is_not_used():
    tensors = random_qkv(LAYOUT)
    strategy = CombinedStrategy(classes="sparse", sparse_options=SPARSE | {"dense_timesteps": 20})
    strategy(*tensors, call())
    assert strategy.report().density < 1 and not strategy.report().dense_calls


def test_calls_that_the_other_strategy_does_not_support_are_refused(monkeypatch):
    monkeypatch.setattr(GilbertBlockStrategy, "capabilities", Capabilities(head_dims=(128,)))
    with pytest.raises(UnsupportedCallError, match="'gilbert-block' does not support head_dim 64"):
        CombinedStrategy(classes="sparse")(*random_qkv(LAYOUT), call())


def test_gradients_are_refused():
    query, key, value = random_qkv(LAYOUT)
    with pytest.raises(UnsupportedCallError, match="no backward pass"):
        CombinedStrategy()(query.requires_grad_(), key, value, call())


@pytest.mark.parametrize("form", ["anchors", "columns"])
def test_density_counts_what_is_executed(form):
    """Counted by hand for CogVideoX1.5's grid."""
    places, frames, text, length = 48 * 85, 11, 226, 45106
    text_pairs = text * length + (length - text) * text
    table = 11 * 64 * (text + 11 * 64) / 2
    exact = 3 if form == "anchors" else 1
    pairs = text_pairs + exact * frames * places**2 + table + exact * frames**2 * places / 2
    assert module.pattern_cost(COGVIDEOX_15, 64, exact) == pytest.approx(pairs / length**2)
    assert module.pattern_cost(COGVIDEOX_15, 64, exact, 5) == pytest.approx(
        (pairs + 5 * places**2) / length**2
    )
    strategy = CombinedStrategy(classes="pattern", form=form, anchors=3, exact_rows=0.25)
    rows = (length - text) * length / 4 if form == "anchors" else 5 * places**2
    assert strategy._pattern_cost(COGVIDEOX_15, 5) == pytest.approx((pairs + rows) / length**2)
    assert strategy._worthwhile(COGVIDEOX_15)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_registered_and_load(preset):
    assert installed().preset("combined", preset.name) == preset
    assert create_strategy("combined", preset=preset.name).parameters.places > 0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"classes": "dense"}, "classes: Input should be 'tested', 'pattern' or 'sparse'"),
        ({"anchors": 0}, "anchors"),
        ({"similarity": 1.5}, "similarity"),
        ({"sparse": "combined"}, "the strategy of the other heads must be another one"),
        ({"sparse_options": {"tau": 7}}, "strategy 'gilbert-block': tau"),
        ({"bounds": (2.0, 3.0)}, "bounds"),
        ({"ancors": 1}, "unknown parameter 'ancors', did you mean 'anchors'"),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        CombinedStrategy(**wrong)
