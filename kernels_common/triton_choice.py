"""Where Triton forms run."""

import importlib.util

import torch

MAX_HEAD_DIM = 256
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


def runs_triton(tensor: torch.Tensor) -> bool:
    """Whether operators without a backend argument take their Triton form for ``tensor``.

    They do on CUDA devices where triton is installed, but not for fp64, which the kernels would round.
    """
    return _TRITON_INSTALLED and tensor.device.type == "cuda" and tensor.dtype != torch.float64


def triton_obstacle(query: torch.Tensor) -> str | None:
    """Why the attention kernels in Triton cannot take ``query``, or None."""
    if not _TRITON_INSTALLED:
        return "backend 'triton' needs the triton package, which is not installed"
    if query.dtype not in DTYPES:
        return f"backend 'triton' supports fp16, bf16 and fp32, got {query.dtype}"
    if query.shape[-1] > MAX_HEAD_DIM:
        return f"backend 'triton' supports head dimensions up to {MAX_HEAD_DIM}, got {query.shape[-1]}"
    return None
