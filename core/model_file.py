"""ModelFile: what was measured on one model, as a checked JSON file that knows the model."""

import json
import re
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from core.context import AttentionContext
from core.denoiser_record import DenoiserRecord, InstalledDenoiser
from core.errors import LayoutError, ParameterError
from core.layout import TokenLayout


class ModelFile(BaseModel):
    """Base of the files that commands write for a model.

    A model is told from others by its denoisers' classes and configurations, and by layers, heads, head
    dimension and the grid of its tokens. ``model`` is for messages and not compared, since one model has many
    names (a hub's, folders, none at all); neither is the number of text tokens, on which values per head do
    not depend.

    Args:
        model (str): name of the model that was measured.
        denoisers (list[DenoiserRecord], Optional): what its denoisers are, in the order of `find_denoisers`;
            None where it is not known, as in files of earlier versions.
        layout (dict, Optional): fields of its `TokenLayout`; None where it is not known.
        head_dim (int, Optional): head dimension; None where it is not known.
        prompts (list[str]): prompts that were measured.
        made (dict): device, dtype, versions, commit, date, seconds and command.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    noun: ClassVar[str]  # with its article, for messages
    command: ClassVar[str]  # what writes such files

    model: str
    denoisers: list[DenoiserRecord] | None = Field(default=None, min_length=1)
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

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Refuse another model, before it gets a strategy with this file.

        Args:
            denoisers (Sequence[InstalledDenoiser]): all of the model, in the order of `find_denoisers`.

        Raises:
            ParameterError: class or configuration of a denoiser, their number, layers or heads are not those
                of the file, as far as it knows them. A fine-tune with the same configuration passes.
        """
        for one in denoisers:
            self._check_size(one)
        if self.denoisers is not None:
            self._check_records(self.denoisers, denoisers)

    def _check_records(self, own: Sequence[DenoiserRecord], denoisers: Sequence[InstalledDenoiser]) -> None:
        if len(own) != len(denoisers):
            self._refuse(
                f"whose denoisers are {_counted(own)}",
                f"{_named(denoisers[0])} has {_counted([one.record for one in denoisers])}",
            )
        for record, one in zip(own, denoisers, strict=True):
            names = record.differing(one.record)
            if names or record.kind != one.record.kind:
                self._refuse(
                    f"a {record.describe(names)}", f"{_named(one)} is a {one.record.describe(names)}"
                )

    def _check_size(self, one: InstalledDenoiser) -> None:
        layers, heads = self.size
        if (one.num_layers, heads if one.num_heads is None else one.num_heads) != (layers, heads):
            of_heads = "" if one.num_heads is None else f" of {one.num_heads} heads"
            self._refuse(
                f"{layers} layers of {heads} heads", f"{_named(one)} has {one.num_layers} layers{of_heads}"
            )

    def _refuse(self, own: str, other: str) -> NoReturn:
        kind = _bare(self.noun)
        raise ParameterError(
            f"the {kind} is of {self.model}, {own}; {other}; run python -m {self.command} for it, or leave "
            f"{kind} out"
        )

    def check_call(self, query: torch.Tensor, context: AttentionContext) -> None:
        """Refuse a call of another shape; the number of text tokens may be another.

        Args:
            query (Tensor): ``[B, H, N, D]``.
            context (AttentionContext): the call.

        Raises:
            ParameterError: layers or heads, or grid, place of the text or head dimension where they are
                known, are not those of the file.
        """
        layout = context.layout if self.layout is None else TokenLayout(**self.layout)
        head_dim = self.head_dim or query.shape[3]
        own = (_grid(layout), *self.size, head_dim)
        asked = (_grid(context.layout), context.num_layers, query.shape[1], query.shape[3])
        if asked != own:
            kind = _bare(self.noun)
            raise ParameterError(
                f"the {kind} is of {self.model}: {_shape(*own)}; this call has {_shape(*asked)}; run python "
                f"-m {self.command} for this model and size, or leave {kind} out"
            )


def _grid(layout: TokenLayout) -> str:
    place = "first" if layout.text_first else "last"
    return f"{layout.frames}x{layout.height}x{layout.width} video tokens, text {place}"


def _shape(grid: str, layers: int, heads: int, head_dim: int) -> str:
    return f"{grid}, {layers} layers of {heads} heads of {head_dim}"


def _named(denoiser: InstalledDenoiser) -> str:
    return f"this model ({denoiser.source})" if denoiser.source else "this model"


def _counted(records: Sequence[DenoiserRecord]) -> str:
    return f"{len(records)} ({', '.join(record.kind for record in records)})"


def _bare(noun: str) -> str:
    """``calibration`` of ``a calibration``."""
    return noun.split(maxsplit=1)[1]


def _join_lines(match: re.Match[str]) -> str:
    return re.sub(r"\n\s*", " ", match[0])
