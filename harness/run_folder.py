"""RunFolder: the files of one run, its lock, its settings and the space it needs."""

import contextlib
import errno
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from harness.errors import BenchError
from harness.jobs import Job
from harness.results import RESULTS_NAME, ResultRow, append_row, read_rows, read_run, recover, write_json

SPACE_MARGIN_BYTES = 64 * 2**20
FIXED = ("model", "size", "steps", "guidance_scale", "dtype", "device", "versions", "commit")
"""Settings that all rows of one folder share; more strategies, prompts and seeds may be added."""


class RunFolder:
    """One output folder of the benchmark.

    Args:
        path (Path): made if it does not exist.

    Raises:
        BenchError: it cannot be made or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.results = path / RESULTS_NAME
        try:
            for folder in (path / "videos", path / "frames"):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BenchError(f"cannot write to output folder {path}: {error.strerror}") from None

    def locked(self) -> contextlib.AbstractContextManager[None]:
        """Hold the folder for this process; the system lets go of it however the process ends.

        Raises:
            BenchError: another benchmark writes to this folder.
        """
        return locked(self.path / ".lock", f"another benchmark is running in {self.path}")

    def open(self, run: dict[str, Any], repair: bool) -> list[str]:
        """Prepare the folder for (further) rows and write ``run.json``.

        Args:
            run (dict): settings and environment of this call.
            repair (bool): move broken result lines aside instead of refusing.

        Returns:
            list[str]: remarks on what was repaired.

        Raises:
            BenchError: a results line is broken, or the folder holds results of other settings.
        """
        remarks = recover(self.results, repair)
        rows = read_rows(self.results)
        for row in rows:
            self._refuse_mixture(row.to_dict(), run)
        if rows and (self.path / "run.json").exists():
            run = run | {"created_at": read_run(self.path).get("created_at", run["created_at"])}
        write_json(self.path / "run.json", run)
        for partial in (*self.path.glob("videos/.*.partial"), *self.path.glob("frames/.*.partial")):
            partial.unlink()
        return remarks

    def finished(self) -> dict[str, ResultRow]:
        """Rows of jobs that need not run again, by job id."""
        rows = (row for row in read_rows(self.results) if row.ok)
        return {row.job_id: row for row in rows if self._has_files(row)}

    def append(self, row: ResultRow) -> None:
        """Append a row.

        Raises:
            BenchError: it cannot be written.
        """
        try:
            append_row(self.results, row)
        except OSError as error:
            raise no_space(self.path, error) from error

    def video(self, job: Job) -> Path:
        """Where the job's MP4 belongs."""
        return self.path / "videos" / f"{job.job_id}.mp4"

    def frames(self, job: Job) -> Path:
        """Where the job's lossless video belongs."""
        return self.path / "frames" / f"{job.job_id}.mkv"

    def check_space(self, size: dict[str, int]) -> None:
        """Make sure that one more job's files fit.

        Args:
            size (dict): height, width and num_frames of the video.

        Raises:
            BenchError: they may not.
        """
        # Noise does not compress: both files together can reach twice the raw pixels.
        raw = size["height"] * size["width"] * size["num_frames"] * 3
        needed = 2 * raw + SPACE_MARGIN_BYTES
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise BenchError(
                f"no disk space: {self.path} has {free / 1e6:.0f} MB free, the next job needs up to "
                f"{needed / 1e6:.0f} MB; free some and start again, finished jobs are kept"
            )

    def _has_files(self, row: ResultRow) -> bool:
        return all(name and (self.path / name).is_file() for name in (row.video, row.frames))

    def _refuse_mixture(self, row: dict[str, Any], run: dict[str, Any]) -> None:
        provider = run.get("providers", {}).get(row["label"], row["provider"])
        if row["provider"] and provider != row["provider"]:
            raise BenchError(
                f"{self.path} holds results of '{row['label']}' from {row['provider']}, installed is "
                f"{provider}; choose another --output, or move that folder away"
            )
        for name in FIXED:
            if row[name] != run[name]:
                raise BenchError(
                    f"{self.path} holds results with {_difference(name, row[name], run[name])}; "
                    "choose another --output, or move that folder away"
                )


@contextlib.contextmanager
def locked(path: Path, reason: str) -> Iterator[None]:
    """Hold a lock file for this process; the system lets go of it however the process ends.

    Args:
        path (Path): the lock file, made if it does not exist.
        reason (str): why the caller cannot have it, if another process holds it.

    Raises:
        BenchError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows has no such lock; two calls for one output are then the user's to avoid
        yield
        return
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise BenchError(f"{reason}; wait for it or choose another --output") from None
        yield


def check_writable(*paths: Path | None) -> None:
    """See to it, before anything is measured, that files can be written; their folders are made.

    Args:
        *paths (Path, Optional): the files; None is none.

    Raises:
        BenchError: one of them cannot be written.
    """
    for path in paths:
        if path is None:
            continue
        if not path.name:
            raise BenchError(f"cannot write to '{path}': name a file")
        trial = path.with_name(f".{path.name}.trial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            trial.touch()
            trial.unlink()
        except OSError as error:
            raise BenchError(f"cannot write to {path}: {error.strerror}") from None
        if path.is_dir():
            raise BenchError(f"cannot write to {path}: it is a folder")


def write_text(path: Path, text: str) -> None:
    """Write a file of results.

    Raises:
        BenchError: it cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise BenchError(f"cannot write to {path}: {error.strerror}") from None


def no_space(path: Path, error: OSError) -> BenchError:
    """The error for a file that could not be written."""
    if error.errno == errno.ENOSPC:
        return BenchError(f"no disk space left in {path}; free some and start again, finished jobs are kept")
    return BenchError(f"cannot write to {path}: {error}")


def utc_now() -> str:
    """The time in UTC, ISO 8601 with seconds."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _difference(name: str, before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in {**before, **now} if before.get(key) != now.get(key))
        name, before, now = f"{name}.{key}", before.get(key), now.get(key)
    return f"{name} {before}, this run has {now}"
