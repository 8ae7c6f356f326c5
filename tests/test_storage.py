"""Folders: nothing half-written is ever seen, and no name leaves the folder."""

from __future__ import annotations

import datetime
import errno
import gc
import hashlib
import io
import multiprocessing
import os
import pickle
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq
import pytest

from paris_ray import storage_io
from paris_ray.storage import Entry, Folder, cache_folder, copy_file, link_all, link_file
from paris_ray.storage_io import CHUNK, AtomicWriter, PatientReader, asked, given_up, passes


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


@pytest.mark.parametrize(
    ("message", "times", "sent"), [("AWS Error NETWORK_CONNECTION", 1, 2), ("AWS Error NETWORK_CONNECTION", 9, 3), ("AWS Error ACCESS_DENIED", 9, 1)]
)
def test_an_upload_whose_end_is_lost_is_sent_again(monkeypatch: pytest.MonkeyPatch, message: str, times: int, sent: int) -> None:
    """Whole, from its beginning; not for ever, and not when it is refused."""
    monkeypatch.setattr("random.random", lambda: 0.0)
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


def test_a_reader_of_a_store_is_a_file_as_others_are() -> None:
    data = os.urandom(100_000)
    with io.BufferedReader(PatientReader(io.BytesIO(data)), 1000) as file:
        assert file.read(3) + file.read() == data
    assert io.TextIOWrapper(io.BufferedReader(PatientReader(io.BytesIO(b"a\nb\n")))).readlines() == ["a\n", "b\n"]


class Sink(io.RawIOBase):
    """Of a store, which commits what it has when it is closed; ``meanwhile`` happens at the second piece."""

    def __init__(self, files: dict[str, bytes], path: str, meanwhile: Callable[[], None]):
        self.files, self.path, self.meanwhile, self.pieces = files, path, meanwhile, list[bytes]()

    def write(self, data: bytes) -> int:  # type: ignore[override]
        if self.pieces:
            self.meanwhile()
        self.pieces.append(bytes(data))
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self.files[self.path] = b"".join(self.pieces)
        super().close()


