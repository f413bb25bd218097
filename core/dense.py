"""Exact dense attention by the fastest kernel that torch has on the device."""

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.errors import UnsupportedCallError

BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}


def resolve_dense_backend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str:
    """Name of the backend that ``backend="auto"`` runs for these tensors.

    On CUDA devices of compute capability 9.0 and later cuDNN comes first (torch's default there, the
    FlashAttention-2 kernel, is much slower), elsewhere flash; ``"sdpa"``, torch's own
    choice, is taken where neither supports the call, and on every other device.
    """
    if query.device.type != "cuda":
        return "sdpa"
    grouped = query.shape[1] != key.shape[1]
    call = SDPAParams(query, key, value, None, 0.0, False, grouped)
    usable = {"cudnn": can_use_cudnn_attention(call), "flash": can_use_flash_attention(call)}
    hopper = torch.cuda.get_device_capability(query.device) >= (9, 0)
    order = ("cudnn", "flash") if hopper else ("flash", "cudnn")
    return next((name for name in order if usable[name]), "sdpa")


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    backend: str = "auto",
) -> torch.Tensor:
    """Dense softmax attention.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        scale (float, Optional): factor on the scores. Default: ``1 / sqrt(D)``
        backend (str): ``"auto"`` (see `resolve_dense_backend`), ``"sdpa"`` (exactly the call that
            diffusers makes), ``"cudnn"`` or ``"flash"``. Default: ``"auto"``

    Returns:
        Tensor: ``[B, Hq, Nq, D]`` in the dtype of ``query``.

    Raises:
        UnsupportedCallError: ``backend`` is not one of these names.
    """
    if backend == "auto":
        backend = resolve_dense_backend(query, key, value)
    grouped = query.shape[1] != key.shape[1]
    if backend == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
    if backend not in BACKENDS:
        raise UnsupportedCallError(f"dense backend must be auto, sdpa, cudnn or flash, got {backend!r}")
    with sdpa_kernel(BACKENDS[backend]):
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=grouped)
