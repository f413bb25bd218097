"""Compile the Gluon kernels for compute capability 9.0 and print their names; needs no GPU.

Run by test_compile_for_hopper.py in a process of its own: Triton's interpreter must be off.
"""

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource

from kernels_common import block_sparse_gluon_64, block_sparse_gluon_128
from kernels_common.block_sparse_quantized_gluon import STAGES
from kernels_common.block_sparse_quantized_sm90 import quantized_fwd_kernel_sm90


def source(dtype, box, swizzle, bits):
    layout = gl.NVMMASharedLayout(swizzle_byte_width=swizzle, element_bitwidth=bits, rank=4)
    return f"tensordesc<{dtype}[1, 1, {box[0]}, {box[1]}],{layout!r}>"


def build(kernel, constants, types):
    names = kernel.arg_names
    types = {"scale_log2": "fp32", "lse_ptr": "*fp32"} | types
    signature = {
        name: "constexpr"
        if name in constants
        else types.get(name, "*i32" if name.endswith("_ptr") else "i32")
        for name in names
    }
    attributes = {
        (place,): [["tt.divisibility", 16]] for place, name in enumerate(names) if name.endswith("_ptr")
    }
    compiled = triton.compile(
        GluonASTSource(kernel, signature, constants, attributes),
        target=GPUTarget("cuda", 90, 32),
        options={"num_warps": 4},
    )
    assert compiled.metadata.shared <= 227 * 1024
    print(kernel.__name__, constants, flush=True)


def sixteen_bits(kernel, constants, box):
    """A kernel in bf16, without sizes of keys and with them; key tiles in boxes of ``[keys, columns]``."""
    types = dict.fromkeys(("query_source", "output"), source("bf16", (64, constants["D"]), 128, 16))
    types |= dict.fromkeys(("key_source", "value_source"), source("bf16", box, 128, 16))
    for sizes in (False, True):
        size_source = source("fp32", (1, box[0]), 0, 32) if sizes else source("bf16", box, 128, 16)
        build(kernel, constants | {"SIZES": sizes}, types | {"sizes_source": size_source})


wide = block_sparse_gluon_128
for mask_n, box in ((128, (128, 128)), (64, (64, 64))):
    sixteen_bits(
        wide.block_sparse_fwd_kernel_sm90,
        {"D": 128, "N": 128, "MASK_N": mask_n, "STAGES": wide.STAGES, "Q_STAGES": wide.QUERY_STAGES},
        box,
    )
narrow = block_sparse_gluon_64
sixteen_bits(
    narrow.block_sparse_fwd_kernel_sm90_64,
    {
        "D": 64,
        "N": narrow.TILE_N,
        "MASK_N": 128,
        "STAGES": narrow.STAGES,
        "Q_STAGES": narrow.QUERY_STAGES,
        "C_REGISTERS": narrow.CONSUMER_REGISTERS,
        "P_REGISTERS": narrow.PRODUCER_REGISTERS,
    },
    (narrow.TILE_N, 64),
)
for head_dim, stages in STAGES.items():
    build(
        quantized_fwd_kernel_sm90,
        {"D": head_dim, "MASK_N": 128, "STAGES": stages},
        {
            **dict.fromkeys(("query_source", "key_source"), source("i8", (64, head_dim), head_dim, 8)),
            "value_source": source("fp8e4nv", (64, 64), 64, 8),
            "output": source("bf16", (64, 64), 128, 16),
            **dict.fromkeys(("query_scale_ptr", "key_scale_ptr", "value_scale_ptr"), "*fp32"),
        },
    )
