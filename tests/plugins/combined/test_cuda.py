"""What only a GPU shows: the other kernels, 16-bit inputs, no waiting for the device."""

import pytest
import torch

from core import AttentionContext, TokenLayout
from core.testing import StrategyConformance, dense_fp64, random_qkv
from plugins.combined.strategy import CombinedStrategy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

LAYOUT = TokenLayout(30, 6, 12, 19)
OPTIONS = [{"form": "columns"}, {"anchors": 2, "exact_rows": 0.0}, {"anchors": 1, "exact_rows": 0.1}]


class TestTestedOnCuda(StrategyConformance):
    strategy = CombinedStrategy
    parameters = {
        "similarity": 0.3,
        "places": 2,
        "key_stride": 40,
        "anchors": 1,
        "sparse_options": {"tau": 0.5, "block_size": 64, "samples": 4},
    }
    keeps_tokens = False
    device = "cuda"


class TestColumnsOnCuda(StrategyConformance):
    strategy = CombinedStrategy
    parameters = {"classes": "pattern", "form": "columns", "places": 8}
    keeps_tokens = False
    device = "cuda"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS[:2], ids=str)  # rows near the cut may be others in 16 bits
def test_16_bit_outputs_are_those_of_fp32(options, dtype):
    tensors = random_qkv(LAYOUT, heads=4, dtype=dtype, device="cuda")
    strategy = CombinedStrategy(classes="pattern", places=16, **options)
    output = strategy(*tensors, AttentionContext(LAYOUT)).float()
    precise = tuple(part.float() for part in tensors)
    expected = CombinedStrategy(classes="pattern", places=16, **options)(*precise, AttentionContext(LAYOUT))
    assert (output - expected).norm() / expected.norm() < 2e-2
    text = output[:, :, LAYOUT.text_slice] - dense_fp64(*precise)[:, :, LAYOUT.text_slice]
    assert text.abs().max() < 2e-2


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_calls_after_a_test_do_not_wait_for_the_device(options):
    tensors = random_qkv(LAYOUT, heads=4, dtype=torch.bfloat16, device="cuda")
    strategy = CombinedStrategy(nan_guard="off", similarity=0.3, sparse_mass=1.0, places=16, **options)
    strategy(*tensors, AttentionContext(LAYOUT, step_index=1))
    torch.cuda.set_sync_debug_mode("error")
    try:
        strategy(*tensors, AttentionContext(LAYOUT, step_index=2))
    finally:
        torch.cuda.set_sync_debug_mode("default")
