"""Fine-tuning of a denoiser under a sparse strategy towards its own dense outputs.

The dense model generates videos; the inputs and the output of every denoiser call are kept. Then the
denoiser learns to give these outputs with sparse attention. No videos of anybody else are needed.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from core import AttentionStrategy, UnsupportedCallError, apply_strategy, create_strategy
from core.apply import find_adapter
from core.schedule import StepTracker
from harness.generate import denoise
from harness.models import LoadedModel

GRADIENT_NORM = 1.0
BATCHED = ("hidden_states", "encoder_hidden_states", "timestep")  # arguments with a batch dimension
WARM_UP = 0.1  # share of the updates over which the learning rate rises


class TeacherCall(NamedTuple):
    """One call of the dense denoiser: its step, keyword arguments and output."""

    step: int
    arguments: dict[str, Any]
    output: torch.Tensor


@dataclass(frozen=True)
class DistillSettings:
    """How to train.

    Args:
        updates (int): steps of the optimiser.
        learning_rate (float): peak rate of AdamW; it rises, then falls linearly to 0.
        batch (int): calls of one denoising step that an update learns from. Default: 1
        seed (int): seed of the order of the calls. Default: 0
    """

    updates: int
    learning_rate: float
    batch: int = 1
    seed: int = 0


def record_teacher(
    model: LoadedModel, prompts: Sequence[str], first_seed: int, videos: int = 1
) -> list[TeacherCall]:
    """Every denoiser call of dense videos.

    Args:
        model (LoadedModel): the model.
        prompts (Sequence[str]): prompts to generate from.
        first_seed (int): seed of the first video; each one has a seed of its own.
        videos (int): videos per prompt. Default: 1
    """
    calls: list[TeacherCall] = []
    adapter, steps = find_adapter(model.denoiser), StepTracker(model.pipeline)

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        steps.advance(adapter.read_call(module, args, kwargs).timestep)
        calls.append(TeacherCall(steps.step_index, kwargs, output[0].detach()))

    hook = model.denoiser.register_forward_hook(keep, with_kwargs=True)
    try:
        for number, prompt in enumerate([prompt for prompt in prompts for _ in range(videos)]):
            denoise(model, create_strategy("dense"), prompt, first_seed + number)
    finally:
        hook.remove()
    return calls


def merge_calls(calls: Sequence[TeacherCall]) -> TeacherCall:
    """Calls of one step as one with a larger batch; what they have in common is the first one's."""
    first = calls[0]
    arguments = {
        name: torch.cat([call.arguments[name] for call in calls]) if name in BATCHED else value
        for name, value in first.arguments.items()
    }
    return TeacherCall(first.step, arguments, torch.cat([call.output for call in calls]))


@torch.no_grad()
def call_error(model: LoadedModel, strategy: AttentionStrategy, calls: Sequence[TeacherCall]) -> float:
    """Relative error ``|output - dense| / |dense|`` of single denoiser calls, mean over ``calls``."""
    errors = []
    with apply_strategy(model.pipeline, strategy):
        for call in calls:
            errors.append(_relative_error(_denoise(model, call), call.output))
    return float(torch.stack(errors).sqrt().mean())


def _denoise(model: LoadedModel, call: TeacherCall) -> torch.Tensor:
    with torch.autocast(model.device.type, torch.bfloat16, enabled=model.device.type == "cuda"):
        return model.denoiser(**call.arguments)[0]


def _relative_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Squared, a 0-d tensor."""
    return F.mse_loss(output.float(), target.float()) / target.float().square().mean()


def _batches(calls: Sequence[TeacherCall], settings: DistillSettings) -> Iterator[TeacherCall]:
    """Calls in random order, merged with others of their step; each comes once before any comes twice."""
    generator = torch.Generator().manual_seed(settings.seed)
    steps: dict[int, list[TeacherCall]] = {}
    for call in calls:
        steps.setdefault(call.step, []).append(call)
    while True:
        groups = []
        for own in steps.values():
            order = torch.randperm(len(own), generator=generator).tolist()
            groups += [
                [own[pick] for pick in order[start : start + settings.batch]]
                for start in range(0, len(own), settings.batch)
            ]
        for place in torch.randperm(len(groups), generator=generator).tolist():
            yield merge_calls(groups[place])


def distill(
    model: LoadedModel,
    strategy: AttentionStrategy,
    calls: Sequence[TeacherCall],
    settings: DistillSettings,
    on_update: Callable[[int, float], None],
) -> list[float]:
    """Train the denoiser in place.

    Args:
        model (LoadedModel): its weights in fp32; on CUDA the calls run under bf16 autocast.
        strategy (AttentionStrategy): sparse attention that has a backward pass.
        calls (Sequence[TeacherCall]): what to learn, made with the schedule that is set.
        settings (DistillSettings): how.
        on_update (Callable): told the number of finished updates and the error of the latest.

    Returns:
        list[float]: relative error ``|output - dense| / |dense|`` of every update, before it is made; its
        square is what is made smaller.

    Raises:
        UnsupportedCallError: the strategy has no backward pass.
    """
    if not strategy.capabilities.backward:
        raise UnsupportedCallError(
            f"strategy '{strategy.name}' has no backward pass, so no model can be trained under it"
        )
    transformer = model.denoiser
    trained = list(transformer.parameters())
    optimizer = torch.optim.AdamW(trained, settings.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda done: trapezoid(done, settings.updates))
    errors = []
    with _Trainable(transformer), apply_strategy(model.pipeline, strategy):
        for number, call in enumerate(islice(_batches(calls, settings), settings.updates), start=1):
            strategy.reset()  # the call before may be of another video
            loss = _relative_error(_denoise(model, call), call.output)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(trained, GRADIENT_NORM)
            optimizer.step()
            schedule.step()
            errors.append(float(loss.detach().sqrt()))
            on_update(number, errors[-1])
    return errors


def trapezoid(done: int, updates: int) -> float:
    """Factor on the learning rate after ``done`` updates: up over the first tenth, then down to 0."""
    rise = max(1.0, WARM_UP * updates)
    return min((done + 1) / rise, (updates - done) / max(1.0, updates - rise), 1.0)


class _Trainable:
    """Within the block all parameters ask for gradients; afterwards all flags are as before."""

    def __init__(self, module: nn.Module) -> None:
        self._flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

    def __enter__(self) -> None:
        for parameter, _ in self._flags:
            parameter.requires_grad_(True)

    def __exit__(self, *exception: object) -> None:
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
            parameter.grad = None
