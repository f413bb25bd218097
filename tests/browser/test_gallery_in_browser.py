"""The gallery in a real browser, opened as a file: it plays, obeys its controls and fits every screen."""

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

PLAYING = """videos => videos.every(
    video => video.readyState >= 2 && !video.paused && video.muted && video.loop)"""
STILL = "videos => videos.every(video => video.readyState >= 2 && video.paused && !video.seeking)"
IN_STEP = """videos => {
    const times = videos.map(video => video.currentTime);
    return Math.max(...times) - Math.min(...times) < 0.125;
}"""
LOADED = "videos => videos.filter(video => video.getAttribute('src')).length"
WATCH = """videos => videos.forEach(video => {
    const start = video.currentTime;
    video.addEventListener('timeupdate', () => { if (video.currentTime !== start) video.dataset.moved = 1; });
})"""
NAME = """node => [node.innerText, node.getAttribute('aria-label'), node.labels?.[0]?.innerText]
    .some(text => text?.trim())"""
PATIENCE_MS = 60_000  # sixty videos on a busy machine
COLUMNS = "tiles => new Set(tiles.map(tile => tile.offsetLeft)).size"
TIMES = "videos => videos.map(video => video.currentTime)"


@pytest.fixture
def faults(page: Page) -> Iterator[list[str]]:
    """Console errors, exceptions and failed requests; the test fails if there is one at its end."""
    found: list[str] = []
    page.on("console", lambda message: message.type in ("error", "warning") and found.append(message.text))
    page.on("pageerror", lambda error: found.append(str(error)))
    page.on("requestfailed", lambda request: found.append(f"{request.url}: {request.failure}"))
    page.on("response", lambda reply: reply.status >= 400 and found.append(f"{reply.url}: {reply.status}"))
    yield found
    assert found == []


def open_page(page: Page, path: Path) -> None:
    page.goto(path.as_uri())


def wait_until(page: Page, condition: str, selector: str = ".tile video") -> None:
    part = f"[...document.querySelectorAll('{selector}')]"
    page.wait_for_function(f"{part}.length > 0 && ({condition})({part})", timeout=PATIENCE_MS)


def times(page: Page, selector: str = ".tile video") -> list[float]:
    return page.eval_on_selector_all(selector, TIMES)


class TestPlayback:
    @pytest.mark.parametrize("size", ["few", "usual"])
    def test_every_video_plays_and_moves_on(self, page, faults, request, size):
        open_page(page, request.getfixturevalue(size))
        wait_until(page, PLAYING)
        page.eval_on_selector_all(".tile video", WATCH)
        wait_until(page, "videos => videos.every(video => video.dataset.moved)")

    def test_only_local_files_are_asked_for(self, page, faults, few):
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        open_page(page, few)
        wait_until(page, PLAYING)
        assert all(url.startswith((few.parent.as_uri(), "data:")) for url in asked)

    def test_pause_holds_all_at_one_frame_and_play_goes_on(self, page, faults, usual):
        open_page(page, usual)
        wait_until(page, PLAYING)
        page.get_by_role("button", name="Pause").click()
        wait_until(page, STILL)
        held = times(page)
        assert max(held) - min(held) < 0.01
        page.wait_for_timeout(300)
        assert times(page) == held
        page.get_by_role("button", name="Play", exact=True).click()
        wait_until(page, PLAYING)

    def test_videos_of_one_prompt_stay_in_step(self, page, faults, few):
        open_page(page, few)
        wait_until(page, PLAYING)
        page.wait_for_timeout(1500)
        wait_until(page, IN_STEP, "#prompt-1 video")

    def test_scrubbing_stops_and_shows_the_same_frame_everywhere(self, page, faults, few):
        open_page(page, few)
        wait_until(page, PLAYING)
        page.locator("#scrub").fill("4")
        wait_until(page, STILL)
        assert times(page) == pytest.approx([4.5 / 9 * 1.125] * 4, abs=0.02)
        expect(page.locator("#frame")).to_have_text("5 / 9")
        page.locator("#scrub").press("ArrowRight")
        expect(page.locator("#frame")).to_have_text("6 / 9")

    def test_speed(self, page, faults, few):
        open_page(page, few)
        wait_until(page, PLAYING)
        page.locator("#speed").select_option("0.25")
        wait_until(page, "videos => videos.every(video => Math.abs(video.playbackRate - 0.25) < 0.05)")

    def test_space_toggles_but_not_inside_a_control(self, page, faults, few):
        open_page(page, few)
        wait_until(page, PLAYING)
        page.keyboard.press("Space")
        expect(page.locator("#play")).to_have_text("Play")
        page.locator("#play").focus()
        page.keyboard.press("Space")
        expect(page.locator("#play")).to_have_text("Pause")

    def test_reduced_motion_starts_paused(self, page, faults, few):
        page.emulate_media(reduced_motion="reduce")
        open_page(page, few)
        wait_until(page, STILL)
        page.locator("#play").click()
        wait_until(page, PLAYING)

    def test_many_videos_are_loaded_near_the_view_only(self, page, faults, many):
        open_page(page, many)
        page.locator("#jump").select_option("prompt-20")
        wait_until(page, PLAYING, "#prompt-20 video")
        assert 4 <= page.eval_on_selector_all("video", LOADED) <= 60
        page.locator("#jump").select_option("prompt-1")
        wait_until(page, PLAYING, "#prompt-1 video")
        wait_until(page, f"videos => ({LOADED})(videos) === 0", "#prompt-20 video")

    def test_scrolling_through_many_videos(self, page, faults, many):
        open_page(page, many)
        page.mouse.move(400, 400)
        for _ in range(30):
            page.mouse.wheel(0, 400)
            page.wait_for_timeout(60)
        page.evaluate("() => scrollTo({ top: document.body.scrollHeight, behavior: 'instant' })")
        wait_until(page, PLAYING, "#prompt-22 video")


