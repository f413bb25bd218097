import pytest

from harness.results import ResultRow
from harness.tables import format_bytes, format_time, provenance_line, summarise, to_markdown

COMMON = {
    "preset": None,
    "parameters": {},
    "model": "m",
    "prompt": "p",
    "prompt_index": 0,
    "seed": 0,
    "steps": 4,
    "size": {"height": 64, "width": 96, "num_frames": 9},
    "guidance_scale": 6.0,
    "dtype": "float32",
    "device": "d",
    "versions": {},
    "commit": None,
    "started_at": "",
}


def row(job_id, label, status="ok", **figures):
    return ResultRow(job_id=job_id, label=label, strategy=label, status=status, **COMMON, **figures)


@pytest.fixture
def rows():
    return [
        row("1", "radial", speedup=1.0, denoise_time_s=4.0, density=0.2, psnr_db=20.0, peak_memory_bytes=5),
        row("2", "dense", speedup=1.0, denoise_time_s=8.0, density=1.0, temporal={"flow_warp_error": 0.1}),
        row("3", "radial", speedup=2.0, denoise_time_s=2.0, density=0.4, psnr_db=30.0, peak_memory_bytes=9),
        row("4", "radial", speedup=4.0, denoise_time_s=1.0, density=0.3, psnr_db=40.0, peak_memory_bytes=7),
        row("5", "radial", status="failed", error="boom"),
    ]


def test_one_row_per_label_dense_first(rows):
    assert [summary.label for summary in summarise(rows)] == ["dense", "radial"]


def test_aggregates(rows):
    radial = summarise(rows)[1]
    assert (radial.jobs, radial.failed) == (3, 1)
    assert radial.speedup == 2.0
    assert radial.speedup_quartiles == (1.5, 3.0)
    assert radial.denoise_time_s == 2.0
    assert radial.density == pytest.approx(0.3)
    assert radial.psnr_db == pytest.approx(30.0)
    assert radial.peak_memory_bytes == 9
    assert radial.ssim is None
    assert radial.flow_warp_error is None


def test_only_failed_jobs_still_make_a_row():
    (summary,) = summarise([row("1", "radial", status="failed", error="boom")])
    assert (summary.jobs, summary.failed, summary.speedup, summary.speedup_quartiles) == (0, 1, None, None)


def test_markdown(rows):
    text = to_markdown(summarise(rows), "from here")
    header, rule, dense, radial, blank, provenance = text.splitlines()
    assert header.count("|") == rule.count("|") == dense.count("|") == radial.count("|")
    assert "2.00x (1.50 to 3.00)" in radial
    assert "3 (1 failed)" in radial
    assert (blank, provenance) == ("", "from here")


def test_identical_videos_are_called_so():
    (summary,) = summarise([row("1", "x", identical=True, psnr_db=100.0)])
    assert "| identical |" in to_markdown([summary])


def test_a_pipe_in_a_label_does_not_break_the_table():
    assert "a\\|b" in to_markdown(summarise([row("1", "a|b")]))


def test_provenance():
    run = {
        "device": "GPU",
        "model": "demo",
        "size": {"height": 192, "width": 320, "num_frames": 17},
        "steps": 12,
        "guidance_scale": 1.0,
        "dtype": "bfloat16",
        "versions": {"torch": "2.13.0", "triton": None},
        "commit": "0123456789abcdef",
        "dirty": True,
        "command": "python -m harness.bench",
    }
    line = provenance_line(run, [row("1", "dense", tokens=4096)])
    assert line == (
        "Measured on GPU: demo, 17 frames of 320x192 (4096 tokens), 12 steps, guidance 1, bfloat16; "
        "torch 2.13.0; 0123456789ab with uncommitted changes; `python -m harness.bench`"
    )


def test_formats():
    assert [format_time(value) for value in (None, 0.1234, 12.34)] == ["-", "0.123 s", "12.3 s"]
    assert [format_bytes(value) for value in (None, 5e6, 1.234e9)] == ["-", "5 MB", "1.23 GB"]
