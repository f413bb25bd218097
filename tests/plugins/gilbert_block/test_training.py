import pytest
import torch

from core import AttentionContext, LayoutError, LevelMask, ParameterError, TokenLayout, apply_strategy
from core.testing import dense_fp64, random_qkv, tiny_call, tiny_transformer
from plugins.gilbert_block import reference
from plugins.gilbert_block.strategy import GilbertBlockStrategy
from plugins.gilbert_block.training import AdaptiveBlockSparseAttnTrain

LAYOUT = TokenLayout(20, 3, 9, 13)
SMALL = {"block_size": 64, "samples": 8}
OPTIONS = [
    {"tau": 0.4},
    {"tau": 0.4, "remainder": True},
    {"selection": "rank", "bounds": (0.1, 0.3, 0.5, 0.7)},
    {"selection": "mass", "bounds": (0.2, 0.3, 0.4, 0.5)},
]


def reference_output(module, query, key, value):
    """Attention over the module's own pattern by definition, differentiable, fp64."""
    layout = module.layout or TokenLayout(0, 1, 1, query.shape[2])
    pattern = module.strategy.pattern(query, key, AttentionContext(layout))
    by_level = isinstance(pattern.mask, LevelMask)
    levels = pattern.mask.to_levels() if by_level else pattern.mask.to_blocks().to(torch.int8)
    output = torch.empty(query.shape, dtype=torch.float64)
    heads = []
    for head in range(query.shape[1]):
        moved = (part[0, head].index_select(0, pattern.order) for part in (query, key, value))
        found = reference.attention(*moved, levels[0, head], pattern.mask.block_size)
        heads.append(torch.zeros_like(output[0, 0]).index_copy(0, pattern.order.long(), found))
    return torch.stack(heads)[None]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_output_and_gradients_are_those_of_the_reference(options):
    module = AdaptiveBlockSparseAttnTrain(LAYOUT, **SMALL, **options)
    tensors = [part.requires_grad_() for part in random_qkv(LAYOUT)]
    output = module(*tensors)
    target = torch.randn_like(output)
    gradients = torch.autograd.grad((output * target).sum(), tensors)
    expected = reference_output(module, *tensors)
    assert (output - expected).abs().max() < 5e-6
    for found, exact in zip(gradients, torch.autograd.grad((expected * target).sum(), tensors), strict=True):
        assert (found - exact).norm() < 1e-5 * exact.norm()
    assert 0.1 < module.strategy.report().density < 0.9


def test_sequence_without_a_layout():
    module = AdaptiveBlockSparseAttnTrain(**SMALL, tau=1.0)
    tensors = random_qkv(TokenLayout(0, 1, 1, 150))
    assert (module(*tensors) - dense_fp64(*tensors)).abs().max() < 5e-6


def test_steps_draw_other_samples_and_the_record_stays_short():
    module = AdaptiveBlockSparseAttnTrain(LAYOUT, **SMALL, tau=0.3)
    tensors = random_qkv(LAYOUT)
    first, second, again = (module(*tensors, step_index=step) for step in (0, 1, 0))
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert module.strategy.report().calls == 1


@pytest.mark.parametrize("options", [{}, {"selection": "rank"}, {"order": "model"}], ids=str)
def test_a_module_that_has_drawn_can_train(options):
    """What it keeps from a call in inference mode has a place in a backward pass."""
    module = AdaptiveBlockSparseAttnTrain(LAYOUT, **SMALL, **options)
    tensors = random_qkv(LAYOUT)
    with torch.inference_mode():
        drawn = module(*tensors)
    leaves = [part.clone().requires_grad_() for part in tensors]
    output = module(*leaves)
    assert torch.equal(output, drawn)
    output.square().sum().backward()
    assert all(part.grad.abs().max() > 0 for part in leaves)