class TestDifference:
    def test_draws_over_every_sparse_video(self, page, faults, few):
        open_page(page, few)
        wait_until(page, PLAYING)
        page.locator("#scrub").fill("4")
        page.locator("#view").select_option("16")
        canvas = page.locator("#prompt-1 .tile canvas")
        expect(canvas).to_be_visible()
        page.wait_for_timeout(500)
        plain = page.locator("#prompt-1 .tile video").nth(1)
        assert _mean(canvas.screenshot()) < 100
        page.locator("#view").select_option("0")
        expect(canvas).to_be_hidden()
        assert _mean(plain.screenshot()) > 150


class TestFilter:
    def test_unchecked_strategy_leaves_every_prompt(self, page, faults, usual):
        open_page(page, usual)
        tiles = page.locator(".tile[data-strategy=strategy-1]")
        expect(tiles.first).to_be_visible()
        page.locator(".chip", has_text="radial").first.click()
        assert tiles.evaluate_all("tiles => tiles.every(tile => tile.hidden)")
        assert tiles.locator("video").evaluate_all("videos => videos.every(video => video.paused)")
        expect(page.locator("tr[data-strategy=strategy-1]")).to_have_class("off")

    def test_dense_only_and_all(self, page, faults, usual):
        open_page(page, usual)
        page.get_by_role("button", name="Dense only").click()
        expect(page.locator(".tile:visible")).to_have_count(6)
        page.get_by_role("button", name="All").click()
        expect(page.locator(".tile:visible")).to_have_count(60)
        wait_until(page, PLAYING)

    def test_by_keyboard(self, page, faults, few):
        open_page(page, few)
        page.locator(".chip input").nth(1).focus()
        page.keyboard.press("Space")
        expect(page.locator(".tile:visible")).to_have_count(2)


class TestLayout:
    @pytest.mark.parametrize("width", [360, 390, 768, 1440, 2200])
    @pytest.mark.parametrize("size", ["few", "usual"])
    @pytest.mark.parametrize("scheme", ["light", "dark"])
    def test_nothing_is_wider_than_the_screen(self, page, faults, request, width, size, scheme):
        page.set_viewport_size({"width": width, "height": 900})
        page.emulate_media(color_scheme=scheme)
        open_page(page, request.getfixturevalue(size))
        page.evaluate("() => document.querySelectorAll('details').forEach(part => { part.open = true; })")
        assert page.evaluate("() => document.documentElement.scrollWidth - innerWidth") <= 0
        columns = page.eval_on_selector_all("#prompt-1 .tile", COLUMNS)
        assert columns >= 2

    def test_dark_and_light_differ(self, page, few):
        open_page(page, few)
        colours = set()
        for scheme in ("light", "dark"):
            page.emulate_media(color_scheme=scheme)
            colours.add(page.evaluate("() => getComputedStyle(document.body).backgroundColor"))
        assert len(colours) == 2

    def test_density_under_the_pointer(self, page, faults, few):
        open_page(page, few)
        page.locator(".cells").first.hover(position={"x": 3, "y": 3})
        expect(page.locator(".map output").first).to_have_text("layer 1, step 1: 100.0 %")

    def test_every_control_has_a_name(self, page, few):
        open_page(page, few)
        for role in ("button", "combobox", "slider", "checkbox"):
            for control in page.get_by_role(role).all():
                assert control.evaluate(NAME)


class TestWithoutScript:
    def test_videos_keep_their_own_controls(self, browser, few):
        context = browser.new_context(java_script_enabled=False)
        page = context.new_page()
        open_page(page, few)
        assert page.locator("video[controls][src]").count() == 4
        expect(page.locator("#controls")).to_be_hidden()
        context.close()


def _mean(png: bytes) -> float:
    return float(np.asarray(Image.open(io.BytesIO(png)).convert("L")).mean())
