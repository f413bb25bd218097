"""Strategies in a real FLUX transformer (random weights)."""

import pytest
import torch

from core import InstallError, TokenLayout, UnsupportedCallError, apply_strategy, create_strategy
from core.processors.flux import FluxAdapter

ROWS, COLUMNS, TEXT = 12, 20, 17


@pytest.fixture(params=[False, True], ids=["separate", "fused"])
def transformer(request):
    from diffusers import FluxTransformer2DModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = FluxTransformer2DModel(
            patch_size=1,
            in_channels=8,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=False,
            axes_dims_rope=(16, 24, 24),
        ).eval()
    if request.param:
        model.fuse_qkv_projections()
    return model


def call(timestep=0.9, rows=ROWS):
    generator = torch.Generator().manual_seed(1)
    row, column = torch.meshgrid(torch.arange(rows), torch.arange(COLUMNS), indexing="ij")
    return {
        "hidden_states": torch.randn(1, ROWS * COLUMNS, 8, generator=generator),
        "encoder_hidden_states": torch.randn(1, TEXT, 32, generator=generator),
        "pooled_projections": torch.randn(1, 16, generator=generator),
        "timestep": torch.full((1,), timestep),
        "img_ids": torch.stack([row * 0, row, column], -1).view(-1, 3).float(),
        "txt_ids": torch.zeros(TEXT, 3),
    }


@torch.no_grad()
def test_dense_is_bit_identical_and_removed(transformer):
    untouched = transformer(**call()).sample
    with apply_strategy(transformer, "dense") as run:
        assert torch.equal(transformer(**call()).sample, untouched)
        assert run.report().calls == 4
    assert torch.equal(transformer(**call()).sample, untouched)


@torch.no_grad()
def test_sparse_blocks_of_an_image(transformer):
    untouched = transformer(**call()).sample
    for options, same in (
        ({"topk": 1.0}, True),
        ({"topk": 0.4}, False),
        ({"topk": 0.4, "order": "gilbert"}, False),
    ):
        with apply_strategy(transformer, "sparge", block_size=64, **options) as run:
            sparse = transformer(**call()).sample
            assert run.report().calls == 4
            assert (run.report().density == 1.0) == same
        assert torch.allclose(sparse, untouched, atol=1e-4) == same


@torch.no_grad()
def test_steps_follow_falling_timesteps(transformer):
    with apply_strategy(transformer, "sparge", block_size=64, dense_timesteps=1) as run:
        for timestep in (1.0, 0.7, 0.2):
            transformer(**call(timestep))
        table = run.report().density_by_layer
        assert len(table) == 4 and all(len(row) == 3 and row[0] == 1.0 > row[1] for row in table)


def test_layout_is_read_from_the_position_ids(transformer):
    facts = FluxAdapter().read_call(transformer, (), call())
    assert facts.layout == TokenLayout(TEXT, 1, ROWS, COLUMNS)
    assert facts.timestep == pytest.approx(900)
    with pytest.raises(UnsupportedCallError, match="span 13 x 20 places for 240 image tokens"):
        FluxAdapter().read_call(transformer, (), call(rows=ROWS + 1))


def test_foreign_processors_are_refused(transformer):
    transformer.transformer_blocks[0].attn.set_processor(lambda *_: None)
    with pytest.raises(
        InstallError, match="expected diffusers' own FLUX attention processor, found function"
    ):
        apply_strategy(transformer, "dense")


@torch.no_grad()
def test_a_token_mask_is_refused(transformer):
    image, text = call()["hidden_states"], call()["encoder_hidden_states"]
    with apply_strategy(transformer, "dense"):
        attention = transformer.transformer_blocks[0].attn
        streams = {
            "hidden_states": transformer.x_embedder(image),
            "encoder_hidden_states": transformer.context_embedder(text),
        }
        mask = torch.ones(1, 1, 1, TEXT + ROWS * COLUMNS, dtype=torch.bool)
        with pytest.raises(UnsupportedCallError, match="FLUX attention with a token mask is not supported"):
            attention.processor(attention, **streams, attention_mask=mask)


@torch.no_grad()
def test_weights_of_the_outputs_are_what_the_heads_meet(transformer):
    """In blocks of one stream the attention's outputs stand first in a projection of more."""
    met, found = [], []
    single = transformer.single_transformer_blocks
    for block in single:
        block.proj_out.register_forward_pre_hook(lambda module, args: met.append(args[0]))
    strategy = create_strategy("dense")
    attend = strategy.attend
    strategy.attend = lambda *call: found.append(attend(*call)) or found[-1]
    with apply_strategy(transformer, strategy):
        transformer(**call())
    *_, weight = weights = FluxAdapter().output_weights(transformer)
    assert len(weights) == len(found) and {tuple(one.shape) for one in weights} == {(128, 128)}
    assert torch.equal(weights[0], transformer.transformer_blocks[0].attn.to_out[0].weight)
    assert len(met) == len(single)
    for tokens, result in zip(met, found[-len(single) :], strict=True):
        assert torch.equal(tokens[..., :128], result.output.transpose(1, 2).flatten(2))
    assert torch.equal(weight, single[-1].proj_out.weight[:, :128])
