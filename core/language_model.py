"""Strategies in causal language models, through the attention interface of transformers."""

import itertools
from typing import Any

import torch

from core.context import AttentionContext
from core.errors import InstallError, UnsupportedCallError
from core.layout import TokenLayout
from core.record import ExecutionRecord, ExecutionReport
from core.registry import create_strategy
from core.strategy import AttentionStrategy

_NUMBERS = itertools.count()


class LanguageModelRun:
    """A strategy installed in a language model; made by `apply_to_language_model`.

    Usable as a context manager (removes the strategy at exit) or through `remove`.
    """

    def __init__(self, model: Any, strategy: AttentionStrategy) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        self.strategy = strategy
        self._model = model
        self._layers = model.config.get_text_config().num_hidden_layers
        self._original = model.config._attn_implementation
        self._name = f"sparse_attn_{next(_NUMBERS)}"
        AttentionInterface.register(self._name, self._attend)
        AttentionMaskInterface.register(self._name, sdpa_mask)
        strategy.installed = True
        model.set_attn_implementation(self._name)

    def __enter__(self) -> "LanguageModelRun":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model's own attention. Safe to call twice."""
        if self.strategy.installed:
            self._model.set_attn_implementation(self._original)
            self.strategy.installed = False

    def report(self) -> ExecutionReport:
        """What was executed for the latest prompt; see ExecutionReport."""
        self.strategy.verify_outputs()
        return self.strategy.report()

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        **options: Any,
    ) -> tuple[torch.Tensor, None]:
        """The prompt goes through the strategy; a single query has nothing to leave out and is exact.

        transformers leaves out the mask (its rule for torch's attention, ``sdpa_mask``) where it would be the
        plain causal one of queries that stand first in the cache: those are the prompts.

        Args:
            module (nn.Module): attention module of transformers, with ``layer_idx``.
            query (Tensor): ``[B, Hq, Nq, D]``.
            key (Tensor): ``[B, Hkv, Nk, D]``; for a prompt, keys from Nq on are places of a cache of fixed
                length that nothing was written to.
            value (Tensor): ``[B, Hkv, Nk, D]``.
            attention_mask (Tensor, Optional): must be None unless one query is given.
            scaling (float, Optional): factor on the scores; ``1 / sqrt(D)`` for a prompt.
            dropout (float): must be 0.

        Returns:
            tuple[Tensor, None]: output ``[B, Nq, Hq, D]``, and no weights.
        """
        if query.shape[2] == 1:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **options
            )
        self._check_prompt(query, key, attention_mask, scaling, dropout)
        key, value = (part[:, :, : query.shape[2]] for part in (key, value))
        if module.layer_idx == 0:
            self.strategy.verify_outputs()
            self.strategy.start_video()
        context = AttentionContext(
            TokenLayout(text_length=0, frames=1, height=1, width=query.shape[2]),
            layer_index=module.layer_idx,
            num_layers=self._layers,
            causal=True,
        )
        return self.strategy(query, key, value, context).transpose(1, 2), None

    def _check_prompt(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        dropout: float,
    ) -> None:
        checks = (
            (
                mask is None,
                f"a token mask ({query.shape[2]} queries for {key.shape[2]} keys): padding, packed "
                "sequences, a sliding window, or a prompt in parts; pass whole prompts of equal length",
            ),
            (
                scaling is None or abs(scaling * query.shape[3] ** 0.5 - 1) < 1e-6,
                f"scaling {scaling}, expected 1 / sqrt({query.shape[3]})",
            ),
            (dropout == 0.0, f"dropout {dropout}; call model.eval()"),
        )
        for supported, what in checks:
            if not supported:
                raise UnsupportedCallError(f"a strategy in a language model does not support {what}")


def apply_to_language_model(
    model: Any, strategy: str | AttentionStrategy, *, preset: str | None = None, **parameters: Any
) -> LanguageModelRun:
    """Install a strategy into a decoder of transformers (Llama and its relatives).

    Prompts are attended sparsely and causally; the tokens that are generated after them attend to all of the
    cache, exactly.

    Args:
        model (PreTrainedModel): a causal language model of transformers.
        strategy (str | AttentionStrategy): registered name, or a configured strategy, that supports causal
            calls.
        preset (str, Optional): registered preset of that strategy.
        **parameters: parameters of the named strategy.

    Returns:
        LanguageModelRun: handle; installed at once, removed by ``remove()`` or at the end of a with-block.

    Raises:
        InstallError: the strategy is not causal or in use, or this is no model of transformers.
        StrategyNotFoundError: no such strategy or preset.
        ParameterError: a parameter is unknown or out of range.
    """
    if not hasattr(model, "set_attn_implementation"):
        raise InstallError(f"expected a model of transformers, got {type(model).__name__}")
    if str(model.config._attn_implementation).startswith("sparse_attn_"):
        raise InstallError("a strategy is installed in this model already; call remove() on its handle first")
    if isinstance(strategy, str):
        strategy = create_strategy(strategy, preset=preset, **parameters)
    elif preset or parameters:
        raise InstallError("a configured strategy takes no preset or parameters; set them when it is built")
    if not strategy.capabilities.causal:
        raise InstallError(f"strategy '{strategy.name}' is not causal and cannot serve a language model")
    if strategy.installed:
        raise InstallError(f"this '{strategy.name}' object is installed in a model; build a second one")
    strategy.record = ExecutionRecord()
    return LanguageModelRun(model, strategy)
