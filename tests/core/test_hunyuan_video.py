"""Strategies in a real HunyuanVideo transformer (random weights)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from core import InstallError, TokenLayout, UnsupportedCallError, apply_strategy, create_strategy
from core.processors.hunyuan_video import HunyuanVideoAdapter

FRAMES, ROWS, COLUMNS, TEXT = 5, 9, 11, 96
ULPS = 8  # a shorter sum rounds in other places than a masked one


def make_transformer(**overrides):
    from diffusers import HunyuanVideoTransformer3DModel

    config = {
        "in_channels": 4,
        "out_channels": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "num_layers": 2,
        "num_single_layers": 2,
        "num_refiner_layers": 1,
        "patch_size": 2,
        "text_embed_dim": 32,
        "pooled_projection_dim": 16,
        "rope_axes_dim": (16, 24, 24),
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return HunyuanVideoTransformer3DModel(**(config | overrides)).eval()


@pytest.fixture(params=[None, "latent_concat", "token_replace"])
def transformer(request):
    return make_transformer(image_condition_type=request.param)


def make_call(*valid, timestep=900.0, dtype=torch.float32, text=TEXT):
    """Arguments of one call whose batch entries have so many valid text tokens; all, where none is given."""
    generator = torch.Generator().manual_seed(1)
    valid = valid or (text,)
    latents = torch.randn(len(valid), 4, FRAMES, 2 * ROWS, 2 * COLUMNS, generator=generator)
    embeds = 3 * torch.randn(len(valid), text, 32, generator=generator)
    pooled = torch.randn(len(valid), 16, generator=generator)
    return {
        "hidden_states": latents.to(dtype),
        "timestep": torch.full((len(valid),), timestep),
        "encoder_hidden_states": embeds.to(dtype),
        "encoder_attention_mask": (torch.arange(text) < torch.tensor(valid)[:, None]).to(dtype),
        "pooled_projections": pooled.to(dtype),
        "guidance": torch.full((len(valid),), 6000.0, dtype=dtype),
    }


def distance(output, expected):
    """Largest difference, in units of the last place of the largest value."""
    scale = expected.abs().max() * torch.finfo(expected.dtype).eps
    return ((output - expected).abs().max() / scale).item()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_bit_identical_without_padding_and_removed(transformer, dtype):
    transformer.to(dtype)
    for call in (make_call(dtype=dtype), make_call(TEXT, TEXT, dtype=dtype)):
        untouched = transformer(**call).sample
        with apply_strategy(transformer, "dense") as run:
            assert torch.equal(transformer(**call).sample, untouched)
            assert run.report().calls == 4, "the refiner of the text keeps its own attention"
        assert torch.equal(transformer(**call).sample, untouched)


@torch.no_grad()
@pytest.mark.parametrize("valid", [(20,), (1,), (TEXT - 1,), (33, 33)])
def test_dense_leaves_padding_out_as_the_model_does(transformer, valid):
    call = make_call(*valid)
    untouched = transformer(**call).sample
    with apply_strategy(transformer, "dense"):
        assert distance(transformer(**call).sample, untouched) <= ULPS
    assert torch.equal(transformer(**call).sample, untouched)


@torch.no_grad()
def test_padding_in_bfloat16():
    transformer = make_transformer().to(torch.bfloat16)
    call = make_call(20, dtype=torch.bfloat16)
    untouched = transformer(**call).sample
    with apply_strategy(transformer, "dense"):
        output = transformer(**call).sample
    assert distance(output, untouched) <= 1
    assert (output == untouched).float().mean() > 0.9, "with padded keys about a quarter is equal"


@torch.no_grad()
def test_exact_strategies_give_the_models_output(exact_strategy):
    name, options = exact_strategy
    transformer, call = make_transformer(), make_call(20)
    untouched = transformer(**call).sample
    with apply_strategy(transformer, name, **options) as run:
        assert distance(transformer(**call).sample, untouched) <= 2 * ULPS
        assert run.report().density == 1.0


@torch.no_grad()
def test_sparse_strategies_see_valid_text_only(sparse_strategy):
    """Text of 20 tokens gives the same video whether or not padding follows it."""
    name, options = sparse_strategy
    transformer = make_transformer()
    padded, short = make_call(20), make_call(20)
    for name_of_text in ("encoder_hidden_states", "encoder_attention_mask"):
        short[name_of_text] = short[name_of_text][:, :20]
    untouched = transformer(**short).sample
    with apply_strategy(transformer, name, **options) as run:
        expected = transformer(**short).sample
        density = run.report().density
    with apply_strategy(transformer, name, **options) as run:
        assert (transformer(**padded).sample - expected).abs().max() < 1e-5
        assert run.report().density == pytest.approx(density) and density < 0.95
    assert (expected - untouched).abs().max() > 1e-4


def test_gradients_flow_past_the_padding():
    transformer, gradients = make_transformer(), []
    for strategy in (None, "dense"):
        call = make_call(20)
        call["hidden_states"].requires_grad_(True)
        run = apply_strategy(transformer, strategy) if strategy else None
        transformer(**call).sample.square().mean().backward()
        gradients.append(call["hidden_states"].grad)
        if run:
            run.remove()
    assert gradients[0].abs().max() > 0
    assert distance(gradients[1], gradients[0]) <= 10 * ULPS


@torch.no_grad()
def test_fusing_is_nothing_to_this_model():
    transformer, call = make_transformer(), make_call()
    untouched = transformer(**call).sample
    transformer.fuse_qkv_projections()
    with apply_strategy(transformer, "dense") as run:
        assert torch.equal(transformer(**call).sample, untouched)
        assert run.report().calls == 4


@torch.no_grad()
def test_models_without_norms_of_query_and_key():
    transformer, call = make_transformer(qk_norm=None), make_call()
    untouched = transformer(**call).sample
    with apply_strategy(transformer, "dense"):
        assert torch.equal(transformer(**call).sample, untouched)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_layout_counts_the_valid_text(dtype):
    transformer, call = make_transformer(), make_call(17, 17, timestep=937.5)
    call["encoder_attention_mask"] = call["encoder_attention_mask"].to(dtype)
    facts = HunyuanVideoAdapter().read_call(transformer, (), call)
    assert facts.layout == TokenLayout(17, FRAMES, ROWS, COLUMNS, text_first=False)
    assert (facts.padding, facts.timestep) == (TEXT - 17, 937.5)
    assert HunyuanVideoAdapter().read_call(transformer, tuple(call.values()), {}) == facts


def test_layout_of_patches_in_time():
    transformer, call = make_transformer(patch_size=1, patch_size_t=5), make_call()
    facts = HunyuanVideoAdapter().read_call(transformer, (), call)
    assert facts.layout == TokenLayout(TEXT, 1, 2 * ROWS, 2 * COLUMNS, text_first=False)
    assert facts.padding == 0


@torch.no_grad()
def test_prompts_of_two_lengths_in_one_batch_are_refused():
    transformer = make_transformer()
    with apply_strategy(transformer, "dense"):
        with pytest.raises(UnsupportedCallError, match="got 7 to 20; draw one prompt at a time"):
            transformer(**make_call(20, 7))
        transformer(**make_call(7, 7))


@torch.no_grad()
def test_padding_before_the_text_is_refused():
    transformer, call = make_transformer(), make_call(20)
    call["encoder_attention_mask"] = call["encoder_attention_mask"].flip(1)
    with (
        apply_strategy(transformer, "dense"),
        pytest.raises(UnsupportedCallError, match="pad on the right"),
    ):
        transformer(**call)


@torch.no_grad()
def test_halves_of_guidance_may_have_texts_of_two_lengths():
    transformer, seen = make_transformer(), []

    class Watching(type(create_strategy("dense"))):
        """Dense attention that looks at its contexts."""

        def attend(self, query, key, value, context):
            seen.append(
                (context.step_index, context.call_in_step, context.layout.text_length, query.shape[2])
            )
            return super().attend(query, key, value, context)

    with apply_strategy(transformer, Watching()):
        for timestep in (1000.0, 600.0):
            for valid in (20, 7):
                transformer(**make_call(valid, timestep=timestep))
    video = FRAMES * ROWS * COLUMNS
    assert seen[::4] == [
        (0, 0, 20, video + 20),
        (0, 1, 7, video + 7),
        (1, 0, 20, video + 20),
        (1, 1, 7, video + 7),
    ]


@torch.no_grad()
def test_compiled_blocks_have_one_graph_for_texts_of_all_lengths():
    torch._dynamo.reset()
    transformer = make_transformer(num_layers=3, num_single_layers=3)
    with apply_strategy(transformer, "radial", block_size=64, nan_guard="raise") as run:
        eager = [transformer(**make_call(valid)).sample for valid in (20, 7, TEXT)]
        counter = CompileCounterWithBackend("aot_eager")
        for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
            block.compile(fullgraph=True, backend=counter)
        for valid, expected in zip((20, 7, TEXT), eager, strict=True):
            assert (transformer(**make_call(valid)).sample - expected).abs().max() < 1e-4
            # Two streams, one stream, and one stream again where the block before it leaves strided tensors.
            assert counter.frame_count == 3, "layer, step or text length became part of the graph"
        assert run.report().calls == 6 * 6


@torch.no_grad()
def test_foreign_processors_are_refused():
    transformer = make_transformer()
    transformer.single_transformer_blocks[1].attn.set_processor(lambda *_: None)
    with pytest.raises(
        InstallError, match="expected diffusers' own HunyuanVideo attention processor, found function"
    ):
        apply_strategy(transformer, "dense")


def test_framepack_is_another_family():
    """It puts its history before the video, on grids of other sizes."""
    from diffusers import HunyuanVideoFramepackTransformer3DModel

    with torch.device("meta"):
        framepack = HunyuanVideoFramepackTransformer3DModel(num_layers=1, num_single_layers=1)
    with pytest.raises(InstallError, match="no model adapter for HunyuanVideoFramepackTransformer3DModel"):
        apply_strategy(framepack, "dense")


@pytest.fixture
def pipeline():
    from diffusers import FlowMatchEulerDiscreteScheduler, HunyuanVideoPipeline

    absent = dict.fromkeys(("text_encoder", "tokenizer", "vae", "text_encoder_2", "tokenizer_2"))
    pipeline = HunyuanVideoPipeline(
        transformer=make_transformer(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0), **absent
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, guidance):
    """Latents of a video of three steps, with prompts of 20 and 7 tokens."""
    halves = [make_call(valid) for valid in (20, 7)]
    call = {}
    for prefix, half in zip(("", "negative_"), halves, strict=True):
        call[prefix + "prompt_embeds"] = half["encoder_hidden_states"] * (1 if prefix else -1)
        call[prefix + "prompt_attention_mask"] = half["encoder_attention_mask"]
        call[prefix + "pooled_prompt_embeds"] = half["pooled_projections"]
    return pipeline(
        height=96, width=128, num_frames=9, num_inference_steps=3, true_cfg_scale=guidance,
        generator=torch.Generator().manual_seed(0), output_type="latent", **call,
    ).frames  # fmt: skip


@pytest.mark.parametrize("guidance, calls", [(1.0, 1), (4.0, 2)])
def test_a_whole_video_by_the_pipeline(pipeline, guidance, calls):
    untouched = draw(pipeline, guidance)
    with apply_strategy(pipeline, "dense", dense_timesteps=1) as run:
        video = draw(pipeline, guidance)
        report = run.report()
    assert distance(video, untouched) <= 10 * ULPS
    assert report.calls == 4 * 3 * calls and report.dense_calls == {"dense warm-up": 4 * calls}
    assert [len(row) for row in report.density_by_layer] == [3] * 4
    assert torch.equal(draw(pipeline, guidance), untouched)


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
        transformer(**make_call())
    *_, weight = weights = HunyuanVideoAdapter().output_weights(transformer)
    assert len(weights) == len(found) and {tuple(one.shape) for one in weights} == {(128, 128)}
    assert torch.equal(weights[0], transformer.transformer_blocks[0].attn.to_out[0].weight)
    assert len(met) == len(single)
    for tokens, result in zip(met, found[-len(single) :], strict=True):
        assert torch.equal(tokens[..., :128], result.output.transpose(1, 2).flatten(2))
    assert torch.equal(weight, single[-1].proj_out.weight[:, :128])
