"""Folders: nothing half-written is ever seen, and no name leaves the folder."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from paris_ray.storage import Entry, Folder, cache_folder, copy_file, link_all, link_file


def test_a_file_appears_only_when_its_writer_ends_well(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "run")
    with folder.writer("a/b.bin") as file:
        file.write(b"part")
        assert not folder.exists("a/b.bin")
        assert folder.files(recursive=True) == []  # the unfinished file is not listed either
    assert folder.read_bytes("a/b.bin") == b"part"
    assert folder.files(recursive=True) == [Entry("a/b.bin", 4)]


def _half(folder: Folder) -> None:
    with folder.writer("x") as file:
        file.write(b"ne")
        raise RuntimeError("half way")


def test_a_writer_that_raises_leaves_nothing_new_and_the_old_file_whole(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_bytes("x", b"old")
    with pytest.raises(RuntimeError, match="half way"):
        _half(folder)
    assert folder.read_bytes("x") == b"old"
    assert [p.name for p in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("name", ["../x", "a/../../x", "/etc/passwd", ".."])
def test_names_that_leave_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    folder = Folder(tmp_path)
    for act in (folder.read_bytes, folder.exists, folder.size, folder.delete, lambda n: folder.write_bytes(n, b""), lambda n: folder / n):
        with pytest.raises(ValueError, match="leaves the folder"):
            act(name)


def test_listing_json_checksum_and_deletion(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_json("b.json", {"z": 1, "a": [1.5, None]})
    (folder / "sub").write_bytes("c", b"123")
    assert folder.read_json("b.json") == {"z": 1, "a": [1.5, None]}
    assert [e.name for e in folder.files()] == ["b.json"]
    assert [e.name for e in folder.files(recursive=True)] == ["b.json", "sub/c"]
    assert folder.folders() == ["sub"]
    assert folder.sha256("sub/c") == hashlib.sha256(b"123").hexdigest()
    assert (folder.size("sub/c"), folder.size("nothing"), folder.exists("sub")) == (3, None, True)
    folder.delete("nothing")
    folder.delete_all(keep=("b.json",))
    assert [e.name for e in folder.files(recursive=True)] == ["b.json"]
    folder.delete_all()
    folder.delete_all()
    assert not folder.exists()
    assert folder.files() == []
    folder.write_bytes("bad.json", b"{")
    with pytest.raises(ValueError, match=r"bad\.json is not valid JSON"):
        folder.read_json("bad.json")
    with pytest.raises(ValueError, match="not JSON compliant"):
        folder.write_json("nan.json", float("nan"))
    with pytest.raises(FileNotFoundError):
        folder.read_bytes("nothing")


def _create(path: str, value: int, barrier: object, results: object) -> None:
    barrier.wait()  # type: ignore[attr-defined]
    results.put(Folder(path).create("one", str(value).encode()))  # type: ignore[attr-defined]


def test_of_several_creators_exactly_one_wins(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    workers = [context.Process(target=_create, args=(str(tmp_path), i, barrier, results)) for i in range(4)]
    for worker in workers:
        worker.start()
    assert sorted(results.get(timeout=30) for _ in workers) == [False, False, False, True]
    for worker in workers:
        worker.join()
    assert [p.name for p in tmp_path.iterdir()] == ["one"]
    assert Folder(tmp_path).read_bytes("one") in (b"0", b"1", b"2", b"3")


def test_other_file_systems_by_uri(tmp_path: Path) -> None:
    for uri in (f"file://{tmp_path}/f", "memory://paris-ray-test"):
        folder = Folder(uri)
        folder.delete_all()
        folder.write_bytes("d/x", b"1")
        assert [e.name for e in folder.files(recursive=True)] == ["d/x"]
        assert (folder / "d").read_bytes("x") == b"1"
        assert folder.create("y", b"2")
        assert not folder.create("y", b"3")
        assert folder.read_bytes("y") == b"2"
        folder.delete_all()


@pytest.mark.parametrize("uri", ["memory://renames/model", "mock:///"])
def test_a_file_of_a_store_takes_anothers_place(uri: str) -> None:
    """In a file system of fsspec and in one of pyarrow's own."""
    folder = Folder(uri)
    folder.write_bytes("waiting", b"new")
    folder.write_bytes("here", b"the old one")
    folder.rename("waiting", "here")
    assert folder.read_bytes("here") == b"new"
    assert [entry.name for entry in folder.files()] == ["here"]
    with pytest.raises(OSError, match="waiting"):
        folder.rename("waiting", "here")
    assert folder.read_bytes("here") == b"new"


def test_a_failed_upload_to_a_store_leaves_nothing() -> None:
    folder = Folder("memory://paris-ray-failed")
    with pytest.raises(RuntimeError, match="half way"):
        _half(folder)
    assert not folder.exists("x")


