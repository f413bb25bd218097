"""Pictures and tables of the radial mask: what ``python -m plugins.radial.mask`` runs."""

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from core.errors import LayoutError, SparseAttnError
from core.layout import TokenLayout
from core.registry import installed
from kernels_common.strategy import BlockSparseParameters
from plugins.radial.mask import allowed_shares, pair_widths
from plugins.radial.strategy import RadialParameters, layout_mask, scene_frames
from plugins.radial.widths import element_density

# Fields that decide how attention is run, not which pairs the mask keeps.
RUN_FIELDS = (set(BlockSparseParameters.model_fields) - {"block_size"}) | {
    "sparsity_type",
    "use_sage_attention",
}
MASK_FIELDS = tuple(name for name in RadialParameters.model_fields if name not in RUN_FIELDS)

DEFAULT_LAYOUT = "226+13x30x45"

# Model, layout, block size, and the (rule, decay_factor, sink) of its rows.
TABLE = (
    (
        "CogVideoX, 49 frames",
        "226+13x30x45",
        128,
        (
            ("cogvideox", 1.0, True),
            ("cogvideox", 1.0, False),
            ("cogvideox", 0.2, False),
            ("official", 1.0, True),
            ("official", 0.2, True),
            ("paper", 1.0, True),
            ("paper", 1.0, False),
        ),
    ),
    (
        "CogVideoX1.5, 81 frames",
        "226+11x48x85",
        128,
        (
            ("cogvideox", 1.0, True),
            ("cogvideox", 1.0, False),
            ("cogvideox", 0.2, False),
            ("official", 1.0, True),
            ("official", 0.2, True),
            ("paper", 1.0, True),
        ),
    ),
    (
        "demo model",
        "16+17x12x20",
        64,
        (
            ("cogvideox", 1.0, True),
            ("cogvideox", 2.0, True),
            ("cogvideox", 1.0, False),
            ("official", 1.0, True),
            ("paper", 1.0, True),
            ("paper", 0.5, True),
        ),
    ),
)


def parse_layout(text: str) -> TokenLayout:
    """Layout from ``[text+]FRAMESxHEIGHTxWIDTH[+text]``, for example ``226+13x30x45``; text in tokens.

    Raises:
        LayoutError: the text has another form.
    """
    found = re.fullmatch(r"(?:(\d+)\+)?(\d+)x(\d+)x(\d+)(?:\+(\d+))?", text)
    if not found or (found[1] and found[5]):
        raise LayoutError(
            f"a layout reads text+FRAMESxHEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH+text, got {text!r}"
        )
    return TokenLayout(
        int(found[1] or found[5] or 0), int(found[2]), int(found[3]), int(found[4]), text_first=not found[5]
    )


def layout_pairs(layout: TokenLayout, parameters: RadialParameters) -> torch.Tensor:
    """Half-width of every frame pair, ``[F, F]`` int64."""
    return pair_widths(
        layout,
        rule=parameters.rule,
        decay_factor=parameters.decay_factor,
        block=parameters.block_size,
        sink=parameters.sink,
        visible=scene_frames(layout, parameters),
    )


