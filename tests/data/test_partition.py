"""From a corpus to clusters and shards: labels against brute force, bytes against a second run, death and resumption, messages."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, ScenesSource
from paris_ray.data import attempts, cut, fit, partition, schema
from paris_ray.data.cut import cut_all
from paris_ray.data.kmeans import Rows, kmeans
from paris_ray.data.remote_rows import RemoteRows, load, ranges
from paris_ray.data.scenes import Scenes
from paris_ray.manifest import StaleError
from paris_ray.storage import Folder
from paris_ray.training.shard import read_rows

from .fabricated_corpus import ENCODERS, WIDTH, make_corpus, shard_bytes, without_pictures


@pytest.fixture(autouse=True)
def _no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    without_pictures(monkeypatch)


@pytest.mark.parametrize("store_text", ["states", "token_ids"])
def test_labels_and_shards_hold_what_they_should(tmp_path: Path, store_text: str) -> None:
    one = make_corpus(tmp_path, store_text=store_text)
    partition.partition(one)
    run = Folder(tmp_path)
    text = "text" if store_text == "states" else "token_ids"
    corpus = schema.read_columns(run / "corpus", ["id", "split", "embedding", "latent", "text_len", text])
    labels = pq.read_table(tmp_path / "clusters/labels.parquet").to_pydict()
    c = vars(fit.Model.read(run / "clusters"))
    assert c["fine"].shape == (9, WIDTH)
    assert c["coarse"].shape == (3, WIDTH)
    assert {name: str(value.dtype) for name, value in c.items()} == {"fine": "float32", "coarse": "float32", "fine_to_coarse": "int64"}

    # Nearest fine centroid, in float64, for every row of every split; then its expert.
    x = corpus["embedding"].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    nearest = ((x[:, None] - c["fine"][None]) ** 2).sum(-1).argmin(1)
    assert labels["id"] == corpus["id"].tolist()
    assert labels["split"] == corpus["split"].tolist()
    assert labels["fine"] == nearest.tolist()
    assert labels["expert"] == c["fine_to_coarse"][nearest].tolist()
    expert = np.array(labels["expert"])
    np.testing.assert_allclose(labels["distance"], ((x - c["coarse"][expert]) ** 2).sum(1), atol=1e-5)
    for k in range(3):
        np.testing.assert_allclose(c["coarse"][k], c["fine"][c["fine_to_coarse"] == k].mean(0), atol=1e-6)
    # Fine centroids are means of train rows alone.
    train = corpus["split"] == "train"
    for f in range(9):
        np.testing.assert_allclose(c["fine"][f], x[train & (nearest == f)].mean(0), atol=1e-5)

    seen: list[str] = []
    for k in range(3):
        folder = run / "shards" / f"expert={k}"
        shard = schema.read_columns(folder, ["id", "split", "fine", "latent", "text_len", text])
        assert pq.read_schema(tmp_path / f"shards/expert={k}/{schema.part_name(0)}").equals(schema.shard_schema(ENCODERS, store_text))
        assert len(folder.files()) == 3  # one part, _started, _manifest
        ids = shard["id"].tolist()
        assert ids == sorted(ids)
        rows = [corpus["id"].tolist().index(i) for i in ids]
        assert set(rows) == set(np.flatnonzero((expert == k) & (corpus["split"] != "held_out")).tolist())
        for name in ("latent", "text_len", "split", text):
            assert (shard[name] == corpus[name][rows]).all()
        assert (shard["fine"] == nearest[rows]).all()
        seen += ids
        counts = stages.stage(one, f"shard-{k}").status().manifest["counts"]  # type: ignore[index]
        assert counts["train"] == int(((expert == k) & train).sum())
        assert counts["rows"] == len(ids)
    assert len(set(seen)) == len(seen) == int((corpus["split"] != "held_out").sum())

    summary = json.loads((tmp_path / "clusters/clusters.json").read_text())
    assert summary["sizes"] == np.bincount(expert[train], minlength=3).tolist()
    assert summary["sizes_validation"] == np.bincount(expert[corpus["split"] == "validation"], minlength=3).tolist()
    assert summary["sizes_all"] == np.bincount(expert, minlength=3).tolist()
    assert summary["fine_sizes"] == np.bincount(nearest[train], minlength=9).tolist()
    assert summary["imbalance"] == pytest.approx(max(summary["sizes"]) * 3 / sum(summary["sizes"]))
    assert max(summary["sizes"]) <= 1.5 * train.sum() / 3
    event = json.loads((tmp_path / "events/partition.json").read_text())
    assert (event["state"], event["done"], event["total"]) == ("done", 240, 240)


def test_a_second_run_does_nothing_and_another_folder_gives_the_same_bytes(tmp_path: Path) -> None:
    a, b = make_corpus(tmp_path / "a"), make_corpus(tmp_path / "b")
    partition.partition(a)
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()}
    partition.partition(a)
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "a").rglob("*") if p.is_file()} == before
    partition.partition(b)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    for name in ("labels.parquet", "centroids.safetensors", "clusters.json"):
        assert (tmp_path / "a/clusters" / name).read_bytes() == (tmp_path / "b/clusters" / name).read_bytes()
    assert stages.stage(a, "partition").status().manifest["fingerprint"] == stages.stage(b, "partition").status().manifest["fingerprint"]  # type: ignore[index]


def part_bytes(corpus: Folder) -> list[int]:
    return cut.part_bytes(corpus, schema.parts(corpus))


def test_a_group_is_bounded_by_what_its_rows_take_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Text states are padded with zeros, which take nothing on disk."""
    corpus, kind = Folder(tmp_path), pa.fixed_shape_tensor(pa.float16(), (256, 384))
    columns = pa.schema([("id", pa.string()), ("text", kind), ("text_len", pa.int32()), ("latent", pa.fixed_shape_tensor(pa.float16(), (4, 4, 4)))])
    states = np.zeros((20, 256, 384), np.float16)
    states[:, :12] = np.random.default_rng(0).standard_normal((20, 12, 384))
    rows = {"id": [f"{i:032x}" for i in range(20)], "text": states, "text_len": [12] * 20, "latent": np.zeros((20, 4, 4, 4), np.float16)}
    for number in range(5):
        schema.write_table(corpus, schema.part_name(number), schema.table(columns, rows))
    names = [entry.name for entry in corpus.files()]
    in_memory = schema.read_table(corpus, names[0]).nbytes
    assert in_memory <= part_bytes(corpus)[0] < 1.01 * in_memory
    assert sum(entry.size for entry in corpus.files()) < in_memory  # all five, on disk
    monkeypatch.setattr(cut, "GROUP_BYTES", 2 * in_memory + in_memory // 2)
    assert cut.groups(corpus, names) == [names[:2], names[2:4], names[4:]]


def test_cut_in_several_groups_a_corpus_in_another_order_gives_shards_of_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_here(corpus: Folder, grouped: list[list[str]], fine: np.ndarray, expert: np.ndarray, shards: Folder, first: int) -> Any:
        start = 0
        for index, parts in enumerate(grouped, first):  # as Ray Data does it elsewhere
            here = slice(start, start + sum(schema.count_rows(corpus, parts)))
            yield cut.cut(corpus, parts, index, fine[here], expert[here], shards)
            start = here.stop

    monkeypatch.setattr(cut, "GROUP_BYTES", 30_000)
    monkeypatch.setattr(partition, "cut_all", cut_here)
    a, b = make_corpus(tmp_path / "a"), make_corpus(tmp_path / "b", per_part=31, shuffled=True)
    for one in (a, b):
        partition.partition(one)
    for k in range(3):
        found = [Folder(tmp_path / run / "shards" / f"expert={k}") for run in ("a", "b")]
        assert all(len(schema.parts(shard)) > 1 for shard in found)
        columns = ["id", "text", "text_len", "latent", "fine", "split"]
        one, other = (schema.read_columns(shard, columns) for shard in found)
        assert one["id"].tolist() != other["id"].tolist()  # files hold what their group holds
        orders = [np.argsort(rows["id"].astype(str)) for rows in (one, other)]
        assert all((one[name][orders[0]] == other[name][orders[1]]).all() for name in columns)
        # And training reads them in the order of their ids.
        for mine, others in zip(*(read_rows(Folder(tmp_path / run), [k], "states") for run in ("a", "b")), strict=True):
            assert mine.ids == others.ids
            assert torch.equal(mine.latents, others.latents)
            assert torch.equal(mine.text, others.text)
        labels = [stages.stage(one, f"shard-{k}").status().manifest["counts"] for one in (a, b)]  # type: ignore[index]
        assert labels[0] == labels[1]


@pytest.mark.parametrize("method", ["kmeans", "random"])
def test_a_corpus_in_another_order_and_in_other_files_gives_the_same_shards(tmp_path: Path, method: str) -> None:
    sets = (f"partition.method={method}",)
    partition.partition(make_corpus(tmp_path / "a", sets))
    partition.partition(make_corpus(tmp_path / "b", sets, per_part=31, shuffled=True))
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    for name in ("centroids.safetensors", "clusters.json"):
        assert (tmp_path / "a/clusters" / name).read_bytes() == (tmp_path / "b/clusters" / name).read_bytes()
    a, b = (schema.read_table(Folder(tmp_path / run) / "clusters", "labels.parquet") for run in ("a", "b"))
    assert a["id"] != b["id"]
    assert a.sort_by("id").equals(b.sort_by("id"))


def test_of_the_corpus_each_file_is_opened_once_and_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_corpus(tmp_path)
    corpus, opened = Folder(tmp_path) / "corpus", []

    def opening(folder: Folder, name: str) -> Any:
        file = open_(folder, name)
        if name.startswith("part-"):
            opened.append((name, file))
        return file

    open_ = Folder.open
    monkeypatch.setattr(Folder, "open", opening)
    index = fit.Index.read(corpus)
    fit.random_experts(corpus, index, 3, one.seed)
    schema.count_rows(corpus, index.parts)
    assert [name for name, _ in sorted(opened, key=lambda pair: pair[0])] == [name for name in schema.parts(corpus) for _ in range(3)]
    list(cut_all(corpus, [schema.parts(corpus)], np.zeros(240, np.int32), np.zeros(240, np.int32), Folder(tmp_path) / "cut", 0))
    assert all(file.closed for _, file in opened)


def test_the_random_control_deals_out_groups_in_equal_shares(tmp_path: Path) -> None:
    one = make_corpus(tmp_path, ("partition.method=random",))
    partition.partition(one)
    run = Folder(tmp_path)
    corpus = schema.read_columns(run / "corpus", ["id", "group", "embedding", "split"])
    labels = pq.read_table(tmp_path / "clusters/labels.parquet").to_pandas().set_index("id").loc[corpus["id"]]
    expert = labels["expert"].to_numpy()
    assert (labels["fine"] == expert).all()
    assert all(len({expert[i] for i in np.flatnonzero(corpus["group"] == group)}) == 1 for group in set(corpus["group"]))
    # 120 groups dealt to 3: 40 each, standard deviation 5.2.
    dealt = np.bincount([expert[np.flatnonzero(corpus["group"] == group)[0]] for group in set(corpus["group"])], minlength=3)
    assert (np.abs(dealt - 40) < 16).all()
    train = corpus["split"] == "train"
    x = corpus["embedding"].astype(np.float64)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    means = np.stack([x[train & (expert == k)].mean(0) for k in range(3)])
    np.testing.assert_allclose(fit.Model.read(run / "clusters").coarse, means, atol=1e-6)
    np.testing.assert_allclose(labels["distance"], ((x - means[expert]) ** 2).sum(1), atol=1e-5)
    summary = json.loads((tmp_path / "clusters/clusters.json").read_text())
    assert summary["method"] == "random"
    assert summary["sizes"] == summary["fine_sizes"] == np.bincount(expert[train], minlength=3).tolist()
    assert summary["inertia"][0] == [pytest.approx(((x - means[expert]) ** 2).sum(1)[train].sum(), rel=1e-5)]


def test_where_the_source_gives_the_split_random_parts_say_nothing_of_groups(tmp_path: Path) -> None:
    """Groups of such a source have a meaning: 14,000 scenes of 8 things have 71, and experts dealt by group would know their things by heart."""
    from sklearn.metrics import mutual_info_score

    source = Scenes(ScenesSource(seen=14_000, objects=8), 32)
    groups = [" + ".join(sorted(one.name for one in source.scene("seen", i).things)) for i in range(14_000)]
    kind = schema.pa.schema([("id", schema.pa.string()), ("group", schema.pa.string()), ("split", schema.pa.string())])
    corpus = Folder(tmp_path / "corpus")
    with schema.PartWriter(corpus, schema.part_name(0), kind) as writer:
        writer.notes[schema.SPLIT_GIVEN] = 1
        writer.write(schema.table(kind, {"id": [f"{i:032x}" for i in range(14_000)], "group": groups, "split": ["train"] * 14_000}))
    expert = fit.random_experts(corpus, fit.Index.read(corpus), 8, 0)
    assert np.abs(np.bincount(expert, minlength=8) / 14_000 - 1 / 8).max() < 0.01
    shuffled = [mutual_info_score(groups, np.random.default_rng(i).permutation(expert)) for i in range(20)]
    assert abs(mutual_info_score(groups, expert) - np.mean(shuffled)) < 5 * np.std(shuffled)


def test_a_run_that_died_goes_on_and_writes_nothing_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, one = make_corpus(tmp_path / "whole"), make_corpus(tmp_path / "run")
    partition.partition(whole)
    written = 0

    def dies(folder: Folder, name: str, content: Any) -> None:
        nonlocal written
        if "expert=" in folder.path:
            written += 1
            if written == 2:
                raise OSError("disk full")
        write(folder, name, content)

    write = schema.write_table
    monkeypatch.setattr(schema, "write_table", dies)
    with pytest.raises(OSError, match="disk full"):
        partition.partition(one)
    event = json.loads((tmp_path / "run/events/partition.json").read_text())
    assert (event["state"], event["message"]) == ("failed", "OSError: disk full")
    kept = {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in shard_bytes(tmp_path / "run")}
    assert len(kept) == 1
    monkeypatch.setattr(schema, "write_table", write)
    monkeypatch.setattr(partition, "fit_clusters", lambda *_: pytest.fail("fitted again"))
    partition.partition(one)
    assert {name: (tmp_path / "run" / name).stat().st_mtime_ns for name in kept} == kept
    assert shard_bytes(tmp_path / "run") == shard_bytes(tmp_path / "whole")


def test_other_inputs_are_refused(tmp_path: Path) -> None:
    partition.partition(make_corpus(tmp_path))
    with pytest.raises(StaleError, match=r"config.fine: 9 → 12"):
        partition.partition(configs.load("tiny", [f"run_dir={tmp_path}", "data.store_text=states", "partition.fine=12"]))


def test_shards_cut_with_other_labels_are_refused(tmp_path: Path) -> None:
    one = make_corpus(tmp_path)
    partition.partition(one)
    clusters = Folder(tmp_path) / "clusters"
    table = schema.read_table(clusters, "labels.parquet")
    fine = table["fine"].to_numpy().copy()
    fine[:] = (fine + 1) % 9
    schema.write_table(clusters, "labels.parquet", table.set_column(1, "fine", [fine]))
    clusters.delete("_manifest.json")
    with pytest.raises(StaleError, match=r"cut with other labels .*--rebuild partition"):
        partition.partition(one)


def test_clusters_that_are_empty_when_iterations_end_are_no_equal_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, whole = make_corpus(tmp_path), fit._fit_fine

    def cut_off(*args: Any) -> Any:
        found = whole(*args)
        return dataclasses.replace(found, counts=np.where(np.arange(9) < 2, 0, found.counts), converged=False)

    monkeypatch.setattr(fit, "_fit_fine", cut_off)
    with pytest.raises(ConfigError, match=r"partition.max_iterations: after \d+, 2 of 9 fine clusters are still empty .*; raise it, or lower"):
        partition.partition(one)


def test_too_few_rows_or_too_alike_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"partition.fine: 500 fine clusters .* has \d+; lower it \(--set partition.fine=2\d\)"):
        partition.partition(make_corpus(tmp_path / "a", ("partition.fine=500",)))
    with pytest.raises(ConfigError, match=r"are only 3 different ones; lower it \(--set partition.fine=3\)"):
        partition.partition(make_corpus(tmp_path / "b", distinct=False))
    # What was refused leaves no mark, so that the advice can be followed.
    assert not [*(tmp_path / "b/clusters").iterdir(), *(tmp_path / "b/shards").rglob("*.json")]
    advised = configs.load("tiny", [f"run_dir={tmp_path}/b", "data.store_text=states", "partition.fine=3"])
    partition.partition(advised)
    assert all(stages.status(advised, name).state == "valid" for name in ("partition", "shard-0", "shard-1", "shard-2"))
    with pytest.raises(FileNotFoundError, match=r"run the stage 'embed' first"):
        partition.partition(configs.load("tiny", [f"run_dir={tmp_path}/none"]))


