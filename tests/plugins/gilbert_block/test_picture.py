import pytest
import torch

from kernels_common.gilbert import mean_step
from plugins.gilbert_block.picture import locality_table, main, parse_box, row_major, snake

README = "plugins/gilbert_block/README.md"


def test_orders_hold_every_cell_once():
    box = (3, 4, 5)
    for order in (row_major, snake):
        cells = order(box)
        assert torch.equal((cells @ torch.tensor([1, 5, 20])).sort().values, torch.arange(60))
    assert mean_step(snake(box)) == (1.0, 1.0)
    assert row_major(box)[:6].tolist() == [[0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0], [4, 0, 0], [0, 1, 0]]


def test_table_has_the_figures_of_the_seed_and_those_that_matter():
    """ "1.86x" and "100 % adjacency" are of the first 100 pairs; compactness is the radius of the blocks."""
    rows = {tuple(line.split(" | ")[:2]): line.split(" | ") for line in locality_table().splitlines()}
    model, curve = (rows["| CogVideoX, 49 frames", order] for order in ("row-major", "curve"))
    assert model[7] == "1.8602" and curve[7:] == ["1.0000", "100% |"]
    assert model[2:4] == ["13.02", "13.45"] and curve[2:6] == ["2.34", "2.97", "5.6 / 4.5", "1.0037"]
    long = rows["| CogVideoX1.5, 81 frames", "curve"]
    assert long[4] == "10.1 / 8.4"


def test_the_readme_shows_what_the_command_prints(capsys, pytestconfig):
    main(["--locality"])
    assert capsys.readouterr().out.strip() in (pytestconfig.rootpath / README).read_text()


def test_picture_is_written(tmp_path, capsys):
    from skimage.io import imread

    path = tmp_path / "curve.png"
    main(["--box", "4x8x9", "--small", "2x3x4", "--block", "64", "--output", str(path)])
    assert "blocks of 64 tokens in 4x8x9" in capsys.readouterr().out
    assert imread(path).std() > 10


def test_a_small_box_shows_the_blocks_that_it_has(tmp_path, capsys):
    path = tmp_path / "one.svg"
    main(["--box", "1x8x10", "--small", "1x1x1", "--block", "64", "--output", str(path)])
    assert "blocks of 64 tokens in 1x8x10" in capsys.readouterr().out
    assert path.stat().st_size > 1000


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--box", "13x30"], "FRAMESxHEIGHTxWIDTH"),
        (["--box", "0x3x4"], "FRAMESxHEIGHTxWIDTH"),
        (["--box", "00x4x9"], "each at least 1; got '00x4x9'"),
        (["--box", "13*30*45"], "FRAMESxHEIGHTxWIDTH"),
        (["--box", "1x1x1"], "a box of 1 tokens holds no block of 128"),
        (["--output", "missing/dir/x.png"], "No such file or directory: 'missing/dir/x.png'"),
        (["--output", "curve.none"], "'none' is not supported"),
    ],
    ids=str,
)
def test_wrong_calls_are_one_line(arguments, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["--small", "1x2x2", *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and message in error
    assert error.startswith("error: ") and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_boxes_are_read():
    assert parse_box("13x30x45") == (13, 30, 45)
