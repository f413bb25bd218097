"""Device, backend and memory fixtures."""

import os
import secrets

import pytest
import torch
from torch._dynamo import trace_rules


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def generator(request: pytest.FixtureRequest) -> torch.Generator:
    """Fresh inputs at every run; a failing test shows its seed, and SPARSE_ATTN_SEED repeats it."""
    seed = int(os.environ.get("SPARSE_ATTN_SEED", secrets.randbits(31)))
    print(f"SPARSE_ATTN_SEED={seed}")
    return torch.Generator().manual_seed(seed)


def _poison(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(float("nan"))
    return tensor.fill_(1 << 30) if tensor.dtype in (torch.int32, torch.int64) else tensor


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Uninitialised memory holds NaN, or far too large integers, so that reading it shows."""
    trace_rules.get_torch_obj_rule_map()  # remembered: compiled tests after this one need the true functions
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        original = getattr(owner, name)
        monkeypatch.setattr(
            owner, name, lambda *args, _make=original, **options: _poison(_make(*args, **options))
        )
