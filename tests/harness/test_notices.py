"""What is said beside a run's figures."""

import pytest

from harness.notices import dense_after_all, run_notices, short_passes_notice, times_notice
from tests.browser.synthetic_run import make_row, settings


def row(label="radial", **changes):
    return make_row(label, "a red ball", 0, 1, **changes)


@pytest.mark.parametrize(
    ("device", "model", "word"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.70GHz (2 cores, 2 threads)", "demo", "on a CPU"),
        ("AMD EPYC 9554 (1 cores, 1 threads)", "a/checkpoint", "on a CPU"),
        ("cpu", "demo", "on a CPU"),
        ("NVIDIA H200", "demo", "too small for a GPU"),
        ("NVIDIA H200", "a/checkpoint", ""),
        ("NVIDIA GeForce RTX 5090", "cogvideox-2b-random", ""),
    ],
)
def test_times_that_do_not_carry_over_are_noticed(device, model, word):
    notice = times_notice(settings() | {"device": device, "model": model})
    assert word in notice and bool(notice) is bool(word)


def test_strategies_that_executed_every_pair_or_more_are_named_with_the_reason():
    rows = [
        row("radial", density=1.0, tokens=64, dense_calls={"warm-up": 2}, backends={"torch": 1, "sdpa": 2}),
        row("tome", density=1.0, dense_calls={"warm-up": 3}, backends={"sdpa": 3}),
        row("combined", density=1.0704, tokens=64),
        row("sparge", density=0.999),
        row("gilbert-block", density=None),
        row("svg-smart", density=1.0, status="failed"),
        make_row("dense", "a red ball", 0, 0, density=1.0),
    ]
    assert dense_after_all(rows) == [
        "radial executed every pair (density 1.000): at 64 tokens it leaves nothing out",
        "tome executed every pair (density 1.000): warm-up",
        "combined executed more pairs than dense attention has (density 1.070): at 64 tokens what it adds "
        "costs more than what it leaves out",
    ]


def test_ratios_of_short_passes_are_called_noise():
    quick, slow = row(dense_denoise_time_s=0.03), row(dense_denoise_time_s=1.5)
    expected = "a denoising pass took 0.030 s; speedups of so short passes are noise"
    assert short_passes_notice([quick, quick, slow]) == expected
    assert short_passes_notice([quick, slow, slow]) == ""
    assert short_passes_notice([row(dense_denoise_time_s=None)]) == ""
    assert short_passes_notice([make_row("dense", "a red ball", 0, 0, dense_denoise_time_s=0.03)]) == ""


def test_a_run_says_all_that_applies():
    on_gpu = settings() | {"device": "NVIDIA H200", "model": "a/checkpoint"}
    assert run_notices(on_gpu, [row(density=0.5, dense_denoise_time_s=9.0)]) == []
    on_cpu = settings() | {"device": "cpu"}
    notices = run_notices(on_cpu, [row(density=1.0, dense_denoise_time_s=0.03)])
    assert [notice.split()[0] for notice in notices] == ["radial", "These", "a"]
