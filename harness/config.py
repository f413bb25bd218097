"""The benchmark's settings: command line, configuration file and prompts."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ActionYesNo, ArgumentParser, Namespace

from harness.command import make_parser, parse_options
from harness.environment import SOURCE_ROOT
from harness.errors import BenchError
from harness.models import DEMO, MODEL_CHOICE, SMALL, preset_name

Dtype = Literal["float32", "bfloat16", "float16"]
DEFAULT_PROMPTS = 2
SHORT_PROMPTS, LONG_PROMPTS = "prompts.txt", "prompts_long.txt"
DESCRIPTION = """\
Run every strategy over the same prompts and seeds on one model and compare speed, density and fidelity
with dense attention. A run that was stopped goes on where it stood when it is started again.

Exit codes: 0 all jobs finished, 1 a job failed, 2 bad input or no way to go on, 130 stopped with Ctrl-C.
"""


@dataclass(frozen=True)
class BenchConfig:
    """Checked settings of one call of the benchmark.

    Args:
        model (str): as in `harness.models.load_model`.
        strategies (list[str], Optional): strategy specs; None means all that run on the device.
        prompts (list[str]): the prompts, without repeats.
        seeds (list[int]): seeds, without repeats.
        requested (dict): call settings that replace the model's own; None where not given.
        device (str): ``auto``, ``cpu`` or ``cuda[:INDEX]``.
        dtype (str, Optional): None means the model's usual one.
        low_memory (bool): offload to the host and decode in tiles.
        output (Path): run folder.
        gallery (bool): build the page after the run.
        repair (bool): move broken result lines aside.
        list_strategies (bool): list the strategies and stop.
        dump (dict): all options as given, for ``run.json``.
    """

    model: str
    strategies: list[str] | None
    prompts: list[str]
    seeds: list[int]
    requested: dict[str, Any]
    device: str
    dtype: str | None
    low_memory: bool
    output: Path
    gallery: bool
    repair: bool
    list_strategies: bool
    dump: dict[str, Any]


def parse_arguments(argv: list[str] | None = None) -> BenchConfig:
    """Read the command line.

    Args:
        argv (list[str], Optional): arguments without the program's name. Default: the process's own

    Raises:
        BenchError: an option is unknown or has a wrong value, or the prompts cannot be read.
        SystemExit: after ``--help`` and ``--print_config``.
    """
    options = parse_options(build_parser(), argv)
    prompts = [] if options.list else _choose_prompts(options)
    for seed in options.seeds:
        if not 0 <= seed < 2**63:
            raise BenchError(f"--seeds must lie in 0 to 2^63 - 1, got {seed}")
    names = ("height", "width", "num_frames", "steps", "guidance_scale", "fps")
    return BenchConfig(
        model=options.model,
        strategies=options.strategies,
        prompts=prompts,
        seeds=list(dict.fromkeys(options.seeds)),
        requested={name: getattr(options, name) for name in names},
        device=options.device,
        dtype=options.dtype,
        low_memory=options.low_memory,
        output=Path(options.output or Path("runs") / preset_name(options.model)),
        gallery=options.gallery,
        repair=options.repair,
        list_strategies=options.list,
        dump={name: value for name, value in options.as_dict().items() if name != "config"},
    )


def build_parser() -> ArgumentParser:
    """The command line of ``python -m harness.bench``."""
    parser = make_parser("harness.bench", DESCRIPTION)
    parser.add_argument("--config", action="config", help="YAML file with any of these options")
    parser.add_argument("--list", action="store_true", help="list the strategies with their state and stop")
    _add_job_options(parser)
    _add_video_options(parser)
    run = parser.add_argument_group("the run")
    run.add_argument("--device", type=str, default="auto", help="auto, cpu or cuda[:INDEX]")
    run.add_argument("--dtype", type=Dtype, help="default: float32 on CPU, half on CUDA")
    run.add_argument("--low-memory", action="store_true", help="offload parts to the host, decode in tiles")
    run.add_argument("--output", type=str, help="run folder (default: runs/MODEL)")
    run.add_argument(
        "--gallery",
        action=ActionYesNo(yes_prefix="", no_prefix="no-"),
        default=True,
        help="build the page with the videos side by side after the run",
    )
    run.add_argument("--repair", action="store_true", help="move broken lines of results.jsonl aside")
    return parser


def read_prompts(path: Path) -> list[str]:
    """Prompts of a text file, one per line; blank lines and lines starting with ``#`` are skipped.

    Raises:
        BenchError: the file cannot be read as UTF-8 text, or holds no prompt.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise BenchError(f"prompts file {path} does not exist; name one with --prompts-file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BenchError(f"cannot read prompts file {path}: {error}") from None
    stripped = (line.strip() for line in lines)
    prompts = list(dict.fromkeys(line for line in stripped if line and not line.startswith("#")))
    if not prompts:
        raise BenchError(f"prompts file {path} holds no prompt; expected one per line")
    return prompts


def _add_job_options(parser: ArgumentParser) -> None:
    jobs = parser.add_argument_group("what to run")
    jobs.add_argument("--model", type=str, default=DEMO, help=MODEL_CHOICE)
    jobs.add_argument(
        "--strategies",
        type=str,
        nargs="+",
        metavar="SPEC",
        help="NAME, NAME:preset=PRESET or NAME:key=value,key=value (default: all; dense is always included)",
    )
    jobs.add_argument(
        "--prompts", type=int | str, default=DEFAULT_PROMPTS, metavar="N", help="the first N, or all"
    )
    jobs.add_argument(
        "--prompts-file",
        type=str,
        help=f"one per line (default: {SHORT_PROMPTS}; for models from outside {LONG_PROMPTS})",
    )
    jobs.add_argument("--seeds", type=int, nargs="+", default=[0], help="seeds of the initial noise")


def _add_video_options(parser: ArgumentParser) -> None:
    video = parser.add_argument_group("the video (default: what the model was made for)")
    video.add_argument("--steps", type=int, help="denoising steps")
    video.add_argument("--height", type=int, help="pixels, a multiple of 16 (LTX-Video: 32)")
    video.add_argument("--width", type=int, help="likewise")
    video.add_argument("--num-frames", type=int, help="4k + 1 (LTX-Video: 8k + 1)")
    video.add_argument("--guidance-scale", type=float, help="guidance by the prompt; 1 means none")
    video.add_argument("--fps", type=int, help="frames per second of the files")


def _choose_prompts(options: Namespace) -> list[str]:
    count = options.prompts
    if count != "all" and not (isinstance(count, int) and count > 0):
        raise BenchError(f"--prompts must be a positive number or 'all', got '{count}'")
    path = Path(options.prompts_file) if options.prompts_file else default_prompts(options.model)
    prompts = read_prompts(path)
    if count == "all":
        return prompts
    if count > len(prompts):
        raise BenchError(f"--prompts asks for {count}, but {path} holds {len(prompts)}")
    return prompts[:count]


def default_prompts(model: str) -> Path:
    """The prompts file that fits a model: of this folder if it has one, else of the source tree."""
    name = SHORT_PROMPTS if model in SMALL else LONG_PROMPTS
    return Path(name) if Path(name).exists() else SOURCE_ROOT / name
