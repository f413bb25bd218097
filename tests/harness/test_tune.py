"""Calibration: what is measured, what is chosen, what the file says, and what a stopped call leaves."""

import json

import pytest
import torch

from core import AttentionContext, DenoiserRecord, ParameterError, TokenLayout, create_strategy
from core.calibration import Calibration
from core.registry import installed
from core.testing import random_qkv
from harness import tune
from harness.recall import RecallProbe
from harness.tiny_model import build_tiny_pipeline
from harness.tuning import Measurement, ProbeStrategy, choose_values, relative_l1, sampled_steps

TINY = ["--model", "tiny-random", "--steps", "2", "--steps-measured", "2"]
SPEC = "sparge:block_size=64,key_block_size=64"


@pytest.fixture
def calibrated(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    assert tune.main(["--strategy", SPEC, "--prompts", "1", *TINY, "--output", str(path)]) == 0
    return path, capsys.readouterr().out


def test_relative_l1_is_the_definition():
    generator = torch.Generator().manual_seed(0)
    exact, output = torch.randn(2, 2, 3, 5, 4, generator=generator)
    expected = (output - exact).abs().sum((-1, -2)) / exact.abs().sum((-1, -2))
    assert torch.allclose(relative_l1(output, exact), expected.amax(0))
    assert relative_l1(exact * 0, exact * 0).tolist() == [0, 0, 0]


def test_steps_are_spread_over_the_sparse_part():
    assert sampled_steps(0, 8, 3) == [0, 4, 7]
    assert sampled_steps(5, 50, 4) == [5, 20, 34, 49]
    assert sampled_steps(2, 8, 1) == [2]
    assert sampled_steps(9, 8, 3) == [7]
    assert sampled_steps(6, 8, 5) == [6, 7]


def test_the_cheapest_value_within_the_bound_everywhere_is_chosen():
    measurements = [
        Measurement(0, 0, [[0.3, 0.9], [0.05, 0.5], [0.0, 0.2]]),
        Measurement(0, 1, [[0.1, 0.1], [0.06, 0.1], [0.0, 0.1]]),
        Measurement(1, 0, [[0.01, 0.3], [0.0, 0.05], [0.0, 0.0]]),
    ]
    values, errors = choose_values([0.2, 0.5, 1.0], measurements, 0.1)
    assert values == [[0.5, 1.0], [0.2, 0.5]]
    assert errors == [[0.06, 0.2], [0.01, 0.05]]


def test_probes_forget_what_their_candidates_keep():
    for probe in (ProbeStrategy, RecallProbe):
        candidate = create_strategy("gilbert-block", refresh_every=5)
        candidate._selected["layer"] = None
        probe([candidate], {0}).start_video()
        assert not candidate._selected, probe


def test_probe_is_dense_and_measures_only_its_steps():
    layout = TokenLayout(16, 4, 8, 10)
    tensors = random_qkv(layout)
    candidates = [create_strategy("sparge", block_size=64, topk=share) for share in (0.2, 1.0)]
    probe = ProbeStrategy(candidates, {1})
    for step in range(2):
        for layer in range(2):
            output = probe(*tensors, AttentionContext(layout, layer, 2, step, 2))
            assert torch.equal(output, torch.nn.functional.scaled_dot_product_attention(*tensors))
    measured = probe.measurements()
    assert [(entry.layer, entry.step) for entry in measured] == [(0, 1), (1, 1)]
    for entry in measured:
        assert min(entry.errors[0]) > 0.1 and max(entry.errors[1]) < 1e-5
    low, full = probe.mean_densities()
    assert 0.1 < low < 0.6 and full == 1


def test_two_calls_for_one_output_are_refused(tmp_path, capsys):
    path = tmp_path / "deep" / "sparge.json"
    arguments = ["--strategy", SPEC, "--prompts", "1", *TINY, "--output", str(path)]
    with tune._output_held(path):
        assert tune.main(arguments) == 2
    assert f"another calibration is written to {path}; wait for it" in capsys.readouterr().err
    assert not path.exists()


def planted_heads(layout, generator):
    """Head 0 looks at its own block, head 1 at the first block, head 2 at everything alike."""
    shape = (1, 3, layout.sequence_length, 64)
    query, key, value = torch.randn(3, *shape, generator=generator)
    directions = torch.randn(layout.sequence_length // 64, 64, generator=generator)
    directions = torch.nn.functional.normalize(directions, dim=-1)
    own = 16 * directions.repeat_interleave(64, 0)
    query[:, 0], key[:, 0] = 0.1 * query[:, 0] + own, 0.1 * key[:, 0] + own
    query[:, 1], key[:, 1, :64] = query[:, 1] + own[0], key[:, 1, :64] + own[0]
    query[:, 2] *= 1e-3
    return query, key, value


@pytest.mark.parametrize("knob", ["topk", "cdf"])
def test_planted_heads_keep_the_bound_on_new_inputs(knob):
    layout, generator = TokenLayout(0, 4, 16, 16), torch.Generator().manual_seed(0)
    values = installed().strategy("sparge").tunable[knob]
    blocks = {"block_size": 64, "key_block_size": 64}
    probe = ProbeStrategy([create_strategy("sparge", **blocks, **{knob: value}) for value in values], {0, 1})
    for step in range(2):
        probe(*planted_heads(layout, generator), AttentionContext(layout, step_index=step))
    chosen, errors = choose_values(values, probe.measurements(), 0.06)
    assert max(errors[0]) <= 0.06
    query, key, value = planted_heads(layout, generator)
    kept = []
    for head, number in enumerate(chosen[0]):
        inputs = [part[:, head : head + 1] for part in (query, key, value)]
        strategy = create_strategy("sparge", **blocks, **{knob: number})
        output = strategy(*inputs, AttentionContext(layout))
        exact = torch.nn.functional.scaled_dot_product_attention(*inputs)
        assert relative_l1(output, exact) <= 0.06
        kept.append(strategy.report().density)
    assert kept[0] < 0.15 and kept[1] < 0.15 and kept[2] > 0.9


def test_precision_and_skipping_belong_to_the_calibration(tmp_path):
    path = tmp_path / "tiny.json"
    spec = SPEC + ",quantization=int8_fp16,skip_threshold=20"
    assert tune.main(["--strategy", spec, "--prompts", "1", *TINY, "--output", str(path)]) == 0
    options = {"block_size": 64, "calibration": str(path)}
    create_strategy("sparge", quantization="int8_fp16", skip_threshold=20, **options)
    with pytest.raises(ParameterError, match="was made with quantization=int8_fp16, got auto"):
        create_strategy("sparge", skip_threshold=20, **options)
    with pytest.raises(ParameterError, match="was made with skip_threshold=20.0, got None"):
        create_strategy("sparge", quantization="int8_fp16", **options)


def test_every_parameter_that_was_set_is_in_the_file(tmp_path, capsys):
    path = tmp_path / "tiny.json"
    extra = {"order": "gilbert", "attention_sink": True, "similarity_threshold": 0.02, "projection": "pca"}
    spec = ",".join([SPEC, "directions=32", "backend=torch", *(f"{name}={extra[name]}" for name in extra)])
    assert tune.main(["--strategy", spec, "--prompts", "1", *TINY, "--output", str(path)]) == 0
    own = Calibration.load(path).parameters
    assert own.items() >= (extra | {"directions": 32, "block_size": 64}).items() and "backend" not in own
    printed = capsys.readouterr().out.split("use it with sparge:")[1]
    assert all(f"{name}={value}" in printed for name, value in extra.items())
    options = {"block_size": 64, "directions": 32, "calibration": str(path), **extra}
    create_strategy("sparge", **options)
    for name in extra:
        missing = {name, "directions"} if name == "projection" else {name}  # nothing else reads directions
        with pytest.raises(ParameterError, match=f"was made with ({'|'.join(missing)})="):
            create_strategy("sparge", **{key: value for key, value in options.items() if key not in missing})


def test_candidates_run_on_the_backend_of_the_spec(tmp_path):
    arguments = ["--strategy", SPEC + ",backend=torch", *TINY, "--output", str(tmp_path / "x.json")]
    candidate = tune._candidate(tune.parse_arguments(arguments), topk=0.5)
    assert candidate.parameters.backend == "torch" and candidate.parameters.topk == 0.5


def test_file_tells_what_was_measured_and_configures_the_strategy(calibrated):
    path, printed = calibrated
    calibration = Calibration.load(path)
    assert (calibration.strategy, [*calibration.values], calibration.model) == (
        "sparge",
        ["topk"],
        "tiny-random",
    )
    assert calibration.parameters["block_size"] == 64 and "topk" not in calibration.parameters
    assert calibration.size == (2, 2) and len(calibration.errors) == 2
    assert calibration.denoisers == [DenoiserRecord.of(build_tiny_pipeline().transformer)]
    assert all(error <= 0.06 for row in calibration.errors for error in row)
    assert set(calibration.held_out) >= {"prompt", "density", "mean_error", "largest_error"}
    assert calibration.held_out["prompt"] not in calibration.prompts
    assert (
        calibration.made["versions"]["torch"] == torch.__version__.split("+")[0] or calibration.made["device"]
    )
    assert (
        "held-out prompt: density" in printed
        and f"use it with sparge:block_size=64,calibration={path}" in printed
    )
    assert not path.with_name(path.name + ".progress").exists()

    layout = TokenLayout(**calibration.layout)
    query, key, _ = random_qkv(layout, heads=2)
    strategy = create_strategy("sparge", block_size=64, calibration=str(path))
    for layer, shares in enumerate(calibration.values["topk"]):
        context = AttentionContext(layout, layer, 2)
        alone = [
            create_strategy("sparge", block_size=64, topk=share).pattern(query, key, context).mask
            for share in shares
        ]
        together = strategy.pattern(query, key, context).mask.to_blocks()
        for head in range(2):
            assert torch.equal(together[:, head], alone[head].to_blocks()[:, head])


@pytest.mark.parametrize(
    "layout, layers, heads",
    [(TokenLayout(16, 3, 8, 9), 2, 2), (TokenLayout(16, 3, 8, 8), 3, 2), (TokenLayout(16, 3, 8, 8), 2, 4)],
    ids=["layout", "layers", "heads"],
)
def test_another_shape_is_refused(calibrated, layout, layers, heads):
    strategy = create_strategy("sparge", block_size=64, calibration=str(calibrated[0]))
    query, key, value = random_qkv(layout, heads=heads)
    with pytest.raises(
        ParameterError, match="the calibration is of tiny-random: 3x8x8 video .* run python -m harness.tune"
    ):
        strategy(query, key, value, AttentionContext(layout, 0, layers))


def test_other_parameters_and_broken_files_are_refused(calibrated, tmp_path):
    path = calibrated[0]
    with pytest.raises(ParameterError, match="was made with block_size=64, got 128"):
        create_strategy("sparge", calibration=str(path))
    with pytest.raises(ParameterError, match="cannot read calibration .*nothing.json"):
        create_strategy("sparge", calibration=str(tmp_path / "nothing.json"))
    values = json.loads(path.read_text())
    for change, message in (
        ({"values": {"topk": [[0.5]]}}, "tables of the same layers and heads"),
        ({"format": "x"}, "is not a calibration: format"),
        ({"strategy": "radial"}, "is for topk of strategy 'radial'"),
        ({"values": values["values"] | {"cdf": values["values"]["topk"]}}, "is for topk, cdf of strategy"),
        ({"values": {}}, "is not a calibration: values"),
        ({"version": 2}, "is not a calibration: version"),
    ):
        broken = tmp_path / "broken.json"
        broken.write_text(json.dumps(values | change))
        with pytest.raises(ParameterError, match=message):
            create_strategy("sparge", block_size=64, calibration=str(broken))
    broken.write_text("{")
    with pytest.raises(ParameterError, match="not JSON"):
        create_strategy("sparge", block_size=64, calibration=str(broken))


def test_a_stopped_call_goes_on(tmp_path, monkeypatch, capsys):
    path = tmp_path / "tiny.json"
    arguments = ["--strategy", SPEC, "--prompts", "2", *TINY, "--output", str(path)]
    original, prompts = tune.denoise, []

    def stop_at_the_second(model, strategy, prompt, seed):
        prompts.append(prompt)
        if len(prompts) == 2:
            raise KeyboardInterrupt
        return original(model, strategy, prompt, seed)

    monkeypatch.setattr(tune, "denoise", stop_at_the_second)
    assert tune.main(arguments) == 130 and not path.exists()
    progress = path.with_name(path.name + ".progress")
    progress.write_text(progress.read_text() + '{"torn')
    assert tune.main([*arguments, "--steps-measured", "1"]) == 2
    assert "belongs to a call with other settings" in capsys.readouterr().err
    assert tune.main(arguments) == 0
    assert "prompt 1 of 2: measured before" in capsys.readouterr().out
    assert prompts[1] == prompts[2] and len(prompts) == 4  # the second again, and the held-out one
    assert Calibration.load(path).prompts == prompts[:2]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--strategy", "radial"], "strategy 'radial' has no parameter that can be calibrated"),
        (["--strategy", "sparge", "--knob", "order"], "must be one of topk, cdf, got 'order'"),
        (["--strategy", "sparg"], "Did you mean 'sparge'"),
        (["--strategy", "sparge:topk=0.5"], "--strategy sets topk, which is what is searched"),
        (["--strategy", "sparge:density=0.4"], "--strategy sets density, which is what is searched"),
        (["--strategy", "sparge:preset=demo"], "--strategy sets density, which is what is searched"),
        (["--strategy", "sparge:preset=topk"], "--strategy sets topk, which is what is searched"),
        (["--strategy", "sparge:preset=calibrated"], "--strategy sets calibration, which is what is"),
        (["--strategy", "sparge", "--prompts", "0"], "--prompts must be at least 1"),
        (["--strategy", "sparge", "--max-error", "0"], "--max-error must be above 0"),
        (["--strategy", "sparge", "--output", "x.pt"], "--output must end in .json"),
    ],
    ids=str,
)
def test_wrong_arguments(arguments, message, capsys, tmp_path):
    given = arguments if "--output" in arguments else [*arguments, "--output", str(tmp_path / "x.json")]
    assert tune.main([*given, "--model", "tiny-random"]) == 2
    assert message in capsys.readouterr().err
