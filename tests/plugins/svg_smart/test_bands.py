import pytest
import torch

from core import AttentionContext, TokenLayout
from core.notices import warn_once
from core.testing import random_qkv
from plugins.svg_smart.bands import TOLERANCE, band_patterns
from plugins.svg_smart.patterns import executed_blocks, frame_major_band, token_major
from plugins.svg_smart.strategy import SvgSmartStrategy

WAN = TokenLayout(0, 5, 16, 16)
SHORT = TokenLayout(0, 2, 17, 19)
TEXT_LAST = TokenLayout(9, 5, 16, 16, text_first=False)
COGVIDEOX = TokenLayout(226, 13, 30, 45)
GRIDS = (WAN, SHORT, TEXT_LAST, TokenLayout(12, 5, 16, 16))


@pytest.fixture(autouse=True)
def _unsaid():
    warn_once.cache_clear()


def reachable(layout, block, keep, sink):
    """Densities of all bands of whole blocks, spatial and temporal."""
    widths = [max(1, width) for width in range(0, layout.sequence_length + block, block)]
    bands = (
        [frame_major_band(layout, width, sink) for width in widths],
        [token_major(layout, 1 - width, width, sink) for width in widths],
    )
    return [
        [executed_blocks(layout, band, block_size=(block, block), keep=keep).density() for band in kind]
        for kind in bands
    ]


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("keep", ["fraction", "cover"])
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("layout", GRIDS, ids=TokenLayout.describe)
def test_the_density_is_the_one_asked_for_or_the_nearest(layout, block, keep, sink, caplog):
    reached = reachable(layout, block, keep, sink)
    for density in (0.02, 0.25, 0.3, 0.4, 0.5, 0.7, 0.9, 1.0):
        warn_once.cache_clear()
        caplog.clear()
        chosen = band_patterns(layout, density=density, sink=sink, block=block, keep=keep)
        off = [abs(one.density() - density) for one in chosen]
        for distance, all_of_kind in zip(off, reached, strict=True):
            nearest = min(abs(one - density) for one in all_of_kind)
            assert distance <= max(nearest + 1e-12, TOLERANCE * density)
        assert len(caplog.records) == (max(off) > TOLERANCE * density)
        for one in chosen if caplog.records else ():
            assert f"density {density:g} is out of reach for {layout.describe()}" in caplog.text
            assert f"{one.density():.3f}" in caplog.text


@pytest.mark.parametrize(
    "layout, block, density, executed",
    [
        (WAN, 128, 0.25, 0.28),
        (WAN, 128, 0.3, 0.28),
        (WAN, 128, 0.5, 0.44),
        (WAN, 64, 0.25, 0.235),
        (SHORT, 128, 0.25, 0.2),
        (SHORT, 128, 0.5, 0.518),
    ],
)
def test_the_report_shows_what_the_warning_names(layout, block, density, executed, caplog):
    strategy = SvgSmartStrategy(density=density, block_size=block)
    strategy(*random_qkv(layout), AttentionContext(layout))
    found = strategy.report().density
    assert found == pytest.approx(executed, abs=5e-4)
    assert len(caplog.records) == (abs(found - density) > TOLERANCE * density)
    assert not caplog.records or f"is {found:.3f}" in caplog.text


def test_classes_that_execute_different_shares_are_both_named(caplog):
    chosen = band_patterns(WAN, density=0.5, sink=True, block=128, keep="fraction")
    spatial, temporal = (f"{one.density():.3f}" for one in chosen)
    assert spatial != temporal
    assert f"{spatial} (spatial heads) and {temporal} (temporal)" in caplog.text


def test_published_shapes_are_not_warned_about(caplog):
    band_patterns(COGVIDEOX, density=0.25, sink=False, block=128, keep="fraction")
    assert not caplog.records


def test_density_out_of_reach_takes_the_narrowest_band_and_says_so_once(caplog):
    for _ in range(2):
        spatial, temporal = band_patterns(COGVIDEOX, density=0.05, sink=True, block=128, keep="fraction")
    for pattern, _, _ in (spatial, temporal):
        last = COGVIDEOX.sequence_length - 1
        assert int(pattern.first[last]) == last
    assert len(caplog.records) == 1


def test_a_single_frame_says_that_it_is_dense_and_names_no_band(caplog):
    layout = TokenLayout(7, 1, 10, 30)
    tensors = random_qkv(layout)
    for step in (0, 1):
        strategy = SvgSmartStrategy(density=0.3, dense_timesteps=1)
        strategy(*tensors, AttentionContext(layout, step_index=step))
        assert strategy.report().density == 1.0
    assert [record.getMessage() for record in caplog.records] == [
        f"svg-smart: a single frame has no two patterns, so {layout.describe()} run dense (density 1.000)"
    ]


def test_plans_of_the_published_shape_execute_the_published_blocks():
    plan = SvgSmartStrategy().plan(COGVIDEOX, 30, 64, torch.device("cpu"), torch.float32)
    assert float(plan.masks.density()) == pytest.approx(0.2362, abs=5e-5)
