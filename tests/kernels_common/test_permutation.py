import pytest
import torch

from kernels_common import gather_tokens, invert_permutation, scatter_tokens

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture(params=[(), (1, 3), (2, 1), (2, 3)], ids=str)
def order(request, generator):
    return torch.rand(*request.param, 17, generator=generator).argsort(-1)


@pytest.fixture
def tokens(generator):
    return torch.randn(2, 17, 3, 4, generator=generator).transpose(1, 2)


def test_gather_takes_the_listed_tokens(tokens, order):
    gathered = gather_tokens(tokens, order)
    places = order.expand(2, 3, 17)
    for batch in range(2):
        for head in range(3):
            assert torch.equal(gathered[batch, head], tokens[batch, head, places[batch, head]])


def test_scatter_and_inverse_undo_gather(tokens, order):
    gathered = gather_tokens(tokens, order)
    assert torch.equal(scatter_tokens(gathered, order), tokens)
    assert torch.equal(gather_tokens(gathered, invert_permutation(order)), tokens)


def test_gather_may_take_fewer_tokens(tokens):
    assert torch.equal(gather_tokens(tokens, torch.tensor([3, 3, 0])), tokens[:, :, [3, 3, 0]])
