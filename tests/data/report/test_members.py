"""Which rows the report looks at, against brute force over all of them."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.data import schema
from paris_ray.data.report import members
from paris_ray.data.report.members import Extremes, Hashed, look, quotas, read_rows
from paris_ray.storage import Folder


@pytest.mark.parametrize("cut", [1, 7, 300])
def test_extremes_are_the_smallest_one_of_each_group(cut: int) -> None:
    g = np.random.default_rng(cut)
    values, groups = g.integers(0, 60, 300).astype(np.float32), [f"g{i}" for i in g.integers(0, 90, 300)]
    found = Extremes(20)
    for low in range(0, 300, cut):
        rows = np.arange(low, min(low + cut, 300))
        found.add(values[rows], rows, groups[low : low + cut])
    best: dict[str, tuple[float, int]] = {}
    for row, (value, group) in enumerate(zip(values.tolist(), groups, strict=True)):
        best[group] = min(best.get(group, (np.inf, 0)), (value, row))
    expected = sorted(best.items(), key=lambda item: item[1])[:20]
    assert list(found.rows.items()) == [(group, row) for group, (_, row) in expected]
    assert found.more


def test_extremes_know_when_they_have_all_groups() -> None:
    found = Extremes(3)
    found.add(np.array([5.0, 1.0, 4.0, 0.5, 9.0]), np.arange(5), ["a", "b", "c", "b", "a"])
    assert list(found.rows) == ["b", "c", "a"]
    assert not found.more
    found.add(np.array([20.0]), np.array([5]), ["d"])
    assert found.more


def test_a_sample_by_hash_depends_on_the_rows_alone() -> None:
    ids = [f"row-{i}" for i in range(500)]
    expected = sorted(ids, key=lambda name: hashlib.blake2b(name.encode(), digest_size=8).digest())[:40]
    for seed, cut in ((0, 500), (1, 3), (2, 77)):
        order = np.random.default_rng(seed).permutation(500)
        found = Hashed(40)
        for low in range(0, 500, cut):
            found.add([ids[i] for i in order[low : low + cut]], order[low : low + cut])
        assert [ids[i] for i in found.rows] == expected


@pytest.mark.parametrize(
    ("sizes", "limit", "expected"),
    [
        ([50, 80], 1000, [50, 80]),  # all there are
        ([10_000, 100, 20], 1000, [880, 100, 20]),  # at least a hundred each, or all
        ([6000, 2000], 1000, [100 + 605, 100 + 194]),  # the rest in proportion: 800 for 5900 + 1900
        ([500] * 50, 1000, [20] * 50),  # no room for a hundred each
    ],
)
def test_quotas(sizes: list[int], limit: int, expected: list[int]) -> None:
    found = quotas(sizes, limit)
    assert sum(found) <= limit
    assert all(abs(a - b) <= 1 for a, b in zip(found, expected, strict=True))
    assert all(n >= min(size, 100, limit // len(sizes)) for n, size in zip(found, sizes, strict=True))
    assert all(fewer <= more for fewer, more in zip(quotas(sizes, limit // 2), found, strict=True))


def test_a_group_whose_members_are_near_and_far_is_shown_once() -> None:
    near, far = Extremes(8), Extremes(8)
    values = np.concatenate([np.arange(12.0), [99.0]])
    groups = [*(f"g{i}" for i in range(12)), "g0"]
    near.add(values, np.arange(13), groups)
    far.add(-values, np.arange(13), groups)
    assert members._sheet(near, far) == ([0, 1, 2, 3, 4, 5, 6], [11])


def corpus(path: Path, n: int = 230, per_part: int = 50) -> tuple[Folder, dict[str, np.ndarray]]:
    g = np.random.default_rng(3)
    columns = {
        "id": np.array([f"i{i}" for i in g.permutation(n)], object),
        "caption": np.array([f"caption {i}" for i in range(n)], object),
        "group": np.array([f"g{i}" for i in g.integers(0, 120, n)], object),
        "expert": g.integers(0, 2, n).astype(np.int32),
        "distance": g.random(n).astype(np.float32),
        "split": g.choice(["train", "validation", "held_out"], n, p=[0.8, 0.1, 0.1]).astype(object),
    }
    run = Folder(path)
    light = pa.table({name: list(columns[name]) for name in ("id", "caption", "group")})
    for i, low in enumerate(range(0, n, per_part)):
        schema.write_table(run / "corpus", schema.part_name(i), light.slice(low, per_part))
    labels = {name: list(columns[name]) if columns[name].dtype == object else columns[name] for name in ("expert", "distance", "split")}
    schema.write_table(run / "clusters", "labels.parquet", pa.table(labels))
    return run, columns


def test_one_pass_finds_what_sorting_everything_finds(tmp_path: Path) -> None:
    run, rows = corpus(tmp_path)
    train = rows["split"] == "train"
    sizes = [int((train & (rows["expert"] == k)).sum()) for k in (0, 1)]
    found = look(run, sizes, shown=16, sampled=60)
    assert found.parts == [(schema.part_name(i), 50) for i in range(4)] + [(schema.part_name(4), 30)]
    assert found.captions == rows["caption"].tolist()
    assert (found.caption_expert == rows["expert"]).all()
    for k in (0, 1):
        own = np.flatnonzero(train & (rows["expert"] == k))
        near: list[int] = []
        for row in own[np.argsort(rows["distance"][own])]:
            if rows["group"][row] not in {rows["group"][i] for i in near}:
                near.append(int(row))
        assert found.near[k] == near[:14]
        far: list[int] = []
        for row in own[np.argsort(-rows["distance"][own])]:
            if rows["group"][row] not in {rows["group"][i] for i in near[:14] + far}:
                far.append(int(row))
        assert found.far[k] == far[:2][::-1]
        assert len(found.sample[k]) == quotas(sizes, 60)[k]
        assert set(found.sample[k].tolist()) <= set(own.tolist())


def test_everything_fits_on_a_large_sheet_and_nothing_is_shown_twice(tmp_path: Path) -> None:
    run, rows = corpus(tmp_path)
    found = look(run, [100, 100], shown=400, sampled=60)
    for k in (0, 1):
        own = rows["group"][(rows["split"] == "train") & (rows["expert"] == k)]
        assert found.far[k] == []
        assert sorted(rows["group"][found.near[k]]) == sorted(set(own))


def test_only_what_holds_wanted_rows_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, rows = corpus(tmp_path)
    parts = [(schema.part_name(i), 50) for i in range(4)] + [(schema.part_name(4), 30)]
    with (run / "corpus").writer(schema.part_name(1)) as sink:  # as a source of few large files writes it
        pq.write_table(pa.table({name: list(rows[name][50:100]) for name in ("id", "caption")}), sink, row_group_size=20)
    read: list[tuple[int, int, list[str]]] = []

    def reading(content: pq.ParquetFile, group: int, columns: list[str]) -> pa.Table:
        read.append((content.metadata.num_rows, group, columns))
        return row_group(content, group, columns=columns)

    row_group = pq.ParquetFile.read_row_group
    monkeypatch.setattr(pq.ParquetFile, "read_row_group", reading)
    wanted = np.array([3, 49, 50, 69, 91, 229])
    pieces = list(read_rows(run / "corpus", parts, wanted, ["id"]))
    assert read == [(50, 0, ["id"]), (50, 0, ["id"]), (50, 2, ["id"]), (30, 0, ["id"])]
    assert np.concatenate([at for at, _ in pieces]).tolist() == wanted.tolist()
    assert [name for _, piece in pieces for name in piece["id"].to_pylist()] == rows["id"][wanted].tolist()


def test_captions_come_from_evenly_spaced_files_of_a_large_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "CAPTION_ROWS", 120)
    run, rows = corpus(tmp_path)  # 230 rows: every second file
    found = look(run, [100, 100], 8, 8)
    kept = [i for i in range(230) if i // 50 in (0, 2, 4)]
    assert found.captions == rows["caption"][kept].tolist()
    assert (found.caption_expert == rows["expert"][kept]).all()
