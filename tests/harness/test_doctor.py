"""The doctor finds what is right, what is wrong and what hangs; the quick run passes on this machine."""

import contextlib
import json
import signal
import time
from dataclasses import replace

import pytest
import torch

from core import UnsupportedCallError, attention
from harness import doctor, kernel_cases
from harness.kernel_cases import POOLED, Shape, attention_by_definition, make_tensors, with_blocks
from harness.kernel_checks import judge, median_seconds
from harness.kernel_operators import (
    GRADIENTS,
    POOLED_FORWARD,
    all_operators,
    backward_operators,
    dense_operators,
    pooled_operators,
)

CPU = torch.device("cpu")
SHAPE = Shape(2, 2, 150, 16)
HEADS = [(batch, head) for batch in range(2) for head in range(2)]


@pytest.fixture
def sdpa():
    return dense_operators()[0]


@pytest.fixture
def case():
    return make_tensors(SHAPE, torch.float32, CPU)


def answering(operator, change):
    """The operator with its results changed."""

    def prepare(case):
        run = operator.prepare(case)
        return lambda: tuple(change(part) for part in run())

    return replace(operator, prepare=prepare)


def test_a_right_operator(sdpa, case):
    verdict = judge(sdpa, case, HEADS)
    assert verdict.status == "right" and 0 < verdict.error < 1e-6


def _one_element_off(output):
    output[-1, -1, -1, -1] += 0.01
    return output


@pytest.mark.parametrize(
    "change",
    [
        torch.empty_like,
        lambda output: output * 1.001,
        _one_element_off,
        lambda output: output.roll(1, 2),
        lambda output: output.masked_fill(output > 0.2, float("nan")),
    ],
    ids=["never written", "scaled", "one element", "shifted", "nan"],
)
def test_wrong_results_are_wrong(sdpa, case, change):
    assert judge(answering(sdpa, change), case, HEADS).status == "wrong"


def test_changed_inputs_are_wrong(sdpa, case):
    def prepare(case):
        def run():
            output = attention(case.query, case.key, case.value)
            case.key.sub_(case.key.mean(2, keepdim=True))
            return (output,)

        return run

    assert judge(replace(sdpa, prepare=prepare), case, HEADS).reason == "changed its inputs"


@pytest.mark.parametrize(
    "error, status",
    [
        (UnsupportedCallError("no such device"), "unavailable"),
        (ImportError("undefined symbol"), "unavailable"),
        (torch.OutOfMemoryError("out"), "unavailable"),
        (RuntimeError("misaligned address\nmore"), "wrong"),
    ],
)
def test_exceptions_are_lines(sdpa, case, error, status):
    def prepare(case):
        raise error

    verdict = judge(replace(sdpa, prepare=prepare), case, HEADS)
    assert verdict.status == status and "\n" not in verdict.reason


