"""Both forms of the block statistics against the Gram matrix in fp64."""

import pytest
import torch

from core import LayoutError, ParameterError
from kernels_common import block_means, block_statistics, token_mean

# Sums of up to 64 products and quotients in fp32.
TOLERANCE = {"rtol": 2.0**-19, "atol": 2.0**-20}

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=["torch", "triton"], autouse=True)
def form(request, monkeypatch):
    monkeypatch.setattr(block_statistics, "runs_triton", lambda tensor: request.param == "triton")
    return request.param


def brute_force(tokens, block):
    """Mean and mean cosine of all pairs, block by block, from the Gram matrix."""
    means, similarities = [], []
    for part in tokens.double().split(block, 2):
        cosines = torch.nn.functional.cosine_similarity(part[:, :, :, None], part[:, :, None], dim=-1)
        means.append(part.mean(2))
        similarities.append(cosines.mean((2, 3)))
    return torch.stack(means, 2), torch.stack(similarities, 2)


def check(tokens, block, subtract=None):
    statistics = block_means(tokens, block, subtract=subtract)
    shifted = tokens.double() if subtract is None else tokens.double() - subtract.double()
    mean, similarity = brute_force(shifted, block)
    assert statistics.mean.dtype == statistics.similarity.dtype == torch.float32
    torch.testing.assert_close(statistics.mean.double(), mean, **TOLERANCE)
    torch.testing.assert_close(statistics.similarity.double(), similarity, **TOLERANCE)


@pytest.mark.parametrize(
    ("length", "block", "dim"), [(1, 16, 8), (37, 16, 8), (48, 12, 40), (130, 64, 64)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_statistics_equal_the_gram_matrix(generator, device, length, block, dim, dtype):
    tokens = torch.randn(2, 3, length, dim, generator=generator).to(device, dtype)
    check(tokens + 0.5, block)
    check(tokens + 0.5, block, subtract=token_mean(tokens + 0.5))


def test_strided_tokens_and_what_follows_them(generator, device):
    """Only the tokens themselves are read: the memory behind each head holds NaN."""
    memory = torch.full((2, 40, 3, 8), float("nan"))
    memory[:, :37] = torch.randn(2, 37, 3, 8, generator=generator)
    tokens = memory.to(device).transpose(1, 2)[:, :, :37]
    check(tokens, 16)
    torch.testing.assert_close(
        token_mean(tokens).double(), tokens.double().mean(2, keepdim=True), **TOLERANCE
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_tokens_are_read_in_a_given_order(generator, device, dtype):
    tokens = torch.randn(2, 37, 3, 8, generator=generator).to(device).transpose(1, 2) + 0.5
    order = torch.randperm(37, generator=generator)[:35].to(device, dtype)
    offset = token_mean(tokens)
    for subtract in (None, offset):
        found = block_means(tokens, 16, subtract=subtract, order=order)
        expected = block_means(tokens[:, :, order.long()], 16, subtract=subtract)
        assert torch.equal(found.mean, expected.mean) and torch.equal(found.similarity, expected.similarity)


def test_similarity_ignores_the_length_of_tokens(generator, device):
    tokens = torch.randn(1, 2, 32, 8, generator=generator).to(device)
    factors = torch.rand(1, 2, 32, 1, generator=generator).to(device) + 0.1
    similarity = block_means(tokens, 16).similarity
    torch.testing.assert_close(block_means(tokens * factors, 16).similarity, similarity, **TOLERANCE)
    assert ((similarity >= 0) & (similarity <= 1)).all()


def test_zero_tokens_have_no_direction(device):
    tokens = torch.zeros(1, 1, 6, 4, device=device)
    tokens[0, 0, 2, 1] = 3.0
    tokens[0, 0, 4:, 2] = 2.0
    mean, similarity = block_means(tokens, 2)
    assert similarity.flatten().tolist() == [0.0, 0.25, 1.0]
    assert mean[0, 0, :, 1].tolist() == [0.0, 1.5, 0.0]


@pytest.mark.parametrize("length", [1, 63, 1200])
def test_token_mean(generator, device, length):
    tokens = torch.randn(2, 2, length, 8, generator=generator).to(device) + 3
    torch.testing.assert_close(
        token_mean(tokens).double(), tokens.double().mean(2, keepdim=True), **TOLERANCE
    )


def test_wrong_calls_are_refused(device):
    tokens = torch.zeros(1, 2, 8, 4, device=device)
    with pytest.raises(LayoutError, match=r"\(1, 2, 1, 4\)"):
        block_means(tokens, 4, subtract=tokens)
    with pytest.raises(LayoutError, match="S >= 1"):
        token_mean(tokens[:, :, :0])
    with pytest.raises(LayoutError, match="order must be int32 or int64"):
        block_means(tokens, 4, order=torch.arange(8.0, device=device))
    with pytest.raises(ParameterError, match="at least 1"):
        block_means(tokens, 0)
