"""The commit that figures are recorded with."""

import subprocess
import tarfile

import pytest

from harness import environment
from harness.environment import ARCHIVE_NOTE, SOURCE_ROOT, git_state


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "SOURCE_ROOT", tmp_path)
    return tmp_path


@pytest.mark.parametrize("text", [None, "node: $Format:%H$\n", "node: main\n", ""])
def test_a_copy_of_the_files_has_no_commit(elsewhere, text):
    if text is not None:
        (elsewhere / ARCHIVE_NOTE).write_text(text)
    assert git_state() == (None, False)


def test_an_archive_knows_its_commit(elsewhere):
    if not (SOURCE_ROOT / ".git").exists():
        pytest.skip("not a git checkout")

    def git(*arguments):
        command = ["git", "-C", str(SOURCE_ROOT), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()

    archive = elsewhere / "archive.tar"
    git("archive", "-o", str(archive), "HEAD", ARCHIVE_NOTE)
    with tarfile.open(archive) as files:
        files.extractall(elsewhere, filter="data")
    assert git_state() == (git("rev-parse", "HEAD")[0], False)
