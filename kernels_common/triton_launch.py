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


@triton.jit
def _probe():
    pass


INTERPRETED = not isinstance(_probe, triton.JITFunction)


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
