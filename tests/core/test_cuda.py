"""What only a GPU shows: other kernels, offloading, deferred checks, compiled code."""

import pytest
import torch

from core import AttentionContext, AttentionResult, NonFiniteOutputError, apply_strategy, attention
from core.testing import StrategyConformance
from plugins.dense.strategy import DenseStrategy
from plugins.radial.strategy import RadialStrategy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture
def pipeline(make_pipeline):
    pipeline = make_pipeline(use_rotary_positional_embeddings=True)
    return pipeline.to("cuda", torch.bfloat16)


def test_sdpa_is_bit_identical_and_auto_is_close(pipeline, run_pipeline):
    untouched = run_pipeline(pipeline)
    with apply_strategy(pipeline, "dense", backend="sdpa"):
        assert torch.equal(run_pipeline(pipeline), untouched)
    with apply_strategy(pipeline, "dense") as run:
        fastest = run_pipeline(pipeline)
        assert set(run.report().backends) <= {"dense-cudnn", "dense-flash", "dense-sdpa"}
    assert (fastest - untouched).norm() / untouched.norm() < 2e-2
    assert torch.equal(run_pipeline(pipeline), untouched)


def test_model_cpu_offload(make_pipeline, run_pipeline):
    pipeline = make_pipeline()
    pipeline.enable_model_cpu_offload()
    untouched = run_pipeline(pipeline)
    with apply_strategy(pipeline, "dense", backend="sdpa") as run:
        assert torch.equal(run_pipeline(pipeline), untouched)
        assert run.report().calls == 6
    with apply_strategy(pipeline, "radial", time_attention=True) as run:
        assert torch.isfinite(run_pipeline(pipeline)).all()
        assert run.report().attention_time_s > 0


def test_the_guard_waits_for_the_end_of_the_denoiser_call(pipeline, run_pipeline):
    class Broken(DenseStrategy):
        name = "broken"

        def attend(self, query, key, value, context: AttentionContext):
            late = context.layer_index == 1 and context.step_index == 2
            output = attention(query, key, value) * (float("inf") if late else 1.0)
            return AttentionResult(output, 1.0, "test")

    with apply_strategy(pipeline, Broken()) as run:
        with pytest.raises(NonFiniteOutputError, match="'broken'.*layer 1 of 2, step 2"):
            run_pipeline(pipeline)
        assert run.report().calls == 6, "the whole denoiser call ran before the check"
    with apply_strategy(pipeline, Broken(nan_guard="dense")) as run:
        assert torch.isfinite(run_pipeline(pipeline)).all()
        assert run.report().dense_calls == {"non-finite output": 1}


@pytest.mark.parametrize("strategy", ["dense", "radial"])
def test_inductor_with_fullgraph(make_pipeline, run_pipeline, strategy):
    torch._dynamo.reset()
    pipeline = make_pipeline(num_layers=10).to("cuda", torch.bfloat16)
    with apply_strategy(pipeline, strategy) as run:
        eager = run_pipeline(pipeline)
        for block in pipeline.transformer.transformer_blocks:
            block.compile(fullgraph=True)
        compiled = run_pipeline(pipeline)
        assert run.report().calls == 30
    assert (compiled - eager).norm() / eager.norm() < 3e-2


class TestDenseOnCuda(StrategyConformance):
    strategy = DenseStrategy
    parameters = {"backend": "sdpa"}
    full_density = {}
    device = "cuda"


class TestRadialOnCuda(StrategyConformance):
    strategy = RadialStrategy
    parameters = {"block_size": 64}
    device = "cuda"


def test_radial_kernel_equals_its_reference():
    from core import TokenLayout
    from core.testing import random_qkv

    layout = TokenLayout(226, 5, 30, 45)
    qkv = random_qkv(layout, heads=4, dtype=torch.bfloat16, device="cuda")
    outputs = {}
    for backend in ("triton", "reference"):
        strategy = RadialStrategy(backend=backend)
        outputs[backend] = strategy(*qkv, AttentionContext(layout)).float()
        assert strategy.report().backends == {backend: 1}
    error = (outputs["triton"] - outputs["reference"]).norm() / outputs["reference"].norm()
    assert error < 5e-3
