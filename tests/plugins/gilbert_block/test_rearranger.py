import pytest
import torch

from core import LayoutError, ParameterError, TokenLayout
from core.testing import dense_fp64
from kernels_common.gilbert import block_rms_radius, gilbert_curve
from plugins.gilbert_block.rearranger import GilbertRearranger, rearranged

SIDES = [(1, 1, 1), (2, 2, 2), (3, 5, 7), (8, 6, 4), (45, 30, 13), (85, 48, 11), (1, 1, 9)]


@pytest.mark.parametrize("text", [0, 7, 226])
@pytest.mark.parametrize("sides", SIDES, ids=str)
def test_round_trip_is_exact(sides, text):
    width, height, frames = sides
    for text_first in (True, False):
        layout = TokenLayout(text, frames, height, width, text_first)
        rearranger = GilbertRearranger(layout)
        tokens = torch.randn(1, 1, layout.sequence_length, 2)
        moved = rearranger.rearrange(tokens)
        assert torch.equal(rearranger.restore(moved), tokens)
        assert torch.equal(moved[:, :, layout.video_length :], tokens[:, :, layout.text_slice])
        assert torch.equal(rearranger.order.sort().values, torch.arange(layout.sequence_length))


def test_video_follows_the_curve():
    layout = TokenLayout(7, 4, 6, 8)
    frames, places = layout.token_frames(), layout.token_places()
    order = GilbertRearranger(layout).order[: layout.video_length]
    cells = torch.stack([places[order] % 8, places[order] // 8, frames[order]], -1)
    assert torch.equal(cells, gilbert_curve(8, 6, 4))
    assert block_rms_radius(cells, 64) < 2.4


def test_rearranged_layout_has_text_last():
    layout = TokenLayout(7, 4, 6, 8)
    assert GilbertRearranger(layout).rearranged_layout == TokenLayout(7, 4, 6, 8, text_first=False)
    assert rearranged(rearranged(layout)) == rearranged(layout)


def test_attention_does_not_depend_on_the_order():
    layout = TokenLayout(5, 3, 4, 7)
    rearranger = GilbertRearranger(layout)
    tensors = tuple(torch.randn(3, 2, 2, layout.sequence_length, 16).unbind(0))
    moved = dense_fp64(*rearranger.rearrange(tensors))
    assert (rearranger.restore(moved) - dense_fp64(*tensors)).abs().max() < 1e-12


def test_wrong_calls_are_refused():
    layout = TokenLayout(5, 3, 4, 7)
    rearranger = GilbertRearranger(layout)
    tokens = torch.zeros(1, 2, layout.sequence_length + 1, 16)
    for move in (rearranger.rearrange, rearranger.restore):
        for wrong in (tokens, tokens[:, :, :-2], (tokens[:, :, 1:], tokens)):
            given = r"the layout has 5 text \+ 3x4x7 video = 89 tokens, but (90|88) tokens were given"
            with pytest.raises(LayoutError, match=given):
                move(wrong)
        with pytest.raises(LayoutError, match="must be a tensor"):
            move([tokens[:, :, 1:]])
    with pytest.raises(LayoutError, match="layout must be a TokenLayout, got 89"):
        GilbertRearranger(89)
    with pytest.raises(ParameterError, match="device must be a torch.device or its name, got 0"):
        GilbertRearranger(layout, 0)
