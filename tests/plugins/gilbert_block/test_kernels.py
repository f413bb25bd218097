"""Levels in Triton against the plain forms, which `test_levels.py` holds to the definition."""

import pytest
import torch

from plugins.gilbert_block.kernels import mass_levels, rank_levels
from plugins.gilbert_block.levels import levels_by_mass, levels_by_rank

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.fixture
def size(device):
    """Rows of two batch entries and heads; the interpreter takes its time."""
    return (2, 3, 40, 705) if device.type == "cuda" else (1, 1, 3, 21)


@pytest.fixture
def importance(generator, size):
    """Rows of very different sharpness, some without importance, with ties."""
    rows = torch.rand(size, generator=generator) ** torch.rand(*size[:3], 1, generator=generator).mul(20)
    rows[..., 5:9] = rows[..., 5:6]
    rows[0, 0, 0] = (rows[0, 0, 0] * 3).round()
    rows[-1, -1, -1] = 0
    return rows / rows.sum(-1, keepdim=True).clamp(min=1e-30)


@pytest.fixture(params=[False, True], ids=["free", "forced"])
def forced(request, generator, size):
    blocks = torch.zeros(size[2:], dtype=torch.bool)
    if request.param:
        blocks = torch.rand(size[2:], generator=generator) < 0.2
        blocks[1] = True
    return blocks


@pytest.mark.parametrize(
    "bounds",
    [(0.05, 0.15, 0.25, 0.5), (0.1, 0.15, 0.15, 0.35), (0.29, 1.0, 1.0, 1.0), (0.001, 0.01, 0.2, 0.2)],
)
def test_levels_by_rank(importance, forced, device, bounds):
    expected = levels_by_rank(importance, bounds, forced)
    numbers = tuple(int(bound * importance.shape[3] + 1e-4) for bound in bounds)
    numbers = (max(1, numbers[0]), *numbers[1:])
    assert torch.equal(rank_levels(importance.to(device), numbers, forced.to(device)).cpu(), expected)


@pytest.mark.parametrize(
    ("bounds", "fewest"),
    [
        ((0.5, 0.6, 0.7, 0.8), 1),
        ((0.6, 0.7, 0.7, 0.8), 6),
        ((0.3, 0.3, 0.3, 1.0), 2),
        ((0.01, 0.02, 0.03, 0.5), 1),
    ],
)
def test_levels_by_mass(importance, forced, device, bounds, fewest):
    expected = levels_by_mass(importance, bounds, fewest / importance.shape[3], forced)
    found = mass_levels(importance.to(device), bounds, fewest, forced.to(device))
    assert torch.equal(found.cpu(), expected)
