"""Figures of a comparison beside those that decide, of pictures, routers and losses that are planted."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
from planted import config, finish

from paris_ray.config import OpenClipEmbedding
from paris_ray.evaluation import compare_measures, compare_scenes, compare_work
from paris_ray.evaluation.arrays import load, save
from paris_ray.evaluation.compare_captions import Caption
from paris_ray.evaluation.compare_measures import AMONG_HEADER, ROUTER_HEADER, Measures, among_rows, router_rows
from paris_ray.evaluation.compare_report import write_report
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import Run
from paris_ray.evaluation.times import TIMES
from paris_ray.manifest import MANIFEST
from paris_ray.storage import Folder

N, D, CHOICES = 40, 6, 4
CAPTIONS = [f"a thing of kind {i // 2}" for i in range(N)]  # each twice


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Measures of planted features: sets of one way under some seeds → measures, whose originals are ``.real``."""
    mine = config(tmp_path, "rows=[experts]")
    judged = [Caption(f"row {i}", caption, 0) for i, caption in enumerate(CAPTIONS)]
    others = [Caption(f"other {i}", "another", 0) for i in range(CHOICES + N)]
    # Those that are judged lie among the validation rows one by one, in the other order.
    mixed = [*others[:CHOICES], *(one for pair in zip(judged[::-1], others[CHOICES:], strict=True) for one in pair)]
    lists = {"validation": mixed, "seen": judged + others[CHOICES:]}
    monkeypatch.setattr(compare_measures, "choose", lambda compare, run, part, count: lists[part][:count])
    run = Folder(mine.folder) / "partitions/kmeans-4"
    (run / "corpus").write_json(MANIFEST, {"counts": {}, "files": []})
    validation = np.random.default_rng(0).normal(size=(CHOICES + 2 * N, D)).astype(np.float32)
    save(Folder(mine.folder) / "reference", "validation", validation)

    def make(*sets):
        folders = {seed: Folder(mine.folder) / f"way/{seed}" for seed in range(len(sets))}
        for seed, one in enumerate(sets):
            save(folders[seed], "features", one)
        array = lambda folder, name: load(folder, name) if folder.exists(f"{name}.npy") else None  # noqa: E731
        measures = Measures(SimpleNamespace(compare=mine, ways={"experts": SimpleNamespace(folders=folders)}, array=array))
        measures.real, measures.other = validation[CHOICES::2][::-1], validation[CHOICES + 1 :: 2]
        return measures

    return make


def test_pictures_equal_to_their_originals_have_all_of_it_and_others_none(stub):
    real = stub().real
    found = stub(real).among("experts")
    assert (found.precision, found.recall, found.coverage, found.own) == (1, 1, 1, 1)
    assert found.chance == pytest.approx((N / 2) * 2 * 2 / N**2)  # 20 captions, twice each, on both sides
    far = stub(real + 1000).among("experts")
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    half = stub(real, real + 1000).among("experts")  # the mean over seeds
    assert (half.precision, half.coverage) == (0.5, 0.5)
    assert found.copies is None
    assert found.clip is None


def test_as_many_other_originals_stand_beside_them(stub):
    measures = stub(stub().real)
    rows = among_rows(measures)
    assert [row[0] for row in rows] == ["experts", "other originals", "their originals"]
    assert all(len(row) == len(AMONG_HEADER) for row in rows)
    expected = np.mean([1 - np.dot(*pair) / np.prod(np.linalg.norm(pair, axis=1)) for pair in measures.real.astype(float).reshape(-1, 2, D)])
    assert rows[2][AMONG_HEADER.index("diversity within captions")] == f"{expected:.3f}"
    other = stub(measures.other).among("experts")
    assert rows[1][1:5] == [f"{value:.3f}" for value in (other.precision, other.recall, other.density, other.coverage)]


def test_a_copy_is_nearer_to_a_training_row_than_new_originals_are(stub):
    """Ten of forty pictures are training rows, but for their length; the bound and the shares by loops."""
    g = np.random.default_rng(1)
    training = g.normal(size=(200, D))
    made = g.normal(size=(N, D)) * 3
    made[:10] = training[50:60] * 2
    measures = stub(made.astype(np.float32))
    measures.training = training.astype(np.float16)

    def distance(one):
        return min(1 - np.dot(one, row) / np.linalg.norm(one) / np.linalg.norm(row) for row in training)

    bound = np.quantile([distance(one) for one in np.concatenate([load_validation(measures)])], 0.05)
    assert measures.copy_bound == pytest.approx(bound, rel=0.02)
    expected = np.mean([distance(one) < bound for one in made])
    found = measures.among("experts").copies
    assert found.value == pytest.approx(expected)
    assert 0.25 <= found.value < 0.4
    assert found.low < found.value < found.high


def load_validation(measures):
    return load(Folder(measures.compare.folder) / "reference", "validation").astype(float)


def test_training_rows_are_those_of_the_corpus_where_the_judge_made_its_embeddings(stub, monkeypatch):
    measures = stub(stub().real)
    reference = Folder(measures.compare.folder) / "reference"
    embeddings = np.arange(12.0, dtype=np.float16).reshape(6, 2)
    monkeypatch.setattr(compare_measures, "read_splits", lambda folder: {"a": np.array([0, 1, 0]), "b": np.array([2, 0, 0])})
    monkeypatch.setattr(compare_measures, "read_columns", lambda folder, names: {"embedding": embeddings})
    reference.write_json(MANIFEST, {"counts": {"independent": True}})
    assert measures.training is None
    del measures.training
    reference.write_json(MANIFEST, {"counts": {"independent": False}})
    assert measures.training.tolist() == embeddings[[0, 2, 4, 5]].tolist()


