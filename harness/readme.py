"""The README's comparison section: a moving strip of the first prompts, the summary table, provenance."""

import bisect
import math
import os
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image, ImageDraw, ImageFont

from harness.columns import is_baseline
from harness.errors import BenchError
from harness.notices import times_notice
from harness.results import RESULTS_NAME, ResultRow, read_rows, read_run
from harness.tables import provenance_line, summarise, to_markdown
from harness.video import read_frames

BEGIN, END = "<!-- comparison:begin -->", "<!-- comparison:end -->"
STRIP_NAME = "comparison.webp"
STRIP_BYTES = 1_000_000
MOST_COLUMNS, MOST_PROMPTS, MOST_FRAMES = 7, 3, 25
STRIP_TRIES = ((MOST_FRAMES, 80), (MOST_FRAMES, 60), (MOST_FRAMES, 40), (MOST_FRAMES, 20), (8, 20), (1, 20))
"""Most frames and WebP quality, tried in turn until the strip is small enough."""
_WIDTH, _WIDEST_TILE, _GAP, _LINE = 1200, 300, 8, 26
_PAPER, _INK, _QUIET = "#fbfaf7", "#1c1f23", "#5e646b"


def check_markers(readme: Path) -> tuple[str, str]:
    """The README's text before and after the section.

    Raises:
        BenchError: the file cannot be read, or does not hold the two markers once each and in order.
    """
    try:
        text = readme.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"{readme} cannot be read: {error}") from None
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise BenchError(f"{readme} must hold the lines {BEGIN} and {END} once each, in this order")
    return text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]


def update(readme: Path, gallery: Path) -> None:
    """Rewrite what stands between the README's markers from a gallery that was built.

    Args:
        readme (Path): the README; untouched if its section is up to date.
        gallery (Path): folder that `harness.gallery.build` wrote.

    Raises:
        BenchError: the markers are missing, or the README cannot be written.
    """
    before, after = check_markers(readme)
    fresh = f"{before}\n{section(gallery, os.path.relpath(gallery, readme.parent))}\n{after}"
    if fresh == readme.read_text(encoding="utf-8"):
        return
    partial = readme.with_name(f".{readme.name}.partial")
    try:
        partial.write_text(fresh, encoding="utf-8")
        partial.replace(readme)
    except OSError as error:
        raise BenchError(f"{readme} cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def section(gallery: Path, address: str) -> str:
    """Markdown of the section; ``address`` leads from the README to the gallery."""
    settings, rows = read_run(gallery), read_rows(gallery / RESULTS_NAME)
    loader = FileSystemLoader(Path(__file__).parent / "templates")
    jinja = Environment(
        loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    columns, prompts = _strip_cells(rows)
    return (
        jinja.get_template("readme_section.md")
        .render(
            address=Path(address).as_posix(),
            strip=STRIP_NAME if (gallery / STRIP_NAME).is_file() else None,
            columns=columns,
            prompts=[prompt for _, _, prompt in prompts],
            table=to_markdown(summarise(rows)).strip(),
            provenance=provenance_line(settings, rows),
            notice=times_notice(settings),
        )
        .strip()
    )


def write_strip(rows: Sequence[ResultRow], folder: Path, path: Path, fps: float = 8) -> None:
    """Write the first prompts of the first strategies as one animated WebP of at most 1 MB.

    The same videos give the same bytes. Nothing is written if no row has a video.

    Args:
        rows (Sequence[ResultRow]): rows of the run.
        folder (Path): what the rows' videos are relative to.
        path (Path): the picture.
        fps (float): frames per second of the videos. Default: 8

    Raises:
        BenchError: a video cannot be decoded.
    """
    columns, prompts = _strip_cells(rows)
    if not columns:
        return
    videos = {
        (row.label, row.prompt_index, row.seed): _decode(folder / row.video)
        for row in rows
        if row.ok
        and row.video
        and row.label in columns
        and (row.prompt_index, row.seed, row.prompt) in prompts
    }
    count = min(MOST_FRAMES, *(len(video) for video in videos.values()))
    for most, quality in STRIP_TRIES:
        frames = min(count, most)
        moments = [(index + 0.5) / frames for index in range(frames)]
        pictures = [_compose(columns, prompts, videos, moment) for moment in moments]
        timing = {"duration": round(1000 * count / (fps * frames)), "loop": 0}
        options = {"save_all": True, "append_images": pictures[1:], "quality": quality, "method": 4}
        pictures[0].save(path, "WEBP", **timing, **options)
        if path.stat().st_size <= STRIP_BYTES:
            return


def _strip_cells(rows: Sequence[ResultRow]) -> tuple[list[str], list[tuple[int, int, str]]]:
    """Labels across (each strategy once before any comes twice) and prompts down."""
    filmed = [row for row in rows if row.ok and row.video]
    shown = {row.label for row in filmed}
    order = [(summary.strategy, summary.label) for summary in summarise(rows) if summary.label in shown]
    first = dict(reversed(order))
    ranked = sorted(order, key=lambda pair: (not is_baseline(pair[1]), first[pair[0]] != pair[1]))
    chosen = {label for _, label in ranked[:MOST_COLUMNS]}
    columns = [label for _, label in order if label in chosen]
    return columns, sorted({(row.prompt_index, row.seed, row.prompt) for row in filmed})[:MOST_PROMPTS]


def _decode(path: Path) -> np.ndarray:
    try:
        return read_frames(path)
    except (av.FFmpegError, OSError, ValueError) as error:
        raise BenchError(f"{path.name} is not a video that can be decoded: {error}") from None


def _compose(
    columns: Sequence[str],
    prompts: Sequence[tuple[int, int, str]],
    videos: dict[tuple[str, int, int], np.ndarray],
    moment: float,
) -> Image.Image:
    """One frame of the strip; ``moment`` is the place in every video, 0 to 1."""
    height, width = next(iter(videos.values())).shape[1:3]
    across = min(_WIDEST_TILE, (_WIDTH - _GAP * (len(columns) + 1)) // len(columns))
    down = round(across * height / width)
    line = _LINE + down + _GAP
    sheet = Image.new(
        "RGB", (_GAP + len(columns) * (across + _GAP), _LINE + len(prompts) * line + _GAP // 2), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        left = _GAP + column * (across + _GAP)
        _write(pen, (left, 6), label, 15, _INK, across)
        for row, (index, seed, prompt) in enumerate(prompts):
            top = _LINE + row * line
            if not column:
                _write(pen, (left, top + 5), prompt, 14, _QUIET, sheet.width - 2 * _GAP)
            video = videos.get((label, index, seed))
            if video is not None:
                picture = Image.fromarray(video[int(moment * len(video))])
                sheet.paste(picture.resize((across, down), Image.Resampling.LANCZOS), (left, top + _LINE))
    return sheet


def _write(
    pen: ImageDraw.ImageDraw, place: tuple[int, int], text: str, size: int, colour: str, width: int
) -> None:
    """Write one line, cut with an ellipsis where it would be wider than ``width``."""
    font = ImageFont.load_default(size)
    text = " ".join(text.split())
    text = text[:width]  # no letter is narrower than a pixel
    if font.getlength(text) > width:
        ends = range(1, len(text))
        fitting = bisect.bisect(ends, width, key=lambda end: math.ceil(font.getlength(text[:end] + "...")))
        text = text[:fitting] + "..."
    pen.text(place, text, fill=colour, font=font)
