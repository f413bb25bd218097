"""Composition of strategies: what is measured, what is chosen, what the files say, what a stop leaves."""

import itertools
import json
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch

from core import AttentionContext, DenoiserRecord, TokenLayout, create_strategy
from core.assignment import Candidate, HeadAssignment
from core.testing import random_qkv, tiny_call, tiny_transformer
from harness import compose, composition_runs
from harness.composing import (
    CandidateProbe,
    Disturbance,
    Tables,
    Trial,
    cheapest_choice,
    chosen,
    factors,
    gains,
    projection_weights,
    range_starts,
    range_steps,
    residual_error,
    summarise,
)
from harness.errors import BenchError
from harness.replay import RecordedDenoiser
from harness.run_folder import locked
from harness.tiny_model import build_tiny_pipeline
from harness.tuning import relative_l1

TINY = ["--model", "tiny-random", "--steps", "2", "--held-out", "1", "--cost", "density"]
CANDIDATES = ["--candidates", "sparge:block_size=64,topk=0.3", "svg-smart:variant=frames,block_size=64"]


def arguments(folder, *more):
    return [*CANDIDATES, *TINY, *more, "--output", str(folder)]


@pytest.fixture(scope="module")
def composed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("composed")
    assert compose.main(arguments(folder, "--budgets", "0.005", "0.02")) == 0
    return folder


def test_ranges_cover_the_schedule():
    assert range_starts(8, 4) == [0, 2, 4, 6] and range_starts(3, 8) == [0, 1, 2]
    for steps, count in ((50, 8), (7, 3), (1, 1)):
        parts = range_steps(range_starts(steps, count), steps)
        assert list(itertools.chain(*parts)) == list(range(steps)) and all(len(part) for part in parts)


def test_residual_error_is_that_of_the_projected_head():
    generator = torch.Generator().manual_seed(0)
    output, exact = torch.randn(2, 2, 3, 5, 4, generator=generator)
    projection = torch.randn(7, 12, generator=generator)
    weight = projection_weights(projection, 3)
    for head in range(3):
        alone = torch.zeros(2, 3, 5, 4)
        alone[:, head] = (output - exact)[:, head]
        projected = alone.transpose(1, 2).flatten(2) @ projection.T
        assert torch.allclose(
            residual_error(output, exact, weight)[head], projected.square().sum(), rtol=1e-5
        )


def test_probe_is_dense_and_tries_every_candidate_at_every_call():
    layout = TokenLayout(16, 4, 8, 10)
    candidates = [create_strategy("sparge", block_size=64, topk=share) for share in (0.2, 1.0)]
    weights = [torch.eye(64).expand(2, 64, 64)] * 2
    probe = CandidateProbe(candidates, weights)
    for step, layer in itertools.product(range(2), range(2)):
        tensors, context = random_qkv(layout), AttentionContext(layout, layer, 2, step, 2)
        exact = torch.nn.functional.scaled_dot_product_attention(*tensors)
        assert torch.equal(probe(*tensors, context), exact)
        cheap = candidates[0].attend(*tensors, context)
        trial = probe.trials()[-2]
        assert trial[:4] == (step, layer, 0, pytest.approx(float(cheap.density))) and trial.time_ms > 0
        assert trial.errors == relative_l1(cheap.output, exact).tolist()
        assert trial.damages == pytest.approx((cheap.output - exact).square().sum((0, 2, 3)).tolist())
    assert len(probe.trials()) == 8 and max(probe.trials()[-1].errors) < 1e-5


def test_only_the_disturbed_steps_differ():
    layout = TokenLayout(5, 3, 7, 9)
    candidate = create_strategy("radial", block_size=64)
    strategy = Disturbance(candidate, range(1, 3))
    for step, layer in itertools.product(range(4), range(2)):
        tensors, context = random_qkv(layout), AttentionContext(layout, layer, 2, step, 4)
        exact = torch.nn.functional.scaled_dot_product_attention(*tensors)
        disturbed = candidate.attend(*tensors, context).output
        assert torch.equal(strategy(*tensors, context), disturbed if step in (1, 2) else exact)


