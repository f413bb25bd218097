"""Teaches the T5 encoder word order: every word of an object's phrase must know all of that object.

Trained jointly from scratch, the encoder learns no order and attributes of two objects get swapped. A few
hundred steps of
direct supervision, from a bias towards near words, prevent that. Shape legend: B captions, S = 16 tokens.
"""

import random
from collections.abc import Callable

import torch
from torch import nn
from transformers import T5EncoderModel

from harness.demo_model.captions import (
    CAMERAS,
    COLOURS,
    GROUNDS,
    MOTIONS,
    SHAPES,
    SIZES,
    Scene,
    caption,
    sample_scene,
    vocabulary,
)
from harness.demo_model.defaults import DEMO_DEFAULTS
from harness.demo_model.training import StageClock, adamw, set_learning_rate

IGNORED = -100
_CLASSES = {
    "slot": 2,
    "size": len(SIZES) + 1,
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "motion": len(MOTIONS),
    "ground": len(GROUNDS),
    "camera": len(CAMERAS) + 1,
}
_WORD_IDS = {word: index for index, word in enumerate(vocabulary())}


def encode_captions(scenes: list[Scene]) -> torch.Tensor:
    """Returns token ids `(B, 16)`, int64, padded with 0: what the shipped tokenizer gives for the
    captions.
    """
    ids = torch.zeros(len(scenes), DEMO_DEFAULTS.max_sequence_length, dtype=torch.long)
    for row, scene in zip(ids, scenes, strict=False):
        words = [_WORD_IDS[word] for word in caption(scene).split()]
        row[: len(words)] = torch.tensor(words)
    return ids


def binding_labels(scenes: list[Scene]) -> torch.Tensor:
    """Returns the classes each position must know, `(B, 16, 7)` int64 in the order of the heads; -100 is
    unused.
    """
    labels = torch.full((len(scenes), DEMO_DEFAULTS.max_sequence_length, len(_CLASSES)), IGNORED)
    for row, scene in zip(labels, scenes, strict=False):
        position = 0
        for slot, item in enumerate(scene.objects):
            words = 3 + bool(item.size) + len(item.motion.split())
            size = SIZES.index(item.size) + 1 if item.size else 0
            known = (
                slot,
                size,
                COLOURS.index(item.colour),
                SHAPES.index(item.shape),
                MOTIONS.index(item.motion),
            )
            row[position : position + words, :5] = torch.tensor(known)
            position += words + 1  # the "and" that follows
        camera = (*CAMERAS, None).index(scene.camera)
        row[:, 5:] = torch.tensor((GROUNDS.index(scene.ground), camera))
    return labels


class BindingHeads(nn.Module):
    """Linear readers of each attribute at every position; used in training only."""

    def __init__(self, width: int):
        super().__init__()
        self.heads = nn.ModuleDict({name: nn.Linear(width, count) for name, count in _CLASSES.items()})

    def loss(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Returns the mean cross entropy of hidden states `(B, 16, D)` against labels `(B, 16, 7)`."""
        total = hidden.new_zeros((), dtype=torch.float32)
        for index, head in enumerate(self.heads.values()):
            logits = head(hidden).flatten(0, 1).float()
            total = total + nn.functional.cross_entropy(
                logits, labels[..., index].flatten(), ignore_index=IGNORED
            )
        return total / len(self.heads)

    @torch.no_grad()
    def accuracy(self, hidden: torch.Tensor, labels: torch.Tensor) -> float:
        """Returns the fraction of captions (0 to 1) of which every attribute is read right at every
        position.
        """
        right = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
        for index, head in enumerate(self.heads.values()):
            wanted = labels[..., index]
            right &= ((head(hidden).argmax(-1) == wanted) | (wanted == IGNORED)).all(1)
        return right.float().mean().item()


@torch.no_grad()
def prefer_near_words(encoder: T5EncoderModel) -> None:
    """Initialises the relative position bias so that heads look near, one of them left and one right."""
    bias = encoder.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight  # (64, heads)
    distance = torch.arange(32, device=bias.device).float()
    for head, (left, right) in enumerate(((1.0, 1.0), (0.3, 0.3), (0.4, 3.0), (3.0, 0.4))):
        bias[:32, head] = -left * distance
        bias[32:, head] = -right * distance


def random_scenes(
    rng: random.Random, count: int, pair_fraction: float, camera_probability: float = 0.2
) -> list[Scene]:
    """Draws training scenes, a fraction `pair_fraction` (0 to 1) of them with two objects."""
    return [sample_scene(rng, 1 + (rng.random() < pair_fraction), camera_probability) for _ in range(count)]


def train_text(
    encoder: T5EncoderModel,
    heads: BindingHeads,
    seconds: float,
    max_steps: int,
    seed: int,
    log: Callable[[str], None],
) -> float:
    """Trains encoder and heads in place until the stage ends.

    Returns:
        The fraction of 512 fresh captions that are read right at every position, 0 to 1.
    """
    device = encoder.device
    rng = random.Random(seed)
    prefer_near_words(encoder)
    optimizer = adamw([*encoder.parameters(), *heads.parameters()], 2e-3)
    clock = StageClock(seconds, max_steps)
    running = True
    while running:
        set_learning_rate([optimizer], clock, warmup=20, flat=0.6)
        scenes = random_scenes(rng, 256, 0.7)
        hidden = encoder(encode_captions(scenes).to(device))[0]
        loss = heads.loss(hidden, binding_labels(scenes).to(device))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
        optimizer.step()
        if clock.step % 50 == 0:
            log(f"text: step {clock.step}, loss {loss.item():.4f}")
        running = clock.tick()
    scenes = random_scenes(rng, 512, 0.7)
    with torch.no_grad():
        hidden = encoder(encode_captions(scenes).to(device))[0]
    accuracy = heads.accuracy(hidden, binding_labels(scenes).to(device))
    log(f"text: {clock.step} steps in {clock.elapsed:.0f} s, {accuracy:.1%} of captions read right")
    return accuracy
