import pytest
import torch

from core import TokenLayout
from core.testing import dense_fp64
from plugins.combined import reference
from plugins.combined.anchors import LEAST_MASS, Anchors, anchor_blend, anchor_frames, attend_by_anchors
from plugins.combined.columns import ColumnOptions, attend_by_columns, bounded
from plugins.combined.frame_attention import (
    Heads,
    TextAttention,
    attend_text_queries,
    attention_with_lse,
    mix,
)
from plugins.combined.frame_tables import FrameTables, frame_tables

LAYOUTS = (
    TokenLayout(7, 5, 4, 6),
    TokenLayout(0, 6, 5, 5),
    TokenLayout(9, 3, 7, 19, text_first=False),
    TokenLayout(2, 1, 3, 5),
    TokenLayout(3, 7, 1, 1),
    TokenLayout(4, 2, 1, 129),
)
OPTIONS = ColumnOptions(exact_mass=0.1, bounds=(0.05, 100.0), text_bounds=(0.01, 100.0))
FORMS = ("columns", "anchors-1", "anchors-2", "anchors-4")


def make_heads(layout, generator, device, *, heads=3, dim=64, spread=0.8):
    """Heads whose frames look at their own neighbourhood, so that masses differ; strided as in a model."""
    parts = torch.randn(3, layout.sequence_length, heads, dim, generator=generator).to(device)
    ramp = torch.linspace(-2, 2, layout.frames, device=device).repeat_interleave(layout.tokens_per_frame)
    parts[:2, layout.video_slice, :, 0] += 4 * ramp[:, None]
    parts[:2] *= spread
    return Heads(*(part.transpose(0, 1) for part in parts), layout)


def position_only(layout, generator, device):
    """Heads whose queries and keys are the same in every frame; values differ."""
    heads = make_heads(layout, generator, device)
    for part in heads[:2]:
        frame = part[:, layout.video_start : layout.video_start + layout.tokens_per_frame].clone()
        part[:, layout.video_slice] = frame.repeat(1, layout.frames, 1)
    return heads


def exact_tables(heads):
    places = torch.arange(heads.layout.tokens_per_frame, device=heads.query.device)
    return frame_tables(heads.query, heads.key, heads.layout, places)


def by_form(form, heads, tables):
    if form == "columns":
        return attend_by_columns(heads, tables, OPTIONS)[0].flatten(1, 2)
    return by_anchors(heads, tables, int(form[-1]), 0.0)


def by_anchors(heads, tables, count, exact_rows):
    anchors = Anchors.spread(heads.layout.frames, count, heads.query.device)
    return attend_by_anchors(heads, tables, anchors, exact_rows).flatten(1, 2)


def dense_video(heads):
    return dense_fp64(*heads[:3])[:, heads.layout.video_slice]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_output_is_that_of_the_definition(layout, form, generator, device, poisoned_memory):
    heads = make_heads(layout, generator, device)
    sampled = torch.arange(0, layout.tokens_per_frame, 3, device=device)
    tables = frame_tables(heads.query, heads.key, layout, sampled)
    output = by_form(form, heads, tables)
    for head in range(3):
        parts = [part[head].cpu() for part in heads[:3]]
        masses = (tables.frames[head].cpu(), tables.text[head].cpu())
        if form == "columns":
            expected = reference.column_attention(*parts, layout, *masses, **OPTIONS._asdict())
        else:
            anchors = anchor_frames(layout.frames, int(form[-1]))
            expected = reference.anchor_attention(*parts, layout, *masses, anchors, LEAST_MASS)
        assert (output[head].cpu() - expected[layout.video_slice]).abs().max() < 2e-5


@pytest.mark.parametrize(
    "bounds, text_bounds", [((0.5, 2.0), (1e-6, 1e6)), ((1e-6, 1e6), (0.7, 1.3))], ids=str
)
def test_column_corrections_keep_their_bounds(bounds, text_bounds, generator, device):
    heads = make_heads(LAYOUTS[0], generator, device)
    tables = exact_tables(heads)
    options = OPTIONS._replace(bounds=bounds, text_bounds=text_bounds)
    output = attend_by_columns(heads, tables, options)[0].flatten(1, 2)
    free = attend_by_columns(heads, tables, OPTIONS._replace(bounds=(1e-6, 1e6), text_bounds=(1e-6, 1e6)))[0]
    assert (output - free.flatten(1, 2)).abs().max() > 1e-3, (
        "the bounds must bind for this test to mean something"
    )
    for head in range(3):
        parts = [part[head].cpu() for part in heads[:3]]
        masses = (tables.frames[head].cpu(), tables.text[head].cpu())
        expected = reference.column_attention(*parts, LAYOUTS[0], *masses, **options._asdict())
        assert (output[head].cpu() - expected[LAYOUTS[0].video_slice]).abs().max() < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_position_only_heads_are_exact(layout, form, generator, device):
    heads = position_only(layout, generator, device)
    error = by_form(form, heads, exact_tables(heads)) - dense_video(heads)
    assert error.abs().max() < 2e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_rows_sum_to_one(layout, form, generator, device):
    heads = make_heads(layout, generator, device)
    heads = heads._replace(value=torch.ones_like(heads.value))
    tables = frame_tables(heads.query, heads.key, layout, torch.zeros(1, dtype=torch.int64, device=device))
    assert (by_form(form, heads, tables) - 1).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("text_only", [False, True])
