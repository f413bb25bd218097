"""ModelAdapter: how strategies enter one model family."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import nn

from core.context import Branch
from core.layout import TokenLayout


@dataclass(frozen=True)
class DenoiserCall:
    """Facts of one call of the denoiser, read before its first block runs.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        timestep (float): the scheduler's timestep.
        branch (str): which half of classifier-free guidance the batch holds. Default: ``"both"``
        padding (int): tokens behind those of ``layout`` that the model masks: never keys, and what their own
            rows give reaches nothing. Strategies do not see them. Default: 0
    """

    layout: TokenLayout
    timestep: float
    branch: Branch = "both"
    padding: int = 0


class AttendFunction(Protocol):
    """What a processor calls with projected tensors of shape ``[B, H, S, D]``, padding last."""

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor: ...


class ModelAdapter(ABC):
    """Puts one attention processor per layer into a model and reads the geometry of its calls."""

    name: ClassVar[str]

    @abstractmethod
    def matches(self, denoiser: nn.Module) -> bool:
        """True for the models of this family."""

    @abstractmethod
    def attention_layers(self, denoiser: nn.Module) -> list[Any]:
        """Attention modules that a strategy replaces, in layer order; each has ``processor``."""

    def output_weights(self, denoiser: nn.Module) -> list[torch.Tensor]:
        """What every layer makes of its heads' outputs for the video, ``[C, H * D]`` each, in layer order.

        The default is the weight of the layer's own ``to_out``.
        """
        return [layer.to_out[0].weight for layer in self.attention_layers(denoiser)]

    @abstractmethod
    def make_processor(self, original: Any, attend: AttendFunction) -> Any:
        """A processor that computes as ``original`` does, with ``attend`` in place of its attention.

        It keeps its two arguments as attributes ``original`` and ``attend``, by which removal finds it.

        Raises:
            InstallError: ``original`` is not a processor whose projections this adapter knows.
        """

    @abstractmethod
    def read_call(self, denoiser: nn.Module, args: tuple, kwargs: dict[str, Any]) -> DenoiserCall:
        """Layout, timestep and padding from the arguments of the denoiser's ``forward``.

        Raises:
            UnsupportedCallError: no one layout describes the tokens of all batch entries.
        """
