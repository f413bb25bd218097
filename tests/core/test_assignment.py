"""HeadAssignment: the file, the steps that a call belongs to, and what is refused."""

import json
import re
from dataclasses import asdict

import pytest

from core import AttentionContext, DenoiserRecord, InstalledDenoiser, ParameterError, TokenLayout
from core.assignment import Candidate, HeadAssignment
from core.testing import random_qkv

LAYOUT = TokenLayout(4, 2, 3, 5)


def make_assignment(**changes):
    """Three layers of two heads in two ranges of eight steps, two candidates."""
    table = [[[0.25, 1.0]] * 3] * 2
    fields = {
        "candidates": [
            Candidate(label="dense", strategy="dense", parameters={}, time_ms=3.0, density=1.0),
            Candidate(label="radial:block_size=64", strategy="radial", parameters={"block_size": 64}),
        ],
        "first_steps": [0, 3],
        "num_steps": 8,
        "choices": [[[0, 1], [1, 1], [0, 0]], [[1, 1], [1, 0], [1, 1]]],
        "model": "tiny",
        "layout": asdict(LAYOUT),
        "head_dim": 64,
        "budget": 0.1,
        "cost": "density",
        "costs": table,
        "errors": table,
    }
    return HeadAssignment(**(fields | changes))


def test_the_file_says_the_same_with_a_row_of_numbers_on_a_line(tmp_path):
    path = tmp_path / "a.json"
    assignment = make_assignment(prompts=["[two words]", "a\nb"], predicted={"error": 0.1})
    assignment.save(path)
    assert HeadAssignment.load(path) == assignment
    assert re.search(r"^ +\[ 1, 0 ],?$", path.read_text(), re.MULTILINE)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "step, num_steps, expected",
    [(0, 8, 0), (2, 8, 0), (3, 8, 1), (0, 2, 0), (1, 2, 1), (18, 50, 0), (19, 50, 1), (2, None, 0)],
)
def test_a_call_belongs_to_the_range_of_its_place_in_the_schedule(step, num_steps, expected):
    context = AttentionContext(LAYOUT, 0, 3, step_index=step, num_steps=num_steps)
    assert make_assignment().step_range(context) == expected


@pytest.mark.parametrize(
    "layout, layers, heads, head_dim",
    [(TokenLayout(4, 2, 5, 3), 3, 2, 64), (LAYOUT, 4, 2, 64), (LAYOUT, 3, 4, 64), (LAYOUT, 3, 2, 32)],
    ids=["layout", "layers", "heads", "head_dim"],
)
def test_another_shape_is_refused(layout, layers, heads, head_dim):
    assignment = make_assignment()
    assignment.check_call(random_qkv(LAYOUT)[0], AttentionContext(LAYOUT, 0, 3))
    query = random_qkv(layout, heads=heads, head_dim=head_dim)[0]
    with pytest.raises(
        ParameterError, match="is of tiny: 2x3x5 video tokens, text first, 3 layers of 2 heads of 64; this"
    ):
        assignment.check_call(query, AttentionContext(layout, 0, layers))


def model_of(layers, heads):
    return [InstalledDenoiser(DenoiserRecord(kind="Denoiser", config={}), layers, heads, source=None)]


@pytest.mark.parametrize("layers, heads", [(4, 2), (3, 4), (4, None)], ids=str)
def test_a_model_of_other_sizes_is_refused(layers, heads):
    make_assignment().check_model(model_of(3, 2))
    make_assignment().check_model(model_of(3, None))
    with pytest.raises(
        ParameterError, match="of tiny, 3 layers of 2 heads; this model has .* harness.compose"
    ):
        make_assignment().check_model(model_of(layers, heads))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "sparse-attn-calibration"}, "not an assignment: format"),
        ({"version": 2}, "not an assignment: version"),
        ({"candidates": []}, "not an assignment: candidates"),
        ({"choices": [[[0, 2]] * 3] * 2}, "must lie in 0 to 1, the candidates"),
        ({"choices": [[[0, -1]] * 3] * 2}, "must lie in 0 to 1, the candidates"),
        ({"choices": [[[0, 1], [0]], [[0, 1], [0, 1]]]}, "full tables of one shape"),
        ({"errors": [[[0.1, 0.2]] * 2] * 2}, "full tables of one shape"),
        ({"first_steps": [0]}, "1 first_steps, but 2 step ranges"),
        ({"first_steps": [1, 3]}, "must rise from 0"),
        ({"first_steps": [0, 8]}, "to below num_steps 8"),
        ({"cost": "money"}, "not an assignment: cost"),
        ({"surprise": 1}, "not an assignment: surprise"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_broken_files_are_refused(change, message, tmp_path):
    path = tmp_path / "a.json"
    path.write_text(json.dumps(make_assignment().model_dump() | change))
    with pytest.raises(ParameterError, match=message):
        HeadAssignment.load(path)


def test_what_is_no_file_or_no_json_is_refused(tmp_path):
    with pytest.raises(ParameterError, match="cannot read assignment .*nothing.json"):
        HeadAssignment.load(tmp_path / "nothing.json")
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ParameterError, match="a.json is not an assignment: not JSON"):
        HeadAssignment.load(tmp_path / "a.json")
