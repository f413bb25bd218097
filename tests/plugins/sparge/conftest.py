"""The fixtures of the kernels' tests, for a plugin that has functions of its own over them."""

from tests.kernels_common.conftest import device, generator, poisoned_memory

__all__ = ["device", "generator", "poisoned_memory"]