def draw(layout: TokenLayout, parameters: RadialParameters, path: Path) -> float:
    """Save a picture: the allowed share of every block, and the blocks that are executed.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        parameters (RadialParameters): the mask's parameters.
        path (Path): picture to write; its suffix decides the format.

    Returns:
        float: executed density, 0 to 1.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    block_size = (parameters.block_size, parameters.block_size)
    pairs = layout_pairs(layout, parameters)
    shares = torch.cat([share for _, share in allowed_shares(layout, pairs, block_size)])
    mask = layout_mask(layout, parameters)
    executed = float(mask.density())
    allowed = element_density(pairs, layout.tokens_per_frame, layout.text_length)
    figure = Figure(figsize=(10, 5.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = ((shares, f"allowed pairs, density {allowed:.3f}"), (mask.to_blocks()[0, 0], None))
    for axes, (values, title) in zip(figure.subplots(1, 2), panels, strict=True):
        axes.imshow(values.numpy(), cmap="Blues", vmin=0, vmax=1.25, interpolation="nearest")
        axes.set_title(title or f"executed blocks, density {executed:.3f}", fontsize=10)
        axes.set_xlabel(f"key block of {block_size[1]} tokens")
        axes.set_ylabel(f"query block of {block_size[0]} tokens")
    figure.suptitle(f"radial: {layout.describe()}\n{describe(parameters)}", fontsize=10)
    figure.savefig(path, dpi=100)
    return executed


def describe(parameters: RadialParameters) -> str:
    """Parameters of the mask that matter here: those that are always shown, and those that were changed."""
    shown = {"rule", "decay_factor", "sink", "keep", "block_size"}
    if parameters.keep == "fraction":
        shown.add("threshold")
    changed = {name for name in MASK_FIELDS if getattr(parameters, name) != default_of(name)}
    return ", ".join(f"{name}={getattr(parameters, name)}" for name in MASK_FIELDS if name in shown | changed)


def default_of(name: str) -> Any:
    """Default of one parameter."""
    return RadialParameters.model_fields[name].default


def density_table() -> str:
    """Markdown table of element and executed densities for three models."""
    lines = [
        "| model | tokens | block | rule | decay_factor | sink | allowed pairs | cover | fraction 0.25 "
        "| fraction 0.5 | strict |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for model, layout_text, block, rows in TABLE:
        layout = parse_layout(layout_text)
        for rule, decay_factor, sink in rows:
            values = {"rule": rule, "decay_factor": decay_factor, "sink": sink, "block_size": block}
            cells = [f"{density:.3f}" for density in densities(layout, values)]
            start = [model, str(layout.sequence_length), str(block), rule, f"{decay_factor:g}"]
            lines.append("| " + " | ".join([*start, "yes" if sink else "no", *cells]) + " |")
    return "\n".join(lines)


def densities(layout: TokenLayout, values: dict[str, Any]) -> list[float]:
    """Allowed density, then the executed one of cover, fraction 0.25, fraction 0.5 and strict."""
    pairs = layout_pairs(layout, RadialParameters.build("radial", values))
    found = [element_density(pairs, layout.tokens_per_frame, layout.text_length)]
    for keep, threshold in (("cover", 0.5), ("fraction", 0.25), ("fraction", 0.5), ("strict", 0.5)):
        parameters = RadialParameters.build("radial", values | {"keep": keep, "threshold": threshold})
        found.append(float(layout_mask(layout, parameters).density()))
    return found


def build_parser() -> argparse.ArgumentParser:
    """The command line: one option for each parameter that shapes the mask."""
    parser = argparse.ArgumentParser(
        prog="python -m plugins.radial.mask", description="Draw the radial mask, or print its densities."
    )
    parser.add_argument(
        "--layout",
        default=DEFAULT_LAYOUT,
        help=f"text+FRAMESxHEIGHTxWIDTH or FRAMESxHEIGHTxWIDTH+text, in tokens (default: {DEFAULT_LAYOUT})",
    )
    parser.add_argument("--output", type=Path, default=Path("radial_mask.png"), help="picture to write")
    parser.add_argument("--preset", help="registered preset to start from")
    parser.add_argument(
        "--densities", action="store_true", help="print the table of densities and draw nothing"
    )
    group = parser.add_argument_group("parameters of the mask")
    for name in MASK_FIELDS:
        options = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        description = RadialParameters.model_fields[name].description
        group.add_argument(
            *options, dest=name, metavar="VALUE", help=f"{description} (default: {default_of(name)})"
        )
    return parser


def parameters_of(arguments: argparse.Namespace) -> RadialParameters:
    """Parameters from the command line, on top of the preset if one is named.

    Raises:
        ParameterError: a value does not fit.
        StrategyNotFoundError: no preset of that name.
    """
    values: dict[str, Any] = {}
    if arguments.preset:
        preset = installed().preset("radial", arguments.preset).parameters
        values = {name: value for name, value in preset.items() if name in MASK_FIELDS}
    for name in MASK_FIELDS:
        given = getattr(arguments, name)
        if given is not None:
            is_list = name in ("scene_boundaries", "scene_adjacency")
            values[name] = json.loads(given) if is_list or name == "block_size" else given
    return RadialParameters.build("radial", values)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``python -m plugins.radial.mask``."""
    parser = build_parser()
    chosen = parser.parse_args(arguments)
    if chosen.densities:
        print(density_table())
        return
    try:
        layout, parameters = parse_layout(chosen.layout), parameters_of(chosen)
        executed = draw(layout, parameters, chosen.output)
    except (SparseAttnError, OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(f"{chosen.output}: {layout.describe()}, executed density {executed:.3f}")
