"""Adaptive block-sparse attention as a module, for training and distillation."""

from typing import Any

import torch
from torch import nn

from core.argument_checks import check_tensors_given, shapes_of
from core.context import AttentionContext
from core.errors import LayoutError, ParameterError
from core.layout import TokenLayout
from plugins.gilbert_block.strategy import GilbertBlockStrategy


class AdaptiveBlockSparseAttnTrain(nn.Module):
    """Attention ``(B, H, L, D) -> (B, H, L, D)`` over chosen blocks, with gradients to query, key and value.

    Blocks are chosen anew at every call, without gradients of their own (BLADE, arXiv 2508.10774). Equal
    inputs of an equal step choose equal blocks, so recomputed activations (gradient checkpointing) fit.
    ``module.strategy.report()`` tells what the latest call executed. A call knows no number of steps, so of a
    pair of values (``tau``) the first holds.

    The default ``nan_guard="raise"`` looks at every output at once, which waits for a GPU;
    ``nan_guard="off"`` does not look.

    Args:
        layout (TokenLayout, Optional): text and video grid of the sequence. Default: no text, tokens already
            in an order in which neighbours are alike
        layer_index (int): place in the model; layers draw different samples. Default: 0
        **parameters: of `GilbertBlockStrategy`; ``refresh_every`` must be 1.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
    """

    def __init__(self, layout: TokenLayout | None = None, *, layer_index: int = 0, **parameters: Any) -> None:
        super().__init__()
        self.layout = layout
        self.layer_index = layer_index
        self.strategy = GilbertBlockStrategy(**parameters)
        lasting = self.strategy.parameters.refresh_every
        if lasting != 1:
            raise ParameterError(
                "a training module chooses its blocks anew at every call, as each may be of another sample; "
                f"leave refresh_every at 1, got {lasting}"
            )

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, step_index: int = 0
    ) -> torch.Tensor:
        """Attention of one call.

        Args:
            query (Tensor): ``[B, H, L, D]``.
            key (Tensor): ``[B, H, L, D]``.
            value (Tensor): ``[B, H, L, D]``.
            step_index (int): training or denoising step; other steps draw other samples. Default: 0

        Returns:
            Tensor: ``[B, H, L, D]`` in the dtype of ``query``, or of autocast where it is on.

        Raises:
            LayoutError: tensors and layout disagree.
        """
        check_tensors_given(query=query, key=key, value=value)
        if query.dim() != 4:
            raise LayoutError(f"expected query [B, H, L, D], got {shapes_of(query=query)}")
        layout = self.layout
        if layout is None:  # a line of L cells is its own curve
            layout = TokenLayout(text_length=0, frames=1, height=1, width=query.shape[2])
        self.strategy.record.clear()  # a training run has no end at which to sum up
        context = AttentionContext(layout, layer_index=self.layer_index, step_index=step_index)
        return self.strategy(query, key, value, context)