def test_folders_travel_and_copy(tmp_path: Path) -> None:
    source = Folder(tmp_path / "a")
    source.write_bytes("x/y", b"1")
    again = pickle.loads(pickle.dumps(source / "x"))
    assert again.read_bytes("y") == b"1"
    target = Folder(tmp_path / "b")
    copy_file(source, "x/y", target)
    assert target.read_bytes("x/y") == b"1"
    target.upload(source.local_copy("x/y"), "z")
    assert target.read_bytes("z") == b"1"
    memory = Folder("memory://paris-ray-copy")
    memory.write_bytes("m", b"22")
    copy = memory.local_copy("m", cache=str(tmp_path / "cache"))
    assert Path(copy).read_bytes() == b"22"
    assert memory.local_copy("m", cache=str(tmp_path / "cache")) == copy
    (memory / "deep").write_bytes("a/b", b"1")
    first = (memory / "deep").local(cache=str(tmp_path / "cache"))
    assert (Path(first) / "a/b").read_bytes() == b"1"
    (memory / "deep").write_bytes("a/b", b"3")
    assert (Path((memory / "deep").local(cache=str(tmp_path / "cache"))) / "a/b").read_bytes() == b"3"
    assert (source / "x").local() == str(tmp_path / "a" / "x")


def test_the_cache_is_this_users_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = Path(cache_folder())
    assert path.stat().st_mode & 0o777 == 0o700
    path.chmod(0o777)
    with pytest.raises(PermissionError, match="only this user"):
        cache_folder()


def test_linked_folders_share_bytes_and_no_later_change(tmp_path: Path) -> None:
    source, target = Folder(tmp_path / "a"), Folder(tmp_path / "b")
    for name, content in {"x/y": b"1", "done.json": b"{}", "_lock.json": b"me"}.items():
        source.write_bytes(name, content)
    link_all(source, target, "done.json")
    assert {entry.name for entry in target.files(recursive=True)} == {"x/y", "done.json"}
    assert (tmp_path / "a/x/y").samefile(tmp_path / "b/x/y")
    link_all(source, target, "done.json")
    source.write_bytes("x/y", b"2")
    assert target.read_bytes("x/y") == b"1"
    link_file(source, "x/y", target)
    link_file(source, "x/y", target)
    assert target.read_bytes("x/y") == b"2"
    assert [path.name for path in tmp_path.rglob(".tmp-*")] == []
    memory = Folder("memory://paris-ray-link")
    link_all(source, memory, "done.json")
    assert memory.read_bytes("x/y") == b"2"


@pytest.mark.parametrize(("message", "times", "sent"), [("connection reset", 1, 2), ("connection reset", 9, 3), ("AWS Error ACCESS_DENIED", 9, 1)])
def test_an_upload_whose_end_is_lost_is_sent_again(monkeypatch: pytest.MonkeyPatch, message: str, times: int, sent: int) -> None:
    """Whole, from its beginning; not for ever, and not when it is refused."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder, real, asked = Folder("memory://paris-ray-upload"), Folder("memory://paris-ray-upload").fs, []

    class Losing:
        def open_output_stream(self, target: str) -> object:
            asked.append(target)
            stream = real.open_output_stream(target)
            if len(asked) > times:
                return stream
            stream.close()
            raise OSError(message)

    monkeypatch.setattr(folder, "fs", Losing())
    if sent > times:
        folder.write_bytes("x", b"whole")
        assert Folder(folder.uri).read_bytes("x") == b"whole"
    else:
        with pytest.raises(OSError, match=message):
            folder.write_bytes("x", b"whole")
    assert len(asked) == sent


def test_an_answer_that_is_cut_short_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the bytes of the place where it was; Parquet reads through it, too."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    folder = Folder("memory://paris-ray-cut")
    table = pa.table({"a": list(range(1000))})
    with folder.writer("t.parquet") as file:
        pq.write_table(table, file)
    whole = folder.read_bytes("t.parquet")
    fails = iter([True, True, False] * 1000)

    class Cut:
        def __init__(self, file: object):
            self.file = file

        def __getattr__(self, name: str) -> object:
            return getattr(self.file, name)

        def read(self, *size: int) -> bytes:
            data = self.file.read(*size)  # type: ignore[attr-defined]
            if next(fails):
                raise OSError("AWS Error INTERNAL_FAILURE during GetObject operation: Failed to flush response stream (eof: 0, bad: 1)")
            return data

    real = folder.fs
    monkeypatch.setattr(folder, "fs", SimpleNamespace(open_input_file=lambda path: Cut(real.open_input_file(path))))
    assert folder.read_bytes("t.parquet") == whole
    with folder.open("t.parquet") as file:
        assert (file.seek(-4, 2), file.read(2), file.read()) == (len(whole) - 4, whole[-4:-2], whole[-2:])
        assert pq.ParquetFile(file).read().equals(table)
