import itertools

import pytest
import torch
import torch.nn.functional as F

from core import BlockSparseMask, LayoutError, ParameterError, TokenLayout
from core.testing import random_qkv
from kernels_common import block_sparse_backends
from plugins.tome.matching import best_destinations
from plugins.tome.merging import (
    MergeMap,
    make_merge_map,
    merge_tokens,
    merge_tokens_torch,
    merged_attention,
    unmerge_tokens,
)
from plugins.tome.partition import make_partition

LAYOUT = TokenLayout(7, 5, 7, 9)
LAYOUTS = [LAYOUT, TokenLayout(0, 2, 4, 5), TokenLayout(226, 3, 6, 8, text_first=False)]

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def make_map(generator):
    """A map of random groups: any similarities, any destinations."""

    def make(layout, r, batch=2, heads=3):
        partition = make_partition(layout, (2, 2, 2), seed=0, local=False)
        shape = (batch, heads, len(partition.sources))
        similarity = torch.rand(shape, generator=generator)
        place = torch.randint(len(partition.destinations), shape, generator=generator)
        r = min(r, len(partition.sources))
        return make_merge_map(similarity, place, partition, r), partition

    return make


def groups_of(merge_map, batch, head):
    order, starts = merge_map.order[batch, head].tolist(), merge_map.starts[batch, head].tolist()
    return [order[begin:end] for begin, end in itertools.pairwise(starts)]


@pytest.mark.parametrize("r", [0, 1, 17, 10**6])
@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_groups_hold_every_token_once_and_text_alone(make_map, layout, r):
    merge_map, partition = make_map(layout, r)
    r = min(r, len(partition.sources))
    assert merge_map.merged_length == layout.sequence_length - r
    assert (merge_map.counts() >= 1).all()
    assert (merge_map.counts().sum(-1) == layout.sequence_length).all()
    assert torch.equal(merge_map.sizes(), merge_map.counts()[..., : len(partition.destinations)])
    text = set(range(layout.text_slice.start, layout.text_slice.stop))
    for batch in range(2):
        for head in range(3):
            groups = groups_of(merge_map, batch, head)
            assert sorted(itertools.chain(*groups)) == list(range(layout.sequence_length))
            number = len(partition.destinations)
            assert [group[0] for group in groups[:number]] == partition.destinations.tolist()
            rest = [group[0] for group in groups[number:]]
            assert rest == sorted(rest) and all(len(group) == 1 for group in groups[number:])
            assert all(len(group) == 1 for group in groups if text & set(group))
            for group in groups:
                assert set(group[1:]) <= set(partition.sources.tolist())
                assert len(group) == 1 or group[0] in partition.destinations


@pytest.mark.parametrize("r", [1, 40, 150])
def test_the_most_similar_pairs_are_merged(make_map, generator, r):
    partition = make_partition(LAYOUT, (2, 2, 2), seed=0, local=False)
    # Few different values: many ties, which the earlier source wins.
    similarity = torch.randint(5, (1, 2, len(partition.sources)), generator=generator) / 4
    place = torch.randint(len(partition.destinations), similarity.shape, generator=generator)
    merge_map = make_merge_map(similarity, place, partition, r)
    for head in range(2):
        values, places = similarity[0, head].tolist(), place[0, head].tolist()
        chosen = sorted(range(len(values)), key=lambda source: (-values[source], source))[:r]
        expected = {
            int(partition.sources[source]): int(partition.destinations[places[source]]) for source in chosen
        }
        found = {token: group[0] for group in groups_of(merge_map, 0, head) for token in group[1:]}
        assert found == expected


@pytest.mark.parametrize("r", [1, 40, 150])
def test_of_equal_similarities_the_first_are_merged(r):
    partition = make_partition(LAYOUT, (2, 2, 2), seed=0, local=False)
    similarity = torch.full((1, 1, len(partition.sources)), 0.25)
    similarity[..., 33] = 0.5
    similarity[..., -1] = -0.0
    place = torch.zeros_like(similarity, dtype=torch.int64)
    merge_map = make_merge_map(similarity, place, partition, r)
    (group,) = (group for group in groups_of(merge_map, 0, 0) if len(group) > 1)
    first = range(r - 1) if r <= 33 else (*range(33), *range(34, r))
    assert group[0] == partition.destinations[0]
    assert set(group[1:]) == set(partition.sources[[33, *first]].tolist())


def test_similarities_that_are_no_numbers_lose_no_token(generator):
    partition = make_partition(LAYOUT, (2, 2, 2), seed=0, local=False)
    similarity = torch.rand(1, 2, len(partition.sources), generator=generator)
    similarity[0, 0, ::3] = similarity[0, 1] = float("nan")
    place = torch.zeros_like(similarity, dtype=torch.int64)
    merge_map = make_merge_map(similarity, place, partition, 40)
    assert merge_map.merged_length == LAYOUT.sequence_length - 40
    assert (merge_map.order.sort().values == torch.arange(LAYOUT.sequence_length)).all()


