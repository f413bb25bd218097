"""Every strategy of this repository, for the tests of model adapters: exact, and leaving pairs out."""

import pytest

EXACT = {
    "dense": {},
    "radial": {"decay_factor": 1e6},
    "sliding-tile": {"density": 1.0},
    "sparge": {"density": 1.0, "order": "gilbert"},
    "gilbert-block": {"tau": 1.0},
    "svg-smart": {"density": 1.0},
    "tome": {"ratio": 0.0},
    "combined": {"classes": "pattern", "anchors": 1000},
}
SPARSE = {
    "radial": {"block_size": 64, "decay_factor": 0.2},
    "sliding-tile": {"block_size": 64, "window": (1, 1, 1)},
    "sparge": {"block_size": 64, "topk": 0.3},
    "gilbert-block": {"block_size": 64, "selection": "topk", "keep_ratio": 0.3, "samples": 8},
    "svg-smart": {"block_size": 64, "variant": "frames", "diagonal": 0},
    "tome": {"ratio": 0.5},
    "combined": {"classes": "pattern", "anchors": 1, "places": 8},
}


@pytest.fixture(params=EXACT.items(), ids=EXACT.keys())
def exact_strategy(request):
    """Name and options of a strategy that leaves nothing out."""
    return request.param


@pytest.fixture(params=SPARSE.items(), ids=SPARSE.keys())
def sparse_strategy(request):
    """Name and options of a strategy that leaves pairs out at some hundred tokens."""
    return request.param
