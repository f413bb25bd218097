import pytest

from core import ParameterError, Preset, StrategyNotFoundError
from core.registry import installed
from harness.errors import BenchError
from harness.jobs import job_hash, make_jobs, parse_spec, resolve_specs, split_label


@pytest.fixture
def with_preset(monkeypatch):
    """A registered preset ``demo`` of dense."""
    preset = Preset("dense", "demo", {"backend": "sdpa"})
    registry = installed()
    monkeypatch.setattr(registry, "presets", lambda: [preset])
    monkeypatch.setattr(registry, "preset", lambda strategy, name: preset)


def test_a_bare_name():
    spec = parse_spec("dense")
    assert (spec.label, spec.name, spec.preset, spec.overrides) == ("dense", "dense", None, {})
    assert spec.parameters["backend"] == "auto"


def test_parameters_are_typed_and_complete():
    spec = parse_spec("radial: decay_factor=0.5, sink=false")
    assert spec.label == "radial:decay_factor=0.5,sink=false"
    assert spec.parameters["decay_factor"] == 0.5
    assert spec.parameters["sink"] is False
    assert "dense_layers" in spec.parameters
    assert spec.create().parameters.decay_factor == 0.5


def test_the_models_preset_is_taken_by_bare_names_only(with_preset):
    assert parse_spec("dense", ("no-such", "demo")).label == "dense:preset=demo"
    assert parse_spec("dense", ("no-such", "demo")).parameters["backend"] == "sdpa"
    assert parse_spec("dense:dense_layers=1", ("demo",)).preset is None
    assert parse_spec("dense:preset=none", ("demo",)).parameters["backend"] == "auto"


def test_the_baseline_keeps_its_defaults_whatever_presets_there_are(with_preset):
    specs, _ = resolve_specs(["dense"], ("demo",), "cpu")
    assert [spec.label for spec in specs] == ["dense", "dense:preset=demo"]


@pytest.mark.parametrize("text", ["radial:", "radial:sink", "radial:sink=", "radial:=1"])
def test_a_malformed_spec_is_refused(text):
    with pytest.raises(BenchError, match="expected name, name:preset=NAME or name:key=value"):
        parse_spec(text)


def test_unknown_names_and_values_are_refused():
    with pytest.raises(StrategyNotFoundError, match="no strategy is called 'radiall'"):
        parse_spec("radiall")
    with pytest.raises(StrategyNotFoundError, match="no preset of strategy 'dense' is called 'x'"):
        parse_spec("dense:preset=x")
    with pytest.raises(ParameterError, match="unknown parameter 'decay_faktor', did you mean 'decay_factor'"):
        parse_spec("radial:decay_faktor=1")


def test_dense_is_always_first_and_twins_run_once():
    specs, notes = resolve_specs(["radial", "dense:backend=auto", "radial"], (), "cpu")
    assert [spec.label for spec in specs] == ["dense", "radial"]
    assert notes == ["dense:backend=auto and dense are the same configuration; it runs once"]


def test_all_available_strategies_by_default():
    specs, _ = resolve_specs(None, (), "cpu")
    assert {"dense", "radial"} <= {spec.name for spec in specs}


def test_jobs_are_ordered_by_prompt_then_seed_then_strategy():
    specs, _ = resolve_specs(["radial"], (), "cpu")
    jobs = make_jobs(specs, ["p", "q"], [0, 1], {"model": "m"})
    order = [(job.prompt, job.seed, job.spec.label) for job in jobs]
    assert order[:4] == [("p", 0, "dense"), ("p", 0, "radial"), ("p", 1, "dense"), ("p", 1, "radial")]
    assert len({job.job_id for job in jobs}) == len(jobs) == 8


def test_a_job_id_depends_on_everything_that_identifies_the_job_and_nothing_else():
    def job_id(text="radial", prompt="p", seed=0, model="m"):
        specs, _ = resolve_specs([text], (), "cpu")
        return make_jobs(specs, [prompt], [seed], {"model": model})[-1].job_id

    assert job_id() == job_id() == job_id("radial:decay_factor=1.0")  # that is its default
    others = [job_id("radial:decay_factor=0.5"), job_id(prompt="q"), job_id(seed=1), job_id(model="n")]
    assert len({job_id(), *others}) == 5


def test_a_hash_does_not_depend_on_the_order():
    assert job_hash({"a": 1, "b": 2}) == job_hash({"b": 2, "a": 1})
    assert len(job_hash({})) == 12


def test_commas_within_brackets_belong_to_the_value():
    name, pairs = split_label("combined:sparse_options={bounds: [[0.1, 2], [1, 3]], topk: 0.2},places=32")
    assert name == "combined"
    assert pairs == {"sparse_options": "{bounds: [[0.1, 2], [1, 3]], topk: 0.2}", "places": "32"}
    with pytest.raises(BenchError, match="cannot read 'oops'"):
        split_label("radial:oops,block_size=64")


@pytest.mark.parametrize("again", ["decay_factor=2", "decay_factor=1", "decay_factor"])
def test_a_parameter_that_is_given_twice_is_named(again):
    with pytest.raises(BenchError, match="decay_factor is given twice; give it once"):
        split_label(f"radial:decay_factor=1,block_size=64,{again}")


def test_off_is_a_word_and_true_is_a_bool():
    overrides = parse_spec("radial:nan_guard=off,sink=true").overrides
    assert overrides == {"nan_guard": "off", "sink": True}
    assert parse_spec("radial:sink=no").parameters["sink"] is False
