"""The report's page and file: what is in them, that nothing is loaded from elsewhere, that the pictures are the rows they claim to be."""

from __future__ import annotations

import io
import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from paris_ray import config as configs
from paris_ray.config import PatchPcaCodec as PatchPcaConfig
from paris_ray.config import RunConfig
from paris_ray.data import cluster_report, partition, schema
from paris_ray.data.codec import PatchPcaCodec, PatchSums
from paris_ray.data.report import page, sheets
from paris_ray.data.report.cost import estimate
from paris_ray.data.report.members import Members
from paris_ray.data.report.terms import terms
from paris_ray.storage import Folder

from .test_partition import ENCODERS, make_corpus

HOSTILE = '<img src=x onerror="alert(1)"> & co'


def solid(colour: tuple[int, int, int], side: int = 8) -> np.ndarray:
    return np.full((side, side, 3), colour, np.uint8)


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def test_a_sheet_shows_each_picture_in_its_place() -> None:
    colours = [(i * 10, 255 - i * 10, 7) for i in range(15)]
    drawn = pixels(sheets.sheet([solid(c) for c in colours[:13]], [solid(c) for c in colours[13:]]))
    cell = 72 + 6
    assert drawn.shape == (2 * cell, 12 * cell, 4)
    for i, colour in enumerate(colours):
        y, x = divmod(i, 12)
        assert tuple(drawn[y * cell + cell // 2, x * cell + cell // 2]) == (*colour, 255)
        frame = tuple(drawn[y * cell + 1, x * cell + 1])
        assert (frame == (203, 80, 2, 255)) == (i >= 13)
        assert (frame[3] == 0) == (i < 13)  # the page's own ground, light or dark
    assert pixels(sheets.sheet([solid((1, 2, 3), 256)], [])).shape == (cell, cell, 4)


def test_one_word_for_everything_stands_out_nowhere() -> None:
    assert terms(["cat", "Cat", "cat"], np.array([0, 1, 1], np.int32), 3) == [[], [], []]


def test_terms_are_the_published_log_odds() -> None:
    """Against the formula of Monroe et al. written out for one word."""
    captions = ["red fox", "red wolf", "a red bird", "green tree", "green fern", "the tree", "red tree"]
    expert = np.array([0, 0, 0, 1, 1, 1, 1], np.int32)
    found = terms(captions * 10, np.tile(expert, 10), 2)
    assert found[0][0][0] == "red"
    assert {word for word, _ in found[1][:2]} == {"tree", "green"}
    y, rest, n0, n1 = 30, 10, 60, 80  # "red" in captions of 0 and of 1; words of two letters and more in each, once a caption
    a = min(500.0, 0.1 * (n0 + n1)) / (n0 + n1) * (y + rest)
    a0 = min(500.0, 0.1 * (n0 + n1))
    delta = math.log((y + a) / (n0 + a0 - y - a)) - math.log((rest + a) / (n1 + a0 - rest - a))
    assert found[0][0][1] == pytest.approx(delta / math.sqrt(1 / (y + a) + 1 / (rest + a)))
    assert terms(["same words"] * 6, np.array([0, 0, 0, 1, 1, 1], np.int32), 2) == [[], []]
    assert terms(["", "x"], np.array([0, 1], np.int32), 2) == [[], []]


# -- the page -----------------------------------------------------------------------------------------------------------


class Nesting(HTMLParser):
    """Every element that opens closes in order; gathers attributes that could load or run something."""

    def __init__(self, html: str):
        super().__init__()
        self.open: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(html)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "iframe", "link", "object", "embed", "base")
        self.attributes += attrs
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rows(n: int, caption: str = "a fox") -> list[dict[str, str]]:
    return [{"id": f"i{i}", "caption": f"{caption} {i}"} for i in range(n)]


def made_up(**changes: Any) -> tuple[dict[str, Any], page.Map]:
    """A report of three experts, and its map."""
    sizes = [40, 100, 60]
    encoders = {"codec": {"channels": 4, "latent_size": 8}, "text": {"max_length": 16, "width": 384}}
    report: dict[str, Any] = {
        "name": "my <run>", "sizes": sizes, "sizes_all": [50, 110, 70], "sizes_validation": [9, 0, 11],
        "fine_sizes": [90, *[10] * 11], "inertia": [[9.0, 5.0, 4.5], [3.0, 2.0, 2.5]],
        "converged": True, "method": "kmeans", "metric": "cosine", "imbalance": 1.5, "largest_fine_share": 1.35, "cap": 90.0, "over_cap": [1],
        "splits": {"train": 200, "validation": 20, "held_out": 10}, "cost": estimate(configs.load("tiny"), sizes, encoders),
        "map": {"rows": [2, 2, 1], "at_least": 100, "variance": [0.25, 0.125]},
        "silhouette": {"rows": 190, "sampled": [40, 90, 60], "overall": 0.0321, "experts": [0.05, None, -0.0177]},
        "experts": [
            {"terms": [{"word": "fox & hound", "z": 5.0}], "nearest": rows(3, HOSTILE), "farthest": rows(1, "far away")},
            {"terms": [], "nearest": rows(2, "x" * 1000), "farthest": []},
            {"terms": [{"word": "tree", "z": 3.0}], "nearest": rows(1), "farthest": []},
        ],
        "read": {
            "listed": 250, "rows": 230, "rejected": 20, "reasons": {"no caption": 5, "not an image": 15}, "groups": 200, "near_duplicates": 17,
            "examples": {"no caption": ["a.png"], "not an image": ["<b>.png", "c.png"]}, "split_changed": 4, "unchecked": 0, "enlarged": 13,
            "captions_cut": 0,
        },
        **changes,
    }  # fmt: skip
    report["warnings"] = page.warnings(report)
    g = np.random.default_rng(0)
    where = page.Map([g.random((n, 2)) for n in report["map"]["rows"]], g.random((4, 2)), np.array([0, 1, 2, 1]), (0.25, 0.125))
    return report, where


def test_the_page_is_self_contained_and_says_what_matters() -> None:
    png = sheets.sheet([solid((1, 2, 3))], [])
    html = page.render(*made_up(), [png] * 3, "Pictures: Somebody, CC BY-SA")
    for name, value in Nesting(html).attributes:
        assert not name.startswith("on")
        assert name not in ("src", "href") or (value or "").startswith(("data:image/", "#"))
    assert "http:" not in html
    assert "https:" not in html
    assert "default-src 'none'" in html
    assert html.count("data:image/png;base64,") == 3
    for said in (
        "my &lt;run&gt;", "fox &amp; hound", "Pictures: Somebody, CC BY-SA", "1.50 ×", "100 · 50.0% · 1.50 ×", "experts 1 are above it", "catch-all",
        "the cap of 90", "No caption word stands out", "25.0% of the variance, up 12.5%. The other 62%", "0.032 on average",
        "-0.018", "100 · 50.0% · 1.50 × · 0<", "No validation row has expert 1: its loss cannot be watched.",
        "250 rows were read and 20 refused. Of the 230 others 17 look nearly like another", "4 changed theirs for it.",
        "13 pictures are smaller than data.image_size and were enlarged.",
        "<td>not an image</td><td class=n>15</td><td class=n>6.0%</td><td>&lt;b&gt;.png,",
        "originals as the latent codec gives them back (decoded latents)", "The critical one is expert-", "An estimate, not a measurement",
        "one GPU at 40%", "H100 989", "Fewer than 100 passes",
    ):  # fmt: skip
        assert said in html, said
    assert "<run>" not in html
    assert html.index("<td>not an image") < html.index("<td>no caption")
    assert "were cut" not in html
    quiet, where = made_up(sizes_validation=[1, 2, 3], read=None, cap=None, over_cap=[], largest_fine_share=0.1, imbalance=1.1, silhouette=None)
    html = page.render({**quiet, "warnings": page.warn(quiet)}, where, [png] * 3)
    assert 'class="warn"' not in html
    assert "What was read" not in html
    assert "the cap of" not in html
    assert "Needs rows of two experts" in html
    assert "12 fine clusters, cosine k-means" in html
    control = page.render(*made_up(method="random"), [png] * 3)
    assert "3 experts at random, as a control" in control
    assert "k-means" not in control


def test_captions_are_text_and_of_bounded_length() -> None:
    html = page.render(*made_up(), [sheets.sheet([solid((1, 2, 3))], [])] * 3)
    assert "<img src=x" not in html
    assert html.count("&lt;img src=x onerror=&quot;alert(1)&quot;&gt; &amp; co") == 3 + 3  # in the list, and in what stands for the picture
    assert "x" * 161 not in html
    assert "x" * 159 + "…" in html
    listed = re.findall(r"<li>(.*?)</li>", html)
    assert len(listed) == 3 + 1 + 2 + 1
    assert listed[3] == "far away 0 <b>(far)</b>"


def test_the_map_has_every_point_once_and_labels_apart() -> None:
    g = np.random.default_rng(0)
    points = [g.standard_normal((n, 2)) for n in (30, 0, 7)]
    drawn = page.draw_map(page.Map(points, g.standard_normal((5, 2)), np.array([0, 0, 2, 2, 2]), (0.5, 0.1)))
    dots = {k: re.search(rf'<path d="([^"]*)" class="dots s{k}" style="stroke-width:3.5px', drawn)[1].count("M") for k in range(3)}  # type: ignore[index]
    assert dots == {0: 30, 1: 0, 2: 7}
    assert [(k, n) for k, n in re.findall(r'class="label">(\d)<()', drawn)] == [("0", ""), ("2", "")]
    x, y = np.array([[float(a), float(b)] for a, b in re.findall(r"M(-?[\d.]+) (-?[\d.]+)h0", drawn.split("s2")[0].rsplit("<path", 1)[1])]).T
    # One scale for both axes, and up is up.
    ratio = np.ptp(x) / np.ptp(y)
    assert ratio == pytest.approx(np.ptp(points[2][:, 0]) / np.ptp(points[2][:, 1]), rel=0.02)
    assert np.corrcoef(y, points[2][:, 1])[0, 1] == pytest.approx(-1.0, abs=1e-3)
    placed = page.apart([np.array([500.0, 300.0])] * 6)
    assert len({(round(a / 40), round(b / 44)) for a, b in placed}) == 6


def test_numbers_that_do_not_fit_a_map_still_draw() -> None:
    one = np.zeros((1, 2))
    assert "nan" not in page.draw_map(page.Map([one, one], one, np.array([0]), (0.0, 0.0)))


# -- from a corpus ------------------------------------------------------------------------------------------------------


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
    fields = [schema.pa.field("id", schema.pa.string()), schema.pa.field("caption", schema.pa.string())]
    kind = schema.pa.schema([*fields, schema.pa.field("latent", schema.pa.fixed_shape_tensor(schema.pa.float16(), (48, 2, 2)))])
    latents = codec.encode(images).numpy().astype(np.float16)
    parts = []
    for i, low in enumerate((0, 10, 20)):
        names = {"id": [f"i{n}" for n in range(low, low + 10)], "caption": [f"c{n}" for n in range(low, low + 10)]}
        schema.write_table(run / "corpus", schema.part_name(i), schema.table(kind, {**names, "latent": latents[low : low + 10]}))
        parts.append((schema.part_name(i), 10))
    picks = [([25, 3], [11]), ([7], [])]
    shown = sheets.draw_sheets(run, Members(parts, [a for a, _ in picks], [b for _, b in picks], [], [], np.empty(0, np.int32)))
    assert shown == [
        {"nearest": [{"id": "i25", "caption": "c25"}, {"id": "i3", "caption": "c3"}], "farthest": [{"id": "i11", "caption": "c11"}]},
        {"nearest": [{"id": "i7", "caption": "c7"}], "farthest": []},
    ]
    cell = 72 + 6
    for k, (near, far) in enumerate(picks):
        drawn = np.asarray(Image.open(tmp_path / f"clusters/contact-{k}.png")).astype(int)
        for i, row in enumerate([*near, *far]):
            assert np.abs(drawn[cell // 2, i * cell + cell // 2, :3] - images[row, 0, 0]).max() <= 2


@pytest.fixture
def clustered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunConfig:
    """A run of 240 rows up to its labels, with a codec that can decode them."""
    config = make_corpus(tmp_path)
    sums = PatchSums.zero(4)
    sums.add(np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3)).astype(np.uint8), 4)
    codec = PatchPcaCodec.fit(PatchPcaConfig(downsampling=4, channels=3), sums)
    codec.save(str(tmp_path / "encoders"))
    Folder(tmp_path).write_json("encoders/encoders.json", {**ENCODERS, "codec": {**codec.meta(), "latent_size": 4}})
    monkeypatch.setattr(partition, "draw_sheets", lambda config: None)
    monkeypatch.setattr(partition, "write_report", lambda config, sheets: None)
    partition.partition(config)
    return config


def test_the_reports_figures_are_those_of_the_rows(clustered: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster_report, "SILHOUETTE_ROWS", 60)
    run = Folder(clustered.run_dir)
    report, where = cluster_report.gather(clustered.model_dump(mode="json"))
    assert report == json.loads(json.dumps(report))
    labels = schema.read_table(run / "clusters", "labels.parquet").to_pylist()
    of = {row["id"]: row for row in labels}
    for k, own in enumerate(report["experts"]):
        train = sorted((row["distance"], row["id"]) for row in labels if row["expert"] == k and row["split"] == "train")
        assert own["nearest"][0]["id"] == train[0][1]
        assert own["farthest"][-1]["id"] == train[-1][1]
        assert len(own["nearest"]) + len(own["farthest"]) == clustered.partition.contact_sheet
        assert all(of[row["id"]]["expert"] == k for row in [*own["nearest"], *own["farthest"]])
        word = own["nearest"][0]["caption"].split()[0]  # "red", "green" or "blue": kinds are far apart
        assert word in [term["word"] for term in own["terms"]]
    assert report["map"]["rows"] == report["sizes"]  # fewer than the map holds: all
    assert sum(report["map"]["variance"]) > 0.8  # three kinds lie in a plane
    assert report["silhouette"]["rows"] <= 60
    assert min(report["silhouette"]["experts"]) > 0.5
    known = zip(report["silhouette"]["experts"], report["sizes"], strict=True)
    assert report["silhouette"]["overall"] == pytest.approx(sum(value * size for value, size in known) / sum(report["sizes"]))
    # Rows lie around the centroids that they belong to.
    for k, points in enumerate(where.points):
        own = where.fine[where.fine_expert == k].mean(0)
        others = [where.fine[where.fine_expert == j].mean(0) for j in range(3) if j != k]
        assert np.linalg.norm(points.mean(0) - own) < min(np.linalg.norm(points.mean(0) - other) for other in others)
    assert [line["rows"] for line in report["cost"]["stages"]] == [*report["sizes"], sum(report["sizes"])]


def test_the_task_and_its_files(clustered: RunConfig, ray_local: None) -> None:
    cluster_report.write_report(clustered, cluster_report.draw_sheets(clustered))
    clusters = Folder(clustered.run_dir) / "clusters"
    report = clusters.read_json("report.json")
    assert report["sizes"] == clusters.read_json("clusters.json")["sizes"]
    assert {"imbalance", "silhouette", "cost", "map", "experts", "inertia", "warnings"} <= report.keys()
    assert b"data:" not in clusters.read_bytes("report.json")
    html = clusters.read_bytes("report.html").decode()
    assert html.count("data:image/png;base64,") == 3
    assert "OpenMoji" in html