def test_clip_score_is_of_each_picture_and_its_caption(stub):
    g = np.random.default_rng(2)
    made, texts = g.normal(size=(N, D)), g.normal(size=(N, D))
    measures = stub(made)
    save(Folder(measures.compare.folder) / "captions", "texts", texts)
    cosines = [max(0, np.dot(a, b) / np.linalg.norm(a) / np.linalg.norm(b)) for a, b in zip(made, texts, strict=True)]
    assert measures.among("experts").clip.value == pytest.approx(100 * np.mean(cosines), rel=1e-5)


def test_captions_are_encoded_where_the_judge_is_a_clip(tmp_path, monkeypatch):
    mine = config(tmp_path, "judge={kind: open_clip, model: tiny-clip}")
    assert isinstance(mine.encoder, OpenClipEmbedding)
    _, order = finish(mine, keep=lambda unit: unit.kind == "captions")
    assert [unit.key for unit in order] == ["captions"]
    assert not finish(config(tmp_path / "other"), keep=lambda unit: unit.kind == "captions")[1]
    source = compare_work.partition_folder(mine, "experts")
    (source / "corpus").write_json(MANIFEST, {"fingerprint": "x", "counts": {}, "files": []})
    (Folder(mine.folder) / "captions").delete_all()
    monkeypatch.setattr(compare_work, "choose", lambda *_: [Caption(str(i), caption, 0) for i, caption in enumerate(CAPTIONS)])
    clip = SimpleNamespace(texts=lambda captions: np.array([[len(one), 1.0] for one in captions]))
    monkeypatch.setattr("paris_ray.evaluation.judges.OpenClip", lambda encoder, device: clip)
    compare_work.encode_captions(mine)
    assert load(Folder(mine.folder) / "captions", "texts")[:, 0].tolist() == [len(one) for one in CAPTIONS]


def test_routers_and_losses_by_time_are_in_the_report(tmp_path):
    """A router that is right in three of four cases, four times surer at the second seed, beside clusters of which one has half of the rows."""
    mine = config(tmp_path, "rows=[experts]", "seeds=[0, 1]", "routings=[]")
    plan, _ = finish(mine)
    clusters, k = np.arange(40) % 4, 4
    named = np.where(clusters == 3, 0, clusters)
    sure = (0.4, 0.85)
    (Folder(mine.folder) / "partitions/kmeans-4/clusters").write_json(MANIFEST, {"counts": {"sizes": [100, 50, 25, 25]}})
    by_time = np.linspace(0.5, 1.5, len(TIMES))
    for seed in mine.seeds:
        p = np.full((40, k), (1 - sure[seed]) / (k - 1))
        p[np.arange(40), named] = sure[seed]
        folder = Folder(Run("experts", seed, plan.rate("experts")).folder(mine)) / "losses/seen"
        save(folder, "router", np.tile(p, (len(TIMES), 1, 1)))
        save(folder, "clusters", clusters)
        save(folder, "routed", by_time[:, None] + seed + np.linspace(-0.1, 0.1, 40))
    measures = Measures(Results(mine))
    (row,) = router_rows(measures)
    assert row[: 1 + len(TIMES)] == ["experts", *["0.750"] * len(TIMES)]
    losses = [0.75 * math.log(one) + 0.25 * math.log((1 - one) / 3) for one in sure]
    cells = {name: row[i] for i, name in enumerate(ROUTER_HEADER)}
    assert cells["log loss"] == f"{-np.mean(losses):.3f}"
    assert cells["calibration error"] == f"{np.mean([0.35, 0.1]):.3f}"
    assert row[ROUTER_HEADER.index("by sizes alone")] == "0.250"
    assert row[-1] == f"{-np.mean(np.log([0.5, 0.25, 0.125, 0.125])):.3f}"
    np.testing.assert_allclose(measures.losses_by_time()["experts"].losses, by_time + 0.5)
    assert "0.750 | 0.750" in write_report(mine)
    html = Folder(mine.folder).read_bytes("report.html").decode()
    for words in ("Held-out loss by time", "Quality against inference cost", "right at t = 0.98"):
        assert words in html, words


@pytest.mark.parametrize(("shared", "warns"), [([0.085, 0.067], True), ([0.326, 0.010], False)])
def test_clusters_that_divide_nothing_are_told_before_anything_is_trained(tmp_path, monkeypatch, shared, warns):
    """Figures of the notebook: textured scenes, and plain ones."""
    monkeypatch.setattr(compare_scenes, "choose", lambda *_: [Caption("0", "a fox at the top left on a blue ground", 1)])
    monkeypatch.setattr(compare_scenes, "shared_information", lambda scenes, clusters: {"first thing": shared})
    said = compare_scenes.undivided(config(tmp_path), Folder(tmp_path))
    assert (said is not None) == warns
    assert said is None or "share 0.085 of their information with the first thing of a scene, shuffled ones 0.067" in said
