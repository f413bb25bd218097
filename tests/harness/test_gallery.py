"""Building the gallery: complete, idempotent, safe against interruption and bad input."""

import json
import os
import re
from pathlib import Path

import pytest

from harness import gallery, readme
from harness.errors import BenchError
from harness.results import append_row, read_rows
from harness.small_models import TINY
from tests.browser.synthetic_run import LABELS, PROMPTS, make_row, write_run


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def shared_run(tmp_path_factory):
    """A run that no test changes."""
    return write_run(tmp_path_factory.mktemp("shared") / "run")


@pytest.fixture
def run_dir(tmp_path):
    return write_run(tmp_path / "run", LABELS[:2], PROMPTS[:2])


def fail_with(argv, capsys):
    assert gallery.main([str(part) for part in argv]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    return captured.err


class TestBuild:
    def test_writes_everything_the_page_needs(self, shared_run, tmp_path):
        page = gallery.build(shared_run, tmp_path / "gallery")
        assert page == tmp_path / "gallery" / "index.html"
        jobs = [row.job_id for row in read_rows(shared_run / "results.jsonl")]
        expected = {"index.html", "run.json", "results.jsonl", "tables.md", "comparison.webp"}
        assert set(content(page.parent)) == expected | {f"videos/{job}.mp4" for job in jobs}
        for row in read_rows(page.parent / "results.jsonl"):
            assert row.video in page.read_text()
            assert row.frames is None

    def test_many_shares_of_a_strategy_are_folded_and_few_are_open(self, run_dir, tmp_path):
        results = run_dir / "results.jsonl"
        rows = [json.loads(line) for line in results.read_text().splitlines()]
        for row in rows:
            if row["strategy"] != "dense":
                row["shares_by_layer"] = {f"share {number}": [[0.5]] for number in range(3)}
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = gallery.build(run_dir, tmp_path / "few").read_text()
        assert '<details class="shares" open>' in page and ": 3 further shares</summary>" in page
        for row in rows:
            if row["strategy"] != "dense":
                row["shares_by_layer"]["a < b"] = [[1.0]]
        results.write_text("".join(json.dumps(row) + "\n" for row in rows))
        page = gallery.build(run_dir, tmp_path / "many").read_text()
        assert '<details class="shares">' in page and "<figcaption>a &lt; b<output>" in page

    def test_run_stays_as_it_was(self, shared_run, tmp_path):
        before = content(shared_run)
        gallery.build(shared_run, tmp_path / "gallery")
        assert content(shared_run) == before

    def test_second_build_writes_nothing(self, shared_run, tmp_path):
        output = gallery.build(shared_run, tmp_path / "gallery").parent
        before = content(output)
        inodes = {path: path.stat().st_ino for path in output.rglob("*")}
        gallery.build(shared_run, output)
        assert content(output) == before
        assert {path: path.stat().st_ino for path in output.rglob("*")} == inodes

    def test_same_bytes_from_another_folder_and_from_the_gallery_itself(self, shared_run, tmp_path):
        first = gallery.build(shared_run, tmp_path / "one").parent
        before = content(first)
        again = gallery.build(first, tmp_path / "two").parent
        assert content(again) == before
        gallery.build(first, first)
        assert content(first) == before

    def test_page_asks_nothing_of_the_network(self, shared_run, tmp_path):
        text = gallery.build(shared_run, tmp_path / "gallery").read_text()
        assert "http" not in text.replace("http://www.w3.org/", "")
        assert "<link" not in text.replace('<link rel="icon" href="data:,">', "")
        assert str(tmp_path) not in text

    def test_gallery_inside_the_run_folder(self, run_dir):
        assert gallery.build(run_dir, run_dir / "gallery").is_file()

    def test_failed_rows_are_shown_with_their_error(self, run_dir, tmp_path):
        changes = {"status": "failed", "error": "out of memory & time", "video": None}
        append_row(run_dir / "results.jsonl", make_row("tome", PROMPTS[0], 0, 2, **changes))
        text = gallery.build(run_dir, tmp_path / "gallery").read_text()
        assert "Did not finish" in text
        assert "out of memory &amp; time" in text

    def test_only_failed_rows(self, tmp_path):
        run_dir = write_run(tmp_path / "run", prompts=())
        changes = {"status": "failed", "error": "no luck", "video": None, "density": None}
        append_row(run_dir / "results.jsonl", make_row("tome", PROMPTS[0], 0, 2, **changes))
        output = gallery.build(run_dir, tmp_path / "gallery").parent
        assert "no luck" in (output / "index.html").read_text()
        assert not (output / "comparison.webp").exists()


class TestOldFiles:
    def test_stale_videos_go_and_strangers_stay(self, run_dir, tmp_path):
        output = gallery.build(run_dir, tmp_path / "gallery").parent
        (output / "videos" / "mine.mp4").write_bytes(b"keep me")
        (output / "note.txt").write_text("keep me")
        fewer = write_run(tmp_path / "fewer", LABELS[:1], PROMPTS[:1])
        gallery.build(fewer, output)
        assert {path.name for path in (output / "videos").iterdir()} == {"job-0-0.mp4", "mine.mp4"}
        assert (output / "note.txt").read_text() == "keep me"

    def test_broken_previous_results_remove_nothing(self, run_dir, tmp_path):
        output = gallery.build(run_dir, tmp_path / "gallery").parent
        (output / "results.jsonl").write_text('{"job_id": "torn"}\n')
        fewer = write_run(tmp_path / "fewer", LABELS[:1], PROMPTS[:1])
        gallery.build(fewer, output)
        assert len(list((output / "videos").iterdir())) == 4

    def test_previous_results_cannot_point_outside(self, run_dir, tmp_path):
        output = tmp_path / "gallery"
        output.mkdir()
        (tmp_path / "precious.mp4").write_bytes(b"precious")
        row = make_row("dense", PROMPTS[0], 0, 0, job_id="../../precious", video="videos/../../precious.mp4")
        append_row(output / "results.jsonl", row)
        gallery.build(run_dir, output)
        assert (tmp_path / "precious.mp4").read_bytes() == b"precious"


class TestInterruption:
    @pytest.mark.parametrize("step", ["describe_page", "to_markdown", "_install"])
    def test_old_page_survives(self, run_dir, tmp_path, monkeypatch, step):
        output = gallery.build(run_dir, tmp_path / "gallery").parent
        before = content(output)
        fewer = write_run(tmp_path / "fewer", LABELS[:1], PROMPTS[:1])

        def interrupt(*_arguments):
            raise KeyboardInterrupt

        monkeypatch.setattr(gallery, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            gallery.build(fewer, output)
        assert content(output) == before

    def test_between_two_renames_the_old_page_has_its_videos(self, run_dir, tmp_path, monkeypatch):
        output = gallery.build(run_dir, tmp_path / "gallery").parent
        old_page = (output / "index.html").read_bytes()
        old_videos = {path.name for path in (output / "videos").iterdir()}
        fewer = write_run(tmp_path / "fewer", LABELS[:3], PROMPTS[:1])
        rename = Path.replace

        def stop_at_the_page(path, target):
            if path.name == "index.html":
                raise OSError("no space left on device")
            return rename(path, target)

        monkeypatch.setattr(Path, "replace", stop_at_the_page)
        with pytest.raises(BenchError, match="no space left"):
            gallery.build(fewer, output)
        assert (output / "index.html").read_bytes() == old_page
        assert old_videos <= {path.name for path in (output / "videos").iterdir()}
        monkeypatch.undo()
        gallery.build(fewer, output)
        assert content(output) == content(gallery.build(fewer, tmp_path / "fresh").parent)

    def test_leftovers_of_a_killed_build_are_cleared(self, run_dir, tmp_path):
        (tmp_path / "gallery" / ".staging" / "videos").mkdir(parents=True)
        (tmp_path / "gallery" / ".staging" / "half.mp4").write_bytes(b"half")
        output = gallery.build(run_dir, tmp_path / "gallery").parent
        assert not (output / ".staging").exists()


class TestBadInput:
    """One clear line, exit code 2, the old gallery as it was."""

    @pytest.fixture
    def output(self, shared_run, tmp_path):
        return gallery.build(shared_run, tmp_path / "gallery").parent

    @pytest.mark.parametrize(
        ("damage", "message"),
        [
            (lambda run: (run / "run.json").unlink(), "run.json does not exist"),
            (lambda run: (run / "run.json").write_text("{"), "not valid JSON"),
            (lambda run: (run / "run.json").write_text("[1]"), "must hold an object"),
            (lambda run: (run / "run.json").write_text('{"model": "demo"}'), "'device' is missing"),
            (lambda run: (run / "results.jsonl").unlink(), "has no result"),
            (lambda run: (run / "results.jsonl").write_text("nonsense\n"), "line 1 is not a result row"),
            (lambda run: (run / "results.jsonl").write_bytes(b"\xff\xfe\n"), "line 1 is not a result row"),
            (lambda run: (run / "videos" / "job-1-1.mp4").unlink(), "job-1-1.*does not exist"),
            (lambda run: (run / "videos" / "job-1-1.mp4").write_bytes(b""), "is not an MP4"),
            (lambda run: (run / "videos" / "job-0-1.mp4").write_bytes(b"0000ftypjunk"), "can be decoded"),
        ],
    )
    def test_damaged_run(self, run_dir, output, capsys, damage, message):
        damage(run_dir)
        before = content(output)
        text = fail_with(["--run", run_dir, "--output", output], capsys)
        assert re.search(message, text)
        assert content(output) == before

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"video": "../run.json"}, "outside the run folder"),
            ({"video": "/etc/hostname"}, "outside the run folder"),
            ({"job_id": "../../x"}, "not a plain name"),
            ({"size": {}}, "'size' of job"),
        ],
    )
    def test_hostile_row(self, run_dir, output, capsys, changes, message):
        append_row(run_dir / "results.jsonl", make_row("tome", PROMPTS[0], 0, 0, **changes))
        before = content(output)
        assert message in fail_with(["--run", run_dir, "--output", output], capsys)
        assert content(output) == before

    def test_wrong_size_in_run(self, tmp_path, capsys):
        run_dir = write_run(tmp_path / "sized", LABELS[:1], PROMPTS[:1], size={"height": 96})
        assert "'size' needs" in fail_with(["--run", run_dir, "--output", tmp_path / "out"], capsys)

    def test_output_is_a_file(self, shared_run, tmp_path, capsys):
        (tmp_path / "taken").write_text("a file")
        assert "cannot write" in fail_with(["--run", shared_run, "--output", tmp_path / "taken"], capsys)
        assert (tmp_path / "taken").read_text() == "a file"