def test_a_guard_holds_off_the_others_and_leaves_nothing(tmp_path: Path) -> None:
    folder = Folder(tmp_path)
    folder.write_bytes("count", b"0")

    def count() -> None:
        for _ in range(50):
            with folder.guard("count"):
                number = int(folder.read_bytes("count"))
                time.sleep(0.0001)
                (tmp_path / "count").write_bytes(b"%d" % (number + 1))

    threads = [threading.Thread(target=count) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert folder.read_bytes("count") == b"400"
    assert os.listdir(tmp_path) == ["count"]


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Tests in the background of a shell ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def test_an_upload_that_a_signal_interrupts_is_whole(interruptible: None) -> None:
    files: dict[str, bytes] = {}
    signals = iter([signal.SIGINT])
    fs = SimpleNamespace(open_output_stream=lambda path: Sink(files, path, lambda: [os.kill(os.getpid(), one) for one in signals]))
    data = os.urandom(2 * CHUNK + 5)
    with pytest.raises(KeyboardInterrupt), AtomicWriter(fs, "x") as file:  # type: ignore[arg-type]
        file.write(data)
    assert files == {"x": data}


@pytest.mark.parametrize("twice", [False, True])
def test_an_upload_that_does_not_end_soon_is_given_up_and_never_in_part(interruptible: None, twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once interrupted it has a while, the second time none; the piece that was on its way may still end, the file does not."""
    monkeypatch.setattr(storage_io, "SOON_S", 60.0 if twice else 0.3)
    files: dict[str, bytes] = {}
    go, ended = threading.Event(), threading.Event()

    def hang() -> None:
        os.kill(os.getpid(), signal.SIGINT)
        if twice:
            assert writer._interrupted.wait(20)  # two signals that wait together are one
            os.kill(os.getpid(), signal.SIGINT)
        go.wait(20)
        threading.Timer(0.2, ended.set).start()

    fs, begun = SimpleNamespace(open_output_stream=lambda path: Sink(files, path, hang)), time.monotonic()
    writer = AtomicWriter(fs, "x")  # type: ignore[arg-type]
    with pytest.raises(KeyboardInterrupt), writer as file:
        file.write(os.urandom(2 * CHUNK + 5))
    assert time.monotonic() - begun < 10
    assert given_up()
    monkeypatch.setattr(storage_io, "SOON_S", 0.3)
    hanging = SimpleNamespace(open_output_stream=lambda path: go.wait(20))
    with pytest.raises(TimeoutError, match="y was given up"), AtomicWriter(hanging, "y") as file:  # type: ignore[arg-type]
        file.write(b"what is done on the way out")
    go.set()
    assert ended.wait(10)
    gc.collect()
    assert not given_up()
    assert files == {}


def test_an_interrupted_upload_is_not_tried_again(interruptible: None) -> None:
    tries = []

    def refuse(path: str) -> None:
        tries.append(path)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2)
        raise ConnectionResetError("lost")

    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt), AtomicWriter(SimpleNamespace(open_output_stream=refuse), "x") as file:  # type: ignore[arg-type]
        file.write(b"1")
    assert tries == ["x"]
    assert time.monotonic() - begun < 8


def test_a_file_that_cannot_be_read_is_not_stored_in_part() -> None:
    """Its disk fails after the first piece; a store's stream commits what it has when it is closed, or dropped."""

    class Failing(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            if self.tell():
                raise OSError(errno.EIO, "Input/output error")
            return super().read(size)

    files: dict[str, bytes] = {}
    fs = SimpleNamespace(open_output_stream=lambda path: Sink(files, path, lambda: None))
    writer = AtomicWriter(fs, "x")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="Input/output error"), writer:  # noqa: PT012
        writer.file.close()
        writer.file = Failing(os.urandom(2 * CHUNK))
    gc.collect()
    assert files == {}


@pytest.mark.parametrize(
    ("error", "times"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), 1),
        (OSError(errno.ENOSPC, "No space left on device"), 1),
        (OSError("AWS Error ACCESS_DENIED during PutObject operation"), 1),
        (OSError("AWS Error NO_SUCH_BUCKET during CreateMultipartUpload operation: HTTP status 404"), 1),
        (OSError("AWS Error SLOW_DOWN during PutObject operation"), 3),
        (OSError("AWS Error UNKNOWN (HTTP status 502) during UploadPart operation"), 3),
        (OSError("AWS Error NO_SUCH_UPLOAD during CompleteMultipartUpload operation"), 3),
        (OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 56, Failure when receiving data from the peer"), 3),
        (ConnectionResetError(errno.ECONNRESET, "Connection reset by peer"), 3),
    ],
    ids=str,
)
def test_what_is_sent_again_is_what_may_be_well_the_next_time(error: OSError, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("random.random", lambda: 0.0)
    tries = []

    def refuse(path: str) -> None:
        tries.append(path)
        raise error

    with pytest.raises(OSError, match=re.escape(error.strerror or str(error))), AtomicWriter(SimpleNamespace(open_output_stream=refuse), "x") as file:  # type: ignore[arg-type]
        file.write(b"1")
    assert len(tries) == times


def test_s3s_own_settings_stay_when_it_is_asked_oftener() -> None:
    """They come from what pickle takes, whose form pyarrow does not promise."""
    fs = pafs.S3FileSystem(region="eu-north-1", anonymous=True, endpoint_override="127.0.0.1:9", scheme="http", request_timeout=7)
    often, quick = (one.__reduce__()[1][0] for one in (asked(fs, 10), asked(fs, 1, 15.0)))
    wanted = {"region": "eu-north-1", "anonymous": True, "endpoint_override": "127.0.0.1:9", "scheme": "http", "allow_delayed_open": True}
    assert wanted.items() <= often.items()
    assert (often["request_timeout"], quick["request_timeout"], quick["connect_timeout"]) == (7, 15, 15)
    assert wanted.items() <= quick.items()


def test_googles_store_is_asked_for_so_long() -> None:
    """Its client does so for a quarter of an hour by itself."""
    fs = pafs.GcsFileSystem(anonymous=True, endpoint_override="127.0.0.1:9", scheme="http")
    quick = asked(fs, 1, 7.5)
    assert quick.__reduce__()[1][0] == {**fs.__reduce__()[1][0], "retry_time_limit": datetime.timedelta(seconds=8)}
    with pytest.raises(OSError, match="UNAVAILABLE") as caught:
        asked(fs, 1, 0.5).get_file_info("bucket/x")
    assert passes(caught.value)


@pytest.mark.parametrize(("kind", "shared"), [("ext4", False), ("nfs4", True), ("fuse.sshfs", True), ("unheard-of", True)])
def test_a_disk_that_other_machines_may_write_to(kind: str, shared: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "net").mkdir()
    disks = [("/", "btrfs"), (str(tmp_path / "net"), "autofs"), (str(tmp_path / "net"), kind), (str(tmp_path / "net" / "deep"), "xfs")]
    monkeypatch.setattr("psutil.disk_partitions", lambda all: [SimpleNamespace(mountpoint=place, fstype=one) for place, one in disks])
    os.symlink(tmp_path / "net", tmp_path / "link")
    assert Folder(tmp_path / "net").is_shared == Folder(tmp_path / "link" / "run").is_shared == shared
    assert not Folder(tmp_path / "network").is_shared
    assert Folder("memory://paris-ray-shared").is_shared


def test_an_impatient_folder_asks_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lock's renewal had better fail than come late."""
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it waits"))
    folder = Folder("memory://paris-ray-impatient").impatient(1.0)
    asked: list[str] = []

    def fail(path: str) -> None:
        asked.append(path)
        raise OSError("AWS Error SLOW_DOWN: Failed to flush response stream")

    class Broken(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            fail("y")
            raise AssertionError

    monkeypatch.setattr(folder, "fs", SimpleNamespace(open_output_stream=fail, open_input_file=lambda path: Broken()))
    with pytest.raises(OSError, match="SLOW_DOWN"):
        folder.write_bytes("x", b"1")
    with pytest.raises(OSError, match="SLOW_DOWN"), (folder / "deep").open("y") as file:
        file.read()
    assert [path.rpartition("/")[2] for path in asked] == ["x", "y"]
