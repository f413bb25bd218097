"""What every training stage shares: a clock that also drives the learning rate, and averaged weights."""

import time
from collections.abc import Iterable

import torch
from torch import nn


class StageClock:
    """Progress of one stage, measured in seconds so that a stage ends when its time is over.

    Args:
        seconds: length of the stage.
        max_steps: end after this many steps as well, if given.
        elapsed: seconds already trained in earlier runs.
    """

    def __init__(self, seconds: float, max_steps: int | None = None, elapsed: float = 0.0):
        self.seconds, self.max_steps = seconds, max_steps
        self.step = 0
        self._start = time.monotonic() - elapsed

    @property
    def elapsed(self) -> float:
        """Seconds trained so far, earlier runs included."""
        return time.monotonic() - self._start

    @property
    def progress(self) -> float:
        """Fraction of the stage that is over, 0 to 1."""
        by_steps = self.step / self.max_steps if self.max_steps else 0.0
        return min(1.0, max(self.elapsed / self.seconds, by_steps))

    def tick(self) -> bool:
        """Counts one step; returns False once the stage is over."""
        self.step += 1
        return self.progress < 1.0


def set_learning_rate(
    optimizers: Iterable[torch.optim.Optimizer], clock: StageClock, warmup: int, flat: float
) -> float:
    """Sets the rate of all optimizers to their base rate times a trapezoid: warm-up, flat, linear decay to 0.

    Args:
        optimizers: their groups carry `base_lr`.
        clock: the stage.
        warmup: steps of linear warm-up.
        flat: fraction of the stage at which the decay begins, 0 to 1.

    Returns:
        The factor used, 0 to 1.
    """
    decay = min(1.0, (1 - clock.progress) / (1 - flat)) if flat < 1 else 1.0
    factor = min(1.0, (clock.step + 1) / warmup) * decay
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor
    return factor


class AveragedWeights:
    """Exponential moving average of a module's parameters.

    Args:
        module: the module to follow; its weights are copied at once.
        decay: weight of the past per step, 0 to 1.
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay = decay
        self._live = dict(module.named_parameters())
        self.values = {name: value.detach().clone() for name, value in self._live.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Moves the average towards the live weights."""
        torch._foreach_lerp_(
            list(self.values.values()), [value.detach() for value in self._live.values()], 1 - self.decay
        )

    @torch.no_grad()
    def copy_from(self, values: dict[str, torch.Tensor]) -> None:
        """Replaces the average, for example by that of a checkpoint."""
        for name, value in self.values.items():
            value.copy_(values[name])

    @torch.no_grad()
    def swap(self) -> None:
        """Exchanges the live and the averaged weights; a second call undoes it."""
        for name, value in self.values.items():
            live = self._live[name].data
            kept = live.clone()
            live.copy_(value)
            value.copy_(kept)


def adamw(
    parameters, learning_rate: float, weight_decay: float = 0.01, beta2: float = 0.99
) -> torch.optim.AdamW:
    """Returns AdamW with `base_lr` set in its groups, fused on CUDA."""
    parameters = [value for value in parameters if value.requires_grad]
    fused = bool(parameters) and parameters[0].is_cuda
    optimizer = torch.optim.AdamW(
        parameters, learning_rate, (0.9, beta2), weight_decay=weight_decay, fused=fused
    )
    return _with_base_rate(optimizer)


def muon(parameters, learning_rate: float, weight_decay: float = 0.01) -> torch.optim.Muon:
    """Returns Muon for matrices, its updates scaled to the size that AdamW's have, with `base_lr` set."""
    optimizer = torch.optim.Muon(
        list(parameters), learning_rate, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"
    )
    return _with_base_rate(optimizer)


def _with_base_rate(optimizer):
    for group in optimizer.param_groups:
        group["base_lr"] = group["lr"]
    return optimizer
