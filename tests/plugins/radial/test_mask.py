import functools
import inspect
import itertools
import time

import pytest
import torch

from core import LayoutError, ParameterError, TokenLayout
from plugins.radial import mask as radial
from plugins.radial.mask import allowed_shares, pair_widths, radial_mask
from plugins.radial.reference import element_mask, kept_blocks
from plugins.radial.strategy import RadialParameters
from plugins.radial.widths import element_density

RULES = ("cogvideox", "official", "paper")
COGVIDEOX = TokenLayout(226, 13, 30, 45)
COGVIDEOX_15 = TokenLayout(226, 11, 48, 85)

# The table of densities: rule, decay, sink, block: allowed, cover, fraction 0.25, fraction 0.5.
TABLE = {
    COGVIDEOX: {
        ("paper", 1.0, False, 128): (0.612, 0.738, 0.665, 0.607),
        ("paper", 1.0, True, 128): (0.650, 0.766, 0.699, 0.644),
        ("official", 1.0, True, 128): (0.581, 0.715, 0.634, 0.583),
        ("official", 0.2, True, 128): (0.429, 0.571, 0.483, 0.429),
        ("official", 0.2, True, 64): (0.379, 0.448, 0.400, 0.379),
        ("cogvideox", 1.0, False, 128): (0.504, 0.667, 0.573, 0.505),
        ("cogvideox", 1.0, True, 128): (0.548, 0.700, 0.614, 0.547),
        ("cogvideox", 1.0, False, 64): (0.504, 0.586, 0.531, 0.505),
        ("cogvideox", 0.2, False, 128): (0.342, 0.507, 0.410, 0.342),
        ("cogvideox", 0.2, False, 64): (0.288, 0.371, 0.311, 0.288),
    },
    COGVIDEOX_15: {
        ("paper", 1.0, True, 128): (0.694, 0.733, 0.707, 0.694),
        ("official", 1.0, True, 128): (0.538, 0.580, 0.552, 0.540),
        ("official", 0.2, True, 128): (0.388, 0.431, 0.404, 0.388),
        ("cogvideox", 1.0, False, 128): (0.442, 0.496, 0.462, 0.444),
        ("cogvideox", 1.0, True, 128): (0.499, 0.549, 0.517, 0.501),
        ("cogvideox", 0.2, False, 128): (0.278, 0.332, 0.299, 0.279),
    },
}
# Density of the official code's own masks, emulated on the video tokens alone.
STRICT_TABLE = {
    (13, 30, 45): {
        ("official", True): {1.0: 0.601, 0.95: 0.589, 0.5: 0.483, 0.2: 0.445},
        ("official", False): {1.0: 0.558, 0.5: 0.432, 0.2: 0.392},
        ("cogvideox", False): {1.0: 0.523, 0.95: 0.510, 0.5: 0.396, 0.2: 0.356},
    },
    (11, 48, 85): {
        ("official", True): {1.0: 0.536, 0.2: 0.390},
        ("official", False): {1.0: 0.481, 0.2: 0.323},
        ("cogvideox", False): {1.0: 0.441, 0.95: 0.438, 0.5: 0.336, 0.2: 0.282},
    },
}


def label(value):
    return value.describe() if isinstance(value, TokenLayout) else str(value)


@functools.cache
def executed(layout, rule, decay_factor, sink, block, keep, threshold=0.5):
    mask = radial_mask(
        layout,
        block_size=(block, block),
        rule=rule,
        decay_factor=decay_factor,
        sink=sink,
        keep=keep,
        threshold=threshold,
    )
    return float(mask.density())


def within_a_percent(found, listed):
    # The table has three digits: half a unit of the last one is its own rounding.
    return abs(found - listed) <= 0.01 * listed + 0.0005


@pytest.mark.parametrize(
    "layout, row", [(layout, row) for layout, rows in TABLE.items() for row in rows], ids=label
)
def test_densities_of_the_table(layout, row):
    rule, decay_factor, sink, block = row
    pairs = pair_widths(layout, rule=rule, decay_factor=decay_factor, block=block, sink=sink)
    found = (
        element_density(pairs, layout.tokens_per_frame, layout.text_length),
        executed(layout, *row, "cover"),
        executed(layout, *row, "fraction", 0.25),
        executed(layout, *row, "fraction", 0.5),
    )
    listed = TABLE[layout][row]
    assert all(map(within_a_percent, found, listed)), f"{found} against {listed}"


@pytest.mark.parametrize("grid", STRICT_TABLE)
def test_strict_reproduces_the_official_densities(grid):
    video = TokenLayout(0, *grid)
    for (rule, sink), rows in STRICT_TABLE[grid].items():
        for decay_factor, listed in rows.items():
            found = executed(video, rule, decay_factor, sink, 128, "strict")
            assert within_a_percent(found, listed), f"{rule} {sink} {decay_factor}: {found} against {listed}"


