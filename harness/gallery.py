"""`python -m harness.gallery`: from the results of a run to a page, Markdown tables and the README's section.

The output folder keeps all it was made from (``run.json``, ``results.jsonl``, ``videos/``), so that the
page can be made again from it alone. Nothing in it depends on when or where it was generated.
"""

import filecmp
import json
import re
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import UnionType
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from harness import readme
from harness.command import make_parser, parse_options, run_command
from harness.errors import BenchError, ResultsError
from harness.page import describe_page
from harness.results import RESULTS_NAME, ResultRow, read_rows, read_run
from harness.small_models import TINY
from harness.tables import provenance_line, summarise, to_markdown

ROOT = Path(__file__).resolve().parents[1]
TEMPLATES = Path(__file__).parent / "templates"
PAGE_NAME, RUN_NAME, TABLES_NAME = "index.html", "run.json", "tables.md"
VIDEOS_NAME = "videos"
STAGING_NAME = ".staging"
RUN_TYPES: dict[str, type | UnionType] = {
    "model": str,
    "device": str,
    "size": dict,
    "steps": int,
    "guidance_scale": int | float,
    "dtype": str,
    "versions": dict,
    "commit": str | None,
    "dirty": bool,
    "command": str,
}
PLAIN_NAME = re.compile(r"[\w-]+")
SIZE_KEYS = {"height", "width", "num_frames"}


@dataclass(frozen=True)
class Run:
    """What a benchmark left behind: its folder, its ``run.json`` and its rows."""

    folder: Path
    settings: dict[str, Any]
    rows: list[ResultRow]


def build(run_dir: Path, output_dir: Path) -> Path:
    """Make or renew the gallery of one run. A second call with the same run changes no byte.

    Everything is prepared beside the old page and put in place by renaming, the page last: whoever
    opens the gallery in between, or after an interruption, sees a whole page. Videos of the previous
    results that the new ones do not use are removed; other files in the folder are left alone.

    Args:
        run_dir (Path): folder with ``run.json``, ``results.jsonl`` and ``videos/``.
        output_dir (Path): made if needed; may be ``run_dir`` itself.

    Returns:
        Path: the page, ``index.html``.

    Raises:
        BenchError: the run is incomplete or unreadable, or the folder cannot be written; the old page stands.
    """
    run = read_complete_run(run_dir)
    staging = output_dir / STAGING_NAME
    try:
        shutil.rmtree(staging, ignore_errors=True)
        (staging / VIDEOS_NAME).mkdir(parents=True)
        _stage(run, staging)
        stale = _files_listed(output_dir) - _files_listed(staging)
        _install(staging, output_dir)
        for name in sorted(stale):
            (output_dir / name).unlink(missing_ok=True)
    except OSError as error:
        raise BenchError(f"cannot write the gallery in {output_dir}: {error}") from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return output_dir / PAGE_NAME


def read_complete_run(run_dir: Path) -> Run:
    """Read a run and check that every file it names is there.

    Raises:
        BenchError: one line that names the file and what is wrong with it.
    """
    settings = read_run(run_dir)
    _check_settings(run_dir / RUN_NAME, settings)
    try:
        rows = read_rows(run_dir / RESULTS_NAME)
    except OSError as error:
        raise ResultsError(f"{run_dir / RESULTS_NAME} cannot be read: {error.strerror}") from None
    if not rows:
        raise ResultsError(f"{run_dir / RESULTS_NAME} has no result; run the benchmark first")
    for row in rows:
        _check_row(run_dir, row)
    return Run(run_dir, settings, rows)


def _check_settings(path: Path, settings: dict[str, Any]) -> None:
    for name, kind in RUN_TYPES.items():
        if not isinstance(settings.get(name), kind):
            raise ResultsError(f"{path}: {name!r} is missing or has the wrong type: {settings.get(name)!r}")
    if not settings["size"].keys() >= SIZE_KEYS:
        raise ResultsError(f"{path}: 'size' needs {', '.join(sorted(SIZE_KEYS))}, got {settings['size']!r}")


def _check_row(run_dir: Path, row: ResultRow) -> None:
    results = run_dir / RESULTS_NAME
    if not PLAIN_NAME.fullmatch(row.job_id):
        raise ResultsError(f"{results}: job id {row.job_id!r} is not a plain name")
    if not row.size.keys() >= SIZE_KEYS:
        raise ResultsError(f"{results}: 'size' of job {row.job_id} needs {', '.join(sorted(SIZE_KEYS))}")
    if not row.ok or row.video is None:
        return
    source = run_dir / row.video
    if not source.resolve().is_relative_to(run_dir.resolve()):
        raise ResultsError(f"{results}: video {row.video!r} lies outside the run folder")
    if not source.is_file():
        raise ResultsError(f"{source}, the video of job {row.job_id} ({row.label}), does not exist")
    with source.open("rb") as file:
        if file.read(8)[4:] != b"ftyp":
            raise ResultsError(f"{source}, the video of job {row.job_id} ({row.label}), is not an MP4 file")


