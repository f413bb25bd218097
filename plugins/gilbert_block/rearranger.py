"""GilbertRearranger: video tokens along the curve, text behind them."""

import torch

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
    """

    def __init__(self, layout: TokenLayout, device: torch.device | str = "cpu") -> None:
        self.layout = layout
        curve = gilbert_order(layout)
        order = torch.cat([curve[layout.video_slice], curve[layout.text_slice]])
        self.order = order.to(device, torch.int32)  # [S]: place i rearranged holds token order[i]

    @property
    def rearranged_layout(self) -> TokenLayout:
        """Where text stands in the rearranged sequence; its video places are not row-major."""
        return rearranged(self.layout)

    def rearrange(self, tokens: Tokens) -> Tokens:
        """Tokens ``[B, H, S, D]``, one tensor or several, along the curve."""
        return gather_tokens(tokens, self.order)

    def restore(self, tokens: Tokens) -> Tokens:
        """What `rearrange` undid, exactly."""
        return scatter_tokens(tokens, self.order)


def rearranged(layout: TokenLayout) -> TokenLayout:
    """The layout with its text behind the video."""
    return TokenLayout(layout.text_length, layout.frames, layout.height, layout.width, text_first=False)
