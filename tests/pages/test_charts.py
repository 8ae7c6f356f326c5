"""Charts: their figures where they belong, readable on a phone, and colours that everybody can tell apart."""

from __future__ import annotations

import itertools
import re

import numpy as np
import pytest

from paris_ray.pages import blocks, charts


def test_ticks_are_round_and_cover_the_range():
    for low, high in [(0, 1), (0.13, 0.97), (-3, 12), (1e-4, 3e-4), (0, 0), (5, 5), (0.3, 0.1 + 0.2), (1e-15, 3e-15), (199, 10_001)]:
        values = charts.ticks(low, high)
        assert values[0] <= low
        assert values[-1] >= high
        steps = np.diff(values)
        np.testing.assert_allclose(steps, steps[0])
        mantissa = steps[0] / 10 ** np.floor(np.log10(steps[0]) + 1e-9)
        assert round(float(mantissa), 6) in (1, 2, 5)
        assert len(values) <= 8


def test_stacked_columns_have_the_height_of_their_shares():
    shares = np.array([[0.25, 0.75, 0.0], [0.0, 0.0, 1.0]])
    drawn = charts.stacked_columns(shares, "shares", height=100)
    rects = re.findall(r'y="([\d.]+)" width="[\d.]+" height="([\d.]+)" class="f(\d)"', drawn)
    assert [(float(y), float(h), int(k)) for y, h, k in rects] == [(75, 25, 0), (0, 75, 1), (0, 100, 2)]


def test_lines_pass_through_their_points_and_skip_what_is_not_finite():
    drawn = charts.line_chart([charts.Series("a", [1, 10, 100, 1000], [0.0, 1.0, float("nan"), 2.0], "red")], "x", "y", "t", log_x=True)
    points = [tuple(map(float, pair.split(","))) for pair in re.search(r'polyline points="([^"]*)"', drawn)[1].split()]
    assert len(points) == 3
    xs, ys = zip(*points, strict=True)
    assert (xs[1] - xs[0]) / (xs[2] - xs[0]) == pytest.approx(1 / 3, abs=1e-3)  # decades are evenly apart
    assert (ys[0] - ys[1]) / (ys[0] - ys[2]) == pytest.approx(1 / 2, abs=1e-3)  # up is smaller in SVG
    assert "no points yet" in charts.line_chart([], "x", "y", "t")


def test_colours_differ_for_any_number_of_experts():
    light, dark = charts.expert_colours(20)
    assert len(set(light)) == len(set(dark)) == 20
    assert all(re.fullmatch("#[0-9a-f]{6}", colour) for colour in light + dark)


@pytest.mark.parametrize(("seconds", "text"), [(0.04, "0.0 s"), (59.9, "59.9 s"), (59.96, "1 min 00 s"), (185, "3 min 05 s"), (7800, "2 h 10 min")])
def test_durations(seconds, text):
    assert charts.duration(seconds) == text


def test_large_pictures_become_thumbnails():
    small = charts.picture_uri(np.zeros((32, 32, 3), np.uint8))
    large = charts.picture_uri(np.random.default_rng(0).integers(0, 255, (512, 512, 3)).astype(np.uint8))
    assert small.startswith("data:image/png;base64,")
    assert large.startswith("data:image/webp;base64,")
    assert len(large) < 60_000


def test_series_of_one_value_each_are_bars():
    series = [charts.Series("expert 0", [100], [0.5], "red"), charts.Series("expert 1", [100], [2.0], "blue")]
    drawn = charts.line_chart(series, "images", "loss", "Validation loss", log_x=True)
    assert re.findall(r"width:([\d.]+)%;background:(\w+)", drawn) == [("25.00", "red"), ("100.00", "blue")]
    assert "expert 1" in drawn
    assert "polyline" not in drawn
    # One of several may have one value: a dot among lines.
    mixed = charts.line_chart([*series[:1], charts.Series("expert 1", [100, 200], [2.0, 1.0], "blue")], "images", "loss", "t")
    assert mixed.count("<polyline") == 2


def test_bars_and_marks_share_a_scale():
    drawn = charts.bar_chart([("a", 30.0, "30", "red"), ("b", 60.0, "60", "red")], "sizes", [(45.0, "strong", "equal share"), (120.0, "cap", "cap")])
    assert re.findall(r"width:([\d.]+)%", drawn) == ["25.00", "50.00"]
    assert set(re.findall(r'class="tick (\w+)" style="left:([\d.]+)%"', drawn)) == {("strong", "37.50"), ("cap", "100.00")}


def test_intervals_are_where_they_should_be():
    drawn = charts.interval_chart([("top-2", 0.5, 0.25, 0.875, "red")], "shares")
    assert 'class="whisker" style="left:25.00%;width:62.50%' in drawn
    assert 'class="dot" style="left:50.00%' in drawn


