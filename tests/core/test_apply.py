"""Strategies in a real CogVideoX pipeline (random weights)."""

import copy
import gc

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from core import InstallError, apply_strategy, create_strategy
from core.hookspecs import hookimpl
from core.registry import installed
from core.testing import tiny_call, tiny_transformer

MODELS = {
    "2b: no RoPE": {},
    "5b: RoPE": {"use_rotary_positional_embeddings": True},
    "1.5: temporal patch": {
        "use_rotary_positional_embeddings": True,
        "patch_size_t": 2,
        "patch_bias": False,
    },
    "image-to-video: learned positions and RoPE": {
        "use_rotary_positional_embeddings": True,
        "use_learned_positional_embeddings": True,
    },
}


@pytest.fixture(params=MODELS.values(), ids=MODELS.keys())
def pipeline(request, make_pipeline):
    return make_pipeline(**request.param)


def test_dense_is_bit_identical(pipeline, run_pipeline):
    untouched = run_pipeline(pipeline)
    with apply_strategy(pipeline, "dense") as run:
        assert torch.equal(run_pipeline(pipeline), untouched)
        assert run.report().calls == 2 * 3  # layers x steps; both CFG halves in one batch
    assert torch.equal(run_pipeline(pipeline), untouched)


def test_guidance_off_and_on(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    for guidance in (1.0, 6.0):
        untouched = run_pipeline(pipeline, guidance=guidance)
        with apply_strategy(pipeline, "dense"):
            assert torch.equal(run_pipeline(pipeline, guidance=guidance), untouched)


def test_dense_is_bit_identical_with_fused_projections(pipeline, run_pipeline):
    pipeline.transformer.fuse_qkv_projections()
    untouched = run_pipeline(pipeline)
    with apply_strategy(pipeline, "dense") as run:
        assert torch.equal(run_pipeline(pipeline), untouched)
        assert run.report().calls == 6
    assert torch.equal(run_pipeline(pipeline), untouched)


def test_guidance_by_two_calls_a_step_keeps_its_halves_apart():
    transformer = tiny_transformer()
    seen = []

    class Watching(type(create_strategy("dense"))):
        """Dense attention that looks at its contexts."""

        def attend(self, query, key, value, context):
            seen.append((context.step_index, context.place))
            return super().attend(query, key, value, context)

    with torch.no_grad(), apply_strategy(transformer, Watching()):
        for timestep in (999, 999, 500, 500):
            transformer(**tiny_call(transformer, timestep=timestep))
    layers = [(step, call) for step, (layer, _, call) in seen if layer == 0]
    assert layers == [(0, 0), (0, 1), (1, 0), (1, 1)]
    assert len({place for _, place in seen}) == 4, "two layers, two halves"


def test_fusing_and_unfusing_under_an_installed_strategy(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    stock = {name: type(value) for name, value in pipeline.transformer.attn_processors.items()}
    run = apply_strategy(pipeline, "dense")
    pipeline.transformer.fuse_qkv_projections()
    run_pipeline(pipeline)
    assert run.report().calls == 6, "fusing silently took the strategy out"
    pipeline.transformer.unfuse_qkv_projections()
    run_pipeline(pipeline)
    assert run.report().calls == 6
    run.remove()
    assert {name: type(value) for name, value in pipeline.transformer.attn_processors.items()} == stock


def test_unfusing_after_removal_does_not_bring_the_strategy_back(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    run = apply_strategy(pipeline, "dense")
    pipeline.transformer.fuse_qkv_projections()
    run.remove()
    pipeline.transformer.unfuse_qkv_projections()
    run_pipeline(pipeline)
    assert run.report().calls == 0


def test_removal_restores_the_very_processors(make_pipeline):
    transformer = make_pipeline().transformer
    before = dict(transformer.attn_processors)
    run = apply_strategy(transformer, "dense")
    assert all(new is not before[name] for name, new in transformer.attn_processors.items())
    run.remove()
    run.remove()
    assert dict(transformer.attn_processors) == before
    assert not transformer._forward_pre_hooks and not transformer._forward_hooks


def test_a_removed_handle_is_not_entered_again(make_pipeline):
    with apply_strategy(make_pipeline(), "dense") as run:
        pass
    with pytest.raises(InstallError, match="was removed; call apply_strategy again"), run:
        pass


def test_an_error_inside_the_block_still_restores(make_pipeline):
    transformer = make_pipeline().transformer
    before = dict(transformer.attn_processors)
    with pytest.raises(RuntimeError, match="stop"), apply_strategy(transformer, "dense"):
        raise RuntimeError("stop")
    assert dict(transformer.attn_processors) == before


def test_two_pipelines_do_not_disturb_each_other(make_pipeline, run_pipeline):
    first, second = make_pipeline(), make_pipeline(use_rotary_positional_embeddings=True)
    expected = [run_pipeline(first), run_pipeline(second)]
    with (
        apply_strategy(first, "dense") as run_first,
        apply_strategy(second, "dense", dense_layers=1) as run_second,
    ):
        for _ in range(2):
            assert torch.equal(run_pipeline(first), expected[0])
            assert torch.equal(run_pipeline(second), expected[1])
        assert run_first.report().dense_calls == {}
        assert run_second.report().dense_calls == {"dense warm-up": 3}


def test_second_video_behaves_as_the_first(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    with apply_strategy(pipeline, "dense", dense_timesteps=1) as run:
        for steps in (3, 3, 5, 1, 1):
            first = run_pipeline(pipeline, steps=steps)
            report = run.report()
            assert report.calls == 2 * steps
            assert report.dense_calls == {"dense warm-up": 2}
            assert len(report.density_by_layer[0]) == steps
            assert torch.equal(run_pipeline(pipeline, steps=steps), first)
            assert run.report().calls == 2 * steps


def test_step_comes_from_the_timestep_not_from_counting(make_pipeline):
    transformer = make_pipeline().transformer
    with torch.no_grad(), apply_strategy(transformer, "dense") as run:
        for timestep in (999, 999, 500, 500, 500, 20):  # a pipeline that calls several times per step
            transformer(**tiny_call(transformer, timestep=timestep))
        assert len(run.report().density_by_layer[0]) == 3
        transformer(**tiny_call(transformer, timestep=999))
        assert run.report().calls == 2, "a rising timestep begins a new video"


def test_positional_arguments_are_read(make_pipeline):
    transformer = make_pipeline().transformer
    call = tiny_call(transformer)
    with torch.no_grad(), apply_strategy(transformer, "dense") as run:
        transformer(call["hidden_states"], call["encoder_hidden_states"], call["timestep"])
    assert run.report().calls == 2


def test_layout_of_the_true_shapes(make_pipeline, run_pipeline):
    layouts = []

    class Watcher:
        @hookimpl
        def generation_started(self, strategy, layout, num_steps):
            layouts.append((layout, num_steps))

    watcher = Watcher()
    installed().hooks.register(watcher)
    try:
        pipeline = make_pipeline(**MODELS["1.5: temporal patch"])
        with apply_strategy(pipeline, "dense"):
            run_pipeline(pipeline, num_frames=17, height=96, width=128, steps=2)
    finally:
        installed().hooks.unregister(watcher)
    (layout, num_steps) = layouts[0]
    # 17 frames are 5 latent frames, padded to 6 and patched by 2; 96 x 128 pixels are 6 x 8 tokens.
    assert (layout.text_length, layout.frames, layout.height, layout.width) == (16, 3, 6, 8)
    assert num_steps == 2 and len(layouts) == 1


def test_lifecycle_hooks_fire_once_per_video(make_pipeline, run_pipeline):
    events = []

    class Watcher:
        @hookimpl
        def generation_started(self, strategy, layout, num_steps):
            events.append(("started", strategy.name))

        @hookimpl
        def generation_finished(self, strategy, report):
            events.append(("finished", report.calls))

    watcher = Watcher()
    installed().hooks.register(watcher)
    try:
        pipeline = make_pipeline()
        with apply_strategy(pipeline, "dense"):
            run_pipeline(pipeline, steps=2)
            run_pipeline(pipeline, steps=3)
    finally:
        installed().hooks.unregister(watcher)
    assert events == [("started", "dense"), ("finished", 4), ("started", "dense"), ("finished", 6)]


def test_attention_time_is_measured_on_request(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    with apply_strategy(pipeline, "dense") as run:
        run_pipeline(pipeline)
        assert run.report().attention_time_s is None
    with apply_strategy(pipeline, "dense", time_attention=True) as run:
        run_pipeline(pipeline)
        assert run.report().attention_time_s > 0


def test_misuse_is_refused_with_the_way_out(make_pipeline):
    transformer = make_pipeline().transformer
    with apply_strategy(transformer, "dense"), pytest.raises(InstallError, match="in this model already"):
        apply_strategy(transformer, "dense")
    strategy = create_strategy("dense")
    with apply_strategy(transformer, strategy):
        with pytest.raises(InstallError, match="build a second one"):
            apply_strategy(tiny_transformer(), strategy)
        with pytest.raises(InstallError, match="own forward"):
            block = transformer.transformer_blocks[0]
            block(torch.zeros(1, 192, 128), torch.zeros(1, 16, 128), torch.zeros(1, 16))
    with pytest.raises(InstallError, match="known families: cogvideox"):
        apply_strategy(torch.nn.Linear(2, 2), "dense")
    with pytest.raises(InstallError, match="takes no preset or parameters"):
        apply_strategy(transformer, create_strategy("dense"), dense_layers=1)


def test_a_foreign_processor_is_refused(make_pipeline):
    transformer = make_pipeline().transformer
    transformer.transformer_blocks[1].attn1.processor = object()
    with pytest.raises(InstallError, match="found object"):
        apply_strategy(transformer, "dense")
    assert type(transformer.transformer_blocks[0].attn1.processor).__name__ == "CogVideoXAttnProcessor2_0"


def test_layerwise_casting(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    pipeline.transformer.enable_layerwise_casting(
        storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32
    )
    untouched = run_pipeline(pipeline)
    with apply_strategy(pipeline, "dense"):
        assert torch.equal(run_pipeline(pipeline), untouched)


def test_group_offload_hooks_keep_working(make_pipeline, run_pipeline):
    from accelerate.hooks import ModelHook, add_hook_to_module

    pipeline = make_pipeline()
    untouched = run_pipeline(pipeline)
    add_hook_to_module(pipeline.transformer, ModelHook())  # wraps forward, as model CPU offload does
    with apply_strategy(pipeline, "dense") as run:
        assert torch.equal(run_pipeline(pipeline), untouched)
        assert run.report().calls == 6


@pytest.mark.parametrize("strategy", ["dense", "radial"])
def test_compiled_blocks_have_one_graph(make_pipeline, run_pipeline, strategy):
    torch._dynamo.reset()
    pipeline = make_pipeline(num_layers=10)
    with apply_strategy(pipeline, strategy, nan_guard="raise") as run:
        eager = run_pipeline(pipeline)
        counter = CompileCounterWithBackend("aot_eager")
        for block in pipeline.transformer.transformer_blocks:
            block.compile(fullgraph=True, backend=counter)
        compiled = run_pipeline(pipeline)
        assert run.report().calls == 30
        assert counter.frame_count <= 2, "layer or step became part of the graph"
        assert (compiled - eager).abs().max() < 1e-4
    with apply_strategy(pipeline, strategy):
        run_pipeline(pipeline)
    assert counter.frame_count <= 4


def test_gradients_flow_through_dense(make_pipeline):
    transformer = make_pipeline().transformer
    call = tiny_call(transformer)
    call["hidden_states"].requires_grad_(True)
    with apply_strategy(transformer, "dense"):
        transformer(**call).sample.square().mean().backward()
    with_strategy = call["hidden_states"].grad.clone()
    call["hidden_states"].grad = None
    transformer(**call).sample.square().mean().backward()
    assert torch.equal(with_strategy, call["hidden_states"].grad)


def test_a_dropped_handle_keeps_working_and_copies_are_independent(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    untouched = run_pipeline(pipeline)
    apply_strategy(pipeline, "dense")
    gc.collect()
    assert torch.equal(run_pipeline(pipeline), untouched)
    clone = copy.deepcopy(make_pipeline().transformer)
    with apply_strategy(clone, "dense"):
        pass


def test_something_else_than_a_strategy_is_refused(make_pipeline):
    with pytest.raises(InstallError, match="got None"):
        apply_strategy(make_pipeline(), None)


def test_a_report_without_calls_says_so(make_pipeline):
    with apply_strategy(make_pipeline(), "dense") as run:
        assert str(run.report()) == "dense: no attention calls yet"
