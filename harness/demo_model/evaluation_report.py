"""Lays the evaluation out as Markdown."""

from pathlib import Path

PARTS = ("all", "colour", "shape", "motion", "ground", "size")


def write_markdown(report: dict, file: Path) -> None:
    """Writes `report`, as `evaluate` fills it, to `file`; sections that were not measured are left out."""
    lines = ["# Evaluation of the demo model", ""]
    if "weights" in report:
        weights = report["weights"]
        lines += [f"Weights folder: {weights['bytes']:,} bytes (limit {weights['limit_bytes']:,}).", ""]
    for section, layout in (("quality", _quality), ("attention", _attention), ("speed", _speed)):
        if section in report:
            lines += [*layout(report[section]), _footer(report[section]), ""]
    file.write_text("\n".join(lines))


def percent(value: float) -> str:
    """Formats a fraction, for example 0.979 as "97.9 %"."""
    return f"{100 * value:.1f} %"


def _footer(section: dict) -> str:
    settings = ", ".join(f"{name} {value}" for name, value in section["environment"].items())
    return f"Measured on: {settings}; {section['seconds']} s."


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    ruler = ["---"] + ["---:"] * (len(head) - 1)
    return [f"| {' | '.join(row)} |" for row in (head, ruler, *rows)] + [""]


def _quality(section: dict) -> list[str]:
    vae = section["autoencoder"]
    lines = [
        "## Quality",
        "",
        f"Autoencoder, {vae['clips']} held-out clips through the 3-D network: "
        f"{vae['psnr_db']:.1f} dB over all pixels, "
        f"{vae['psnr_object_db']:.1f} dB on object pixels.",
        "",
        "The judge on rendered clips, where the truth is known:",
        "",
    ]
    names = {
        "judge_one_object": "one object",
        "judge_two_objects": "two objects",
        "judge_camera": "camera pan",
    }
    rows = [_row(label, section[key], camera=key == "judge_camera") for key, label in names.items()]
    lines += _table(["rendered", "clips", *PARTS, "camera"], rows)
    lines += [
        "Generated clips of captions whose (colour, shape, motion, ground) combination training never saw:",
        "",
    ]
    rows = []
    for steps, sets in section["captions"].items():
        rows += [
            _row(f"{name.replace('_', ' ')}, {steps} steps", value, name == "camera_pan")
            for name, value in sets.items()
        ]
    return lines + _table(["generated", "clips", *PARTS, "camera"], rows)


def _row(label: str, figures: dict, camera: bool) -> list[str]:
    return [
        label,
        str(figures["clips"]),
        *(percent(figures[part]) for part in PARTS),
        percent(figures["camera"]) if camera else "",
    ]


def _attention(section: dict) -> list[str]:
    labels = [f"best {100 * fraction:.0f} %" for fraction in section["fractions"]]
    lines = [
        "## Attention mass",
        "",
        f"Mean softmax mass that the best key blocks of {section['block_tokens']} tokens hold "
        f"for a query block of the same size, "
        f"over {len(section['prompts'])} captions and all denoising steps. "
        "Even attention would hold 0.10, 0.25 and 0.50.",
        "",
    ]
    rows = [
        [f"layer {layer}, head {head}", *(f"{value:.2f}" for value in masses)]
        for layer, heads in enumerate(section["mass"])
        for head, masses in enumerate(heads)
    ]
    rows.append(["mean", *(f"{value:.2f}" for value in section["mean"])])
    return lines + _table(["", *labels], rows)


def _speed(section: dict) -> list[str]:
    seconds = ", ".join(f"{value:.1f}" for value in section["seconds_per_video"])
    same = "identical bit for bit" if section["same_seed_identical"] else "DIFFERENT"
    return [
        "## Speed",
        "",
        f"Seconds per video at the default settings: {seconds}. Two runs of one seed: {same}.",
        "",
    ]
