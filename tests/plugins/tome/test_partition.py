import pytest
import torch

from core import TokenLayout
from plugins.tome.partition import TILE, cell_counts, make_partition
from plugins.tome.reference import are_near, split_tokens

LAYOUTS = [
    TokenLayout(7, 5, 7, 9),
    TokenLayout(0, 2, 4, 5),
    TokenLayout(3, 9, 6, 8, text_first=False),
    TokenLayout(226, 4, 3, 2),
    TokenLayout(1, 3, 1, 1),
]


@pytest.mark.parametrize("seed", [None, 0, 1])
@pytest.mark.parametrize("cell", [(2, 2, 2), (1, 1, 1), (4, 3, 3), (1, 3, 2), (9, 9, 9)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_tokens_are_split_as_in_the_reference(layout, cell, seed):
    partition = make_partition(layout, cell, seed=seed, local=False)
    expected = split_tokens(layout, cell, seed)
    assert (partition.sources.tolist(), partition.destinations.tolist()) == expected


@pytest.mark.parametrize("cell", [(2, 2, 2), (3, 2, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_every_whole_cell_has_one_destination(layout, cell):
    sources, destinations, *_ = make_partition(layout, cell, seed=3, local=False)
    video = list(range(layout.video_slice.start, layout.video_slice.stop))
    assert sorted(sources.tolist() + destinations.tolist()) == video
    is_destination = torch.zeros(layout.sequence_length, dtype=torch.bool)
    is_destination[destinations] = True
    grid = is_destination[layout.video_slice].view(layout.frames, layout.height, layout.width)
    assert grid[0].all()
    whole = [n * size for n, size in zip(cell_counts(layout, cell), cell, strict=True)]
    inside = grid[1:][: whole[0], : whole[1], : whole[2]]
    for axis, size in enumerate(cell):
        inside = inside.unflatten(2 * axis, (-1, size))  # f, df, y, dy, x, dx
    assert (inside.sum((1, 3, 5)) == 1).all()
    assert grid[1:].sum() == inside.sum()  # leftovers are sources


@pytest.mark.parametrize(
    "layout, sizes",
    [(TokenLayout(226, 13, 30, 45), (15750, 1800)), (TokenLayout(226, 11, 48, 85), (39904, 4976))],
    ids=["2b", "1.5"],
)
def test_sizes_of_the_models(layout, sizes):
    sources, destinations, *_ = make_partition(layout, (4, 3, 3), seed=0, local=False)
    assert (len(sources), len(destinations)) == sizes


@pytest.mark.parametrize("local", [False, True])
def test_a_single_frame_has_no_sources(local):
    partition = make_partition(TokenLayout(4, 1, 5, 6), (2, 2, 2), seed=0, local=local)
    assert partition.sources.numel() == 0 and partition.tiles.shape == (0, TILE)
    assert partition.destinations.tolist() == list(range(4, 34))


def test_the_seed_decides_and_the_global_generator_is_left_alone():
    layout = TokenLayout(0, 9, 12, 12)
    before = torch.get_rng_state()
    first, again, other = (make_partition(layout, (4, 3, 3), seed=seed, local=False) for seed in (5, 5, 6))
    assert torch.equal(first.destinations, again.destinations)
    assert not torch.equal(first.destinations, other.destinations)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("cell", [(2, 2, 2), (1, 3, 2), (9, 9, 9)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS[:4], ids=TokenLayout.describe)
def test_local_candidates_are_those_of_the_reference(layout, cell):
    partition = make_partition(layout, cell, seed=0, local=True)
    seen = {}
    for tile, candidates in zip(partition.tiles.tolist(), partition.candidates.tolist(), strict=True):
        for source in set(tile):
            assert source not in seen
            seen[source] = list(dict.fromkeys(candidates))
    assert seen.keys() == set(range(len(partition.sources)))
    for source, places in seen.items():
        token = int(partition.sources[source])
        near = [to for to in partition.destinations.tolist() if are_near(layout, cell, token, to)]
        assert partition.destinations[places].tolist() == near


def test_a_crowded_cell_fills_several_tiles():
    partition = make_partition(TokenLayout(0, 6, 5, 5), (5, 5, 5), seed=0, local=True)
    assert partition.tiles.shape == (2, TILE) and partition.candidates.shape == (2, 26)
    assert partition.tiles.unique().tolist() == list(range(124))
