"""What pictures are measured to, in features and in pixels, by SciPy and by loops."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from planted import config, finish
from scipy.linalg import sqrtm

from paris_ray.data import schema
from paris_ray.evaluation import compare_captions, compare_distances
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_captions import Caption
from paris_ray.evaluation.compare_distances import Space, own_originals, pixels
from paris_ray.evaluation.compare_measures import distance_table
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import Run
from paris_ray.evaluation.compare_tables import way_header, way_rows
from paris_ray.manifest import MANIFEST
from paris_ray.storage import Folder

ORIGINALS, JUDGED = 120, 40


def frechet(a, b):
    """Of two sets, by SciPy's root of a matrix."""
    means, spreads = [one.mean(0) for one in (a, b)], [np.cov(one, rowvar=False) for one in (a, b)]
    return np.square(means[0] - means[1]).sum() + np.trace(spreads[0] + spreads[1] - 2 * sqrtm(spreads[0] @ spreads[1]).real)


def test_pictures_are_measured_to_originals_of_other_captions(tmp_path):
    """The very originals of the judged captions are as far from the others as they are, not nearer."""
    g, mine = np.random.default_rng(0), config(tmp_path)
    originals, own = g.normal(size=(ORIGINALS, 5)), np.isin(np.arange(ORIGINALS), g.permutation(ORIGINALS)[:JUDGED])
    space, expected = Space(mine, originals, own), frechet(originals[own], originals[~own])
    assert space.axes == (5, 5)
    assert space.distance([originals[own]]) == space.of_originals() == pytest.approx(expected)
    far = originals[own] + 1.0
    assert space.distance([originals[own], far]) == pytest.approx((expected + frechet(far, originals[~own])) / 2)
    difference = space.difference([originals[own]] * 3, [far] * 3)
    assert difference.value == pytest.approx(frechet(far, originals[~own]) - expected)
    assert difference.low > 0
    floor = space.floor()
    assert (floor.rows, floor.others) == (JUDGED, ORIGINALS - JUDGED)  # as many on both sides as of pictures
    assert Space(mine, originals, np.zeros(ORIGINALS, bool)).of_originals() is None


def test_axes_are_those_along_which_the_others_differ_most(tmp_path):
    g = np.random.default_rng(0)
    scale = np.r_[np.full(16, 5.0), np.full(8, 0.1)]
    originals, own = g.normal(size=(ORIGINALS, 24)) * scale, np.arange(ORIGINALS) < JUDGED
    originals[own, 20] = 1000 * g.normal(size=JUDGED)  # of those that are left out
    space = Space(config(tmp_path), originals, own)
    assert space.axes == (16, 24)
    along, flat = space.along(np.eye(24)), np.square(space.along(np.eye(24))).sum(1)
    assert along.shape == (24, 16)
    assert flat[:16] == pytest.approx(1, abs=0.01)
    assert flat[16:] == pytest.approx(0, abs=0.01)


def test_originals_of_judged_captions_are_known_by_their_rows(tmp_path):
    mine, run, ids = config(tmp_path, "seen_captions=8"), Folder(str(tmp_path / "run")), [f"row {i}" for i in range(24)]
    assert not own_originals(mine, run, 5).any()  # no corpus
    table = {"id": ids, "caption": [f"caption {i % 5}" for i in range(24)], "split": ["validation"] * 24}
    schema.write_table(run / "corpus", schema.part_name(0), pa.table(table))
    schema.write_table(run / "clusters", "labels.parquet", pa.table({"id": ids, "expert": [0] * 24}))
    (run / "corpus").write_json(MANIFEST, {"counts": {}, "files": [{"name": schema.part_name(0)}]})
    judged = {one.id for one in compare_captions.choose(mine, run, "seen", 8)}
    order = [one.id for one in compare_captions.choose(mine, run, "validation", None)]
    assert [order[i] for i in np.flatnonzero(own_originals(mine, run, 24))] == [name for name in order if name in judged]
    assert own_originals(mine, run, 20).tolist() == own_originals(mine, run, 24)[:20].tolist()


