"""The report as HTML: balanced, self-contained, escaped, with its figures, whole or in part."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import fabricated
import pytest

from paris_ray import stages
from paris_ray.data import schema
from paris_ray.evaluation.asking import Endpoint
from paris_ray.evaluation.evaluate import evaluate
from paris_ray.evaluation.report import write_report
from paris_ray.storage import Folder

VOID = {"meta", "img", "br", "link", "input", "hr"}


class Page(HTMLParser):
    """Checks nesting; gathers text, ids and attributes."""

    def __init__(self, html):
        super().__init__(convert_charrefs=True)
        self.open, self.words, self.ids, self.links, self.images, self.tags = [], [], [], [], [], set()
        self.feed(html)
        self.close()
        assert not self.open, f"never closed: {self.open}"
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.tags.add(tag)
        assert not any(name.startswith("on") for name in found), "no event handlers"
        if "id" in found:
            self.ids.append(found["id"])
        for name in ("src", "href", "srcset", "data", "poster", "xlink:href"):
            if name in found:
                (self.images if name == "src" else self.links).append(found[name])
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.words.append(data)


def read(config):
    path = write_report(config)
    html = Folder(config.run_dir).read_bytes("report.html").decode()
    assert path.endswith("/report.html")
    return html, Page(html)


@pytest.fixture(scope="module")
def evaluated(stand_ins, tmp_path_factory):
    config = fabricated.whole_run(tmp_path_factory.mktemp("run"))
    evaluate(config, Endpoint("http://server", fabricated.Server(wrong={"g1"}).transport()))
    return config


def test_a_whole_run(evaluated):
    _, page = read(evaluated)
    assert "Not run." not in page.text
    rows = Folder(evaluated.run_dir).read_json("eval/table.json")["rows"]
    for row in rows:
        assert row["title"] in page.text
    head = rows[0]["right"]
    assert f"{head['hits']} of 6" in page.text
    figures = (
        "24 captioned pictures",
        "18 train",
        "3 refused",
        "empty caption 2 it has no characters",
        "8 rows, 44%",
        "960 images seen",
        "100 images/s",
        "12.0 s",
        "2 rows/s",
    )
    for figure in (*figures, fabricated.FINGERPRINT, "CC BY-SA 4.0"):
        assert figure in page.text, figure
    assert page.ids == [*dict.fromkeys(page.ids)]
    assert {link for link in page.links if link.startswith("#")} == {f"#{name}" for name in page.ids if name != "attribution"}
    # Per cluster a sheet; in the strip, the pairs, the held-out pairs and the routing rows, pictures.
    assert len(page.images) == 3 + 6 + 2 * 6 + 2 * 2 + 6


def test_self_contained(evaluated):
    html, page = read(evaluated)
    assert page.images
    assert all(image.startswith("data:image/") for image in page.images)
    assert all(link.startswith("#") for link in page.links)
    assert not {"script", "iframe", "link", "object", "embed", "base"} & page.tags
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL)[1]
    assert "url(" not in style
    assert "@import" not in style
    assert style.count("{") == style.count("}")
    assert "default-src 'none'" in html


def test_hostile_captions_and_reasons_are_text(evaluated):
    html, page = read(evaluated)
    assert fabricated.HOSTILE in page.text
    assert "<script" not in html
    assert "unreadable image 1 <b>cut</b>" in page.text
    assert "<b>cut" not in html


@pytest.mark.parametrize("done", [0, 1, 2, 3])
def test_a_run_in_part_says_what_is_missing(tmp_path, stand_ins, done):
    config = fabricated.run_config(tmp_path / "run")
    for make in (fabricated.write_data, fabricated.write_training, fabricated.write_model)[:done]:
        make(config)
    _, page = read(config)
    assert "python -m jobs.evaluate" in page.text  # how to get the missing table
    assert "Not run." in page.text
    assert ("24 captioned pictures" in page.text) == (done > 0)
    assert ("expert 0" in page.text) == (done > 0)


def test_lost_rejects_do_not_look_like_none(tmp_path, stand_ins):
    config = fabricated.run_config(tmp_path / "run")
    fabricated.write_data(config)
    (Folder(config.run_dir) / "rejected").delete_all()
    _, page = read(config)
    assert "No row was refused" not in page.text
    assert "RUN/rejected is not whole" in page.text


def test_clusters_are_as_large_as_they_are_after_an_append(tmp_path, stand_ins):
    config = fabricated.run_config(tmp_path / "run")
    fabricated.write_data(config)
    _, page = read(config)
    assert "expert 0 8 rows, 44%" in page.text
    assert "appended" not in page.text
    run = Folder(config.run_dir)
    more = schema.read_table(run / "corpus", schema.part_name(1)).slice(0, 2)
    more = more.set_column(0, more.schema.field("id"), [["new 0", "new 1"]])
    schema.write_table(run / "corpus", schema.part_name(2), more)
    stage = stages.stage(config, "embed")
    stage.publish({"rows": 38, "rejected": 3}, after=stage.status().manifest)
    read(config)  # while the clusters do not know them yet
    stage = stages.stage(config, "partition")
    stage.publish({"sizes": [10, 6, 4]}, after=stage.status().manifest)
    _, page = read(config)
    assert "expert 0 10 rows, 50%" in page.text
    assert "sizes are of version 2 of the clusters" in page.text


def test_one_expert_of_three(tmp_path, stand_ins):
    config = fabricated.run_config(tmp_path / "run")
    fabricated.write_data(config)
    fabricated.write_training(config)
    for name in ("experts/1", "experts/2", "router"):
        (Folder(config.run_dir) / name).delete_all()
    _, page = read(config)
    assert "1 of 3 trained" in page.text


def test_a_routers_calibration_is_that_of_its_last_look(tmp_path, stand_ins):
    config = fabricated.run_config(tmp_path / "run")
    fabricated.write_data(config)
    fabricated.write_training(config)
    assert "Calibration" not in read(config)[1].text  # trained before it was measured
    looks = [
        {"images": 100, "accuracy_by_time": [0.5, 0.5], "ece_by_time": [0.5, 0.5], "prior": 0.4},
        {"images": 200, "accuracy_by_time": [0.9, 0.8], "ece_by_time": [0.0124, 0.2], "prior": 0.4,
         "without_text": {"accuracy_by_time": [0.7, 0.3], "ece_by_time": [0.05, 0.06]}},
    ]  # fmt: skip
    folder = stages.folder(config, "router")
    folder.write_bytes("metrics/images-000000640.jsonl", "".join(json.dumps({"loss": 1.0, **look}) + "\n" for look in looks).encode())
    text = read(config)[1].text
    assert "t = 0.25 t = 0.75 router 90 %, 0.012 80 %, 0.200 router, without its caption 70 %, 0.050 30 %, 0.060" in text
    assert "Always naming the largest cluster would be right 40 % of the time" in text
