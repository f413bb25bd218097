"""Turns trained modules into the shipped folder: float16 safetensors that plain `from_pretrained` loads.

python -m harness.demo_model.export --weights DIR     writes the model card of a folder again, from the report
"""

import argparse
import json
from pathlib import Path

import torch
from diffusers import CogVideoXPipeline

from harness.demo_model.defaults import WEIGHTS_DIR
from harness.demo_model.model_card import write_model_card
from harness.demo_model.pipeline import build_scheduler, build_tokenizer

SIZE_LIMIT_BYTES = 24_000_000


def export_pipeline(vae, text_encoder, transformer, folder: Path) -> int:
    """Writes the pipeline in half precision, to be computed in float32 after loading.

    Args:
        vae: trained autoencoder.
        text_encoder: trained T5 encoder.
        transformer: trained transformer, positions included.
        folder: where to write; created if absent.

    Returns:
        The size of the folder in bytes.

    Raises:
        ValueError: the folder is larger than 24,000,000 bytes.
    """
    modules = {"vae": vae, "text_encoder": text_encoder, "transformer": transformer}
    copies = {name: _half_copy(module) for name, module in modules.items()}
    pipeline = CogVideoXPipeline(tokenizer=build_tokenizer(), scheduler=build_scheduler(), **copies)
    pipeline.save_pretrained(folder)
    _compute_in_float32(folder / "text_encoder" / "config.json")
    write_model_card(folder)
    size = folder_bytes(folder)
    if size > SIZE_LIMIT_BYTES:
        raise ValueError(f"expected at most {SIZE_LIMIT_BYTES} bytes in {folder}, got {size}")
    return size


def folder_bytes(folder: Path) -> int:
    """Returns the sum of the sizes of all files under `folder`, in bytes."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _half_copy(module):
    copy = (
        type(module)(module.config)
        if not hasattr(module, "from_config")
        else type(module).from_config(module.config)
    )
    copy.load_state_dict({name: value.detach().cpu() for name, value in module.state_dict().items()})
    return copy.to(torch.float16)


def _compute_in_float32(config_file: Path) -> None:
    """transformers takes the dtype to compute in from the config; diffusers always starts in float32."""
    config = json.loads(config_file.read_text())
    config["dtype"] = "float32"
    config_file.write_text(json.dumps(config, indent=2) + "\n")


def main() -> None:
    """Writes the model card from the committed report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", type=Path, default=WEIGHTS_DIR, help="folder that holds the pipeline")
    folder = parser.parse_args().weights
    write_model_card(folder)
    print(f"{folder}: {folder_bytes(folder)} bytes of {SIZE_LIMIT_BYTES}")


if __name__ == "__main__":
    main()
