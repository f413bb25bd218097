import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import plugins.dense
from core import AttentionContext, ParameterError, TokenLayout, create_strategy
from core.testing import StrategyConformance, dense_fp64, random_qkv
from plugins.dense.reference import dense_attention_reference
from plugins.dense.strategy import DenseParameters, DenseStrategy

LAYOUT = TokenLayout(5, 3, 7, 9)


class TestDenseConformance(StrategyConformance):
    strategy = DenseStrategy
    full_density = {}


class TestSdpaConformance(StrategyConformance):
    strategy = DenseStrategy
    parameters = {"backend": "sdpa"}
    full_density = {}


def test_registered_through_the_entry_point():
    assert isinstance(create_strategy("dense"), DenseStrategy)


def test_output_equals_the_reference_with_fewer_key_heads():
    query, key, value = random_qkv(LAYOUT, heads=4)
    key, value = key[:, :2], value[:, :2]
    output = DenseStrategy()(query, key, value, AttentionContext(LAYOUT))
    assert (output - dense_attention_reference(query, key, value)).abs().max() < 5e-6


def test_reference_is_softmax_attention_and_holds_for_large_scores():
    query, key, value = random_qkv(LAYOUT)
    assert torch.allclose(
        dense_attention_reference(query, key, value), dense_fp64(query, key, value), atol=1e-12
    )
    large = dense_attention_reference(query, key, value, scale=1e4)
    best = (query @ key.transpose(-1, -2)).argmax(-1)
    taken = value.gather(2, best[..., None].expand_as(value))
    assert torch.isfinite(large).all() and (large - taken).abs().amax(-1).median() < 1e-6


def test_sdpa_backend_is_the_call_of_diffusers():
    query, key, value = random_qkv(LAYOUT, dtype=torch.bfloat16)
    output = DenseStrategy(backend="sdpa")(query, key, value, AttentionContext(LAYOUT))
    expected = F.scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False
    )
    assert torch.equal(output, expected)


def test_gradients_flow():
    query, key, value = (part.requires_grad_() for part in random_qkv(LAYOUT))
    DenseStrategy()(query, key, value, AttentionContext(LAYOUT)).sum().backward()
    assert all(torch.isfinite(part.grad).all() for part in (query, key, value))


def test_report_names_the_backend():
    strategy = DenseStrategy()
    strategy(*random_qkv(LAYOUT), AttentionContext(LAYOUT))
    report = strategy.report()
    assert report.density == 1.0 and report.backends == {"dense-sdpa": 1} and report.dense_calls == {}


def test_unknown_backend_raises():
    with pytest.raises(ParameterError, match="backend"):
        DenseStrategy(backend="fastest")


def test_readme_lists_every_parameter_with_its_default():
    readme = (Path(plugins.dense.__file__).parent / "README.md").read_text()
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", readme, flags=re.MULTILINE))
    expected = {name: str(field.default) for name, field in DenseParameters.model_fields.items()}
    assert {name: default.strip('"') for name, default in rows.items()} == expected
