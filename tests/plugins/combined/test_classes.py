import pytest
import torch

from core import AttentionContext, TokenLayout
from core.random import call_generator
from plugins.combined import classes as module
from plugins.combined import reference
from plugins.combined.classes import ClassOptions, HeadGroups, largest_weights, pattern_heads
from plugins.combined.frame_tables import draw_places

LAYOUT = TokenLayout(6, 5, 4, 8)
OPTIONS = ClassOptions(places=16, key_stride=3, sparse_mass=0.9, similarity=0.9, seed=0)


def heads_of_each_class(generator, device, layout=LAYOUT):
    """Query and key ``[1, 4, N, 64]``: alike from every frame, random, one-hot, uniform."""
    query, key = torch.randn(2, 1, 4, layout.sequence_length, 64, generator=generator).to(device)
    for part in (query, key):
        frame = part[:, 0, layout.video_start : layout.video_start + layout.tokens_per_frame]
        part[:, 0, layout.video_slice] = frame.repeat(1, layout.frames, 1)
    query[:, 1] *= 2.0
    key[:, 2] = query[:, 2] * 8
    query[:, 3] = 0.0
    return query, key


@pytest.mark.parametrize("stride", [1, 3])
@pytest.mark.parametrize("count", [1, 7, 1000])
def test_largest_weights_are_those_of_the_definition(stride, count, generator, device):
    query, key = torch.randn(2, 3, LAYOUT.sequence_length, 16, generator=generator).to(device) * 2
    places = draw_places(LAYOUT, count, torch.Generator(device).manual_seed(2))
    masses = largest_weights(query, key, LAYOUT, places, stride)
    for head in range(3):
        expected = reference.sorted_mass(query[head].cpu(), key[head].cpu(), LAYOUT, places.tolist(), stride)
        assert float(masses[head]) == pytest.approx(expected, abs=1e-5)


def test_largest_weights_in_chunks_give_the_same(generator, monkeypatch):
    query, key = torch.randn(2, 3, LAYOUT.sequence_length, 16, generator=generator)
    places = torch.arange(5)
    whole = largest_weights(query, key, LAYOUT, places, 3)
    monkeypatch.setattr(module, "SCORES_PER_CHUNK", 1)
    assert torch.allclose(largest_weights(query, key, LAYOUT, places, 3), whole, atol=1e-6)


def test_uniform_heads_have_the_share_and_one_hot_heads_all(generator, device):
    query, key = heads_of_each_class(generator, device)
    masses = largest_weights(query[0], key[0], LAYOUT, torch.arange(32, device=device), 1)
    kept = round(0.2 * LAYOUT.sequence_length)
    assert float(masses[3]) == pytest.approx(kept / LAYOUT.sequence_length, abs=1e-5)
    assert masses[2] > 0.99


def test_heads_fall_into_their_classes(generator, device):
    query, key = heads_of_each_class(generator, device)
    chosen = pattern_heads(query, key, AttentionContext(LAYOUT), OPTIONS)
    assert chosen.tolist() == [[True, False, False, True]]
    never = pattern_heads(query, key, AttentionContext(LAYOUT), OPTIONS._replace(sparse_mass=0.01))
    assert not never.any()


@pytest.mark.parametrize("failing", [0, 1])
def test_both_draws_must_find_a_head_alike(failing, generator, monkeypatch):
    draws = []
    original = module.frame_tables

    def forget_once(*arguments):
        draws.append(arguments[-1].tolist())
        tables = original(*arguments)
        return tables._replace(similarity=tables.similarity * 0) if len(draws) - 1 == failing else tables

    monkeypatch.setattr(module, "frame_tables", forget_once)
    query, key = heads_of_each_class(generator, "cpu")
    assert not pattern_heads(query, key, AttentionContext(LAYOUT), OPTIONS).any()
    assert len(draws) == 2 and draws[0] != draws[1]


def test_draws_depend_on_seed_layer_and_step_alone(generator):
    contexts = [
        AttentionContext(LAYOUT, layer_index=layer, step_index=step) for layer in (0, 1) for step in (0, 1)
    ]
    drawn = [draw_places(LAYOUT, 16, call_generator(0, context, "cpu")).tolist() for context in contexts]
    assert len({tuple(places) for places in drawn}) == 4
    assert drawn[0] == draw_places(LAYOUT, 16, call_generator(0, contexts[0], "cpu")).tolist()


@pytest.mark.parametrize("flags", [[True, False, True], [True] * 3, [False] * 3])
def test_groups_hold_every_head_once(flags, device):
    groups = HeadGroups.from_flags(flags, 4, torch.device(device))
    assert groups.step == 4 and groups.pattern.dtype == torch.int64
    assert groups.pattern.tolist() == [index for index in range(3) if flags[index]]
    assert sorted([*groups.pattern.tolist(), *groups.others.tolist()]) == [0, 1, 2]


def test_a_sixth_of_the_places_finds_the_same_classes():
    layout = TokenLayout(8, 6, 16, 24)
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 1, 8, layout.sequence_length, 64, generator=generator)
    for part in (query, key):  # the first four heads look nearly alike from every frame
        video = part[:, :4, layout.video_slice]
        alike = torch.randn(1, 4, 384, 64, generator=generator).repeat(1, 1, 6, 1)
        video.mul_(0.03).add_(alike).mul_(0.5)
    key[:, 6:] = query[:, 6:] * 4  # the last two are sparse
    for places in (64, 384):
        chosen = pattern_heads(query, key, AttentionContext(layout), OPTIONS._replace(places=places))
        assert chosen.tolist() == [[True] * 4 + [False] * 4]
