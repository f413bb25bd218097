import pytest
import torch
import torch.nn.functional as F

from core import TokenLayout, UnsupportedCallError, attention
from core.dense import resolve_dense_backend
from core.dense_packages import PACKAGES
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


@pytest.mark.parametrize("backend", ["cudnn", "flash"])
def test_a_kernel_that_cannot_take_the_call_is_an_error(backend):
    with pytest.raises(UnsupportedCallError, match=f"'{backend}' needs a CUDA device"):
        attention(*random_qkv(TokenLayout(0, 1, 2, 2)), backend=backend)
    if torch.cuda.is_available():
        with pytest.raises(UnsupportedCallError, match=f"'{backend}' does not support torch.float64"):
            doubles = random_qkv(TokenLayout(0, 1, 2, 2), dtype=torch.float64, device="cuda")
            attention(*doubles, backend=backend)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_backends_agree():
    qkv = random_qkv(TokenLayout(226, 3, 10, 15), heads=4, dtype=torch.bfloat16, device="cuda")
    expected = dense_fp64(*qkv)
    for backend in ("auto", "sdpa", "cudnn", "flash"):
        error = (attention(*qkv, backend=backend) - expected).norm() / expected.norm()
        assert error < 2.0**-8, backend


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gradients_and_other_head_dims_stay_with_torch():
    query, key, value = random_qkv(TokenLayout(0, 2, 8, 8), dtype=torch.bfloat16, device="cuda")
    assert resolve_dense_backend(query.requires_grad_(), key, value) not in PACKAGES
    attention(query, key, value).sum().backward()
    assert torch.isfinite(query.grad).all()
