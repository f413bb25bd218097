import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

import plugins.radial
from core import LayoutError, TokenLayout
from plugins.radial.picture import MASK_FIELDS, density_table, main, parse_layout
from plugins.radial.presets import PRESETS
from plugins.radial.strategy import RadialParameters

README = (Path(plugins.radial.__file__).parent / "README.md").read_text()


def test_the_module_draws_its_mask(tmp_path):
    picture = tmp_path / "mask.png"
    command = [sys.executable, "-m", "plugins.radial.mask", "--layout", "16+9x6x8", "--output", str(picture)]
    run = subprocess.run([*command, "--block-size", "64"], capture_output=True, text=True, check=True)
    assert "16 text + 9x6x8 video = 448 tokens, executed density 0." in run.stdout
    assert run.stderr == ""
    assert matplotlib.image.imread(picture).std() > 0.1


def test_every_parameter_reaches_the_picture(tmp_path, capsys):
    values = {
        "block_size": "64",
        "rule": "official",
        "decay_factor": "0.3",
        "sink": "false",
        "keep": "fraction",
        "threshold": "0.3",
        "scene_boundaries": "[0, 15, 30, 45]",
        "scene_adjacency": "[[1, 1, 0], [0, 1, 1], [0, 0, 1]]",
        "scene_unit": "pixel",
        "temporal_compression": "4",
        "temporal_patch": "1",
        "front_padding": "0",
    }
    assert set(values) == set(MASK_FIELDS)
    options = [f"--{name.replace('_', '-')}={value}" for name, value in values.items()]
    pictures = []
    for name, changed in (("plain", []), ("scenes", options)):
        path = tmp_path / f"{name}.png"
        main(["--layout", "13x9x10+20", "--output", str(path), *changed])
        pictures.append(matplotlib.image.imread(path))
    assert not np.array_equal(*pictures)
    first, second = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert second < first


def test_preset_of_the_picture(tmp_path, capsys):
    main(["--layout", "16+17x12x20", "--preset", "demo", "--output", str(tmp_path / "demo.png")])
    assert "density 0.447" in capsys.readouterr().out


@pytest.mark.parametrize(
    "wrong", [["--decay-factor=-1"], ["--layout=13x30"], ["--scene-boundaries=0,"], ["--preset=none"]]
)
def test_wrong_options_end_with_a_message(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "mask.png"), *wrong])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing/mask.png", "picture.nothing"])
def test_a_picture_that_cannot_be_written_is_a_message(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / name)])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "text, layout",
    [
        ("226+13x30x45", TokenLayout(226, 13, 30, 45)),
        ("13x30x45+226", TokenLayout(226, 13, 30, 45, text_first=False)),
        ("13x30x45", TokenLayout(0, 13, 30, 45)),
    ],
)
def test_layout_notation(text, layout):
    assert parse_layout(text) == layout
    for wrong in ("1+2x3x4+5", "2x3", "axbxc", ""):
        with pytest.raises(LayoutError):
            parse_layout(wrong)


def test_readme_shows_the_printed_densities(capsys):
    main(["--densities"])
    printed = capsys.readouterr().out.strip()
    assert printed == density_table()
    assert printed in README


def test_readme_lists_every_parameter_with_its_default():
    table = README.split("## Parameters")[1].split("### Why")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", table, flags=re.MULTILINE))
    expected = {name: str(field.default).lower() for name, field in RadialParameters.model_fields.items()}
    assert {name: default.lower().strip('"') for name, default in rows.items()} == expected


def test_readme_lists_every_preset():
    for preset in PRESETS:
        assert f"| `{preset.name}` |" in README


def test_readme_shows_the_picture():
    assert "pattern.png" in README
    picture = Path(plugins.radial.__file__).parent / "pattern.png"
    assert matplotlib.image.imread(picture).std() > 0.1 and picture.stat().st_size < 200_000
