"""Options, inputs and the oracle of the microbenchmarks.

    pytest -o addopts= tests/benchmark --shape 1x4x16x17x12x20x64 --spec radial:block_size=64

A shape is batch x heads x text tokens x frames x rows x columns x head dimension.
"""

import functools
import re
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from core import AttentionContext, BlockSparseMask, TokenLayout
from harness.environment import device_name, git_state, resolve_device
from harness.errors import BenchError
from harness.jobs import resolve_specs
from harness.structured_inputs import structured_query_key

DEMO_SHAPE = "1x4x16x17x12x20x64"
COGVIDEOX_2B_SHAPE = "2x30x226x13x30x45x64"  # both halves of classifier-free guidance
TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
PRESETS = {DEMO_SHAPE: ("demo",), COGVIDEOX_2B_SHAPE: ("cogvideox-2b", "cogvideox")}
LAYERS = {DEMO_SHAPE: 8}  # of the model that a preset of the shape is for; elsewhere CogVideoX-2b's 30
CHECKED_ROWS = 256
CALLS_IN_A_ROW = {"cpu": 1, "cuda": 5}  # queued without waiting, as a model does
RANDOM, STRUCTURED = "random", "structured"


def pytest_addoption(parser):
    group = parser.getgroup("microbenchmarks")
    shapes = f"repeatable; default: {DEMO_SHAPE} on CPU, {COGVIDEOX_2B_SHAPE} on CUDA"
    group.addoption("--shape", action="append", help=shapes)
    specs = (
        "strategy spec, repeatable; default: all of the device. A bare name takes the preset of that shape"
    )
    group.addoption("--spec", action="append", help=specs)
    group.addoption("--bench-device", default="auto", help="auto, cpu or cuda[:INDEX]")
    group.addoption("--inputs", choices=[RANDOM, STRUCTURED], default=RANDOM, help="queries and keys")
    group.addoption("--gradients", action="store_true", help="strategies: forward and backward pass")
    dtypes = ["float32", "bfloat16", "float16"]
    group.addoption("--bench-dtype", choices=dtypes, help="default: float32 on CPU, bfloat16 on CUDA")


def pytest_collection_modifyitems(config, items):
    wanted = config.getoption("--gradients")
    left = [item for item in items if item.originalname.endswith("_gradients") != wanted]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


@dataclass(frozen=True)
class Call:
    """One attention call: random tensors ``[B, H, S, D]``, at a layer and step past any dense warm-up."""

    name: str
    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    context: AttentionContext
    inputs: str

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.query.dtype]

    @property
    def facts(self) -> dict[str, Any]:
        """What every benchmark keeps in ``extra_info``."""
        return {
            "shape": self.name,
            "tokens": self.query.shape[2],
            "inputs": self.inputs,
            "dtype": str(self.query.dtype).removeprefix("torch."),
            "device": device_name(self.query.device),
            "torch": torch.__version__,
            "commit": git_state()[0],
        }


def sizes(name: str) -> list[int]:
    """The seven numbers of a shape; only the text may be empty."""
    if not re.fullmatch(r"([1-9]\d*x){2}\d+(x[1-9]\d*){4}", name):
        raise pytest.UsageError(f"--shape must be seven numbers such as {DEMO_SHAPE}, got '{name}'")
    return [int(part) for part in name.split("x")]


@functools.lru_cache(maxsize=1)  # one shape at a time: a long video's tensors fill gigabytes
def make_call(name: str, inputs: str, device: torch.device, dtype: torch.dtype) -> Call:
    batch, heads, text, frames, rows, columns, head_dim = sizes(name)
    layout = TokenLayout(text_length=text, frames=frames, height=rows, width=columns)
    size = (batch, heads, layout.sequence_length, head_dim)
    generator = torch.Generator(device).manual_seed(0)
    value, query, key = (torch.randn(size, generator=generator, device=device, dtype=dtype) for _ in range(3))
    if inputs == STRUCTURED:
        query, key = structured_query_key(layout, batch, heads, head_dim, generator, dtype)
    layers = LAYERS.get(name, 30)
    last = {"layer_index": layers - 1, "num_layers": layers}
    last |= {"step_index": 49, "num_steps": 50, "timestep": 1.0}
    context = AttentionContext(layout, **last)
    return Call(name, query, key, value, context, inputs)


def pytest_generate_tests(metafunc):
    config = metafunc.config
    try:
        device = resolve_device(config.getoption("--bench-device"))
        on_gpu = device.type == "cuda"
        names = config.getoption("--shape") or [COGVIDEOX_2B_SHAPE if on_gpu else DEMO_SHAPE]
        for name in names:
            sizes(name)
        if "call" in metafunc.fixturenames:
            dtype = config.getoption("--bench-dtype") or ("bfloat16" if on_gpu else "float32")
            metafunc.parametrize("call", names, ids=str, indirect=True)
            metafunc.config.stash[SETTING] = (config.getoption("--inputs"), device, getattr(torch, dtype))
        if "spec" in metafunc.fixturenames:
            presets = PRESETS.get(names[0], ()) if len(names) == 1 else ()
            specs, _ = resolve_specs(config.getoption("--spec"), presets, device.type)
            metafunc.parametrize("spec", specs, ids=lambda spec: spec.label)
    except BenchError as error:
        raise pytest.UsageError(str(error)) from None


SETTING = pytest.StashKey[tuple[str, torch.device, torch.dtype]]()


@pytest.fixture
def call(request):
    return make_call(request.param, *request.config.stash[SETTING])


@pytest.fixture
def calls_in_a_row(call):
    return CALLS_IN_A_ROW[call.query.device.type]


@pytest.fixture
def timed(benchmark):
    """Benchmark a function of a call's tensors; on a GPU every round ends with a synchronisation.

    The function makes ``calls`` calls, or one that is repeated as often; the number is kept for the tables.
    """

    def run(function, call, group, calls=1, repeated=False, **facts):
        benchmark.group = f"{group} {call.name}"
        benchmark.extra_info.update(call.facts | facts | {"calls": calls})
        device = call.query.device

        def synchronised():
            for _ in range(calls if repeated else 1):
                function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)

        synchronised()
        benchmark(synchronised)

    return run


@pytest.fixture
def error_of():
    """Largest difference to float64 softmax attention, over one head and some hundred queries."""

    def measure(call: Call, output: torch.Tensor, mask: BlockSparseMask | None = None, order=None) -> float:
        query, key, value, output = (part[-1, -1] for part in (call.query, call.key, call.value, output))
        if order is not None:
            query, key, value, output = (part[order] for part in (query, key, value, output))
        length = query.shape[0]
        rows = torch.linspace(0, length - 1, min(CHECKED_ROWS, length), device=query.device).long()
        scores = query[rows].double() @ key.double().T / query.shape[1] ** 0.5
        if mask is not None:
            scores = scores.masked_fill(~_kept_keys(mask, rows), float("-inf"))
        expected = torch.nan_to_num(scores.softmax(-1)) @ value.double()  # a row without keys gives 0
        return float((output[rows].double() - expected).abs().max())

    return measure


def _kept_keys(mask: BlockSparseMask, rows: torch.Tensor) -> torch.Tensor:
    """Keys that the last batch entry and head keep for these queries, ``[rows, Nk]`` bool."""
    blocks = mask.to_blocks()[-1, -1]
    kept = blocks[rows // mask.block_size[0]]
    return kept.repeat_interleave(mask.block_size[1], -1)[:, : mask.key_length]
