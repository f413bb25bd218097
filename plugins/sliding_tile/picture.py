"""Picture of the windows and the executed blocks, and a table of densities.

python -m plugins.sliding_tile.picture --output plugins/sliding_tile/pattern.png
python -m plugins.sliding_tile.picture --densities
"""

import argparse
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.block_mask import block_lengths
from core.errors import LayoutError, SparseAttnError
from core.layout import TokenLayout
from core.registry import installed
from plugins.sliding_tile.mask import allowed_density, executed_density, visible_tiles, window_blocks
from plugins.sliding_tile.strategy import RULES, SlidingTileParameters, layout_tiling, layout_windows
from plugins.sliding_tile.tiles import Box, Tiling

DEFAULT_LAYOUT = "226+13x30x45"
FIELDS = ("tile", *RULES, "block_size")

# Model, layout, and what its rows set: a preset by name, or parameters.
TABLE: tuple[tuple[str, str, tuple[str | dict[str, Any], ...]], ...] = (
    (
        "CogVideoX, 49 frames",
        "226+13x30x45",
        (
            "cogvideox",
            {},
            {"density": 0.2},
            {"density": 0.5},
            {"tile": (13, 3, 3), "window": (1, 9, 9)},
        ),
    ),
    (
        "CogVideoX1.5, 81 frames",
        "226+11x48x85",
        (
            "cogvideox1.5-5b",
            {},
            {"density": 0.5},
            {"tile": (11, 4, 5), "window": (1, 7, 9)},
            {"tile": (11, 6, 5), "window": (1, 5, 9)},
        ),
    ),
    (
        "HunyuanVideo, 117 frames of 768x1280",
        "30x48x80+256",
        (
            "hunyuan",
            {},
            {"tile": (6, 8, 8), "window": (5, 3, 3)},
            {"tile": (6, 8, 8), "window": (3, 3, 3)},
        ),
    ),
    ("Wan2.1, 81 frames of 720x1280", "21x45x80", ("wan", {}, {"density": 0.5})),
    ("demo model", "16+17x12x20", ("demo", {"block_size": 64}, {"block_size": 64, "density": 0.3})),
)


def parse_layout(text: str) -> TokenLayout:
    """Layout from ``[text+]FRAMESxHEIGHTxWIDTH[+text]``, for example ``226+13x30x45``; text in tokens.

    Raises:
        LayoutError: the text has another form.
    """
    found = re.fullmatch(r"(?:(\d+)\+)?(\d+x\d+x\d+)(?:\+(\d+))?", text)
    if not found or (found[1] and found[3]):
        raise LayoutError(
            f"a layout reads text+FRAMESxHEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH+text, got {text!r}"
        )
    return TokenLayout(int(found[1] or found[3] or 0), *parse_box(found[2]), text_first=not found[3])


def parse_box(text: str) -> Box:
    """Three numbers from ``FRAMESxROWSxCOLUMNS``.

    Raises:
        LayoutError: the text has another form.
    """
    found = re.fullmatch(r"(\d+)x(\d+)x(\d+)", text)
    if not found:
        raise LayoutError(f"a tile or window reads FRAMESxROWSxCOLUMNS, for example 4x4x8; got {text!r}")
    return int(found[1]), int(found[2]), int(found[3])


def format_box(box: Box) -> str:
    """``4x4x8``."""
    return "x".join(map(str, box))


def clipped(window: Box, tiling: Tiling) -> Box:
    """The window with no more tiles than there are."""
    frames, rows, columns = map(min, window, tiling.counts)
    return frames, rows, columns


def allowed_shares(tiling: Tiling, window: Box, block: int) -> torch.Tensor:
    """Share of allowed pairs in every block, text included, ``[M, M]`` float64."""
    length, text = tiling.layout.sequence_length, tiling.layout.text_length
    tokens = torch.cat([tiling.tokens(), torch.tensor([text])])  # text is a tile that sees and is seen by all
    visible = torch.nn.functional.pad(visible_tiles(tiling, window), (0, 1, 0, 1), value=True)
    ends, starts = tokens.cumsum(0), torch.arange(0, length, block)[:, None]
    inside = torch.minimum(ends, starts + block) - torch.maximum(ends - tokens, starts)
    inside = inside.clamp(min=0).double()  # tokens of every tile in every block
    lengths = block_lengths(length, block).double()
    return inside @ visible.double() @ inside.T / (lengths[:, None] * lengths)


