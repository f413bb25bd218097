import re
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import pytest
import torch

import plugins.sliding_tile
from core import LayoutError, TokenLayout
from plugins.sliding_tile.mask import window_blocks
from plugins.sliding_tile.picture import allowed_shares, main, parse_layout, window_in_frame
from plugins.sliding_tile.presets import PRESETS
from plugins.sliding_tile.reference import allowed_pairs, token_order
from plugins.sliding_tile.strategy import SlidingTileParameters
from plugins.sliding_tile.tiles import Tiling

README = (Path(plugins.sliding_tile.__file__).parent / "README.md").read_text()


def test_the_module_draws_its_pattern(tmp_path):
    picture = tmp_path / "pattern.png"
    command = [sys.executable, "-m", "plugins.sliding_tile.picture", "--layout", "9x8x8+16"]
    options = ["--block-size", "64", "--output", str(picture)]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "16 text + 9x8x8 video = 592 tokens, executed density 0." in run.stdout
    assert run.stderr == ""
    assert matplotlib.image.imread(picture).std() > 0.1


def test_every_option_reaches_the_picture(tmp_path, capsys):
    def executed(*options):
        main(["--layout", "16+17x12x20", "--output", str(tmp_path / "pattern.png"), *options])
        return float(capsys.readouterr().out.split()[-1])

    assert executed("--preset", "demo") == 0.253
    assert executed("--preset", "demo", "--head", "1") == 0.375
    assert executed("--preset", "demo", "--window", "3x3x3") == executed("--block-size", "64") == 0.429
    assert executed("--density", "0.3", "--block-size", "64") == 0.252
    assert executed("--tile", "17x12x20") == 1.0


def test_shares_are_those_of_the_reference():
    layout, tile, window, block = TokenLayout(5, 5, 5, 6), (2, 3, 4), (3, 1, 1), 16
    allowed = allowed_pairs(layout, tile, window)
    order = token_order(layout, tile)
    allowed = allowed[order][:, order].double()
    shares = allowed_shares(Tiling(layout, tile), window, block)
    for i in range(shares.shape[0]):
        for j in range(shares.shape[1]):
            part = allowed[i * block : (i + 1) * block, j * block : (j + 1) * block]
            assert shares[i, j] == pytest.approx(float(part.mean()), abs=1e-12)
    assert torch.equal(shares > 0, window_blocks(Tiling(layout, tile), window, block))


def test_window_in_a_frame():
    tiling = Tiling(TokenLayout(3, 2, 3, 7), (1, 1, 2))
    assert window_in_frame(tiling, (1, 1, 3), (1, 3)).tolist() == [
        [0, 0, 0, 0, 0, 0, 0],
        [0, 0, 1, 1, 1, 1, 2],
        [0, 0, 0, 0, 0, 0, 0],
    ]


@pytest.mark.parametrize(
    "wrong", [["--window=2x3x1"], ["--layout=13x30"], ["--tile=4x4"], ["--preset=none"], ["--density=0.001"]]
)
def test_wrong_options_end_with_a_message(wrong, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / "pattern.png"), *wrong])
    printed = capsys.readouterr().err
    assert stop.value.code == 2 and printed.startswith("error: ") and printed.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["missing/pattern.png", "picture.nothing"])
def test_a_picture_that_cannot_be_written_is_a_message(name, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--output", str(tmp_path / name)])
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("error: ")


def test_layout_notation():
    assert parse_layout("226+13x30x45") == TokenLayout(226, 13, 30, 45)
    assert parse_layout("13x30x45+226") == TokenLayout(226, 13, 30, 45, text_first=False)
    assert parse_layout("13x30x45") == TokenLayout(0, 13, 30, 45)
    for wrong in ("1+2x3x4+5", "2x3", "axbxc", ""):
        with pytest.raises(LayoutError):
            parse_layout(wrong)


def test_readme_shows_the_printed_densities(capsys):
    main(["--densities"])
    assert capsys.readouterr().out.strip() in README


def test_readme_lists_every_parameter_with_its_default():
    table = README.split("## Parameters")[1].split("### Presets")[0]
    rows = dict(re.findall(r"^\| `(\w+)` \| `([^`]*)` \|", table, flags=re.MULTILINE))
    fields = SlidingTileParameters.model_fields
    expected = {name: str(field.default).lower() for name, field in fields.items()}
    assert {name: default.lower().strip('"') for name, default in rows.items()} == expected


def test_readme_lists_every_preset():
    for preset in PRESETS:
        assert f"| `{preset.name}` |" in README


def test_readme_shows_the_picture():
    assert "pattern.png" in README
    picture = Path(plugins.sliding_tile.__file__).parent / "pattern.png"
    assert matplotlib.image.imread(picture).std() > 0.1 and picture.stat().st_size < 200_000
