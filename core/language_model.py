"""Strategies in causal language models, through the attention interface of transformers."""

import itertools
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch

from core.context import AttentionContext
from core.denoiser_record import InstalledDenoiser
from core.errors import InstallError, UnsupportedCallError
from core.layout import TokenLayout
from core.record import ExecutionRecord, ExecutionReport
from core.registry import create_strategy
from core.strategy import AttentionStrategy

_NUMBERS = itertools.count()
# What transformers hands on to the attention of every layer without meaning it.
_MEANINGLESS = frozenset(
    {
        "position_ids",
        "cache_position",
        "use_cache",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
    }
)


class LanguageModelRun:
    """A strategy installed in a language model; made by `apply_to_language_model`.

    Usable as a context manager (removes the strategy at exit) or through `remove`.

    Raises:
        InstallError: the model has an attention that cannot be replaced.
        ParameterError: the strategy's parameters are for another model.
    """

    def __init__(self, model: Any, strategy: AttentionStrategy) -> None:
        from transformers import AttentionInterface, AttentionMaskInterface
        from transformers.masking_utils import sdpa_mask

        config = model.config.get_text_config()
        heads = getattr(config, "num_attention_heads", None)
        strategy.check_model([InstalledDenoiser.of(model, config.num_hidden_layers, heads)])
        self.strategy = strategy
        self._model = model
        self._layers = config.num_hidden_layers
        self._latest_layer: int | None = None
        self._installed = True
        self._original = model.config._attn_implementation
        name = f"sparse_attn_{next(_NUMBERS)}"
        AttentionInterface.register(name, _weak_call(self))
        AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(name)
        if model.config._attn_implementation != name:
            model.set_attn_implementation(self._original)  # models inside may have taken it
            raise InstallError(_no_interface(model))
        self._reached = False
        # A function and no bound method, so that copies of the model share this run instead of copying it.
        self._hook = model.register_forward_hook(lambda *_: self._check_reached())
        strategy.installed = True

    def __enter__(self) -> "LanguageModelRun":
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Restore the model's own attention. Safe to call twice."""
        if self._installed:
            self._hook.remove()
            self._model.set_attn_implementation(self._original)
            self._installed = self.strategy.installed = False

    def report(self) -> ExecutionReport:
        """What was executed for the latest prompt; see ExecutionReport."""
        self.strategy.verify_outputs()
        return self.strategy.report()

    def _check_reached(self) -> None:
        if not self._reached:
            raise InstallError(_no_interface(self._model))

    def _attend(
        self,
        module: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        is_causal: bool | None = None,
        sliding_window: int | None = None,
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
            dropout (float): must be 0 for a prompt.
            is_causal (bool, Optional): must be True for a prompt. Default: the module's, or True
            sliding_window (int, Optional): keys that a query sees; for a prompt at least Nq. A single query
                has it in its mask.
            **options: refused by name unless they change no attention, or are None or False.

        Returns:
            tuple[Tensor, None]: output ``[B, Nq, Hq, D]``, and no weights.
        """
        self._reached = True
        _check_options(options)
        if query.shape[2] == 1:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            return sdpa_attention_forward(
                module, query, key, value, attention_mask, scaling=scaling, dropout=dropout
            )
        causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
        _check_prompt(module, query, key, attention_mask, scaling, dropout, causal, sliding_window)
        key, value = (part[:, :, : query.shape[2]] for part in (key, value))
        if self._latest_layer is None or module.layer_idx <= self._latest_layer:
            self.strategy.verify_outputs()
            self.strategy.start_video()
        self._latest_layer = module.layer_idx
        context = AttentionContext(
            TokenLayout(text_length=0, frames=1, height=1, width=query.shape[2]),
            layer_index=module.layer_idx,
            num_layers=self._layers,
            causal=True,
        )
        return self.strategy(query, key, value, context).transpose(1, 2), None


def _weak_call(run: LanguageModelRun) -> Callable[..., Any]:
    """The run's attention for a registry that forgets nothing, without the run and the model behind it."""
    reference = weakref.ref(run)

    def attend(*args: Any, **options: Any) -> Any:
        run = reference()
        assert run is not None, "the hook on the model keeps it"
        return run._attend(*args, **options)

    return attend


def _no_interface(model: Any) -> str:
    return (
        f"{type(model).__name__} does not attend through the AttentionInterface of transformers, so a "
        "strategy cannot serve it; models like Llama, Mistral, Qwen and GPT-2 do"
    )


def _check_options(options: Mapping[str, Any]) -> None:
    for name, option in options.items():
        if name not in _MEANINGLESS and option is not None and option is not False:
            raise UnsupportedCallError(
                f"a strategy in a language model does not support the attention option {name}; use a model "
                "or a call without it"
            )


def _check_prompt(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float | None,
    dropout: float,
    causal: bool,
    sliding_window: int | None,
) -> None:
    length = query.shape[2]
    checks = (
        (
            mask is None,
            f"a token mask ({length} queries for {key.shape[2]} keys): padding, packed sequences, a sliding "
            "window, or a prompt in parts; pass whole prompts of equal length",
        ),
        (causal, f"attention to later tokens ({type(module).__name__}); use a causal model"),
        (
            sliding_window is None or sliding_window >= length,
            f"a sliding window ({sliding_window} keys for {length} queries); pass shorter prompts",
        ),
        (
            scaling is None or abs(scaling * query.shape[3] ** 0.5 - 1) < 1e-6,
            f"scaling {scaling}, expected 1 / sqrt({query.shape[3]})",
        ),
        (dropout == 0.0, f"dropout {dropout}; call model.eval()"),
        (
            getattr(module, "layer_idx", None) is not None,
            f"{type(module).__name__}, which has no layer_idx; use a causal language model",
        ),
    )
    for supported, what in checks:
        if not supported:
            raise UnsupportedCallError(f"a strategy in a language model does not support {what}")


def apply_to_language_model(
    model: Any, strategy: str | AttentionStrategy, *, preset: str | None = None, **parameters: Any
) -> LanguageModelRun:
    """Install a strategy into a decoder of transformers (Llama, Mistral, Qwen, GPT-2 and their relatives).

    Prompts are attended sparsely and causally; the tokens that are generated after them attend to all of the
    cache, exactly. Which models work is seen from their attention: it goes through the AttentionInterface of
    transformers, is causal, scales its scores by ``1 / sqrt(D)`` and adds nothing to them. A model that does
    not go through the interface (Bloom, GPT-J, Falcon) is refused here or after its first forward pass;
    attention to later tokens (BERT), other scales (OPT, Granite), soft caps (Gemma 2), sinks (GPT-OSS), and
    windows shorter than the prompt are refused in the first call that has them.

    Args:
        model (PreTrainedModel): a causal language model of transformers.
        strategy (str | AttentionStrategy): registered name, or a configured strategy, that supports causal
            calls.
        preset (str, Optional): registered preset of that strategy.
        **parameters: parameters of the named strategy.

    Returns:
        LanguageModelRun: handle; installed at once, removed by ``remove()`` or at the end of a with-block.

    Raises:
        InstallError: the strategy is not causal or in use, or this is no model of transformers whose
            attention can be replaced.
        StrategyNotFoundError: no such strategy or preset.
        ParameterError: a parameter is unknown, out of range or for another model.
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
