"""Strategies in real Wan transformers and pipelines (random weights)."""

import copy
import functools
import tempfile

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from core import InstallError, ParameterError, TokenLayout, UnsupportedCallError, apply_strategy
from core.hookspecs import hookimpl
from core.processors.wan import WanAdapter
from core.registry import create_strategy, installed

TEXT, TEXT_DIM, IMAGE_TOKENS, IMAGE_DIM = 12, 32, 5, 24
CHANNELS = 16
GRID = (3, 5, 7)  # frames, rows and columns of tokens: no multiple of a block or of each other
LAYERS = 2
SMALL = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 64,
    "in_channels": CHANNELS,
    "out_channels": CHANNELS,
    "text_dim": TEXT_DIM,
    "freq_dim": 32,
    "ffn_dim": 64,
    "num_layers": LAYERS,
}
IMAGE = {"image_dim": IMAGE_DIM, "added_kv_proj_dim": 128}


def seeded(make, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make().eval()


def transformer(seed=0, **options):
    from diffusers import WanTransformer3DModel

    return seeded(lambda: WanTransformer3DModel(**(SMALL | options)), seed)


def vace_transformer():
    from diffusers import WanVACETransformer3DModel

    return seeded(lambda: WanVACETransformer3DModel(**SMALL, vace_layers=[0, 1], vace_in_channels=8))


def call(timestep=900.0, *, grid=GRID, image=False, per_token=False, control=False, dtype=torch.float32):
    """Arguments of one call; of an image-conditioned one the first frame is given, so its timestep is 0."""
    generator = torch.Generator().manual_seed(1)
    frames, rows, columns = grid

    def drawn(*shape):
        return torch.randn(shape, generator=generator).to(dtype)

    tokens = frames * rows * columns
    times = torch.full((1, tokens), timestep)
    times[:, : rows * columns] = 0
    arguments = {
        "hidden_states": drawn(1, CHANNELS, frames, 2 * rows, 2 * columns),
        # Cross-attention takes the last 512 tokens for text where it has image keys.
        "encoder_hidden_states": drawn(1, 512 if image else TEXT, TEXT_DIM),
        "timestep": times if per_token else torch.full((1,), timestep),
    }
    if image:
        arguments["encoder_hidden_states_image"] = drawn(1, IMAGE_TOKENS, IMAGE_DIM)
    if control:
        arguments["control_hidden_states"] = drawn(1, 8, frames, 2 * rows, 2 * columns)
    return arguments


def loaded_in_bf16():
    """As ``from_pretrained`` gives it: norms and the embedding of time stay in fp32."""
    with tempfile.TemporaryDirectory() as folder:
        transformer().save_pretrained(folder)
        model = type(transformer()).from_pretrained(folder, dtype=torch.bfloat16)
    assert model.scale_shift_table.dtype == torch.float32
    return model


def fused(model):
    model.fuse_qkv_projections()
    return model


FORMS = {
    "text to video": (transformer, {}),
    "fused projections": (lambda: fused(transformer()), {}),
    "image keys": (lambda: transformer(**IMAGE), {"image": True}),
    "image keys, fused": (lambda: fused(transformer(**IMAGE)), {"image": True}),
    "a timestep for every token": (transformer, {"per_token": True}),
    "a patch of two frames": (lambda: transformer(patch_size=(2, 2, 2)), {"grid": (4, 5, 7)}),
    "bf16": (lambda: transformer().to(torch.bfloat16), {"dtype": torch.bfloat16}),
    "bf16, as loaded": (loaded_in_bf16, {"dtype": torch.bfloat16}),
    "VACE": (vace_transformer, {"control": True}),
    "VACE, fused": (lambda: fused(vace_transformer()), {"control": True}),
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_dense_is_bit_identical_and_removed(form):
    make, options = FORMS[form]
    model, arguments = make(), call(**options)
    before = dict(model.attn_processors)
    untouched = model(**arguments).sample
    with apply_strategy(model, "dense") as run:
        assert torch.equal(model(**arguments).sample, untouched)
        assert run.report().calls == len(before) / 2, "self-attention of every block, and nothing else"
        replaced = {name for name, new in model.attn_processors.items() if new is not before[name]}
        assert replaced == {name for name in before if ".attn1." in name}
    assert dict(model.attn_processors) == before
    assert torch.equal(model(**arguments).sample, untouched)


@torch.no_grad()
def test_fusing_under_an_installed_strategy():
    model = transformer()
    with apply_strategy(model, "dense") as run:
        untouched = model(**call()).sample
        model.fuse_qkv_projections()
        assert torch.allclose(model(**call()).sample, untouched, atol=1e-5)
        model.unfuse_qkv_projections()
        assert torch.equal(model(**call()).sample, untouched)
        assert run.report().calls == 3 * LAYERS


def test_facts_of_a_call():
    model = transformer()
    facts = WanAdapter().read_call(model, (), call())
    assert facts.layout == TokenLayout(0, *GRID) and facts.timestep == 900
    per_token = call(per_token=True)
    assert per_token["timestep"].min() == 0
    assert WanAdapter().read_call(model, (), per_token).timestep == 900
    positional = tuple(call().values())
    assert WanAdapter().read_call(model, (positional[0], positional[2], positional[1]), {}) == facts


SPARSE = {
    "radial": {"block_size": 64, "decay_factor": 0.2},
    "sliding-tile": {"window": (1, 1, 1), "block_size": 64},
    "sparge": {"block_size": 64, "topk": 0.3, "order": "gilbert"},
    "gilbert-block": {"block_size": 64},
    "svg-smart": {"block_size": 64, "refresh_every": 2},
    "tome": {"gap": 2},
    "combined": {"sparse": "sparge", "sparse_options": {"block_size": 64, "topk": 0.3}},
}
PATTERNS = {
    "svg-smart, frames": ("svg-smart", {"variant": "frames", "block_size": 64}),
    "svg-smart, clusters": ("svg-smart", {"variant": "semantic", "query_clusters": 4, "key_clusters": 8}),
    "combined, anchors": ("combined", {"classes": "pattern", "places": 8}),
    "combined, columns": ("combined", {"classes": "pattern", "form": "columns", "places": 8}),
    "gilbert-block, levels": ("gilbert-block", {"selection": "mass", "block_size": 64}),
    "tome, queries": ("tome", {"merge_queries": True}),
}


def test_every_strategy_is_tried():
    names = {entry.name for entry in installed().entries() if entry.owner.startswith("sparse-attn-functions")}
    assert names == {*SPARSE, "dense"}


@pytest.mark.parametrize("grid", [(5, 9, 13), (4, 11, 6), (1, 9, 13)], ids=str)
@pytest.mark.parametrize("case", [*SPARSE, *PATTERNS])
def test_every_strategy_runs_without_text(case, grid, make_wan, run_wan):
    name, options = PATTERNS.get(case) or (case, SPARSE[case])
    pipeline = make_wan()
    size = {"num_frames": 4 * grid[0] - 3, "height": 16 * grid[1], "width": 16 * grid[2]}
    untouched = run_wan(pipeline, **size)
    with apply_strategy(pipeline, name, **options) as run:
        sparse = run_wan(pipeline, **size)
        report = run.report()
    assert torch.isfinite(sparse).all()
    assert report.calls == LAYERS * 3 * 2
    assert [len(row) for row in report.density_by_layer] == [3] * LAYERS
    if grid[0] > 1:
        assert report.density < 1 and not torch.equal(sparse, untouched)


# Pipelines: guidance by two calls a step, and two denoisers for different steps.


@functools.cache
def untouched_vae():
    from diffusers import AutoencoderKLWan

    small = {"base_dim": 3, "z_dim": CHANNELS, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
    return AutoencoderKLWan(**small)


def build(kind="WanPipeline", **parts):
    import diffusers

    scheduler = diffusers.UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    fixed = {"tokenizer": None, "text_encoder": None, "vae": copy.deepcopy(untouched_vae())}
    given = {"transformer": transformer(), "scheduler": scheduler} | parts
    pipeline = getattr(diffusers, kind)(**fixed, **given)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def generate(pipeline, *, steps=3, guidance=5.0, text=TEXT, **options):
    size = {"height": 80, "width": 112, "num_frames": 9}
    embeddings = torch.randn(2, 1, text, TEXT_DIM, generator=torch.Generator().manual_seed(9))
    return pipeline(
        prompt_embeds=embeddings[0],
        negative_prompt_embeds=embeddings[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(0),
        output_type="latent",
        **(size | options),
    ).frames


@pytest.fixture
def make_wan():
    return build


@pytest.fixture
def run_wan():
    return generate


@pytest.fixture
def two_denoisers():
    """High noise for the first two of four steps (timesteps 999, 899, 749 and 499), then low noise."""
    return build(transformer_2=transformer(seed=1), boundary_ratio=0.8)


class Watching(type(create_strategy("dense"))):
    """Dense attention that looks at its contexts and resets."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def reset(self):
        self.seen.append("reset")

    def attend(self, query, key, value, context):
        self.seen.append((context.step_index, context.place, context.num_steps, context.num_layers))
        return super().attend(query, key, value, context)


def test_the_halves_of_guidance_keep_apart(make_wan, run_wan):
    pipeline, strategy = make_wan(), Watching()
    untouched = run_wan(pipeline)
    with apply_strategy(pipeline, strategy):
        assert torch.equal(run_wan(pipeline), untouched)
    expected = [
        (step, (layer, "both", half), 3, LAYERS)
        for step in range(3)
        for half in range(2)
        for layer in range(LAYERS)
    ]
    assert strategy.seen == ["reset", *expected]


def test_state_of_one_half_does_not_reach_the_other(make_wan, run_wan):
    """A layer's state lasts from step to step; what one half gives alone, it gives beside the other."""
    pipeline = make_wan()
    options = {"gap": 3, "ratio": 0.4}
    with apply_strategy(pipeline, "tome", **options) as run:
        both = run_wan(pipeline, guidance=1.0 + 1e-12)  # the second half is computed and has no weight
        assert run.report().calls == LAYERS * 3 * 2
        alone = run_wan(pipeline, guidance=1.0)
        assert run.report().calls == LAYERS * 3
    assert torch.allclose(both, alone, atol=1e-5)


def test_an_image_as_first_frame(make_wan, run_wan):
    """Wan 2.2 5B: tokens of the given frame stay at timestep 0, and the steps still count from high noise."""
    pipeline = make_wan("WanImageToVideoPipeline", expand_timesteps=True)
    image = torch.rand(1, 3, 80, 112, generator=torch.Generator().manual_seed(2))
    untouched = run_wan(pipeline, image=image)
    strategy = Watching()
    with apply_strategy(pipeline, strategy):
        assert torch.equal(run_wan(pipeline, image=image), untouched)
    assert [entry[0] for entry in strategy.seen[1:]] == [0] * 4 + [1] * 4 + [2] * 4


def test_image_embeddings(make_wan, run_wan):
    """Wan 2.1: latents and condition side by side, image keys in cross-attention."""
    model = transformer(in_channels=2 * CHANNELS + 4, **IMAGE)
    pipeline = make_wan("WanImageToVideoPipeline", transformer=model)
    embeddings = torch.randn(1, IMAGE_TOKENS, IMAGE_DIM, generator=torch.Generator().manual_seed(3))
    pipeline.encode_image = lambda image, device: embeddings  # in place of CLIP
    options = {"image": torch.rand(1, 3, 80, 112, generator=torch.Generator().manual_seed(2)), "text": 512}
    untouched = run_wan(pipeline, **options)
    with apply_strategy(pipeline, "dense") as run:
        assert torch.equal(run_wan(pipeline, **options), untouched)
        assert run.report().calls == LAYERS * 3 * 2


def test_two_denoisers_are_one_video(two_denoisers, run_wan):
    events = []

    class Watcher:
        @hookimpl
        def generation_started(self, strategy, layout, num_steps):
            events.append(("started", num_steps))

        @hookimpl
        def generation_finished(self, strategy, report):
            events.append(("finished", report.calls))

    untouched = run_wan(two_denoisers, steps=4)
    strategy, watcher = Watching(), Watcher()
    installed().hooks.register(watcher)
    try:
        with apply_strategy(two_denoisers, strategy) as run:
            for _ in range(2):
                assert torch.equal(run_wan(two_denoisers, steps=4), untouched)
                report = run.report()
                assert report.calls == LAYERS * 4 * 2
                assert [len(row) for row in report.density_by_layer] == [4] * LAYERS
    finally:
        installed().hooks.unregister(watcher)
    assert events == [("started", 4), ("finished", 16)] * 2
    steps = [entry if entry == "reset" else entry[0] for entry in strategy.seen]
    video = ["reset", *[0] * 4, *[1] * 4, "reset", *[2] * 4, *[3] * 4]
    assert steps == video * 2, "state is dropped where a video begins and where the other denoiser takes over"


def test_dense_steps_count_over_both_denoisers(two_denoisers, run_wan):
    with apply_strategy(two_denoisers, "sparge", dense_timesteps=3, block_size=64, topk=0.5) as run:
        run_wan(two_denoisers, steps=4)
        assert run.report().dense_calls == {"dense warm-up": LAYERS * 3 * 2}
        for row in run.report().density_by_layer:
            assert row[:3] == [1, 1, 1] and row[3] < 1


def test_both_denoisers_are_restored(two_denoisers, run_wan):
    models = (two_denoisers.transformer, two_denoisers.transformer_2)
    before = [dict(model.attn_processors) for model in models]
    run = apply_strategy(two_denoisers, "dense")
    assert all(dict(model.attn_processors) != own for model, own in zip(models, before, strict=True))
    run.remove()
    run.remove()
    assert [dict(model.attn_processors) for model in models] == before
    assert not any(model._forward_pre_hooks or model._forward_hooks for model in models)
    run_wan(two_denoisers, steps=4)
    assert run.report().calls == 0


def test_a_second_removal_does_not_touch_a_later_installation(two_denoisers):
    strategy = create_strategy("dense")
    first = apply_strategy(two_denoisers, strategy)
    first.remove()
    with apply_strategy(two_denoisers, strategy):
        first.remove()
        assert strategy.installed


def test_an_error_in_the_second_denoiser_leaves_none_installed(two_denoisers):
    first, second = two_denoisers.transformer, two_denoisers.transformer_2
    before = dict(first.attn_processors)
    own = second.blocks[1].attn1.processor
    second.blocks[1].attn1.processor = object()
    strategy = create_strategy("dense")
    with pytest.raises(InstallError, match="found object"):
        apply_strategy(two_denoisers, strategy)
    assert dict(first.attn_processors) == before and not first._forward_pre_hooks
    assert not strategy.installed
    second.blocks[1].attn1.processor = own
    with apply_strategy(second, "dense"), pytest.raises(InstallError, match="in this model already"):
        apply_strategy(two_denoisers, "dense")
    assert dict(first.attn_processors) == before and not first._forward_pre_hooks


def test_every_denoiser_is_checked(make_wan):
    """Denoisers may differ; a strategy with parameters for one size sees both."""

    class ForTwoLayers(type(create_strategy("dense"))):
        def check_model(self, denoisers):
            for one in denoisers:
                if (one.num_layers, one.num_heads) != (LAYERS, 2):
                    raise ParameterError(f"not for {one.num_layers} layers of {one.num_heads} heads")

    pipeline = make_wan(transformer_2=transformer(num_layers=3), boundary_ratio=0.8)
    with pytest.raises(ParameterError, match="not for 3 layers of 2 heads"):
        apply_strategy(pipeline, ForTwoLayers())
    assert not pipeline.transformer._forward_pre_hooks


def test_denoisers_of_different_depth(make_wan, run_wan):
    pipeline = make_wan(transformer_2=transformer(num_layers=3), boundary_ratio=0.8)
    with apply_strategy(pipeline, "dense") as run:
        run_wan(pipeline, steps=4)
        report = run.report()
    assert report.calls == (2 * LAYERS + 2 * 3) * 2
    assert [str(value) for value in report.density_by_layer[2]] == ["nan", "nan", "1.0", "1.0"]


def test_the_low_noise_denoiser_alone(make_wan, run_wan):
    pipeline = make_wan(transformer=None, transformer_2=transformer(), boundary_ratio=1.0)
    with apply_strategy(pipeline, "dense") as run:
        run_wan(pipeline)
        assert run.report().calls == LAYERS * 3 * 2
    pipeline.transformer_2 = None
    with pytest.raises(InstallError, match="WanPipeline holds no transformer; load it with one"):
        apply_strategy(pipeline, "dense")


def test_one_denoiser_in_both_places(make_wan, run_wan):
    shared = transformer()
    pipeline = make_wan(transformer=shared, transformer_2=shared, boundary_ratio=0.8)
    with apply_strategy(pipeline, "dense") as run:
        run_wan(pipeline, steps=4)
        assert run.report().calls == LAYERS * 4 * 2


@pytest.mark.parametrize("strategy", ["dense", "sparge"])
def test_compiled_blocks_have_one_graph(strategy, make_wan, run_wan):
    torch._dynamo.reset()
    deep = [transformer(seed, num_layers=10) for seed in range(2)]
    pipeline = make_wan(transformer=deep[0], transformer_2=deep[1], boundary_ratio=0.8)
    with apply_strategy(pipeline, strategy, nan_guard="raise") as run:
        eager = run_wan(pipeline, steps=4)
        counter = CompileCounterWithBackend("aot_eager")
        for model in deep:
            for block in model.blocks:
                block.compile(fullgraph=True, backend=counter)
        compiled = run_wan(pipeline, steps=4)
        assert run.report().calls == 10 * 4 * 2
        assert counter.frame_count <= 2, "layer, step or denoiser became part of the graph"
        assert (compiled - eager).abs().max() < 1e-4


@torch.no_grad()
def test_layerwise_casting():
    model = transformer()
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    untouched = model(**call()).sample
    with apply_strategy(model, "dense"):
        assert torch.equal(model(**call()).sample, untouched)


def test_gradients_flow_through_dense():
    model, gradients = transformer(), []
    for installing in (True, False):
        arguments = call()
        states = arguments["hidden_states"].requires_grad_()
        run = apply_strategy(model, "dense") if installing else None
        model(**arguments).sample.square().mean().backward()
        gradients.append(states.grad)
        if run:
            run.remove()
    assert torch.equal(*gradients)


def test_foreign_processors_are_refused():
    model = transformer()
    model.blocks[1].attn1.set_processor(lambda *_: None)
    with pytest.raises(InstallError, match="expected diffusers' own Wan attention processor, found function"):
        apply_strategy(model, "dense")
    assert type(model.blocks[0].attn1.processor).__name__ == "WanAttnProcessor"


@torch.no_grad()
def test_what_self_attention_does_not_take_is_refused():
    model = transformer()
    tokens = torch.randn(1, 105, 128)
    with apply_strategy(model, "dense"):
        layer = model.blocks[0].attn1
        with pytest.raises(UnsupportedCallError, match="with a token mask is not supported"):
            layer(tokens, attention_mask=torch.ones(1, 1, 1, 105, dtype=torch.bool))
        with pytest.raises(UnsupportedCallError, match="takes no encoder_hidden_states"):
            layer(tokens, encoder_hidden_states=tokens)
        with pytest.raises(InstallError, match="own forward"):
            layer(tokens)
