import pytest
import torch

from core import TokenLayout
from plugins.svg_smart.clusters import (
    alike_in_a_row,
    bisection_order,
    block_members,
    cluster_starts,
    k_means,
    predicted_mass,
)

LAYOUTS = [TokenLayout(5, 3, 3, 5), TokenLayout(0, 2, 4, 4), TokenLayout(7, 4, 2, 5, text_first=False)]


def cluster_sizes(labels, clusters):
    return torch.stack([one.bincount(minlength=clusters) for one in labels])


def test_labels_are_a_partition_by_the_nearest_centroid():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 200, 16, generator=generator)
    labels, centroids = k_means(points, points[:, :7].clone(), 5)
    distances = torch.cdist(points, centroids)
    assert torch.equal(labels, distances.argmin(-1))


def test_an_update_is_the_mean_of_each_cluster():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2, 90, 8, generator=generator)
    start = torch.cat([points[:, :5], torch.full((2, 1, 8), 1e3)], 1)
    before, _ = k_means(points, start, 0)
    _, centroids = k_means(points, start, 1)
    for head in range(2):
        for cluster in range(5):
            mean = points[head, before[head] == cluster].double().mean(0)
            assert (centroids[head, cluster] - mean).abs().max() < 1e-6
    assert torch.equal(centroids[:, 5], start[:, 5])  # an empty one


def test_updates_lower_the_squared_distance():
    points = torch.randn(2, 300, 8, generator=torch.Generator().manual_seed(2))
    spread = []
    for iterations in (0, 1, 10):
        labels, centroids = k_means(points, points[:, :5].clone(), iterations)
        nearest = centroids.take_along_dim(labels[..., None], 1)
        spread.append(float((points - nearest).square().sum()))
    assert spread[0] > spread[1] > spread[2]


def test_planted_clusters_are_found():
    generator = torch.Generator().manual_seed(2)
    centres = 10 * torch.randn(1, 4, 32, generator=generator)
    group = torch.arange(80) % 4
    points = centres[:, group] + 0.1 * torch.randn(1, 80, 32, generator=generator)
    labels, _ = k_means(points, points[:, :4].clone(), 3)
    assert torch.equal(labels[0], group)


@pytest.mark.parametrize("count", [1, 2, 5, 64, 100])
def test_bisection_sorts_a_line(count):
    """All points on a line: halves of halves are the order of the line, whatever stands beside the fill."""
    generator = torch.Generator().manual_seed(count)
    places = torch.stack([torch.randperm(count, generator=generator) for _ in range(3)])
    points = places[..., None] * torch.tensor([0.1, -2.0, 0.5])
    order = bisection_order(points)
    assert torch.equal(order.sort(-1).values, torch.arange(count).expand(3, -1))
    assert torch.equal(places.gather(1, order), torch.arange(count).flip(0).expand(3, -1))


def test_bisection_keeps_planted_groups_together():
    generator = torch.Generator().manual_seed(3)
    centres = 10 * torch.randn(2, 8, 16, generator=generator)
    group = torch.arange(64) % 8
    points = centres[:, group] + 0.1 * torch.randn(2, 64, 16, generator=generator)
    ordered = group[bisection_order(points)]
    assert ((ordered[:, 1:] != ordered[:, :-1]).sum(-1) == 7).all()


def test_new_numbers_are_the_same_clusters():
    generator = torch.Generator().manual_seed(4)
    labels, centroids = k_means(torch.randn(2, 60, 4, generator=generator), torch.randn(2, 9, 4), 2)
    renamed, moved = alike_in_a_row(labels, centroids)
    assert not torch.equal(renamed, labels)
    for head in range(2):
        assert torch.equal(moved[head][renamed[head]], centroids[head][labels[head]])
        assert torch.equal(moved[head].sort(0).values, centroids[head].sort(0).values)


@pytest.mark.parametrize("block", [4, 16, 64])
@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_members_are_counted(layout, block):
    generator = torch.Generator().manual_seed(5)
    labels = torch.randint(0, 6, (2, layout.video_length), generator=generator)
    labels[labels == 3] = 5  # an empty cluster
    ranked = labels.sort(-1).values
    assert torch.equal(cluster_starts(ranked, 6).diff(dim=-1), cluster_sizes(labels, 6))
    whole = torch.full((2, layout.sequence_length), -1)
    whole[:, layout.video_slice] = ranked
    expected = torch.stack(
        [(part[..., None] == torch.arange(6)).sum(1) for part in whole.split(block, dim=1)], dim=1
    )
    assert torch.equal(block_members(ranked, 6, layout, block).long(), expected)


@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_predicted_mass_is_that_of_tokens_at_their_centroids(layout):
    generator = torch.Generator().manual_seed(6)
    ranked, members, centroids = [], [], []
    for clusters in (5, 9):
        labels = torch.randint(0, clusters - 1, (2, layout.video_length), generator=generator)
        ranked.append(labels.sort(-1).values)
        members.append(block_members(ranked[-1], clusters, layout, 4))
        centroids.append(torch.randn(2, clusters, 16, generator=generator))
    found = predicted_mass(*centroids, *members)
    query, key = (
        points.double().take_along_dim(labels[..., None], 1)
        for points, labels in zip(centroids, ranked, strict=True)
    )
    weights = (query @ key.mT / 4).softmax(-1)
    whole = torch.zeros(2, layout.sequence_length, layout.sequence_length, dtype=torch.float64)
    whole[:, layout.video_slice, layout.video_slice] = weights
    video = torch.zeros(layout.sequence_length)
    video[layout.video_slice] = 1
    for i, rows in enumerate(whole.split(4, dim=1)):
        tokens = video[4 * i : 4 * i + 4].sum().clamp(min=1)
        for j, block in enumerate(rows.split(4, dim=2)):
            assert (found[:, i, j] - block.sum((1, 2)) / tokens).abs().max() < 1e-6
