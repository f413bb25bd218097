"""Compile what the Triton launchers would launch on a GPU of some compute capability; needs no GPU.

Run by test_compile_launches.py in a process of its own, with the capability as its argument: Triton's
interpreter must be off. Launches are turned into compilations of the same arguments, so that types,
alignment and tiles are those of a real call. Prints one line of JSON for each kernel.
"""

import json
import re
import sys
from functools import partial
from importlib import import_module

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from core import BlockSparseMask, LevelMask, TokenLayout
from plugins.svg_smart.bands import band_patterns
from plugins.svg_smart.kernels import sampled_errors
from plugins.svg_smart.patterns import head_patterns
from plugins.tome.kernels import best_destinations_triton, most_similar_triton
from plugins.tome.mean_kernels import group_means_triton
from plugins.tome.partition import make_partition

CAPABILITY = int(sys.argv[1])
BLOCKS, LENGTH = (128, 128), 1000
launched = []


class Target:
    """Stands for the driver of a GPU that is not there."""

    def get_current_target(self):
        return GPUTarget("cuda", CAPABILITY, 32)

    def get_current_device(self):
        return 0

    def get_current_stream(self, device):
        return 0


def compile_only(kernel, *arguments, grid, warmup, **options):
    compiled = original_run(kernel, *arguments, grid=grid, warmup=True, **options)
    launched.append((kernel.fn.__name__, compiled))
    return compiled


def report(case):
    for name, compiled in launched:
        code = compiled.asm["ptx"]
        figures = {
            "case": case,
            "kernel": name,
            "shared_bytes": compiled.metadata.shared,
            "narrow_loads": len(re.findall(r"ld\.global\.b(8|16) ", code)),
            "asynchronous_copies": code.count("cp.async.cg"),
            "tile_copies": code.count("cp.async.bulk.tensor"),
        }
        print(json.dumps(figures), flush=True)
    launched.clear()


def operators(head_dim, dtype):
    """Every public launcher with attention operands of one head dimension and dtype."""
    query = torch.empty(1, 2, LENGTH, head_dim, dtype=dtype)
    lse = torch.empty(1, 2, LENGTH)
    mask = BlockSparseMask.full(BLOCKS, LENGTH, LENGTH, "cpu")
    levels = torch.ones(1, 1, 8, 8, dtype=torch.int8)
    pooled = LevelMask.from_levels(levels, BLOCKS, LENGTH, LENGTH)
    lists, pooled_lists = (mask.counts, mask.indices, BLOCKS), (pooled.counts, pooled.indices, BLOCKS)
    tokens, saved = (query, query, query), (query, None, query, query, query, query, lse)
    order = torch.randperm(LENGTH)
    forward = module("block_sparse_triton").block_sparse_attention_triton
    quantized = module("block_sparse_quantized_triton").block_sparse_attention_quantized_triton
    yield "forward", partial(forward, *tokens, *lists, scale=0.1)
    if CAPABILITY < 90:
        orders = {"query_order": order, "key_order": order}
        yield "forward, orders", partial(forward, *tokens, *lists, scale=0.1, **orders)
    backward = module("block_sparse_backward_triton").block_sparse_attention_backward_triton
    yield "backward", partial(backward, *saved, *lists, scale=0.1)
    attend_pooled = module("pooled_attention_triton").pooled_attention_triton
    yield "pooled", partial(attend_pooled, *tokens, *pooled_lists, scale=0.1)
    backward_pooled = module("pooled_attention_backward_triton").pooled_attention_backward_triton
    yield "pooled backward", partial(backward_pooled, *saved, *pooled_lists, scale=0.1)
    importance = module("block_importance_triton").pooled_softmax_triton
    yield "importance", partial(importance, query, query, (32, 32), 0.1, maximum=False)
    rows, numbers = torch.rand(1, 2, 8, 8), torch.ones(1, 8, dtype=torch.int32)
    yield "choice of blocks", partial(module("selection_triton").select_top_k_triton, rows, numbers, None)
    layout = TokenLayout(0, 2, 20, 25)
    partition = make_partition(layout, (1, 2, 2), seed=0, local=False)
    yield "matching", partial(best_destinations_triton, query, query, partition)
    yield "choice of sources", partial(most_similar_triton, torch.rand(1, 2, 900), 300)
    groups = torch.arange(LENGTH, dtype=torch.int32).expand(1, 2, -1)
    yield "means of groups", partial(group_means_triton, (query, query), groups, groups)
    patterns = head_patterns(band_patterns(layout, density=0.5, sink=False, block=128, keep="fraction"))
    yield "judged rows", partial(sampled_errors, *tokens, order[:32], patterns)
    for precision in ("int8_fp16", "int8_fp8") if CAPABILITY >= 89 else ("int8_fp16",):
        call = partial(quantized, *tokens, *lists, scale=0.1, quantization=precision)
        yield precision, call
        yield f"{precision}, skipping", partial(call, skip_threshold=torch.ones(2))


def module(name):
    """A module of kernels that takes CPU tensors for those of the GPU."""
    return pretend(import_module(f"kernels_common.{name}"))


def pretend(module):
    answers = {
        "check_device": None,
        "reads_pointers": CAPABILITY < 90,
        "holds_large_tiles": CAPABILITY == 90,
        "quantized_triton_obstacle": None,
    }
    for name in answers.keys() & vars(module).keys():
        setattr(module, name, lambda *_, answer=answers[name], **__: answer)
    return module


driver.set_active(Target())
original_run, JITFunction.run = JITFunction.run, compile_only
pretend(import_module("plugins.tome.kernels"))
for head_dim, dtype in ((64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32)):
    for name, launch in operators(head_dim, dtype):
        launch()
        report(f"{name}, D {head_dim}, {str(dtype).removeprefix('torch.')}")
