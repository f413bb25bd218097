import torch

from plugins.svg_smart.clusters import cluster_sizes, covered_blocks, k_means, kept_pairs


def test_labels_are_a_partition_by_the_nearest_centroid():
    generator = torch.Generator().manual_seed(0)
    points = torch.randn(3, 200, 16, generator=generator)
    labels, centroids = k_means(points, points[:, :7].clone(), 5)
    distances = torch.cdist(points, centroids)
    assert torch.equal(labels, distances.argmin(-1))
    assert (cluster_sizes(labels, 7).sum(-1) == 200).all()


def test_updates_lower_the_squared_distance_and_keep_empty_clusters():
    generator = torch.Generator().manual_seed(1)
    points = torch.randn(2, 300, 8, generator=generator)
    start = torch.cat([points[:, :5], torch.full((2, 1, 8), 1e3)], 1)
    spread = []
    for iterations in (0, 1, 10):
        labels, centroids = k_means(points, start, iterations)
        nearest = centroids.gather(1, labels[..., None].expand(-1, -1, 8))
        spread.append(float((points - nearest).square().sum()))
        assert torch.equal(centroids[:, 5], start[:, 5])
    assert spread[0] > spread[1] > spread[2]


def test_planted_clusters_are_found():
    generator = torch.Generator().manual_seed(2)
    centres = 10 * torch.randn(1, 4, 32, generator=generator)
    group = torch.arange(80) % 4
    points = centres[:, group] + 0.1 * torch.randn(1, 80, 32, generator=generator)
    labels, _ = k_means(points, points[:, :4].clone(), 3)
    assert torch.equal(labels[0], group)


def test_kept_pairs_reach_the_mass_and_no_more():
    generator = torch.Generator().manual_seed(3)
    query, key = torch.randn(2, 6, 16, generator=generator), torch.randn(2, 20, 16, generator=generator)
    sizes = torch.randint(0, 9, (2, 20), generator=generator)
    kept = kept_pairs(query, key, sizes, mass=0.7, least_share=0.0)
    weights = sizes[:, None] * (query @ key.transpose(1, 2) / 4).exp()
    shares = weights / weights.sum(-1, keepdim=True)
    assert ((shares * kept).sum(-1) >= 0.7 - 1e-6).all()
    weakest = torch.where(kept, shares, 2.0).amin(-1)
    assert ((shares * kept).sum(-1) - weakest < 0.7 + 1e-6).all()
    more = kept_pairs(query, key, sizes, mass=0.7, least_share=0.9)
    assert (more.sum(-1) >= 18).all() and not (kept & ~more).any()
    assert kept_pairs(query, key, sizes, mass=1.0, least_share=0.0).all()


def test_covered_blocks_by_brute_force():
    generator = torch.Generator().manual_seed(4)
    query_labels = torch.randint(0, 6, (2, 40), generator=generator).sort(-1).values
    key_labels = torch.randint(0, 9, (2, 40), generator=generator).sort(-1).values
    kept = torch.rand(2, 6, 9, generator=generator) < 0.1
    spans = [torch.stack([labels[:, ::8], labels[:, 7::8]], -1) for labels in (query_labels, key_labels)]
    blocks = covered_blocks(kept, *spans)
    for head in range(2):
        pairs = kept[head][query_labels[head][:, None], key_labels[head]]
        touched = pairs.view(5, 8, 5, 8).any(3).any(1)
        assert not (touched & ~blocks[head]).any()
    assert not blocks.all()
