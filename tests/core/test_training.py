"""Backward passes through a model with a strategy: activations computed again, and what is refused."""

import copy

import pytest
import torch

from core import InstallError, apply_strategy
from core.testing import tiny_call, tiny_transformer

STRATEGIES = {
    "radial": {"block_size": 64, "dense_timesteps": 1},
    "sparge": {"block_size": 64, "topk": 0.4},
    "svg-smart": {"block_size": 64, "density": 0.5},
    "gilbert-block": {"block_size": 64, "selection": "topk", "keep_ratio": [0.3, 0.3]},
}
TIMESTEPS = (900, 500)


def gradients(transformer, name, parameters, *, checkpointing, frozen=False):
    """Of one backward pass behind the calls of two steps, and the calls that the report counts."""
    transformer = copy.deepcopy(transformer).train()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    with apply_strategy(transformer, name, **parameters) as run:
        outputs = [transformer(**tiny_call(transformer, timestep=step, seed=step))[0] for step in TIMESTEPS]
        sum(output.square().mean() for output in outputs).backward()
        calls = run.report().calls
    return [part.grad for part in transformer.parameters() if part.grad is not None], calls


@pytest.mark.parametrize("name", STRATEGIES)
def test_activations_computed_again_are_those_of_their_own_call(name):
    transformer = tiny_transformer()
    kept, calls = gradients(transformer, name, STRATEGIES[name], checkpointing=False)
    again, calls_again = gradients(transformer, name, STRATEGIES[name], checkpointing=True)
    assert len(kept) == len(again) > 20
    assert all(torch.equal(one, other) for one, other in zip(kept, again, strict=True))
    assert calls == calls_again == 4, "recomputed calls are counted"


def test_a_backward_pass_after_removal_is_refused_where_it_would_compute_again():
    transformer = tiny_transformer().train()
    for checkpointing in (False, True):
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        with apply_strategy(transformer, "radial", block_size=64):
            loss = transformer(**tiny_call(transformer))[0].sum()
        if checkpointing:
            with pytest.raises(InstallError, match="removed before the backward pass"):
                loss.backward()
        else:
            loss.backward()


def test_blocks_called_by_themselves_are_refused_before_and_after_a_call():
    transformer = tiny_transformer()
    seen = {}
    hook = transformer.transformer_blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: seen.update(kwargs), with_kwargs=True
    )
    with torch.no_grad(), apply_strategy(transformer, "dense") as run:
        transformer(**tiny_call(transformer))
        hook.remove()
        with pytest.raises(InstallError, match="outside the denoiser's own forward"):
            transformer.transformer_blocks[0](**seen)
        assert run.report().calls == 2


def test_a_model_with_a_strategy_is_not_copied():
    transformer = tiny_transformer()
    with (
        apply_strategy(transformer, "dense"),
        pytest.raises(InstallError, match="cannot be copied or pickled; call remove"),
    ):
        copy.deepcopy(transformer)
    copy.deepcopy(transformer)


def test_compiled_blocks_have_no_gradients_and_say_so():
    transformer = tiny_transformer()
    for block in transformer.transformer_blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    with (
        apply_strategy(transformer, "dense"),
        pytest.raises(Exception, match="compiled blocks with a strategy have no gradients"),
    ):
        transformer(**tiny_call(transformer))[0].sum().backward()


@torch.no_grad()
def test_a_compiled_denoiser_is_unwrapped():
    transformer = tiny_transformer()
    untouched = transformer(**tiny_call(transformer))[0]
    compiled = torch.compile(transformer, backend="eager")
    with apply_strategy(compiled, "dense") as run:
        assert torch.allclose(compiled(**tiny_call(transformer))[0], untouched, atol=1e-6)
        assert run.report().calls == 2