def test_the_definition_holds_for_pooled_blocks_in_small_chunks(monkeypatch):
    """Against one softmax over explicitly listed keys, for one row at a time."""
    case = with_blocks(make_tensors(SHAPE, torch.float32, CPU), (32, 16), POOLED, empty_row=True)
    monkeypatch.setattr(kernel_cases, "CHUNK_SCORES", 1000)
    (output,) = attention_by_definition(case, 1, 1)
    query, key, value = (part[1, 1].double() for part in (case.query, case.key, case.value))
    for row in range(0, 150, 7):
        keys, values, logs = [], [], []
        for block, level in enumerate(case.levels[1, 1, row // 32].tolist()):
            for start in range(16 * block, min(16 * block + 16, 150), level) if level else ():
                run = slice(start, min(start + level, 150))
                keys.append(key[run].mean(0))
                values.append(value[run].mean(0))
                logs.append(torch.tensor(float(run.stop - run.start)).double().log())
        if not keys:
            assert row < 32 and not output[row].any()
            continue
        weights = torch.softmax(torch.stack(keys) @ query[row] / 4 + torch.stack(logs), 0)
        torch.testing.assert_close(output[row], weights @ torch.stack(values), rtol=1e-12, atol=1e-12)


def test_gradients_by_definition_are_autograd_of_masked_softmax():
    case = with_blocks(make_tensors(SHAPE, torch.float32, CPU), (32, 16), 0.5, empty_row=True)
    inputs = [part[0, 1].double().requires_grad_() for part in (case.query, case.key, case.value)]
    scores = (inputs[0] @ inputs[1].T / 4).masked_fill(~case.mask.to_dense()[0, 1], -1e30)
    weights = torch.softmax(scores, -1) * case.mask.to_dense()[0, 1].any(-1, keepdim=True)
    expected = torch.autograd.grad(weights @ inputs[2], inputs, case.grad_output[0, 1].double())
    for right, found in zip(expected, case.definition(0, 1, gradients=True), strict=True):
        torch.testing.assert_close(found, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.9])
def test_patterns_keep_what_was_asked_for(sparsity):
    case = with_blocks(make_tensors(Shape(1, 2, 1280, 16), torch.float32, CPU), (64, 64), sparsity, False)
    case.mask.check()
    assert (case.mask.counts == 20 * (1 - sparsity)).all()
    assert case.density == pytest.approx(1 - sparsity)
    assert case.pairs() == pytest.approx(2 * 1280**2 * (1 - sparsity))


def test_pooled_density_counts_pooled_keys():
    case = with_blocks(make_tensors(Shape(1, 1, 1280, 16), torch.float32, CPU), (64, 64), POOLED, False)
    assert case.density == pytest.approx(0.05 + 0.10 / 2 + 0.10 / 4 + 0.25 / 8)


def test_calls_are_timed(case, sdpa):
    seconds, calls = median_seconds(lambda: time.sleep(0.002), CPU, budget_s=0.02)
    assert 0.002 <= seconds < 0.1 and 3 <= calls <= 10


def test_quick_on_the_cpu(tmp_path, capsys):
    file = tmp_path / "found.json"
    assert doctor.main(["--quick", "--device", "cpu", "--json", str(file)]) == 0
    printed = capsys.readouterr().out
    assert "every default is right" in printed
    findings = json.loads(file.read_text())["devices"]["cpu"]["findings"]
    found = {(f["check"]["family"], f["check"]["operator"]): f["status"] for f in findings}
    assert set(found) == {(operator.family, operator.name) for operator in all_operators()}
    assert found["dense", "sdpa"] == found["block-sparse", "torch"] == "right"
    assert found["dense", "flash4"] == "unavailable"


def test_a_wrong_default_ends_with_1(monkeypatch, capsys, sdpa):
    monkeypatch.setattr(doctor, "all_operators", lambda: [answering(sdpa, torch.zeros_like)])
    assert doctor.main(["--quick", "--device", "cpu"]) == 1
    printed = capsys.readouterr().out
    assert printed.count("wrong       dense") == 1 and "1 default backend checks are WRONG" in printed


def test_a_wrong_backend_that_is_no_default_ends_with_0(monkeypatch, capsys, sdpa):
    quiet = replace(answering(sdpa, torch.zeros_like), is_default=lambda case: False)
    monkeypatch.setattr(doctor, "all_operators", lambda: [quiet])
    assert doctor.main(["--quick", "--device", "cpu"]) == 0


def test_an_interrupt_that_an_operator_swallows_is_not_lost(monkeypatch, capsys, sdpa):
    def swallow(case):
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        return sdpa.prepare(case)

    before = signal.getsignal(signal.SIGINT)
    operators = [replace(sdpa, name=name, prepare=swallow) for name in ("first", "second")]
    monkeypatch.setattr(doctor, "all_operators", lambda: operators)
    assert doctor.main(["--quick", "--device", "cpu"]) == 130
    assert "second" not in capsys.readouterr().out and signal.getsignal(signal.SIGINT) is before


def test_what_is_no_default_is_not_called_right(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "all_operators", lambda: [o for o in all_operators() if o.name == "flash4"])
    assert doctor.main(["--quick", "--device", "cpu"]) == 0
    assert capsys.readouterr().out.endswith("unavailable; no default was among them\n")


@pytest.mark.parametrize(
    "arguments", [["--device", "tpu"], ["--backends", "fast"], ["--timeout", "0"], ["--json", ""]]
)
def test_bad_input_is_one_line(arguments, capsys):
    assert doctor.main(arguments) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_every_check_names_one_operator():
    checks = doctor.make_checks(quick=False)
    assert len(set(checks)) == len(checks)
    names = [(operator.family, operator.name) for operator in all_operators()]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize("operator", [*pooled_operators(), *backward_operators()[:1]], ids=lambda o: o.name)
def test_tolerances_of_gradients_and_pooling_are_not_loose(operator):
    """fp32 results on a CPU are far below the tolerance, 16-bit ones within a factor of ten of it."""
    case = with_blocks(make_tensors(Shape(1, 2, 300, 64), torch.bfloat16, CPU), (64, 64), POOLED, True)
    case = case if operator.is_masked else make_tensors(Shape(1, 2, 300, 64), torch.bfloat16, CPU)
    verdict = judge(operator, case, [(0, 0), (0, 1)])
    tolerance = (POOLED_FORWARD if operator.is_masked else GRADIENTS)[torch.bfloat16]
    assert verdict.status == "right" and verdict.error > tolerance / 10


def test_every_block_size_is_checked_but_with_what_compiles_for_seconds():
    blocks = {}
    for check in doctor.make_checks(quick=False):
        blocks.setdefault((check.family, check.operator), set()).add(check.block_size)
    assert blocks["block-sparse", "flex"] == {(128, 128)}
    assert blocks["block-sparse", "triton"] == set(doctor.BLOCKS)
    assert blocks["dense", "sdpa"] == {None}
