"""Fine-tuning of a denoiser under a sparse strategy towards its own dense outputs.

The dense model generates videos; the inputs and the output of every denoiser call are kept. Then the
attention layers learn to give these outputs with sparse attention. No videos of anybody else are needed.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from core import AttentionStrategy, UnsupportedCallError, apply_strategy, create_strategy
from core.apply import find_adapter
from harness.generate import denoise
from harness.models import LoadedModel

GRADIENT_NORM = 1.0
WARM_UP = 0.1  # share of the updates over which the learning rate rises


class TeacherCall(NamedTuple):
    """One call of the dense denoiser: its keyword arguments and its output."""

    arguments: dict[str, Any]
    output: torch.Tensor


@dataclass(frozen=True)
class DistillSettings:
    """How to train.

    Args:
        updates (int): calls learned from, one per update.
        learning_rate (float): peak rate of AdamW; it rises, then falls linearly to 0.
        seed (int): seed of the order of the calls.
    """

    updates: int
    learning_rate: float
    seed: int = 0


def record_teacher(model: LoadedModel, prompts: Sequence[str], first_seed: int) -> list[TeacherCall]:
    """Every denoiser call of dense videos, one video per prompt with a seed of its own."""
    calls: list[TeacherCall] = []

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        calls.append(TeacherCall(kwargs, output[0].detach()))

    hook = model.pipeline.transformer.register_forward_hook(keep, with_kwargs=True)
    try:
        for number, prompt in enumerate(prompts):
            denoise(model, create_strategy("dense"), prompt, first_seed + number)
    finally:
        hook.remove()
    return calls


def distill(
    model: LoadedModel,
    strategy: AttentionStrategy,
    calls: Sequence[TeacherCall],
    settings: DistillSettings,
    on_update: Callable[[int, float], None],
) -> list[float]:
    """Train the attention layers in place.

    Args:
        model (LoadedModel): its weights in fp32; on CUDA the calls run under bf16 autocast.
        strategy (AttentionStrategy): sparse attention that has a backward pass.
        calls (Sequence[TeacherCall]): what to learn, made with the schedule that is set.
        settings (DistillSettings): how.
        on_update (Callable): told the number of finished updates and the error of the latest.

    Returns:
        list[float]: relative error ``|output - dense| / |dense|`` of every update, before it is made.

    Raises:
        UnsupportedCallError: the strategy has no backward pass.
    """
    if not strategy.capabilities.backward:
        raise UnsupportedCallError(
            f"strategy '{strategy.name}' has no backward pass, so no model can be trained under it"
        )
    transformer = model.pipeline.transformer
    trained = attention_parameters(transformer)
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: trapezoid(done, settings.updates))
    generator = torch.Generator().manual_seed(settings.seed)
    rounds = -(-settings.updates // len(calls))
    picks = torch.cat([torch.randperm(len(calls), generator=generator) for _ in range(rounds)])
    errors = []
    with _OnlyTrained(transformer, trained), apply_strategy(model.pipeline, strategy):
        for number, pick in enumerate(picks[: settings.updates].tolist(), start=1):
            call = calls[pick]
            with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
                output = transformer(**call.arguments)[0]
            loss = F.mse_loss(output.float(), call.output.float())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            errors.append(float((loss.detach() / call.output.float().square().mean()).sqrt()))
            on_update(number, errors[-1])
    return errors


def attention_parameters(transformer: nn.Module) -> list[nn.Parameter]:
    """Weights of all attention layers: projections and norms of query and key."""
    layers = find_adapter(transformer).attention_layers(transformer)
    return [parameter for layer in layers for parameter in layer.parameters()]


def trapezoid(done: int, updates: int) -> float:
    """Factor on the learning rate after ``done`` updates: up over the first tenth, then down to 0."""
    rise = max(1.0, WARM_UP * updates)
    return min((done + 1) / rise, (updates - done) / max(1.0, updates - rise), 1.0)


class _OnlyTrained:
    """Within the block only these parameters ask for gradients; afterwards all flags are as before."""

    def __init__(self, module: nn.Module, trained: Sequence[nn.Parameter]) -> None:
        self._flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        self._trained = trained

    def __enter__(self) -> None:
        for parameter, _ in self._flags:
            parameter.requires_grad_(False)
        for parameter in self._trained:
            parameter.requires_grad_(True)

    def __exit__(self, *exception: object) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