def test_letters_are_never_scaled_and_never_small():
    """Charts stretch with the column, their letters do not: no text inside a viewBox, no font below 12 px."""
    drawn = charts.line_chart([charts.Series(n, [1, 2, 4], [1, 2, 3], "red") for n in "ab"], "x", "y", "t", log_x=True)
    drawn += charts.stacked_columns(np.full((5, 2), 0.5), "t", ends=("left", "right"))
    for inner in re.findall(r"<svg viewBox.*?</svg>", drawn, re.DOTALL):
        assert "<text" not in inner
    assert all("viewBox" not in outer for outer in re.findall(r"<svg [^>]*role=[^>]*>", drawn))
    sizes = re.findall(r"font(?:-size)?:(?:[a-z0-9]+ )?([\d.]+)(px|rem|em)", blocks.STYLE)
    assert len(sizes) > 20
    assert min(float(size) * (1 if unit == "px" else 16) for size, unit in sizes) >= 12


MACHADO = {  # severity 1.0; Machado, Oliveira & Fernandes 2009, table 1
    "protanomaly": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranomaly": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanomaly": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}


def lab(linear):
    """Linear sRGB → CIE L*a*b*, D65."""
    xyz = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]]) @ linear
    f = [np.cbrt(v) if v > 0.008856 else 7.787 * v + 16 / 116 for v in xyz / np.array([0.95047, 1, 1.08883])]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("ground", [0, 1])
def test_eight_colours_differ_to_every_kind_of_eye(ground):
    colours = charts.expert_colours(8)[ground]
    srgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    for matrix in [np.eye(3), *map(np.array, MACHADO.values())]:
        seen = [lab(np.clip(matrix @ one, 0, 1)) for one in linear]
        assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 20


def test_points_lie_where_their_numbers_say():
    points = [charts.Point(name, x, y, y - 0.1, y + 0.1, "red") for name, x, y in (("a", 1, 0.2), ("b", 10, 0.4), ("c", 100, 0.8))]
    drawn = charts.scatter_chart(points, "x", "y", "t")
    found = [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)%" cy="([\d.]+)"', drawn)]
    assert found[1][0] - found[0][0] == pytest.approx(found[2][0] - found[1][0], abs=0.02)  # decades are evenly apart
    assert (found[0][1] - found[2][1]) / (found[0][1] - found[1][1]) == pytest.approx(3, abs=0.02)
    assert charts.scatter_chart([], "x", "y", "t") == charts.NOTHING


def test_names_of_points_give_way_to_each_other():
    """Nine at nearly one cost and quality, beside three elsewhere: boxes of seven pixels a letter in a chart of 640 do not meet, nor leave it."""
    names = ["experts", "experts/top-1", "experts/expert-0", "blind", "monolith/more-steps", "a", "b", "c", "d"]
    points = [charts.Point(name, 3.56, 0.5 + 0.004 * i, 0.4, 0.6, "red") for i, name in enumerate(names)]
    points += [charts.Point(name, x, 0.5, 0.1, 0.9, "red") for name, x in (("cheap", 1.6), ("dear", 6.76), ("dearest", 6.8))]
    drawn = charts.scatter_chart(points, "x", "y", "t")
    found = re.findall(r'<svg x="([\d.]+)%" y="([\d.]+)"[^>]*>(?:<line[^>]*>)?<text x="(-?\d+)" y="(-?\d+)" text-anchor="(\w+)"[^>]*>([^<]+)<', drawn)
    assert [one[-1] for one in found] == [point.name for point in points]
    boxes = []
    for x, y, away, down, anchor, name in found:
        at = 640 * float(x) / 100 + int(away)
        middle = float(y) + int(down) - 4
        assert 20 <= middle <= 260
        boxes.append((at - 7 * len(name) if anchor == "end" else at, middle - 6, at if anchor == "end" else at + 7 * len(name), middle + 6))
        assert boxes[-1][0] > -640 * 0.05 and boxes[-1][2] < 640 * 1.05  # noqa: PT018
    for a, b in itertools.combinations(boxes, 2):
        assert a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]


@pytest.mark.parametrize("xs", [(0.016, 0.0161), (3.0, 4.5), (7.0,)])
def test_a_logarithmic_axis_has_numbers_where_there_is_no_round_power(xs):
    drawn = charts.scatter_chart([charts.Point("a", x, 0.5, 0.4, 0.6, "red") for x in xs], "x", "y", "t")
    shown = [float(one) for one in re.findall(r'text-anchor="middle">([\d.]+)<', drawn)]
    assert len(shown) >= 2
    assert all(min(xs) * 0.88 < one < max(xs) * 1.13 for one in shown)


def test_numbers_below_lines_stand_where_they_are_asked_for():
    times = (0.1, 0.3, 0.98)
    drawn = charts.line_chart([charts.Series("a", times, [1, 2, 3], "red")], "t", "y", "t", at=times)
    assert re.findall(r'text-anchor="middle">([\d.]+)<', drawn) == ["0.1", "0.3", "0.98"]


def test_a_matrix_marks_the_least_of_each_column():
    drawn = charts.matrix_table(np.array([[1.0, 3.0, np.nan], [2.0, 0.5, np.nan]]), "expert", "cluster", "t")
    assert re.findall(r"<b>([\d.]+)</b>", drawn) == ["1.0000", "0.5000"]
    assert drawn.count("–") == 2