class TestFindRun:
    def test_newest_run(self, tmp_path, monkeypatch):
        for name, time in (("old", 1000), ("new", 3000), ("middle", 2000)):
            write_run(tmp_path / "runs" / name, LABELS[:1], PROMPTS[:1])
            os.utime(tmp_path / "runs" / name / "results.jsonl", (time, time))
        assert gallery.find_run(tmp_path / "runs", tmp_path / "gallery").name == "new"

    @pytest.mark.parametrize("model", TINY)
    def test_runs_of_random_weights_do_not_count(self, model, tmp_path):
        for name, time in (("real", 1000), ("random", 2000)):
            write_run(tmp_path / "runs" / name, LABELS[:1], PROMPTS[:1])
            os.utime(tmp_path / "runs" / name / "results.jsonl", (time, time))
        path = tmp_path / "runs" / "random" / "run.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"model": model}))
        assert gallery.find_run(tmp_path / "runs", tmp_path / "gallery").name == "real"

    def test_the_gallery_regenerates_itself(self, shared_run, tmp_path, monkeypatch, capsys):
        output = gallery.build(shared_run, tmp_path / "gallery").parent
        before = content(output)
        (output / "index.html").unlink()
        monkeypatch.chdir(tmp_path)
        assert gallery.main([]) == 0
        assert content(output) == before
        assert "index.html" in capsys.readouterr().out

    def test_nothing_to_show(self, tmp_path, monkeypatch, capsys):
        monkeypatch.chdir(tmp_path)
        assert "nox -s bench" in fail_with([], capsys)
        assert not (tmp_path / "gallery").exists()


