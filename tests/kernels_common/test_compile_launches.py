"""What would be launched on GPUs that are not here compiles, fits into them and reads whole vectors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs triton")

SCRIPT = Path(__file__).with_name("compile_launches.py")
# RTX 40 and L40, RTX 50: without and with tile copies, the GPUs with the least shared memory for
# a program (CUDA C++ Programming Guide, table of technical specifications).
CAPABILITIES = (89, 120)
SHARED_BYTES = 99 * 1024


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_compile_and_fit(capability, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    search = os.pathsep.join([str(SCRIPT.parents[2]), *filter(None, [environment.get("PYTHONPATH")])])
    run = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env=environment | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": search},
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    kernels = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(kernels) > 60
    for one in kernels:
        assert one["shared_bytes"] <= SHARED_BYTES, one
        assert one["narrow_loads"] == 0, one
    copied = "tile_copies" if capability >= 90 else "asynchronous_copies"
    loops = [one for one in kernels if one["kernel"].endswith(("_fwd_kernel", "bwd_query_kernel"))]
    assert loops and all(one[copied] for one in loops if "bfloat16" in one["case"])
