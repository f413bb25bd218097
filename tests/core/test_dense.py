import pytest
import torch
import torch.nn.functional as F

from core import TokenLayout, UnsupportedCallError, attention
from core.dense import resolve_dense_backend
from core.testing import dense_fp64, random_qkv


def test_equals_the_fp64_reference_and_sdpa():
    query, key, value = random_qkv(TokenLayout(3, 2, 5, 7), heads=3)
    output = attention(query, key, value)
    assert (output - dense_fp64(query, key, value)).abs().max() < 5e-6
    assert torch.equal(output, F.scaled_dot_product_attention(query, key, value))


def test_grouped_heads_and_scale():
    query, key, value = random_qkv(TokenLayout(0, 1, 6, 7), heads=4)
    output = attention(query, key[:, :2], value[:, :2], scale=0.3)
    repeated = [part[:, :2].repeat_interleave(2, dim=1) for part in (key, value)]
    expected = dense_fp64(query * 0.3 * query.shape[-1] ** 0.5, *repeated)
    assert (output - expected).abs().max() < 5e-6


def test_cpu_takes_the_call_that_diffusers_makes():
    assert resolve_dense_backend(*random_qkv(TokenLayout(0, 1, 2, 2))) == "sdpa"


def test_unknown_backend():
    with pytest.raises(UnsupportedCallError, match="got 'fast'"):
        attention(*random_qkv(TokenLayout(0, 1, 2, 2)), backend="fast")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_backends_agree():
    qkv = random_qkv(TokenLayout(226, 3, 10, 15), heads=4, dtype=torch.bfloat16, device="cuda")
    expected = dense_fp64(*qkv)
    for backend in ("auto", "sdpa", "cudnn", "flash"):
        error = (attention(*qkv, backend=backend) - expected).norm() / expected.norm()
        assert error < 5e-3, backend