def test_ranges_cover_all_rows_once() -> None:
    pieces = [("a", np.arange(3000)), ("b", np.arange(0, 12000, 2)), ("c", np.arange(0)), ("d", np.arange(7000))]
    cut_ = ranges(pieces, 3)
    assert [(where.start, where.stop) for where, _ in cut_] == [(0, 5333), (5333, 10666), (10666, 16000)]
    joined = [(name, int(row)) for _, own in cut_ for name, rows in own for row in rows]
    assert joined == [(name, int(row)) for name, rows in pieces for row in rows]
    assert [sum(len(rows) for _, rows in own) for _, own in cut_] == [5333, 5333, 5334]


def test_past_the_drivers_memory_actors_give_the_same_bits(tmp_path: Path, ray_local: None) -> None:
    n = 5500
    corpus = Folder(tmp_path / "corpus")
    g = np.random.default_rng(0)
    for i, rows in enumerate((4000, n - 4000)):
        embedding = g.standard_normal((rows, 6)).astype(np.float16)
        kind = schema.corpus_schema({**ENCODERS, "embedding": {"width": 6}}, "states").field("embedding")
        schema.write_table(corpus, schema.part_name(i), schema.table(schema.pa.schema([kind]), {"embedding": embedding}))
    pieces = [(schema.part_name(0), np.arange(4000)), (schema.part_name(1), np.arange(n - 4000))]
    keys = g.permutation(n).astype(np.int32)
    here = Rows(*load(corpus, pieces, 6, "cosine", n), keys)
    there = RemoteRows(corpus, pieces, keys, 6, "cosine", "numpy", 2000 * 6 * 2, lambda _: None)
    assert len(there.actors) == 3
    a, b = kmeans(here, 11, 3, 8), kmeans(there, 11, 3, 8)
    assert a.centroids.tobytes() == b.centroids.tobytes()
    assert a.inertia == b.inertia
    labels = here.labels(a.centroids)
    assert (labels == there.labels(b.centroids)).all()
    assert (here.distances(labels, a.centroids) == there.distances(labels, a.centroids)).all()
    assert (here.sums_by(labels, 11).sums == there.sums_by(labels, 11).sums).all()
    assert (here.farthest(5, a.centroids) == there.farthest(5, a.centroids)).all()
    some = np.array([0, 4095, 4096, 5400, 17])
    assert (here.take(some) == there.take(some)).all()
    there.close()


