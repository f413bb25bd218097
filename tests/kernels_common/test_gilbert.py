import pytest
import torch

from core import LayoutError, TokenLayout
from kernels_common.gilbert import block_rms_radius, gilbert_curve, gilbert_order, mean_step

GOLDEN = {
    (4, 2, 2): [0, 4, 12, 8, 9, 13, 5, 1, 2, 6, 14, 10, 11, 15, 7, 3],
    (4, 4, 1): [0, 1, 5, 4, 8, 12, 13, 9, 10, 14, 15, 11, 7, 6, 2, 3],
    (3, 3, 3): [
        0, 9, 10, 1, 4, 13, 12, 3, 6, 15, 7, 16, 25, 24, 21, 22, 18, 19, 20, 23, 26, 17, 8, 5, 14, 11, 2,
    ],
}  # fmt: skip
BEGINNINGS = {
    (3, 5, 7): ([0, 1, 16, 15, 30, 31, 45, 46, 47, 32, 17, 2], 90),
    (8, 6, 4): ([0, 1, 9, 8, 56, 57, 49, 48, 96, 104, 152, 144], 7),
    (45, 30, 13): ([0, 1350, 1351, 1, 46, 1396, 1395, 45, 90, 91, 136, 135], 44),
    (85, 48, 11): ([0, 85, 4165, 4080, 4081, 4166, 86, 1, 2, 4082, 4083, 3], 84),
}
SUMS = {(45, 30, 13): (1000, 2798, 14566), (85, 48, 11): (1000, 33245, 573039)}
SIDES = [(1, 1, 1), (2, 2, 2), (1, 1, 9), (9, 1, 1), (3, 5, 7), (5, 5, 5), (8, 6, 4), (2, 9, 5), (1, 6, 7)]


def linear(sides):
    x, y, z = gilbert_curve(*sides).unbind(-1)
    return x + sides[0] * (y + sides[1] * z)


def row_major(sides):
    z, y, x = torch.meshgrid(*(torch.arange(side) for side in reversed(sides)), indexing="ij")
    return torch.stack([x, y, z], -1).view(-1, 3)


def test_cells_of_the_smallest_cube():
    assert gilbert_curve(2, 2, 2).tolist() == [
        [0, 0, 0], [0, 1, 0], [0, 1, 1], [0, 0, 1], [1, 0, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0],
    ]  # fmt: skip


@pytest.mark.parametrize("sides", GOLDEN, ids=str)
def test_golden_orders(sides):
    assert linear(sides).tolist() == GOLDEN[sides]


@pytest.mark.parametrize("sides", BEGINNINGS, ids=str)
def test_golden_beginnings_and_ends(sides):
    order = linear(sides)
    beginning, last = BEGINNINGS[sides]
    assert order[: len(beginning)].tolist() == beginning and order[-1] == last
    if sides in SUMS:
        place, cell, checksum = SUMS[sides]
        assert order[place] == cell
        assert int((torch.arange(len(order)) * order).sum()) % 1000003 == checksum


@pytest.mark.parametrize("sides", [*SIDES, (45, 30, 13)], ids=str)
def test_every_cell_once_from_the_origin_to_the_end_of_the_longest_side(sides):
    order = gilbert_curve(*sides)
    assert torch.equal(linear(sides).sort().values, torch.arange(len(order)))
    assert order[0].tolist() == [0, 0, 0]
    ends = [[side - 1 if axis == at else 0 for axis, side in enumerate(sides)] for at in range(3)]
    assert order[-1].tolist() in [end for end in ends if max(end) == max(sides) - 1]


@pytest.mark.parametrize("sides", [(16, 16, 16), (8, 6, 4), (44, 30, 14), (46, 30, 14)], ids=str)
def test_even_boxes_are_walked_in_unit_steps(sides):
    assert mean_step(gilbert_curve(*sides)) == (1.0, 1.0)


@pytest.mark.parametrize(
    "sides, gains, steps",
    [((45, 30, 13), (5.5, 4.5), (1.0037, 0.9914)), ((85, 48, 11), (10.0, 8.0), (1.0046, 0.9912))],
    ids=str,
)
def test_blocks_of_real_grids_are_compact(sides, gains, steps):
    curve, rows = gilbert_curve(*sides), row_major(sides)
    for block, gain in zip((64, 128), gains, strict=True):
        assert block_rms_radius(rows, block) / block_rms_radius(curve, block) >= gain
    assert block_rms_radius(curve, 128) < 3.1
    assert mean_step(curve) == pytest.approx(steps, abs=5e-5)


def test_radius_of_a_line():
    cells = torch.tensor([[0, 0, 0], [2, 0, 0], [5, 5, 5]])
    assert block_rms_radius(cells, 2) == pytest.approx((2 / 3) ** 0.5)


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text", [0, 7])
def test_token_order_keeps_text_and_follows_the_curve(text, text_first):
    layout = TokenLayout(text, 4, 6, 8, text_first)
    order = gilbert_order(layout)
    assert torch.equal(order.sort().values, torch.arange(layout.sequence_length))
    assert torch.equal(order[layout.text_slice], torch.arange(layout.sequence_length)[layout.text_slice])
    assert torch.equal(order[layout.video_slice] - layout.video_start, linear((8, 6, 4)))


def test_sides_are_checked():
    with pytest.raises(LayoutError, match=r"integers >= 1, got \(3, 0, 2\)"):
        gilbert_curve(3, 0, 2)
