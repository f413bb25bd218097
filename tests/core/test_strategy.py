from typing import Any, ClassVar, Literal

import pytest
import torch
from pydantic import Field

from core import (
    AttentionContext,
    AttentionResult,
    AttentionStrategy,
    Capabilities,
    LayoutError,
    NonFiniteOutputError,
    ParameterError,
    StrategyParameters,
    TokenLayout,
    UnsupportedCallError,
    call_generator,
    create_strategy,
)
from core.dense import attention
from core.strategy import PLANS_KEPT
from core.testing import dense_fp64, random_qkv

LAYOUT = TokenLayout(2, 2, 3, 4)


class HalfParameters(StrategyParameters):
    share: float = Field(0.5, gt=0, le=1)
    mode: Literal["a", "b"] = "a"


class Half(AttentionStrategy):
    """Keeps a share."""

    name: ClassVar[str] = "half"
    Parameters = HalfParameters
    plans: int = 0

    def plan(self, layout, num_heads, head_dim, device, dtype):
        self.plans += 1
        return (layout, num_heads, head_dim, dtype)

    def attend(self, query, key, value, context):
        assert self.planned(query, context) == (context.layout, query.shape[1], query.shape[3], query.dtype)
        output = attention(query, key, value) * float("nan" if context.layer_index == 1 else 1)
        return AttentionResult(output, self.parameters.share, "half")


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"shar": 1}, "unknown parameter 'shar', did you mean 'share'?"),
        ({"share": 0}, "share: Input should be greater than 0, got 0"),
        ({"share": "much"}, "share: .*valid number.*got 'much'"),
        ({"mode": "c"}, "mode: Input should be 'a' or 'b', got 'c'"),
        ({"dense_layers": 1.5}, "dense_layers"),
    ],
)
def test_wrong_parameters(wrong, message):
    with pytest.raises(ParameterError, match=message):
        Half(**wrong)


class VariantParameters(StrategyParameters):
    read_by: ClassVar[dict] = {"kind": {"wide": ("width",), "both": ("width", "depth"), "none": ()}}

    kind: Literal["wide", "both", "none"] = "wide"
    width: int = 2
    depth: int | None = None


def test_parameters_that_the_variant_would_ignore_are_refused():
    for given in ({"width": 5}, {"kind": "both", "width": 5, "depth": 1}, {"kind": "none", "width": 2}):
        assert VariantParameters.build("v", given).model_fields_set == given.keys()
    for given, message in (
        ({"depth": 1}, "depth is read by kind 'both', not by 'wide'; .* default None"),
        ({"kind": "none", "width": 3}, "width is read by kind 'wide' or 'both', not by 'none'; .* default 2"),
        ({"kind": "none", "width": 3, "depth": 1}, "depth is read .*; width is read"),
    ):
        with pytest.raises(ParameterError, match=f"strategy 'v': parameters: {message}"):
            VariantParameters.build("v", given)


def test_text_parameters_are_converted():
    assert Half(share="0.25", dense_layers="2").parameters == HalfParameters(share=0.25, dense_layers=2)


def test_plans_are_cached_per_shape_and_bounded():
    strategy = Half()
    for _ in range(2):
        for heads in (1, 2):
            query, key, value = random_qkv(LAYOUT, heads=heads)
            strategy(query, key, value, AttentionContext(LAYOUT))
    assert strategy.plans == 2
    for width in range(1, 2 * PLANS_KEPT):
        layout = TokenLayout(0, 1, 1, width)
        strategy(*random_qkv(layout), AttentionContext(layout))
    assert len(strategy._plans) == PLANS_KEPT


def test_a_plan_made_in_inference_mode_can_be_saved_for_backward():
    class Ordered(Half):
        """Keeps an order."""

        capabilities = Capabilities(backward=True)

        def plan(self, layout, num_heads, head_dim, device, dtype):
            return torch.arange(layout.sequence_length)

        def attend(self, query, key, value, context):
            order = self.planned(query, context)
            return AttentionResult(value.index_select(2, order), 1.0, "ordered")

    strategy = Ordered()
    with torch.inference_mode():
        strategy(*random_qkv(LAYOUT), AttentionContext(LAYOUT))
    query, key, value = random_qkv(LAYOUT)
    strategy(query, key, value.requires_grad_(), AttentionContext(LAYOUT)).sum().backward()
    assert torch.equal(value.grad, torch.ones_like(value))


def test_guard_raises_falls_back_or_looks_away():
    query, key, value = random_qkv(LAYOUT)
    broken = AttentionContext(LAYOUT, layer_index=1, num_layers=2, step_index=4)
    with pytest.raises(NonFiniteOutputError, match="'half'.*layer 1 of 2, step 4"):
        Half()(query, key, value, broken)
    strategy = Half(nan_guard="dense")
    output = strategy(query, key, value, broken)
    assert (output - dense_fp64(query, key, value)).abs().max() < 5e-6
    assert strategy.report().dense_calls == {"non-finite output": 1}
    assert strategy.report().density == 1.0
    assert not torch.isfinite(Half(nan_guard="off")(query, key, value, broken)).any()