def test_several_groups_go_through_ray_data(tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    one = make_corpus(tmp_path)
    partition.partition(one)
    run = Folder(tmp_path)
    labels = schema.read_table(run / "clusters", "labels.parquet")
    fine, expert = labels["fine"].to_numpy(), labels["expert"].to_numpy()
    monkeypatch.setattr(cut, "GROUP_BYTES", 2 * max(part_bytes(run / "corpus")))
    grouped = cut.groups(run / "corpus", schema.parts(run / "corpus"))
    assert [len(group) for group in grouped] == [2, 2]
    again = run / "again"
    assert sorted(cut_all(run / "corpus", grouped, fine, expert, again, 0)) == [100, 140]
    for k in range(3):
        a = schema.read_columns(run / "shards" / f"expert={k}", ["id", "latent", "fine"])
        b = schema.read_columns(again / f"expert={k}", ["id", "latent", "fine"])
        assert len((again / f"expert={k}").files()) == 2
        order = np.argsort(b["id"].astype(str))
        for name, values in a.items():
            assert (values == b[name][order]).all()


def test_a_group_that_kills_its_workers_is_named(tmp_path: Path, ray_local: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray would start the task again, without end."""

    def dies(batch: dict[str, Any], corpus: str, shards: str) -> Any:  # in a worker, which has it by value and knows no test
        real, attempts.ATTEMPTS = cut.cut, 2

        def cut_or_die(folder: Folder, parts: list[str], index: int, *others: Any) -> int:
            if index == 1:
                (Folder(shards) / "_pids").write_bytes(str(os.getpid()), b"")
                os.kill(os.getpid(), signal.SIGKILL)
            return real(folder, parts, index, *others)

        cut.cut = cut_or_die
        try:
            return cut.cut_batch(batch, corpus, shards)
        finally:
            cut.cut = real

    config = make_corpus(tmp_path / "run")
    monkeypatch.setattr(cut, "GROUP_BYTES", 2 * max(part_bytes(Folder(tmp_path) / "run/corpus")))
    with monkeypatch.context() as mortal:
        mortal.setattr(cut, "cut_batch", dies)
        mortal.setattr(attempts, "ATTEMPTS", 2)
        with pytest.raises(attempts.WorkError, match=r"partition: corpus/part-\S+ to part-\S+: 2 workers have died on it, most likely of memory"):
            partition.partition(config)
    assert len((Folder(tmp_path) / "run/shards/_pids").files()) == 2
    partition.partition(config)  # counts anew, and goes on
    assert not list((tmp_path / "run").rglob("_attempts*"))
    partition.partition(make_corpus(tmp_path / "calm"))
    for k in range(3):
        a, b = (schema.read_columns(Folder(tmp_path) / name / "shards" / f"expert={k}", ["id", "fine"]) for name in ("run", "calm"))
        assert (a["id"] == b["id"]).all()
        assert (a["fine"] == b["fine"]).all()