def _stage(run: Run, staging: Path) -> None:
    """Write the whole gallery into an empty folder."""
    rows = [_copy_video(run, row, staging) for row in run.rows]
    lines = [json.dumps(row.to_dict(), ensure_ascii=False, separators=(",", ":")) for row in rows]
    (staging / RESULTS_NAME).write_text("\n".join(lines) + "\n", encoding="utf-8")
    shutil.copyfile(run.folder / RUN_NAME, staging / RUN_NAME)
    summaries = summarise(rows)
    table = to_markdown(summaries, provenance_line(run.settings, rows))
    (staging / TABLES_NAME).write_text(table, encoding="utf-8")
    (staging / PAGE_NAME).write_text(_render(run.settings, rows), encoding="utf-8")
    readme.write_strip(rows, staging, staging / readme.STRIP_NAME, run.settings.get("fps") or 8)


def _copy_video(run: Run, row: ResultRow, staging: Path) -> ResultRow:
    if not row.ok or row.video is None:
        return replace(row, video=None, frames=None)
    name = f"{VIDEOS_NAME}/{row.job_id}.mp4"
    shutil.copyfile(run.folder / row.video, staging / name)
    return replace(row, video=name, frames=None)


def _render(settings: dict[str, Any], rows: list[ResultRow]) -> str:
    loader = FileSystemLoader(TEMPLATES)
    jinja = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True)
    parts = {
        name: Markup((TEMPLATES / f"page.{kind}").read_text(encoding="utf-8"))
        for name, kind in (("style", "css"), ("script", "js"))
    }
    return jinja.get_template("page.html").render(page=describe_page(settings, rows), **parts)


def _files_listed(folder: Path) -> set[str]:
    """Relative names of the videos, and the strip made of them, that a gallery's own results name."""
    try:
        rows = read_rows(folder / RESULTS_NAME)
    except (ResultsError, OSError):
        return set()
    own = (row for row in rows if PLAIN_NAME.fullmatch(row.job_id))
    videos = {row.video for row in own if row.video == f"{VIDEOS_NAME}/{row.job_id}.mp4"}
    return videos | {readme.STRIP_NAME} if videos else set()


def _install(staging: Path, output_dir: Path) -> None:
    """Rename file by file: first what pages refer to, then the page, then the list of its videos."""
    last = [staging / PAGE_NAME, staging / RESULTS_NAME]
    (output_dir / VIDEOS_NAME).mkdir(exist_ok=True)
    files = sorted(path for path in staging.rglob("*") if path.is_file() and path not in last)
    for path in [*files, *last]:
        target = output_dir / path.relative_to(staging)
        if not (target.is_file() and filecmp.cmp(path, target, shallow=False)):
            path.replace(target)


def find_run(runs_dir: Path, gallery_dir: Path) -> Path:
    """The run that was written to last, or the committed gallery if there is none.

    Runs of the random-weight test models do not count.

    Raises:
        BenchError: neither holds results.
    """
    found = [path for path in runs_dir.glob(f"*/{RESULTS_NAME}") if (path.parent / RUN_NAME).is_file()]
    runs = [path for path in found if read_run(path.parent).get("model") not in TINY]
    if runs:
        return max(runs, key=lambda path: path.stat().st_mtime_ns).parent
    if (gallery_dir / RESULTS_NAME).is_file():
        return gallery_dir
    raise BenchError(
        f"no run under {runs_dir} and no results in {gallery_dir}; run `nox -s bench` or name one with --run"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code: 0, or 2 after one line about what is wrong."""
    return run_command("harness.gallery", argv, _regenerate, stopped="start again to go on")


def _regenerate(arguments: list[str], command: str) -> None:
    parser = make_parser("harness.gallery", __doc__)
    parser.add_argument(
        "--run", type=Path, help="run folder (default: the newest under runs/, else the gallery itself)"
    )
    parser.add_argument("--output", type=Path, default=Path("gallery"), help="folder to write")
    parser.add_argument(
        "--readme",
        type=Path,
        help="README whose comparison section is renewed (default: the repository's, if --output is its "
        "gallery folder)",
    )
    options = parse_options(parser, arguments)
    target = options.readme
    if target is None and options.output.resolve() == ROOT / "gallery":
        target = ROOT / "README.md"
    if target:
        readme.check_markers(target)
    run = options.run or find_run(Path("runs"), options.output)
    page = build(run, options.output)
    if target:
        readme.update(target, options.output)
    print(f"wrote {page} from {run}" + (f" and the comparison section of {target}" if target else ""))


if __name__ == "__main__":
    sys.exit(main())
