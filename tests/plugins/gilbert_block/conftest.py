"""The fixtures of the kernels' tests, for a plugin that has kernels of its own."""

from tests.kernels_common.conftest import device, generator, poisoned_memory

__all__ = ["device", "generator", "poisoned_memory"]
