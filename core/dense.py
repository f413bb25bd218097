"""Exact dense attention by the fastest kernel that is present on the device."""

from numbers import Real
from typing import Any

import torch
import torch.nn.functional as F
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention, can_use_flash_attention
from torch.nn.attention import SDPBackend, sdpa_kernel

from core.argument_checks import check_alike, check_causal, check_tensors_given, shapes_of
from core.dense_packages import PACKAGES, package_attention, package_obstacle
from core.errors import LayoutError, ParameterError, UnsupportedCallError

TORCH_BACKENDS = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
BACKENDS = ("sdpa", *TORCH_BACKENDS, *PACKAGES)
# Fastest first on compute capability 9.0 at head dimensions 64 and 128 (docs/benchmarks). Packages are
# taken where they were measured; elsewhere the choice is among torch's own kernels.
HOPPER_PACKAGES = ("flash4", "flash3")
HOPPER_HEAD_DIMS = (64, 128)


def resolve_dense_backend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = False
) -> str:
    """Name of the backend that ``backend="auto"`` runs for these tensors.

    The order is fixed, never timed. On compute capability 9.0: FlashAttention 4, then 3, where the package
    is installed and gives a known answer (head dimensions 64 and 128, no gradients, not inside
    torch.compile), then cuDNN, then flash. Later devices: cuDNN, flash (torch's default there, the
    FlashAttention-2 kernel, is much slower). Earlier ones: flash, cuDNN. ``"sdpa"``, torch's own
    choice, is taken where none supports the call, and on every other device. The packages are not asked
    for causal attention.
    """
    if query.device.type != "cuda":
        return "sdpa"
    capability = torch.cuda.get_device_capability(query.device)
    packaged = capability == (9, 0) and query.shape[-1] in HOPPER_HEAD_DIMS and not causal
    if packaged and _is_plain_call(query, key, value):
        for name in HOPPER_PACKAGES:
            if package_obstacle(name, query, key, value) is None:
                return name
    order = ("cudnn", "flash") if capability >= (9, 0) else ("flash", "cudnn")
    return next((name for name in order if _torch_supports(name, query, key, value, causal)), "sdpa")


def _is_plain_call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> bool:
    gradients = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    return not gradients and not torch.compiler.is_compiling()


def _torch_supports(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool
) -> bool:
    """Whether torch's kernel ``name`` takes such a call on a CUDA device."""
    call = SDPAParams(query, key, value, None, 0.0, causal, query.shape[1] != key.shape[1])
    return can_use_cudnn_attention(call) if name == "cudnn" else can_use_flash_attention(call)


def _check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    check_tensors_given(query=query, key=key, value=value)
    if not query.dim() == key.dim() == value.dim() == 4:
        shapes = shapes_of(query=query, key=key, value=value)
        raise LayoutError(f"query, key and value must be [B, H, N, D]; got {shapes}")
    check_alike(query=query, key=key, value=value)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Dense softmax attention.

    Args:
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``; Hq is a multiple of Hkv.
        value (Tensor): ``[B, Hkv, Nk, D]``.
        scale (float, Optional): factor on the scores. Default: ``1 / sqrt(D)``
        causal (bool): no query sees a later key; Nq and Nk must be equal. Default: False
        backend (str): ``"auto"`` (see `resolve_dense_backend`); ``"sdpa"`` (exactly the call that
            diffusers makes); ``"cudnn"`` or ``"flash"`` of torch; ``"flash4"``, ``"flash3"`` or
            ``"flash2"``, the FlashAttention packages; ``"sage"``, SageAttention, whose 8-bit results
            are not exact. Default: ``"auto"``

    Returns:
        Tensor: ``[B, Hq, Nq, D]`` in the dtype of ``query``.

    Raises:
        LayoutError: query, key and value are no tensors ``[B, H, N, D]`` of one floating dtype and device.
        ParameterError: ``scale`` is no number, or ``causal`` no bool.
        UnsupportedCallError: ``backend`` is not one of these names or cannot take the call.
    """
    _check_tensors(query, key, value)
    if scale is not None and not isinstance(scale, Real):
        raise ParameterError(f"scale must be a number, got {scale!r}")
    check_causal(causal)
    if backend == "auto":
        backend = resolve_dense_backend(query, key, value, causal=causal)
    if backend not in BACKENDS:
        raise UnsupportedCallError(f"dense backend must be auto, {', '.join(BACKENDS)}; got {backend!r}")
    if causal and query.shape[2] != key.shape[2]:
        raise UnsupportedCallError(
            f"causal dense attention needs as many queries as keys, got {query.shape[2]} and {key.shape[2]}"
        )
    if causal and backend in PACKAGES:
        raise UnsupportedCallError(f"dense backend '{backend}' is not causal here; use backend='auto'")
    if backend in PACKAGES:
        return package_attention(backend, query, key, value, scale)
    options: dict[str, Any] = {
        "scale": scale,
        "is_causal": causal,
        "enable_gqa": query.shape[1] != key.shape[1],
    }
    if backend == "sdpa":
        return F.scaled_dot_product_attention(query, key, value, **options)
    if query.device.type != "cuda":
        raise UnsupportedCallError(
            f"dense backend '{backend}' needs a CUDA device, got {query.device}; use backend='auto'"
        )
    if not _torch_supports(backend, query, key, value, causal):
        raise UnsupportedCallError(
            f"dense backend '{backend}' does not support {query.dtype} with head dimension {query.shape[-1]} "
            f"and {query.shape[1]} query for {key.shape[1]} key heads on {query.device}; use backend='auto'"
        )
    with sdpa_kernel(TORCH_BACKENDS[backend]):
        return F.scaled_dot_product_attention(query, key, value, **options)
