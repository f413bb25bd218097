"""A denoiser whose first answers of a video come from memory, to repeat only the rest of the video."""

from types import TracebackType
from typing import Any

from torch import nn


class RecordedDenoiser:
    """Outputs of a denoiser in one video, to begin another video of the same prompt and noise with.

    Args:
        denoiser (Module): the denoiser.
    """

    def __init__(self, denoiser: nn.Module) -> None:
        self._denoiser = denoiser
        self._outputs: list[Any] = []

    def recorded(self) -> "SwappedForward":
        """While this is entered, outputs are kept."""
        original = self._denoiser.forward
        self._outputs.clear()

        def forward(*args: Any, **kwargs: Any) -> Any:
            self._outputs.append(original(*args, **kwargs))
            return self._outputs[-1]

        return SwappedForward(self._denoiser, forward)

    def replayed(self, share: float) -> "SwappedForward":
        """While this is entered, the first ``share`` of the calls of a video are answered from memory."""
        original, known = self._denoiser.forward, iter(self._outputs[: round(share * len(self._outputs))])

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = next(known, None)
            return original(*args, **kwargs) if output is None else output

        return SwappedForward(self._denoiser, forward)


class SwappedForward:
    """A module whose ``forward`` is another function while this is entered; its hooks still run."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self._module = module
        self._forward = forward

    def __enter__(self) -> None:
        self._own = self._module.__dict__.get("forward")  # present where accelerate wrapped it
        self._module.forward = self._forward

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del self._module.forward
        if self._own is not None:
            self._module.forward = self._own
