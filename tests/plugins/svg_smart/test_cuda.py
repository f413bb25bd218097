"""What only a GPU shows: the other kernels, 16-bit inputs, no waiting for the device."""

import pytest
import torch

from core import AttentionContext, TokenLayout
from plugins.svg_smart.clusters import k_means
from plugins.svg_smart.strategy import SvgSmartStrategy
from tests.plugins.svg_smart.conformance import (
    BandConformance,
    FramesConformance,
    SemanticConformance,
    SinkConformance,
    planted_qkv,
)

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYOUT = TokenLayout(30, 6, 12, 19)
JUDGED = [{"density": 0.4}, {"density": 0.5, "sink": True}, {"variant": "frames"}]
CLUSTERED = {"variant": "semantic", "mass": 0.5, "query_clusters": 20, "key_clusters": 50}


class TestBandOnCuda(BandConformance):
    device = "cuda"


class TestSinkOnCuda(SinkConformance):
    device = "cuda"


class TestFramesOnCuda(FramesConformance):
    device = "cuda"


class TestSemanticOnCuda(SemanticConformance):
    device = "cuda"


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)], ids=str)
@pytest.mark.parametrize("options", JUDGED, ids=str)
def test_outputs_are_those_of_a_cpu(options, dtype, tolerance):
    tensors = planted_qkv(LAYOUT, batch=2, heads=4, dtype=dtype)
    outputs = []
    for device, working in (("cuda", dtype), ("cpu", torch.float32)):
        strategy = SvgSmartStrategy(block_size=64, **options)
        moved = (part.to(device, working) for part in tensors)
        outputs.append(strategy(*moved, AttentionContext(LAYOUT)).cpu().float())
        report = strategy.report()
        assert report.density < 0.9 and report.shares_by_layer["temporal_heads"][0] == [0.5]
    assert (outputs[0] - outputs[1]).norm() <= tolerance * outputs[1].norm()


@pytest.mark.parametrize("options", [*JUDGED, CLUSTERED], ids=str)
def test_calls_do_not_wait_for_the_device(options):
    tensors = [part.cuda() for part in planted_qkv(LAYOUT, heads=4, dtype=torch.bfloat16)]
    strategy = SvgSmartStrategy(block_size=64, nan_guard="off", **options)
    for step in range(2):  # plans and compiles
        strategy(*tensors, AttentionContext(LAYOUT, step_index=step))
    strategy.start_video()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(2):
            strategy(*tensors, AttentionContext(LAYOUT, step_index=step))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_equal_clusterings_give_equal_bits():
    """Many points in few clusters: sums in any order would differ."""
    points = torch.randn(8, 20_000, 64, generator=torch.Generator().manual_seed(0)).cuda()
    found = [k_means(points, points[:, :10].clone(), 5) for _ in range(3)]
    for labels, centroids in found[1:]:
        assert torch.equal(labels, found[0][0]) and torch.equal(centroids, found[0][1])
    on_cpu = k_means(points.cpu(), points[:, :10].cpu(), 1)[1]
    assert (k_means(points, points[:, :10].clone(), 1)[1].cpu() - on_cpu).abs().mean() < 1e-3
