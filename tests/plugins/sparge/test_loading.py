"""Calibrations of sparge: what a file must hold, what it is used with, and what a call takes from it."""

import json

import pytest
import torch

from core import AttentionContext, ParameterError, TokenLayout, create_strategy
from core.testing import random_qkv
from plugins.sparge.prediction import predict_mask

LAYOUT = TokenLayout(0, 4, 16, 20)
BLOCKS = {"block_size": 64}
TOPK = {"topk": [[0.2, 0.6], [0.4, 1.0]]}


@pytest.fixture
def write(tmp_path):
    def write(values=TOPK, parameters=BLOCKS, **facts):
        path = tmp_path / "c.json"
        fields = {"strategy": "sparge", "parameters": parameters, "values": values, "model": "tiny"}
        path.write_text(json.dumps(fields | facts))
        return str(path)

    return write


@pytest.mark.parametrize("layer", [0, 1])
def test_what_the_file_leaves_to_the_strategy_is_the_strategys(write, layer):
    """A gate and a skip threshold for all heads, beside topk of each."""
    options = BLOCKS | {"similarity_threshold": 0.015, "skip_threshold": 20.0}
    strategy = create_strategy("sparge", calibration=write(parameters=options), **options)
    query, key, _ = random_qkv(LAYOUT)
    pattern = strategy.pattern(query, key, AttentionContext(LAYOUT, layer, 2))
    expected = predict_mask(
        query, key, (64, 64), top_k=torch.tensor(TOPK["topk"][layer]), similarity_threshold=0.015
    )
    assert torch.equal(pattern.mask.to_blocks(), expected.to_blocks())
    ungated = predict_mask(query, key, (64, 64), top_k=torch.tensor(TOPK["topk"][layer]))
    assert not torch.equal(expected.to_blocks(), ungated.to_blocks())
    assert pattern.skip_threshold.tolist() == [20.0, 20.0]


@pytest.mark.parametrize(
    "other",
    [
        {"order": "gilbert"},
        {"attention_sink": True},
        {"projection": "random"},
        {"similarity_threshold": 0.5},
        {"skip_threshold": 10.0},
        {"quantization": "int8_fp8"},
        {"key_block_size": 128},
    ],
    ids=lambda other: next(iter(other)),
)
def test_parameters_that_the_file_lacks_count_as_defaults(write, other):
    name, value = next(iter(other.items()))
    create_strategy("sparge", calibration=write(parameters=BLOCKS | other), **BLOCKS | other)
    with pytest.raises(ParameterError, match=f"was made with {name}=.*, got {value}"):
        create_strategy("sparge", calibration=write(), **BLOCKS | other)
    with pytest.raises(ParameterError, match=f"was made with {name}={value}, got "):
        create_strategy("sparge", calibration=write(parameters=BLOCKS | other), **BLOCKS)


def test_the_users_own_parameters_are_free(write):
    free = {"dense_layers": 1, "dense_timesteps": 2, "nan_guard": "off", "backend": "torch"}
    create_strategy("sparge", calibration=write(), **BLOCKS, **free)
    with pytest.raises(ParameterError, match="was made with novelty=3, got None"):
        create_strategy("sparge", calibration=write(parameters=BLOCKS | {"novelty": 3}), **BLOCKS)


@pytest.mark.parametrize(
    "values, message",
    [
        ({"topk": [[2.0, 0.5]]}, "topk: Input should be less than or equal to 1, got 2.0"),
        ({"topk": [[0.5, 0.0]]}, "topk: Input should be greater than 0, got 0.0"),
        ({"cdf": [[0.5, -1.0]]}, "cdf: Input should be greater than 0"),
        ({"cdf": [[0.5, float("nan")]]}, "not a calibration: values.cdf.0.1: .*finite"),
        ({"topk": [[0.5, float("inf")]]}, "not a calibration: values.topk.0.1: .*finite"),
        ({**TOPK, "skip_threshold": [[5.0, -5.0]] * 2}, "skip_threshold: Input should be greater than or eq"),
        ({**TOPK, "similarity_threshold": [[0.5, 1.5]] * 2}, "similarity_threshold: Input should be less"),
    ],
    ids=str,
)
def test_values_out_of_range_are_refused(write, values, message):
    with pytest.raises(ParameterError, match=message):
        create_strategy("sparge", calibration=write(values), **BLOCKS)


def test_a_gate_below_0_is_off(write):
    query, key, _ = random_qkv(LAYOUT)
    masks = [
        create_strategy("sparge", calibration=write(values), **BLOCKS)
        .pattern(query, key, AttentionContext(LAYOUT, 0, 2))
        .mask.to_blocks()
        for values in (TOPK, TOPK | {"similarity_threshold": [[-0.9, -0.1]] * 2})
    ]
    assert torch.equal(*masks)


@pytest.mark.parametrize(
    "facts, message",
    [
        ({"layout": {"foo": 1}}, "not a calibration: layout: not the fields of a TokenLayout: .*'foo'"),
        ({"layout": {"text_length": 0, "frames": 0, "height": 1, "width": 1}}, "layout: .*frames must be"),
        ({"head_dim": 0}, "not a calibration: head_dim"),
        ({"errors": [[0.1, float("nan")]] * 2}, "not a calibration: errors.0.1"),
    ],
    ids=str,
)
def test_broken_facts_are_refused(write, facts, message):
    with pytest.raises(ParameterError, match=message):
        create_strategy("sparge", calibration=write(**facts), **BLOCKS)


def test_another_head_dimension_is_refused(write):
    strategy = create_strategy("sparge", calibration=write(head_dim=64), **BLOCKS)
    context = AttentionContext(LAYOUT, 0, 2)
    strategy(*random_qkv(LAYOUT), context)
    with pytest.raises(ParameterError, match="2 layers of 2 heads of 64; this call has .* 2 heads of 32"):
        strategy(*random_qkv(LAYOUT, head_dim=32), context)
