"""Time of every registered strategy in one attention call, with its prediction and reordering.

No time without a check: a strategy that shows its block mask is compared with float64 attention over
exactly that mask; of any other, the output must be a weighted mean of the values (so constant values come
out constant), finite and the same at every call.
"""

from dataclasses import replace

import pytest
import torch

from core import BlockSparseMask
from core.dense import attention
from harness.tuning import relative_l1


@torch.inference_mode()
def test_strategy(call, spec, timed, error_of, calls_in_a_row):
    strategy = spec.create()
    inputs = (call.query, call.key, call.value, call.context)
    output = strategy(*inputs)
    assert torch.equal(output, strategy(*inputs)), "two equal calls gave different outputs"
    check_weighted_mean(strategy, call)
    facts = {}
    if spec.is_baseline:
        facts["max_error"] = error_of(call, output)
    elif hasattr(strategy, "pattern"):
        pattern = strategy.pattern(call.query, call.key, call.context)
        if isinstance(pattern.mask, BlockSparseMask):
            facts["max_error"] = error_of(call, output, pattern.mask, pattern.order)
    assert facts.get("max_error", 0.0) < call.tolerance
    report = strategy.report()
    if not spec.is_baseline:
        dense = attention(call.query, call.key, call.value)
        facts["relative_l1"] = float(relative_l1(output, dense).mean())
    facts |= {"density": report.density, "backend": "+".join(report.backends), "parameters": spec.parameters}
    strategy.installed = True  # as within a pipeline: output checks are gathered
    contexts = last_steps(call, calls_in_a_row)

    def attend():
        strategy.reset()
        for context in contexts:
            strategy(call.query, call.key, call.value, context)

    timed(attend, call, "strategies", len(contexts), **facts)
    strategy.verify_outputs()


def test_strategy_gradients(call, spec, timed, calls_in_a_row):
    """Forward and backward pass; gradients against autograd are the conformance suite's business."""
    if not spec.create().capabilities.backward:
        pytest.skip("has no backward pass")
    strategy = spec.create()
    tensors = [part.detach().clone().requires_grad_() for part in (call.query, call.key, call.value)]

    def both_passes(context):
        output = strategy(*tensors, context)
        return torch.autograd.grad(output, tensors, call.value)

    assert all(torch.isfinite(gradient).all() for gradient in both_passes(call.context))
    report = strategy.report()
    facts = {"density": report.density, "backend": "+".join(report.backends), "parameters": spec.parameters}
    strategy.installed = True
    contexts = last_steps(call, calls_in_a_row)
    timed(lambda: [both_passes(context) for context in contexts], call, "gradients", len(contexts), **facts)


def last_steps(call, steps):
    """Contexts of one layer in the last steps, which end with the call's own.

    What a method keeps for some steps is used as in a video.
    """
    first = call.context.step_index - steps + 1
    return [replace(call.context, step_index=first + index) for index in range(steps)]


def check_weighted_mean(strategy, call):
    constant = torch.full_like(call.value, 0.75)
    output = strategy(call.query, call.key, constant, call.context)
    assert output.float().sub(0.75).abs().max() < call.tolerance
    output = strategy(call.query, call.key, call.value, call.context)
    assert torch.isfinite(output).all()
    low, high = call.value.amin(2, keepdim=True), call.value.amax(2, keepdim=True)
    outside = torch.maximum(low - output, output - high).max()
    assert outside < call.tolerance
