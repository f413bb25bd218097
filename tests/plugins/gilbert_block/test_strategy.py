import pytest
import torch

from core import (
    AttentionContext,
    BlockSparseMask,
    LevelMask,
    ParameterError,
    TokenLayout,
    available_strategies,
    create_strategy,
)
from core.registry import installed
from core.testing import StrategyConformance, dense_fp64, random_qkv
from plugins.gilbert_block import reference
from plugins.gilbert_block.presets import PRESETS
from plugins.gilbert_block.strategy import GilbertBlockParameters, GilbertBlockStrategy

LAYOUT = TokenLayout(20, 5, 9, 14)
TEXT_LAST = TokenLayout(70, 5, 11, 17, text_first=False)
DEMO = TokenLayout(16, 17, 12, 20)
SMALL = {"block_size": 64, "samples": 8}
LEVELS = {"rank": {"selection": "rank"}, "mass": {"selection": "mass", "bounds": (0.2, 0.3, 0.4, 0.5)}}


class TestBlockConformance(StrategyConformance):
    strategy = GilbertBlockStrategy
    parameters = {**SMALL, "tau": 0.5}
    full_density = {"tau": 1.0}


class TestAdaptiveTopkConformance(StrategyConformance):
    strategy = GilbertBlockStrategy
    parameters = {**SMALL, "selection": "adaptive-topk", "keep_ratio": 0.3, "importance": "sum"}
    full_density = {"keep_ratio": 1.0}


class TestTopkConformance(StrategyConformance):
    strategy = GilbertBlockStrategy
    parameters = {**SMALL, "selection": "topk", "projection": "pca", "refresh_every": 3, "order": "model"}
    full_density = {"keep_ratio": 1.0}


class TestRankConformance(StrategyConformance):
    strategy = GilbertBlockStrategy
    parameters = {**SMALL, "selection": "rank", "remainder": True}
    full_density = {"bounds": (1.0, 1.0, 1.0, 1.0)}
    keeps_tokens = False


class TestMassConformance(StrategyConformance):
    strategy = GilbertBlockStrategy
    parameters = {**SMALL, "selection": "mass", "similarity_thresholds": (0.1, 0.1, 0.1)}
    full_density = {"bounds": (1.0, 1.0, 1.0, 1.0)}
    keeps_tokens = False


def test_registered_through_the_entry_point():
    rows = {row.name: row for row in available_strategies()}
    assert rows["gilbert-block"].available and rows["gilbert-block"].summary.startswith("Adaptive blocks")
    strategy = create_strategy("gilbert-block", tau="0.9", samples="16", max_ratio=[0.9, 0.5])
    assert strategy.parameters.tau == (0.9, 0.9) and strategy.parameters.samples == 16
    assert strategy.parameters.max_ratio == (0.9, 0.5)


@pytest.mark.parametrize(
    "options",
    [
        {"tau": 0.4},
        {"tau": 0.4, "remainder": True},
        {"selection": "topk", "keep_ratio": 0.3, "order": "model"},
        *LEVELS.values(),
        {"selection": "rank", "bounds": (0.1, 0.1, 0.3, 0.8), "key_block_size": 128, "block_size": 128},
    ],
    ids=str,
)
@pytest.mark.parametrize("layout", [LAYOUT, TEXT_LAST], ids=TokenLayout.describe)
def test_output_is_attention_over_the_pattern(layout, options):
    query, key, value = random_qkv(layout)
    strategy = GilbertBlockStrategy(**(SMALL | options))
    context = AttentionContext(layout)
    output = strategy(query, key, value, context)
    pattern = strategy.pattern(query, key, context)
    by_level = isinstance(pattern.mask, LevelMask)
    levels = pattern.mask.to_levels() if by_level else pattern.mask.to_blocks().to(torch.int8)
    order = torch.arange(layout.sequence_length) if pattern.order is None else pattern.order
    expected = torch.empty_like(query, dtype=torch.float64)
    for head in range(2):
        moved = (part[0, head, order] for part in (query, key, value))
        found = reference.attention(*moved, levels[0, head], pattern.mask.block_size)
        expected[0, head, order] = found
    assert (output - expected).abs().max() < 5e-6
    assert (output - dense_fp64(query, key, value)).abs().max() > 1e-3
    assert strategy.report().density == pytest.approx(float(pattern.density)) and pattern.density < 0.9


@pytest.mark.parametrize("options", [{"tau": 0.1}, {**LEVELS["rank"]}, {**LEVELS["mass"]}], ids=str)
@pytest.mark.parametrize("layout", [LAYOUT, TEXT_LAST], ids=TokenLayout.describe)
def test_text_is_never_dropped(layout, options):
    query, key, value = random_qkv(layout)
    strategy = GilbertBlockStrategy(**(SMALL | options))
    context = AttentionContext(layout)
    output = strategy(query, key, value, context)
    text = layout.text_slice
    assert (output - dense_fp64(query, key, value))[:, :, text].abs().max() < 5e-6
    pattern = strategy.pattern(query, key, context)
    mask = pattern.mask
    levels = mask.to_levels() if isinstance(mask, LevelMask) else mask.to_blocks()
    # The first block with text is shared with the last video tokens.
    first = layout.video_length // 64
    assert (levels[..., first:] == 1).all() and (levels.diagonal(dim1=-2, dim2=-1) == 1).all()
    assert pattern.density < 0.6


