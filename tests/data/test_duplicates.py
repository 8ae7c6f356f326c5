import hashlib
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.data import duplicates, phash, schema
from paris_ray.data.splits import NEAR_DUPLICATES, read_copies, read_splits
from paris_ray.storage import Folder

from .test_phash import brute

LIGHT = pa.schema([("id", pa.string()), ("phash", pa.int64()), ("group", pa.string()), ("split", pa.string()), ("source", pa.string())])


def name(i):
    return hashlib.sha256(str(i).encode()).hexdigest()[:32]


def write_corpus(run, rows, sizes, group_rows=3, given=()):
    """Rows are dicts; each part in row groups of a few rows. ``given``: numbers of the parts whose source gives the splits."""
    at = 0
    for number, size in enumerate(sizes):
        notes = {"listed": size + 1, **({schema.SPLIT_GIVEN: 1} if number in given else {})}
        with schema.PartWriter(run / "corpus", schema.part_name(number), LIGHT, notes) as writer:
            for start in range(at, at + size, group_rows):
                writer.write(pa.Table.from_pylist(rows[start : min(start + group_rows, at + size)], LIGHT))
        at += size


def make_rows(n, seed, own_groups):
    g = np.random.default_rng(seed)
    centres = g.integers(0, 2**63, n // 3, dtype=np.uint64)
    rows = []
    for i in range(n):
        bits = [1 << int(b) for b in g.integers(0, 64, g.integers(0, 3))]
        looks = int(centres[g.integers(len(centres))])
        for bit in bits:
            looks ^= bit
        group = f"g{g.integers(n // 2)}" if own_groups else f"{looks:016x}"
        draw = name(group if not own_groups else i)
        split = "train" if draw < "5" else "validation" if draw < "a" else "held_out"
        rows.append({"id": name(i), "phash": int(np.uint64(looks).view(np.int64)), "group": group, "split": split, "source": f"s{i}"})
    return rows


@pytest.mark.parametrize("own_groups", [False, True])
@pytest.mark.parametrize("seed", [0, 1])
def test_near_duplicates_against_all_pairs(tmp_path, own_groups, seed):
    n = 150
    rows, run = make_rows(n, seed, own_groups), Folder(tmp_path)
    write_corpus(run, rows, [40, 0, 61, 49])
    held = duplicates.read_rows(run / "corpus")
    counts = duplicates.join_near_duplicates(run / "corpus", held)
    looks = np.array([row["phash"] for row in rows]).view(np.uint64)
    roots = np.array(brute(looks, [row["group"] for row in rows]))
    # Rows of one group that look exactly alike hang together by themselves.
    for i in range(n):
        for j in range(i):
            if looks[i] == looks[j] and rows[i]["group"] == rows[j]["group"]:
                roots[roots == roots[i]] = roots[j]
    members = {root: [i for i in range(n) if roots[i] == root] for root in set(roots.tolist())}
    joined = {root: m for root, m in members.items() if len({rows[i]["group"] for i in m}) > 1}
    wanted = {}
    for m in joined.values():
        split = min((rows[i]["split"] for i in m), key=schema.SPLITS.index)
        first = min(rows[i]["id"] for i in m)
        wanted |= {rows[i]["id"]: (rows[i]["group"], split, first) for i in m}
    table = schema.read_table(run / "corpus", f"{NEAR_DUPLICATES}.parquet")
    found = {row["id"]: (row["group"], row["split"], row["of"]) for row in table.to_pylist()}
    assert found == wanted
    assert len(table) == len(found) == counts["near_duplicates"] > 30
    assert counts["groups"] == len({row["group"] for row in rows})
    changed = [row for row in rows if row["id"] in wanted and wanted[row["id"]][1] != row["split"]]
    assert counts["split_changed"] == len(changed) > 5
    splits = read_splits(run / "corpus")
    assert list(splits) == schema.parts(run / "corpus")
    resolved = [schema.SPLITS[code] for codes in splits.values() for code in codes]
    assert resolved == [wanted[row["id"]][1] if row["id"] in wanted else row["split"] for row in rows]
    assert resolved == [schema.SPLITS[code] for code in held.splits]
    assert read_copies(run / "corpus") == {row for row, (_, _, of) in wanted.items() if row != of}
    # The order of rows and parts decides nothing.
    order = np.random.default_rng(9).permutation(n)
    other = Folder(tmp_path / "other")
    write_corpus(other, [rows[i] for i in order], [75, 75])
    assert duplicates.join_near_duplicates(other / "corpus", duplicates.read_rows(other / "corpus")) == counts
    again = schema.read_table(other / "corpus", f"{NEAR_DUPLICATES}.parquet").to_pylist()
    assert {row["id"]: (row["group"], row["split"], row["of"]) for row in again} == wanted


def test_parts_whose_source_gives_the_splits_are_left_out(tmp_path):
    """The others are joined as if those were not there."""
    rows, alone, both = make_rows(150, 3, True), Folder(tmp_path / "alone"), Folder(tmp_path / "both")
    for i, looks in ((0, 0), (1, 1)):  # the first of all nodes is joined to the second
        rows[i] = {**rows[i], "phash": looks, "group": f"own {i}"}
    first, given, last = rows[:50], rows[50:90], rows[90:]
    write_corpus(alone, first + last, [50, 60])
    write_corpus(both, first + given + last, [50, 40, 60], given={1})
    held, other = duplicates.read_rows(both / "corpus"), duplicates.read_rows(alone / "corpus")
    counts, wanted = (duplicates.join_near_duplicates(run / "corpus", one) for run, one in ((both, held), (alone, other)))
    assert {**counts, "groups": None} == {**wanted, "groups": None}
    assert counts["near_duplicates"] > 10
    assert counts["groups"] == len({row["group"] for row in rows})
    assert [schema.SPLITS[code] for code in held.splits[50:90]] == [row["split"] for row in given]
    np.testing.assert_array_equal(np.delete(held.splits, range(50, 90)), other.splits)
    tables = [schema.read_table(run / "corpus", f"{NEAR_DUPLICATES}.parquet").to_pylist() for run in (both, alone)]
    assert [{**row, "part": row["part"] // 2} for row in tables[0]] == tables[1]


def test_no_component_is_divided_over_splits_and_train_wins(tmp_path):
    """A held-out row that looks like one that the fits have seen is no held-out row."""
    base, run = 0x0F0F_1234_5678_9ABC, Folder(tmp_path)
    looks = [base, base ^ 0b11, base ^ 0b1111, ~base % 2**64 >> 1, (~base % 2**64 >> 1) ^ 1, 12345]
    splits = ["held_out", "validation", "train", "held_out", "validation", "held_out"]
    rows = [
        {"id": name(i), "phash": int(np.uint64(look).view(np.int64)), "group": str(i), "split": split, "source": str(i)}
        for i, (look, split) in enumerate(zip(looks, splits, strict=True))
    ]
    write_corpus(run, rows, [6])
    duplicates.join_near_duplicates(run / "corpus", duplicates.read_rows(run / "corpus"))
    # The first and the third differ in four bits and hang together by the second.
    assert read_splits(run / "corpus")[schema.part_name(0)].tolist() == [0, 0, 0, 1, 1, 2]


def test_rows_that_come_later_follow_those_that_are_settled(tmp_path):
    base, run = 0x0F0F_1234_5678_9ABC, Folder(tmp_path)
    far = ~base % 2**64 >> 1
    looks = [base, base ^ 0b11, far, base ^ 0b1111, far ^ 1, 12345, 12345 ^ 3]
    splits = ["held_out", "validation", "train", "train", "held_out", "held_out", "train"]
    rows = [
        {"id": name(90 - i), "phash": int(np.uint64(look).view(np.int64)), "group": str(i), "split": split, "source": str(i)}
        for i, (look, split) in enumerate(zip(looks, splits, strict=True))
    ]
    write_corpus(run, rows[:3], [3])
    duplicates.join_near_duplicates(run / "corpus", duplicates.read_rows(run / "corpus"))
    write_corpus(run, rows, [3, 4])
    held = duplicates.read_rows(run / "corpus")
    held.splits[:3] = read_splits(run / "corpus")[schema.part_name(0)]
    duplicates.join_near_duplicates(run / "corpus", held, settled=3)
    # validation, as joined before; train; then one like the first two, one like the third, and two that are like each other only.
    assert [schema.SPLITS[code] for codes in read_splits(run / "corpus").values() for code in codes] == [
        "validation", "validation", "train", "validation", "train", "train", "train",
    ]  # fmt: skip
    # One that is settled stands for all, whatever the ids of the others; else the smallest id does.
    assert name(87) < name(88) or name(86) < name(88)
    assert read_copies(run / "corpus") == {max(name(90), name(89)), name(87), name(86), max(name(85), name(84))}


def test_later_rows_that_look_like_settled_ones_of_several_splits_are_unused(tmp_path):
    base, run = 0x0F0F_1234_5678_9ABC, Folder(tmp_path)
    far = ~base % 2**64 >> 1
    # Two that differ in six bits, one of validation far away; then: half-way between the two, like that one, like the first only, like the third.
    looks = [base, base ^ 0b111111, far, base ^ 0b111, base ^ 0b111 ^ 1 << 20, base ^ 1 << 40, far ^ 1]
    splits = ["train", "held_out", "validation", "train", "validation", "held_out", "train"]
    rows = [
        {"id": name(i), "phash": int(np.uint64(look).view(np.int64)), "group": str(i), "split": split, "source": str(i)}
        for i, (look, split) in enumerate(zip(looks, splits, strict=True))
    ]
    write_corpus(run, rows, [3, 4])
    held = duplicates.read_rows(run / "corpus")
    counts = duplicates.join_near_duplicates(run / "corpus", held, settled=3)
    wanted = ["train", "held_out", "validation", "unused", "unused", "unused", "validation"]
    assert [schema.SPLITS[code] for codes in read_splits(run / "corpus").values() for code in codes] == wanted
    assert [schema.SPLITS[code] for code in held.splits] == wanted
    assert counts["split_changed"] == 4
    # And so is one that comes later still, and looks like an unused one.
    rows.append({"id": name(7), "phash": int(np.uint64(base ^ 0b111 ^ 0b11 << 20).view(np.int64)), "group": "7", "split": "train", "source": "7"})
    write_corpus(run, rows, [3, 4, 1])
    held = duplicates.read_rows(run / "corpus")
    held.splits[:7] = [schema.SPLITS.index(split) for split in wanted]
    duplicates.join_near_duplicates(run / "corpus", held, settled=7)
    assert [schema.SPLITS[code] for code in held.splits] == [*wanted, "unused"]


def test_a_corpus_without_near_duplicates(tmp_path):
    rows, run = make_rows(9, 3, False)[:1], Folder(tmp_path)
    write_corpus(run, rows, [1])
    assert read_splits(run / "corpus")[schema.part_name(0)].tolist() == [schema.SPLITS.index(rows[0]["split"])]
    assert duplicates.join_near_duplicates(run / "corpus", duplicates.read_rows(run / "corpus"))["near_duplicates"] == 0
    assert read_copies(run / "corpus") == set()


def test_equal_rows_are_dropped_but_the_first_row_group_by_row_group(tmp_path, monkeypatch):
    run = Folder(tmp_path)
    ids = [name(i) for i in (0, 1, 2, 1, 3, 4, 4, 4, 0, 5)]
    rows = [{"id": one, "phash": i, "group": "g", "split": "train", "source": f"s{i}"} for i, one in enumerate(ids)]
    write_corpus(run, rows, [5, 0, 5], group_rows=2)
    schema.write_table(run / "rejected", schema.part_name(2), pa.Table.from_pylist([{"source": "x", "reason": "y"}], schema.REJECTED))
    held = duplicates.read_rows(run / "corpus")
    kept = duplicates.first_of_equals(held.ids)
    assert kept.tolist() == [True, True, True, False, True, True, False, False, False, True]
    stamps = (tmp_path / "corpus" / schema.part_name(1)).stat().st_mtime_ns
    for part, keep in held.by_part(kept).items():
        if not keep.all():
            duplicates.drop(run, part, keep)
    assert (tmp_path / "corpus" / schema.part_name(1)).stat().st_mtime_ns == stamps
    assert schema.read_columns(run / "corpus", ["source"])["source"].tolist() == ["s0", "s1", "s2", "s4", "s5", "s9"]
    rejected = [row for part in schema.parts(run / "rejected") for row in schema.read_table(run / "rejected", part).to_pylist()]
    assert [row["source"] for row in rejected] == ["s3", "x", "s6", "s7", "s8"]
    assert rejected[0]["reason"] == f"duplicate: of {name(1)}"
    with pq.ParquetFile(tmp_path / "corpus" / schema.part_name(2)) as content:
        assert schema.notes(content) == {"listed": 6}
    again = duplicates.read_rows(run / "corpus")
    assert duplicates.first_of_equals(again.ids).all()
    assert [duplicates.name_of(one) for one in again.ids] == list(dict.fromkeys(ids))
    monkeypatch.setattr(duplicates, "_BLOCK", 3)
    held.keep(kept)
    for column in ("ids", "hashes", "groups", "splits", "sizes"):
        assert getattr(held, column).tolist() == getattr(again, column).tolist(), column
    assert held.sizes.tolist() == [4, 0, 2]


def test_a_run_that_died_between_the_two_files_lists_no_reject_twice(tmp_path):
    run, part = Folder(tmp_path), schema.part_name(0)
    # Two rows may have one name: bytes that are no Unicode are shown alike.
    rows = [{"id": name(i), "phash": i, "group": "g", "split": "train", "source": source} for i, source in ((0, "a"), (0, "b?"), (0, "b?"), (0, "c"))]
    write_corpus(run, rows, [4])
    before = (tmp_path / "corpus" / part).read_bytes()
    kept = np.array([True, False, False, False])
    duplicates.drop(run, part, kept)
    wanted = schema.read_table(run / "rejected", part).to_pylist()
    assert [row["source"] for row in wanted] == ["b?", "b?", "c"]
    after = (tmp_path / "corpus" / part).read_bytes()
    (tmp_path / "corpus" / part).write_bytes(before)
    for _ in range(2):  # the second time as Ray does where a worker dies before it answers
        duplicates.drop(run, part, kept)
        assert schema.read_table(run / "rejected", part).to_pylist() == wanted
        assert (tmp_path / "corpus" / part).read_bytes() == after


def test_ids_that_end_in_zeros(tmp_path):
    run = Folder(tmp_path)
    ids = ["ab" + "0" * 30, "ab01" + "0" * 28, "0" * 32]
    rows = [{"id": one, "phash": 1, "group": "g", "split": "train", "source": one} for one in ids]
    write_corpus(run, rows, [3])
    held = duplicates.read_rows(run / "corpus")
    assert duplicates.first_of_equals(held.ids).all()
    assert [duplicates.name_of(one) for one in held.ids] == ids


def test_bytes_a_row_while_duplicates_are_looked_for(tmp_path, monkeypatch):
    """From the difference between two numbers of rows, of which few look alike; 33 bytes are held."""
    monkeypatch.setattr(duplicates, "_BLOCK", 1 << 9)
    monkeypatch.setattr(phash, "_BLOCK", 1 << 9)
    g, size = np.random.default_rng(0), 1 << 10
    parts = []
    for number in range(40):
        looks = g.integers(0, 2**63, size, dtype=np.uint64)
        columns = {"id": [g.bytes(16).hex() for _ in range(size)], "group": [f"{one:016x}" for one in looks], "split": ["train"] * size}
        parts.append((schema.part_name(number), pa.table({**columns, "phash": looks.view(np.int64)}), {}))

    def peaks(count):
        monkeypatch.setattr(schema, "read_each", lambda *_: iter(parts[:count]))
        tracemalloc.start()
        rows = duplicates.read_rows(Folder(tmp_path))
        found = [tracemalloc.get_traced_memory()[1]]
        assert sum(column.nbytes for column in (rows.ids, rows.hashes, rows.groups, rows.splits)) == 33 * len(rows.ids) == 33 * count * size
        for step in (
            lambda: rows.keep(duplicates.first_of_equals(rows.ids)),
            lambda: duplicates.join_near_duplicates(Folder(tmp_path), rows),
        ):
            tracemalloc.reset_peak()
            step()
            found.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        return np.array(found)

    peaks(8)  # imports
    reading, equal, near = (peaks(40) - peaks(8)) / (32 * size)
    assert reading <= 33 + 1
    assert equal <= 33 + 10
    assert near <= 33 + 40
