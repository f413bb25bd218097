"""The README's comparison section and its moving strip."""

import time

import pytest
from PIL import Image

from harness import gallery, readme
from harness.errors import BenchError
from harness.results import append_row, read_rows
from tests.browser.synthetic_run import LABELS, PROMPTS, make_row, write_run


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    root = tmp_path_factory.mktemp("repository")
    run = write_run(root / "run", LABELS[:3], PROMPTS[:2])
    return gallery.build(run, root / "gallery").parent


@pytest.fixture
def page(built):
    path = built.parent / "README.md"
    path.write_text(f"# Title\n\nabove\n\n{readme.BEGIN}\nold\n{readme.END}\n\nbelow\n")
    return path


class TestUpdate:
    def test_only_what_is_between_the_markers_changes(self, built, page):
        readme.update(page, built)
        text = page.read_text()
        assert text.startswith(f"# Title\n\nabove\n\n{readme.BEGIN}\n")
        assert text.endswith(f"\n{readme.END}\n\nbelow\n")
        assert "\nold\n" not in text

    def test_says_what_was_measured_where_and_how(self, built, page):
        readme.update(page, built)
        text = page.read_text()
        assert 'src="gallery/comparison.webp"' in text
        assert "| strategy | jobs |" in text
        assert "Measured on NVIDIA H200" in text
        assert "`nox -s bench -- --strategies dense radial sparge --output runs/demo`" in text
        assert "python -m harness.gallery" in text
        assert all(label in text for label in LABELS[:3])

    def test_second_update_leaves_the_file_alone(self, built, page):
        readme.update(page, built)
        before = page.stat()
        readme.update(page, built)
        assert (page.stat().st_ino, page.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)

    def test_address_leads_from_the_readme_to_the_gallery(self, built):
        path = built.parent / "docs" / "comparison.md"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{readme.BEGIN}{readme.END}")
        readme.update(path, built)
        assert 'src="../gallery/comparison.webp"' in path.read_text()

    def test_cpu_figures_carry_the_warning(self, tmp_path):
        run = write_run(
            tmp_path / "run", LABELS[:2], PROMPTS[:1], device="Some Processor (2 cores, 2 threads)"
        )
        output = gallery.build(run, tmp_path / "gallery").parent
        assert "say nothing about times on a GPU" in readme.section(output, "gallery")

    def test_hostile_prompt_stays_text(self, tmp_path):
        run = write_run(tmp_path / "run", LABELS[:2], ('"><script>alert(1)</script>',))
        output = gallery.build(run, tmp_path / "gallery").parent
        assert "<script" not in readme.section(output, "gallery")


@pytest.mark.parametrize(
    "text",
    [
        "",
        readme.BEGIN,
        readme.END,
        f"{readme.END}\n{readme.BEGIN}",
        f"{readme.BEGIN}\n{readme.BEGIN}\n{readme.END}",
        f"{readme.BEGIN}\n{readme.END}\n{readme.END}",
    ],
)
def test_markers_must_stand_once_and_in_order(tmp_path, built, text):
    path = tmp_path / "README.md"
    path.write_text(text)
    with pytest.raises(BenchError, match="once each"):
        readme.update(path, built)
    assert path.read_text() == text


def test_missing_readme(tmp_path):
    with pytest.raises(BenchError, match="cannot be read"):
        readme.check_markers(tmp_path / "README.md")


class TestStrip:
    def test_moves_and_is_small(self, built):
        strip = built / "comparison.webp"
        assert strip.stat().st_size <= readme.STRIP_BYTES
        with Image.open(strip) as picture:
            assert picture.format == "WEBP"
            assert picture.n_frames == 9

    def test_noise_is_made_to_fit(self, built, tmp_path, monkeypatch):
        monkeypatch.setattr(readme, "STRIP_BYTES", 12_000)
        readme.write_strip(read_rows(built / "results.jsonl"), built, tmp_path / "small.webp")
        assert (tmp_path / "small.webp").stat().st_size <= 12_000

    def test_every_strategy_comes_before_any_comes_twice(self, tmp_path):
        labels = (
            "radial:a=1",
            "radial:a=2",
            "radial:a=3",
            "dense",
            "tome",
            "sparge",
            "svg-smart",
            "gilbert-block",
        )
        rows = [make_row(label, PROMPTS[0], 0, place) for place, label in enumerate(labels)]
        columns, _ = readme._strip_cells(rows)
        assert columns == [
            "dense",
            "radial:a=1",
            "radial:a=2",
            "tome",
            "sparge",
            "svg-smart",
            "gilbert-block",
        ]

    def test_a_failed_job_leaves_its_place_empty(self, tmp_path):
        run = write_run(tmp_path / "run", LABELS[:3], PROMPTS[:2])
        append_row(
            run / "results.jsonl",
            make_row("radial", PROMPTS[0], 0, 1, status="failed", error="no", video=None),
        )
        assert (gallery.build(run, tmp_path / "gallery").parent / "comparison.webp").is_file()


def test_a_very_long_prompt_is_cut_in_no_time():
    from PIL import Image, ImageDraw, ImageFont

    sheet = Image.new("RGB", (900, 40), "white")
    start = time.perf_counter()
    for text in ("a" * 100_000, "word " * 20_000):
        readme._write(ImageDraw.Draw(sheet), (0, 5), text, 14, "black", 880)
    assert time.perf_counter() - start < 2
    columns = [x for x in range(900) if sheet.getpixel((x, 12)) != (255, 255, 255)]
    assert ImageFont.load_default(14).getlength("...") < max(columns) <= 880