def test_constant_values_stay_constant():
    query, key, _ = random_qkv(LAYOUT)
    ones = torch.ones_like(query)
    for options in (*LEVELS.values(), {"tau": 0.3, "remainder": True}):
        output = GilbertBlockStrategy(**(SMALL | options))(query, key, ones, AttentionContext(LAYOUT))
        assert (output - 1).abs().max() < 1e-6


def test_remainder_sees_what_would_be_left_out():
    query, key, _ = random_qkv(LAYOUT)
    plain, whole = (
        GilbertBlockStrategy(**SMALL, tau=0.4, remainder=flag).pattern(query, key, AttentionContext(LAYOUT))
        for flag in (False, True)
    )
    assert isinstance(plain.mask, BlockSparseMask) and isinstance(whole.mask, LevelMask)
    levels = whole.mask.to_levels()
    assert torch.equal(levels == 1, plain.mask.to_blocks()) and (levels[levels != 1] == 8).all()
    assert whole.density == pytest.approx(float(plain.density + (1 - plain.density) / 8), abs=5e-3)


def test_pooled_blocks_are_exact_where_neighbours_are_equal():
    """Runs of eight equal keys and values lose nothing, so the remainder makes the output dense."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 1, 2, 64, 64, generator=generator).repeat_interleave(8, 3)
    layout = TokenLayout(0, 1, 1, 512)
    strategy = GilbertBlockStrategy(**SMALL, tau=0.2, remainder=True)
    output = strategy(*tokens, AttentionContext(layout))
    assert (output - dense_fp64(*tokens)).abs().max() < 5e-6
    assert strategy.report().density < 0.5


def test_similarity_keeps_blocks_from_being_pooled():
    query, key, _ = random_qkv(LAYOUT)
    options = SMALL | {"selection": "rank", "bounds": (0.1, 0.2, 0.4, 1.0)}
    free = GilbertBlockStrategy(**options)
    capped = GilbertBlockStrategy(**options, similarity_thresholds=(0.9, 0.9, 0.9))
    context = AttentionContext(LAYOUT)
    assert (free.pattern(query, key, context).mask.to_levels() == 8).any()
    assert (capped.pattern(query, key, context).mask.to_levels() == 1).all()


@pytest.mark.parametrize("refresh_every, drawn", [(1, 12), (2, 6), (100, 2)])
def test_selections_are_kept_per_layer_and_dropped_with_the_video(refresh_every, drawn, monkeypatch):
    from plugins.gilbert_block import strategy as module

    calls = []
    original = module.block_importance
    monkeypatch.setattr(module, "block_importance", lambda *a, **o: calls.append(1) or original(*a, **o))
    tensors = random_qkv(LAYOUT)
    strategy = GilbertBlockStrategy(**SMALL, refresh_every=refresh_every)
    for video in (1, 2):
        strategy.start_video()
        for step in range(6):
            for layer in range(2):
                strategy(*tensors, AttentionContext(LAYOUT, layer, 2, step, 6))
        assert len(calls) == drawn * video


def test_the_halves_of_guidance_have_selections_of_their_own():
    """Step 1 of a half goes on with the blocks of its own step 0, whatever the other half chose."""
    strategy = GilbertBlockStrategy(**SMALL, tau=0.4, refresh_every=9)
    masks = {}
    for step, branch in ((0, "cond"), (1, "uncond"), (1, "cond")):
        query, key, _ = random_qkv(LAYOUT)
        pattern = strategy.pattern(query, key, AttentionContext(LAYOUT, step_index=step, branch=branch))
        masks[step, branch] = pattern.mask.to_blocks()
    assert torch.equal(masks[0, "cond"], masks[1, "cond"])
    assert not torch.equal(masks[0, "cond"], masks[1, "uncond"])


def test_density_falls_along_the_schedule():
    query, key, _ = random_qkv(DEMO, heads=1)
    strategy = GilbertBlockStrategy(**SMALL, selection="topk", keep_ratio=(0.6, 0.1))
    densities = [
        float(strategy.pattern(query, key, AttentionContext(DEMO, step_index=step, num_steps=10)).density)
        for step in range(10)
    ]
    assert densities == sorted(densities, reverse=True)
    assert densities[0] > 0.55 and densities[-1] < 0.2
    unknown = strategy.pattern(query, key, AttentionContext(DEMO, step_index=9)).density
    assert unknown == densities[0]


def test_blocks_along_the_curve_hold_more_of_a_local_attention():
    """Queries look at neighbours in space and time: at equal density, the curve keeps more of it."""
    layout = TokenLayout(0, 8, 16, 16)
    z, y, x = torch.meshgrid(*(torch.arange(side) for side in (8, 16, 16)), indexing="ij")
    places = torch.stack([x, y, z], -1).view(-1, 3).float()
    # Cosines of random waves: the product of two places falls with their distance.
    waves = torch.randn(3, 32, generator=torch.Generator().manual_seed(0)) / 6
    tokens = torch.cat([(places @ waves).cos(), (places @ waves).sin()], -1)[None, None] * 1.5
    weights = (tokens[0, 0] @ tokens[0, 0].T / 8).softmax(-1)
    held = {}
    for order in ("model", "gilbert"):
        strategy = GilbertBlockStrategy(**SMALL, selection="topk", keep_ratio=0.15, order=order)
        pattern = strategy.pattern(tokens, tokens, AttentionContext(layout))
        places_of = torch.arange(2048) if pattern.order is None else pattern.order
        held[order] = float((weights[places_of][:, places_of] * pattern.mask.to_dense()[0, 0]).sum() / 2048)
    assert held["gilbert"] > held["model"] + 0.1, held


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_registered_and_run(preset):
    assert installed().preset("gilbert-block", preset.name) == preset
    query, key, _ = random_qkv(DEMO, heads=1)
    strategy = create_strategy("gilbert-block", preset=preset.name)
    context = AttentionContext(DEMO, step_index=49, num_steps=50)
    assert 0.05 < float(strategy.pattern(query, key, context).density) < 0.95


@pytest.mark.parametrize(
    "chosen, unread, reader, default",
    [
        ({}, {"keep_ratio": 0.1}, "selection 'topk' or 'adaptive-topk', not by 'energy'", "0.2"),
        ({"selection": "topk"}, {"tau": 0.9}, "selection 'energy', not by 'topk'", "0.95"),
        ({"selection": "adaptive-topk"}, {"max_ratio": 0.5}, "not by 'adaptive-topk'", "1.0"),
        ({"selection": "rank"}, {"min_ratio": 0.1}, "'energy' or 'mass', not by 'rank'", "0.05"),
        ({"selection": "rank"}, {"keep_ratio": 0.1}, "not by 'rank'", "0.2"),
        ({"selection": "mass"}, {"max_ratio": 0.5}, "selection 'energy', not by 'mass'", "1.0"),
        ({"selection": "topk"}, {"similarity_thresholds": (0, 0, 0)}, "'rank' or 'mass'", "None"),
        ({"importance": "mean"}, {"samples": 8}, "importance 'sum' or 'max', not by 'mean'", "32"),
        ({"importance": "mean"}, {"seed": 3}, "importance 'sum' or 'max', not by 'mean'", "0"),
        ({}, {"directions": 32}, "projection 'optimal' or 'pca' or", "16"),
    ],
    ids=str,
)
def test_parameters_that_nothing_would_read_are_refused(chosen, unread, reader, default):
    (name,) = unread
    message = f"{name} is read by .*{reader}.* default \\(?{default}"
    with pytest.raises(ParameterError, match=message):
        GilbertBlockStrategy(**chosen, **unread)
    fields = GilbertBlockParameters.model_fields
    GilbertBlockStrategy(**chosen, **{name: fields[name].default})


def test_a_preset_can_be_given_another_selection():
    with pytest.raises(ParameterError, match=r"max_ratio is read .*min_ratio is read .*tau is read"):
        create_strategy("gilbert-block", preset="cogvideox-2b", selection="topk")
    back = {"tau": 0.95, "min_ratio": 0.05, "max_ratio": 1.0}
    strategy = create_strategy("gilbert-block", preset="cogvideox-2b", selection="topk", **back)
    assert strategy.parameters.selection == "topk" and strategy.parameters.samples == 8


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"tau": 0}, "tau.0"),
        ({"tau": (0.9, 1.5)}, "tau.1"),
        ({"min_ratio": 0.5, "max_ratio": 0.3}, "must not exceed max_ratio"),
        ({"selection": "top"}, "selection: Input should be 'energy', 'topk'"),
        ({"samples": 12}, "samples"),
        ({"samples": 128, "block_size": 64}, "samples must be at most block_size 64"),
        ({"bounds": (0.1, 0.2, 0.3, 0.4)}, r"'rank' or 'mass', not by 'energy'.*default None \(null"),
        ({"remainder": True, **LEVELS["rank"], "similarity_thresholds": (0, 0, 0)}, "remainder pools blocks"),
        ({"selection": "rank", "bounds": (0.3, 0.2, 0.3, 0.4)}, "bounds must not decrease"),
        ({"selection": "rank", "bounds": (0.1, 0.2)}, "bounds"),
        ({"remainder": True, "backend": "gluon"}, "backend 'gluon' has no pooled keys"),
        ({"key_block_size": 32}, "key_block_size"),
        ({"ta": 0.9}, "unknown parameter 'ta', did you mean 'tau'"),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        GilbertBlockStrategy(**wrong)
