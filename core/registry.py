"""Registry: strategies, presets, metrics and model adapters found through entry points."""

import difflib
import functools
import itertools
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import pluggy

from core import hookspecs
from core.adapter import ModelAdapter
from core.errors import PluginConflictError, StrategyNotFoundError
from core.extensions import Metric, Preset
from core.strategy import AttentionStrategy


@dataclass(frozen=True)
class StrategyEntry:
    """One row of `available_strategies`.

    Args:
        name (str): registered name; for a plugin that cannot load, its entry point's name.
        owner (str): distribution with version, and entry point it comes from.
        status (str): ``"available"`` or ``"unavailable: reason"``.
        summary (str): first line of the strategy's docstring.
    """

    name: str
    owner: str
    status: str
    summary: str = ""

    @property
    def available(self) -> bool:
        return self.status == "available"


class Registry:
    """What the plugins of one environment offer.

    A plugin that cannot load, and a name that two plugins claim, is a row with its reason in `entries`;
    everything else keeps working.

    Args:
        plugins (Iterable[EntryPoint]): entry points of the group ``sparse_attn``.
    """

    def __init__(self, plugins: Iterable[EntryPoint]) -> None:
        self.hooks = pluggy.PluginManager(hookspecs.PROJECT)
        self.hooks.add_hookspecs(hookspecs)
        self._strategies: dict[str, type[AttentionStrategy]] = {}
        self._presets: dict[tuple[str, str], Preset] = {}
        self._metrics: dict[str, Metric] = {}
        self._adapters: dict[str, ModelAdapter] = {}
        self._owners: dict[tuple[str, Any], str] = {}
        self._unavailable: dict[str, StrategyEntry] = {}
        self._conflicts: dict[tuple[str, Any], str] = {}
        for plugin in sorted(plugins, key=lambda found: found.name):
            self._load(plugin)

    @classmethod
    def from_environment(cls) -> "Registry":
        """The plugins installed in this Python environment."""
        return cls(entry_points(group=hookspecs.PROJECT))

    def entries(self) -> list[StrategyEntry]:
        """Every strategy with its state, unavailable plugins included, sorted by name."""
        rows = dict(self._unavailable)
        for name, strategy in self._strategies.items():
            summary = (strategy.__doc__ or "").strip().split("\n")[0]
            rows[name] = StrategyEntry(name, self._owners["strategy", name], "available", summary)
        return [rows[name] for name in sorted(rows)]

    def strategy(self, name: str) -> type[AttentionStrategy]:
        """The strategy class of that name.

        Raises:
            StrategyNotFoundError: no such strategy; the message lists the known ones.
            PluginConflictError: two plugins register that name; the message names both.
        """
        self._refuse_conflict("strategy", name)
        if name in self._strategies:
            return self._strategies[name]
        if name in self._unavailable:
            raise StrategyNotFoundError(f"strategy '{name}' is {self._unavailable[name].status}")
        raise StrategyNotFoundError(self._unknown("strategy", name, sorted(self._strategies)))

    def preset(self, strategy: str, name: str) -> Preset:
        """The preset of that strategy and name.

        Raises:
            StrategyNotFoundError: no such preset; the message lists the known ones.
            PluginConflictError: two plugins register that preset; the message names both.
        """
        if not isinstance(name, str):
            raise StrategyNotFoundError(f"a preset is asked for by its name, got {name!r}")
        self._refuse_conflict("preset", (strategy, name))
        if (strategy, name) in self._presets:
            return self._presets[strategy, name]
        known = sorted(preset for owner, preset in self._presets if owner == strategy)
        raise StrategyNotFoundError(self._unknown(f"preset of strategy '{strategy}'", name, known))

    def presets(self) -> list[Preset]:
        return list(self._presets.values())

    def metrics(self) -> list[Metric]:
        return list(self._metrics.values())

    def adapters(self) -> list[ModelAdapter]:
        return list(self._adapters.values())

    def _refuse_conflict(self, kind: str, name: Any) -> None:
        if (kind, name) in self._conflicts:
            raise PluginConflictError(self._conflicts[kind, name])

    @staticmethod
    def _unknown(kind: str, name: str, known: list[str]) -> str:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean '{close[0]}'?" if close else ""
        return f"no {kind} is called '{name}'; known: {', '.join(known) or 'none'}.{hint}"

    def _load(self, plugin: EntryPoint) -> None:
        origin = f"{plugin.dist.name} {plugin.dist.version}" if plugin.dist else "unknown distribution"
        owner = f"{origin} ({plugin.value})"
        try:
            module = plugin.load()
            self.hooks.register(module, name=plugin.name)
            self.hooks.check_pending()
            offers = self._collect(module)
        except Exception as error:  # a stranger's import may fail in any way and must stop nobody
            self._withdraw(plugin.name)
            reason = f"unavailable: {type(error).__name__}: {error}"
            self._unavailable[plugin.name] = StrategyEntry(plugin.name, owner, reason)
            return
        for kind, name, item in offers:
            self._add(kind, name, item, owner)

    def _withdraw(self, name: str) -> None:
        if self.hooks.get_plugin(name) is not None:
            self.hooks.unregister(name=name)

    def _collect(self, module: Any) -> list[tuple[str, Any, Any]]:
        """(kind, name, item) of everything that one plugin registers."""
        others = [plugin for plugin in self.hooks.get_plugins() if plugin is not module]

        def offered(hook: str) -> list[Any]:
            return list(itertools.chain.from_iterable(self.hooks.subset_hook_caller(hook, others)()))

        strategies = offered("register_strategies")
        for item in strategies:
            if not (isinstance(item, type) and issubclass(item, AttentionStrategy)):
                raise TypeError(f"register_strategies must return AttentionStrategy classes, got {item!r}")
        return [
            *(("strategy", item.name, item) for item in strategies),
            *(("preset", (item.strategy, item.name), item) for item in offered("register_presets")),
            *(("metric", item.name, item) for item in offered("register_metrics")),
            *(("adapter", item.name, item) for item in offered("register_model_adapters")),
        ]

    def _add(self, kind: str, name: Any, item: Any, owner: str) -> None:
        shelves: dict[str, dict] = {
            "strategy": self._strategies,
            "preset": self._presets,
            "metric": self._metrics,
            "adapter": self._adapters,
        }
        if (kind, name) not in self._owners:
            self._owners[kind, name] = owner
            shelves[kind][name] = item
            return
        owners = f"{self._owners[kind, name]} and {owner}"
        message = f"{kind} '{name}' is registered by {owners}; rename one or uninstall it"
        self._conflicts[kind, name] = message
        shelves[kind].pop(name, None)
        if kind == "strategy":
            self._unavailable[name] = StrategyEntry(name, owners, f"unavailable: {message}")


@functools.cache
def installed() -> Registry:
    """The registry of this environment, read once per process."""
    return Registry.from_environment()


def available_strategies() -> list[StrategyEntry]:
    """Every registered strategy with its state (``"available"`` or ``"unavailable: reason"``)."""
    return installed().entries()


def create_strategy(name: str, *, preset: str | None = None, **parameters: Any) -> AttentionStrategy:
    """Build a strategy by its registered name.

    Args:
        name (str): registered name, for example ``"radial"``.
        preset (str, Optional): a registered preset of that strategy to start from.
        **parameters: the strategy's parameters; they override the preset.

    Raises:
        StrategyNotFoundError: no such strategy or preset.
        ParameterError: a parameter is unknown or out of range.
    """
    if not isinstance(name, str):
        raise StrategyNotFoundError(f"a strategy is asked for by its name, such as 'radial'; got {name!r}")
    strategy = installed().strategy(name)
    values = dict(installed().preset(name, preset).parameters) if preset else {}
    return strategy(**(values | parameters))
