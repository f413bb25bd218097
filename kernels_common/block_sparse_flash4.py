"""Block-sparse attention by the package flash-attn-4 (FlashAttention 4 in CuTe DSL) on Hopper GPUs."""

import torch

from core.dense_packages import DTYPES, load_function
from core.errors import UnsupportedCallError

HEAD_DIMS = (64, 128)
KEY_BLOCKS = (64, 128)


def flash4_obstacle(query: torch.Tensor, block_size: tuple[int, int]) -> str | None:
    """Why :func:`block_sparse_attention_flash4` cannot take such a call, or None."""
    if query.device.type != "cuda":
        return f"backend 'flash4' needs a CUDA device, got {query.device}"
    capability = torch.cuda.get_device_capability(query.device)
    function = load_function("flash4")
    checks = (
        (capability == (9, 0), f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"),
        (query.dtype in DTYPES, f"supports fp16 and bf16, got {query.dtype}"),
        (query.shape[-1] in HEAD_DIMS, f"supports head dimensions 64 and 128, got {query.shape[-1]}"),
        (
            block_size[0] % 64 == 0 and block_size[1] in KEY_BLOCKS,
            f"supports mask blocks of (a multiple of 64) x (64 or 128) tokens, got {tuple(block_size)}",
        ),
        (not isinstance(function, str), function),
    )
    return next((f"backend 'flash4' {message}" for passed, message in checks if not passed), None)


def block_sparse_attention_flash4(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    key_lengths: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Call the package; arguments as in :func:`kernels_common.block_sparse_attention`.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32.

    Raises:
        UnsupportedCallError: :func:`flash4_obstacle` names a reason, or key_lengths or bias are given.
    """
    if (obstacle := flash4_obstacle(query, block_size)) is not None:
        raise UnsupportedCallError(obstacle)
    if key_lengths is not None or bias is not None:
        raise UnsupportedCallError("backend 'flash4' supports neither key_lengths nor bias; use 'auto'")
    target = torch.empty_like(query)
    if query.numel() == 0 or key.numel() == 0 or indices.numel() == 0:
        return target.zero_(), query.new_full(query.shape[:3], float("-inf"), dtype=torch.float32)
    from flash_attn.cute import flash_attn_func
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch

    # All listed blocks are full ones; the partial lists, which would ask for a mask function, stay empty.
    blocks = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(counts),
        mask_block_idx=indices,
        full_block_cnt=counts,
        full_block_idx=indices,
        block_size=tuple(block_size),
    )
    tensors = (part.transpose(1, 2) for part in (query, key, value))
    output, lse = flash_attn_func(
        *tensors, softmax_scale=scale, pack_gqa=False, block_sparse_tensors=blocks, return_lse=True
    )
    output = output.transpose(1, 2)
    return (output if output.stride() == target.stride() else target.copy_(output)), lse