class TestReadme:
    def test_renewed_with_the_repositorys_gallery(self, shared_run, tmp_path, monkeypatch):
        monkeypatch.setattr(gallery, "ROOT", tmp_path)
        (tmp_path / "README.md").write_text(f"top\n{readme.BEGIN}\n{readme.END}\nend\n")
        assert gallery.main(["--run", str(shared_run), "--output", str(tmp_path / "gallery")]) == 0
        assert "gallery/comparison.webp" in (tmp_path / "README.md").read_text()

    def test_untouched_with_another_folder(self, shared_run, tmp_path, monkeypatch):
        monkeypatch.setattr(gallery, "ROOT", tmp_path)
        (tmp_path / "README.md").write_text("no markers here")
        assert gallery.main(["--run", str(shared_run), "--output", str(tmp_path / "elsewhere")]) == 0
        assert (tmp_path / "README.md").read_text() == "no markers here"

    def test_missing_markers_stop_before_anything_is_written(self, shared_run, tmp_path, capsys):
        (tmp_path / "README.md").write_text("no markers here")
        argv = ["--run", shared_run, "--output", tmp_path / "out", "--readme", tmp_path / "README.md"]
        assert "comparison:begin" in fail_with(argv, capsys)
        assert not (tmp_path / "out").exists()


def test_results_in_the_gallery_are_strict_json(shared_run, tmp_path):
    output = gallery.build(shared_run, tmp_path / "gallery").parent
    for line in (output / "results.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)
