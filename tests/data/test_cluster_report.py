"""The page and its pictures: what is on them, and that nothing is loaded from elsewhere."""

from __future__ import annotations

import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paris_ray.config import PatchPcaCodec as PatchPcaConfig
from paris_ray.data import cluster_report as report
from paris_ray.data import schema
from paris_ray.data.codec import PatchPcaCodec, PatchSums
from paris_ray.storage import Folder

CLUSTERS: dict[str, Any] = {
    "sizes": [40, 100, 60], "sizes_all": [50, 110, 70], "fine_sizes": [90, *[10] * 11], "inertia": [[9.0, 5.0, 4.5], [3.0, 2.0, 2.5]],
    "converged": True, "metric": "cosine", "imbalance": 1.5, "largest_fine_share": 1.35, "cap": 90.0, "over_cap": [1],
    "splits": {"train": 200, "validation": 20, "held_out": 10},
}  # fmt: skip


def solid(colour: tuple[int, int, int], side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


def test_nearest_first_then_a_few_farthest_one_of_each_group() -> None:
    distance = np.array([5, 1, 2, 9, 3, 8, 4, 7, 6, 0.5], np.float32)
    groups = ["e", "a", "b", "j", "c", "i", "d", "h", "g", "a"]  # rows 9 and 1 are near-duplicates; 9 is nearer
    near, far = report.choose(distance, groups, 8)
    assert near == [9, 2, 4, 6, 0, 8, 7]
    assert far == [3]
    assert report.choose(distance, groups, 20) == ([9, 2, 4, 6, 0, 8, 7, 5, 3], [])


def test_a_sheet_shows_each_picture_in_its_place() -> None:
    colours = [(i * 10, 255 - i * 10, 7) for i in range(15)]
    page = np.asarray(Image.open(io.BytesIO(report.sheet([solid(c) for c in colours[:13]], [solid(c) for c in colours[13:]]))))
    cell = 72 + 6
    assert page.shape == (2 * cell, 12 * cell, 3)
    for i, colour in enumerate(colours):
        y, x = divmod(i, 12)
        assert tuple(page[y * cell + cell // 2, x * cell + cell // 2]) == colour
        frame = tuple(page[y * cell + 1, x * cell + 1])
        assert (frame == (217, 72, 15)) == (i >= 13)
    large = np.asarray(Image.open(io.BytesIO(report.sheet([solid((1, 2, 3), 256)], []))))
    assert large.shape == (cell, cell, 3)


def test_one_word_for_everything_stands_out_nowhere() -> None:
    assert report.terms(["cat", "Cat", "cat"], np.array([0, 1, 1], np.int32), 3) == [[], [], []]


def test_terms_are_the_published_log_odds() -> None:
    """Against the formula of Monroe et al. written out for one word."""
    captions = ["red fox", "red wolf", "a red bird", "green tree", "green fern", "the tree", "red tree"]
    expert = np.array([0, 0, 0, 1, 1, 1, 1], np.int32)
    found = report.terms(captions * 10, np.tile(expert, 10), 2)
    assert found[0][0][0] == "red"
    assert {word for word, _ in found[1][:2]} == {"tree", "green"}
    y, rest, n0, n1 = 30, 10, 60, 80  # "red" in captions of 0 and of 1; words of two letters and more in each, once a caption
    a = min(500.0, 0.1 * (n0 + n1)) / (n0 + n1) * (y + rest)
    a0 = min(500.0, 0.1 * (n0 + n1))
    delta = math.log((y + a) / (n0 + a0 - y - a)) - math.log((rest + a) / (n1 + a0 - rest - a))
    assert found[0][0][1] == pytest.approx(delta / math.sqrt(1 / (y + a) + 1 / (rest + a)))
    assert report.terms(["same words"] * 6, np.array([0, 0, 0, 1, 1, 1], np.int32), 2) == [[], []]
    assert report.terms(["", "x"], np.array([0, 1], np.int32), 2) == [[], []]


def test_the_page_is_self_contained_and_says_what_matters() -> None:
    png = report.sheet([solid((1, 2, 3))], [])
    page = report.render("my <run>", CLUSTERS, [[("fox & hound", 5.0)], [], [("tree", 3.0)]], [png] * 3, "Pictures: Somebody, CC BY-SA")
    assert not re.search(r'(?:src|href)="(?!data:|#)', page)
    assert "http" not in page
    assert page.count("data:image/png;base64,") == 3
    assert "my &lt;run&gt;" in page
    assert "<run>" not in page
    assert "fox &amp; hound" in page
    assert "Pictures: Somebody, CC BY-SA" in page
    assert "1.50 ×" in page
    assert "50.0%" in page  # expert 1 has 100 of 200
    assert "experts 1 are above it" in page
    assert "catch-all" in page
    assert "cap of 90" in page
    assert page.count("<svg") == 2
    assert "No caption word stands out" in page
    quiet = report.render("x", {**CLUSTERS, "cap": None, "over_cap": [], "largest_fine_share": 0.1, "imbalance": 1.1}, [[], [], []], [png] * 3)
    assert 'class="warn"' not in quiet
    assert "cap of" not in quiet


def test_curves_have_a_point_per_iteration() -> None:
    svg = report.curve([9.0, 5.0, 4.5])
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    xy = [tuple(map(float, pair.split(","))) for pair in points[1].split()]
    assert len(xy) == 3
    assert xy[0][1] < xy[1][1] < xy[2][1]  # falling values go down the page
    assert "NaN" not in report.curve([3.0])
    assert "nan" not in report.curve([2.0, 2.0])


def test_pictures_are_the_decoded_latents_of_the_rows_asked_for(tmp_path: Path) -> None:
    """A codec that keeps everything: the sheet shows the original colours of exactly the rows picked."""
    g = np.random.default_rng(0)
    images = np.stack([np.full((8, 8, 3), g.integers(0, 255, 3), np.uint8) for _ in range(30)])
    sums = PatchSums.zero(4)
    sums.add(g.integers(0, 255, (40, 8, 8, 3)).astype(np.uint8), 4)
    codec = PatchPcaCodec.fit(PatchPcaConfig(downsampling=4, channels=48), sums)
    run = Folder(tmp_path)
    codec.save(str(tmp_path / "encoders"))
    run.write_json("encoders/encoders.json", {"codec": codec.meta()})
    kind = schema.pa.schema([schema.pa.field("latent", schema.pa.fixed_shape_tensor(schema.pa.float16(), (48, 2, 2)))])
    latents = codec.encode(images).numpy().astype(np.float16)
    for i, low in enumerate((0, 10, 20)):
        schema.write_table(run / "corpus", schema.part_name(i), schema.table(kind, {"latent": latents[low : low + 10]}))
    picks = [(np.array([25, 3]), np.array([11])), (np.array([7]), np.array([], np.int64))]
    report._draw(str(tmp_path), picks)
    cell = 72 + 6
    for k, (near, far) in enumerate(picks):
        page = np.asarray(Image.open(tmp_path / f"clusters/contact-{k}.png")).astype(int)
        for i, row in enumerate([*near, *far]):
            assert np.abs(page[cell // 2, i * cell + cell // 2] - images[row, 0, 0]).max() <= 2
