import pytest
import torch

from core import TokenLayout
from plugins.combined import frame_tables as module
from plugins.combined import reference
from plugins.combined.frame_tables import draw_places, frame_tables

LAYOUTS = (
    TokenLayout(7, 5, 4, 6),
    TokenLayout(0, 6, 5, 5),
    TokenLayout(9, 3, 7, 3, text_first=False),
    TokenLayout(2, 1, 3, 5),
    TokenLayout(3, 7, 1, 1),
)


def random_heads(layout, generator, device, heads=3, spread=2.0):
    shape = (2, heads, layout.sequence_length, 16)
    return (torch.randn(shape, generator=generator) * spread).to(device)


@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
@pytest.mark.parametrize("count", [1, 4, 1000])
def test_tables_are_those_of_the_definition(layout, count, generator, device, poisoned_memory):
    query, key = random_heads(layout, generator, device)
    places = draw_places(layout, count, torch.Generator(device).manual_seed(count))
    frames, text, similarity = frame_tables(query, key, layout, places)
    for head in range(len(query)):
        expected = reference.tables(query[head].cpu(), key[head].cpu(), layout, places.tolist())
        assert (frames[head].cpu() - expected[0]).abs().max() < 1e-5
        assert (text[head].cpu() - expected[1]).abs().max() < 1e-5
        assert float(similarity[head]) == pytest.approx(expected[2], abs=1e-5)
    assert torch.allclose(frames.sum(-1) + text, torch.ones_like(text), atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_all_places_give_the_masses_of_full_attention(layout, generator, device):
    query, key = random_heads(layout, generator, device)
    places = draw_places(layout, layout.tokens_per_frame, torch.Generator(device))
    tables = frame_tables(query, key, layout, places)
    weights = (query.double() @ key.double().mT / 4).softmax(-1)[:, layout.video_slice]
    of_frame = weights.unflatten(1, (layout.frames, -1)).mean(2)  # [H, F, N]
    expected = of_frame[..., layout.video_slice].unflatten(2, (layout.frames, -1)).sum(-1)
    assert (tables.frames - expected).abs().max() < 1e-5
    assert (tables.text - of_frame[..., layout.text_slice].sum(-1)).abs().max() < 1e-5


def test_heads_in_chunks_give_the_same(generator, device, monkeypatch):
    layout = LAYOUTS[0]
    query, key = random_heads(layout, generator, device, heads=5)
    places = draw_places(layout, 6, torch.Generator(device).manual_seed(1))
    whole = frame_tables(query, key, layout, places)
    monkeypatch.setattr(module, "SCORES_PER_CHUNK", 2 * 30 * 37)
    for one, other in zip(frame_tables(query, key, layout, places), whole, strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_places_are_drawn_once_each():
    layout = LAYOUTS[0]
    places = draw_places(layout, 9, torch.Generator().manual_seed(3))
    assert len(places) == 9 and len(set(places.tolist())) == 9 and 0 <= places.min() <= places.max() < 24
    assert sorted(draw_places(layout, 100, torch.Generator()).tolist()) == list(range(24))


@pytest.mark.parametrize("frames", [1, 2, 11])
def test_similarity_of_position_only_heads_is_one(frames, generator, device):
    layout = TokenLayout(4, frames, 4, 5)
    query, key = random_heads(layout, generator, device)
    for part in (query, key):
        part[:, layout.video_slice] = part[:, 4:24].repeat(1, frames, 1)
    tables = frame_tables(query, key, layout, torch.arange(10, device=device))
    assert (tables.similarity - 1).abs().max() < 1e-5


def test_similarity_of_frames_that_look_elsewhere_is_the_diagonal_alone(device):
    """Each frame gives its weight to a place of its own in every frame: cosines of 0 but with itself."""
    layout = TokenLayout(0, 4, 2, 4)
    query, key = torch.zeros(2, 1, 32, 32, device=device)
    for frame in range(4):
        query[0, frame * 8 : frame * 8 + 8, frame] = 400.0
        key[0, frame * 8 + frame, frame] = key[0, frame::8, frame] = 1.0
    tables = frame_tables(query, key, layout, torch.arange(8, device=device))
    assert float(tables.similarity) == pytest.approx(1 / 4, abs=1e-5)