def window_in_frame(tiling: Tiling, window: Box, place: tuple[int, int]) -> torch.Tensor:
    """Of the tokens of a frame, ``[height, width]``: 2 in the tile at a place, 1 in the rest of its window.

    Args:
        tiling (Tiling): tiles of the grid.
        window (Box): tiles along each axis that a tile sees.
        place (tuple[int, int]): row and column of the tile among the tiles of the frame.
    """
    (_, height, width), (_, tile_height, tile_width) = tiling.grid, tiling.tile
    tile_of_token = (torch.arange(height)[:, None] // tile_height) * tiling.counts[2]
    tile_of_token = tile_of_token + torch.arange(width) // tile_width
    tile_in_frame = tiling.places()[:, 1] * tiling.counts[2] + tiling.places()[:, 2]
    own = place[0] * tiling.counts[2] + place[1]
    first = int((tile_in_frame == own).nonzero()[0])
    seen = tile_in_frame[visible_tiles(tiling, window)[first]]
    return torch.isin(tile_of_token, seen).int() + (tile_of_token == own).int()


def draw(layout: TokenLayout, parameters: SlidingTileParameters, head: int, path: Path) -> float:
    """Save a picture: the window of a tile in the middle and in a corner, and the executed blocks.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        parameters (SlidingTileParameters): tile and window.
        head (int): head whose window is drawn, from 0.
        path (Path): picture to write; its suffix decides the format.

    Returns:
        float: executed density of that head, 0 to 1.

    Raises:
        ParameterError: tile, window or density do not fit the layout.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    block = parameters.block_size
    tiling = layout_tiling(layout, parameters)
    windows = layout_windows(tiling, parameters)
    window = windows[head % len(windows)]
    allowed, executed = allowed_density(tiling, window), executed_density(tiling, window, block)
    shares = allowed_shares(tiling, window, block)
    figure = Figure(figsize=(10, 6.4), layout="compressed")
    FigureCanvasAgg(figure)
    panels: Any = figure.subplot_mosaic(
        [["middle", "blocks"], ["corner", "blocks"]], width_ratios=[0.42, 0.58]
    )
    _, rows, columns = tiling.counts
    for name, place in (("middle", ((rows - 1) // 2, (columns - 1) // 2)), ("corner", (0, columns - 1))):
        axes = panels[name]
        axes.imshow(window_in_frame(tiling, window, place).numpy(), cmap="Blues", vmin=0, vmax=2.5)
        axes.set_xticks(torch.arange(0, layout.width, tiling.tile[2]).sub(0.5).tolist(), minor=True)
        axes.set_yticks(torch.arange(0, layout.height, tiling.tile[1]).sub(0.5).tolist(), minor=True)
        axes.grid(which="minor", color="0.7", linewidth=0.6)
        axes.tick_params(which="minor", length=0)
        axes.set_title(f"what a tile in the {name} sees of a frame", fontsize=10)
        axes.set_xlabel("token column")
        axes.set_ylabel("token row")
    blocks = panels["blocks"]
    executed_blocks = window_blocks(tiling, window, block)
    blocks.imshow(
        torch.where(executed_blocks, 0.25 + 0.75 * shares, 0.0).numpy(),
        cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest",
    )  # fmt: skip
    blocks.set_title(
        f"executed blocks, darker with more allowed pairs\nallowed {allowed:.3f}, executed {executed:.3f}",
        fontsize=10,
    )
    blocks.set_xlabel(f"key block of {block} tokens")
    blocks.set_ylabel(f"query block of {block} tokens")
    figure.suptitle(
        f"sliding-tile: {layout.describe()}\n"
        f"window {format_box(clipped(window, tiling))} of {format_box(tiling.counts)} "
        f"tiles, each {format_box(tiling.tile)} tokens (frames x rows x columns)",
        fontsize=10,
    )
    figure.savefig(path, dpi=100)
    return executed


def density_table() -> str:
    """Markdown table of windows with their allowed and executed densities, means over windows of heads."""
    lines = [
        "| model | tokens | set | block | tile | tiles | window | allowed pairs | executed |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for model, layout_text, rows in TABLE:
        layout = parse_layout(layout_text)
        for row in rows:
            values = preset_fields(row) if isinstance(row, str) else row
            name = f"preset `{row}`" if isinstance(row, str) else _describe(row)
            parameters = SlidingTileParameters.build("sliding-tile", values)
            tiling, block = layout_tiling(layout, parameters), parameters.block_size
            windows = [clipped(window, tiling) for window in layout_windows(tiling, parameters)]
            cells = [
                model,
                str(layout.sequence_length),
                name,
                str(block),
                format_box(tiling.tile),
                format_box(tiling.counts),
                ", ".join(map(format_box, windows)),
                f"{statistics.mean(allowed_density(tiling, window) for window in windows):.3f}",
                f"{statistics.mean(executed_density(tiling, window, block) for window in windows):.3f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _describe(values: dict[str, Any]) -> str:
    """What a row sets, but for the block size and for boxes, which have columns of their own."""
    shown = [name if name in ("tile", "window") else f"{name} {values[name]:g}" for name in values]
    return ", ".join(text for text in shown if not text.startswith("block_size")) or "default"


def preset_fields(name: str) -> dict[str, Any]:
    """What a preset says about tile and window.

    Raises:
        StrategyNotFoundError: no preset of that name.
    """
    values = installed().preset("sliding-tile", name).parameters
    return {field: value for field, value in values.items() if field in FIELDS}


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m plugins.sliding_tile.picture",
        description="Draw windows of tiles and the blocks they execute, or print densities.",
    )
    parser.add_argument(
        "--layout",
        default=DEFAULT_LAYOUT,
        help=f"text+FRAMESxHEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH+text, in tokens (default: {DEFAULT_LAYOUT})",
    )
    parser.add_argument("--output", type=Path, default=Path("sliding_tile.png"), help="picture to write")
    parser.add_argument("--preset", help="registered preset to start from")
    parser.add_argument("--head", type=int, default=0, help="head whose window is drawn (default: 0)")
    parser.add_argument(
        "--densities", action="store_true", help="print the table of densities and draw nothing"
    )
    parser.add_argument("--tile", metavar="FxRxC", help="tokens of a tile (default: chosen for the grid)")
    parser.add_argument(
        "--window", metavar="FxRxC", help="tiles that a tile sees (default: half of each axis)"
    )
    parser.add_argument("--density", help="largest executed density, instead of a window")
    parser.add_argument("--block-size", dest="block_size", help="tokens of a block (default: 128)")
    return parser


def parameters_of(arguments: argparse.Namespace) -> SlidingTileParameters:
    """Parameters from the command line, on top of the preset if one is named.

    Raises:
        LayoutError: a tile or window has another form.
        ParameterError: a value does not fit.
        StrategyNotFoundError: no preset of that name.
    """
    given = {name: getattr(arguments, name) for name in ("tile", "window", "density", "block_size")}
    given = {name: value for name, value in given.items() if value is not None}
    values = preset_fields(arguments.preset) if arguments.preset else {}
    if given.keys() & set(RULES):
        values = {name: value for name, value in values.items() if name not in RULES}
    values |= {name: parse_box(text) if name in ("tile", "window") else text for name, text in given.items()}
    return SlidingTileParameters.build("sliding-tile", values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m plugins.sliding_tile.picture``."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    if chosen.densities:
        print(density_table())
        return
    try:
        layout, parameters = parse_layout(chosen.layout), parameters_of(chosen)
        executed = draw(layout, parameters, chosen.head, chosen.output)
    except (SparseAttnError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{chosen.output}: {layout.describe()}, executed density {executed:.3f}")


if __name__ == "__main__":
    main()
