import pytest
import torch

from core import AttentionContext, LayoutError, TokenLayout


@pytest.mark.parametrize("text_first", [True, False])
@pytest.mark.parametrize("text_length", [0, 5])
def test_token_tables_follow_the_definition(text_first, text_length):
    layout = TokenLayout(text_length, 3, 2, 4, text_first)
    frames, places = [-1] * text_length, [-1] * text_length
    grid = [(f, y * 4 + x) for f in range(3) for y in range(2) for x in range(4)]
    video_frames, video_places = [f for f, _ in grid], [p for _, p in grid]
    if text_first:
        expected = (frames + video_frames, places + video_places)
    else:
        expected = (video_frames + frames, video_places + places)
    assert layout.token_frames().tolist() == expected[0]
    assert layout.token_places().tolist() == expected[1]
    assert (layout.token_frames()[layout.text_slice] == -1).all()
    assert (layout.token_frames()[layout.video_slice] >= 0).all()
    assert layout.sequence_length == text_length + 24 == torch.numel(layout.token_frames())


def test_the_true_sizes():
    assert TokenLayout(226, 13, 30, 45).sequence_length == 17776
    assert TokenLayout(226, 11, 48, 85).sequence_length == 45106


@pytest.mark.parametrize("sizes", [(-1, 1, 1, 1), (0, 0, 1, 1), (0, 1, 1.5, 1)])
def test_impossible_sizes_are_refused(sizes):
    with pytest.raises(LayoutError, match="must be an integer"):
        TokenLayout(*sizes)


def test_context_at_layer_changes_nothing_else():
    context = AttentionContext(TokenLayout(0, 1, 2, 2), 0, 30, 7, 50, 860.0, "cond")
    moved = context.at_layer(3)
    assert moved.layer_index == 3 and context.layer_index == 0
    assert (moved.step_index, moved.timestep, moved.branch) == (7, 860.0, "cond")
    assert moved.describe() == "layer 3 of 30, step 7 of 50"