@torch.no_grad()
def test_replayed_calls_give_the_recorded_outputs_and_later_ones_new_ones():
    transformer = tiny_transformer()
    calls = [tiny_call(transformer, seed=seed) for seed in range(4)]
    plain = [transformer(**call, return_dict=False)[0] for call in calls]
    recorder = RecordedDenoiser(transformer)
    with recorder.recorded():
        recorded = [transformer(**call, return_dict=False)[0] for call in calls]
    with recorder.replayed(0.5):
        replayed = [transformer(**calls[0], return_dict=False)[0] for _ in range(4)]
    assert all(torch.equal(one, other) for one, other in zip(plain, recorded, strict=True))
    assert [torch.equal(replayed[place], plain[place]) for place in range(4)] == [True, True, False, False]
    assert torch.equal(replayed[2], plain[0]) and "forward" not in transformer.__dict__


def trial(step, layer, candidate, scale, density=0.5, time_ms=1.0):
    return Trial(step, layer, candidate, density, time_ms, [scale, 2 * scale], [3 * scale, 4 * scale])


def test_summary_averages_prompts_and_steps_and_sums_squares_over_steps():
    trials = [
        trial(step, layer, candidate, 10.0 * step + layer + 0.1 * candidate + prompt, 0.1 * step, 1 + prompt)
        for prompt in range(3)
        for step in range(4)
        for layer in range(2)
        for candidate in range(2)
    ]
    tables = summarise(trials, [range(0, 1), range(1, 4)], prompts=3)
    assert tables.errors.shape == (2, 2, 2, 2) and tables.densities.shape == (2, 2, 2)
    assert tables.errors[1, 1, 1, 1].item() == pytest.approx(2 * (20 + 1 + 0.1 + 1))
    assert tables.damages[1, 0, 0, 1].item() == pytest.approx(3 * 3 * (20 + 0.1 + 1))
    assert tables.densities[:, 0, 0].tolist() == pytest.approx([0, 0.2])
    assert tables.times_ms.tolist() == [2, 2]


def test_halves_of_guidance_in_calls_of_their_own_add_up_as_they_do_in_one_batch():
    scales = torch.rand(2, 3, 4, dtype=torch.float64).tolist()  # halves, prompts, steps
    apart = [trial(step, 0, 0, own[step]) for half in scales for own in half for step in range(4)]
    tables = summarise(apart, [range(0, 4)], prompts=3)
    damage = 3 * sum(sum(own) for half in scales for own in half) / 3
    assert tables.damages[0, 0, 0, 0].item() == pytest.approx(damage)
    assert tables.errors[0, 0, 1, 0].item() == pytest.approx(2 * torch.tensor(scales).mean().item())
    assert tables.densities.shape == (1, 1, 1) and tables.times_ms.tolist() == [1.0]


def test_gains_and_factors_foretell_what_was_measured():
    generator = torch.Generator().manual_seed(0)
    damages = torch.rand(3, 4, 2, 3, generator=generator, dtype=torch.float64)
    damages[..., 0] = 0
    tables = Tables(damages.sqrt(), damages, torch.ones(3, 4, 3), torch.ones(3))
    true_gain = torch.rand(3, generator=generator, dtype=torch.float64)
    gain = gains(true_gain * damages[..., 2].sum((1, 2)), tables, 2)
    assert torch.allclose(gain, true_gain)
    with pytest.raises(BenchError, match="does not differ from dense attention in every range"):
        gains(true_gain, tables, 0)
    whole = (damages.sum((1, 2)) * gain[:, None]).sum(0) * torch.tensor([1.0, 4.0, 0.5])
    assert torch.allclose(factors(whole, tables, gain), torch.tensor([1.0, 4.0, 0.5], dtype=torch.float64))


