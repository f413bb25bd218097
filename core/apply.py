"""apply_strategy: put a strategy into a model, and take it out again."""

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from torch import nn

from core.adapter import DenoiserCall, ModelAdapter
from core.context import AttentionContext
from core.errors import InstallError
from core.record import ExecutionRecord, ExecutionReport
from core.registry import create_strategy, installed
from core.schedule import StepTracker
from core.session import DenoiserSession
from core.strategy import AttentionStrategy

DENOISERS = ("transformer", "transformer_2")
"""Where pipelines hold their denoisers; the second runs the steps of low noise (Wan 2.2 A14B)."""


class AppliedStrategy:
    """A strategy installed in the denoisers of one model; made by `apply_strategy`.

    Usable as a context manager (removes the strategy at exit) or through `remove`.
    """

    def __init__(self, denoisers: Sequence[nn.Module], strategy: AttentionStrategy, target: Any) -> None:
        self.strategy = strategy
        self._steps = StepTracker(target)
        self._generating = False
        self._running: DenoiserSession | None = None
        self._sessions = [
            DenoiserSession(denoiser, find_adapter(denoiser), strategy, self._begin_call)
            for denoiser in denoisers
        ]
        strategy.check_model([session.facts() for session in self._sessions])
        with ExitStack() as undo:  # an error in the second denoiser leaves none installed
            for session in self._sessions:
                session.install()
                undo.callback(session.remove)
            undo.pop_all()
        strategy.installed = True

    def __enter__(self) -> "AppliedStrategy":
        if not self._sessions:
            raise InstallError("this handle's strategy was removed; call apply_strategy again")
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def report(self) -> ExecutionReport:
        """What was executed for the latest video; see ExecutionReport."""
        return self.strategy.report()

    def remove(self) -> None:
        """Restore the model's own processors. Safe to call twice."""
        if not self._sessions:
            return
        for session in self._sessions:
            session.remove()
        self._sessions = []
        self.strategy.installed = False
        self._finish_video()

    def _begin_call(self, session: DenoiserSession, call: DenoiserCall) -> AttentionContext:
        if self._steps.advance(call.timestep):
            self._finish_video()
            self.strategy.start_video()
            self._generating = True
            installed().hooks.hook.generation_started(
                strategy=self.strategy, layout=call.layout, num_steps=self._steps.num_steps
            )
        elif session is not self._running:
            self.strategy.reset()  # what it keeps belongs to the layers of another denoiser
        self._running = session
        return AttentionContext(
            layout=call.layout,
            num_layers=session.num_layers,
            step_index=self._steps.step_index,
            num_steps=self._steps.num_steps,
            timestep=call.timestep,
            branch=call.branch,
            call_in_step=self._steps.call_in_step,
        )

    def _finish_video(self) -> None:
        if self._generating:
            self._generating = False
            installed().hooks.hook.generation_finished(strategy=self.strategy, report=self.report())


def apply_strategy(
    target: Any,
    strategy: str | AttentionStrategy = "radial",
    *,
    preset: str | None = None,
    time_attention: bool = False,
    **parameters: Any,
) -> AppliedStrategy:
    """Install a strategy into a diffusers pipeline or its transformer.

    A pipeline with two denoisers for different steps (``transformer`` and ``transformer_2``) gets it in both;
    where the other one takes over, the strategy forgets its per-layer state and goes on.

    Example::

        with apply_strategy(pipe, "radial", decay_factor=0.5) as run:
            video = pipe(prompt).frames[0]
        print(run.report())

    Args:
        target (Any): a pipeline with a ``transformer``, a ``transformer_2`` or both, or a transformer itself.
        strategy (str | AttentionStrategy): registered name, or a configured strategy. Default: ``"radial"``
        preset (str, Optional): registered preset of that strategy.
        time_attention (bool): measure the time inside the strategy. Default: False
        **parameters: parameters of the named strategy.

    Returns:
        AppliedStrategy: handle; installed at once, removed by ``remove()`` or at the end of a with-block.

    Raises:
        InstallError: no adapter knows the model, it is not loaded, a strategy is installed in it already, or
            this strategy object is in use by another model.
        StrategyNotFoundError: no such strategy or preset.
        ParameterError: a parameter is unknown, out of range or for another model.
    """
    denoisers = find_denoisers(target)
    if isinstance(strategy, str):
        strategy = create_strategy(strategy, preset=preset, **parameters)
    elif not isinstance(strategy, AttentionStrategy):
        raise InstallError(f"strategy must be a registered name or an AttentionStrategy, got {strategy!r}")
    elif preset or parameters:
        raise InstallError("a configured strategy takes no preset or parameters; set them when it is built")
    if strategy.installed:
        raise InstallError(f"this '{strategy.name}' object is installed in a model; build a second one")
    strategy.record = ExecutionRecord(timed=time_attention)
    return AppliedStrategy(denoisers, strategy, target)


def find_denoisers(target: Any) -> list[Any]:
    """The denoisers of a pipeline, that of high noise first; anything else is taken for a denoiser itself.

    Raises:
        InstallError: the pipeline was loaded without any.
    """
    if not hasattr(target, "transformer"):
        return [_compiled_module(target)]
    held = (_compiled_module(getattr(target, name, None)) for name in DENOISERS)
    denoisers = list(dict.fromkeys(denoiser for denoiser in held if denoiser is not None))
    if not denoisers:
        raise InstallError(
            f"{type(target).__name__} holds no transformer; load it with one (transformer=...) before "
            "installing a strategy"
        )
    return denoisers


def _compiled_module(denoiser: Any) -> Any:
    """What `torch.compile` was given, where it wraps a denoiser: calls of the wrapper run its hooks too."""
    return getattr(denoiser, "_orig_mod", denoiser)


def find_adapter(denoiser: Any) -> ModelAdapter:
    """The registered adapter of a denoiser.

    Raises:
        InstallError: none matches; the message lists the known families.
    """
    adapters = installed().adapters()
    for adapter in adapters:
        if isinstance(denoiser, nn.Module) and adapter.matches(denoiser):
            return adapter
    known = ", ".join(adapter.name for adapter in adapters) or "none"
    raise InstallError(f"no model adapter for {type(denoiser).__name__}; known families: {known}")
