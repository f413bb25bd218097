"""Strategies in a real Llama (random weights), and a synthetic retrieval head."""

import pytest
import torch

from core import (
    AttentionContext,
    InstallError,
    TokenLayout,
    UnsupportedCallError,
    create_strategy,
)
from core.language_model import apply_to_language_model
from core.testing import random_qkv

LENGTH = 300


@pytest.fixture
def model():
    from transformers import LlamaConfig, LlamaForCausalLM

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=64,
            hidden_size=128,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=1024,
        )
        return LlamaForCausalLM(config).eval()


def prompt(length=LENGTH, batch=1):
    return torch.randint(0, 64, (batch, length), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize(
    "name, options", [("dense", {}), ("sparge", {"topk": 1.0}), ("sparge", {"cdf": 1.0})]
)
def test_full_attention_equals_the_model(model, name, options):
    untouched = model(prompt()).logits
    with apply_to_language_model(model, name, **options) as run:
        assert torch.allclose(model(prompt()).logits, untouched, atol=1e-5)
        assert run.report().calls == 2 and run.report().density == 1.0
    assert torch.equal(model(prompt()).logits, untouched)


@torch.no_grad()
def test_sparse_prompts_are_causal(model):
    """Later tokens move no earlier block of queries; the queries of one block share their choice."""
    first, second = prompt(), prompt()
    second[:, 192:] = (second[:, 192:] + 1) % 64
    for rule in ({"topk": 0.2}, {"cdf": 0.5}, {"cdf": 0.5, "similarity_threshold": 0.05}):
        with apply_to_language_model(model, "sparge", block_size=64, **rule) as run:
            outputs = [model(tokens).logits for tokens in (first, second)]
            assert run.report().density < 0.9
        assert torch.equal(outputs[0][:, :192], outputs[1][:, :192])
        assert not torch.equal(outputs[0][:, 192:], outputs[1][:, 192:])


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_generation_goes_on_with_the_cache(model, cache):
    tokens = prompt(batch=2)
    options = {
        "attention_mask": torch.ones_like(tokens),  # transformers takes tokens 0 for padding otherwise
        "max_new_tokens": 5,
        "do_sample": False,
        "pad_token_id": 0,
        "cache_implementation": cache,
        "disable_compile": True,
    }
    untouched = model.generate(tokens, **options)
    with apply_to_language_model(model, "sparge", topk=1.0) as run:
        assert torch.equal(model.generate(tokens, **options), untouched)
        assert run.report().calls == 2  # the prompt's layers; single queries are exact


@torch.no_grad()
def test_calls_without_an_answer_are_refused(model):
    with apply_to_language_model(model, "sparge"):
        padded = torch.ones(1, LENGTH, dtype=torch.long)
        padded[:, :7] = 0
        with pytest.raises(UnsupportedCallError, match="300 queries for 300 keys.: padding"):
            model(prompt(), attention_mask=padded)
        cache = model(prompt(), use_cache=True).past_key_values
        with pytest.raises(UnsupportedCallError, match="2 queries for 302 keys.*a prompt in parts"):
            model(prompt(2), past_key_values=cache)
        with pytest.raises(InstallError, match="already"):
            apply_to_language_model(model, "sparge")
    with pytest.raises(InstallError, match="'radial' is not causal"):
        apply_to_language_model(model, "radial")
    with pytest.raises(InstallError, match="expected a model of transformers, got Linear"):
        apply_to_language_model(torch.nn.Linear(2, 2), "sparge")


def test_a_strategy_that_is_not_causal_refuses_a_causal_call():
    layout = TokenLayout(0, 4, 8, 8)
    with pytest.raises(UnsupportedCallError, match="causal attention"):
        create_strategy("radial", block_size=64)(*random_qkv(layout), AttentionContext(layout, causal=True))


@pytest.mark.parametrize("place", [3, 700, 1500, 1990, 2031])
def test_the_needle_is_kept(place):
    """One key answers the last 16 queries; whatever else is dropped, its block is not."""
    length = 2048
    layout = TokenLayout(0, 1, 1, length)
    generator = torch.Generator().manual_seed(place)
    query, key, value = (torch.randn(1, 1, length, 64, generator=generator) for _ in range(3))
    question = torch.nn.functional.normalize(torch.randn(64, generator=generator), dim=0)
    key[:, :, place] = 40 * question
    query[:, :, -64:] = 8 * question + 0.1 * query[:, :, -64:]
    strategy = create_strategy("sparge", topk=0.1, block_size=64)
    output = strategy(query, key, value, AttentionContext(layout, causal=True))
    answer = value[0, 0, place]
    assert (output[0, 0, -16:] - answer).abs().max() < 1e-3
    assert strategy.report().density < 0.3