def test_means_equal_loops(make_map, generator):
    merge_map, _ = make_map(LAYOUT, 120)
    tokens = torch.randn(2, 3, LAYOUT.sequence_length, 20, generator=generator)
    merged = merge_tokens(tokens, merge_map)
    for batch in range(2):
        for head in range(3):
            expected = [
                tokens[batch, head, group].double().mean(0) for group in groups_of(merge_map, batch, head)
            ]
            assert (merged[batch, head] - torch.stack(expected)).abs().max() < 2.0**-20


def test_several_tensors_are_merged_as_one(make_map, generator):
    merge_map, _ = make_map(LAYOUT, 60)
    tokens = tuple(torch.randn(2, 3, LAYOUT.sequence_length, 16, generator=generator) for _ in range(2))
    merged = merge_tokens(tokens, merge_map)
    assert isinstance(merged, tuple)
    for part, found in zip(tokens, merged, strict=True):
        assert torch.equal(found, merge_tokens(part, merge_map))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_token_alone_stays_exactly_itself(make_map, generator, dtype):
    merge_map, _ = make_map(LAYOUT, 60)
    tokens = torch.randn(2, 3, LAYOUT.sequence_length, 16, generator=generator).to(dtype)
    merged = merge_tokens(tokens, merge_map)
    restored = unmerge_tokens(merged, merge_map)
    alone = (merge_map.counts() == 1).gather(-1, merge_map.groups())
    assert merged.dtype == dtype and alone.sum() > 100
    assert torch.equal(restored[alone], tokens[alone])


def test_sums_are_kept_in_fp32(make_map):
    """A bf16 sum of 300 ones would stop at 256."""
    partition = make_partition(TokenLayout(0, 2, 20, 20), (9, 9, 9), seed=0, local=False)
    similarity, place = torch.ones(1, 1, 400), torch.zeros(1, 1, 400, dtype=torch.int64)
    merge_map = make_merge_map(similarity, place, partition, 300)
    tokens = torch.ones(1, 1, 800, 16, dtype=torch.bfloat16)
    tokens[:, :, 1:] = 3
    expected = torch.tensor((1 + 3 * 300) / 301).bfloat16()
    assert merge_tokens(tokens, merge_map)[0, 0, 0, 0] == expected
    assert merge_map.counts()[0, 0, 0] == 301


def test_constants_stay_constant_and_groups_of_equals_come_back(make_map, generator):
    merge_map, _ = make_map(LAYOUT, 150)
    constant = torch.full((2, 3, LAYOUT.sequence_length, 16), 0.75)
    assert torch.equal(merge_tokens(constant, merge_map), constant[:, :, : merge_map.merged_length])
    per_group = torch.randint(-8, 9, (2, 3, merge_map.merged_length, 16), generator=generator).float()
    tokens = unmerge_tokens(per_group, merge_map)
    assert (merge_tokens(tokens, merge_map) - per_group).abs().max() < 1e-6
    assert (unmerge_tokens(merge_tokens(tokens, merge_map), merge_map) - tokens).abs().max() < 1e-6


def test_one_map_for_all_heads(make_map, generator):
    merge_map, _ = make_map(LAYOUT, 90, heads=1)
    tokens = torch.randn(2, 3, LAYOUT.sequence_length, 16, generator=generator)
    merged = merge_tokens(tokens, merge_map)
    for head in range(3):
        assert torch.equal(merged[:, head : head + 1], merge_tokens(tokens[:, head : head + 1], merge_map))
    assert unmerge_tokens(merged, merge_map).shape == tokens.shape


def test_heads_that_share_keys_share_groups(make_map):
    merge_map, _ = make_map(LAYOUT, 30, heads=3)
    shared = merge_map.for_heads(6)
    assert torch.equal(shared.order, merge_map.order.repeat_interleave(2, 1))
    assert torch.equal(shared.starts, merge_map.starts.repeat_interleave(2, 1))
    assert merge_map.for_heads(3) is merge_map


@pytest.mark.parametrize("heads", [1, 2])
def test_sizes_in_the_operator_equal_a_mask_in_memory(make_map, generator, heads):
    layout = TokenLayout(5, 6, 6, 10)
    merge_map, _ = make_map(layout, 200, heads=heads)
    query, key, value = random_qkv(layout, batch=2, heads=4)
    key, value = (merge_tokens(part[:, :heads], merge_map) for part in (key, value))
    if heads == 1:
        key, value = key.expand(-1, 2, -1, -1), value.expand(-1, 2, -1, -1)
    lengths = (layout.sequence_length, merge_map.merged_length)
    mask = BlockSparseMask.full((64, 64), *lengths)
    output, backend = merged_attention(query, key, value, merge_map.sizes(), mask)
    other, plain = merged_attention(query, key, value, merge_map.sizes())
    assert (backend, plain) == ("torch", "sdpa")
    repeated = (part.repeat_interleave(2, 1) for part in (key, value))
    columns = merge_map.counts().log().expand(-1, 2, -1).repeat_interleave(2, 1)[:, :, None]
    expected = F.scaled_dot_product_attention(query, *repeated, attn_mask=columns)
    assert (output - expected).abs().max() < 1e-5 and (other - expected).abs().max() < 1e-5


