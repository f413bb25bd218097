"""The conformance suite: what every strategy must hold, importable by plugin authors.

Subclass `StrategyConformance` in a test module of your package and let pytest collect it::

    from core.testing import StrategyConformance

    class TestMyStrategy(StrategyConformance):
        strategy = MyStrategy
        full_density = {"keep_ratio": 1.0}

Each test is a method without fixtures, so other runners can call them too.
"""

import random
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np
import torch

from core.apply import apply_strategy
from core.context import AttentionContext
from core.errors import LayoutError, NonFiniteOutputError, ParameterError, UnsupportedCallError
from core.layout import TokenLayout
from core.record import WARM_UP
from core.strategy import AttentionStrategy

# Sequence lengths that no block size divides, text in both places, one frame, one token a frame.
LAYOUTS = (
    TokenLayout(text_length=16, frames=4, height=6, width=8),
    TokenLayout(text_length=5, frames=3, height=7, width=9),
    TokenLayout(text_length=0, frames=5, height=5, width=5),
    TokenLayout(text_length=13, frames=3, height=8, width=8, text_first=False),
    TokenLayout(text_length=7, frames=1, height=9, width=11),
    TokenLayout(text_length=3, frames=13, height=1, width=1),
)


def random_qkv(
    layout: TokenLayout,
    *,
    batch: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query, key and value ``[batch, heads, layout.sequence_length, head_dim]``.

    Drawn from an own generator; without ``seed`` the numbers are new at every call.
    """
    generator = torch.Generator().manual_seed(random.SystemRandom().getrandbits(60) if seed is None else seed)
    shape = (3, batch, heads, layout.sequence_length, head_dim)
    query, key, value = torch.randn(shape, generator=generator).to(device=device, dtype=dtype)
    return query, key, value


def dense_fp64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Softmax attention in float64, the reference of the suite; ``[B, H, S, D]``."""
    query, key, value = query.double(), key.double(), value.double()
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value


def executed_weights(
    strategy: AttentionStrategy, query: torch.Tensor, key: torch.Tensor, context: AttentionContext
) -> torch.Tensor:
    """Attention weights ``[B, H, S, S]`` that a strategy really applied.

    The columns of the identity are sent through as values, a head_dim of them at a time.
    """
    length, width = query.shape[2], query.shape[3]
    identity = torch.eye(length, dtype=query.dtype, device=query.device).expand(*query.shape[:2], -1, -1)
    columns = []
    for start in range(0, length, width):
        value = torch.zeros_like(query)
        chunk = identity[..., start : start + width]
        value[..., : chunk.shape[-1]] = chunk
        columns.append(strategy(query, key, value, context)[..., : chunk.shape[-1]])
    return torch.cat(columns, dim=-1)


class StrategyConformance:
    """What every strategy must hold; set the class attributes and let pytest collect it.

    Args:
        strategy (type[AttentionStrategy]): the class under test.
        parameters (dict): parameters of a sparse configuration. Default: none
        full_density (dict, Optional): parameters at which nothing is left out; None if the method
            cannot be dense. Default: None
        keeps_tokens (bool): each executed pair is one token pair, so that the reported density can be
            counted from the weights; False for methods that merge tokens. Default: True
        device (str): where the suite runs. Default: ``"cpu"``
    """

    strategy: ClassVar[type[AttentionStrategy]]
    parameters: ClassVar[dict[str, Any]] = {}
    full_density: ClassVar[dict[str, Any] | None] = None
    keeps_tokens: ClassVar[bool] = True
    device: ClassVar[str] = "cpu"

    def make(self, **overrides: Any) -> AttentionStrategy:
        return self.strategy(**(self.parameters | overrides))

    def inputs(self, layout: TokenLayout, **options: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return random_qkv(layout, device=self.device, **options)

    def test_full_density_equals_dense(self) -> None:
        if self.full_density is None:
            return
        for layout in LAYOUTS:
            query, key, value = self.inputs(layout)
            strategy = self.make(**self.full_density)
            output = strategy(query, key, value, AttentionContext(layout))
            expected = dense_fp64(query, key, value)
            assert (output - expected).abs().max() < 5e-6, layout.describe()
            assert strategy.report().density == 1.0, layout.describe()

    def test_shapes_and_dtypes_are_kept(self) -> None:
        tolerance = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
        for dtype in self.strategy.capabilities.dtypes:
            if dtype == torch.float16 and self.device == "cpu":
                continue  # CPUs compute fp16 in other dtypes; the GPU run covers it
            for layout in LAYOUTS:
                query, key, value = self.inputs(layout, dtype=dtype)
                overrides = self.full_density or {}
                output = self.make(**overrides)(query, key, value, AttentionContext(layout))
                assert output.shape == query.shape and output.dtype == dtype
                assert torch.isfinite(output).all(), layout.describe()
                if self.full_density is not None:
                    error = (output - dense_fp64(query, key, value)).abs().max()
                    assert error < tolerance[dtype], f"{dtype} {layout.describe()}: {error}"

    def test_autocast_changes_nothing_but_the_inputs(self) -> None:
        """Autocast casts query, key and value; what a method computes in fp32 stays in fp32."""
        halves = [
            part for part in (torch.bfloat16, torch.float16) if part in self.strategy.capabilities.dtypes
        ]
        context = AttentionContext(LAYOUTS[0])
        query, key, value = self.inputs(LAYOUTS[0])
        for dtype in halves[:1]:
            with torch.autocast(query.device.type, dtype):
                output = self.make()(query, key, value, context)
            by_hand = self.make()(query.to(dtype), key.to(dtype), value.to(dtype), context)
            assert output.dtype == dtype and torch.equal(output, by_hand)

    def test_reported_density_is_executed(self) -> None:
        for layout in LAYOUTS:
            strategy = self.make()
            query, key, value = self.inputs(layout)
            strategy(query, key, value, AttentionContext(layout))
            density = strategy.report().density
            assert 0.0 < density <= 1.0, layout.describe()
            if self.keeps_tokens:
                weights = executed_weights(strategy, query, key, AttentionContext(layout))
                counted = (weights != 0).double().mean().item()
                assert abs(counted - density) < 1e-6, f"{layout.describe()}: {density} != {counted}"
                assert torch.allclose(weights.sum(-1), torch.ones_like(weights[..., 0]), atol=1e-5)

    def test_gradients_are_those_of_the_executed_weights(self) -> None:
        if not (self.strategy.capabilities.backward and self.keeps_tokens):
            return
        layout = LAYOUTS[0]
        query, key, value = self.inputs(layout)
        context = AttentionContext(layout)
        strategy = self.make()
        inputs = tuple(part.clone().requires_grad_() for part in (query, key, value))
        slope = torch.randn(query.shape, generator=torch.Generator().manual_seed(1)).to(query.device)
        output = strategy(inputs[0], inputs[1], inputs[2], context)
        gradients = torch.autograd.grad((output * slope).sum(), inputs)
        weights = executed_weights(strategy, query, key, context).double()
        # Softmax attention over the executed pairs, differentiated by hand.
        slopes = slope.double() @ value.double().transpose(2, 3)
        scores = weights * (slopes - (slopes * weights).sum(-1, keepdim=True)) * query.shape[-1] ** -0.5
        expected = (scores @ key.double(), scores.transpose(2, 3) @ query.double())
        for gradient, wanted in zip(
            gradients, (*expected, weights.transpose(2, 3) @ slope.double()), strict=True
        ):
            assert (gradient - wanted).norm() <= 1e-4 * wanted.norm()

    def test_is_deterministic(self) -> None:
        context = AttentionContext(LAYOUTS[0], layer_index=1, num_layers=3, step_index=2, num_steps=4)
        query, key, value = self.inputs(LAYOUTS[0])
        strategy = self.make()
        first = strategy(query, key, value, context)
        strategy.start_video()
        assert torch.equal(strategy(query, key, value, context), first), "a second video differs"
        assert torch.equal(self.make()(query, key, value, context), first), "a second instance differs"

    def test_global_random_state_is_untouched(self) -> None:
        query, key, value = self.inputs(LAYOUTS[0])
        before = (torch.get_rng_state(), random.getstate(), numpy_state())
        self.make()(query, key, value, AttentionContext(LAYOUTS[0]))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert random.getstate() == before[1]
        assert np.array_equal(numpy_state(), before[2])

    def test_inputs_are_untouched(self) -> None:
        tensors = self.inputs(LAYOUTS[1])
        copies = [tensor.clone() for tensor in tensors]
        self.make()(*tensors, AttentionContext(LAYOUTS[1]))
        assert all(torch.equal(tensor, copy) for tensor, copy in zip(tensors, copies, strict=True))

    def test_batch_equals_single_runs(self) -> None:
        for layout in LAYOUTS[:4]:
            query, key, value = self.inputs(layout, batch=2)
            together = self.make()(query, key, value, AttentionContext(layout))
            for index in range(2):
                one = slice(index, index + 1)
                alone = self.make()(query[one], key[one], value[one], AttentionContext(layout))
                assert torch.allclose(together[one], alone, atol=1e-5), layout.describe()

    def test_strided_inputs_are_read_right(self) -> None:
        """No dimension need be contiguous, the last one included."""
        layout = LAYOUTS[0]
        tensors = self.inputs(layout)
        expected = self.make()(*tensors, AttentionContext(layout))
        query, key, value = (part.mT.contiguous().mT for part in tensors)
        output = self.make()(query, key, value, AttentionContext(layout))
        assert torch.allclose(output, expected, atol=1e-5)

    def test_heads_that_are_alike_stay_so_in_any_company(self) -> None:
        if not self.make().heads_alike:
            return
        chosen = [2, 0]
        for layout in LAYOUTS[:4]:
            tensors = self.inputs(layout, heads=3)
            together = self.make()(*tensors, AttentionContext(layout))
            query, key, value = (part[:, chosen] for part in tensors)
            alone = self.make()(query, key, value, AttentionContext(layout))
            assert torch.allclose(together[:, chosen], alone, atol=1e-5), layout.describe()

    def test_what_was_planned_while_drawing_serves_in_training(self) -> None:
        if not (self.strategy.capabilities.backward and self.keeps_tokens):
            return
        strategy, context = self.make(), AttentionContext(LAYOUTS[0])
        tensors = self.inputs(LAYOUTS[0])
        with torch.inference_mode():
            strategy(*tensors, context)
        strategy.start_video()
        for part in tensors:
            part.requires_grad_()
        strategy(*tensors, context).sum().backward()
        assert all(part.grad is not None and torch.isfinite(part.grad).all() for part in tensors)

    def test_layers_do_not_disturb_each_other(self) -> None:
        layout = LAYOUTS[0]
        own, other = self.inputs(layout), self.inputs(layout)
        alone = self.make()(*own, AttentionContext(layout, layer_index=1, num_layers=2))
        strategy = self.make()
        strategy(*other, AttentionContext(layout, layer_index=0, num_layers=2))
        after = strategy(*own, AttentionContext(layout, layer_index=1, num_layers=2))
        assert torch.equal(after, alone)

    def test_two_shapes_in_turn(self) -> None:
        strategy = self.make()
        text_last = replace(LAYOUTS[0], text_first=False)
        for layout in (LAYOUTS[0], LAYOUTS[1], text_last, LAYOUTS[0]):
            query, key, value = self.inputs(layout)
            output = strategy(query, key, value, AttentionContext(layout))
            fresh = self.make()(query, key, value, AttentionContext(layout))
            assert torch.equal(output, fresh), layout.describe()

    def test_without_text_its_place_means_nothing(self) -> None:
        layout = LAYOUTS[2]
        tensors = self.inputs(layout)
        first = self.make()(*tensors, AttentionContext(layout))
        last = self.make()(*tensors, AttentionContext(replace(layout, text_first=False)))
        assert torch.equal(first, last)

    def test_warm_up_is_dense(self) -> None:
        strategy = self.make(dense_layers=1, dense_timesteps=2)
        layout = LAYOUTS[0]
        query, key, value = self.inputs(layout)
        expected = dense_fp64(query, key, value)
        for layer in range(3):
            for step in range(4):
                context = AttentionContext(layout, layer, 3, step, 4)
                output = strategy(query, key, value, context)
                if layer < 1 or step < 2:
                    assert (output - expected).abs().max() < 5e-6
        assert strategy.report().dense_calls[WARM_UP] == 1 * 4 + 2 * 2
        assert strategy.report().calls == 12

    def test_non_finite_output_is_an_error(self) -> None:
        layout = LAYOUTS[0]
        query, key, value = self.inputs(layout)
        value[:, :, layout.text_start] = float("nan")
        place = AttentionContext(layout, layer_index=2, num_layers=4, step_index=3)
        for guard in ("raise", "dense"):
            message = raised(
                NonFiniteOutputError, self.make(nan_guard=guard, dense_timesteps=0), query, key, value, place
            )
            assert self.strategy.name in message and "layer 2" in message and "step 3" in message

    def test_misuse_raises(self) -> None:
        layout = LAYOUTS[0]
        query, key, value = self.inputs(layout)
        context = AttentionContext(layout)
        raised(LayoutError, self.make(), query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], context)
        raised(LayoutError, self.make(), query[0], key[0], value[0], context)
        raised(LayoutError, self.make(), query, key[..., :32], value, context)
        raised(LayoutError, self.make(), query, key, value[:, :, 1:], context)
        raised(UnsupportedCallError, self.make(), query.double(), key.double(), value.double(), context)

    def test_parameters_are_checked(self) -> None:
        for wrong in ({"no_such_parameter": 1}, {"dense_layers": -1}, {"dense_timesteps": "many"}):
            try:
                self.make(**wrong)
            except ParameterError as error:
                assert self.strategy.name in str(error) and next(iter(wrong)) in str(error)
            else:
                raise AssertionError(f"{wrong} was accepted")

    def test_model_is_restored(self) -> None:
        transformer = tiny_transformer().to(self.device)
        call = tiny_call(transformer)
        processors = dict(transformer.attn_processors)
        with torch.no_grad():
            untouched = transformer(**call).sample
            with apply_strategy(transformer, self.make()) as run:
                sparse = transformer(**call).sample
                assert run.report().calls == len(processors)
            assert torch.equal(transformer(**call).sample, untouched)
        assert sparse.shape == untouched.shape and torch.isfinite(sparse).all()
        assert dict(transformer.attn_processors) == processors


def numpy_state() -> np.ndarray:
    """The words of NumPy's global generator."""
    state: Any = np.random.get_state(legacy=False)
    return state["state"]["key"].copy()


def raised(error: type[Exception], call: Any, *arguments: Any) -> str:
    """Message of the expected error; fails if none or another one comes."""
    try:
        call(*arguments)
    except error as found:
        return str(found)
    raise AssertionError(f"expected {error.__name__}, but the call returned")


def tiny_transformer(**overrides: Any) -> Any:
    """A CogVideoX transformer of two small layers with random weights (needs diffusers).

    Args:
        **overrides: configuration of ``CogVideoXTransformer3DModel``.
    """
    from diffusers import CogVideoXTransformer3DModel

    config: dict[str, Any] = {
        "num_attention_heads": 2,
        "attention_head_dim": 64,
        "in_channels": 4,
        "out_channels": 4,
        "time_embed_dim": 16,
        "text_embed_dim": 32,
        "num_layers": 2,
        "sample_width": 16,
        "sample_height": 16,
        "sample_frames": 9,
        "patch_size": 2,
        "temporal_compression_ratio": 4,
        "max_text_seq_length": 16,
        "use_rotary_positional_embeddings": False,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CogVideoXTransformer3DModel(**(config | overrides)).eval()


def tiny_call(transformer: Any, *, batch: int = 1, timestep: int = 999, seed: int = 0) -> dict[str, Any]:
    """Arguments of one call of `tiny_transformer`: 3 latent frames of 16 x 16, 16 text tokens."""
    generator = torch.Generator().manual_seed(seed)
    device = next(transformer.parameters()).device
    config = transformer.config
    latents = torch.randn(batch, 3, config.in_channels, 16, 16, generator=generator)
    text = torch.randn(batch, config.max_text_seq_length, config.text_embed_dim, generator=generator)
    return {
        "hidden_states": latents.to(device),
        "encoder_hidden_states": text.to(device),
        "timestep": torch.full((batch,), timestep, device=device),
    }
