"""The semantic form: what it keeps, and what it goes on from."""

import pytest
import torch

from core import AttentionContext, TokenLayout
from core.testing import dense_fp64, random_qkv
from harness.recall import true_mass
from harness.structured_inputs import structured_query_key
from kernels_common import gather_tokens
from plugins.svg_smart import semantic as module
from plugins.svg_smart import strategy as strategy_module
from plugins.svg_smart.patterns import forced_blocks
from plugins.svg_smart.semantic import Centroids, ClusterOptions, semantic_pattern
from plugins.svg_smart.strategy import SvgSmartStrategy

LAYOUT = TokenLayout(16, 6, 8, 20)
LAYOUT_TEXT_LAST = TokenLayout(5, 6, 9, 19, text_first=False)
OPTIONS = ClusterOptions(4, 8, mass=0.5, least_share=0.1, first_iterations=3, iterations=1, seed=0)
BLOCK = (64, 64)


def make_pattern(query, key, layout, previous=None, **changes):
    forced = forced_blocks(layout, BLOCK, diagonal=False)
    context = AttentionContext(layout, step_index=4)
    return semantic_pattern(query, key, context, OPTIONS._replace(**changes), BLOCK, forced, previous)


@pytest.mark.parametrize("layout", [LAYOUT, LAYOUT_TEXT_LAST], ids=TokenLayout.describe)
def test_text_stays_sees_all_and_is_seen(layout):
    query, key, _ = random_qkv(layout, batch=2, heads=3)
    pattern, _ = make_pattern(query, key, layout, mass=0.1)
    every = torch.arange(layout.sequence_length)
    for order in (pattern.order, pattern.key_order):
        assert order.shape == (2, 3, layout.sequence_length)
        assert torch.equal(order.sort(-1).values, every.expand_as(order))
        assert (order[..., layout.text_slice] == every[layout.text_slice]).all()
    pairs = pattern.mask.to_dense()
    assert pairs[:, :, layout.text_slice].all() and pairs[..., layout.text_slice].all()
    assert not pairs.all()


def test_content_in_few_blocks_is_found():
    """Tokens in clusters that attend to themselves: a fraction of the blocks holds all of the attention."""
    generator = torch.Generator().manual_seed(0)
    group = torch.randint(0, 8, (LAYOUT.sequence_length,), generator=generator)
    codes = torch.linalg.qr(torch.randn(64, 64, generator=generator))[0][:8] * 12
    noise = [0.1 * torch.randn(1, 2, LAYOUT.sequence_length, 64, generator=generator) for _ in range(3)]
    query, key = codes[group] + noise[0], codes[group] + noise[1]
    value = torch.randn(1, 2, LAYOUT.sequence_length, 64, generator=generator)
    strategy = SvgSmartStrategy(
        variant="semantic", block_size=64, query_clusters=16, key_clusters=16, mass=0.99, least_share=0.0
    )
    output = strategy(query, key, value, AttentionContext(LAYOUT))
    exact = dense_fp64(query, key, value)
    assert strategy.report().density < 0.5
    assert (output - exact).norm() < 0.05 * exact.norm()


def test_little_is_executed_and_much_is_held():
    """On attention of places in a video, at the grid of the demo model."""
    layout = TokenLayout(16, 17, 12, 20)
    query, key = structured_query_key(layout, 1, 4, 64, torch.Generator().manual_seed(0))
    numbers = {"query_clusters": 100, "key_clusters": 500, "mass": 0.8, "first_iterations": 5}
    pattern, _ = make_pattern(query, key, layout, **numbers)
    mass = true_mass(gather_tokens(query, pattern.order), gather_tokens(key, pattern.key_order), BLOCK)
    held = (mass * pattern.mask.to_blocks()).sum(-1).mean()
    assert pattern.density < 0.35 and held > 0.85


def test_more_mass_and_a_larger_least_share_keep_more():
    query, key, _ = random_qkv(LAYOUT)
    densities = [
        float(make_pattern(query, key, LAYOUT, mass=mass, least_share=least)[0].density)
        for mass, least in ((0.1, 0.0), (0.1, 0.4), (0.6, 0.4), (0.6, 0.9), (1.0, 0.0))
    ]
    assert densities == sorted(set(densities)) and densities[-1] == 1.0


def test_the_first_call_starts_from_its_own_tokens_and_later_ones_from_their_centroids(monkeypatch):
    starts = []
    original = module.k_means
    monkeypatch.setattr(
        module,
        "k_means",
        lambda points, start, count: starts.append((points, start, count)) or original(points, start, count),
    )
    query, key, _ = random_qkv(LAYOUT)
    _, found = make_pattern(query, key, LAYOUT)
    for points, start, count in starts:
        assert count == OPTIONS.first_iterations
        assert (start[:, :, None] == points[:, None]).all(-1).any(-1).all()
    starts.clear()
    make_pattern(query, key, LAYOUT, found)
    assert [count for *_, count in starts] == [OPTIONS.iterations] * 2
    video = [part[:, :, LAYOUT.video_slice].flatten(0, 1) for part in (query, key)]
    for (points, start, _), part, before in zip(starts, video, found[1:], strict=True):
        assert torch.equal(points, part) and torch.equal(start, before)


def test_centroids_are_kept_per_place_shape_and_layout_and_go_forwards(monkeypatch):
    given, kept = [], []
    original = strategy_module.semantic_pattern

    def record(*arguments):
        given.append(arguments[-1])
        pattern, centroids = original(*arguments)
        kept.append(centroids)
        return pattern, centroids

    monkeypatch.setattr(strategy_module, "semantic_pattern", record)
    strategy = SvgSmartStrategy(variant="semantic", block_size=64, query_clusters=4, key_clusters=4)
    turned = TokenLayout(16, 6, 20, 8)  # as many tokens
    places = [
        (LAYOUT, 1, {"layer_index": 0}),
        (LAYOUT, 1, {"layer_index": 1}),
        (LAYOUT, 1, {"branch": "cond"}),
        (LAYOUT, 1, {"branch": "uncond"}),
        (LAYOUT, 1, {"branch": "uncond", "call_in_step": 1}),
        (LAYOUT, 2, {}),
        (turned, 1, {}),
    ]
    for _ in range(2):
        strategy.start_video()
        given.clear()
        kept.clear()
        for step in (2, 3):
            for layout, batch, place in places:
                tensors = random_qkv(layout, batch=batch)
                strategy(*tensors, AttentionContext(layout, step_index=step, **place))
        count = len(places)
        assert given[:count] == [None] * count
        assert all(one is before for one, before in zip(given[count:], kept[:count], strict=True))
        assert all(isinstance(one, Centroids) and one.step == 3 for one in kept[count:])
    given.clear()
    for step in (1, 1, 2):  # back, again, on
        strategy(*random_qkv(LAYOUT), AttentionContext(LAYOUT, step_index=step))
    assert [previous is None for previous in given] == [True, True, False]


def test_patterns_of_frames_are_not_planned(monkeypatch):
    for name in ("band_patterns", "frame_patterns", "head_patterns"):
        monkeypatch.setattr(strategy_module, name, None)
    strategy = SvgSmartStrategy(variant="semantic", block_size=64, query_clusters=4, key_clusters=4)
    strategy(*random_qkv(LAYOUT), AttentionContext(LAYOUT))