def test_mix_holds_weights_beyond_the_range_of_fp16(text_only, dtype, generator, device):
    """Factors of a row up to the places of a frame, weights up to the reciprocal of the least mass."""
    heads, patterns, places, frames, dim = 2, 5, 7, 3, 16
    outputs = (40 * torch.randn(heads, patterns, places, dim, generator=generator)).to(device, dtype)
    corrections = 1350 * torch.rand(heads, patterns, places, generator=generator).to(device) ** 4
    weights = 10 ** (9 * torch.rand(heads, frames, patterns, generator=generator) - 3).to(device)
    if text_only:
        weights[0, 1] = 0
    own = (40 * torch.randn(heads, frames, places, dim, generator=generator)).to(device, dtype)
    text = TextAttention(own, torch.zeros(heads, frames, places, device=device))
    share = 10 ** (9 * torch.rand(heads, frames, places, generator=generator) - 3).to(device)

    rows = torch.einsum("hfj,hjp->hfjp", weights.double(), corrections.double())
    expected = torch.einsum("hfjp,hjpd->hfpd", rows, outputs.double()) + share[..., None] * own.double()
    expected /= (rows.sum(2) + share)[..., None]
    mixed = mix(outputs, corrections, weights, text, share)
    tolerance = {torch.float16: 0.07, torch.bfloat16: 3.0, torch.float32: 1e-3}[dtype]  # of values to 160
    assert (mixed - expected).abs().max() < tolerance


@pytest.mark.parametrize("place", range(3))
def test_strided_inputs(place, generator, device):
    """The last dimension need not be contiguous."""
    parts = list(torch.randn(3, 1, 2, 32, 64, generator=generator).to(device))
    parts[place] = parts[place].mT.contiguous().mT
    output, lse = attention_with_lse(*parts)
    scores = parts[0].double() @ parts[1].double().mT / 8
    assert (output - dense_fp64(*parts)).abs().max() < 1e-5
    assert (lse - scores.logsumexp(-1)).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS, ids=TokenLayout.describe)
def test_text_queries_are_dense(layout, generator, device):
    heads = make_heads(layout, generator, device)
    if layout.text_length:
        expected = dense_fp64(*heads[:3])[:, layout.text_slice]
        assert (attend_text_queries(heads) - expected).abs().max() < 1e-5


@pytest.mark.parametrize("form", FORMS)
def test_one_frame_is_exact(form, generator, device):
    heads = make_heads(LAYOUTS[3], generator, device)
    tables = exact_tables(heads)
    assert (by_form(form, heads, tables) - dense_video(heads)).abs().max() < 1e-5


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=TokenLayout.describe)
def test_first_frame_is_exact_where_all_its_patterns_are_taken(layout, generator, device):
    heads = make_heads(layout, generator, device)
    options = OPTIONS._replace(exact_mass=0.0, text_bounds=(1e-6, 1e6))
    output, computed = attend_by_columns(heads, exact_tables(heads), options)
    expected = dense_video(heads)[:, : layout.tokens_per_frame]
    assert (output[:, 0] - expected).abs().max() < 1e-5
    assert not computed.any()


def test_patterns_are_computed_only_where_the_first_frame_does_not_serve(generator, device):
    heads = make_heads(LAYOUTS[0], generator, device)
    tables = exact_tables(heads)
    _, computed = attend_by_columns(heads, tables, OPTIONS)
    sources = tables.frames.argmax(1)
    assert torch.equal(computed, (tables.frames[:, 0] < 0.1) & (sources != 0))
    assert computed.any() and not computed.all()


@pytest.mark.parametrize("count", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=TokenLayout.describe)
def test_anchor_frames_are_exact(layout, count, generator, device):
    heads = make_heads(layout, generator, device)
    tables = frame_tables(heads.query, heads.key, layout, torch.arange(4, device=device))
    error = by_anchors(heads, tables, count, 0.0) - dense_video(heads)
    error = error.unflatten(1, (layout.frames, -1))
    anchors = anchor_frames(layout.frames, count)
    assert len(set(anchors)) == min(count, layout.frames)
    assert error[:, anchors].abs().max() < 1e-5
    assert error.abs().max() > 1e-2 or count >= layout.frames


