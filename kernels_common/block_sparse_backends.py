"""Backends of the block-sparse operator: what each can do, and which one a call gets."""

import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch

from core.argument_checks import check_tensors_given
from core.block_mask import BlockSparseMask
from core.errors import UnsupportedCallError
from kernels_common.triton_choice import triton_obstacle

BACKENDS = ("reference", "torch", "triton", "gluon", "flex", "flash4")
QUANTIZATIONS = ("none", "int8_fp8", "int8_fp16")

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


class CallFeatures(NamedTuple):
    """What a call asks of its backend beside attention over blocks.

    Args:
        key_lengths (bool): valid keys per batch entry. Default: False
        bias (bool): a bias per key. Default: False
        causal (bool): no query sees a later key. Default: False
        quantization (str): one of ``QUANTIZATIONS``. Default: ``"none"``
        skip (bool): tiles of little weight are skipped. Default: False
        sizes (bool): keys that stand for several. Default: False
    """

    key_lengths: bool = False
    bias: bool = False
    causal: bool = False
    quantization: str = "none"
    skip: bool = False
    sizes: bool = False

    @property
    def exact(self) -> bool:
        """Whether operands keep their precision and every tile is computed."""
        return self.quantization == "none" and not self.skip

    @property
    def extra(self) -> str | None:
        """The first feature beyond plain attention in the inputs' precision, by its argument's name."""
        named = (
            (self.quantization != "none", "quantization"),
            (self.skip, "skip_threshold"),
            (self.key_lengths, "key_lengths"),
            (self.bias, "bias"),
            (self.sizes, "key_sizes"),
            (self.causal, "causal"),
        )
        return next((name for present, name in named if present), None)


PLAIN = CallFeatures()
INT8_FP8 = CallFeatures(quantization="int8_fp8")


def resolve_backend(
    query: torch.Tensor, block_mask: BlockSparseMask, backend: str = "auto", features: CallFeatures = PLAIN
) -> str:
    """Backend that the block-sparse operator runs for such a call.

    ``"auto"`` takes the fastest that supports the call: on Hopper GPUs ``"gluon"`` where it is the faster one
    (`block_sparse_gluon.prefers_gluon`), on CUDA devices with triton ``"triton"``, else ``"torch"``. The
    optional packages behind ``"flex"`` and ``"flash4"`` run on request only. A name is checked and returned.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        block_mask (BlockSparseMask): the mask of the call.
        backend (str): ``"auto"`` or one of ``BACKENDS``. Default: ``"auto"``
        features (CallFeatures): what else the call asks for. Default: nothing

    Returns:
        str: one of ``BACKENDS``.

    Raises:
        UnsupportedCallError: the backend does not exist or does not support this call.
    """
    check_tensors_given(query=query)
    if backend == "auto":
        return _fastest(query, block_mask, features)
    if backend not in BACKENDS:
        raise UnsupportedCallError(
            f"block-sparse backend must be auto, {', '.join(BACKENDS)}; got {backend!r}"
        )
    if (obstacle := _OBSTACLES[backend](query, block_mask.block_size, features)) is not None:
        raise UnsupportedCallError(f"{obstacle}; use backend='auto'")
    return backend


def _fastest(query: torch.Tensor, block_mask: BlockSparseMask, features: CallFeatures) -> str:
    block_size = block_mask.block_size
    if query.device.type == "cuda":
        if _gluon_obstacle(query, block_size, features) is None and (
            features == INT8_FP8 or _prefers_gluon(query, block_size)
        ):
            return "gluon"
        if _triton_obstacle(query, block_size, features) is None:
            return "triton"
    if (obstacle := _plain_obstacle(query, block_size, features)) is not None:
        raise UnsupportedCallError(f"no backend supports this call: {obstacle}")
    return "torch"


def _plain_obstacle(query: torch.Tensor, block_size: tuple[int, int], features: CallFeatures) -> str | None:
    if features.causal and not features.exact:
        return "causal attention is supported only without quantization and skip_threshold"
    return None


def _triton_obstacle(query: torch.Tensor, block_size: tuple[int, int], features: CallFeatures) -> str | None:
    obstacle = triton_obstacle(query)
    if obstacle is not None or features.exact:
        return obstacle
    from kernels_common.block_sparse_quantized_triton import quantized_triton_obstacle

    return _plain_obstacle(query, block_size, features) or quantized_triton_obstacle(
        query, block_size, features.quantization, skips=features.skip
    )


def _gluon_obstacle(query: torch.Tensor, block_size: tuple[int, int], features: CallFeatures) -> str | None:
    if not _TRITON_INSTALLED:
        return "backend 'gluon' needs the triton package, which is not installed"
    if features == INT8_FP8:
        from kernels_common.block_sparse_quantized_gluon import quantized_gluon_obstacle

        return quantized_gluon_obstacle(query, block_size, query.dtype)
    if (extra := features._replace(sizes=False).extra) is not None:
        return f"backend 'gluon' does not support {extra} here"
    from kernels_common.block_sparse_gluon import gluon_obstacle

    return gluon_obstacle(query, block_size)


def _prefers_gluon(query: torch.Tensor, block_size: tuple[int, int]) -> bool:
    from kernels_common.block_sparse_gluon import prefers_gluon

    return prefers_gluon(query, block_size)


def _flex_obstacle(query: torch.Tensor, block_size: tuple[int, int], features: CallFeatures) -> str | None:
    if features.extra is not None:
        return f"backend 'flex' does not support {features.extra}"
    from kernels_common.block_sparse_flex import flex_obstacle

    return flex_obstacle(query, block_size)


def _flash4_obstacle(query: torch.Tensor, block_size: tuple[int, int], features: CallFeatures) -> str | None:
    if features.extra is not None:
        return f"backend 'flash4' does not support {features.extra}"
    from kernels_common.block_sparse_flash4 import flash4_obstacle

    return flash4_obstacle(query, block_size)


_OBSTACLES: dict[str, Callable[[torch.Tensor, tuple[int, int], CallFeatures], str | None]] = {
    "reference": _plain_obstacle,
    "torch": _plain_obstacle,
    "triton": _triton_obstacle,
    "gluon": _gluon_obstacle,
    "flex": _flex_obstacle,
    "flash4": _flash4_obstacle,
}