def test_a_block_mask_over_merged_keys(make_map, generator):
    layout = TokenLayout(5, 6, 6, 10)
    merge_map, _ = make_map(layout, 200, batch=1, heads=2)
    query, key, value = random_qkv(layout)
    key, value = merge_tokens(key, merge_map), merge_tokens(value, merge_map)
    lengths = (layout.sequence_length, merge_map.merged_length)
    blocks = torch.rand(6, 3, generator=generator) < 0.5
    blocks[:, 0] = True
    mask = BlockSparseMask.from_blocks(blocks, (64, 64), *lengths)
    output, _ = merged_attention(query, key, value, merge_map.sizes(), mask)
    scores = query @ key.mT / 8 + merge_map.counts().log()[:, :, None]
    expected = scores.masked_fill(~mask.to_dense(), float("-inf")).softmax(-1) @ value
    assert (output - expected).abs().max() < 1e-5


def test_the_backend_is_that_of_a_call_with_sizes(make_map, monkeypatch):
    """Another than one for plain calls, where its kernels have none."""
    monkeypatch.setattr(
        block_sparse_backends,
        "_fastest",
        lambda query, mask, features: "reference" if features.sizes else "gluon",
    )
    merge_map, _ = make_map(LAYOUT, 50, batch=1, heads=2)
    query, key, value = random_qkv(LAYOUT)
    key, value = merge_tokens(key, merge_map), merge_tokens(value, merge_map)
    mask = BlockSparseMask.full((64, 64), LAYOUT.sequence_length, merge_map.merged_length)
    assert merged_attention(query, key, value, merge_map.sizes(), mask)[1] == "reference"


@pytest.mark.parametrize("r", [-1, 10**6, 3.0, True])
def test_only_as_many_as_there_are_sources_are_merged(r):
    partition = make_partition(LAYOUT, (2, 2, 2), seed=0, local=False)
    similarity = torch.ones(1, 1, len(partition.sources))
    with pytest.raises(ParameterError, match=f"0 to {len(partition.sources)}, got {r!r}"):
        make_merge_map(similarity, similarity.long(), partition, r)


@pytest.mark.parametrize("shape", [(2, 2, 23), (2, 3, 20), (3, 2, 20), (20,)], ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_sizes_that_do_not_fit_are_refused(shape, masked):
    query, key = torch.zeros(2, 4, 20, 16), torch.zeros(2, 2, 20, 16)
    mask = BlockSparseMask.full((64, 64), 20, 20) if masked else None
    with pytest.raises(LayoutError, match="key_sizes must be numbers"):
        merged_attention(query, key, key, torch.ones(shape, dtype=torch.int32), mask)


def test_means_have_gradients(make_map, generator):
    merge_map, _ = make_map(LAYOUT, 60)
    tokens = torch.randn(2, 3, LAYOUT.sequence_length, 16, generator=generator, requires_grad=True)
    merge_tokens(tokens, merge_map).sum().backward()
    expected = unmerge_tokens(1 / merge_map.counts()[..., None], merge_map)
    assert torch.allclose(tokens.grad, expected.expand_as(tokens), rtol=1e-5)


@pytest.mark.parametrize("metric", ["kv_norm", "k"])
@pytest.mark.parametrize("r", [1, 100, 10**6])
def test_merged_duplicates_are_exact(metric, r, generator):
    """Equal keys: whatever the values, n keys are one key with their mean value and log n."""
    partition = make_partition(LAYOUT, (2, 2, 2), seed=0, local=False)
    query, key, value = random_qkv(LAYOUT)
    pairs = torch.randint(len(partition.destinations), (len(partition.sources),), generator=generator)
    key[:, :, partition.sources] = key[:, :, partition.destinations[pairs]]
    if metric == "kv_norm":  # compares values too
        value[:, :, partition.sources] = value[:, :, partition.destinations[pairs]]
    similarity, place = best_destinations(key, value, partition, metric)
    assert torch.equal(place, pairs.expand_as(place))
    merge_map = make_merge_map(similarity, place, partition, min(r, len(pairs)))
    merged = (merge_tokens(part, merge_map) for part in (key, value))
    output, _ = merged_attention(query, *merged, merge_map.sizes())
    assert (output - F.scaled_dot_product_attention(query, key, value)).abs().max() < 1e-5


def test_the_plain_form_is_what_runs_on_a_cpu(make_map, generator):
    merge_map, _ = make_map(LAYOUT, 50)
    tokens = torch.randn(2, 3, LAYOUT.sequence_length, 16, generator=generator)
    assert torch.equal(merge_tokens(tokens, merge_map), merge_tokens_torch(tokens, merge_map))
    assert isinstance(merge_map, MergeMap)