def test_layers_draw_other_samples():
    tensors = random_qkv(LAYOUT)
    options = SMALL | {"tau": 0.3}
    outputs = [
        AdaptiveBlockSparseAttnTrain(LAYOUT, layer_index=layer, **options)(*tensors) for layer in (0, 3)
    ]
    strategy = GilbertBlockStrategy(**options)
    expected = [strategy(*tensors, AttentionContext(LAYOUT, layer_index=layer)) for layer in (0, 3)]
    assert torch.equal(outputs[0], expected[0]) and torch.equal(outputs[1], expected[1])
    assert not torch.equal(*outputs)


def test_wrong_calls_are_refused():
    module = AdaptiveBlockSparseAttnTrain(LAYOUT, **SMALL)
    query, key, value = random_qkv(LAYOUT)
    with pytest.raises(LayoutError, match="20 text"):
        module(*(part[:, :, 1:] for part in (query, key, value)))
    with pytest.raises(LayoutError, match="query must be a tensor, got NoneType"):
        AdaptiveBlockSparseAttnTrain()(None, key, value)
    with pytest.raises(LayoutError, match=r"query \[B, H, L, D\], got query \(371, 64\)"):
        AdaptiveBlockSparseAttnTrain()(query[0, 0], key, value)
    with pytest.raises(LayoutError, match="must be a TokenLayout"):
        AdaptiveBlockSparseAttnTrain(())(query, key, value)
    with pytest.raises(ParameterError, match="another sample; leave refresh_every at 1, got 2"):
        AdaptiveBlockSparseAttnTrain(refresh_every=2)


def test_constant_queries_have_a_gradient_without_nan():
    module = AdaptiveBlockSparseAttnTrain(LAYOUT, **SMALL, tau=0.3)
    tensors = [torch.zeros_like(part).requires_grad_() for part in random_qkv(LAYOUT)]
    module(*tensors).sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in tensors)


def weight_gradients(transformer, checkpointing, dtype=None, **options):
    """Gradients of all parameters of a denoiser's call with the strategy installed."""
    call = tiny_call(transformer)
    transformer.zero_grad()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    else:
        transformer.disable_gradient_checkpointing()
    strategy = GilbertBlockStrategy(**SMALL, **options)
    with apply_strategy(transformer, strategy) as run:
        with torch.autocast("cpu", dtype, enabled=dtype is not None):
            output = transformer(**call).sample
        output.float().square().mean().backward()
        density = run.report().density
    return {name: part.grad.clone() for name, part in transformer.named_parameters()}, density


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_a_denoiser_trains_with_and_without_checkpointing(options):
    transformer = tiny_transformer().train()
    plain, density = weight_gradients(transformer, False, **options)
    repeated, _ = weight_gradients(transformer, True, **options)
    assert density < 0.95
    for name, gradient in plain.items():
        assert torch.isfinite(gradient).all(), name
        assert torch.allclose(gradient, repeated[name], rtol=1e-5, atol=1e-8), name
    assert all(gradient.abs().max() > 0 for name, gradient in plain.items() if "attn1.to_" in name)


def test_full_density_has_the_gradients_of_dense_attention():
    transformer = tiny_transformer().train()
    found, density = weight_gradients(transformer, False, tau=1.0)
    transformer.zero_grad()
    transformer(**tiny_call(transformer)).sample.square().mean().backward()
    assert density == 1.0
    for name, parameter in transformer.named_parameters():
        assert torch.allclose(found[name], parameter.grad, rtol=1e-3, atol=1e-6), name


@pytest.mark.parametrize("options", OPTIONS[:3], ids=str)
def test_autocast_trains(options):
    transformer = tiny_transformer().train()
    full, _ = weight_gradients(transformer, False, **options)
    half, density = weight_gradients(transformer, True, torch.bfloat16, **options)
    assert density < 0.95
    norms = [torch.cat([part.flatten() for part in grads.values()]) for grads in (full, half)]
    assert torch.isfinite(norms[1]).all()
    assert (norms[0] - norms[1]).norm() < 0.1 * norms[0].norm()
