"""GilbertRearranger: video tokens along the curve, text behind them."""

import torch

from core.errors import LayoutError, ParameterError
from core.layout import TokenLayout
from kernels_common.gilbert import gilbert_order
from kernels_common.permutation import Tokens, gather_tokens, scatter_tokens


class GilbertRearranger:
    """Puts tokens into the order of the generalised Hilbert curve, and back.

    The rearranged sequence is video, then text, wherever the text stands in the model: so the blocks of the
    video begin at the first cell of the curve, and text fills the last blocks.

    Args:
        layout (TokenLayout): text and grid of the model's sequence.
        device (torch.device | str): where the tokens are. Default: ``"cpu"``

    Raises:
        LayoutError: ``layout`` is no TokenLayout.
        ParameterError: ``device`` is neither a device nor the name of one.
    """

    def __init__(self, layout: TokenLayout, device: torch.device | str = "cpu") -> None:
        if not isinstance(layout, TokenLayout):
            raise LayoutError(f"layout must be a TokenLayout, got {layout!r}")
        if not isinstance(device, torch.device | str):
            raise ParameterError(f"device must be a torch.device or its name, got {device!r}")
        self.layout = layout
        curve = gilbert_order(layout)
        order = torch.cat([curve[layout.video_slice], curve[layout.text_slice]])
        self.order = order.to(device, torch.int32)  # [S]: place i rearranged holds token order[i]

    @property
    def rearranged_layout(self) -> TokenLayout:
        """Where text stands in the rearranged sequence; its video places are not row-major."""
        return rearranged(self.layout)

    def rearrange(self, tokens: Tokens) -> Tokens:
        """Tokens ``[B, H, S, D]``, one tensor or a tuple of several, along the curve.

        Raises:
            LayoutError: they are not the tokens of the layout.
        """
        self._check(tokens)
        return gather_tokens(tokens, self.order)

    def restore(self, tokens: Tokens) -> Tokens:
        """What `rearrange` undid, exactly; errors are the same."""
        self._check(tokens)
        return scatter_tokens(tokens, self.order)

    def _check(self, tokens: Tokens) -> None:
        """Refuse another number of tokens; what is no ``[B, H, S, D]`` the moving itself refuses."""
        for part in tokens if isinstance(tokens, tuple) else (tokens,):
            given = part.shape[2] if isinstance(part, torch.Tensor) and part.dim() == 4 else None
            if given not in (None, self.layout.sequence_length):
                raise LayoutError(f"the layout has {self.layout.describe()}, but {given} tokens were given")


def rearranged(layout: TokenLayout) -> TokenLayout:
    """The layout with its text behind the video."""
    return TokenLayout(layout.text_length, layout.frames, layout.height, layout.width, text_first=False)
