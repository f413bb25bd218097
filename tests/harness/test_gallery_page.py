"""What the page says."""

import dataclasses
import re

import pytest

from harness.gallery import _render
from harness.page import MOST_PLAYERS, describe_page
from tests.browser.synthetic_run import LABELS, PROMPTS, make_row, settings

HOSTILE = '<script>alert("1")</script>\'&'


def rows(labels=LABELS[:3], prompts=PROMPTS[:2], **changes):
    return [
        make_row(label, prompt, index, place, **changes)
        for index, prompt in enumerate(prompts)
        for place, label in enumerate(labels)
    ]


def test_dense_comes_first_and_is_marked():
    page = describe_page(settings(), list(reversed(rows())))
    assert page["rows"][0]["label"] == "dense"
    assert [row["baseline"] for row in page["rows"]] == [True, False, False]
    for group in page["groups"]:
        assert group["tiles"][0]["label"] == "dense"


def test_figures_under_a_video():
    page = describe_page(settings(), rows())
    tile = page["groups"][0]["tiles"][1]
    assert [fact["text"] for fact in tile["facts"]] == ["60.0 %", "1.15\N{MULTIPLICATION SIGN}", "33.1 dB"]


def test_identical_videos_say_so_instead_of_a_capped_psnr():
    page = describe_page(
        settings(), [make_row("dense", "p", 0, 0), make_row("tome", "p", 0, 1, identical=True, psnr_db=100.0)]
    )
    assert page["groups"][0]["tiles"][1]["facts"][-1]["text"] == "identical"
    texts = {
        column.name: cell["text"]
        for column, cell in zip(page["columns"], page["rows"][1]["cells"], strict=True)
    }
    assert texts["PSNR"] == "identical"
    assert page["plots"] == []


def test_failed_job_leaves_a_gap_and_its_error():
    failed = make_row(
        "tome", PROMPTS[0], 0, 3, status="failed", error="no memory", video=None, density_by_layer=None
    )
    page = describe_page(settings(), [*rows(), failed])
    tile = page["groups"][0]["tiles"][3]
    assert (tile["video"], tile["absent"], tile["facts"]) == (None, "did not finish", [])
    assert page["failures"][0]["error"] == "no memory"
    assert dict(page["provenance"])["Jobs"] == "6 of 7 finished"


def test_a_further_share_has_a_map_of_its_own():
    made = rows()
    sparse = made[1]
    made[1] = dataclasses.replace(sparse, shares_by_layer={"temporal_heads": [[None, 0.5], [0.25, 0.75]]})
    maps = [entry for entry in describe_page(settings(), made)["maps"] if entry["label"] == sparse.label]
    assert [(entry["figure"], entry["mean"]) for entry in maps][1:] == [("temporal heads", "50.0 %")]
    assert maps[1]["alt"].startswith(f"Temporal heads of {sparse.label} for 2 layers and 2 steps")
    assert maps[0]["figure"] == "density"


def test_one_group_per_prompt_and_seed():
    both = [*rows(), *(make_row(label, PROMPTS[0], 0, 5, seed=7) for label in LABELS[:2])]
    page = describe_page(settings(), both)
    assert [(group["prompt"], group["seed"]) for group in page["groups"]] == [
        (PROMPTS[0], 7),
        (PROMPTS[0], 42),
        (PROMPTS[1], 42),
    ]
    assert page["many_seeds"]


def test_a_figure_that_nobody_measured_has_no_column():
    names = [column.name for column in describe_page(settings(), rows())["columns"]]
    assert "LPIPS" not in names
    names = [column.name for column in describe_page(settings(), rows(lpips=0.1))["columns"]]
    assert "LPIPS" in names


@pytest.mark.parametrize(("count", "columns"), [(1, 1), (3, 3), (5, 5), (6, 3), (7, 4), (9, 5), (11, 4)])
def test_rows_of_videos_are_even(count, columns):
    labels = tuple(f"method-{index}" for index in range(count))
    assert describe_page(settings(), rows(labels, PROMPTS[:1]))["groups"][0]["columns"] == columns


def test_many_videos_are_loaded_when_near():
    few = rows(LABELS, PROMPTS)
    many = rows(LABELS, [f"prompt {index}" for index in range(1 + MOST_PLAYERS // len(LABELS))])
    assert not describe_page(settings(), few)["lazy"]
    assert describe_page(settings(), many)["lazy"]
    assert "data-src=" in _render(settings(), many)
    assert "data-src=" not in _render(settings(), few)


def test_no_dense_row_no_difference_view():
    text = _render(settings(), rows(LABELS[1:3]))
    assert 'id="view"' not in text


@pytest.mark.parametrize("name", ["label", "prompt", "error", "command", "model"])
def test_hostile_text_stays_text(name):
    run = settings()
    changes = {}
    if name in run:
        run[name] = HOSTILE
    else:
        changes[name] = HOSTILE
    failed = {"status": "failed", "video": None} if name == "error" else {}
    strange = make_row("tome", PROMPTS[0], 0, 2, **(failed | changes))
    text = _render(run, [*rows(LABELS[:2], PROMPTS[:1]), strange])
    assert HOSTILE not in text
    assert "alert(&#34;1&#34;)" in text
    assert len(re.findall(r"<script", text)) == 1


def test_parameters_are_listed():
    assert "block_size=64, dense_layers=1, dense_timesteps=2" in _render(settings(), rows())
