"""Dense attention by packages that may be installed: FlashAttention 4, 3 and 2, and SageAttention.

A package is imported at its first call and must then give a small known answer, once for each device, dtype
and head dimension, before its results are used: a binary that does not fit the machine can fail to load,
fail to launch, or return memory that it never wrote.
"""

import functools
import importlib
import importlib.metadata
from collections.abc import Callable
from typing import NamedTuple

import torch

from core.errors import UnsupportedCallError

KNOWN_ANSWER_TOKENS = 320  # whole 64-token tiles; the last 128-token tile is ragged
DTYPES = (torch.float16, torch.bfloat16)


class DensePackage(NamedTuple):
    """One attention function of another package.

    Args:
        module (str): what to import.
        function (str): name of the function in it.
        install (str): how to get it.
        head_dims (tuple[int, ...]): supported head dimensions.
        tolerance (float): largest relative error of the known answer.
        backward (bool): gradients flow.
    """

    module: str
    function: str
    install: str
    head_dims: tuple[int, ...]
    tolerance: float
    backward: bool


FLASH_HEAD_DIMS = tuple(range(8, 257, 8))
ROUNDING = 2.0**-8  # weights and output are each rounded once to bf16, by at most 2^-9
PACKAGES = {
    "flash4": DensePackage(
        "flash_attn.cute", "flash_attn_func", "pip install flash-attn-4", FLASH_HEAD_DIMS, ROUNDING, True
    ),
    "flash3": DensePackage(
        "flash_attn_interface",
        "flash_attn_func",
        "build the folder 'hopper' of the flash-attention sources",
        FLASH_HEAD_DIMS,
        ROUNDING,
        True,
    ),
    "flash2": DensePackage(
        "flash_attn", "flash_attn_func", "pip install flash-attn", FLASH_HEAD_DIMS, ROUNDING, True
    ),
    # INT8 scores, and weights in fp16 or e4m3 (4 significant bits).
    "sage": DensePackage(
        "sageattention", "sageattn", "pip install sageattention", (64, 96, 128), 0.045, False
    ),
}


def package_obstacle(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why package ``name`` cannot take such a call, or None.

    The first call for a device, dtype and head dimension imports the package, runs the known answer and
    synchronises with the device.

    Args:
        name (str): a key of ``PACKAGES``.
        query (Tensor): ``[B, Hq, Nq, D]``.
        key (Tensor): ``[B, Hkv, Nk, D]``.
        value (Tensor): ``[B, Hkv, Nk, D]``.
    """
    package = PACKAGES[name]
    gradients = torch.is_grad_enabled() and any(part.requires_grad for part in (query, key, value))
    checks = (
        (query.device.type == "cuda", f"needs a CUDA device, got {query.device}"),
        (query.dtype in DTYPES, f"supports fp16 and bf16, got {query.dtype}"),
        (query.shape[-1] in package.head_dims, f"does not support head dimension {query.shape[-1]}"),
        (package.backward or not gradients, "has no backward; call it under torch.no_grad()"),
    )
    if (reason := next((reason for passed, reason in checks if not passed), None)) is not None:
        return reason
    function = load_function(name)
    if isinstance(function, str):
        return function
    if name == "sage" and (reason := _sage_obstacle(query, key)) is not None:
        return reason
    return _known_answer_obstacle(name, function, query.device, query.dtype, query.shape[-1])


def package_attention(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> torch.Tensor:
    """Dense attention by package ``name``; arguments as in `core.dense.attention`.

    Raises:
        UnsupportedCallError: `package_obstacle` names a reason.
    """
    if (obstacle := package_obstacle(name, query, key, value)) is not None:
        raise UnsupportedCallError(f"dense backend '{name}' {obstacle}; use backend='auto'")
    function = load_function(name)
    assert not isinstance(function, str)
    return _call(name, function, query, key, value, scale)


@functools.cache
def load_function(name: str) -> Callable[..., torch.Tensor] | str:
    """The function of package ``name``, or why it cannot be had."""
    package = PACKAGES[name]
    try:
        module = importlib.import_module(package.module)
    except ModuleNotFoundError as error:
        if error.name is not None and package.module.startswith(error.name):
            return f"needs the package {package.module}, which is not installed ({package.install})"
        return f"cannot be imported: {error}"
    except Exception as error:  # a broken binary raises whatever its loader raises
        return f"cannot be imported: {error}"
    # FlashAttention 4 alone leaves a package of FlashAttention 2's name, with nothing in it.
    missing = f"needs {package.function} of the package {package.module}, which has none ({package.install})"
    function: Callable[..., torch.Tensor] | str = getattr(module, package.function, missing)
    return function


@functools.cache
def _known_answer_obstacle(
    name: str, function: Callable[..., torch.Tensor], device: torch.device, dtype: torch.dtype, head_dim: int
) -> str | None:
    """Why the package's results on this device are not to be used, or None."""
    generator = torch.Generator().manual_seed(0)
    shape = (3, 1, 2, KNOWN_ANSWER_TOKENS, head_dim)
    query, key, value = torch.randn(shape, generator=generator).to(device, dtype)
    try:
        with torch.no_grad():
            output = _call(name, function, query, key, value, None).float()
        weights = torch.softmax(query.float() @ key.float().transpose(2, 3) * head_dim**-0.5, -1)
        expected = weights @ value.float()
        error = float((output - expected).norm() / expected.norm())
    except Exception as failure:  # launching may fail in any way on a device it was not built for
        return f"fails on {device}: {str(failure).splitlines()[0] if str(failure) else repr(failure)}"
    if error <= PACKAGES[name].tolerance:  # False for NaN
        return None
    return f"gives wrong results on {device}: relative error {error:.1e} of a known answer"


def _call(
    name: str,
    function: Callable[..., torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float | None,
) -> torch.Tensor:
    """Call ``function`` on ``[B, H, N, D]`` tensors."""
    query, key, value = (part if part.stride(-1) == 1 else part.contiguous() for part in (query, key, value))
    if name == "sage":
        # Version 1 subtracts the mean of the keys in place.
        key = key.clone() if _sage_version() == 1 else key
        return function(query, key, value, tensor_layout="HND", is_causal=False, sm_scale=scale)
    output = function(*(part.transpose(1, 2) for part in (query, key, value)), softmax_scale=scale)
    return (output[0] if isinstance(output, tuple) else output).transpose(1, 2)


def _sage_version() -> int:
    return int(importlib.metadata.version("sageattention").split(".")[0])


def _sage_obstacle(query: torch.Tensor, key: torch.Tensor) -> str | None:
    if _sage_version() == 1 and key.shape[2] % 64:
        return (
            f"of version 1 counts padding as keys unless their number is a multiple of 64, got {key.shape[2]}"
        )
    if _sage_version() > 1 and torch.cuda.current_stream(query.device) != torch.cuda.default_stream(
        query.device
    ):
        return "launches on the default stream, but another one is current"
    return None
