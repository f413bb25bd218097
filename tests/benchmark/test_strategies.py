"""Time of every registered strategy in one attention call, with its prediction and reordering.

No time without a check: a strategy that shows its block mask is compared with float64 attention over
exactly that mask; of any other, the output must be a weighted mean of the values (so constant values come
out constant), finite and the same at every call.
"""

import pytest
import torch

from core import BlockSparseMask
from core.dense import attention
from harness.tuning import relative_l1

CALLS_IN_A_ROW = {"cpu": 1, "cuda": 5}  # a model queues its layers without waiting for any of them


@torch.inference_mode()
def test_strategy(call, spec, timed, error_of):
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

    def attend():
        strategy(*inputs)

    timed(attend, call, "strategies", CALLS_IN_A_ROW[call.query.device.type], **facts)
    strategy.verify_outputs()


def test_strategy_gradients(call, spec, timed):
    """Forward and backward pass; gradients against autograd are the conformance suite's business."""
    if not spec.create().capabilities.backward:
        pytest.skip("has no backward pass")
    strategy = spec.create()
    tensors = [part.detach().clone().requires_grad_() for part in (call.query, call.key, call.value)]

    def both_passes():
        output = strategy(*tensors, call.context)
        return torch.autograd.grad(output, tensors, call.value)

    assert all(torch.isfinite(gradient).all() for gradient in both_passes())
    report = strategy.report()
    facts = {"density": report.density, "backend": "+".join(report.backends), "parameters": spec.parameters}
    strategy.installed = True
    timed(both_passes, call, "gradients", CALLS_IN_A_ROW[call.query.device.type], **facts)


def check_weighted_mean(strategy, call):
    constant = torch.full_like(call.value, 0.75)
    output = strategy(call.query, call.key, constant, call.context)
    assert output.float().sub(0.75).abs().max() < call.tolerance
    output = strategy(call.query, call.key, call.value, call.context)
    assert torch.isfinite(output).all()
    low, high = call.value.amin(2, keepdim=True), call.value.amax(2, keepdim=True)
    outside = torch.maximum(low - output, output - high).max()
    assert outside < call.tolerance
