"""Block-sparse attention for Hopper in Gluon, one kernel for each head dimension.

How they work is told in :mod:`kernels_common.block_sparse_gluon_64` and ``block_sparse_gluon_128``.
"""

from types import ModuleType

import torch
import triton
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from core.errors import UnsupportedCallError
from kernels_common import block_sparse_gluon_64 as head_dim_64
from kernels_common import block_sparse_gluon_128 as head_dim_128
from kernels_common.block_sparse_gluon_sizes import sized_values
from kernels_common.triton_launch import LOG2_E, aligned, list_strides

BLOCK_SIZES = ((128, 128), (128, 64))
DTYPES = (torch.float16, torch.bfloat16)
HEAD_DIMS = (64, 128)


def gluon_obstacle(
    query: torch.Tensor,
    block_size: tuple[int, int],
) -> str | None:
    """Why :func:`block_sparse_attention_gluon` cannot take such a call, or None."""
    if query.device.type != "cuda":
        return f"backend 'gluon' needs a CUDA device, got {query.device}"
    properties = torch.cuda.get_device_properties(query.device)
    capability = (properties.major, properties.minor)
    checks = (
        (capability == (9, 0), f"needs compute capability 9.0, got {capability[0]}.{capability[1]}"),
        (query.dtype in DTYPES, f"supports fp16 and bf16, got {query.dtype}"),
        (query.shape[-1] in HEAD_DIMS, f"supports head dimensions 64 and 128, got {query.shape[-1]}"),
        (
            tuple(block_size) in BLOCK_SIZES,
            f"supports mask blocks of 128 x 128 and 128 x 64, got {tuple(block_size)}",
        ),
    )
    return next((f"backend 'gluon' {message}" for passed, message in checks if not passed), None)


def prefers_gluon(query: torch.Tensor, block_size: tuple[int, int]) -> bool:
    """Whether the kernels here take such a call: then they are faster than the Triton one.

    A key tile read once per 128 query rows feeds the matrix products, and the softmax of one warpgroup runs
    behind the products of another.
    """
    return gluon_obstacle(query, block_size) is None


def _boxes(tensor: torch.Tensor, rows: int, columns: int, swizzle: int = 128) -> TensorDescriptor:
    """Boxes of one head; strides of single-entry dimensions are arbitrary and are made valid."""
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    strides = [stride if size > 1 else tensor.shape[3] for size, stride in pairs]
    bits = 8 * tensor.element_size()
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=4)
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, rows, columns], layout)


def block_sparse_attention_gluon(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    counts: torch.Tensor,
    indices: torch.Tensor,
    block_size: tuple[int, int],
    *,
    scale: float,
    key_sizes: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the kernel; arguments as in :func:`kernels_common.block_sparse_attention`.

    Returns:
        tuple[Tensor, Tensor]: output ``[B, Hq, Nq, D]`` in the dtype and memory order of ``query``, and
        the natural log-sum-exp ``[B, Hq, Nq]`` fp32.

    Raises:
        UnsupportedCallError: :func:`gluon_obstacle` names a reason.
    """
    if (obstacle := gluon_obstacle(query, block_size)) is not None:
        raise UnsupportedCallError(obstacle)
    batch, heads, queries, head_dim = query.shape
    output = torch.empty_like(query)
    lse = torch.empty(batch, heads, queries, dtype=torch.float32, device=query.device)
    if query.numel() == 0 or key.numel() == 0 or indices.numel() == 0:
        return output.zero_(), lse.fill_(float("-inf"))
    sized = None if key_sizes is None else sized_values(value, key_sizes)
    target = output if output.stride(3) == 1 else output.new_empty(output.shape)
    query, key, value = (aligned(part) for part in (query, key, sized.value if sized else value))
    counts, indices = (part if part.stride(-1) == 1 else part.contiguous() for part in (counts, indices))
    row_tiles = triton.cdiv(queries, block_size[0])
    items = batch * heads * row_tiles
    processors = torch.cuda.get_device_properties(query.device).multi_processor_count
    module: ModuleType
    if head_dim == 64:
        module, kernel, teams = head_dim_64, head_dim_64.block_sparse_fwd_kernel_sm90_64, head_dim_64.TEAMS
        options = {
            "C_REGISTERS": head_dim_64.CONSUMER_REGISTERS, "P_REGISTERS": head_dim_64.PRODUCER_REGISTERS
        }  # fmt: skip
    else:
        module, kernel, teams, options = head_dim_128, head_dim_128.block_sparse_fwd_kernel_sm90, 1, {}
    tile_n = module.TILE_N
    box = (tile_n, head_dim) if block_size[1] >= tile_n else (64, 64)
    # Without sizes the kernels do not read them.
    size_boxes = _boxes(value, *box) if sized is None else _boxes(sized.sizes, 1, box[0], swizzle=0)
    sized_blocks = 0 if key_sizes is None else triton.cdiv(key_sizes.shape[2], block_size[1])
    with torch.cuda.device_of(query):
        counter = torch.zeros(1, dtype=torch.int32, device=query.device)
        kernel[(min(triton.cdiv(items, teams), processors),)](
            _boxes(query, 64, head_dim), _boxes(key, *box), _boxes(value, *box), size_boxes,
            _boxes(target, 64, head_dim), lse, counts, indices, counter, *list_strides(counts)[:2],
            *list_strides(indices)[:3], items, row_tiles, heads, heads // key.shape[1],
            queries, key.shape[2], triton.cdiv(sized_blocks * block_size[1], tile_n), scale * LOG2_E.value,
            D=head_dim, N=tile_n, STAGES=module.STAGES, Q_STAGES=module.QUERY_STAGES, MASK_N=block_size[1],
            SIZES=sized is not None, **options, num_warps=4,
        )  # fmt: skip
    if sized is not None and sized.log_divisor is not None:
        lse += sized.log_divisor.repeat_interleave(heads // key.shape[1], 1)[..., None]
    return (output if target is output else output.copy_(target)), lse
