"""AttentionStrategy: the one interface that every sparse-attention method implements."""

import logging
import math
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple

import torch

from core.argument_checks import check_alike, check_tensors_given, shapes_of
from core.context import AttentionContext
from core.denoiser_record import InstalledDenoiser
from core.dense import attention, resolve_dense_backend
from core.errors import LayoutError, NonFiniteOutputError, UnsupportedCallError
from core.layout import TokenLayout
from core.parameters import StrategyParameters
from core.record import WARM_UP, ExecutionRecord, ExecutionReport

logger = logging.getLogger(__name__)

PLANS_KEPT = 8  # shapes per strategy instance: two resolutions with two dtypes, twice over


class AttentionResult(NamedTuple):
    """What `AttentionStrategy.attend` returns.

    Args:
        output (Tensor): ``[B, Hq, Nq, D]``.
        density (float | Tensor): executed share of all (query, key) pairs, 0 to 1; a 0-d tensor on
            the device where reading it would synchronise.
        backend (str): the operator that ran, for the report.
        shares (Mapping[str, float | Tensor]): further figures of this call that the method wants in the
            report, by name, each 0 to 1 (the share of heads of one class, for example). Default: none
    """

    output: torch.Tensor
    density: float | torch.Tensor
    backend: str
    shares: Mapping[str, float | torch.Tensor] = MappingProxyType({})


@dataclass(frozen=True)
class Capabilities:
    """What calls a strategy supports; others raise UnsupportedCallError before `attend`.

    Args:
        cross_attention (bool): queries and keys may have different lengths. Default: False
        causal (bool): follows a causal context. Default: False
        gqa (bool): fewer key heads than query heads. Default: False
        backward (bool): gradients flow to query, key and value. Default: False
        returns_lse (bool): can return the log-sum-exp of each row. Default: False
        devices (tuple[str, ...]): device types. Default: CPU and CUDA
        dtypes (tuple[dtype, ...]): dtypes of query, key, value. Default: fp32, bf16, fp16
        head_dims (tuple[int, ...], Optional): supported head dims; None means any. Default: None
    """

    cross_attention: bool = False
    causal: bool = False
    gqa: bool = False
    backward: bool = False
    returns_lse: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16, torch.float16)
    head_dims: tuple[int, ...] | None = None