@pytest.mark.parametrize("layout", [COGVIDEOX, COGVIDEOX_15], ids=label)
def test_large_layouts_build_in_seconds(layout):
    start = time.perf_counter()
    radial_mask(layout)
    assert time.perf_counter() - start < 4.0


def brute_force_shares(layout, pairs, block, rows):
    """Shares of a few rows of blocks, counted token by token."""
    frame, place = layout.token_frames(), layout.token_places()
    widths = torch.nn.functional.pad(pairs, (0, 1, 0, 1), value=layout.sequence_length)  # frame -1 is text
    shares = []
    for row in rows:
        part = slice(row * block, (row + 1) * block)
        allowed = (place[part, None] - place).abs() <= widths[frame[part]][:, frame]
        shares.append(torch.stack([part.double().mean() for part in allowed.split(block, dim=1)]))
    return torch.stack(shares)


@pytest.mark.parametrize("layout", [COGVIDEOX, TokenLayout(226, 11, 48, 85, text_first=False)], ids=label)
@pytest.mark.parametrize("rule", RULES)
def test_shares_of_large_layouts_equal_token_counts(layout, rule):
    pairs = pair_widths(layout, rule=rule, decay_factor=0.7, block=128, sink=True)
    shares = torch.cat([part for _, part in allowed_shares(layout, pairs, (128, 128))])
    rows = [0, 1, 12, 77, len(shares) - 2, len(shares) - 1]
    assert torch.allclose(shares[rows], brute_force_shares(layout, pairs, 128, rows), atol=1e-12, rtol=0)


