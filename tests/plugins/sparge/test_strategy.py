from types import SimpleNamespace

import pytest
import torch

from core import (
    AttentionContext,
    ParameterError,
    TokenLayout,
    UnsupportedCallError,
    apply_strategy,
    available_strategies,
    create_strategy,
)
from core.registry import installed
from core.testing import StrategyConformance, dense_fp64, executed_weights, random_qkv
from plugins.sparge.precision import resolve_quantization
from plugins.sparge.presets import PRESETS
from plugins.sparge.strategy import SpargeStrategy

LAYOUT = TokenLayout(16, 4, 16, 20)
DEMO = TokenLayout(16, 17, 12, 20)


class TestTopkConformance(StrategyConformance):
    strategy = SpargeStrategy
    parameters = {"block_size": 64}
    full_density = {"topk": 1.0}


class TestCdfConformance(StrategyConformance):
    strategy = SpargeStrategy
    parameters = {"block_size": 64, "cdf": 0.6, "similarity_threshold": 0.01, "attention_sink": True}
    full_density = {"cdf": 1.0}


class TestInt8Conformance(StrategyConformance):
    """Of 8 bits, what does not need the precision of the inputs."""

    strategy = SpargeStrategy
    parameters = {"block_size": 64, "quantization": "int8_fp16", "skip_threshold": 30}
    keeps_tokens = False


class TestGilbertConformance(StrategyConformance):
    strategy = SpargeStrategy
    parameters = {"block_size": 64, "density": 0.6, "order": "gilbert"}
    full_density = {"density": 1.0}


def test_registered_through_the_entry_point():
    rows = {row.name: row for row in available_strategies()}
    assert rows["sparge"].available and rows["sparge"].summary.startswith("SpargeAttn")
    assert create_strategy("sparge").parameters.topk == 0.5
    assert create_strategy("sparge", density="0.3").parameters.topk is None


@pytest.mark.parametrize("density", [0.25, 0.5, 0.75])
def test_density_is_what_was_asked_for(density):
    layout = TokenLayout(16, 8, 16, 20)
    query, key, value = random_qkv(layout)
    strategy = SpargeStrategy(density=density, block_size=64)
    strategy(query, key, value, AttentionContext(layout))
    assert density - 0.05 < strategy.report().density < density + 0.005


def test_text_is_never_dropped():
    query, key, value = random_qkv(LAYOUT)
    strategy = SpargeStrategy(topk=0.05, block_size=64)
    output = strategy(query, key, value, AttentionContext(LAYOUT))
    text = LAYOUT.text_slice
    assert (output - dense_fp64(query, key, value))[:, :, text].abs().max() < 5e-6
    mask = strategy.pattern(query, key, AttentionContext(LAYOUT)).mask
    assert mask.to_dense()[:, :, :, text].all() and strategy.report().density < 0.4


@pytest.mark.parametrize("order", ["model", "gilbert"])
def test_the_sink_is_never_dropped(order):
    layout = TokenLayout(0, 4, 16, 20)
    query, key, _ = random_qkv(layout)
    kept = [
        SpargeStrategy(topk=0.1, block_size=64, attention_sink=sink, order=order)
        .pattern(query, key, AttentionContext(layout))
        .mask.to_blocks()
        for sink in (False, True)
    ]
    assert kept[1][..., 0].all() and not kept[0][..., 0].all()
    assert kept[1][..., 1:].sum() == 2 * 20 * 2  # its own two of 20 blocks in every row, beside the sink


def relative_l1(output, expected):
    return float((output.double() - expected.double()).abs().sum() / expected.double().abs().sum())


# Over fresh inputs 0.038 +- 0.0006 and 0.0122 +- 0.0002; four deviations above.
@pytest.mark.parametrize("quantization, error", [("int8_fp8", 0.0405), ("int8_fp16", 0.013)])
@pytest.mark.parametrize("order", ["model", "gilbert"])
def test_quantization(quantization, error, order):
    tensors = random_qkv(LAYOUT, heads=8)
    context = AttentionContext(LAYOUT)
    outputs = [
        SpargeStrategy(topk=0.4, order=order, quantization=name)(*tensors, context)
        for name in ("none", quantization)
    ]
    assert error / 10 < relative_l1(outputs[1], outputs[0]) < error
    full = SpargeStrategy(topk=1.0, order=order, quantization=quantization)(*tensors, context)
    assert relative_l1(full, dense_fp64(*tensors)) < error


def test_auto_quantization_is_exact_on_cpus():
    tensors = random_qkv(LAYOUT)
    context = AttentionContext(LAYOUT)
    outputs = [SpargeStrategy(quantization=name)(*tensors, context) for name in ("auto", "none")]
    assert torch.equal(*outputs)


