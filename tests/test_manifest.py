"""Every state of a stage's folder."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from paris_ray import lock
from paris_ray.lock import Lock
from paris_ray.manifest import Stage, StaleError, damage, differences, fingerprint, require
from paris_ray.storage import Folder


def stage(path: Path, lr: float = 0.1, parent: str = "abc") -> Stage:
    return Stage("expert-0", Folder(path / "s"), {"train": {"lr": lr, "batch": 4}}, {"shard": parent})


def publish(path: Path) -> Stage:
    one = stage(path)
    one.begin()
    one.folder.write_bytes("a.bin", b"12345")
    one.folder.write_bytes("sub/b.bin", b"678")
    one.folder.write_json("_lock.json", {})
    one.publish({"rows": 3}, seconds=1.5)
    return one


def test_absent_partial_valid(tmp_path: Path) -> None:
    one = stage(tmp_path)
    assert one.status().state == "absent"
    assert one.begin().state == "absent"
    assert one.status().state == "partial"
    one.folder.write_bytes("half", b"1")
    assert one.begin().state == "partial"
    assert one.folder.exists("half")  # resuming deletes nothing
    made = one.publish()
    assert one.status().manifest == made
    assert one.begin().state == "valid"


def test_the_manifest_names_every_file_with_size_and_checksum(tmp_path: Path) -> None:
    one = publish(tmp_path)
    made = one.folder.read_json("_manifest.json")
    assert [(f["name"], f["bytes"]) for f in made["files"]] == [("a.bin", 5), ("sub/b.bin", 3)]
    assert made["files"][0]["sha256"] == hashlib.sha256(b"12345").hexdigest()
    assert made["counts"] == {"rows": 3}
    assert made["inputs"]["parents"] == {"shard": "abc"}
    assert {"python", "torch", "ray", "numpy"} <= made["software"].keys()


def test_the_fingerprint_is_of_inputs_and_bytes_not_of_time_or_place(tmp_path: Path) -> None:
    first = publish(tmp_path / "x").folder.read_json("_manifest.json")
    second = publish(tmp_path / "y").folder.read_json("_manifest.json")
    assert first["fingerprint"] == second["fingerprint"]
    other = stage(tmp_path / "z", lr=0.2)
    other.begin()
    assert other.publish()["fingerprint"] != first["fingerprint"]
    assert fingerprint({"a": 1, "b": 2}) == fingerprint({"b": 2, "a": 1}) != fingerprint({"a": 2, "b": 1})
    # Files outside the result are kept in order by their checksums, but are not identity.
    prints = []
    for seconds in (b"1", b"2"):
        timed = stage(tmp_path / f"t{seconds!r}")
        timed.begin()
        timed.folder.write_bytes("export/w", b"same")
        timed.folder.write_bytes("metrics.jsonl", seconds)
        prints.append(timed.publish(result="export/")["fingerprint"])
    assert prints[0] == prints[1]


def test_stale_says_what_changed_and_how_to_go_on(tmp_path: Path) -> None:
    publish(tmp_path)
    changed = stage(tmp_path, lr=0.3, parent="xyz")
    assert changed.status().state == "stale"
    with pytest.raises(StaleError) as caught:
        changed.begin()
    text = str(caught.value)
    assert "config.train.lr: 0.1 → 0.3" in text
    assert 'parents.shard: "abc" → "xyz"' in text
    assert "--rebuild expert-0" in text
    assert "batch" not in text
    assert changed.folder.exists("a.bin")
    assert changed.begin(rebuild=True).state == "absent"
    assert not changed.folder.exists("a.bin")
    assert changed.folder.exists("_lock.json")  # a writer clears under its own lock
    assert changed.status().state == "partial"


def test_keys_that_say_nothing_do_not_hide_what_changed(tmp_path: Path) -> None:
    def one(**embedding: object) -> Stage:
        return Stage("encoders", Folder(tmp_path), {"embedding": embedding}, {})

    one(kind="timm", weights=None).begin()
    assert one(kind="lite").status().reasons == ('config.embedding.kind: "timm" → "lite"',)
    assert one(kind="timm").status().state == "stale"  # it is another config all the same


def test_started_with_other_inputs_is_stale_too(tmp_path: Path) -> None:
    stage(tmp_path).begin()
    assert stage(tmp_path, lr=9).status().state == "stale"


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_attempt_that_made_nothing_leaves_no_mark(tmp_path: Path, error: type[BaseException]) -> None:
    first = stage(tmp_path)
    first.begin()
    with pytest.raises(error), first.attempt():
        raise error
    other = stage(tmp_path, lr=9)
    assert other.status().state == "absent"
    other.begin()
    other.folder.write_bytes("a.bin", b"1")
    with pytest.raises(error), other.attempt():
        raise error
    assert other.status().state == "partial"
    assert stage(tmp_path).status().state == "stale"
    with pytest.raises(error), publish(tmp_path / "done").attempt():
        raise error
    assert stage(tmp_path / "done").status().state == "valid"


def test_an_attempt_whose_lock_is_lost_leaves_the_mark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the next owner's by then."""
    one = stage(tmp_path)
    one.begin()
    mine = Lock(one.folder, "old")
    monkeypatch.setattr("os.kill", lambda pid, number: None)
    with mine:
        with pytest.raises(KeyboardInterrupt), one.attempt():  # noqa: PT012
            mine._lose("another has it now")
            raise KeyboardInterrupt
        assert one.status().state == "partial"
    assert not lock.lost()


def test_damaged_says_which_file(tmp_path: Path) -> None:
    one = publish(tmp_path)
    one.folder.write_bytes("a.bin", b"12")
    one.folder.delete("sub/b.bin")
    found = one.status()
    assert found.state == "damaged"
    assert found.reasons == ("a.bin has 2 bytes, its manifest says 5", "sub/b.bin is missing")
    with pytest.raises(StaleError, match="is damaged"):
        one.begin()


def test_same_size_other_bytes_is_found_on_request(tmp_path: Path) -> None:
    one = publish(tmp_path)
    one.folder.write_bytes("a.bin", b"54321")
    assert one.status().state == "valid"
    assert one.status(verify=True).reasons == ("a.bin has another checksum than its manifest says",)
    assert damage(one.folder, one.folder.read_json("_manifest.json")) == []


def test_differences_of_trees() -> None:
    old = {"a": 1, "b": {"c": [1, 2], "d": None}, "gone": True}
    new = {"a": 1, "b": {"c": [1, 3], "d": None}, "come": "x"}
    assert differences(old, new) == ["b.c: [1, 2] → [1, 3]", 'come: null → "x"', "gone: true → null"]
    assert differences(old, json.loads(json.dumps(old))) == []


def test_a_missing_parent_names_the_job(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"run the stage 'partition' first \(python -m jobs.partition"):
        require(Folder(tmp_path), "partition")


def test_only_the_result_must_stay(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    stage = Stage("expert-0", folder, {}, {})
    stage.begin()
    for name in ("export/w", "checkpoints/1", "metrics"):
        folder.write_bytes(name, b"12")
    stage.publish(result="export/")
    folder.delete("checkpoints/1")
    assert stage.status(verify=True).state == "valid"
    folder.write_bytes("metrics", b"1")
    assert stage.status().state == "damaged"
    folder.write_bytes("metrics", b"12")
    folder.delete("export/w")
    assert stage.status().reasons == ("export/w is missing",)
