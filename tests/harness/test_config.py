import pytest
import yaml

from harness import bench
from harness.config import parse_arguments, read_prompts
from harness.environment import SOURCE_ROOT
from harness.errors import BenchError


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("# comment\n\na red ball\n  a blue cube \na red ball\na green ring\n", encoding="utf-8")
    return path


def test_prompts_are_stripped_and_repeats_dropped(prompts):
    assert read_prompts(prompts) == ["a red ball", "a blue cube", "a green ring"]


def test_defaults(prompts):
    config = parse_arguments(["--prompts-file", str(prompts)])
    assert (config.model, config.strategies, config.seeds) == ("demo", None, [0])
    assert config.prompts == ["a red ball", "a blue cube"]
    assert config.output.as_posix() == "runs/demo"
    assert config.gallery is True


def test_every_option(prompts):
    arguments = (
        "--model tiny-random --strategies dense radial:sink=true --prompts all --seeds 3 1 3 --steps 2 "
        "--height 64 --width 80 --num-frames 5 --guidance-scale 1.5 --no-gallery --dtype float16"
    )
    config = parse_arguments([*arguments.split(), "--prompts-file", str(prompts)])
    assert config.strategies == ["dense", "radial:sink=true"]
    assert (len(config.prompts), config.seeds, config.dtype) == (3, [3, 1], "float16")
    assert config.requested == {
        "height": 64,
        "width": 80,
        "num_frames": 5,
        "steps": 2,
        "guidance_scale": 1.5,
        "fps": None,
    }
    assert config.gallery is False


def test_a_configuration_file_and_the_command_line_over_it(prompts, tmp_path):
    path = tmp_path / "bench.yaml"
    values = {"model": "tiny-random", "strategies": ["radial"], "prompts": 1, "seeds": [5], "gallery": False}
    path.write_text(yaml.safe_dump(values | {"prompts_file": str(prompts)}))
    config = parse_arguments(["--config", str(path), "--seeds", "7"])
    assert (config.model, config.strategies, config.gallery) == ("tiny-random", ["radial"], False)
    assert (config.prompts, config.seeds) == (["a red ball"], [7])


def test_the_shipped_long_prompts_can_be_read():
    assert 10 <= len(read_prompts(SOURCE_ROOT / "prompts_long.txt")) <= 15


def test_an_unreadable_prompts_file(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(BenchError, match="cannot read prompts file"):
        read_prompts(tmp_path / "latin.txt")


BAD_INPUT = {
    "unknown option": ("--strategy radial", "unrecognized arguments"),
    "unknown strategy": ("--strategies nope", "no strategy is called 'nope'; known: "),
    "unknown parameter": ("--strategies radial:decay_faktor=1", "did you mean 'decay_factor'?"),
    "parameter out of range": ("--strategies dense:dense_layers=-1", "dense_layers: "),
    "height": ("--height 72", "--height must be a positive multiple of 16, at most 4096, got 72"),
    "width": ("--width -16", "--width must be a positive multiple of 16, at most 4096, got -16"),
    "frames": ("--num-frames 10", "--num-frames must be 4k + 1, got 10; the nearest are 9 and 13"),
    "steps": ("--steps 0", "--steps must be at least 1, got 0"),
    "not a number": ("--steps ten", "steps"),
    "guidance": ("--guidance-scale -3", "--guidance-scale must be a number"),
    "seed": ("--seeds -1", "--seeds must lie in 0 to 2^63 - 1, got -1"),
    "no prompts": ("--prompts 0", "--prompts must be a positive number or 'all', got '0'"),
    "prompts in words": ("--prompts two", "--prompts must be a positive number or 'all', got 'two'"),
    "too many prompts": ("--prompts 9", "--prompts asks for 9, but "),
    "no such prompts file": ("--prompts-file nowhere.txt", "prompts file nowhere.txt does not exist"),
    "empty prompts file": ("--prompts-file EMPTY", "holds no prompt; expected one per line"),
    "no such model": ("--model nothere", "there is no model 'nothere'; expected demo, tiny-random"),
    "folder without model": ("--model FOLDER", "holds no diffusers pipeline"),
    "hub id that is not there": ("--model no-one/nothing", "cannot load model 'no-one/nothing'"),
    "demo at another size": ("--model demo --height 96", "learned positions for 17 frames of 320x192 only"),
    "device": ("--device tpu", "--device must be auto, cpu or cuda[:INDEX], got 'tpu'"),
    "device that is not there": ("--device cuda:99", "--device cuda:99: "),
    "dtype": ("--dtype int8", "dtype"),
    "absurd height": ("--height 8000000", "at most 4096, got 8000000"),
    "absurd frames": ("--num-frames 100001", "at most 1025, got 100001"),
    "absurd seed": ("--seeds 99999999999999999999999", "--seeds must lie in 0 to 2^63 - 1"),
    "config file": ("--config nowhere.yaml", "nowhere.yaml"),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2(case, prompts, tmp_path, capsys):
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    arguments, message = BAD_INPUT[case]
    arguments = arguments.replace("EMPTY", str(tmp_path / "empty.txt")).replace("FOLDER", str(tmp_path))
    base = ["--model", "tiny-random", "--prompts-file", str(prompts), "--output", str(tmp_path / "run")]
    assert bench.main([*base, *arguments.split()]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ")
    assert message in error
    assert not (tmp_path / "run" / "results.jsonl").exists()


def test_list_names_every_strategy(capsys):
    assert bench.main(["--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.split()[:2] == ["dense", "available:"] for line in lines)


def test_list_shows_why_a_plugin_is_unavailable(capsys, monkeypatch):
    from core import StrategyEntry

    entry = StrategyEntry("broken", "somebody", "unavailable: ImportError: no module named x")
    monkeypatch.setattr(bench, "available_strategies", lambda: [entry])
    assert bench.main(["--list"]) == 0
    assert "broken           unavailable: ImportError: no module named x" in capsys.readouterr().out
