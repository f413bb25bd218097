"""Threshold files of the original authors: read exactly, or refused."""

import pytest
import torch

from core import AttentionContext, ParameterError, TokenLayout, create_strategy
from core.calibration import Calibration
from core.testing import random_qkv
from plugins.sparge.prediction import predict_mask
from plugins.sparge.published import read_published

LAYOUT = TokenLayout(16, 4, 16, 20)
HEADS = 2
USE = {"block_size": 128, "attention_sink": True}


def layer(generator, sparse=(True, True)):
    return {
        "is_sparse": torch.tensor(sparse),
        "cdfthreshd": 0.2 + 0.5 * torch.rand(HEADS, generator=generator),
        "simthreshd1": torch.rand(HEADS, generator=generator) * 0.02 - 0.01,
        "simthreshd2": torch.zeros(HEADS),
        "pvthreshd": 5.0 + 20 * torch.rand(HEADS, generator=generator),
    }


@pytest.fixture
def layers(generator):
    """Two stacks as in Flux: one name ends in the other, and 10 comes after 9."""
    double = [layer(generator, (True, place != 1)) for place in range(2)]
    single = [layer(generator) for _ in range(11)]
    return double, single


def flat(layers):
    double, single = layers
    named = [(f"transformer_blocks.{place}.attn", entries) for place, entries in enumerate(double)]
    named += [(f"single_transformer_blocks.{place}.attn", entries) for place, entries in enumerate(single)]
    return {
        f"{module}.inner_attention.{name}": tensor
        for module, entries in named
        for name, tensor in entries.items()
    }


@pytest.fixture
def path(layers, tmp_path):
    torch.save(flat(layers), tmp_path / "Model_0.06_0.07.pt")
    return tmp_path / "Model_0.06_0.07.pt"


def test_every_layer_gets_its_own_numbers(path, layers):
    calibration = read_published(path)
    assert calibration.size == (13, HEADS) and calibration.model == "Model_0.06_0.07.pt"
    tables = (calibration.values[name] for name in ("cdf", "skip_threshold"))
    for values, skips, entries in zip(*tables, [*layers[0], *layers[1]], strict=True):
        expected = torch.where(entries["is_sparse"], entries["cdfthreshd"], 1.0)
        assert torch.equal(torch.tensor(values), expected)
        skip = torch.where(entries["is_sparse"], entries["pvthreshd"], 1000.0)
        assert torch.equal(torch.tensor(skips), skip)
    expected = torch.stack([entries["simthreshd1"] for entries in [*layers[0], *layers[1]]])
    assert torch.equal(torch.tensor(calibration.values["similarity_threshold"]), expected)


def test_heads_that_are_not_sparse_are_exact(path, layers):
    """Every score is far below the first ones, so that any threshold of the file would skip."""
    query, key, value = random_qkv(LAYOUT, heads=HEADS)
    query[..., 0], key[..., 0] = 30.0, -30.0
    key[:, :, :64, 0] = 30.0
    strategy = create_strategy("sparge", calibration=str(path), quantization="auto", **USE)
    strategy(query, key, value, AttentionContext(LAYOUT, 2, 13))
    assert strategy.report().density < 0.9
    layers[0][1]["is_sparse"][:] = False
    torch.save(flat(layers), path)
    strategy = create_strategy("sparge", calibration=str(path), **USE)
    strategy(query, key, value, AttentionContext(LAYOUT, 1, 13))
    assert strategy.report().density == 1.0


def test_the_strategy_uses_them(path, layers, tmp_path):
    read_published(path).save(tmp_path / "converted.json")
    assert Calibration.load(tmp_path / "converted.json") == read_published(path)
    query, key, value = random_qkv(LAYOUT, heads=HEADS)
    for file in (path, tmp_path / "converted.json"):
        strategy = create_strategy("sparge", calibration=str(file), **USE)
        for index, entries in enumerate([*layers[0], *layers[1]]):
            context = AttentionContext(LAYOUT, index, 13)
            pattern = strategy.pattern(query, key, context)
            forced = create_strategy("sparge", **USE).planned(query, context).forced
            for head in range(HEADS):
                one = slice(head, head + 1)
                sparse = bool(entries["is_sparse"][head])
                alone = predict_mask(
                    query[:, one],
                    key[:, one],
                    (128, 64),
                    cdf=float(entries["cdfthreshd"][head]) if sparse else 1.0,
                    similarity_threshold=float(entries["simthreshd1"][head]),
                    forced=forced,
                )
                assert torch.equal(pattern.mask.to_blocks()[:, one], alone.to_blocks())
            expected = torch.where(entries["is_sparse"], entries["pvthreshd"], 1000.0)
            assert torch.equal(pattern.skip_threshold, expected)
    strategy(query, key, value, AttentionContext(LAYOUT, 1, 13))
    assert 0 < strategy.report().density < 1


def test_another_model_and_other_parameters_are_refused(path):
    query, key, value = random_qkv(LAYOUT, heads=HEADS)
    strategy = create_strategy("sparge", calibration=str(path), **USE)
    with pytest.raises(ParameterError, match="of Model_0.06_0.07.pt: .* 13 layers of 2 heads"):
        strategy(query, key, value, AttentionContext(LAYOUT, 0, 12))
    with pytest.raises(ParameterError, match="was made with attention_sink=True, got False"):
        create_strategy("sparge", calibration=str(path))
    for name, value in (("similarity_threshold", 0.5), ("skip_threshold", 20)):
        with pytest.raises(ParameterError, match=f"sets {name} of every head; leave {name} out"):
            create_strategy("sparge", calibration=str(path), **USE, **{name: value})


class Stranger:
    pass


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda entries: entries | {"x": torch.ones(2)}, "expected names <stack>.<number>.* got 'x'"),
        (lambda entries: entries | {next(iter(entries)): 3}, "must be a tensor with one number per head"),
        (lambda entries: entries | {next(iter(entries)): torch.full((2,), float("nan"))}, "is not finite"),
        (
            lambda entries: entries | {next(iter(entries)): torch.ones(3)},
            r"heads; got 65 entries of \[2, 3\]",
        ),
        (lambda entries: dict([*entries.items()][1:]), "every layer must have is_sparse"),
        (
            lambda entries: {name: value for name, value in entries.items() if ".3." not in name},
            "layers of 'single_transformer_blocks' are",
        ),
        (lambda entries: [*entries.values()], "holds a list, expected a dict"),
        (lambda entries: entries | {"x": Stranger()}, "is not a file of tensors"),
    ],
    ids=["name", "number", "nan", "heads", "missing", "gap", "list", "code"],
)
def test_anything_else_is_refused(layers, tmp_path, change, message):
    torch.save(change(flat(layers)), tmp_path / "broken.pt")
    with pytest.raises(ParameterError, match=message):
        read_published(tmp_path / "broken.pt")


def test_no_file_and_no_tensors(tmp_path):
    with pytest.raises(ParameterError, match="cannot read calibration .*nothing.pt"):
        create_strategy("sparge", calibration=str(tmp_path / "nothing.pt"))
    (tmp_path / "text.pt").write_text("thresholds")
    with pytest.raises(ParameterError, match="is not a file of tensors"):
        read_published(tmp_path / "text.pt")
