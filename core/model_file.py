"""ModelFile: what was measured on one model, as a checked JSON file for models of the same shape."""

import json
import re
from abc import abstractmethod
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from core.context import AttentionContext
from core.errors import LayoutError, ParameterError
from core.layout import TokenLayout


class ModelFile(BaseModel):
    """Base of the files that commands write for a model.

    A model is told from others by its layers, heads, head dimension and layout: ``model`` is for messages
    and not compared, since one model has many names (a hub's, folders, none at all).

    Args:
        model (str): name of the model that was measured.
        layout (dict, Optional): fields of its `TokenLayout`; None where it is not known.
        head_dim (int, Optional): head dimension; None where it is not known.
        prompts (list[str]): prompts that were measured.
        made (dict): device, dtype, versions, commit, date, seconds and command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    noun: ClassVar[str]  # with its article, for messages
    command: ClassVar[str]  # what writes such files

    model: str
    layout: dict[str, Any] | None = None
    head_dim: int | None = Field(default=None, ge=1)
    prompts: list[str] = Field(default_factory=list)
    made: dict[str, Any] = Field(default_factory=dict)

    @field_validator("layout")
    @classmethod
    def _check_layout(cls, layout: dict[str, Any] | None) -> dict[str, Any] | None:
        if layout is not None:
            try:
                TokenLayout(**layout)
            except (TypeError, LayoutError) as error:
                raise ValueError(f"not the fields of a TokenLayout: {error}") from None
        return layout

    @property
    @abstractmethod
    def size(self) -> tuple[int, int]:
        """Layers and heads."""

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read and check a file.

        Raises:
            ParameterError: it cannot be read, or is not of this kind.
        """
        try:
            return cls.model_validate(json.loads(path.read_text(encoding="utf-8")))
        except OSError as error:
            raise ParameterError(f"cannot read {_bare(cls.noun)} {path}: {error.strerror}") from None
        except (json.JSONDecodeError, UnicodeDecodeError):
            raise ParameterError(f"{path} is not {cls.noun}: not JSON") from None
        except ValidationError as error:
            fault = error.errors()[0]
            place = ".".join(str(part) for part in fault["loc"])
            reason = fault["msg"].removeprefix("Value error, ")
            raise ParameterError(f"{path} is not {cls.noun}: {place or 'file'}: {reason}") from None

    def save(self, path: Path) -> None:
        """Write the file, whole or not at all; each row of numbers on one line."""
        text = re.sub(r"\[[^][{}]*]", _join_lines, self.model_dump_json(indent=1))
        partial = path.with_name(path.name + ".new")
        partial.write_text(text + "\n", encoding="utf-8")
        partial.replace(path)

    def check_size(self, num_layers: int, num_heads: int | None) -> None:
        """Refuse a model of other layers or heads; ``num_heads`` is None where it is not known.

        Raises:
            ParameterError: they are not those of the file.
        """
        layers, heads = self.size
        if (num_layers, heads if num_heads is None else num_heads) != (layers, heads):
            given = f"{num_layers} layers" + ("" if num_heads is None else f" of {num_heads} heads")
            kind = _bare(self.noun)
            raise ParameterError(
                f"the {kind} is of {self.model}, {layers} layers of {heads} heads; this model has {given}; "
                f"run python -m {self.command} for it, or leave {kind} out"
            )

    def check_call(self, query: torch.Tensor, context: AttentionContext) -> None:
        """Refuse a call of another shape.

        Args:
            query (Tensor): ``[B, H, N, D]``.
            context (AttentionContext): the call.

        Raises:
            ParameterError: layers or heads, or layout or head dimension where they are known, are not those
                of the file.
        """
        own_layout = context.layout if self.layout is None else TokenLayout(**self.layout)
        head_dim = self.head_dim or query.shape[3]
        asked = (context.layout, context.num_layers, query.shape[1], query.shape[3])
        if asked != (own_layout, *self.size, head_dim):
            kind = _bare(self.noun)
            raise ParameterError(
                f"the {kind} is of {self.model}: {own_layout.describe()}, {self.size[0]} layers of "
                f"{self.size[1]} heads of {head_dim}; this call has {context.layout.describe()}, "
                f"{context.num_layers} layers of {query.shape[1]} heads of {query.shape[3]}; run "
                f"python -m {self.command} for this model and size, or leave {kind} out"
            )


def _bare(noun: str) -> str:
    """``calibration`` of ``a calibration``."""
    return noun.split(maxsplit=1)[1]


def _join_lines(match: re.Match[str]) -> str:
    return re.sub(r"\n\s*", " ", match[0])
