"""apply_strategy: put a strategy into a model, and take it out again."""

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from core.adapter import ModelAdapter
from core.compile import attend_compiled, register_session
from core.context import AttentionContext
from core.errors import InstallError
from core.record import ExecutionRecord, ExecutionReport
from core.registry import create_strategy, installed
from core.schedule import StepTracker
from core.strategy import AttentionStrategy

logger = logging.getLogger(__name__)


class LayerAttention:
    """The attention of one layer: what an installed processor calls."""

    def __init__(self, session: "AppliedStrategy", layer_index: int) -> None:
        self._session = session
        self._layer_index = layer_index
        self._place = torch.tensor([session.number, layer_index])

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return attend_compiled(query, key, value, self._place)
        return self._session.attend(self._layer_index, query, key, value)


class AppliedStrategy:
    """A strategy installed in one denoiser; made by `apply_strategy`.

    Usable as a context manager (removes the strategy at exit) or through `remove`.
    """

    def __init__(
        self, denoiser: nn.Module, adapter: ModelAdapter, strategy: AttentionStrategy, pipeline: Any | None
    ) -> None:
        self.strategy = strategy
        self.number = register_session(self)
        self._denoiser = denoiser
        self._adapter = adapter
        self._steps = StepTracker(pipeline)
        self._context: AttentionContext | None = None
        self._padding = 0
        self._generating = False
        self._layers = adapter.attention_layers(denoiser)
        self._attends = [LayerAttention(self, index) for index in range(len(self._layers))]
        self._refuse_second_strategy()
        strategy.check_model(len(self._layers), getattr(self._layers[0], "heads", None))
        self._install()
        strategy.installed = True
        # Kept out of graphs where the whole denoiser is compiled: they read values off the device.
        before, after = torch.compiler.disable(self._before_call), torch.compiler.disable(self._after_call)
        self._hooks = [
            denoiser.register_forward_pre_hook(before, with_kwargs=True),
            denoiser.register_forward_hook(after),
        ]

    def __enter__(self) -> "AppliedStrategy":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Run the strategy for one layer of the current denoiser call; padded tokens get zeros."""
        if self._context is None:
            raise InstallError(
                "attention was called outside the denoiser's own forward, so layout and step are unknown; "
                "call the transformer itself, not one of its blocks"
            )
        context = self._context.at_layer(layer_index)
        if not self._padding:
            return self.strategy(query, key, value, context)
        valid = query.shape[2] - self._padding
        output = self.strategy(query[:, :, :valid], key[:, :, :valid], value[:, :, :valid], context)
        return F.pad(output, (0, 0, 0, self._padding))

    def report(self) -> ExecutionReport:
        """What was executed for the latest video; see ExecutionReport."""
        return self.strategy.report()

    def remove(self) -> None:
        """Restore the model's own processors. Safe to call twice."""
        if not self._hooks:
            return
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        for layer in self._layers:
            if self._is_ours(layer.processor):
                layer.set_processor(layer.processor.original)
        self._forget_saved_processors()
        self.strategy.installed = False
        self._context = None
        self._finish_video()

    def _refuse_second_strategy(self) -> None:
        if not self._layers:
            raise InstallError(f"{type(self._denoiser).__name__} has no attention layer to replace")
        if any(
            isinstance(getattr(layer.processor, "attend", None), LayerAttention) for layer in self._layers
        ):
            raise InstallError(
                "a strategy is installed in this model already; call remove() on its handle first, "
                "or leave its with-block"
            )

    def _install(self) -> None:
        """Put our processor wherever another one stands; all of them or, on an error, none."""
        foreign = [
            (layer, attend)
            for layer, attend in zip(self._layers, self._attends, strict=True)
            if not self._is_ours(layer.processor)
        ]
        made = [self._adapter.make_processor(layer.processor, attend) for layer, attend in foreign]
        for (layer, _), processor in zip(foreign, made, strict=True):
            layer.set_processor(processor)

    def _is_ours(self, processor: Any) -> bool:
        return getattr(processor, "attend", None) in self._attends

    def _forget_saved_processors(self) -> None:
        """Keep ``unfuse_qkv_projections`` from bringing ours back after removal."""
        saved = getattr(self._denoiser, "original_attn_processors", None) or {}
        for name, processor in list(saved.items()):
            if self._is_ours(processor):
                saved[name] = processor.original

    def _before_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not all(self._is_ours(layer.processor) for layer in self._layers):
            logger.info("processors were replaced since installation (fused projections?); installing again")
            self._install()
        call = self._adapter.read_call(denoiser, args, kwargs)
        if self._steps.advance(call.timestep):
            self._finish_video()
            self.strategy.start_video()
            self._generating = True
            installed().hooks.hook.generation_started(
                strategy=self.strategy, layout=call.layout, num_steps=self._steps.num_steps
            )
        self._padding = call.padding
        self._context = AttentionContext(
            layout=call.layout,
            num_layers=len(self._layers),
            step_index=self._steps.step_index,
            num_steps=self._steps.num_steps,
            timestep=call.timestep,
            branch=call.branch,
            call_in_step=self._steps.call_in_step,
        )

    def _after_call(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        self.strategy.verify_outputs()

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

    Example::

        with apply_strategy(pipe, "radial", decay_factor=0.5) as run:
            video = pipe(prompt).frames[0]
        print(run.report())

    Args:
        target (Any): a pipeline with a ``transformer``, or the transformer itself.
        strategy (str | AttentionStrategy): registered name, or a configured strategy. Default: ``"radial"``
        preset (str, Optional): registered preset of that strategy.
        time_attention (bool): measure the time inside the strategy. Default: False
        **parameters: parameters of the named strategy.

    Returns:
        AppliedStrategy: handle; installed at once, removed by ``remove()`` or at the end of a with-block.

    Raises:
        InstallError: no adapter knows the model, or a strategy is installed in it already, or this
            strategy object is in use by another model.
        StrategyNotFoundError: no such strategy or preset.
        ParameterError: a parameter is unknown or out of range.
    """
    pipeline = target if hasattr(target, "transformer") else None
    denoiser = getattr(target, "transformer", target)
    if isinstance(strategy, str):
        strategy = create_strategy(strategy, preset=preset, **parameters)
    elif not isinstance(strategy, AttentionStrategy):
        raise InstallError(f"strategy must be a registered name or an AttentionStrategy, got {strategy!r}")
    elif preset or parameters:
        raise InstallError("a configured strategy takes no preset or parameters; set them when it is built")
    if strategy.installed:
        raise InstallError(f"this '{strategy.name}' object is installed in a model; build a second one")
    adapter = find_adapter(denoiser)
    strategy.record = ExecutionRecord(timed=time_attention)
    return AppliedStrategy(denoiser, adapter, strategy, pipeline)


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
