"""Trains the demo model.

    python -m harness.demo_model.train --output DIR                       everything, 18 minutes on one H200
    python -m harness.demo_model.train --output DIR --stage vae           one stage: vae, text or transformer
    python -m harness.demo_model.train --output DIR --resume DIR          go on from a checkpoint or from
    exported weights
    python -m harness.demo_model.train --output DIR --smoke               every stage for a few steps, on
    any CPU

The transformer is trained first on a few frames of each clip, then on all of them. DIR/weights holds the
exported pipeline
after every checkpoint.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path

import torch

from harness.demo_model.dataset import LatentClips, build_latent_clips
from harness.demo_model.export import export_pipeline
from harness.demo_model.pipeline import build_text_encoder, build_transformer, build_vae
from harness.demo_model.text_binding import BindingHeads, train_text
from harness.demo_model.training import AveragedWeights
from harness.demo_model.transformer import (
    TrainableTransformer,
    TransformerTraining,
    compile_blocks,
    train_transformer,
)
from harness.demo_model.vae import VaeTraining, prepare_vae, train_vae

STAGES = ("vae", "text", "transformer", "warm", "all")


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; `arguments` replaces `sys.argv` in tests."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="folder for checkpoints and exported weights"
    )
    parser.add_argument("--stage", choices=STAGES, default="all", help="warm only fills the compiler's cache")
    parser.add_argument(
        "--resume", type=Path, help="folder of a checkpoint or of an exported pipeline to start from"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae-seconds", type=float, default=110, help="length of the autoencoder stage")
    parser.add_argument("--text-steps", type=int, default=300, help="steps of the word order stage")
    parser.add_argument("--clips", type=int, default=24000, help="training clips for the transformer")
    parser.add_argument(
        "--pair-fraction", type=float, default=0.45, help="fraction of clips with two objects"
    )
    parser.add_argument("--sparse-seconds", type=float, default=120, help="transformer on 5 of 17 frames")
    parser.add_argument("--seconds", type=float, default=690, help="transformer on all frames")
    parser.add_argument(
        "--learning-rate", type=float, default=1.5e-3, help="peak rate of the transformer's first stage"
    )
    parser.add_argument("--save-every", type=float, default=150, help="seconds between checkpoints")
    parser.add_argument("--smoke", action="store_true", help="a few tiny steps of every stage")
    parsed = parser.parse_args(arguments)
    if parsed.smoke:
        parsed.text_steps, parsed.clips = 2, 2
    return parsed


def _chosen(options: argparse.Namespace) -> dict:
    """Returns the numbers that decide what a run does; folders are left out."""
    names = (
        "stage",
        "seed",
        "vae_seconds",
        "text_steps",
        "clips",
        "pair_fraction",
        "sparse_seconds",
        "seconds",
        "learning_rate",
    )
    return {name: getattr(options, name) for name in names}


class Trainer:
    """The modules in training, and what the command line asked for."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.started = time.monotonic()
        torch.manual_seed(options.seed)
        self.vae = build_vae().to(self.device)
        prepare_vae(self.vae)
        depth = 1 if options.smoke else 8
        text_encoder = build_text_encoder()
        heads = BindingHeads(text_encoder.config.d_model)
        self.model = TrainableTransformer(build_transformer(num_layers=depth), text_encoder, heads).to(
            self.device
        )
        self.model.initialise()
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "CPU"
        self.record = {"seed": options.seed, "device": name, "torch": torch.__version__, "stages": {}}
        if options.resume:
            self._resume(options.resume)
        arguments = [f"--{key.replace('_', '-')} {value}" for key, value in _chosen(options).items()]
        self.record["command"] = " ".join(["python -m harness.demo_model.train --output DIR", *arguments])
        options.output.mkdir(parents=True, exist_ok=True)

    def log(self, line: str) -> None:
        """Prints a progress line with the seconds since the start."""
        print(f"[{time.monotonic() - self.started:6.0f} s] {line}", flush=True)

    def run(self) -> None:
        """Runs the chosen stage, or all of them, and exports."""
        stage = self.options.stage
        if stage == "warm":
            return self._warm()
        if stage in ("vae", "all"):
            settings = VaeTraining(seconds=self.options.vae_seconds)
            if self.options.smoke:
                settings = VaeTraining(max_steps=2, num_frames=2, batch_size=1)
            self._timed("vae", lambda: train_vae(self.vae, settings, self.options.seed + 1, self.log))
            self.save()
        if stage in ("text", "all"):
            text = (
                self.model.text_encoder,
                self.model.heads,
                120.0,
                self.options.text_steps,
                self.options.seed + 2,
            )
            self._timed("text", lambda: train_text(*text, self.log))
            self.save()
        if stage in ("transformer", "all"):
            self._train_transformer()
        self.save()
        return None

    def _train_transformer(self) -> None:
        options = self.options
        rate = options.learning_rate
        clips = build_latent_clips(self.vae, options.clips, options.pair_fraction, options.seed + 3, self.log)
        self.log(f"data: {len(clips.latents)} clips, spread {clips.latents[:64].float().std().item():.3f}")
        average = AveragedWeights(self.model, 0.995)
        if self.device.type == "cuda":
            compile_blocks(self.model)
        sparse = TransformerTraining(options.sparse_seconds, None, 5, 64, rate, flat=0.5, average_decay=0.995)
        full = TransformerTraining(options.seconds, None, None, 32, 0.6 * rate)
        if options.smoke:
            sparse = TransformerTraining(60, 2, 2, 2)
            full = TransformerTraining(60, 2, None, 1)
        for name, settings in (("sparse", sparse), ("full", full)):
            if settings.seconds > 0:
                self._timed(name, partial(self._stage, settings, average, clips))
        average.swap()

    def _stage(self, settings: TransformerTraining, average: AveragedWeights, clips: LatentClips) -> None:
        def checkpoint(_: float) -> None:
            average.swap()
            self.save()
            average.swap()

        timer = self.options.save_every
        train_transformer(
            self.model, average, clips, settings, self.log, on_timer=checkpoint, timer_seconds=timer
        )

    def _warm(self) -> None:
        """Compiles the blocks for both shapes on random clips, so that a later process finds them cached."""
        clips = LatentClips(
            torch.randn(64, 17, 12, 24, 40, device=self.device).half(),
            torch.zeros(64, 16, dtype=torch.long, device=self.device),
            torch.zeros(64, 16, 7, dtype=torch.long, device=self.device),
        )
        compile_blocks(self.model)
        for frames, batch in ((5, 64), (None, 32)):
            settings = TransformerTraining(300, 2, frames, batch)
            train_transformer(self.model, AveragedWeights(self.model, 0.9), clips, settings, self.log)

    def _timed(self, name: str, stage) -> None:
        start = time.monotonic()
        stage()
        self.record["stages"][name] = {"seconds": round(time.monotonic() - start, 1)}

    def save(self) -> None:
        """Writes checkpoint and exported weights; a killed run leaves the previous checkpoint whole."""
        folder = self.options.output
        self.model.store_positions()
        state = {"vae": self.vae.state_dict(), "model": self.model.state_dict(), "record": self.record}
        torch.save(state, folder / "checkpoint.tmp")
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")
        size = export_pipeline(self.vae, self.model.text_encoder, self.model.transformer, folder / "weights")
        (folder / "training.json").write_text(json.dumps(self.record, indent=2) + "\n")
        self.log(f"saved, {size} bytes of weights")

    def _resume(self, folder: Path) -> None:
        if (folder / "checkpoint.pt").exists():
            state = torch.load(folder / "checkpoint.pt", map_location=self.device, weights_only=True)
            self.vae.load_state_dict(state["vae"])
            self.model.load_state_dict(state["model"])
            self.record = state["record"]
            return
        from diffusers import CogVideoXPipeline

        pipeline = CogVideoXPipeline.from_pretrained(folder)
        self.vae.load_state_dict(pipeline.vae.state_dict())
        self.model.text_encoder.load_state_dict(pipeline.text_encoder.state_dict())
        self.model.transformer.load_state_dict(pipeline.transformer.state_dict())
        with torch.no_grad():
            self.model.positions.copy_(pipeline.transformer.patch_embed.pos_embedding[0])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command line."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_flash_sdp(
        False
    )  # leaves cuDNN attention, the fastest here forward and backward
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    Trainer(parse_arguments(arguments)).run()


if __name__ == "__main__":
    main()
