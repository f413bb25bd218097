import re
import sys
import textwrap
from importlib.metadata import EntryPoint

import pytest

from core import PluginConflictError, Registry, StrategyNotFoundError, available_strategies, create_strategy
from core.hookspecs import PROJECT

PLUGIN = """
from core import AttentionResult, AttentionStrategy, Metric, Preset, attention, hookimpl

class Mine(AttentionStrategy):
    '''Mine is short.

    And long.
    '''
    name = "{name}"
    def attend(self, query, key, value, context):
        return AttentionResult(attention(query, key, value), 1.0, "mine")

@hookimpl
def register_strategies():
    return [Mine]

@hookimpl
def register_presets():
    return [Preset("{name}", "early", {{"dense_layers": 3}}, "for a test")]

@hookimpl
def register_metrics():
    return [Metric("{name}_metric", lambda video, reference: 1.0)]
"""


@pytest.fixture
def plugin(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)

    def make(module, source):
        monkeypatch.delitem(sys.modules, module, raising=False)
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        return EntryPoint(module, module, PROJECT)

    return make


def test_built_ins_come_through_entry_points():
    rows = {entry.name: entry for entry in available_strategies()}
    for name in ("dense", "radial"):
        assert rows[name].available and re.fullmatch(
            rf"sparse-attn-functions \d\S* \(plugins\.{name}\)", rows[name].owner
        )
        assert rows[name].summary


def test_a_plugin_brings_everything(plugin):
    registry = Registry([plugin("brings_all", PLUGIN.format(name="mine"))])
    (entry,) = registry.entries()
    assert (entry.name, entry.status, entry.summary) == ("mine", "available", "Mine is short.")
    assert registry.strategy("mine").name == "mine"
    assert registry.preset("mine", "early").parameters == {"dense_layers": 3}
    assert [metric.name for metric in registry.metrics()] == ["mine_metric"]


@pytest.mark.parametrize(
    "source, reason",
    [
        ("import no_such_module_at_all", "ModuleNotFoundError: No module named 'no_such_module_at_all'"),
        ("raise SystemError('boom')", "SystemError: boom"),
        (
            "from core import hookimpl\n@hookimpl\ndef register_strategy():\n    return []",
            "PluginValidationError: .*register_strategy",
        ),
        (
            "from core import hookimpl\n@hookimpl\ndef register_strategies():\n    return [3]",
            "TypeError: register_strategies must return AttentionStrategy classes, got 3",
        ),
    ],
)
def test_a_broken_plugin_is_a_row_and_stops_nobody(plugin, source, reason):
    good = plugin("good_one", PLUGIN.format(name="good"))
    registry = Registry([plugin("broken_one", source), good])
    rows = {entry.name: entry for entry in registry.entries()}
    assert rows["good"].available and not rows["broken_one"].available
    with pytest.raises(StrategyNotFoundError, match=f"'broken_one' is unavailable: {reason}"):
        registry.strategy("broken_one")
    assert registry.hooks.hook.generation_finished(strategy=None, report=None) == []


def test_two_plugins_of_one_name_are_both_named(plugin):
    twins = [plugin(module, PLUGIN.format(name="twin")) for module in ("twin_a", "twin_b")]
    registry = Registry([*twins, plugin("other", PLUGIN.format(name="other"))])
    with pytest.raises(PluginConflictError, match="'twin' is registered by .*twin_a.* and .*twin_b"):
        registry.strategy("twin")
    with pytest.raises(PluginConflictError, match="preset"):
        registry.preset("twin", "early")
    rows = {entry.name: entry for entry in registry.entries()}
    assert not rows["twin"].available and rows["other"].available


def test_unknown_names_list_the_known_ones():
    with pytest.raises(StrategyNotFoundError, match="known: .*dense.*radial.* Did you mean 'radial'"):
        create_strategy("radail")
    with pytest.raises(
        StrategyNotFoundError, match="no preset of strategy 'dense' is called 'x'; known: none"
    ):
        create_strategy("dense", preset="x")


def test_parameters_override_the_preset(plugin, monkeypatch):
    registry = Registry([plugin("override", PLUGIN.format(name="over"))])
    monkeypatch.setattr("core.registry.installed", lambda: registry)
    assert create_strategy("over", preset="early").parameters.dense_layers == 3
    strategy = create_strategy("over", preset="early", dense_layers=1, dense_timesteps=2)
    assert (strategy.parameters.dense_layers, strategy.parameters.dense_timesteps) == (1, 2)
