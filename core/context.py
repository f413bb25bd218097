"""AttentionContext: the facts of one attention call that are not in its tensors."""

from dataclasses import dataclass, replace
from typing import Literal

from core.errors import LayoutError
from core.layout import TokenLayout

Branch = Literal["both", "cond", "uncond"]


@dataclass(frozen=True)
class AttentionContext:
    """Where one attention call stands in the model and in the denoising schedule.

    Args:
        layout (TokenLayout): text and grid of the sequence.
        layer_index (int): place of the attention layer in the model, from 0. Default: 0
        num_layers (int): attention layers of the model. Default: 1
        step_index (int): denoising step, from 0 (highest noise). Default: 0
        num_steps (int, Optional): steps of the schedule; None where the schedule is unknown.
        timestep (float, Optional): the scheduler's timestep (in its own units, usually 0 to 1000).
        branch (str): ``"cond"``, ``"uncond"`` or ``"both"`` (one batch holds the two halves of
            classifier-free guidance, or guidance is off). Default: ``"both"``
        causal (bool): no query sees a later key (language models). Default: False
        call_in_step (int): earlier calls of the denoiser at the same timestep, where the halves of guidance
            are computed one after the other; at most 3. Default: 0

    Raises:
        LayoutError: ``layout`` is no TokenLayout.
    """

    layout: TokenLayout
    layer_index: int = 0
    num_layers: int = 1
    step_index: int = 0
    num_steps: int | None = None
    timestep: float | None = None
    branch: Branch = "both"
    causal: bool = False
    call_in_step: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.layout, TokenLayout):
            raise LayoutError(
                "AttentionContext.layout must be a TokenLayout, such as TokenLayout(226, 13, 30, 45); got "
                f"{self.layout!r}"
            )

    @property
    def place(self) -> tuple[int, Branch, int]:
        """What a strategy keeps its state by: calls of another layer or half of guidance share none."""
        return self.layer_index, self.branch, self.call_in_step

    def at_layer(self, layer_index: int) -> "AttentionContext":
        """The same call facts at another layer."""
        return replace(self, layer_index=layer_index)

    def describe(self) -> str:
        """One phrase for messages: ``layer 3 of 30, step 7 of 50``."""
        steps = "" if self.num_steps is None else f" of {self.num_steps}"
        return f"layer {self.layer_index} of {self.num_layers}, step {self.step_index}{steps}"
