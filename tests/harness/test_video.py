import av
import numpy as np
import pytest

from harness.video import read_frames, write_lossless, write_mp4


@pytest.fixture
def noise():
    return np.random.default_rng(0).integers(0, 256, (9, 48, 80, 3), dtype=np.uint8)


def test_lossless_is_exact(tmp_path, noise):
    write_lossless(tmp_path / "a.mkv", noise)
    assert np.array_equal(read_frames(tmp_path / "a.mkv"), noise)


def test_mp4_is_what_browsers_play(tmp_path, noise):
    path = tmp_path / "a.mp4"
    write_mp4(path, noise, fps=12)
    with av.open(str(path)) as container:
        (stream,) = container.streams
        assert stream.codec_context.name == "h264"
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert (stream.width, stream.height, stream.frames) == (80, 48, 9)
        assert stream.average_rate == 12
    data = path.read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")  # playable while it loads
    assert read_frames(path).shape == noise.shape


def test_mp4_keeps_colours(tmp_path):
    frames = np.zeros((5, 32, 32, 3), dtype=np.uint8) + np.array([200, 40, 90], dtype=np.uint8)
    write_mp4(tmp_path / "a.mp4", frames)
    difference = np.abs(read_frames(tmp_path / "a.mp4").astype(int) - frames)
    assert difference.max() <= 3


def test_nothing_but_the_finished_file_is_left(tmp_path, noise):
    write_mp4(tmp_path / "a.mp4", noise)
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_failure_leaves_no_file(tmp_path, noise):
    with pytest.raises(ValueError, match="uint8"):
        write_mp4(tmp_path / "a.mp4", noise.astype(np.float32))
    with pytest.raises(Exception):  # noqa: B017 - odd sizes have no 4:2:0 form; the codec's error varies
        write_mp4(tmp_path / "a.mp4", noise[:, :47, :79])
    assert list(tmp_path.iterdir()) == []
