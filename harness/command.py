"""What every ``python -m harness.X`` does alike: options, errors in one line, Ctrl-C, exit codes."""

import argparse
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from core import SparseAttnError
from harness.errors import BenchError

DONE, FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130
_NUMBERS = {"<class 'int'>": "a whole number", "<class 'float'>": "a number"}


def run_command(
    module: str,
    argv: Sequence[str] | None,
    work: Callable[[list[str], str], int | None],
    stopped: str = "nothing was written",
) -> int:
    """Do a command's work; what is wrong with its input becomes one line on standard error.

    Args:
        module (str): what stands behind ``python -m``.
        argv (Sequence[str], Optional): arguments without the program's name; None means the process's own.
        work (Callable): takes the arguments and the whole command as one line, for the record; returns the
            exit code, None for 0.
        stopped (str): what to say after Ctrl-C about what is there. Default: "nothing was written"

    Returns:
        int: the exit code: of ``work``, 2 for bad input or no way to go on, 130 after Ctrl-C, 1 where nobody
        reads the output any more.
    """
    arguments = sys.argv[1:] if argv is None else list(argv)
    try:
        code = work(arguments, shlex.join(["python", "-m", module, *arguments])) or DONE
        sys.stdout.flush()
        return code
    except (BenchError, SparseAttnError) as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"stopped; {stopped}", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `| head`; what is left in the buffer must go somewhere when Python ends
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return FAILED


@contextmanager
def unswallowed_interrupts() -> Iterator[Callable[[], None]]:
    """Within it a Ctrl-C that called code swallowed, as torch's compiler can, is not lost.

    Yields:
        Callable: raises KeyboardInterrupt if there was one; to be called between two pieces of work.
    """
    asked = False

    def interrupt(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        raise KeyboardInterrupt

    def check() -> None:
        if asked:
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, interrupt)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, before)


class HelpFormatter(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The description as it is written, and behind an option's help its default unless that speaks of it."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        silent = action.default in (None, False, argparse.SUPPRESS) or "default" in text
        return text if silent else f"{text} (default: %(default)s)"


def make_parser(module: str, description: str | None) -> ArgumentParser:
    """A parser for `parse_options`.

    Args:
        module (str): what stands behind ``python -m``.
        description (str, Optional): the module's docstring, printed as it is.
    """
    return ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=HelpFormatter,
        exit_on_error=False,
    )


def parse_options(parser: ArgumentParser, arguments: Sequence[str] | None) -> Namespace:
    """Read a command line.

    Raises:
        BenchError: an option is unknown, missing or has a wrong value.
        SystemExit: after ``--help``.
    """
    try:
        return parser.parse_args(arguments)
    except argparse.ArgumentError as error:
        raise BenchError(_in_plain_words(parser, " ".join(str(error).split()))) from None


def _in_plain_words(parser: ArgumentParser, message: str) -> str:
    """The parser's message with options as they are typed and types in words, as far as it names them."""
    if found := re.fullmatch(r"(the following arguments are required: )(.+)", message):
        return found[1] + ", ".join(_option(parser, name) for name in found[2].split(", "))
    found = re.fullmatch(r'Parser key "(\w+)"(?: element \d+)?: Expected an? (.+)\. Got value: (.*)', message)
    if found and (expected := _expected(found[2])):
        return f"{_option(parser, found[1])} must be {expected}, got '{found[3]}'"
    return message


def _expected(annotation: str) -> str | None:
    """A type of an option in words; None for one that no option has."""
    if choices := re.fullmatch(r"typing\.Literal\[(.+)\]", annotation):
        *others, last = choices[1].replace("'", "").split(", ")
        return f"{', '.join(others)} or {last}" if others else last
    return _NUMBERS.get(annotation)


def _option(parser: ArgumentParser, name: str) -> str:
    """How an argument is typed: ``--num-frames`` for ``num_frames``, a positional one by its name."""
    typed = (action.option_strings for action in parser._actions if action.dest == name)
    return next(iter(next(typed, [])), name)


def require_at_least(options: Namespace, least: int, *names: str) -> None:
    """Check numbers of a command line.

    Raises:
        BenchError: one is smaller.
    """
    for name in names:
        if getattr(options, name) < least:
            option = name.replace("_", "-")
            raise BenchError(f"--{option} must be at least {least}, got {getattr(options, name)}")
