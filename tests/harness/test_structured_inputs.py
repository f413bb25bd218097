"""Structured inputs: near places score high, and text stays random."""

import pytest
import torch

from core import TokenLayout
from harness.structured_inputs import NOISE, PEAK, structured_query_key


@pytest.mark.parametrize("text_first", [True, False])
def test_a_head_sees_its_neighbourhood(text_first):
    layout = TokenLayout(text_length=7, frames=5, height=8, width=9, text_first=text_first)
    generator = torch.Generator().manual_seed(3)
    query, key = structured_query_key(layout, 1, 2, 512, generator)
    assert query.shape == key.shape == (1, 2, 7 + 360, 512)
    scores = query @ key.mT / 512**0.5
    video = scores[..., layout.video_slice, layout.video_slice]
    same = video.diagonal(dim1=-2, dim2=-1).mean(-1)
    torch.testing.assert_close(same, torch.full_like(same, PEAK), rtol=0, atol=1.0)
    through_time = video[0, 1].view(5, 72, 5, 72)[0, :, 4].diagonal().mean()
    in_frame = video[0, 0].view(5, 72, 5, 72)[0, :, 4].diagonal().mean()
    assert through_time > 0.8 * PEAK and abs(in_frame) < 0.1 * PEAK
    text = scores[..., layout.text_slice, :]
    assert text.abs().mean() < PEAK * NOISE


def test_equal_generators_give_equal_inputs():
    layout = TokenLayout(text_length=3, frames=2, height=4, width=4)
    first, second = (
        structured_query_key(layout, 2, 5, 32, torch.Generator().manual_seed(1), torch.bfloat16)
        for _ in range(2)
    )
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])
    assert not torch.equal(first[0][0], first[0][1]) and first[0].dtype == torch.bfloat16
