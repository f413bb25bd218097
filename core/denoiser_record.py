"""DenoiserRecord: what a denoiser is, so that files measured on one are not used with another."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ConfigDict

# Sizes that inputs may have, and dropout: the same weights are loaded with other values.
FREE = {
    "dropout",
    "max_text_seq_length",
    "rope_max_seq_len",
    "sample_frames",
    "sample_height",
    "sample_width",
}


class DenoiserRecord(BaseModel):
    """A denoiser's class and the facts of its configuration that decide what its weights are for.

    Those are the arguments of its constructor, without sizes that inputs may have and without dropout. Names,
    paths, versions and quantisation are no such arguments. Weights are not looked at: a fine-tune with the
    same configuration has the same record.

    Args:
        kind (str): name of the class.
        config (dict): arguments of its constructor, as JSON has them.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: str
    config: dict[str, Any]

    @classmethod
    def of(cls, denoiser: Any) -> "DenoiserRecord":
        """The record of a denoiser; ``config`` is empty for one without a configuration of diffusers."""
        config = getattr(denoiser, "config", None)
        own = config if isinstance(config, Mapping) else {}
        names = inspect.signature(type(denoiser).__init__).parameters.keys() - FREE
        facts = {name: own[name] for name in sorted(names & own.keys())}
        return cls(kind=type(denoiser).__name__, config=json.loads(json.dumps(facts, default=str)))

    def differing(self, other: "DenoiserRecord") -> list[str]:
        """Names of the facts that both have and that differ.

        What only one of them has is no difference: versions of diffusers add arguments.
        """
        both = self.config.keys() & other.config.keys()
        return sorted(name for name in both if self.config[name] != other.config[name])

    def describe(self, names: list[str]) -> str:
        """One phrase for messages: ``CogVideoXTransformer3DModel with in_channels 16``."""
        facts = ", ".join(f"{name} {self.config[name]}" for name in names)
        return f"{self.kind} with {facts}" if facts else self.kind


@dataclass(frozen=True)
class InstalledDenoiser:
    """A denoiser that is about to get a strategy, for `AttentionStrategy.check_model`.

    Args:
        record (DenoiserRecord): what it is.
        num_layers (int): attention layers that the strategy gets.
        num_heads (int, Optional): query heads of a layer; None where the model does not tell.
        source (str, Optional): hub id or folder that it was loaded from, for messages.
    """

    record: DenoiserRecord
    num_layers: int
    num_heads: int | None
    source: str | None

    @classmethod
    def of(cls, denoiser: Any, num_layers: int, num_heads: int | None) -> "InstalledDenoiser":
        """Facts of a denoiser with so many attention layers and heads."""
        source = getattr(getattr(denoiser, "config", None), "_name_or_path", None)
        return cls(DenoiserRecord.of(denoiser), num_layers, num_heads, str(source) if source else None)
