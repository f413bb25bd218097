"""Composition: every head as its candidate alone would run it, whatever stands beside it."""

from dataclasses import asdict

import pytest
import torch

from core import (
    AttentionContext,
    ParameterError,
    StrategyNotFoundError,
    TokenLayout,
    UnsupportedCallError,
    apply_strategy,
    create_strategy,
)
from core.assignment import Candidate, HeadAssignment
from core.testing import random_qkv, tiny_transformer
from plugins.combined.composition import FOLDER, Composition, load_composition
from plugins.combined.presets import PRESETS

LAYOUT = TokenLayout(5, 3, 7, 9)
CANDIDATES = {
    "dense": {},
    "radial": {"block_size": 64},
    "sparge": {"block_size": 64, "topk": 0.4},
    "svg-smart": {"variant": "frames", "block_size": 64, "refresh_every": 4},
    "tome": {"ratio": 0.3},
}
CHOICES = [[[0, 1, 2, 3], [4, 2, 4, 2]], [[3, 3, 3, 3], [1, 0, 0, 1]]]


def make_assignment(choices=CHOICES, candidates=CANDIDATES):
    table = [[[0.5] * len(heads) for heads in layers] for layers in choices]
    return HeadAssignment(
        candidates=[
            Candidate(label=name, strategy=name, parameters=parameters)
            for name, parameters in candidates.items()
        ],
        first_steps=list(range(0, 2 * len(choices), 2)),
        num_steps=2 * len(choices),
        choices=choices,
        model="tiny",
        layout=asdict(LAYOUT),
        head_dim=64,
        budget=0.1,
        cost="time",
        costs=table,
        errors=table,
    )


def place(layer=0, step=0):
    return AttentionContext(LAYOUT, layer, 2, step, 4)


@pytest.fixture
def strategy(tmp_path):
    make_assignment().save(tmp_path / "a.json")
    return create_strategy("combined", assignment=str(tmp_path / "a.json"))


