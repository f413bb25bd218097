"""A stranger's package: built, installed into an environment of its own, listed, tested and benched."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = Path(__file__).parent / "example_plugin"


@pytest.fixture(scope="module")
def python(tmp_path_factory):
    """Python of a fresh environment that sees this one's packages and has the built wheel installed."""
    home = tmp_path_factory.mktemp("stranger")
    source = shutil.copytree(SOURCE, home / "source")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(home), str(source)]
    subprocess.run(build, check=True, capture_output=True)
    venv.create(home / "env", with_pip=True)
    python = home / "env" / "bin" / "python"
    site = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        check=True, capture_output=True, text=True,
    ).stdout.strip()  # fmt: skip
    # The heavy dependencies (torch, diffusers) come from here instead of a second download.
    shared = sysconfig.get_path("purelib")
    Path(site, "shared.pth").write_text(f"import site; site.addsitedir({shared!r})\n")
    (wheel,) = home.glob("*.whl")
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    return python


def run(python, *arguments, cwd):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [str(python), *map(str, arguments)]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def test_it_is_listed(python, tmp_path):
    listing = run(python, "-m", "harness.bench", "--list", cwd=tmp_path)
    (row,) = [line for line in listing.splitlines() if "random-blocks" in line and "available" in line]
    assert "sparse-attn-random-blocks" in row or "available" in row


def test_it_passes_the_conformance_suite(python, tmp_path):
    # From a copy: the conftest of this repository's own tests is not a stranger's.
    tests = shutil.copytree(SOURCE / "tests", tmp_path / "tests")
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", tests]
    summary = run(python, *command, cwd=tmp_path)
    assert " passed" in summary and "failed" not in summary


def test_it_is_benched(python, tmp_path):
    run(
        python, "-m", "harness.bench", "--model", "tiny-random", "--strategies", "dense",
        "random-blocks:keep_ratio=0.5", "--prompts", "1", "--steps", "2", "--output", "out", cwd=tmp_path,
    )  # fmt: skip
    rows = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    (row,) = [row for row in rows if row["strategy"] == "random-blocks"]
    assert row["status"] == "ok" and 0 < row["density"] < 1 and row["psnr_db"] is not None
