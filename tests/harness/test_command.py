"""What all commands do alike: one line for an error, exit codes, Ctrl-C, help that keeps its lines."""

import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest

import harness
from core import ParameterError
from harness.command import make_parser, parse_options, require_at_least, run_command
from harness.errors import BenchError

COMMANDS = sorted(
    path.stem
    for path in Path(harness.__file__).parent.glob("*.py")
    if "__main__" in path.read_text(encoding="utf-8")
)


def test_work_gets_arguments_and_command_and_its_exit_code_is_kept():
    seen = []
    code = run_command("harness.x", ["--name", "two words"], lambda *given: seen.append(given) or 1)
    assert code == 1
    assert seen == [(["--name", "two words"], "python -m harness.x --name 'two words'")]


def test_work_without_an_exit_code_is_done(monkeypatch):
    monkeypatch.setattr("sys.argv", ["harness/x.py", "own"])
    assert run_command("harness.x", None, lambda arguments, command: print(*arguments)) == 0


@pytest.mark.parametrize("error", [BenchError, ParameterError])
def test_bad_input_is_one_line(capsys, error):
    def work(arguments, command):
        raise error("expected a, got b")

    assert run_command("harness.x", [], work) == 2
    assert capsys.readouterr() == ("", "error: expected a, got b\n")


def test_a_fault_of_the_program_is_not_dressed_up():
    def work(arguments, command):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run_command("harness.x", [], work)


def test_output_that_nobody_reads_is_no_traceback():
    program = "import sys; from harness.command import run_command; sys.exit(run_command('x', [], print))"
    reader, writer = os.pipe()
    os.close(reader)
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program], stdout=writer, stderr=subprocess.PIPE, cwd=root, check=False
    )
    os.close(writer)
    assert run.returncode == 1 and run.stderr == b""


def test_interrupt_says_what_is_left(capsys):
    def work(arguments, command):
        raise KeyboardInterrupt

    assert run_command("harness.x", [], work, stopped="half is kept") == 130
    assert capsys.readouterr().err == "stopped; half is kept\n"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_refuses_unknown_options_in_one_line(capsys, name):
    assert importlib.import_module(f"harness.{name}").main(["--nonsense", "1"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert "nonsense" in printed.err
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_stops_without_a_traceback(capsys, monkeypatch, name):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    module = importlib.import_module(f"harness.{name}")
    monkeypatch.setattr("harness.command.ArgumentParser.parse_args", interrupt)
    assert module.main([]) == 130
    assert capsys.readouterr().err.startswith("stopped; ")


def test_help_keeps_the_lines_of_the_description_and_shows_defaults_once(capsys):
    parser = make_parser("harness.x", "Do this.\n\n    python -m harness.x --count 2\n")
    parser.add_argument("--count", type=int, default=3, help="how many")
    parser.add_argument("--where", type=str, help="place (default: here)")
    with pytest.raises(SystemExit) as stop:
        parse_options(parser, ["--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "\n    python -m harness.x --count 2\n" in text
    assert "how many (default: 3)\n" in text
    assert "place (default: here)\n" in text


def test_numbers_below_the_least_name_their_option():
    parser = make_parser("harness.x", None)
    parser.add_argument("--held-out", type=int)
    options = parse_options(parser, ["--held-out", "0"])
    require_at_least(options, 0, "held_out")
    with pytest.raises(BenchError, match="--held-out must be at least 1, got 0"):
        require_at_least(options, 1, "held_out")


@pytest.fixture
def parser():
    parser = make_parser("harness.x", None)
    parser.add_argument("file", type=Path)
    parser.add_argument("--held-out", type=str, required=True)
    parser.add_argument("--dtype", type=Literal["half", "full", "double"])
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--budgets", type=float, nargs="+")
    parser.add_argument("--prompts", type=int | Literal["all"])
    return parser


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "the following arguments are required: file, --held-out"),
        ("x", "the following arguments are required: --held-out"),
        ("x --held-out 1 --dtype fp8", "--dtype must be half, full or double, got 'fp8'"),
        ("x --held-out 1 --num-frames 3.5", "--num-frames must be a whole number, got '3.5'"),
        ("x --held-out 1 --budgets 0.1 much", "--budgets must be a number, got 'much'"),
    ],
)
def test_messages_name_options_as_they_are_typed(parser, given, message):
    with pytest.raises(BenchError) as error:
        parse_options(parser, given.split())
    assert str(error.value) == message


def test_messages_without_plain_words_are_kept(parser):
    with pytest.raises(BenchError, match='"prompts".*few') as error:
        parse_options(parser, ["x", "--held-out", "1", "--prompts", "few"])
    assert "\n" not in str(error.value)
