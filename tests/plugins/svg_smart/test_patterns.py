import pytest
import torch

from core import BlockSparseMask, TokenLayout
from core.block_mask import block_lengths
from plugins.svg_smart.bands import band_patterns
from plugins.svg_smart.patterns import allowed_shares, executed_blocks, frame_patterns, head_patterns
from plugins.svg_smart.reference import band_pairs, frame_pairs, window_pairs

COGVIDEOX = TokenLayout(226, 13, 30, 45)
COGVIDEOX_1_5 = TokenLayout(226, 11, 48, 85)
SMALL = [
    TokenLayout(5, 3, 3, 5),
    TokenLayout(0, 5, 3, 3),
    TokenLayout(7, 4, 2, 5, text_first=False),
    TokenLayout(2, 2, 1, 7),
]


def in_model_order(pattern):
    allowed = torch.empty(len(pattern.order), len(pattern.order), dtype=torch.bool)
    allowed[pattern.order[:, None], pattern.order] = pattern.allowed()
    return allowed


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("layout", SMALL, ids=TokenLayout.describe)
def test_band_pairs_are_the_definition(layout, sink):
    patterns = band_patterns(layout, density=0.9, sink=sink, block=2, keep="fraction")
    for temporal, (pattern, _, _) in enumerate(patterns):
        video = pattern.order[layout.video_slice][-1]
        place = int((pattern.order == video).nonzero())
        width = place - int(pattern.first[place]) + 1
        assert width % 2 == 0
        expected = band_pairs(layout, width, temporal=bool(temporal), sink=sink)
        assert torch.equal(in_model_order(pattern), expected)
        assert pattern.pairs() == int(expected.sum())


@pytest.mark.parametrize("diagonal", [0, 1, 2])
@pytest.mark.parametrize("layout", SMALL, ids=TokenLayout.describe)
def test_frame_pairs_are_the_definition(layout, diagonal):
    spatial, temporal = frame_patterns(layout, diagonal=diagonal)
    assert torch.equal(in_model_order(spatial), frame_pairs(layout, diagonal))
    widths = range(2 * layout.video_length + 2)
    width = next(w for w in widths if int(window_pairs(layout, w).sum()) >= spatial.pairs())
    assert torch.equal(in_model_order(temporal), window_pairs(layout, width))


@pytest.mark.parametrize("layout", SMALL, ids=TokenLayout.describe)
def test_token_major_order(layout):
    pattern = band_patterns(layout, density=1.0, sink=False, block=2, keep="fraction")[1].pattern
    for frame in range(layout.frames):
        for place in range(layout.tokens_per_frame):
            token = layout.video_start + frame * layout.tokens_per_frame + place
            assert pattern.order[layout.video_start + place * layout.frames + frame] == token
    text = layout.text_slice
    assert torch.equal(pattern.order[text], torch.arange(layout.sequence_length)[text])
    assert torch.equal(pattern.order.sort().values, torch.arange(layout.sequence_length))


@pytest.mark.parametrize(
    "layout, half_width, density",
    [(COGVIDEOX, 2048, 0.2394), (COGVIDEOX_1_5, 5760, 0.2478)],
    ids=["13x1350", "11x4080"],
)
def test_band_of_the_published_density(layout, half_width, density):
    rounded = band_patterns(layout, density=0.25, sink=False, block=128, keep="fraction")
    spatial, temporal = (one.pattern for one in rounded)
    last = layout.sequence_length - 1
    for pattern in (spatial, temporal):
        assert last - int(pattern.first[last]) + 1 == half_width
        assert pattern.density() == pytest.approx(density, abs=5e-5)
    video, text = layout.video_length, layout.text_length
    band = video * (2 * half_width - 1) - half_width * (half_width - 1)
    assert spatial.pairs() == band + 2 * text * layout.sequence_length - text**2
    check_executed(rounded, density)


@pytest.mark.parametrize(
    "layout, frame_pairs, density",
    [(COGVIDEOX, 48, 0.302), (COGVIDEOX_1_5, 40, 0.337)],
    ids=["13x1350", "11x4080"],
)
def test_density_of_neighbouring_frames(layout, frame_pairs, density):
    patterns = frame_patterns(layout, diagonal=1)
    exact = layout.sequence_length**2 - (layout.frames**2 - frame_pairs) * layout.tokens_per_frame**2
    assert patterns[0].pairs() == exact
    assert patterns[0].density() == pytest.approx(density, abs=5e-4)
    assert patterns[1].density() == pytest.approx(patterns[0].density(), rel=1e-3)
    check_executed(to_blocks(layout, patterns, (128, 128), "fraction"), density)


def to_blocks(layout, patterns, block, keep):
    return [executed_blocks(layout, pattern, block_size=block, keep=keep) for pattern in patterns]


def check_executed(rounded, density):
    """Whole blocks of 128 execute as much as the formula allows, within 1.5 %."""
    masks = head_patterns(rounded).masks
    for one, blocks in zip(rounded, masks.to_blocks()[0], strict=True):
        mask = BlockSparseMask.from_blocks(blocks, (128, 128), masks.query_length, masks.key_length)
        assert one.density() == pytest.approx(float(mask.density()), abs=1e-12)
        assert one.density() == pytest.approx(density, rel=0.015)


@pytest.mark.parametrize("block", [(4, 8), (8, 4), (16, 16)], ids=str)
@pytest.mark.parametrize("layout", SMALL, ids=TokenLayout.describe)
def test_shares_and_blocks_are_counted(layout, block):
    patterns = frame_patterns(layout, diagonal=0)
    length = layout.sequence_length
    rows, columns = (block_lengths(length, size) for size in block)
    for pattern in patterns:
        allowed = pattern.allowed()
        counts = torch.stack(
            [
                torch.stack([cell.sum() for cell in strip.split(block[1], 1)])
                for strip in allowed.split(block[0])
            ]
        )
        shares = counts / (rows[:, None] * columns)
        assert torch.allclose(allowed_shares(pattern, block), shares.double())
    chosen = {keep: head_patterns(to_blocks(layout, patterns, block, keep)) for keep in ("cover", "fraction")}
    for index, pattern in enumerate(patterns):
        cover = chosen["cover"].masks.to_dense()[0, index]
        assert not (pattern.allowed() & ~cover).any()
        fraction = chosen["fraction"].masks.to_dense()[0, index]
        assert not (fraction & ~cover).any()
        text = layout.text_slice
        assert fraction[text].all() and fraction[:, text].all() and fraction.diagonal().all()
        cover_order = chosen["cover"].orders[index].long()
        assert torch.equal(cover_order[chosen["cover"].places[index].long()], torch.arange(length))
