"""Block-sparse attention by torch's FlexAttention: compiled on CUDA devices, its eager form on CPUs.

The eager form scores all tokens and reads no lists: it gets the mask as a function, and is for small inputs.
"""

import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention

from core.block_mask import BlockSparseMask
from core.errors import UnsupportedCallError

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
COMPILED_VARIANTS = 64  # block sizes x head dimensions x dtypes of one process; torch's own limit is 8


def flex_obstacle(query: torch.Tensor, block_size: tuple[int, int]) -> str | None:
    """Why :func:`block_sparse_attention_flex` cannot take such a call, or None."""
    checks = (
        (query.device.type in ("cuda", "cpu"), f"needs a CUDA device or a CPU, got {query.device}"),
        (query.dtype in DTYPES, f"supports fp16, bf16 and fp32, got {query.dtype}"),
        (query.shape[-1] in (16, 32, 64, 128, 256), f"does not support head dimension {query.shape[-1]}"),
        (
            all(size % 64 == 0 for size in block_size),
            f"supports mask blocks of multiples of 64 tokens, got {tuple(block_size)}",
        ),
    )
    return next((f"backend 'flex' {message}" for passed, message in checks if not passed), None)


@functools.cache
def _compiled() -> Callable[..., Any]:
    # With fullgraph, running out of variants is an error and not the eager form, which would read no lists.
    return torch.compile(flex_attention, fullgraph=True)


def _attend_compiled(query, key, value, block_mask: BlockSparseMask, **options: Any) -> Any:
    tiles = {
        "BLOCK_M": math.gcd(128, block_mask.block_size[0]),
        "BLOCK_N": math.gcd(64, block_mask.block_size[1]),
    }
    with torch._dynamo.config.patch(recompile_limit=COMPILED_VARIANTS):
        return _compiled()(
            query, key, value, block_mask=block_mask.to_flex(), kernel_options=tiles, **options
        )


def _attend_eager(query, key, value, block_mask: BlockSparseMask, **options: Any) -> Any:
    kept = block_mask.to_dense().expand(query.shape[0], query.shape[1], -1, -1)
    flex_mask = create_block_mask(
        lambda batch, head, row, column: kept[batch, head, row, column],
        query.shape[0],
        query.shape[1],
        query.shape[2],
        key.shape[2],
        device=str(query.device),
        BLOCK_SIZE=block_mask.block_size,
    )
    with warnings.catch_warnings():  # it advises to compile, which a CPU needs a C++ compiler for
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention(query, key, value, block_mask=flex_mask, **options)


def block_sparse_attention_flex(
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
    """Run FlexAttention; arguments as in :func:`kernels_common.block_sparse_attention`.

    It records no gradients: the operator around it has its own backward.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32.

    Raises:
        UnsupportedCallError: :func:`flex_obstacle` names a reason, or key_lengths or bias are given.
    """
    if (obstacle := flex_obstacle(query, block_size)) is not None:
        raise UnsupportedCallError(obstacle)
    if key_lengths is not None or bias is not None:
        raise UnsupportedCallError("backend 'flex' supports neither key_lengths nor bias; use 'auto'")
    block_mask = BlockSparseMask(counts, indices, block_size, query.shape[2], key.shape[2])
    attend = _attend_compiled if query.device.type == "cuda" else _attend_eager
    query, key, value = query.detach(), key.detach(), value.detach()  # CPUs refuse what requires a gradient
    options = {"scale": scale, "enable_gqa": query.shape[1] != key.shape[1]}
    output, aux = attend(query, key, value, block_mask, return_aux=AuxRequest(lse=True), **options)
    target = torch.empty_like(query)
    return (output if output.stride() == target.stride() else target.copy_(output)), aux.lse
