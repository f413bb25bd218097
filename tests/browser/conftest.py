"""Debian's Chromium for pytest-playwright, and galleries to open in it."""

import shutil
from pathlib import Path
from typing import Any

import pytest

from harness import gallery
from tests.browser.synthetic_run import LABELS, PROMPTS, write_run

FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
INSTALL = "no Chromium found: run `apt-get update && apt-get install -y chromium`, these tests need it"


@pytest.fixture(scope="session")
def browser_type_launch_args(browser_type_launch_args: dict[str, Any]) -> dict[str, Any]:
    """Playwright's own browser is not downloaded; the system's one plays H.264."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.fail(INSTALL)
    return browser_type_launch_args | {"executable_path": chromium, "args": list(FLAGS)}


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two strategies, two prompts."""
    return _build(tmp_path_factory.mktemp("few"), LABELS[:2], PROMPTS[:2])


@pytest.fixture(scope="session")
def usual(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine strategies beside dense, six prompts: all videos play at once."""
    return _build(tmp_path_factory.mktemp("usual"), LABELS, PROMPTS)


@pytest.fixture(scope="session")
def many(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """More videos than a browser has players for: they are loaded when near the view."""
    prompts = tuple(f"{PROMPTS[index % 6]}, take {index}" for index in range(22))
    return _build(tmp_path_factory.mktemp("many"), LABELS[:4], prompts)


def _build(folder: Path, labels: tuple[str, ...], prompts: tuple[str, ...]) -> Path:
    return gallery.build(write_run(folder / "run", labels, prompts), folder / "gallery")
