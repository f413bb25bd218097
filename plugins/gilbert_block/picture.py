"""Picture of the curve and its blocks, and figures of how compact blocks are.

python -m plugins.gilbert_block.picture --output plugins/gilbert_block/curve.png
python -m plugins.gilbert_block.picture --locality
"""

import argparse
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.errors import LayoutError, SparseAttnError
from kernels_common.gilbert import block_rms_radius, gilbert_curve, mean_step

BOXES = (
    ("CogVideoX, 49 frames", (13, 30, 45)),
    ("CogVideoX1.5, 81 frames", (11, 48, 85)),
    ("demo model", (17, 12, 20)),
)
BLOCKS = (64, 128)
FIRST_PAIRS = 100  # that the figures of the seed are about
SHOWN_BLOCKS = 6

Box = tuple[int, int, int]


def parse_box(text: str) -> Box:
    """Frames, rows and columns from ``FRAMESxHEIGHTxWIDTH``, in tokens.

    Raises:
        LayoutError: the text has another form, or a side is 0.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not found or min(map(int, found.groups())) < 1:
        raise LayoutError(f"a box reads FRAMESxHEIGHTxWIDTH, in tokens, each at least 1; got {text!r}")
    return int(found[1]), int(found[2]), int(found[3])


def row_major(box: Box) -> torch.Tensor:
    """Cells ``[S, 3]`` (x, y, z) in the order of the model, columns fastest."""
    z, y, x = torch.meshgrid(*map(torch.arange, box), indexing="ij")
    return torch.stack([x, y, z], -1).view(-1, 3)


def snake(box: Box) -> torch.Tensor:
    """Cells in row-major order with every other row and frame backwards: unit steps, long blocks."""
    frames = []
    for z, frame in enumerate(row_major(box).view(*box, 3)):
        turns = torch.stack([row.flip(0) if y % 2 else row for y, row in enumerate(frame)]).flatten(0, 1)
        frames.append(turns.flip(0) if z % 2 else turns)
    return torch.cat(frames)


def curve(box: Box) -> torch.Tensor:
    """Cells along the curve."""
    frames, height, width = box
    return gilbert_curve(width, height, frames)


ORDERS = {"row-major": row_major, "snake": snake, "curve": curve}


def locality_table() -> str:
    """Markdown table of block radius and steps of three orders on three grids."""
    lines = [
        "| grid | order | radius of 64 tokens | radius of 128 | ratio | mean step | unit steps "
        f"| mean of the first {FIRST_PAIRS} | unit |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, box in BOXES:
        base = [block_rms_radius(row_major(box), block) for block in BLOCKS]
        for label, order in ORDERS.items():
            cells = order(box)
            radii = [block_rms_radius(cells, block) for block in BLOCKS]
            ratios = " / ".join(f"{whole / own:.1f}" for whole, own in zip(base, radii, strict=True))
            (mean, unit), (first_mean, first_unit) = mean_step(cells), mean_step(cells[: FIRST_PAIRS + 1])
            lines.append(
                f"| {name} | {label} | {radii[0]:.2f} | {radii[1]:.2f} | {ratios} | {mean:.4f} "
                f"| {unit:.2%} | {first_mean:.4f} | {first_unit:.0%} |"
            )
    return "\n".join(lines)


def draw(box: Box, small: Box, block: int, path: Path) -> None:
    """Save a picture: the curve through a small box, and some blocks of a large one in two orders.

    Args:
        box (Box): frames, rows and columns of the large box.
        small (Box): those of the box whose curve is drawn.
        block (int): tokens of a block.
        path (Path): picture to write; its suffix decides the format.

    Raises:
        LayoutError: the large box holds no block.
        OSError: the picture cannot be written.
        ValueError: no format has the suffix.
    """
    shown = min(SHOWN_BLOCKS, math.prod(box) // block)
    if not shown:
        raise LayoutError(f"a box of {math.prod(box)} tokens holds no block of {block}; take a larger one")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(12, 4))
    FigureCanvasAgg(figure)
    panels: Any = figure.subplots(1, 3, subplot_kw={"projection": "3d"})
    _draw_path(panels[0], curve(small))
    panels[0].set_title(f"the curve through {'x'.join(map(str, small))} tokens", fontsize=10)
    for axes, (name, order) in zip(panels[1:], (("row-major", row_major), ("curve", curve)), strict=True):
        cells = order(box)
        _draw_blocks(axes, cells, block, shown)
        radius = block_rms_radius(cells, block)
        axes.set_title(
            f"{shown} blocks of {block} in {'x'.join(map(str, box))}, {name}: radius {radius:.2f}",
            fontsize=10,
        )
    for axes in panels:
        axes.set_xlabel("frame")
        axes.set_ylabel("column")
        axes.set_zlabel("row")
        axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        axes.invert_zaxis()
    figure.subplots_adjust(left=0.01, right=0.95, bottom=0.12, top=0.93, wspace=0.12)
    figure.savefig(path, dpi=75)


def _draw_path(axes: Any, cells: torch.Tensor) -> None:
    """Pieces of the path in colours that go from its start to its end."""
    from matplotlib import colormaps

    colours = colormaps["viridis"](torch.linspace(0, 1, len(cells) - 1).numpy())
    for start, end, colour in zip(cells[:-1].tolist(), cells[1:].tolist(), colours, strict=True):
        x, y, z = zip(start, end, strict=True)
        axes.plot(z, x, y, color=colour, linewidth=1.8)
    _set_aspect(axes, cells)


def _draw_blocks(axes: Any, cells: torch.Tensor, block: int, shown: int) -> None:
    """Blocks spread evenly over the sequence, each in a colour of its own."""
    from matplotlib import colormaps

    extent = cells.amax(0) + 1
    last = len(cells) // block - 1
    for number in range(shown):
        start = round(number * last / max(1, shown - 1)) * block
        x, y, z = cells[start : start + block].T.tolist()
        colour = colormaps["tab10"](number)
        axes.scatter(z, x, y, color=colour, s=9, marker="s", depthshade=False)
    axes.set(xlim=(0, int(extent[2])), ylim=(0, int(extent[0])), zlim=(0, int(extent[1])))
    _set_aspect(axes, cells)


def _set_aspect(axes: Any, cells: torch.Tensor) -> None:
    """One scale for frames, columns and rows, so that distances are seen as they are."""
    x, y, z = (cells.amax(0) + 1).tolist()
    axes.set_box_aspect((z, x, y), zoom=0.9)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m plugins.gilbert_block.picture``."""
    parser = argparse.ArgumentParser(
        prog="python -m plugins.gilbert_block.picture",
        description="Draw the curve and its blocks, or print how compact blocks are.",
    )
    parser.add_argument("--box", default="13x30x45", help="FRAMESxHEIGHTxWIDTH of the blocks (13x30x45)")
    parser.add_argument("--small", default="5x7x10", help="FRAMESxHEIGHTxWIDTH of the curve (5x7x10)")
    parser.add_argument("--block", type=int, choices=BLOCKS, default=128, help="tokens of a block (128)")
    parser.add_argument("--output", type=Path, default=Path("curve.png"), help="picture to write")
    parser.add_argument("--locality", action="store_true", help="print the table and draw nothing")
    chosen = parser.parse_args(arguments)
    if chosen.locality:
        print(locality_table())
        return
    try:
        draw(parse_box(chosen.box), parse_box(chosen.small), chosen.block, chosen.output)
    except (SparseAttnError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{chosen.output}: blocks of {chosen.block} tokens in {chosen.box}")


if __name__ == "__main__":
    main()