def test_the_choice_is_within_the_budget_and_no_other_is_cheaper_and_better():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        costs = torch.rand(1, 2, 3, generator=generator, dtype=torch.float64)
        damages = torch.rand(1, 2, 2, 3, generator=generator, dtype=torch.float64)
        costs[..., 0], damages[..., 0] = 1, 0
        budget = 0.7
        choices = cheapest_choice(costs, damages, budget)
        cost, damage = chosen(costs, choices).sum(), chosen(damages, choices).sum()
        assert damage <= budget**2
        for other in itertools.product(range(3), repeat=4):
            picks = torch.tensor(other).view(1, 2, 2)
            cheaper = chosen(costs, picks).sum() < cost - 1e-9
            assert not (cheaper and chosen(damages, picks).sum() <= damage)
    assert cheapest_choice(costs, damages, 1e-9).eq(0).all()
    assert chosen(costs, cheapest_choice(costs, damages, 1e9)).sum() == costs.amin(-1).sum() * 2


def test_files_say_what_was_chosen_and_configure_the_strategy(composed):
    assignments = [HeadAssignment.load(composed / name) for name in ("0.005.json", "0.02.json")]
    for assignment in assignments:
        assert (assignment.size, assignment.first_steps, assignment.num_steps) == ((2, 2), [0, 1], 2)
        assert assignment.predicted["error"] <= assignment.budget and assignment.model == "tiny-random"
        assert assignment.denoisers == [DenoiserRecord.of(build_tiny_pipeline().transformer)]
        assert assignment.made["command"].startswith("python -m harness.compose --candidates sparge:")
        named = {index for layers in assignment.choices for heads in layers for index in heads}
        assert named == set(range(len(assignment.candidates)))
        result = assignment.held_out[0]
        assert result["prompt"] not in assignment.prompts and result["psnr_db"] > 20
        assert 0 < result["error"] < 3 * assignment.budget and 0 < result["density"] <= 1
    assert assignments[0].predicted["cost"] >= assignments[1].predicted["cost"]

    layout = TokenLayout(**assignments[1].layout)
    tensors = random_qkv(layout)
    strategy = create_strategy("combined", assignment=str(composed / "0.02.json"))
    output = strategy(*tensors, AttentionContext(layout, 1, 2, 1, 2))
    for head, choice in enumerate(assignments[1].choices[1][1]):
        candidate = assignments[1].candidates[choice]
        alone = create_strategy(candidate.strategy, **candidate.parameters)
        part = [tensor[:, head : head + 1] for tensor in tensors]
        expected = alone.attend(*part, AttentionContext(layout, 1, 2, 1, 2)).output
        assert torch.allclose(output[:, head : head + 1], expected, atol=1e-6)


def test_other_budgets_and_costs_need_no_new_measurements(composed, capsys):
    before = (composed / "measurements.jsonl").read_text()
    assert compose.main(arguments(composed, "--budgets", "0.01", "--cost", "time")) == 0
    assert (composed / "measurements.jsonl").read_text() == before
    assert " whole video" not in capsys.readouterr().out
    assert HeadAssignment.load(composed / "0.01.json").cost == "time"


def test_damages_of_a_candidate_add_up_to_what_its_whole_video_shows(composed, monkeypatch):
    seen, original = [], compose.measure
    monkeypatch.setattr(compose, "measure", lambda *given: seen.append(original(*given)) or seen[-1])
    assert compose.main(arguments(composed, "--budgets", "0.01")) == 0
    foretold, whole = seen[0].damages.sum((0, 1, 2)), seen[0].whole
    assert foretold[0] == whole[0] == 0 and whole[1:].min() > 0
    assert torch.allclose(foretold[1:], whole[1:])


@pytest.mark.parametrize("cost, chosen_label", [("time", "quick"), ("density", "sparse")])
def test_the_cheapest_by_the_cost_that_was_asked_for(cost, chosen_label):
    labels = ("dense", "quick", "sparse")
    shape = (1, 2, 2, 3)
    damages = torch.tensor([0.0, 1e-4, 1e-4], dtype=torch.float64).expand(shape)
    densities = torch.tensor([1.0, 0.9, 0.1], dtype=torch.float64).expand(1, 2, 3)
    tables = Tables(damages.sqrt(), damages, densities, torch.tensor([4.0, 1.0, 3.0], dtype=torch.float64))
    facts = {"layout": asdict(TokenLayout(0, 1, 2, 2)), "head_dim": 64}
    measured = composition_runs.Measured(tables, damages, torch.zeros(3, dtype=torch.float64), facts)
    config = SimpleNamespace(
        candidates=[Candidate(label=label, strategy="dense", parameters={}) for label in labels],
        cost=cost,
        prompts=["p"],
    )
    model = SimpleNamespace(name="m", records=None, settings=SimpleNamespace(steps=1))
    assignment = compose._assign(config, model, [0], measured, 0.5, {})
    assert [one.label for one in assignment.candidates] == [chosen_label]
    assert assignment.predicted["cost"] == {"time": 0.25, "density": 0.1}[cost]