@pytest.mark.parametrize(
    "capability, dtype, backend, causal, expected",
    [
        ((9, 0), torch.bfloat16, "auto", False, "int8_fp8"),
        ((8, 9), torch.float16, "triton", False, "int8_fp8"),
        ((8, 0), torch.bfloat16, "auto", False, "none"),
        ((9, 0), torch.float32, "auto", False, "none"),
        ((9, 0), torch.bfloat16, "flex", False, "none"),
        ((9, 0), torch.bfloat16, "auto", True, "none"),
    ],
)
def test_auto_quantization_of_gpus(monkeypatch, capability, dtype, backend, causal, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    facts = {"device": torch.device("cuda"), "dtype": dtype, "shape": (1, 2, 64, 128)}
    query = SimpleNamespace(**facts, requires_grad=False)
    assert resolve_quantization("auto", query, backend, causal=causal) == expected
    small = SimpleNamespace(**(facts | {"shape": (1, 2, 64, 64)}), requires_grad=False)
    assert resolve_quantization("auto", small, backend, causal=causal) == "none"
    trained = SimpleNamespace(**facts, requires_grad=True)
    assert resolve_quantization("auto", trained, backend, causal=causal) == "none"
    assert resolve_quantization("int8_fp16", query, backend, causal=causal) == "int8_fp16"


def test_skipped_tiles_are_counted_by_half():
    """Weights of skipped tiles are exactly zero; nothing else is."""
    layout = TokenLayout(0, 4, 8, 16)
    query, key, value = random_qkv(layout)
    query[..., 0], key[..., 0] = 10.0, 0.0
    for block in range(8):
        key[:, :, 64 * block : 64 * block + 64, 0] = 16.0 - 2 * block
    context = AttentionContext(layout)
    found = []
    for threshold in (1000, 30, 15, 8, 0):
        strategy = SpargeStrategy(topk=1.0, skip_threshold=threshold, attention_sink=True)
        weights = executed_weights(strategy, query, key, context)
        report = strategy.report()
        multiplied = float((weights != 0).double().mean())
        assert report.shares_by_layer["qk_density"] == [[1.0]]
        assert report.shares_by_layer["pv_density"][0][0] == pytest.approx(multiplied)
        assert report.density == pytest.approx((1 + multiplied) / 2)
        found.append(multiplied)
    assert found[0] == 1.0 and found == sorted(found, reverse=True) and len(set(found)) > 2
    plain, unskipped = (
        SpargeStrategy(topk=0.5, skip_threshold=number)(query, key, value, context) for number in (None, 1000)
    )
    assert relative_l1(unskipped, plain) < 2e-5  # scores of 30 in fp32, by two forms


def test_gradients_are_neither_quantized_nor_skipped():
    query, key, value = (part.requires_grad_() for part in random_qkv(LAYOUT))
    SpargeStrategy()(query, key, value, AttentionContext(LAYOUT)).sum().backward()
    assert query.grad is not None and torch.isfinite(query.grad).all()
    for options in ({"quantization": "int8_fp8"}, {"skip_threshold": 20}):
        with pytest.raises(UnsupportedCallError, match="no backward with"):
            SpargeStrategy(**options)(query, key, value, AttentionContext(LAYOUT))


def test_causal_calls_are_neither_quantized_nor_skipped():
    layout = TokenLayout(0, 1, 1, 300)
    context = AttentionContext(layout, causal=True)
    SpargeStrategy()(*random_qkv(layout), context)
    for options in ({"quantization": "int8_fp8"}, {"skip_threshold": 20}):
        with pytest.raises(UnsupportedCallError, match="causal attention is supported only without"):
            SpargeStrategy(**options)(*random_qkv(layout), context)


@pytest.mark.parametrize("head_dim", [32, 64, 80, 96, 128])
@pytest.mark.parametrize("order", ["model", "gilbert"])
def test_any_head_dimension(head_dim, order):
    layout = TokenLayout(7, 3, 9, 11)
    tensors = random_qkv(layout, head_dim=head_dim, batch=2)
    output = SpargeStrategy(topk=1.0, order=order)(*tensors, AttentionContext(layout))
    assert (output - dense_fp64(*tensors)).abs().max() < 5e-6


@pytest.mark.parametrize("causal", [False, True])
def test_every_length(causal):
    for length in (*range(120, 136), 191, 192, 193, 255, 256, 257, 300, 4095, 4096, 4097):
        layout = TokenLayout(0, 1, 1, length)
        context = AttentionContext(layout, causal=causal)
        query, key, value = random_qkv(layout, heads=1)
        strategy = SpargeStrategy(topk=0.3, block_size=64)
        kept = strategy.pattern(query, key, context).mask.to_dense()
        allowed = kept.tril() if causal else kept
        scores = (query.double() @ key.double().transpose(2, 3) / 8).masked_fill(~allowed, float("-inf"))
        output = strategy(query, key, value, context)
        assert (output - scores.softmax(-1) @ value.double()).abs().max() < 5e-6, length


def test_sparsity_grows_with_length():
    """At an equal bound on the error, the same scene in more tokens keeps a smaller share of the blocks."""
    densities = []
    for grid in ((4, 8, 8), (4, 16, 16), (8, 16, 24)):
        layout = TokenLayout(0, *grid)
        coarse = torch.randn(1, 64, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        field = torch.nn.functional.interpolate(coarse, grid, mode="trilinear")[0].flatten(1).T
        tokens = 2 * field[None, None].contiguous()
        exact = dense_fp64(tokens, tokens, tokens)
        for topk in range(1, 41):
            strategy = SpargeStrategy(topk=topk / 40, order="gilbert", block_size=64)
            if relative_l1(strategy(tokens, tokens, tokens, AttentionContext(layout)), exact) < 0.06:
                break
        densities.append(strategy.report().density)
    assert densities[0] > 1.5 * densities[1] > 1.5 * 1.2 * densities[2]


def test_a_field_that_is_smooth_in_space_is_more_self_similar_along_the_curve():
    """Blocks of neighbours in all three directions are more alike than runs of a row."""
    layout = TokenLayout(0, 8, 16, 24)
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 64, 2, 4, 6, generator=generator)
    field = torch.nn.functional.interpolate(coarse, (8, 16, 24), mode="trilinear")[0].flatten(1).T
    tokens = field[None, None].contiguous()
    density = {}
    for order in ("model", "gilbert"):
        strategy = SpargeStrategy(cdf=0.9, similarity_threshold=0.3, order=order, block_size=64)
        density[order] = float(strategy.pattern(tokens, tokens, AttentionContext(layout)).density)
    assert density["gilbert"] < 0.85 * density["model"]


@pytest.mark.parametrize("projection", ["optimal", "pca", "channels", "random"])
def test_projection_changes_the_choice_and_not_its_size(projection):
    query, key, _ = random_qkv(LAYOUT)
    context = AttentionContext(LAYOUT)
    options = {"topk": 0.3, "block_size": 64, "order": "gilbert"}
    plain, low, all_directions = (
        SpargeStrategy(**options, **reduced).pattern(query, key, context).mask.to_blocks()
        for reduced in (
            {},
            {"projection": projection, "directions": "16"},
            {"projection": projection, "directions": 64},
        )
    )
    assert torch.equal(plain.sum(-1), low.sum(-1)) and not torch.equal(plain, low)
    assert torch.equal(plain, all_directions)


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.name)
def test_presets_are_registered_and_run(preset):
    assert installed().preset("sparge", preset.name) == preset
    query, key, _ = random_qkv(DEMO, heads=4)
    context = AttentionContext(DEMO, layer_index=3, num_layers=8)
    pattern = create_strategy("sparge", preset=preset.name).pattern(query, key, context)
    assert 0.2 < float(pattern.density) <= 1.0


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"topk": 0.5, "cdf": 0.9}, "give one of density, topk, cdf"),
        ({"topk": 0}, "topk"),
        ({"cdf": 1.5}, "cdf"),
        ({"directions": 32}, "directions is read by projection 'optimal' .*, not by 'none'"),
        ({"similarity_threshold": -0.1}, "similarity_threshold"),
        ({"key_block_size": 32}, "key_block_size"),
        ({"quantization": "int4"}, "quantization"),
        ({"skip_threshold": -1}, "skip_threshold"),
        ({"projection": "svd"}, "projection"),
        ({"directions": 12}, "directions"),
        ({"order": "hilbert"}, "order: Input should be 'model' or 'gilbert'"),
        ({"topkk": 0.5}, "unknown parameter 'topkk', did you mean 'topk'"),
    ],
    ids=str,
)
def test_wrong_parameters_are_refused(wrong, message):
    with pytest.raises(ParameterError, match=message):
        SpargeStrategy(**wrong)


def test_a_calibration_of_another_model_is_refused_at_installation(make_pipeline):
    pipeline = make_pipeline()
    layers, heads = (
        len(pipeline.transformer.transformer_blocks),
        pipeline.transformer.config.num_attention_heads,
    )
    with pytest.raises(ParameterError, match=f"this model has {layers} layers of {heads} heads"):
        apply_strategy(pipeline, "sparge", preset="calibrated")
    with apply_strategy(pipeline, "sparge"):
        pass