class AttentionStrategy(ABC):
    """One configured attention method.

    A method sets ``name``, ``Parameters`` and ``capabilities`` (and ``tunable``, if a `Calibration` can set
    its parameters per head) and writes `attend`; dense warm-up,
    the guard against non-finite outputs and the recording of what ran are the same for all and
    live in `__call__`. State between calls belongs to the instance, keyed by layer, and is dropped
    by `reset`.

    Args:
        **parameters: fields of the class's ``Parameters``.

    Raises:
        ParameterError: a parameter is unknown, of the wrong type or out of range.
    """

    name: ClassVar[str]
    Parameters: ClassVar[type[StrategyParameters]] = StrategyParameters
    capabilities: ClassVar[Capabilities] = Capabilities()
    # Parameters that can be calibrated per layer and head, each with values to try in rising cost.
    tunable: ClassVar[Mapping[str, tuple[float, ...]]] = MappingProxyType({})

    def __init__(self, **parameters: Any) -> None:
        self.parameters: Any = self.Parameters.build(self.name, parameters)
        self.record = ExecutionRecord()
        self.installed = False  # a handle drives it: output checks wait for the end of the denoiser call
        self._plans: OrderedDict[Hashable, Any] = OrderedDict()
        self._unverified: list[tuple[AttentionContext, torch.Tensor]] = []

    @abstractmethod
    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> AttentionResult:
        """Attention of one layer.

        Args:
            query (Tensor): ``[B, Hq, Nq, D]``, after qk-norm and RoPE.
            key (Tensor): ``[B, Hkv, Nk, D]``, likewise.
            value (Tensor): ``[B, Hkv, Nk, D]``.
            context (AttentionContext): layout, layer and step of this call.

        Returns:
            AttentionResult: output, executed density and the backend that ran.
        """

    def plan(
        self,
        layout: TokenLayout,
        num_heads: int,
        head_dim: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> Any:
        """Everything that depends on the shape alone (static masks, permutations). Default: None.

        Called once per combination of its arguments; `planned` caches the result.
        """
        return None

    def check_model(self, denoisers: Sequence[InstalledDenoiser]) -> None:
        """Refuse a model that these parameters are not for; called before a model gets the strategy.

        A strategy that calls others asks them too.

        Args:
            denoisers (Sequence[InstalledDenoiser]): all denoisers of the model, that of high noise first.

        Raises:
            ParameterError: the parameters are for another model.
        """

    def reset(self) -> None:
        """Forget per-layer state; called at the start of each video. Plans are kept."""

    def planned(self, query: torch.Tensor, context: AttentionContext) -> Any:
        """The cached result of `plan` for this call's shape."""
        shape = (context.layout, query.shape[1], query.shape[3], query.device, query.dtype)
        if shape not in self._plans:
            with torch.inference_mode(False):  # a plan made while drawing a video serves in training too
                self._plans[shape] = self.plan(*shape)
            if len(self._plans) > PLANS_KEPT:
                self._plans.popitem(last=False)
        self._plans.move_to_end(shape)
        return self._plans[shape]

    @property
    def heads_alike(self) -> bool:
        """Whether a head's output is the same in a call of any heads, at any place among them. Default: True

        False where parameters or random choices belong to places among the heads; strategies that call others
        for some heads of a layer refuse such a one.
        """
        return True

    def start_video(self) -> None:
        """Begin a new video: drop records and per-layer state."""
        self.record.clear()
        self._unverified.clear()
        self.reset()

    def report(self) -> ExecutionReport:
        """What was executed since the video began."""
        return self.record.report(self.name, self.parameters.model_dump())

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        context: AttentionContext,
    ) -> torch.Tensor:
        """Check the call, run it dense or sparse, guard the output and record what ran.

        Under autocast the tensors are cast first, as torch does for its own attention; the method itself runs
        without autocast, so that what it computes in fp32 stays in fp32.

        Returns:
            Tensor: ``[B, Hq, Nq, D]``.

        Raises:
            LayoutError: tensors and layout disagree.
            UnsupportedCallError: the call is outside ``capabilities``.
            NonFiniteOutputError: see the parameter ``nan_guard``.
        """
        check_tensors_given(query=query, key=key, value=value)
        query, key, value = _autocast(query, key, value)
        with torch.autocast(query.device.type, enabled=False):
            return self._run(query, key, value, context)

    def _run(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> torch.Tensor:
        self._check_call(query, key, value, context)
        stopwatch = self.record.start(query.device)
        dense_reason = self._warm_up_reason(context)
        if dense_reason:
            self.planned(query, context)  # what does not fit this shape shows before the warm-up, not after
            result = dense_result(query, key, value, causal=context.causal)
        else:
            result = self.attend(query, key, value, context)
            if self._is_broken(result.output, context):
                result, dense_reason = self._fall_back(query, key, value, context)
        self.record.add(context, result, dense_reason, stopwatch)
        return result.output

    def verify_outputs(self) -> None:
        """Look at the outputs whose check was deferred (one synchronisation for all of them).

        Raises:
            NonFiniteOutputError: an output since the last look was not finite.
        """
        if not self._unverified:
            return
        contexts, sums = zip(*self._unverified, strict=True)
        self._unverified.clear()
        for context, total in zip(contexts, torch.stack(sums).tolist(), strict=True):
            if not math.isfinite(total):
                self._raise_broken(context)

    def _warm_up_reason(self, context: AttentionContext) -> str | None:
        early_layer = context.layer_index < self.parameters.dense_layers
        early_step = context.step_index < self.parameters.dense_timesteps
        return WARM_UP if early_layer or early_step else None

    def _is_broken(self, output: torch.Tensor, context: AttentionContext) -> bool:
        """True when a dense fallback is due; raises or defers the check for ``"raise"``."""
        guard = self.parameters.nan_guard
        if guard == "off":
            return False
        total = output.detach().sum(dtype=torch.float32)  # not finite if any element is not
        if guard == "raise" and self.installed and output.is_cuda:
            self._unverified.append((context, total))
            return False
        broken = not math.isfinite(float(total))
        if broken and guard == "raise":
            self._raise_broken(context)
        return broken

    def _fall_back(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> tuple[AttentionResult, str]:
        logger.warning("%s: non-finite output at %s; repeated dense", self.name, context.describe())
        result = dense_result(query, key, value, causal=context.causal)
        if not bool(torch.isfinite(result.output).all()):
            self._raise_broken(context, " with dense attention too: query, key or value are not finite")
        return result, "non-finite output"

    def _raise_broken(self, context: AttentionContext, detail: str = "") -> None:
        advice = "" if detail else ", or pass nan_guard='dense' to repeat such calls with dense attention"
        raise NonFiniteOutputError(
            f"strategy '{self.name}' gave a non-finite output at {context.describe()}{detail}. Check the "
            f"inputs for overflow{advice}."
        )

    def _check_call(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, context: AttentionContext
    ) -> None:
        if query.dim() != 4 or key.dim() != 4 or key.shape[:3] != value.shape[:3]:
            raise LayoutError(
                "expected query [B, Hq, Nq, D] and key, value [B, Hkv, Nk, D]; got "
                + shapes_of(query=query, key=key, value=value)
            )
        if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
            raise LayoutError(
                f"query and key must share batch and head_dim; got {shapes_of(query=query, key=key)}"
            )
        check_alike(query=query, key=key, value=value)
        if 0 in (*query.shape, *key.shape, value.shape[3]):
            raise LayoutError(
                "expected at least one batch entry, head, token and dimension; got "
                + shapes_of(query=query, key=key, value=value)
            )
        if not isinstance(context, AttentionContext):
            raise LayoutError(
                "the fourth argument must be an AttentionContext, such as AttentionContext(layout); got "
                f"{type(context).__name__}"
            )
        if query.shape[2] != context.layout.sequence_length:
            raise LayoutError(
                f"the layout has {context.layout.describe()}, but query has {query.shape[2]} tokens"
            )
        self.check_supported(query, key, context)
        self._check_gradients(value)

    def check_supported(self, query: torch.Tensor, key: torch.Tensor, context: AttentionContext) -> None:
        """Refuse a call outside ``capabilities``; a strategy that calls others asks them too.

        Args:
            query (Tensor): ``[B, Hq, Nq, D]``.
            key (Tensor): ``[B, Hkv, Nk, D]``.
            context (AttentionContext): the call.

        Raises:
            UnsupportedCallError: the call is outside; the message names what.
        """
        can = self.capabilities
        checks = (
            (can.cross_attention or query.shape[2] == key.shape[2], "different query and key lengths"),
            (can.causal or not context.causal, "causal attention"),
            (can.gqa or query.shape[1] == key.shape[1], "fewer key heads than query heads (GQA)"),
            (key.shape[1] > 0 and query.shape[1] % key.shape[1] == 0, "Hq that is no multiple of Hkv"),
            (query.device.type in can.devices, "device {query.device.type} (has {can.devices})"),
            (query.dtype in can.dtypes, "{query.dtype} (has {can.dtypes})"),
            (can.head_dims is None or query.shape[3] in can.head_dims, "head_dim {query.shape[3]}"),
        )
        for supported, what in checks:
            if not supported:
                named = what.format(query=query, can=can)
                raise UnsupportedCallError(f"strategy '{self.name}' does not support {named}")
        self._check_gradients(query, key)

    def _check_gradients(self, *tensors: torch.Tensor) -> None:
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if wanted and not self.capabilities.backward:
            raise UnsupportedCallError(
                f"strategy '{self.name}' has no backward pass; call it under torch.no_grad()"
            )


def _autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The tensors in the dtype of autocast where it is on: norms leave fp32 beside projections in bf16."""
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device):
        return tensors
    return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)


def dense_result(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *, causal: bool = False
) -> AttentionResult:
    """Dense attention by the fastest exact kernel of the device, as an `AttentionResult`."""
    backend = resolve_dense_backend(query, key, value, causal=causal)
    output = attention(query, key, value, causal=causal, backend=backend)
    return AttentionResult(output, 1.0, f"dense-{backend}")
