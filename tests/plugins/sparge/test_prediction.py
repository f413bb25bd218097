import itertools

import pytest
import torch

from core import TokenLayout, UnsupportedCallError
from plugins.sparge.prediction import (
    causal_blocks,
    executed_density,
    forced_blocks,
    predict_mask,
)
from plugins.sparge.reference import block_map

BLOCK = (16, 32)


def tensors(queries=100, keys=180, heads=2, kv_heads=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = (
        torch.randn(2, count, length, 32, generator=generator, dtype=torch.float64).cumsum(2) * 0.2
        for count, length in ((heads, queries), (kv_heads, keys))
    )
    return query, key


@pytest.mark.parametrize("threshold", [None, 0.35, 0.6, 1.0])
@pytest.mark.parametrize(
    "rule", [{"topk": 0.3}, {"topk": 1.0}, {"topk": 0.01}, {"cdf": 0.7}, {"cdf": 1.0}], ids=str
)
def test_map_is_the_definition(rule, threshold):
    query, key = tensors()
    options = {"cdf": rule.get("cdf"), "top_k": rule.get("topk"), "similarity_threshold": threshold}
    kept = predict_mask(query, key, BLOCK, **options).to_blocks()
    for batch in range(2):
        for head in range(2):
            expected = block_map(
                query[batch, head],
                key[batch, head],
                BLOCK,
                similarity_threshold=-1.0 if threshold is None else threshold,
                **rule,
            )
            assert torch.equal(kept[batch, head], expected)
    if threshold == 1.0 or 1.0 in rule.values():
        assert kept.all()
    elif threshold is None:
        assert not kept.all()


@pytest.mark.parametrize("threshold", [None, 0.35, 1.0])
@pytest.mark.parametrize("rule", [{"topk": 0.2}, {"topk": 1.0}, {"cdf": 0.7}], ids=str)
@pytest.mark.parametrize("block_size", [BLOCK, (32, 16)], ids=str)
def test_causal_map_is_the_definition(rule, threshold, block_size):
    query, key = tensors(180, 180, heads=4)
    options = {"cdf": rule.get("cdf"), "top_k": rule.get("topk"), "similarity_threshold": threshold}
    mask = predict_mask(query, key, block_size, causal=True, **options)
    kept = mask.to_blocks()
    visible, _ = causal_blocks(180, block_size, query.device)
    for batch in range(2):
        for head in range(4):
            expected = block_map(
                query[batch, head],
                key[batch, head // 2],
                block_size,
                similarity_threshold=-1.0 if threshold is None else threshold,
                causal=True,
                **rule,
            )
            assert torch.equal(kept[batch, head], expected)
    assert not (kept & ~visible).any()
    density = float(executed_density(mask, causal=True))
    assert density == pytest.approx(float(kept.sum() / (8 * visible.sum())))
    assert (density == 1.0) == (rule == {"topk": 1.0} or threshold == 1.0)


def test_later_tokens_change_no_earlier_row_of_a_causal_map():
    query, key = tensors(256, 256, heads=2)
    later = slice(160, None)
    for rule in ({"top_k": 0.3}, {"cdf": 0.6}, {"cdf": 0.6, "similarity_threshold": 0.5}):
        plain = predict_mask(query, key, BLOCK, causal=True, **rule).to_blocks()
        changed = [part.clone() for part in (query, key)]
        for part in changed:
            part[:, :, later] *= -50
        moved = predict_mask(*changed, BLOCK, causal=True, **rule).to_blocks()
        assert torch.equal(plain[:, :, :10], moved[:, :, :10])
        assert not torch.equal(plain[:, :, 10:], moved[:, :, 10:])


def test_scale_sharpens_the_estimate():
    query, key = (0.3 * part for part in tensors())
    plain = predict_mask(query, key, BLOCK, cdf=0.7)
    assert torch.equal(
        predict_mask(4 * query, key, BLOCK, cdf=0.7).to_blocks(),
        (predict_mask(query, key, BLOCK, cdf=0.7, scale=4 * 32**-0.5).to_blocks()),
    )
    assert predict_mask(query, key, BLOCK, cdf=0.7, scale=4 * 32**-0.5).density() < plain.density()


def test_maps_are_nested():
    query, key = (0.3 * part for part in tensors())
    for name, values in (("top_k", (0.2, 0.4, 0.7, 1.0)), ("cdf", (0.3, 0.6, 0.9, 1.0))):
        maps = [predict_mask(query, key, BLOCK, **{name: value}).to_blocks() for value in values]
        for smaller, larger in itertools.pairwise(maps):
            assert not (smaller & ~larger).any() and (larger & ~smaller).any()


def test_a_shared_offset_of_the_keys_changes_nothing():
    query, key = tensors()
    offset = torch.randn(2, 2, 1, 32, dtype=torch.float64)
    for rule in ({"top_k": 0.3}, {"cdf": 0.7, "similarity_threshold": 0.5}):
        plain, moved = (predict_mask(query, part, BLOCK, **rule).to_blocks() for part in (key, key + offset))
        assert torch.equal(plain, moved)


def test_order_inside_blocks_is_irrelevant_and_key_blocks_permute():
    query, key = tensors(keys=192)
    rule = {"top_k": 0.3, "similarity_threshold": 0.5}
    kept = predict_mask(query, key, BLOCK, **rule).to_blocks()
    inside = key.unflatten(2, (-1, 32)).flip(3).flatten(2, 3)
    assert torch.equal(predict_mask(query, inside, BLOCK, **rule).to_blocks(), kept)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
    moved = key.unflatten(2, (-1, 32))[:, :, order].flatten(2, 3)
    assert torch.equal(predict_mask(query, moved, BLOCK, **rule).to_blocks(), kept[..., order])


def test_heads_have_their_own_numbers():
    query, key = tensors(heads=4)
    shares = torch.tensor([0.2, 0.4, 0.6, 1.0])
    together = predict_mask(query, key, BLOCK, top_k=shares).to_blocks()
    thresholds = torch.tensor([0.0, 0.5, 0.6, 1.0])
    gated = predict_mask(query, key, BLOCK, top_k=0.2, similarity_threshold=thresholds).to_blocks()
    for head in range(4):
        one = slice(head, head + 1)
        key_head = key[:, head // 2 : head // 2 + 1]
        alone = predict_mask(query[:, one], key_head, BLOCK, top_k=float(shares[head])).to_blocks()
        assert torch.equal(together[:, one], alone)
        alone = predict_mask(
            query[:, one], key_head, BLOCK, top_k=0.2, similarity_threshold=float(thresholds[head])
        )
        assert torch.equal(gated[:, one], alone.to_blocks())


@pytest.mark.parametrize("rule", [{"top_k": 0.3}, {"cdf": 0.7, "similarity_threshold": 0.35}], ids=str)
@pytest.mark.parametrize("projection", ["optimal", "pca", "channels", "random"])
def test_a_projection_compares_mean_tokens_in_few_dimensions(rule, projection):
    """All of the choice is in 4 channels, and an offset of the keys that no softmax sees is in the others."""
    query, key = tensors(heads=4)
    query[..., 4:], key[..., 4:] = 0.0, 3.0
    options = {"scale": 0.3, **rule}
    plain = predict_mask(query, key, BLOCK, **options).to_blocks()
    low = predict_mask(query, key, BLOCK, projection=projection, directions=8, **options).to_blocks()
    assert torch.equal(plain, low) == (projection != "random")
    whole = predict_mask(query, key, BLOCK, projection=projection, directions=32, **options).to_blocks()
    assert torch.equal(plain, whole)


def test_the_scale_is_that_of_all_dimensions():
    query, key = tensors()
    query[..., 4:] = 0.0
    masks = [predict_mask(query, key, BLOCK, cdf=0.7, projection=name) for name in ("none", "channels")]
    assert torch.equal(*(mask.to_blocks() for mask in masks))


def test_a_causal_choice_has_no_projection():
    query, key = tensors(180, 180)
    with pytest.raises(UnsupportedCallError, match="projection 'pca' does; leave projection at 'none'"):
        predict_mask(query, key, BLOCK, top_k=0.3, causal=True, projection="pca")


@pytest.mark.parametrize("text_first", [True, False])
def test_forced_blocks_hold_text_and_sink(text_first):
    layout = TokenLayout(20, 3, 5, 7, text_first)
    forced = forced_blocks(layout, (16, 32), sink=False)
    is_text = layout.token_frames() < 0
    rows = torch.stack([part.any() for part in is_text.split(16)])
    columns = torch.stack([part.any() for part in is_text.split(32)])
    assert torch.equal(forced, rows[:, None] | columns)
    assert forced_blocks(layout, (16, 32), sink=True)[:, 0].all()


@pytest.mark.parametrize("options", [{"top_k": 0.3}, {"cdf": 0.7, "similarity_threshold": 0.6}], ids=str)
def test_blocks_of_an_order_are_those_of_the_moved_tokens(options):
    query, key = tensors(queries=180)
    order = torch.randperm(180, generator=torch.Generator().manual_seed(1))
    moved = predict_mask(query[:, :, order], key[:, :, order], BLOCK, **options).to_blocks()
    for indices in (order, order.int()):
        assert torch.equal(predict_mask(query, key, BLOCK, order=indices, **options).to_blocks(), moved)
    assert not torch.equal(predict_mask(query, key, BLOCK, **options).to_blocks(), moved)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rule", [{"topk": 0.3}, {"cdf": 0.7}], ids=str)
def test_an_unlike_block_far_above_the_others_takes_no_part(rule, dtype, causal):
    """Its score is about 60 above the others, whose weights would all be rounded to 0 beside it."""
    generator = torch.Generator().manual_seed(0)
    direction = torch.nn.functional.normalize(
        torch.randn(32, generator=generator, dtype=torch.float64), dim=0
    )
    query, key = torch.randn(2, 1, 1, 320, 32, generator=generator, dtype=torch.float64)
    query = query + 6 * direction
    shared = 2 * torch.randn(10, 32, generator=generator, dtype=torch.float64).repeat_interleave(32, 0)
    key = shared + 0.3 * key
    key[:, :, :32] = 500 * torch.randn(32, 32, generator=generator, dtype=torch.float64)
    key[:, :, :32] += 60 * 32**0.5 / 6 * direction - key[:, :, :32].mean(2, keepdim=True)
    options = {"cdf": rule.get("cdf"), "top_k": rule.get("topk"), "similarity_threshold": 0.3}
    mask = predict_mask(query.to(dtype), key.to(dtype), BLOCK, causal=causal, **options)
    expected = block_map(query[0, 0], key[0, 0], BLOCK, similarity_threshold=0.3, causal=causal, **rule)
    assert torch.equal(mask.to_blocks()[0, 0], expected) and not expected.all()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", [{"top_k": 0.3}, {"cdf": 0.7}], ids=str)
def test_forced_blocks_take_no_part(rule, causal):
    """What else is kept does not depend on how high the scores of forced blocks are."""
    query, key = (0.2 * part.float() for part in tensors(384, 384))
    query[..., 0] = 10.0
    forced = torch.zeros(24, 12, dtype=torch.bool)
    forced[:, 0] = forced[3] = True
    masks = []
    for peak in (0.0, 60 * 32**0.5 / 10):
        key[:, :, :32, 0], key[:, :, 32:, 0] = peak, 0.0
        masks.append(predict_mask(query, key, BLOCK, forced=forced, causal=causal, **rule).to_blocks())
    assert torch.equal(*masks) and masks[0][..., 0].all()
    assert 4 <= masks[0][0, 0, -1].sum() < 12  # itself, the forced one, and some by choice


@pytest.mark.parametrize("causal", [False, True])
def test_a_block_with_a_nan_is_unlike(causal):
    query, key = tensors(192, 192, heads=1, kv_heads=1)
    rule = {"top_k": 0.2, "similarity_threshold": 0.1}
    plain = predict_mask(query, key, BLOCK, causal=causal, **rule).to_blocks()
    visible = causal_blocks(192, BLOCK, query.device)[0] | (not causal)
    query[0, 0, 16 * 9] = float("nan")
    expected = plain.clone()
    expected[0, 0, 9] = visible[9]
    assert not torch.equal(expected, plain)
    assert torch.equal(predict_mask(query, key, BLOCK, causal=causal, **rule).to_blocks(), expected)
    key[0, 0, 32] = float("nan")
    kept = predict_mask(query, key, BLOCK, causal=causal, **rule).to_blocks()
    assert torch.equal(kept[0, 0, :, 1], visible[:, 1])
    # Of a call that is not causal the mean of all keys is NaN, and every block differs from it.
    assert kept[0, 0, :, 2:].equal(visible[:, 2:]) != causal
    assert torch.equal(kept[1], plain[1])


def test_scale_sharpens_a_causal_estimate():
    query, key = (0.3 * part for part in tensors(192, 192))
    sharp = predict_mask(4 * query, key, BLOCK, cdf=0.7, causal=True).to_blocks()
    scaled = predict_mask(query, key, BLOCK, cdf=0.7, causal=True, scale=4 * 32**-0.5).to_blocks()
    assert torch.equal(sharp, scaled)
    assert not torch.equal(sharp, predict_mask(query, key, BLOCK, cdf=0.7, causal=True).to_blocks())
