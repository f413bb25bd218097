"""The precision of a call's operands."""

import torch

from kernels_common.triton_choice import triton_obstacle

FP8_CAPABILITY = (8, 9)
HALF = (torch.float16, torch.bfloat16)
LEAST_HEAD_DIM = 128


def resolve_quantization(quantization: str, query: torch.Tensor, backend: str, *, causal: bool) -> str:
    """Precision that ``"auto"`` stands for in a call; other names are returned as they are.

    ``"int8_fp8"`` for bf16 and fp16 tensors of at least 128 dimensions (below, quantisation costs what it
    saves) on CUDA devices of capability 8.9 and above, unless a form is asked for that lacks it. Causal
    calls and those with gradients are computed as given: no form has both.

    Args:
        quantization (str): ``"auto"`` or a value of `block_sparse_attention`.
        query (Tensor): ``[B, Hq, Nq, D]``.
        backend (str): asked-for form of the block-sparse operator.
        causal (bool): no query sees a later key.

    Returns:
        str: ``"none"``, ``"int8_fp8"`` or ``"int8_fp16"``.
    """
    if quantization != "auto":
        return quantization
    able = (
        query.device.type == "cuda"
        and query.dtype in HALF
        and query.shape[-1] >= LEAST_HEAD_DIM
        and backend in ("auto", "triton")
        and not causal
        and not (torch.is_grad_enabled() and query.requires_grad)
        and triton_obstacle(query) is None
        and torch.cuda.get_device_capability(query.device) >= FP8_CAPABILITY
    )
    return "int8_fp8" if able else "none"