@pytest.mark.parametrize(("side", "left"), [(8, 8), (32, 16), (24, 12), (40, 10)])
def test_pixels_are_means_of_squares(side, left):
    pictures = np.random.default_rng(0).integers(0, 256, (2, side, side, 3), np.uint8)
    d, found = side // left, pixels(pictures).reshape(2, left, left, 3)
    for i, y, x in ((0, 0, 0), (1, left - 1, 2), (1, 3, left - 1)):
        square = [pictures[i, y * d + a, x * d + b].astype(float) for a in range(d) for b in range(d)]
        assert found[i, y, x] == pytest.approx(sum(square) / d**2 / 255, abs=1e-6)


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Two rows whose features are alike, and whose pictures are those of the originals, but for the monolith's, which are too dark."""
    mine = config(tmp_path, "rows=[experts, monolith]", "routings=[experts]")
    plan, _ = finish(mine)
    g = np.random.default_rng(0)
    rows = [Caption(str(i), "a caption", 0) for i in range(ORIGINALS)]
    lists = {"validation": rows, "seen": rows[-JUDGED:]}
    monkeypatch.setattr(compare_distances, "choose", lambda compare, run, part, count: lists[part][:count])
    monkeypatch.setattr(compare_distances, "read_latents", lambda folder, ids: originals[[int(one) for one in ids]].astype(np.float32))
    codec = SimpleNamespace(decode=lambda latents: latents.numpy().astype(np.uint8))
    monkeypatch.setattr("paris_ray.data.codec.load_codec", lambda *_: codec)
    originals = g.integers(60, 200, (ORIGINALS, 8, 8, 3), np.uint8)
    run = Folder(mine.folder) / "partitions/kmeans-4"
    (run / "corpus").write_json(MANIFEST, {"counts": {}, "files": []})
    (run / "encoders").write_json("encoders.json", {"codec": {}})
    save(Folder(mine.folder) / "reference", "validation", g.normal(size=(ORIGINALS, 4)))
    for row, dark in (("experts", 0), ("monolith", 50)):
        for way in plan.ways(row, 0):
            for seed in mine.seeds:
                folder = Folder(Run(row, seed, plan.rate(row)).folder(mine)) / plan.drawing(way, plan.guidance(way), "seen").folder
                if folder.exists(MANIFEST):
                    save(folder, "pictures", originals[-JUDGED:] - dark + g.integers(0, 5, (JUDGED, 8, 8, 3), np.uint8))
                    save(folder, "features", g.normal(size=(JUDGED, 4)))
    return mine, originals


def test_pixels_judge_beside_an_encoder_that_made_the_clusters(planted):
    mine, originals = planted
    results = Results(mine)
    assert not results.independent
    _, header, rows = distance_table(results)
    assert header[1] == "Fréchet distance, pixels"
    assert header[3] == "Fréchet distance, planted (made the clusters, decides nothing)"
    cells = {row[0]: row for row in rows}
    darker = results.distance_difference("experts", "monolith", results.pixels)
    assert darker.low > 0 and darker.seeds == 3  # noqa: PT018
    assert cells["monolith"][2].startswith(f"{darker.value:+.3g} (+")
    low = float(results.distance_difference("experts", "monolith").low)
    assert low < 0  # the features are alike
    assert cells["experts/expert-0"][2] == "–"  # of one training nobody can tell
    assert float(cells["experts"][1]) < 2 * float(cells["their originals"][1])
    assert float(cells["their originals"][1]) == pytest.approx(results.pixels.distance([pixels(originals[-JUDGED:])]), rel=0.01)
    assert float(cells["other originals"][1].split()[0]) == pytest.approx(results.pixels.floor().value, rel=0.01)


def test_no_pixels_beside_an_independent_judge_or_of_a_codec_that_needs_a_gpu(planted):
    mine, _ = planted
    reference = Folder(mine.folder) / "reference"
    made = reference.read_json(MANIFEST)
    vae = mine.base.model_copy(update={"data": mine.base.data.model_copy(update={"codec": SimpleNamespace(kind="vae")})})
    assert compare_distances.original_pixels(mine.model_copy(update={"base": vae}), Folder(mine.folder) / "partitions/kmeans-4", 9) is None
    made["counts"]["independent"] = True
    reference.write_json(MANIFEST, made)
    results = Results(mine)
    assert results.pixels is None
    assert distance_table(results)[1][1:] == ("Fréchet distance, planted", "more than experts (95 %)")


def test_a_kernel_distance_is_of_inceptions_features_alone(planted):
    """Of others' scale its cube is noise."""
    results = Results(planted[0])
    header, rows = way_header(results), way_rows(results)
    assert not [name for name in header if "kernel" in name.lower()]
    assert "Fréchet distance (clusters' encoder, decides nothing)" in header
    assert {len(row) for row in rows} == {len(header)}
    assert results.kernel(results.ways["experts"]) is None