def test_an_added_candidate_is_measured_beside_the_known_ones(composed, capsys):
    before = (composed / "measurements.jsonl").read_text()
    given = arguments(composed, "--budgets", "0.03")
    given.insert(len(CANDIDATES), "radial:block_size=64")
    assert compose.main(given) == 0
    added = (composed / "measurements.jsonl").read_text().removeprefix(before).splitlines()
    keys = [json.loads(line)["key"] for line in added]
    assert [key[:2] for key in keys] == [
        [kind, "radial:block_size=64"] for kind in ("candidate", "whole video")
    ]
    assert " 1 candidates" in capsys.readouterr().out


def test_a_stopped_call_goes_on(tmp_path, monkeypatch, capsys):
    original, calls = composition_runs.denoise, []

    def stop_at_the_fourth(*call):
        calls.append(call)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return original(*call)

    monkeypatch.setattr(composition_runs, "denoise", stop_at_the_fourth)
    assert compose.main(arguments(tmp_path)) == 130 and not list(tmp_path.glob("*.json"))
    journal = tmp_path / "measurements.jsonl"
    kept = journal.read_text()
    assert len(kept.splitlines()) == 5  # settings, three candidates and one disturbed range
    journal.write_text(kept + '{"torn')
    assert compose.main(arguments(tmp_path, "--steps", "3")) == 2
    assert "holds measurements with other settings" in capsys.readouterr().err
    assert compose.main(arguments(tmp_path, "--budgets", "0.02")) == 0
    assert journal.read_text().startswith(kept) and '{"torn' not in journal.read_text()
    assert capsys.readouterr().out.count("disturbed") == 1 and (tmp_path / "0.02.json").exists()


def test_a_folder_in_use_is_refused(tmp_path, capsys):
    with locked(tmp_path / ".lock", "held"):
        assert compose.main(arguments(tmp_path)) == 2
    assert "another composition is running in" in capsys.readouterr().err


def test_a_journal_of_other_settings_is_kept(tmp_path):
    journal = composition_runs.Journal(tmp_path / "j", {"a": 1})
    assert journal.get(("k", 1), lambda: 5) == 5
    text = (tmp_path / "j").read_text()
    with pytest.raises(BenchError, match="other settings"):
        composition_runs.Journal(tmp_path / "j", {"a": 2})
    assert (tmp_path / "j").read_text() == text
    assert composition_runs.Journal(tmp_path / "j", {"a": 1}).get(("k", 1), lambda: 6) == 5
    assert json.loads(text.splitlines()[1]) == {"key": ["k", 1], "value": 5}


@pytest.mark.parametrize(
    "given, message",
    [
        (["--candidates", "sparg"], "Did you mean 'sparge'"),
        (["--candidates", "dense"], "--candidates names dense alone"),
        (["--candidates", "tome:metric=mean_k"], "tome:metric=mean_k has settings that belong to places"),
        (["--candidates", "radial:decay_factor=x"], "decay_factor"),
        (["--budgets", "0"], "--budgets must be above 0, got 0"),
        (["--prompts", "0"], "--prompts must be at least 1"),
        (["--step-ranges", "0"], "--step-ranges must be at least 1"),
        (["--held-out", "-1"], "--held-out must be at least 0"),
        (["--prompts", "1000"], "--prompts and --held-out need 1001 prompts"),
        (["--cost", "money"], "cost"),
    ],
    ids=str,
)
def test_wrong_arguments(given, message, capsys, tmp_path):
    assert compose.main([*arguments(tmp_path), *given]) == 2
    assert message in capsys.readouterr().err