@pytest.mark.parametrize("batch", [1, 2])
def test_every_head_is_what_its_candidate_gives_alone(strategy, batch):
    alone = [
        [create_strategy(name, **parameters) for name, parameters in CANDIDATES.items()] for _ in CHOICES
    ]
    for step in range(4):
        for layer in range(2):
            tensors, context = random_qkv(LAYOUT, heads=4, batch=batch), place(layer, step)
            output = strategy(*tensors, context)
            choices = CHOICES[step // 2][layer]
            densities = 0.0
            for candidate in set(choices):
                heads = [head for head, choice in enumerate(choices) if choice == candidate]
                part = [tensor[:, heads] for tensor in tensors]
                expected = alone[step // 2][candidate].attend(*part, context)
                assert torch.equal(output[:, heads], expected.output)
                name = list(CANDIDATES)[candidate]
                if name != "svg-smart" or step % 2 == 0:  # which has judged the heads of another call before
                    whole = create_strategy(name, **CANDIDATES[name]).attend(*tensors, context)
                    assert torch.allclose(output[:, heads], whole.output[:, heads], atol=1e-5)
                densities += float(expected.density) * len(heads) / 4
            assert strategy.report().density_by_layer[layer][step] == pytest.approx(densities, abs=1e-6)


def test_the_report_says_who_ran_what(strategy):
    tensors = random_qkv(LAYOUT, heads=4)
    for step in (1, 2):
        for layer in range(2):
            strategy(*tensors, place(layer, step))
    report = strategy.report()
    assert report.shares_by_layer["tome"][1][1:] == [0.5, 0.0]
    assert report.shares_by_layer["svg-smart"][0][1:] == [0.25, 1.0]
    assert report.shares_by_layer["radial"][1][1:] == [0.0, 0.5]
    assert len(report.backends) >= 2 and sum(report.backends.values()) == 4


def test_one_group_takes_the_tensors_as_they_are(monkeypatch):
    composition = Composition(make_assignment())
    tensors, seen = random_qkv(LAYOUT, heads=4), []
    only = composition.strategies[len(CANDIDATES) + 3]
    original = only.attend
    monkeypatch.setattr(only, "attend", lambda *call: seen.extend(call[:3]) or original(*call))
    composition.attend(*tensors, place(0, 2))
    assert all(one is other for one, other in zip(seen, tensors, strict=True))


def test_reset_reaches_every_candidate_of_every_range(strategy, monkeypatch):
    instances = strategy._composition.strategies
    assert len({id(one) for one in instances}) == len(CHOICES) * len(CANDIDATES)
    reset = []
    for one in instances:
        monkeypatch.setattr(one, "reset", lambda one=one: reset.append(one))
    strategy.start_video()
    assert reset == instances


def test_state_is_kept_within_a_range_only(strategy):
    """svg-smart judges its heads at the first call of a range and then goes by that judgement."""
    for step in (0, 1, 2, 3):
        strategy(*random_qkv(LAYOUT, heads=4), place(0, step))
    judged = [one._classes for one in strategy._composition.strategies if one.name == "svg-smart"]
    assert [[known.step for known in classes.values()] for classes in judged] == [[0], [2]]


def test_gradients_flow_where_every_candidate_has_them():
    candidates = {name: CANDIDATES[name] for name in ("dense", "radial", "sparge")}
    composition = Composition(make_assignment([[[0, 1, 2, 1], [0, 0, 0, 0]]], candidates))
    context = AttentionContext(LAYOUT, 0, 2, 0, 2)
    tensors = [part.requires_grad_() for part in random_qkv(LAYOUT, heads=4)]
    slope = torch.randn(tensors[0].shape, generator=torch.Generator().manual_seed(0))
    together = torch.autograd.grad((composition.attend(*tensors, context).output * slope).sum(), tensors)
    for name, heads in (("dense", [0]), ("radial", [1, 3]), ("sparge", [2])):
        part = [tensor.detach()[:, heads].requires_grad_() for tensor in tensors]
        output = create_strategy(name, **CANDIDATES[name]).attend(*part, context).output
        alone = torch.autograd.grad((output * slope[:, heads]).sum(), part)
        for whole, own in zip(together, alone, strict=True):
            assert torch.allclose(whole[:, heads], own, atol=1e-6)


def test_what_a_candidate_does_not_support_is_refused(strategy):
    query, key, value = random_qkv(LAYOUT, heads=4)
    with pytest.raises(UnsupportedCallError, match="strategy 'tome' has no backward pass"):
        strategy(query.requires_grad_(), key, value, place())
    with pytest.raises(UnsupportedCallError, match="no GQA"):
        strategy(query.detach(), key[:, :2], value[:, :2], place())


def test_warm_up_and_shape_are_checked_as_ever(tmp_path):
    make_assignment().save(tmp_path / "a.json")
    strategy = create_strategy("combined", assignment=str(tmp_path / "a.json"), dense_timesteps=1)
    tensors = random_qkv(LAYOUT, heads=4)
    exact = torch.nn.functional.scaled_dot_product_attention(*tensors)
    assert torch.equal(strategy(*tensors, place()), exact)
    for step in (0, 1):
        with pytest.raises(
            ParameterError, match="the assignment is of tiny: .* run python -m harness.compose"
        ):
            strategy(*random_qkv(LAYOUT, heads=2), place(0, step))
    with pytest.raises(ParameterError, match="this model has 2 layers of 2 heads"):
        apply_strategy(tiny_transformer(), strategy)


def test_a_missing_strategy_a_wrong_parameter_and_an_assignment_in_itself_are_refused(tmp_path):
    path = tmp_path / "a.json"
    for candidates, error, message in (
        ({"dense": {}, "no-such": {}}, StrategyNotFoundError, "no strategy is called 'no-such'"),
        ({"dense": {}, "radial": {"widht": 1}}, ParameterError, "unknown parameter 'widht'"),
        ({"dense": {}, "combined": {"assignment": "demo"}}, ParameterError, "combined, an assignment itself"),
    ):
        make_assignment([[[0, 1]]], candidates).save(path)
        with pytest.raises(error, match=message):
            create_strategy("combined", assignment=str(path))
    with pytest.raises(ParameterError, match="cannot read assignment .*nothing"):
        create_strategy("combined", assignment="nothing")


@pytest.mark.parametrize(
    "name, parameters",
    [
        ("sliding-tile", {"block_size": 64, "tile": (2, 3, 4), "heads": ((1, 3, 1), (3, 1, 1))}),
        ("sparge", {"calibration": "demo", "block_size": 64, "order": "gilbert"}),
        ("tome", {"ratio": 0.2, "metric": "mean_k"}),
    ],
)
def test_what_tells_heads_apart_runs_all_or_none(name, parameters):
    with pytest.raises(ParameterError, match=f"candidate {name} has settings that belong to places"):
        Composition(make_assignment([[[0, 1]]], {"dense": {}, name: parameters}))
    with pytest.raises(ParameterError, match=f"sparse={name}, .* has settings that belong to places"):
        create_strategy("combined", sparse=name, sparse_options=parameters)
    assert create_strategy("combined", classes="sparse", sparse=name, sparse_options=parameters)


def test_parameters_beside_an_assignment_are_refused():
    with pytest.raises(ParameterError, match="so anchors, form would be ignored"):
        create_strategy("combined", assignment="demo", anchors=2, form="anchors")
    assert create_strategy("combined", preset="demo", dense_timesteps=1, nan_guard="off")


def test_every_registered_strategy_can_be_a_candidate():
    parameters = {name: create_strategy(name, **given).parameters for name, given in CANDIDATES.items()}
    for name, given in parameters.items():
        assert create_strategy(name, **given.model_dump(mode="json")).parameters == given


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.json")), ids=lambda path: path.stem)
def test_shipped_assignments_load_and_have_a_preset(path):
    assignment = load_composition(path.stem).assignment
    assert assignment.model == "demo" and assignment.size == (8, 4) and assignment.held_out
    assert not {one["prompt"] for one in assignment.held_out} & set(assignment.prompts)
    assert any(preset.parameters.get("assignment") == path.stem for preset in PRESETS)
