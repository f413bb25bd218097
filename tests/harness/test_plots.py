"""The pictures: valid, repeatable, and in the page's own colours."""

import base64
import io
import itertools
import math
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from harness.plots import (
    COLOURS,
    LONGEST_LABEL,
    MOST_LABELS,
    AxisLabel,
    Point,
    density_map,
    mean_map,
    scatter,
)

X, Y = AxisLabel("speedup", 1.0), AxisLabel("PSNR (dB)")


def points(count: int = 3) -> list[Point]:
    return [
        Point(f"method-{slot}", slot, 1 + 0.1 * slot, 30 - slot, [(1 + 0.1 * slot, 30 - slot)] * 2)
        for slot in range(count)
    ]


def pixels(address: str) -> np.ndarray:
    assert address.startswith("data:image/png;base64,")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


class TestScatter:
    def test_is_wellformed_and_repeatable(self):
        svg = scatter(points(), X, Y, "Speed & quality")
        root = ElementTree.fromstring(svg.replace("xlink:href", "href"))
        assert root.find("title").text == "Speed & quality"
        assert svg == scatter(points(), X, Y, "Speed & quality")

    def test_takes_its_colours_and_font_from_the_page(self):
        svg = scatter(points(COLOURS + 1), X, Y, "Speed")
        assert "#a1b" not in svg
        assert "font-family" not in svg
        assert "<style" not in svg
        assert all(f"var(--{name})" in svg for name in ("ink", "quiet", "rule", "s0", f"s{COLOURS - 1}"))

    def test_two_plots_on_one_page_share_no_identifier(self):
        first, second = (
            ElementTree.fromstring(scatter(points(), X, Y, title).replace("xlink:", ""))
            for title in ("a", "b")
        )
        names = [{element.get("id") for element in root.iter()} - {None} for root in (first, second)]
        assert names[0]
        assert not names[0] & names[1]

    def test_labels_are_text_and_never_formulas_or_markup(self):
        svg = scatter([Point("<b>$\\frac{1}{2}$", 0, 1.0, 30.0)], X, Y, "Speed")
        assert "&lt;b&gt;$\\frac{1}{2}$</text>" in svg

    @pytest.mark.parametrize("value", [math.nan, math.inf])
    def test_values_without_a_place_are_left_out(self, value):
        assert scatter([Point("lost", 0, value, 30.0)], X, Y, "Speed") == ""
        assert "lost" not in scatter([*points(), Point("lost", 4, 1.0, value)], X, Y, "Speed")

    def test_nothing_to_draw(self):
        assert scatter([], X, Y, "Speed") == ""

    def test_crowded_labels_do_not_cover_each_other(self):
        crowd = [Point(f"method-{slot}", slot, 1.0 + 0.001 * slot, 30.0) for slot in range(6)]
        root = ElementTree.fromstring(
            scatter([*crowd, Point("far", 7, 2.0, 20.0)], X, Y, "Speed").replace("xlink:", "")
        )
        texts = [text for text in root.iter() if text.tag.endswith("text") and "method" in (text.text or "")]
        assert len(texts) == 6
        for one, other in itertools.combinations(texts, 2):
            same_side = one.get("style") == other.get("style")
            assert not same_side or abs(float(one.get("y")) - float(other.get("y"))) >= 9

    def test_a_curve_is_one_line_with_one_label(self):
        lone, joined = points(4), [Point(f"m:d={x}", 4, x, 25 + x, curve="m") for x in (3.0, 1.0, 2.0)]
        svg = scatter([*lone, *joined], X, Y, "Speed")
        root = ElementTree.fromstring(svg.replace("xlink:", ""))
        texts = [text.text for text in root.iter() if text.tag.endswith("text")]
        assert texts.count("m") == 1 and not any(text and text.startswith("m:d") for text in texts)
        lines = svg.count("stroke-opacity: 0.6")
        assert lines == 1 and scatter(lone, X, Y, "Speed").count("stroke-opacity: 0.6") == 0

    def test_many_names_stand_below_the_picture(self):
        few, many = (scatter(points(count), X, Y, "Speed") for count in (MOST_LABELS, MOST_LABELS + 1))
        heights = [float(svg.split('viewBox="')[1].split('"')[0].split()[3]) for svg in (few, many)]
        root = ElementTree.fromstring(many.replace("xlink:", ""))
        texts = [text.text for text in root.iter() if text.tag.endswith("text")]
        assert all(texts.count(point.label) == 1 for point in points(MOST_LABELS + 1))
        assert heights[1] > heights[0] + 50 and "legend" in many and "legend" not in few

    def test_long_labels_stand_below_the_picture_too(self):
        short, long = (
            scatter([*points(2), Point("m" * length, 3, 1.5, 25.0)], X, Y, "Speed")
            for length in (LONGEST_LABEL, LONGEST_LABEL + 1)
        )
        assert "legend" in long and "legend" not in short


class TestDensityMap:
    def test_one_pixel_per_call_and_alpha_grows_with_density(self):
        alpha = pixels(density_map([[1.0, 0.5, 0.0], [None, math.nan, 2.0]]))[..., 3]
        assert alpha.tolist() == [[255, 138, 20], [0, 0, 255]]

    def test_rows_of_different_length(self):
        assert pixels(density_map([[1.0], [0.5, 0.5]]))[..., 3].tolist() == [[255, 0], [138, 138]]

    @pytest.mark.parametrize("empty", [[], [[]], [[], []]])
    def test_nothing_called(self, empty):
        assert density_map(empty) == ""
        assert mean_map([empty]) == []

    def test_mean_leaves_out_what_was_not_called(self):
        maps = [[[1.0, None], [0.2]], [[0.5, None], [0.4, 0.3]]]
        assert mean_map(maps) == [[0.75, None], [0.3, 0.3]]
