"""Strategies in a real Llama (random weights), and a synthetic retrieval head."""

import copy
import gc
import weakref

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
SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}


def make(family, head="ForCausalLM", **sizes):
    """A model of that family with random weights; ``sizes`` are fields of its configuration."""
    import transformers

    config = getattr(transformers, f"{family}Config")(**sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return getattr(transformers, family + head)(config).eval()


@pytest.fixture
def model():
    return make("Llama", **SIZES, num_key_value_heads=2, max_position_embeddings=1024)


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


@torch.no_grad()
@pytest.mark.parametrize(
    "family, sizes, message",
    [
        ("Gemma2", {"num_key_value_heads": 2, "head_dim": 32}, "the attention option softcap"),
        (
            "GptOss",
            {"num_key_value_heads": 2, "head_dim": 32, "num_local_experts": 2, "num_experts_per_tok": 1},
            "the attention option s_aux",
        ),
        ("OPT", {"ffn_dim": 64, "word_embed_proj_dim": 128}, r"scaling 1.0, expected 1 / sqrt\(32\)"),
        ("Mistral", {"num_key_value_heads": 2, "sliding_window": 64}, "a token mask .* a sliding window"),
    ],
    ids=lambda value: value if isinstance(value, str) and value.isalnum() else "",
)
def test_other_attention_is_refused(family, sizes, message):
    model = make(family, **SIZES | sizes)
    with apply_to_language_model(model, "sparge"):
        for length in (LENGTH, 1) if "option" in message else (LENGTH,):
            with pytest.raises(UnsupportedCallError, match=message):
                model(prompt(length))


@torch.no_grad()
def test_models_that_see_later_tokens_are_refused():
    bert = make("Bert", "Model", **SIZES)
    with (
        apply_to_language_model(bert, "sparge"),
        pytest.raises(UnsupportedCallError, match=r"attention to later tokens \(BertSelfAttention\)"),
    ):
        bert(prompt())
    sizes = {name: size for name, size in SIZES.items() if name != "vocab_size"}
    vit = make("ViT", "Model", **sizes, image_size=32, patch_size=4)
    with (
        apply_to_language_model(vit, "sparge"),
        pytest.raises(UnsupportedCallError, match=r"attention to later tokens \(ViTAttention\)"),
    ):
        vit(torch.zeros(1, 3, 32, 32))


@torch.no_grad()
def test_options_of_a_call_are_refused(model):
    with apply_to_language_model(model, "sparge", topk=1.0):
        for option, message in (
            ({"is_causal": False}, r"attention to later tokens \(LlamaAttention\)"),
            ({"softcap": 30.0}, "the attention option softcap"),
            ({"position_bias": torch.zeros(1, 4, LENGTH, LENGTH)}, "the attention option position_bias"),
            ({"something_new": 0.0}, "the attention option something_new"),
            ({"sliding_window": LENGTH - 1}, "a sliding window .299 keys for 300 queries"),
        ):
            with pytest.raises(UnsupportedCallError, match=message):
                model(prompt(), **option)
        harmless = {"is_causal": True, "softcap": None, "something_new": False, "sliding_window": LENGTH}
        assert torch.equal(model(prompt(), **harmless).logits, model(prompt()).logits)
        for layer in model.model.layers:
            layer.self_attn.layer_idx = None
        with pytest.raises(UnsupportedCallError, match="LlamaAttention, which has no layer_idx"):
            model(prompt(), use_cache=False)


@torch.no_grad()
def test_dropout_is_refused():
    model = make("Llama", **SIZES, attention_dropout=0.1)
    with apply_to_language_model(model, "sparge"):
        model(prompt())
        with pytest.raises(UnsupportedCallError, match=r"dropout 0.1; call model.eval\(\)"):
            model.train()(prompt())


@torch.no_grad()
def test_models_without_the_interface_are_refused():
    strategy = create_strategy("sparge")
    bloom = make("Bloom", vocab_size=64, hidden_size=128, n_layer=2, n_head=4)
    own = bloom.config._attn_implementation
    with pytest.raises(InstallError, match="BloomForCausalLM does not attend through the AttentionInterface"):
        apply_to_language_model(bloom, strategy)
    assert not strategy.installed and bloom.config._attn_implementation == own
    mamba = make("Mamba", vocab_size=64, hidden_size=64, num_hidden_layers=1)
    with (
        apply_to_language_model(mamba, strategy),
        pytest.raises(InstallError, match="MambaForCausalLM does not attend through"),
    ):
        mamba(prompt(20))
    mamba(prompt(20))


@torch.no_grad()
def test_the_report_is_of_the_latest_prompt(model):
    with apply_to_language_model(model, "sparge") as run:
        for length in (LENGTH, LENGTH, 200):
            model(prompt(length))
            assert run.report().calls == 2


@torch.no_grad()
def test_the_report_is_of_the_latest_prompt_where_layer_0_has_no_attention():
    small = {"moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "num_experts": 2}
    linear = {"linear_num_value_heads": 2, "linear_num_key_heads": 2}
    model = make(
        "Qwen3Next", **SIZES | {"num_hidden_layers": 4}, **small, **linear, num_experts_per_tok=1,
        num_key_value_heads=2, head_dim=32, linear_key_head_dim=16, linear_value_head_dim=16,
    )  # fmt: skip
    untouched = model(prompt()).logits
    with apply_to_language_model(model, "sparge", topk=1.0) as run:
        for _ in range(3):
            assert torch.allclose(model(prompt()).logits, untouched, atol=1e-5)
            assert run.report().calls == 1


@torch.no_grad()
def test_a_model_keeps_its_run_and_copies_share_it(model):
    expected = model(prompt()).logits
    apply_to_language_model(model, "sparge", topk=1.0)
    gc.collect()
    assert torch.allclose(model(prompt()).logits, expected, atol=1e-5)
    assert torch.allclose(copy.deepcopy(model)(prompt()).logits, expected, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("removed", [False, True])
def test_transformers_keeps_no_model(removed):
    model = make("Llama", **SIZES)
    run = apply_to_language_model(model, "sparge")
    model(prompt())
    if removed:
        run.remove()
    gone = weakref.ref(model)
    del model, run
    gc.collect()
    assert gone() is None


def test_removing_twice_does_not_strand_the_strategy(model):
    other, strategy = copy.deepcopy(model), create_strategy("sparge")
    own = other.config._attn_implementation
    first = apply_to_language_model(model, strategy)
    first.remove()
    second = apply_to_language_model(other, strategy)
    first.remove()
    assert strategy.installed
    second.remove()
    assert not strategy.installed and other.config._attn_implementation == own


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
