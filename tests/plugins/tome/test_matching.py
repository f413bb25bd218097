import pytest
import torch

from core import ParameterError, TokenLayout
from core.testing import random_qkv
from plugins.tome import matching
from plugins.tome.matching import best_destinations, best_destinations_torch, matching_cost
from plugins.tome.partition import TILE, make_partition
from plugins.tome.reference import are_near, similarities

LAYOUT = TokenLayout(7, 5, 7, 9)
CELL = (2, 2, 3)
# Products of length 2 D + 2 summed in fp32: a random walk of 2^-24.
TOLERANCE = 2.0**-20


def matched(metric, local, layout=LAYOUT, heads=2, **options):
    _, key, value = random_qkv(layout, heads=heads, batch=2, **options)
    partition = make_partition(layout, CELL, seed=1, local=local)
    return key, value, partition, best_destinations(key, value, partition, metric)


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("metric", ["kv_norm", "k", "mean_k"])
def test_matching_equals_brute_force(metric, local):
    key, value, partition, (similarity, place) = matched(metric, local)
    assert similarity.shape == place.shape == (2, 1 if metric == "mean_k" else 2, len(partition.sources))
    compared = key.mean(1, keepdim=True) if metric == "mean_k" else key
    near = torch.tensor(
        [
            [not local or are_near(LAYOUT, CELL, source, to) for to in partition.destinations.tolist()]
            for source in partition.sources.tolist()
        ]
    )
    for batch in range(2):
        for head in range(compared.shape[1]):
            every = similarities(compared[batch, head], value[batch, head], metric)
            every = every[partition.sources][:, partition.destinations].masked_fill(~near, -2)
            found = every.gather(1, place[batch, head][:, None])[:, 0]
            assert (similarity[batch, head] - every.amax(1)).abs().max() < TOLERANCE
            assert (found - every.amax(1)).abs().max() < TOLERANCE


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("metric", ["kv_norm", "k"])
def test_the_first_of_equal_destinations_is_taken(metric, local):
    _, key, value = random_qkv(LAYOUT)
    partition = make_partition(LAYOUT, CELL, seed=1, local=local)
    # Small whole numbers: every sum is exact, so that equal tokens have equal similarities.
    key, value = key.sign(), value.sign()
    key[:, :, partition.destinations] = key[:, :, partition.destinations[:1]]
    value[:, :, partition.destinations] = value[:, :, partition.destinations[:1]]
    _, place = best_destinations(key, value, partition, metric)
    first = torch.empty(len(partition.sources), dtype=torch.int64)
    candidates = partition.candidates.expand(len(partition.tiles), -1)
    for tile, row in zip(partition.tiles, candidates, strict=True):
        first[tile.long()] = int(row.min())
    assert torch.equal(place, first.expand_as(place))


@pytest.mark.parametrize("local", [False, True])
@pytest.mark.parametrize("limit", [1, 3 * TILE * 40, 1 << 30])
def test_chunks_do_not_matter(limit, local, monkeypatch):
    key, value, partition, expected = matched("kv_norm", local, seed=3)
    monkeypatch.setattr(matching, "SIMILARITIES_PER_CHUNK", limit)
    similarity, place = best_destinations_torch(key, value, partition)
    assert torch.equal(place, expected[1])
    assert (similarity - expected[0]).abs().max() < TOLERANCE


def test_no_matrix_of_all_similarities():
    """A layout whose source x destination matrix would not fit into memory is matched."""
    layout = TokenLayout(0, 3, 192, 200)
    partition = make_partition(layout, (2, 200, 200), seed=0, local=False)
    assert len(partition.sources) * len(partition.destinations) > 2**31
    few = partition._replace(sources=partition.sources[:640], tiles=partition.tiles[:10])
    _, key, value = random_qkv(layout, heads=1, head_dim=16)
    similarity, _ = best_destinations_torch(key, value, few)
    assert similarity.shape == (1, 1, 640) and torch.isfinite(similarity).all()


def test_zero_tokens_resemble_nothing_and_give_no_nan():
    _, key, value = random_qkv(LAYOUT)
    partition = make_partition(LAYOUT, CELL, seed=0, local=False)
    key[:, :, partition.sources[::2]] = 0
    value[:, :, partition.sources[::2]] = 0
    for metric in ("kv_norm", "k", "mean_k"):
        similarity, _ = best_destinations(key, value, partition, metric)
        assert torch.isfinite(similarity).all() and not similarity[..., ::2].any()


def test_cost_of_a_matching():
    layout = TokenLayout(226, 13, 30, 45)
    query, key = torch.empty(2, 2, 30, layout.sequence_length, 0)
    partition = make_partition(layout, (4, 3, 3), seed=0, local=False)
    costs = {metric: matching_cost(query, key, partition, metric) for metric in ("kv_norm", "k", "mean_k")}
    full = 15750 * 1800 / 17776**2
    assert costs == pytest.approx({"kv_norm": full, "k": full / 2, "mean_k": full / 60})


def test_an_unknown_metric_is_refused():
    _, key, value = random_qkv(LAYOUT)
    partition = make_partition(LAYOUT, CELL, seed=0, local=False)
    with pytest.raises(ParameterError, match="one of kv_norm, k, mean_k, got 'foo'"):
        best_destinations(key, value, partition, "foo")


def test_an_empty_cell_is_refused():
    with pytest.raises(ParameterError, match=r"at least 1.*got \(0, 3, 3\)"):
        make_partition(LAYOUT, (0, 3, 3), seed=0, local=False)
