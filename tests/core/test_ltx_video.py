"""Strategies in a real LTX-Video transformer (random weights)."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from core import InstallError, TokenLayout, UnsupportedCallError, apply_strategy
from core.processors.ltx_video import LTXVideoAdapter

GRID = (5, 9, 13)
LAYOUT = TokenLayout(0, *GRID)


def make_transformer(**overrides):
    from diffusers import LTXVideoTransformer3DModel

    config = {
        "in_channels": 8,
        "out_channels": 8,
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "cross_attention_dim": 128,
        "num_layers": 3,
        "caption_channels": 32,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return LTXVideoTransformer3DModel(**(config | overrides)).eval()


@pytest.fixture(params=[{}, {"num_attention_heads": 1, "attention_head_dim": 128}], ids=["64", "128"])
def transformer(request):
    return make_transformer(**request.param)


def make_call(batch=1, timestep=900.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    frames, height, width = GRID
    return {
        "hidden_states": torch.randn(batch, LAYOUT.video_length, 8, generator=generator).to(dtype),
        "encoder_hidden_states": torch.randn(batch, 12, 32, generator=generator).to(dtype),
        "timestep": torch.full((batch,), timestep),
        "encoder_attention_mask": (torch.arange(12) < 9).expand(batch, -1).to(dtype),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def coordinates(*first_frames):
    """``[1, 3, S]`` seconds, rows and columns in pixels, of clips of one frame each before the grid."""
    frames, height, width = GRID
    times = [*first_frames, *(max(8 * frame - 7, 0) for frame in range(frames))]
    axes = (torch.tensor(times) / 25, 32.0 * torch.arange(height), 32.0 * torch.arange(width))
    return torch.stack(torch.meshgrid(*axes, indexing="ij")).flatten(1)[None]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dense_is_bit_identical_and_removed(transformer, dtype):
    transformer.to(dtype)
    for batch in (1, 2):
        call = make_call(batch, dtype=dtype)
        untouched = transformer(**call).sample
        with apply_strategy(transformer, "dense") as run:
            assert torch.equal(transformer(**call).sample, untouched)
            assert run.report().calls == 3, "the attention to the text keeps its own processor"
        assert torch.equal(transformer(**call).sample, untouched)


@torch.no_grad()
def test_exact_strategies_give_the_models_output(exact_strategy):
    name, options = exact_strategy
    transformer, call = make_transformer(), make_call()
    untouched = transformer(**call).sample
    with apply_strategy(transformer, name, **options) as run:
        assert (transformer(**call).sample - untouched).abs().max() < 2e-6
        assert run.report().density == 1.0


@torch.no_grad()
def test_sparse_strategies_leave_pairs_out(sparse_strategy):
    name, options = sparse_strategy
    transformer, call = make_transformer(), make_call()
    untouched = transformer(**call).sample
    with apply_strategy(transformer, name, **options) as run:
        sparse = transformer(**call).sample
        assert run.report().density < 0.95
    assert 1e-4 < (sparse - untouched).abs().max() < 0.2


@torch.no_grad()
def test_fused_projections_are_not_used_by_this_model():
    transformer, call = make_transformer(), make_call()
    untouched = transformer(**call).sample
    run = apply_strategy(transformer, "dense")
    transformer.fuse_qkv_projections()
    assert torch.equal(transformer(**call).sample, untouched)
    transformer.unfuse_qkv_projections()
    assert torch.equal(transformer(**call).sample, untouched)
    assert run.report().calls == 6
    run.remove()
    assert {type(one).__name__ for one in transformer.attn_processors.values()} == {"LTXVideoAttnProcessor"}


def test_layout_is_read_from_the_sizes():
    transformer, call = make_transformer(), make_call()
    facts = LTXVideoAdapter().read_call(transformer, (), call)
    assert (facts.layout, facts.timestep, facts.padding) == (LAYOUT, 900.0, 0)
    assert LTXVideoAdapter().read_call(transformer, tuple(call.values()), {}) == facts


def test_the_step_is_that_of_the_tokens_that_are_no_given_image():
    transformer, call = make_transformer(), make_call(batch=2)
    steps = torch.full((2, LAYOUT.video_length), 603.5)
    steps[:, : LAYOUT.tokens_per_frame] = 0.0
    assert LTXVideoAdapter().read_call(transformer, (), call | {"timestep": steps}).timestep == 603.5


@torch.no_grad()
def test_layout_is_read_from_coordinates():
    transformer, call = make_transformer(), make_call(batch=2)
    # As in the model, sizes mean nothing beside coordinates.
    call |= {"video_coords": coordinates().repeat(2, 1, 1), "num_frames": 1, "height": 1, "width": 1}
    facts = LTXVideoAdapter().read_call(transformer, (), call)
    assert (facts.layout, facts.timestep) == (LAYOUT, 900.0)
    untouched = transformer(**call).sample
    with apply_strategy(transformer, "dense"):
        assert torch.equal(transformer(**call).sample, untouched)


@pytest.mark.parametrize(
    "coords",
    [
        coordinates()[..., 1:],  # fewer tokens
        coordinates(0.0),  # a second frame at time 0
        coordinates(20.0),  # a frame of its own time, out of order: as many tokens as places
        coordinates().flip(2),
        torch.cat([coordinates(), coordinates() + 1]),  # two entries, two grids
    ],
    ids=["fewer", "frame 0 twice", "a later frame first", "backwards", "another grid"],
)
def test_coordinates_that_are_no_grid_are_refused(coords):
    call = make_call(len(coords)) | {"video_coords": coords}
    tokens = max(coords.shape[2], LAYOUT.video_length)
    call["hidden_states"] = torch.zeros(len(coords), tokens, 8)
    with pytest.raises(UnsupportedCallError, match="are not one grid of frames in order"):
        LTXVideoAdapter().read_call(make_transformer(), (), call)


def test_sizes_that_do_not_fit_are_refused():
    transformer, call = make_transformer(), make_call()
    with pytest.raises(UnsupportedCallError, match="a grid of 5 x 9 x 14, but hidden_states has 585 tokens"):
        LTXVideoAdapter().read_call(transformer, (), call | {"width": 14})
    del call["num_frames"]
    with pytest.raises(UnsupportedCallError, match="pass num_frames, height and width of the latents"):
        LTXVideoAdapter().read_call(transformer, (), call)


@torch.no_grad()
def test_text_and_masks_are_refused_in_self_attention():
    transformer = make_transformer()
    attention, tokens = transformer.transformer_blocks[0].attn1, torch.zeros(1, 4, 128)
    with apply_strategy(transformer, "dense"):
        for extra in ({"encoder_hidden_states": tokens}, {"attention_mask": torch.ones(1, 4)}):
            with pytest.raises(UnsupportedCallError, match="self-attention with text or a token mask"):
                attention(tokens, **extra)


def test_foreign_processors_are_refused():
    transformer = make_transformer()
    transformer.transformer_blocks[2].attn1.set_processor(lambda *_: None)
    with pytest.raises(
        InstallError, match="expected diffusers' own LTX-Video attention processor, found function"
    ):
        apply_strategy(transformer, "dense")


@torch.no_grad()
@pytest.mark.parametrize("strategy", ["dense", "radial"])
def test_compiled_blocks_have_one_graph(strategy):
    torch._dynamo.reset()
    transformer = make_transformer(num_layers=6)
    with apply_strategy(transformer, strategy) as run:
        eager = transformer(**make_call()).sample
        counter = CompileCounterWithBackend("aot_eager")
        for block in transformer.transformer_blocks:
            block.compile(fullgraph=True, backend=counter)
        for timestep in (900.0, 500.0):
            compiled = transformer(**make_call(timestep=timestep)).sample
            if timestep == 900.0:
                assert (compiled - eager).abs().max() < 1e-4
        assert len(run.report().density_by_layer[0]) == 2
        assert counter.frame_count == 1, "layer or step became part of the graph"


def make_pipeline(name):
    import diffusers

    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        patch_size=1,
    )
    pipeline = getattr(diffusers, name)(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        transformer=make_transformer(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, **options):
    """Latents of a video of three steps with guidance."""
    text, mask = make_call(batch=2)["encoder_hidden_states"], torch.ones(1, 12)
    return pipeline(
        height=32, width=64, num_frames=17, num_inference_steps=3, prompt_embeds=text[:1],
        prompt_attention_mask=mask, negative_prompt_embeds=text[1:], negative_prompt_attention_mask=mask,
        generator=torch.Generator().manual_seed(0), output_type="latent", **options,
    ).frames  # fmt: skip


@pytest.mark.parametrize(
    "name, given", [("LTXPipeline", False), ("LTXImageToVideoPipeline", True), ("LTXConditionPipeline", True)]
)
def test_a_whole_video_by_the_pipeline(name, given):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipeline = make_pipeline(name)
    options = {"image": torch.rand(1, 3, 32, 64, generator=torch.Generator().manual_seed(2))} if given else {}
    untouched = draw(pipeline, **options)
    with apply_strategy(pipeline, "dense", dense_timesteps=1) as run:
        assert torch.equal(draw(pipeline, **options), untouched)
        report = run.report()
    assert report.calls == 3 * 3 and report.dense_calls == {"dense warm-up": 3}
    assert [len(row) for row in report.density_by_layer] == [3] * 3
    assert torch.equal(draw(pipeline, **options), untouched)