@pytest.mark.parametrize("layout", LAYOUTS[:3], ids=TokenLayout.describe)
def test_queries_that_left_their_place_are_exact(layout, generator, device):
    """Heads alike from every frame but for a sixth of the queries: these attend exactly, and they alone."""
    heads = position_only(layout, generator, device)
    tables = exact_tables(heads)  # of the frames without the queries that leave
    anchors = anchor_frames(layout.frames, 2)
    moved = torch.rand(3, layout.frames, layout.tokens_per_frame, generator=generator).to(device) < 1 / 6
    moved[:, anchors] = False
    moved = moved.flatten(1)
    query = heads.query.clone()
    query[:, layout.video_slice] *= 1 - 2 * moved[..., None].float()
    heads = heads._replace(query=query)
    expected = dense_video(heads)
    errors = [by_anchors(heads, tables, 2, share) - expected for share in (0.0, 0.4, 1.0)]
    assert errors[0][moved].abs().max() > 1e-2
    assert errors[0][~moved].abs().max() < 2e-5
    assert errors[1].abs().max() < 2e-5
    assert errors[2].abs().max() < 1e-5


def test_frames_that_nobody_looks_at_leave_the_output_finite(generator, device):
    heads = make_heads(LAYOUTS[0], generator, device, spread=12.0)
    tables = exact_tables(heads)
    assert tables.frames.min() < 1e-12
    for form in FORMS:
        output = by_form(form, heads, tables)
        low, high = heads.value.amin(1, keepdim=True), heads.value.amax(1, keepdim=True)
        assert ((output >= low - 1e-4) & (output <= high + 1e-4)).all(), form


def test_sampled_masses_of_zero_leave_the_output_finite(generator, device):
    heads = make_heads(LAYOUTS[0], generator, device)
    exact = exact_tables(heads)
    frames = exact.frames.clone()
    frames[:, :, 2] = 0.0
    tables = FrameTables(frames, torch.zeros_like(exact.text), exact.similarity)
    assert all(torch.isfinite(by_form(form, heads, tables)).all() for form in FORMS)


@pytest.mark.parametrize(
    "frames, count, expected", [(17, 3, [2, 8, 14]), (11, 2, [2, 8]), (4, 9, [0, 1, 2, 3])]
)
def test_anchors_stand_in_the_middle_of_equal_parts(frames, count, expected):
    assert anchor_frames(frames, count) == expected
    blend = anchor_blend(frames, expected)
    assert torch.allclose(blend.sum(1), torch.ones(frames))
    assert torch.equal(blend[expected], torch.eye(len(expected)))


def test_frames_between_anchors_follow_the_nearer_one_more():
    blend = anchor_blend(8, [1, 5])
    assert blend[:, 1].tolist() == [0.0, 0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]


@pytest.mark.parametrize("low, high", [(0.05, 100.0), (0.5, 1.5), (0.9, 3.0), (0.01, 1.2)])
def test_bounding_is_that_of_the_definition(low, high, generator):
    rows = torch.rand(5, 40, generator=generator, dtype=torch.float64) ** 3
    rows[3] = 2.0
    rows[4] = torch.linspace(0.95, 1.05, 40)
    result = bounded(rows, (low, high))
    for row, got in zip(rows, result, strict=True):
        assert torch.allclose(got, torch.tensor(reference.bounded(row.tolist(), low, high)).double())
    assert torch.equal(result[3:], rows[3:])  # all equal, or inside
    mapped = (rows[:3].amin(-1) < low) | (rows[:3].amax(-1) > high)
    assert ((result[:3] >= low) & (result[:3] <= high))[mapped].all()


def test_bounding_keeps_the_sum_where_nothing_is_cut():
    row = torch.tensor([0.01, 1.0, 1.5, 1.49], dtype=torch.float64)
    result = bounded(row, (0.02, 10.0))
    assert float(result.sum()) == pytest.approx(4.0) or float(result.min()) == 0.02
    assert not torch.equal(result, row)


@pytest.mark.parametrize("shape", [(5, 3), (130, 129), (1, 1)])
def test_needed_problems_alone_are_computed(shape, generator, device):
    query = torch.randn(2, 3, shape[0], 16, generator=generator).to(device)
    key, value = torch.randn(2, 2, 3, shape[1], 16, generator=generator).to(device)
    needed = torch.tensor([[True, False, True], [False, False, True]], device=device)
    whole, whole_lse = attention_with_lse(query, key, value)
    output, lse = attention_with_lse(query, key, value, needed)
    assert (whole - dense_fp64(query, key, value)).abs().max() < 1e-5
    scores = query.double() @ key.double().mT / 4
    assert (whole_lse - scores.logsumexp(-1)).abs().max() < 1e-5
    assert torch.allclose(output[needed], whole[needed], atol=1e-5)
    assert torch.allclose(lse[needed], whole_lse[needed], atol=1e-5)
    assert not output[~needed].any() and lse[~needed].isneginf().all()