def paper_allows(i, k, j, allowed_place, places, sink):
    """The paper's definition, one pair at a time."""
    distance, m = abs(i - j), 1
    while 2 * m <= max(distance, 1):
        m *= 2
    near = m <= places and abs(k - allowed_place) + 1 <= places / m
    far = m > places and distance % -(-m // places) == 0 and k == allowed_place
    return near or far or (sink and j == 0)


@pytest.mark.parametrize("frames, places", [(1, 4), (3, 5), (9, 3), (5, 8), (18, 2)])
@pytest.mark.parametrize("sink", [False, True])
def test_the_reference_is_the_papers_formula(frames, places, sink):
    layout = TokenLayout(2, frames, 1, places)
    mask = element_mask(layout, rule="paper", decay_factor=1.0, block=16, sink=sink)
    assert mask[:2].all() and mask[:, :2].all()
    for i, k, j, other in itertools.product(range(frames), range(places), range(frames), range(places)):
        expected = paper_allows(i, k, j, other, places, sink)
        assert bool(mask[2 + i * places + k, 2 + j * places + other]) == expected, (i, k, j, other)


@pytest.mark.parametrize("text", [0, 5, 226])
@pytest.mark.parametrize("frames", [1, 2, 3, 5, 13])
@pytest.mark.parametrize("places", [7, 16, 30])
@pytest.mark.parametrize("text_first", [True, False])
def test_shares_equal_the_counted_element_mask(text, frames, places, text_first):
    layout = TokenLayout(text, frames, 1, places, text_first)
    length = layout.sequence_length
    for rule, (rows, columns) in itertools.product(RULES, ((16, 16), (64, 64), (64, 16))):
        options = {"rule": rule, "decay_factor": 0.6, "block": 16, "sink": frames % 2 == 1}
        allowed = element_mask(layout, **options)
        padded = torch.zeros(-(-length // rows) * rows, -(-length // columns) * columns)
        inside = padded.clone()
        padded[:length, :length], inside[:length, :length] = allowed, 1.0
        shape = (len(padded) // rows, rows, -1, columns)
        expected = padded.view(shape).sum((1, 3)) / inside.view(shape).sum((1, 3))
        pairs = pair_widths(layout, **options)
        found = torch.cat([part for _, part in allowed_shares(layout, pairs, (rows, columns))])
        assert torch.allclose(found, expected.double(), atol=1e-6), f"{rule} {rows}x{columns}"
        assert element_density(pairs, places, text) == pytest.approx(
            allowed.double().mean().item(), abs=1e-12
        )


@pytest.mark.parametrize("keep", ["cover", "fraction", "strict"])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize(
    "layout",
    [
        TokenLayout(5, 3, 5, 6),
        TokenLayout(0, 13, 1, 7),
        TokenLayout(20, 5, 4, 4, text_first=False),
        TokenLayout(9, 6, 6, 9, text_first=False),
        TokenLayout(3, 1, 6, 9),
        TokenLayout(37, 4, 9, 11),
    ],
    ids=label,
)
def test_blocks_equal_the_reference(layout, rule, keep):
    for block_size, sink, decay_factor in (
        ((16, 16), True, 0.4),
        ((16, 32), False, 1.0),
        ((64, 16), True, 3.0),
    ):
        options = {"rule": rule, "decay_factor": decay_factor, "sink": sink}
        rounding = {"keep": keep, "threshold": 0.4}
        allowed = element_mask(layout, block=max(block_size), **options)
        expected = kept_blocks(allowed, layout, block_size, sink=sink, **rounding)
        mask = radial_mask(layout, block_size=block_size, **options, **rounding)
        mask.check()
        assert torch.equal(mask.to_blocks()[0, 0], expected), f"{block_size} {options}"


@pytest.mark.parametrize("keep", ["cover", "fraction", "strict"])
def test_strips_do_not_change_the_mask(monkeypatch, keep):
    layout = TokenLayout(16, 9, 12, 20)
    whole = radial_mask(layout, block_size=(64, 64), keep=keep).to_blocks()
    monkeypatch.setattr(radial, "PAIRS_PER_STRIP", 1)
    assert torch.equal(radial_mask(layout, block_size=(64, 64), keep=keep).to_blocks(), whole)


def test_strips_bound_the_pairs_at_once(monkeypatch):
    sizes = []

    def record(queries, keys, widths):
        sizes.append(widths.numel())
        return original(queries, keys, widths)

    original = radial._allowed_pairs
    monkeypatch.setattr(radial, "_allowed_pairs", record)
    radial_mask(TokenLayout(226, 30, 48, 80))
    assert len(sizes) > 2 and max(sizes) <= 1.1 * radial.PAIRS_PER_STRIP


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("sink", [False, True])
def test_properties_of_the_block_mask(rule, sink):
    layout = TokenLayout(16, 17, 12, 20)
    masks = {}
    for keep in ("cover", "fraction", "strict"):
        options = {"rule": rule, "sink": sink, "keep": keep, "block_size": (64, 64)}
        masks[keep] = radial_mask(layout, **options).to_blocks()[0, 0]
        densities = [
            float(radial_mask(layout, decay_factor=g, **options).density()) for g in (0.2, 0.5, 1, 2, 8)
        ]
        assert densities == sorted(densities)
        assert masks[keep].diagonal().all() and masks[keep][0].all() and masks[keep][:, 0].all()
    allowed = element_mask(layout, rule=rule, decay_factor=1.0, block=64, sink=sink)
    covered = masks["cover"].repeat_interleave(64, 0).repeat_interleave(64, 1)
    assert not (allowed & ~covered).any()
    assert not (masks["strict"] & ~masks["cover"]).any()
    assert not (masks["fraction"] & ~masks["cover"]).any()
    if sink:
        assert masks["fraction"][:, : 256 // 64].all()
    else:
        assert torch.equal(allowed, allowed.T) and torch.equal(masks["cover"], masks["cover"].T)


@pytest.mark.parametrize("keep", ["cover", "fraction"])
@pytest.mark.parametrize("rule", RULES)
def test_large_decay_factor_keeps_every_block(rule, keep):
    for layout in (TokenLayout(16, 17, 12, 20), TokenLayout(5, 40, 1, 7), TokenLayout(3, 13, 1, 1)):
        mask = radial_mask(
            layout, rule=rule, keep=keep, sink=False, threshold=1.0, decay_factor=2.0 * layout.frames
        )
        assert float(mask.density()) == 1.0


def test_text_last_mirrors_text_first_where_blocks_align():
    # 64 text tokens are one block, so the video blocks are the same ones, moved by one.
    first = radial_mask(TokenLayout(64, 7, 10, 16), block_size=(64, 64)).to_blocks()[0, 0]
    last = radial_mask(TokenLayout(64, 7, 10, 16, text_first=False), block_size=(64, 64)).to_blocks()[0, 0]
    assert torch.equal(first[1:18, 1:18], last[:17, :17])
    assert last[-1].all() and last[:, -1].all()


def test_defaults_are_those_of_the_strategy():
    fields = RadialParameters.model_fields
    for name, parameter in inspect.signature(radial_mask).parameters.items():
        if name in fields:
            default = fields[name].default
            assert parameter.default == ((default, default) if name == "block_size" else default)


@pytest.mark.parametrize("wrong", [{"keep": "all"}, {"threshold": 0.0}, {"threshold": 1.5}, {"rule": "wan"}])
def test_wrong_options_raise(wrong):
    with pytest.raises(ParameterError):
        radial_mask(TokenLayout(0, 2, 3, 3), **wrong)


def test_visible_frames_of_another_size_raise():
    with pytest.raises(LayoutError, match=r"visible must be \[2, 2\]"):
        radial_mask(TokenLayout(0, 2, 3, 3), visible=torch.ones(3, 3, dtype=torch.bool))
