"""What the launchers of Triton and Gluon kernels share: constants, tiles, tensor descriptors and strides."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from core.errors import UnsupportedCallError

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
TMA_CAPABILITY = (9, 0)
# With 227 KiB of shared memory for a program and a tensor memory accelerator: data centre GPUs from H100 on.
LARGE_TILES_CAPABILITIES = ((9, 0), (10, 0), (10, 3))


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)


@triton.jit
def load_rows(source, strides, batch, head, tokens, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of some tokens (int64) of one head, ``[tokens, BLOCK_D]``; zeros where they are not ``inside``."""
    columns = tl.arange(0, BLOCK_D)[None, :]
    base = source + batch.to(tl.int64) * strides[0] + head.to(tl.int64) * strides[1]
    inside = inside[:, None]
    if HEAD_DIM != BLOCK_D:
        inside = inside & (columns < HEAD_DIM)
    return tl.load(base + tokens[:, None] * strides[2] + columns, mask=inside, other=0.0)


@triton.jit
def load_tile(
    source, strides, batch, head, start, length,
    ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, POINTERS: tl.constexpr,
):  # fmt: skip
    """Rows from ``start`` on of a head of a :func:`tile_source`, ``[ROWS, BLOCK_D]``; zeros past its end."""
    if POINTERS:
        rows = start + tl.arange(0, ROWS)
        tile = load_rows(source, strides, batch, head, rows.to(tl.int64), rows < length, HEAD_DIM, BLOCK_D)
    else:
        tile = source.load([batch, head, start, 0]).reshape(ROWS, BLOCK_D)
    return tile


class TileConfig(NamedTuple):
    """Kernel tile and launch parameters."""

    tile_m: int
    tile_n: int
    num_warps: int
    num_stages: int


def divide_tile(wanted: TileConfig, block_size: tuple[int, int]) -> TileConfig:
    """``wanted``, or the tile that divides the mask block, which has no work for more than four warps."""
    tile = (math.gcd(wanted.tile_m, block_size[0]), math.gcd(wanted.tile_n, block_size[1]))
    return wanted if tile == wanted[:2] else TileConfig(*tile, min(4, wanted.num_warps), wanted.num_stages)


def check_device(query: torch.Tensor) -> None:
    """Refuse tensors that Triton cannot run on here.

    Raises:
        UnsupportedCallError: no CUDA device, or bf16 in Triton's interpreter.
    """
    if query.device.type != "cuda" and not INTERPRETED:
        raise UnsupportedCallError(
            f"backend 'triton' needs a CUDA device (or TRITON_INTERPRET=1), got {query.device}; "
            "use backend='torch'"
        )
    if INTERPRETED and query.dtype == torch.bfloat16:
        raise UnsupportedCallError("Triton's interpreter computes bf16 wrongly; use fp32 or fp16 there")


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """``tensor``, or a copy, with 16-byte aligned rows: what the tensor memory accelerator can address."""
    per_16_bytes = 16 // tensor.element_size()
    steps = [stride for size, stride in zip(tensor.shape[:3], tensor.stride()[:3], strict=True) if size > 1]
    in_place = tensor.stride(3) == 1 and all(step > 0 and step % per_16_bytes == 0 for step in steps)
    if in_place and tensor.data_ptr() % 16 == 0:
        return tensor
    padded = F.pad(tensor, (0, -tensor.shape[3] % per_16_bytes)).contiguous()
    return padded[..., : tensor.shape[3]]


def descriptor(tensor: torch.Tensor, tile: int, block_d: int) -> TensorDescriptor:
    """Tiles of one head; strides of single-entry dimensions are arbitrary and are made valid."""
    pairs = zip(tensor.shape[:3], tensor.stride()[:3], strict=True)
    strides = [stride if size > 1 else block_d for size, stride in pairs]
    return TensorDescriptor(tensor, list(tensor.shape), [*strides, 1], [1, 1, tile, block_d])


def reads_pointers(tensor: torch.Tensor) -> bool:
    """Whether kernels read tiles through pointers: where there is no tensor memory accelerator.

    Triton turns descriptors into loads of single elements there, without knowing their alignment.
    """
    return tensor.device.type == "cuda" and torch.cuda.get_device_capability(tensor.device) < TMA_CAPABILITY


def holds_large_tiles(tensor: torch.Tensor) -> bool:
    """Whether the tiles that were measured on an H200 are for this device.

    They take up to 227 KiB of shared memory and leave the addresses of rows to the tensor memory accelerator.
    Other GPUs get tiles that fit into 99 KiB and the registers, as the compiler counts them.
    """
    on_cuda = tensor.device.type == "cuda"
    return not on_cuda or torch.cuda.get_device_capability(tensor.device) in LARGE_TILES_CAPABILITIES


def tile_source(
    tensor: torch.Tensor, rows: int, columns: int, pointers: bool
) -> tuple[torch.Tensor | TensorDescriptor, tuple[int, int, int]]:
    """What :func:`load_tile` reads from, and its strides: an :func:`aligned` tensor or its descriptor.

    Args:
        tensor (Tensor): ``[B, H, N, D]``, its last dimension contiguous.
        rows (int): rows of a tile.
        columns (int): columns of a tile, D padded to a power of two.
        pointers (bool): see :func:`reads_pointers`.
    """
    if pointers:
        batch, head, row, _ = tensor.stride()
        return tensor, (batch, head, row)
    return descriptor(tensor, rows, columns), (0, 0, 0)


def list_strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides with 0 in single-entry batch and head dimensions, which stand for all."""
    batch, head, *rest = tensor.stride()
    return (batch * (tensor.shape[0] > 1), head * (tensor.shape[1] > 1), *rest)


def bias_strides(bias: torch.Tensor | None) -> tuple[int, int]:
    """Batch and head strides of a bias, 0 where there is none or one entry stands for all."""
    if bias is None:
        return 0, 0
    batch, head, _ = list_strides(bias)
    return batch, head
