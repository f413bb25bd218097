"""Where a run happens: device, package versions and the state of the source tree."""

import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from harness.errors import BenchError

PACKAGE = "sparse-attn-functions"
PACKAGES = ("torch", "diffusers", "transformers", "triton", "sageattention", PACKAGE)
SOURCE_ROOT = Path(__file__).resolve().parent.parent
ARCHIVE_NOTE = ".git_archival.txt"


def resolve_device(name: str) -> torch.device:
    """The device to run on.

    Args:
        name (str): ``"auto"`` (the GPU if there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    Raises:
        BenchError: not a device, or not present here.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BenchError(f"--device must be auto, cpu or cuda[:INDEX], got '{name}'") from None
    if device.type not in {"cpu", "cuda"}:
        raise BenchError(f"--device must be auto, cpu or cuda[:INDEX], got '{name}'")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise BenchError(f"--device {name}: torch {torch.__version__} finds no CUDA GPU on this machine")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise BenchError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA GPU(s)")
    return device


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor with the number of cores this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{_processor_name()} ({_usable_cores()} cores, {torch.get_num_threads()} threads)"


def package_versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that figures depend on; None if not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def provenance(device: torch.device, command: str) -> dict[str, Any]:
    """What stands beside every figure: device, package versions, state of the source tree and command."""
    commit, dirty = git_state()
    return {
        "device": device_name(device),
        "versions": package_versions(),
        "commit": commit,
        "dirty": dirty,
        "command": command,
    }


def git_state() -> tuple[str | None, bool]:
    """Commit of the source tree, and whether tracked files differ from it.

    Returns:
        tuple[str | None, bool]: (None, False) outside a git checkout, as for an installed wheel; an archive
        of a commit (``git archive``, a download from a forge) knows it.
    """
    if not (SOURCE_ROOT / ".git").exists():
        return _archived_commit(), False
    commit = _git("rev-parse", "HEAD")
    if not commit:
        return None, False
    return commit, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _archived_commit() -> str | None:
    """What git wrote into the archive; in a copy of the files it is still a placeholder."""
    try:
        text = (SOURCE_ROOT / ARCHIVE_NOTE).read_text(encoding="utf-8")
    except OSError:
        return None
    node = text.partition("node: ")[2].strip()
    return node if re.fullmatch("[0-9a-f]{40,64}", node) else None


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(SOURCE_ROOT), *arguments]
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return finished.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _processor_name() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _usable_cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
