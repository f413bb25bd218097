"""Videos on disk: H.264 MP4 for browsers, FFV1 for exact pixels."""

from fractions import Fraction
from pathlib import Path
from typing import NamedTuple, cast

import av
import numpy as np

BT709 = 1  # ffmpeg's number for primaries, transfer and matrix alike


class Encoding(NamedTuple):
    """How frames become a file: muxer and codec with their options, and the stored pixel format."""

    muxer: str
    muxer_options: dict[str, str]
    codec: str
    codec_options: dict[str, str]
    pixels: str


# RGB, not YUV: no conversion, hence no rounding. Version 3 carries checksums.
LOSSLESS = Encoding("matroska", {}, "ffv1", {"level": "3", "slicecrc": "1"}, "bgr0")


def write_mp4(path: Path, frames: np.ndarray, fps: int = 8, crf: int = 18) -> None:
    """Write an MP4 that browsers play: H.264, yuv420p, index first.

    Args:
        path (Path): target; written under a temporary name and renamed when complete.
        frames (ndarray): ``[F, H, W, 3]`` uint8; height and width even.
        fps (int): frames per second. Default: 8
        crf (int): x264 quality, 0 (lossless) to 51; 18 is visually transparent. Default: 18
    """
    options = {"crf": str(crf), "preset": "medium"}
    encoding = Encoding("mp4", {"movflags": "+faststart"}, "libx264", options, "yuv420p")
    _write(path, frames, fps, encoding)


def write_lossless(path: Path, frames: np.ndarray, fps: int = 8) -> None:
    """Write FFV1 in Matroska; `read_frames` gives back exactly the same pixels.

    Args:
        path (Path): target; written under a temporary name and renamed when complete.
        frames (ndarray): ``[F, H, W, 3]`` uint8.
        fps (int): frames per second. Default: 8
    """
    _write(path, frames, fps, LOSSLESS)


def read_frames(path: Path) -> np.ndarray:
    """All frames of a video file.

    Returns:
        ndarray: ``[F, H, W, 3]`` uint8 RGB.
    """
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def _write(path: Path, frames: np.ndarray, fps: int, encoding: Encoding) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] != 3:
        raise ValueError(f"frames must be uint8 [F, H, W, 3], got {frames.dtype} {frames.shape}")
    partial = path.with_name(f".{path.name}.partial")
    muxer, options = encoding.muxer, encoding.muxer_options
    try:
        with av.open(str(partial), "w", format=muxer, options=options) as container:
            added = container.add_stream(encoding.codec, rate=Fraction(fps), options=encoding.codec_options)
            stream = cast(av.VideoStream, added)
            stream.height, stream.width = frames.shape[1:3]
            stream.pix_fmt = encoding.pixels
            if encoding.pixels == "yuv420p":
                # Name the colour space: players guess by picture size where a file is silent.
                colours = stream.codec_context
                colours.color_primaries = colours.color_trc = colours.colorspace = BT709
            for image in frames:
                container.mux(stream.encode(_picture(image, encoding.pixels)))
            container.mux(stream.encode())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def _picture(image: np.ndarray, pixels: str) -> av.VideoFrame:
    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24")
    if pixels == "yuv420p":
        return picture.reformat(format=pixels, dst_colorspace="ITU709", dst_color_range="MPEG")
    return picture
