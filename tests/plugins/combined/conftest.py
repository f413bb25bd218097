"""The fixtures of the kernels' tests, for operators that run on CPU and GPU."""

from tests.kernels_common.conftest import device, generator, poisoned_memory

__all__ = ["device", "generator", "poisoned_memory"]
