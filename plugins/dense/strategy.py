"""DenseStrategy: attention to every key, by the fastest exact kernel of the device or one that is named."""

from typing import ClassVar, Literal

import torch
from pydantic import Field

from core.context import AttentionContext
from core.dense import attention, resolve_dense_backend
from core.parameters import StrategyParameters
from core.strategy import AttentionResult, AttentionStrategy, Capabilities


class DenseParameters(StrategyParameters):
    """Parameters of `DenseStrategy`.

    Args:
        backend (str): ``"auto"`` takes the fastest exact kernel of the device; ``"sdpa"`` makes
            exactly the call that diffusers makes, so that the video is bit-identical to the untouched
            pipeline's on every device (on a CPU both are the same call); ``"cudnn"`` and ``"flash"`` are
            torch's kernels, ``"flash4"``, ``"flash3"`` and ``"flash2"`` the FlashAttention packages and
            ``"sage"`` SageAttention, in 8 bits and thus not exact. Default: ``"auto"``
    """

    backend: Literal["auto", "sdpa", "cudnn", "flash", "flash4", "flash3", "flash2", "sage"] = Field(
        "auto", description="dense attention kernel"
    )


class DenseStrategy(AttentionStrategy):
    """Dense attention: every query looks at every key (the baseline)."""

    name: ClassVar[str] = "dense"
    Parameters: ClassVar[type[DenseParameters]] = DenseParameters
    capabilities: ClassVar[Capabilities] = Capabilities(
        cross_attention=True, causal=True, gqa=True, backward=True
    )

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> AttentionResult:
        backend = self.parameters.backend
        if backend == "auto":
            backend = resolve_dense_backend(query, key, value, causal=context.causal)
        output = attention(query, key, value, causal=context.causal, backend=backend)
        return AttentionResult(output, 1.0, f"dense-{backend}")