def test_capabilities_are_enforced():
    class Narrow(Half):
        capabilities = Capabilities(dtypes=(torch.float32,), head_dims=(64,), devices=("cpu",))

    query, key, value = random_qkv(LAYOUT, heads=4)
    context = AttentionContext(LAYOUT)
    for arguments, message in [
        ((query, key[:, :2], value[:, :2]), "GQA"),
        ((query, key[:, :, :5], value[:, :, :5]), "different query and key lengths"),
        ((query.bfloat16(), key.bfloat16(), value.bfloat16()), "bfloat16"),
        ((query[..., :32], key[..., :32], value[..., :32]), "head_dim 32"),
        ((query.clone().requires_grad_(), key, value), "no backward pass"),
        ((query, key.clone().requires_grad_(), value), "no backward pass"),
        ((query, key, value.clone().requires_grad_()), "no backward pass"),
    ]:
        with pytest.raises(UnsupportedCallError, match=message):
            Narrow()(*arguments, context)
    with pytest.raises(LayoutError, match="2 text \\+ 2x3x4 video = 26 tokens, but query has 25"):
        Half()(query[:, :, 1:], key[:, :, 1:], value[:, :, 1:], context)


def test_report_is_averaged_over_layers_and_steps():
    strategy = Half(dense_layers=1, nan_guard="off")
    query, key, value = random_qkv(LAYOUT)
    for layer in (0, 2):
        for step in range(2):
            strategy(query, key, value, AttentionContext(LAYOUT, layer, 3, step, 2))
    report = strategy.report()
    assert report.density == pytest.approx((1 + 1 + 0.5 + 0.5) / 4)
    assert report.density_by_layer[0] == [1.0, 1.0] and report.density_by_layer[2] == [0.5, 0.5]
    assert all(value != value for value in report.density_by_layer[1]), "a layer never called is NaN"
    assert report.backends == {"dense-sdpa": 2, "half": 2}
    assert "density 0.750" in str(report) and "2 calls, dense warm-up" in str(report)
    assert strategy.record.timed is False and report.attention_time_s is None


def test_further_shares_are_reported_where_calls_gave_them():
    class Shared(Half):
        def attend(self, query, key, value, context):
            share = torch.tensor(0.25 * (1 + context.step_index))
            return super().attend(query, key, value, context)._replace(shares={"odd_heads": share})

    strategy = Shared(dense_layers=1)
    query, key, value = random_qkv(LAYOUT)
    for layer in (0, 2):
        for step in range(2):
            strategy(query, key, value, AttentionContext(LAYOUT, layer, 3, step, 2))
    report = strategy.report()
    dense, _, sparse = report.shares_by_layer["odd_heads"]
    assert all(value != value for value in dense) and sparse == [0.25, 0.5]
    assert "odd_heads: 0.375, mean over 2 layers and steps" in str(report)
    assert Half().report().shares_by_layer == {}


def test_call_generator_depends_on_seed_layer_and_step_only():
    def draw(seed, layer, step):
        context = AttentionContext(LAYOUT, layer_index=layer, step_index=step)
        return torch.rand(4, generator=call_generator(seed, context, "cpu")).tolist()

    assert draw(0, 1, 2) == draw(0, 1, 2)
    assert (
        len({tuple(draw(*place)) for place in [(0, 1, 2), (0, 2, 1), (1, 1, 2), (0, 1, 3), (0, 12, 0)]}) == 5
    )


def test_autocast_casts_as_torch_does_for_its_own_attention():
    """Norms leave fp32 queries and keys beside bf16 values."""
    query, key, value = random_qkv(LAYOUT)
    mixed = (query, key, value.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        output = Half()(*mixed, AttentionContext(LAYOUT))
        expected = torch.nn.functional.scaled_dot_product_attention(*mixed)
    assert output.dtype == torch.bfloat16 and torch.equal(output, expected)


def test_gradients_flow_under_autocast(sparse_strategy):
    name, options = sparse_strategy
    if not create_strategy(name, **options).capabilities.backward:
        pytest.skip("has no backward")
    inputs = random_qkv(LAYOUT, seed=0)
    slope = torch.randn_like(inputs[0])

    def gradients(cast, enabled):
        tensors = [part.clone().requires_grad_() for part in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            output = create_strategy(name, **options)(*map(cast, tensors), AttentionContext(LAYOUT))
            return torch.autograd.grad((output.float() * slope).sum(), tensors)

    by_hand = gradients(torch.Tensor.bfloat16, False)
    for gradient, expected in zip(gradients(lambda part: part, True), by_hand, strict=True):
        assert gradient.dtype == torch.float32 and gradient.abs().max() > 0
        assert torch.equal(gradient, expected)


class CountParameters(StrategyParameters):
    count: int | None = None
    ratio: float = 0.5
    window: tuple[int, ...] = (1, 2)
    flag: bool = False
    either: int | bool = 0
    extra: dict[str, Any] = {}


class Count(Half):
    Parameters = CountParameters


@pytest.mark.parametrize(
    "given", [{"dense_layers": True}, {"count": False}, {"ratio": True}, {"window": (1, True)}], ids=str
)
def test_true_and_false_are_no_numbers(given):
    ((name, value),) = given.items()
    expected = f"strategy 'half': {name}: expected a number, not true or false, got {value!r}"
    with pytest.raises(ParameterError) as error:
        Count(**given)
    assert str(error.value) == expected


def test_bools_and_numbers_in_text_are_read_where_they_belong():
    given = {"dense_layers": "2", "count": "3", "ratio": "0.25", "window": ["4", 5], "flag": "true"}
    read = Count(**given, either=True, extra={"sink": True}).parameters
    assert (read.dense_layers, read.count, read.ratio, read.window, read.flag) == (2, 3, 0.25, (4, 5), True)
    assert read.either is True and read.extra == {"sink": True}
