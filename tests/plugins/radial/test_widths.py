import itertools

import pytest
import torch

from core import ParameterError
from plugins.radial.widths import element_density, frame_pair_widths, half_widths

RULES = ("cogvideox", "official", "paper")


def widths(rule, *, frames=13, places=1350, decay_factor=1.0, block=128):
    return half_widths(frames, places, rule=rule, decay_factor=decay_factor, block=block).tolist()


def test_widths_of_the_cogvideox_shapes():
    assert widths("official") == [1349, 1349, 512, 512] + [256] * 4 + [128] * 5
    assert widths("cogvideox") == [1349, 675, 512, 512] + [256] * 4 + [128] * 5
    assert widths("official", frames=11, places=4080) == [4079, 4079, 1024, 1024] + [512] * 4 + [256] * 3
    assert widths("cogvideox", frames=11, places=4080)[:3] == [4079, 2040, 1024]
    assert widths("paper", frames=9, places=1350) == [1349, 1349, 674, 674] + [336] * 4 + [167]


def test_the_band_never_gets_narrower_than_a_block():
    assert widths("official", decay_factor=0.2) == [1349, 1349] + [128] * 11
    assert widths("official", decay_factor=0.2, block=64)[2:9] == [102, 102, 64, 64, 64, 64, 64]


def test_far_frames_are_thinned_where_the_undecayed_band_is_narrower_than_a_block():
    # s = 240: base is 64, 32, 16 and 8 from the distances 2, 4, 8 and 16 on.
    kept = [d for d, width in enumerate(widths("official", frames=17, places=240)) if width >= 0]
    assert kept == [0, 1, 2, 4, 8, 16]
    kept = [d for d, width in enumerate(widths("official", frames=17, places=240, block=64)) if width >= 0]
    assert kept == [0, 1, 2, 3, 4, 6, 8, 12, 16]


def test_frames_smaller_than_a_block_are_thinned_by_their_own_size():
    # s = 7: base is 2, 1 and 1/2 from the distances 2, 4 and 8 on.
    assert widths("official", frames=9, places=7, block=64) == [6, 6, 6, -1, 6, -1, -1, -1, 6]


@pytest.mark.parametrize("decay_factor", [0.01, 0.2, 0.5])
def test_a_decay_below_one_does_not_thin(decay_factor):
    usual = [width < 0 for width in widths("official", frames=17, places=240)]
    assert [
        width < 0 for width in widths("official", frames=17, places=240, decay_factor=decay_factor)
    ] == usual


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("places, block", [(1350, 128), (240, 64), (240, 128), (7, 16), (1, 64)])
def test_widths_fall_with_the_distance_and_rise_with_the_decay_factor(rule, places, block):
    previous = None
    for decay_factor in (0.05, 0.2, 0.5, 1.0, 1.5, 3.0, 6.0, 20.0, 1e6, 1e308):
        found = widths(rule, frames=33, places=places, decay_factor=decay_factor, block=block)
        present = [width for width in found if width >= 0]
        assert all(later <= earlier for earlier, later in itertools.pairwise(present))
        assert all(-1 <= width < places for width in found) and found[0] == places - 1
        if previous and rule != "paper":
            assert all(new >= old for new, old in zip(found, previous, strict=True))
        previous = found
    assert previous == [places - 1] * 33


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("frames, places, block", [(13, 1350, 128), (17, 240, 64), (40, 7, 64), (2, 1, 16)])
def test_twice_the_frames_as_decay_factor_allows_every_pair(rule, frames, places, block):
    found = widths(rule, frames=frames, places=places, decay_factor=2.0 * frames, block=block)
    assert found == [places - 1] * frames


def test_paper_thins_to_single_places_when_a_band_is_narrower_than_a_place():
    # s = 3: m is 4 from distance 4 on (every ceil(4/3) = 2nd frame), 8 from distance 8 on (every 3rd).
    assert widths("paper", frames=13, places=3) == [2, 2, 0, 0, 0, -1, 0, -1, -1, 0, -1, -1, 0]
    assert widths("paper", frames=6, places=3, decay_factor=1e-300) == [2, 2, -1, -1, -1, -1]


@pytest.mark.parametrize("places", [1, 2, 7, 30])
def test_pairs_of_one_frame_pair_have_the_closed_form(places):
    place = torch.arange(places)
    for width in range(-1, places):
        counted = int(((place[:, None] - place).abs() <= width).sum())
        assert element_density(torch.tensor([[width]]), places, 0) == counted / places**2


@pytest.mark.parametrize(
    "frames, places, plain, with_sink",
    [
        (13, 1350, 0.6015, 0.6405),
        (11, 4080, 0.649, 0.691),
        (30, 3840, 0.390, 0.413),
        (18, 3840, 0.516, 0.549),
    ],
)
def test_density_of_the_papers_rule(frames, places, plain, with_sink):
    rule = half_widths(frames, places, rule="paper", decay_factor=1.0, block=128)
    for sink, expected in ((False, plain), (True, with_sink)):
        pairs = frame_pair_widths(rule, places, sink=sink)
        assert element_density(pairs, places, 0) == pytest.approx(expected, abs=6e-4)


def test_sink_opens_the_first_frame_and_nothing_else():
    rule = half_widths(5, 300, rule="cogvideox", decay_factor=1.0, block=64)
    plain, sink = (frame_pair_widths(rule, 300, sink=choice) for choice in (False, True))
    assert torch.equal(plain, plain.T)
    assert (sink[:, 0] == 299).all()
    assert torch.equal(sink[:, 1:], plain[:, 1:])


@pytest.mark.parametrize("wrong", [{"decay_factor": 0.0}, {"decay_factor": float("nan")}, {"rule": "wan"}])
def test_wrong_values_raise(wrong):
    with pytest.raises(ParameterError, match=next(iter(wrong))):
        half_widths(3, 10, **({"rule": "paper", "decay_factor": 1.0, "block": 64} | wrong))
