"""One benchmark job's result: the row schema, and reading and writing of ``results.jsonl``."""

import dataclasses
import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from harness.errors import ResultsError

RESULTS_NAME = "results.jsonl"
TORN_NAME = "results.jsonl.torn"

Status = Literal["ok", "failed"]


@dataclass(frozen=True, kw_only=True)
class ResultRow:
    """One row of ``results.jsonl``; ``docs/measuring.md`` says how each figure is measured.

    Args:
        job_id (str): hash of everything that identifies the job.
        label (str): text of the strategy spec, unique within a run (``radial:preset=demo``).
        strategy (str): registered name.
        provider (str): distribution with version and entry point of the strategy.
        preset (str, Optional): preset the parameters started from.
        parameters (dict): all parameters of the strategy.
        model (str): model name as given to ``--model``.
        prompt (str): the prompt.
        prompt_index (int): its place in the prompts file, from 0.
        seed (int): seed of the initial noise.
        steps (int): denoising steps.
        size (dict): ``height`` and ``width`` in pixels, ``num_frames``.
        guidance_scale (float): classifier-free guidance; 1.0 means none.
        dtype (str): ``float32``, ``bfloat16`` or ``float16``.
        device (str): name of the processor or GPU.
        versions (dict): package versions; None for a package that is not installed.
        commit (str, Optional): git commit of the source tree.
        started_at (str): UTC time, ISO 8601.
        status (str): ``"ok"`` or ``"failed"``; figures of a failed row are None.
        error (str, Optional): one line, for failed rows.
        tokens (int, Optional): sequence length, text and video.
        wall_time_s (float, Optional): whole generation, text encoder to frames.
        denoise_time_s (float, Optional): denoising loop.
        attention_time_s (float, Optional): inside the strategy's calls, prediction included.
        dense_denoise_time_s (float, Optional): the dense pass paired with this job.
        dense_attention_time_s (float, Optional): likewise.
        speedup (float, Optional): ``dense_denoise_time_s / denoise_time_s``.
        attention_speedup (float, Optional): ``dense_attention_time_s / attention_time_s``.
        density (float, Optional): executed share of (query, key) pairs, 0 to 1.
        density_by_layer (list, Optional): layers x steps; None in a cell that was not called.
        shares_by_layer (dict): further figures of the strategy by name, 0 to 1, laid out as
            ``density_by_layer``.
        backends (dict): attention calls per backend.
        dense_calls (dict): calls that ran dense, per reason.
        peak_memory_bytes (int, Optional): GPU memory on CUDA, resident memory on a CPU.
        identical (bool, Optional): every pixel equals the dense video's; None for dense.
        psnr_db (float, Optional): against the dense video, capped at 100; None for dense.
        ssim (float, Optional): against the dense video; None for dense.
        lpips (float, Optional): against the dense video; None for dense or when not installed.
        temporal (dict): ``flow_warp_error`` and ``flow_warp_error_dense``.
        metrics (dict): metrics of other plugins by name.
        video (str, Optional): MP4 file, relative to the run folder.
        frames (str, Optional): lossless file, relative to the run folder.
        notes (list): remarks, for example a metric that could not be computed.
    """

    job_id: str
    label: str
    strategy: str
    provider: str = ""
    preset: str | None
    parameters: dict[str, Any]
    model: str
    prompt: str
    prompt_index: int
    seed: int
    steps: int
    size: dict[str, int]
    guidance_scale: float
    dtype: str
    device: str
    versions: dict[str, str | None]
    commit: str | None
    started_at: str
    status: Status
    error: str | None = None
    tokens: int | None = None
    wall_time_s: float | None = None
    denoise_time_s: float | None = None
    attention_time_s: float | None = None
    dense_denoise_time_s: float | None = None
    dense_attention_time_s: float | None = None
    speedup: float | None = None
    attention_speedup: float | None = None
    density: float | None = None
    density_by_layer: list[list[float | None]] | None = None
    shares_by_layer: dict[str, list[list[float | None]]] = field(default_factory=dict)
    backends: dict[str, int] = field(default_factory=dict)
    dense_calls: dict[str, int] = field(default_factory=dict)
    peak_memory_bytes: int | None = None
    identical: bool | None = None
    psnr_db: float | None = None
    ssim: float | None = None
    lpips: float | None = None
    temporal: dict[str, float | None] = field(default_factory=dict)
    metrics: dict[str, float | None] = field(default_factory=dict)
    video: str | None = None
    frames: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """True for a finished job."""
        return self.status == "ok"

    @classmethod
    def from_dict(cls, values: Any) -> "ResultRow":
        """Check a decoded line.

        Raises:
            ResultsError: not an object, a key missing or unknown, or a value of the wrong type.
        """
        if not isinstance(values, dict):
            raise ResultsError(f"expected an object, got {type(values).__name__}")
        fields = {item.name: item for item in dataclasses.fields(cls)}
        required = {name for name, item in fields.items() if _is_required(item)}
        if missing := required - values.keys():
            raise ResultsError(f"missing keys: {', '.join(sorted(missing))}")
        if unknown := values.keys() - fields.keys():
            raise ResultsError(f"unknown keys: {', '.join(sorted(unknown))}")
        for name, value in values.items():
            _check_type(name, value, fields[name].type)
        if values["status"] not in get_args(Status):
            raise ResultsError(f"status must be ok or failed, got {values['status']!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Strict JSON values: NaN and infinity become None."""
        return _strict(dataclasses.asdict(self))


def read_rows(path: Path) -> list[ResultRow]:
    """The last row of every job, in the order in which the jobs first appear.

    An unfinished last line (a bench that is writing, or was killed while it wrote) is left out.

    Args:
        path (Path): a ``results.jsonl``; a file that does not exist has no rows.

    Raises:
        ResultsError: a line is not a row; the message names file and line.
    """
    rows: dict[str, ResultRow] = {}
    lines, _ = _split(path)
    for number, line in enumerate(lines, start=1):
        try:
            row = _parse(line)
        except ResultsError as error:
            raise ResultsError(
                f"{path} line {number} is not a result row: {error}; "
                "run the benchmark with --repair to move such lines aside"
            ) from None
        rows[row.job_id] = row
    return list(rows.values())


def append_row(path: Path, row: ResultRow) -> None:
    """Append one row as a single write that is on disk when this returns.

    Raises:
        OSError: the line could not be written whole; the file is as it was before.
    """
    text = json.dumps(row.to_dict(), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    line = text.encode("utf-8") + b"\n"
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(handle).st_size
        written = os.write(handle, line)
        if written != len(line):
            os.ftruncate(handle, size)
            raise OSError(f"only {written} of {len(line)} bytes could be written to {path}")
        os.fsync(handle)
    finally:
        os.close(handle)


def recover(path: Path, repair: bool = False) -> list[str]:
    """Make the file appendable again after a kill in mid-write; nothing is deleted.

    A last line without its newline is completed if it is a whole row, else moved to
    ``results.jsonl.torn`` beside the file. With ``repair`` every other broken line goes there too.

    Returns:
        list[str]: one message per thing that was done.
    """
    lines, tail = _split(path)
    keep = [line for line in lines if not repair or _is_row(line)]
    aside = [line for line in lines if repair and not _is_row(line)]
    messages = [f"{len(aside)} broken line(s) of {path} moved to {TORN_NAME}"] if aside else []
    if tail and _is_row(tail):
        keep.append(tail)
    elif tail:
        aside.append(tail)
        messages.append(f"the last line of {path} was cut off; moved to {TORN_NAME}, its job runs again")
    if not tail and not aside:
        return messages
    if aside:
        _store(path.with_name(TORN_NAME), aside, "ab")
    fresh = path.with_name(f".{path.name}.partial")
    _store(fresh, keep, "wb")
    fresh.replace(path)
    return messages


def read_run(run_dir: Path) -> dict[str, Any]:
    """Settings and environment of a run: its ``run.json``.

    Raises:
        ResultsError: the file is missing or not JSON.
    """
    path = run_dir / "run.json"
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise ResultsError(f"{path} does not exist; is {run_dir} the --output of a benchmark?") from None
    except ValueError as error:
        raise ResultsError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(run, dict):
        raise ResultsError(f"{path} must hold an object, got {type(run).__name__}; was it edited?")
    return run


def write_json(path: Path, values: Any) -> None:
    """Write JSON to a temporary name, then rename it: readers see the old file or the new one."""
    fresh = path.with_name(f".{path.name}.partial")
    text = json.dumps(_strict(values), ensure_ascii=False, allow_nan=False, indent=2, default=str)
    _store(fresh, [text.encode("utf-8")], "wb")
    fresh.replace(path)


def _store(path: Path, lines: list[bytes], mode: Literal["ab", "wb"]) -> None:
    with path.open(mode) as file:
        file.writelines(line + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())


def _split(path: Path) -> tuple[list[bytes], bytes]:
    """Finished lines, and what follows the last newline."""
    if not path.exists():
        return [], b""
    try:
        *lines, tail = path.read_bytes().split(b"\n")
    except OSError as error:
        raise ResultsError(f"cannot read {path}: {error.strerror}") from None
    return lines, tail


def _parse(line: bytes) -> ResultRow:
    try:
        return ResultRow.from_dict(json.loads(line.decode("utf-8")))
    except ValueError as error:
        raise ResultsError(f"not JSON ({error})") from None


def _is_row(line: bytes) -> bool:
    try:
        _parse(line)
    except ResultsError:
        return False
    return True


def _is_required(item: dataclasses.Field) -> bool:
    return item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING


def _check_type(name: str, value: Any, annotation: Any) -> None:
    """Check the outer type only; ``float`` takes integers too."""
    kinds = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    outer = tuple(str if kind is Status else getattr(kind, "__origin__", kind) for kind in kinds)
    if float in outer:
        outer = (*outer, int)
    if not isinstance(value, outer) or (isinstance(value, bool) and bool not in outer):
        raise ResultsError(f"'{name}' has the wrong type: {value!r}")


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
