"""DenoiserSession: a strategy in one denoiser."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from core.adapter import DenoiserCall, ModelAdapter
from core.compile import attend_compiled, register_session
from core.context import AttentionContext
from core.denoiser_record import InstalledDenoiser
from core.errors import InstallError
from core.strategy import AttentionStrategy

logger = logging.getLogger(__name__)

OUTSIDE_BACKWARD = -1  # what torch calls the graph task where no backward pass runs


class CallFacts(NamedTuple):
    """Context of a denoiser call, and padded tokens behind those of its layout."""

    context: AttentionContext
    padding: int


class LayerAttention:
    """The attention of one layer: what an installed processor calls."""

    def __init__(self, session: "DenoiserSession", layer_index: int) -> None:
        self._session = session
        self._layer_index = layer_index
        self._place = torch.tensor([session.number, layer_index])

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            return attend_compiled(query, key, value, self._place)
        return self._session.attend(self._layer_index, query, key, value)

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise InstallError(
            "a model with a strategy cannot be copied or pickled; call remove() on its handle first, or copy "
            "its state_dict()"
        )


class DenoiserSession:
    """The processors and hooks by which a strategy runs in one denoiser, between `install` and `remove`.

    Args:
        denoiser (Module): the denoiser.
        adapter (ModelAdapter): of its family.
        strategy (AttentionStrategy): what computes attention.
        begin_call (Callable): given this session and the facts of a denoiser call before its first layer
            runs; returns the context of the call.
    """

    def __init__(
        self,
        denoiser: nn.Module,
        adapter: ModelAdapter,
        strategy: AttentionStrategy,
        begin_call: Callable[["DenoiserSession", DenoiserCall], AttentionContext],
    ) -> None:
        self.number = register_session(self)
        self._denoiser = denoiser
        self._adapter = adapter
        self._strategy = strategy
        self._begin_call = begin_call
        self._call: CallFacts | None = None
        self._inside = False
        self._layers = adapter.attention_layers(denoiser)
        self._attends = [LayerAttention(self, index) for index in range(self.num_layers)]
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    def facts(self) -> InstalledDenoiser:
        """What the strategy is to be checked against.

        Raises:
            InstallError: the denoiser has no attention layer or a strategy already.
        """
        self._refuse_second_strategy()
        heads = getattr(self._layers[0], "heads", None)
        return InstalledDenoiser.of(self._denoiser, self.num_layers, heads)

    def install(self) -> None:
        """Put the strategy in; on an error the denoiser is as it was.

        Raises:
            InstallError: a processor is not the family's own.
        """
        self._set_processors()
        # Kept out of graphs where the whole denoiser is compiled: they read values off the device.
        before, after = torch.compiler.disable(self._before_call), torch.compiler.disable(self._after_call)
        self._hooks = [
            self._denoiser.register_forward_pre_hook(before, with_kwargs=True),
            self._denoiser.register_forward_hook(after),
        ]

    def attend(
        self, layer_index: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Run the strategy for one layer of the current denoiser call; padded tokens get zeros.

        In a backward pass, where activations are computed again, the call is that of the forward pass.
        """
        again = torch._C._current_graph_task_id() != OUTSIDE_BACKWARD
        if self._call is None or not (self._inside or again):
            raise InstallError(
                "attention was called outside the denoiser's own forward, so layout and step are unknown; "
                "call the transformer itself, not one of its blocks"
            )
        context, padding = self._call.context.at_layer(layer_index), self._call.padding
        valid = query.shape[2] - padding
        if padding:
            query, key, value = (part[:, :, :valid] for part in (query, key, value))
        with self._strategy.record.paused() if again else nullcontext():
            output = self._strategy(query, key, value, context)
        return F.pad(output, (0, 0, 0, padding)) if padding else output

    def remove(self) -> None:
        """Restore the model's own processors."""
        for hook in self._hooks:
            hook.remove()
        for layer in self._layers:
            if self._is_ours(layer.processor):
                layer.set_processor(layer.processor.original)
        self._forget_saved_processors()
        self._hooks = []
        self._call = None

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

    def _set_processors(self) -> None:
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
            self._set_processors()
        call = self._adapter.read_call(denoiser, args, kwargs)
        self._call = CallFacts(self._begin_call(self, call), call.padding)
        self._inside = True

    def _after_call(self, denoiser: nn.Module, args: tuple, output: Any) -> None:
        self._inside = False
        self._strategy.verify_outputs()
        video = output if isinstance(output, torch.Tensor) else output[0]
        if video.requires_grad:
            video.register_hook(partial(self._begin_backward, self._call))

    def _begin_backward(self, call: "CallFacts | None", gradient: torch.Tensor) -> None:
        """Of several forward calls behind one loss, go back to this one: its activations come next."""
        if self._hooks:
            self._call = call
        elif getattr(self._denoiser, "gradient_checkpointing", False):
            raise InstallError(
                "the strategy was removed before the backward pass, which computes activations again; run "
                "backward() before remove(), or inside the with-block"
            )
