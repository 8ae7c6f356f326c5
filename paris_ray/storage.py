"""Folders by URI: the only module that touches paths.

A run directory may be local or any URI that pyarrow or fsspec knows (``s3://``, ``gs://``, ``abfs://`` …).
Everything that a stage reads or writes goes through a :class:`Folder`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import posixpath
import shutil
import stat
import tempfile
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.fs as pafs

from paris_ray.storage_io import ATTEMPTS, CHUNK, UPLOADS, AtomicWriter, PatientReader, asked
from paris_ray.strict import ConfigError, secret_in

_PIECE, _PIECES = 1 << 16, 16  # what Folder.sketch reads of a file


@dataclass(frozen=True)
class Entry:
    """One file of a folder: its name relative to the folder and its size in bytes."""

    name: str
    size: int


_OWN_DISKS = (
    "apfs", "bcachefs", "btrfs", "exfat", "ext2", "ext3", "ext4", "f2fs", "fuseblk", "hfs", "jfs", "ntfs", "ntfs3", "overlay", "ramfs", "tmpfs",
    "ufs", "vfat", "xfs", "zfs",
)  # fmt: skip
# Small files that others than the folder's writer hold for a moment.
_GUARD, _CLAIM = ".tmp-guard-", ".tmp-claim-"


def _resolve(uri: str) -> tuple[pafs.FileSystem, str]:
    if (reason := secret_in(uri)) is not None:
        raise ConfigError(reason)
    if "://" not in uri:
        return pafs.LocalFileSystem(), str(Path(uri).expanduser().absolute())
    try:
        fs, path = pafs.FileSystem.from_uri(uri)
        return asked(fs, ATTEMPTS), path
    except (pa.ArrowInvalid, NotImplementedError):
        import fsspec

        fs, path = fsspec.core.url_to_fs(uri)
        return pafs.PyFileSystem(pafs.FSSpecHandler(fs)), path


def _local_files(root: str, below: str, recursive: bool, above: tuple[str, ...]) -> Iterator[Entry]:
    """Files below a local folder, by names that need not be Unicode. A link that leads nowhere is listed, one that leads back is not followed."""
    try:
        entries = list(os.scandir(os.path.join(root, below)))
    except FileNotFoundError:
        return
    for entry in entries:
        name = posixpath.join(below, entry.name)
        if entry.is_dir():
            real = os.path.realpath(entry.path)
            if recursive and real not in above:
                yield from _local_files(root, name, recursive, (*above, real))
        elif not entry.name.startswith(".tmp-") and (entry.is_file() or entry.is_symlink()):
            try:
                yield Entry(name, entry.stat().st_size)
            except FileNotFoundError:  # deleted since, or a link that leads nowhere
                if entry.is_symlink():
                    yield Entry(name, 0)


def _is_at(file: IO[bytes], path: str) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), os.stat(path))
    except FileNotFoundError:
        return False


class Folder:
    """A folder on local disk or in an object store.

    Args:
        uri: a local path, or a URI that pyarrow or fsspec resolves.

    Names given to the methods are relative, use ``/`` and may not leave the folder.
    """

    def __init__(self, uri: str | os.PathLike[str]):
        text = os.fspath(uri)
        self.fs, self.path = _resolve(text)
        self.is_local = isinstance(self.fs, pafs.LocalFileSystem)
        self.uri = self.path if self.is_local else text.rstrip("/")
        self.patient = True

    @property
    def is_shared(self) -> bool:
        """Whether other machines may write here, too: in every store, and on a disk that is not known to be of one machine (NFS, SMB, Lustre …)."""
        if not self.is_local:
            return True
        import psutil

        path, found = os.path.join(os.path.realpath(self.path), ""), ("", "")
        for disk in psutil.disk_partitions(all=True):  # of several at one place the last one is seen
            if path.startswith(os.path.join(disk.mountpoint, "")) and len(disk.mountpoint) >= len(found[0]):
                found = disk.mountpoint, disk.fstype
        return found[1].lower() not in _OWN_DISKS

    def __truediv__(self, name: str) -> Folder:
        child = object.__new__(Folder)
        child.fs, child.is_local, child.patient = self.fs, self.is_local, self.patient
        child.path = self._at(name)
        child.uri = posixpath.join(self.uri, name)
        return child

    def impatient(self, seconds: float) -> Folder:
        """The same folder, whose store is asked once and fails after so long a silence: for what had better not be done than late.

        As far as its client can be told so, see :func:`paris_ray.storage_io.asked`.
        """
        folder = object.__new__(Folder)
        folder.fs, folder.path, folder.is_local, folder.uri = asked(self.fs, 1, seconds), self.path, self.is_local, self.uri
        folder.patient = False
        return folder

    def __repr__(self) -> str:
        return f"Folder({self.uri!r})"

    def __reduce__(self) -> tuple[type[Folder], tuple[str]]:
        return Folder, (self.uri,)

    def _at(self, name: str) -> str:
        if name.startswith("/") or ".." in name.split("/"):
            raise ValueError(f"name: {name!r} leaves the folder {self.uri}; names are relative, without '..'")
        return posixpath.join(self.path, name)

    # -- reading ------------------------------------------------------------------------------------------------

    def exists(self, name: str = "") -> bool:
        """Whether a file or a folder of that name is there."""
        info = self.fs.get_file_info(self._at(name) if name else self.path)
        return info.type != pafs.FileType.NotFound

    def is_file(self) -> bool:
        """Whether there is a file where the folder should be."""
        return bool(self.fs.get_file_info(self.path).type == pafs.FileType.File)

    def check_not_a_file(self, key: str) -> None:
        """Raise ValueError if there is a file where the folder should be; ``key`` names what was asked for."""
        if self.is_file():
            raise ValueError(f"{key}: {self.uri} is a file; name a folder, which need not exist yet")

    def size(self, name: str) -> int | None:
        """Size of a file in bytes, ``None`` if there is no such file."""
        info = self.fs.get_file_info(self._at(name))
        return info.size if info.type == pafs.FileType.File else None

    def files(self, recursive: bool = False) -> list[Entry]:
        """The files in the folder, sorted by name; unfinished uploads (``.tmp-…``) are not listed."""
        if self.is_local:
            return sorted(_local_files(self.path, "", recursive, (os.path.realpath(self.path),)), key=lambda e: e.name)
        selector = pafs.FileSelector(self.path, recursive=recursive, allow_not_found=True)
        entries = [
            Entry(posixpath.relpath(info.path, self.path), info.size)
            for info in self.fs.get_file_info(selector)
            if info.type == pafs.FileType.File and not posixpath.basename(info.path).startswith(".tmp-")
        ]
        return sorted(entries, key=lambda e: e.name)

    def folders(self) -> list[str]:
        """Names of the folders directly inside, sorted."""
        selector = pafs.FileSelector(self.path, allow_not_found=True)
        return sorted(posixpath.basename(info.path.rstrip("/")) for info in self.fs.get_file_info(selector) if info.type == pafs.FileType.Directory)

    def open(self, name: str) -> IO[bytes]:
        """A random-access binary file for reading. Raises FileNotFoundError."""
        try:
            file: Any = self.fs.open_input_file(self._at(name))
            return PatientReader(file) if self.patient and not self.is_local else file  # type: ignore[return-value]
        except UnicodeEncodeError:  # a local name that is no Unicode
            return open(self._at(name), "rb")

    def read_bytes(self, name: str) -> bytes:
        """The whole file. Raises FileNotFoundError."""
        with self.open(name) as file:
            return bytes(file.read())

    def read_json(self, name: str) -> Any:
        """The file parsed as JSON. Raises FileNotFoundError, ValueError."""
        try:
            return json.loads(self.read_bytes(name))
        except json.JSONDecodeError as error:
            raise ValueError(f"{self.uri}/{name} is not valid JSON: {error}") from error

    def sha256(self, name: str) -> str:
        """Checksum of a file's content, hex."""
        digest = hashlib.sha256()
        with self.open(name) as file:
            while chunk := file.read(CHUNK):
                digest.update(chunk)
        return digest.hexdigest()

    def sketch(self, name: str) -> str:
        """Checksum of a file's size and of evenly spaced pieces of it, hex: tells files of weights apart without reading them whole.

        Trained weights differ everywhere; against somebody who wants two files to look alike only :meth:`sha256` helps.
        """
        digest, length = hashlib.sha256(), self.size(name)
        if length is None:
            raise FileNotFoundError(f"{self.uri}/{name} does not exist")
        digest.update(f"{length};".encode())
        last = max(0, length - _PIECE)
        with self.open(name) as file:
            for start in sorted({last * i // (_PIECES - 1) for i in range(_PIECES)}):
                file.seek(start)
                digest.update(file.read(_PIECE))
        return digest.hexdigest()

    def local_copy(self, name: str, cache: str | None = None) -> str:
        """A local path of the file: itself when local, else a downloaded copy in ``cache``."""
        if self.is_local:
            return self._at(name)
        root = cache or cache_folder()
        key = hashlib.sha256(f"{self.uri}/{name}/{self._version(name)}".encode()).hexdigest()[:24]
        target = os.path.join(root, key, posixpath.basename(name))
        if not os.path.exists(target):
            os.makedirs(os.path.dirname(target), exist_ok=True)
            partial = f"{target}.{uuid.uuid4().hex}"
            with self.open(name) as source, open(partial, "wb") as sink:
                shutil.copyfileobj(source, sink, CHUNK)
            os.replace(partial, target)
        return target

    def _version(self, name: str) -> str:
        """What tells a file from one written later under its name: weights trained anew have the size of the old ones."""
        if isinstance(self.fs, pafs.PyFileSystem):  # pyarrow does not pass on the times that fsspec knows
            return str(self.fs.handler.fs.ukey(self._at(name)))
        info = self.fs.get_file_info(self._at(name))
        return f"{info.size} {info.mtime_ns}"

    def local(self, cache: str | None = None) -> str:
        """A local path of the folder with all its files: itself when local, else a copy in ``cache``, downloaded once."""
        if self.is_local:
            return self.path
        entries = self.files(recursive=True)
        seen = [(entry.name, self._version(entry.name)) for entry in entries]
        target = Folder(os.path.join(cache or cache_folder(), hashlib.sha256(repr((self.uri, seen)).encode()).hexdigest()[:24]))
        for entry in entries:
            if target.size(entry.name) != entry.size:
                copy_file(self, entry.name, target)
        return target.path

    # -- writing ------------------------------------------------------------------------------------------------

    def writer(self, name: str) -> AtomicWriter:
        """A context manager that yields a binary file which appears under its name only when closed without error."""
        return AtomicWriter(self.fs, self._at(name), UPLOADS if self.patient else 1)

    def write_bytes(self, name: str, data: bytes) -> None:
        """Write a whole file; readers see the old content or the new, never a part."""
        with self.writer(name) as file:
            file.write(data)

    def write_json(self, name: str, value: Any) -> None:
        """Write a value as indented JSON with sorted keys; see :meth:`write_bytes`."""
        self.write_bytes(name, (json.dumps(value, indent=1, sort_keys=True, allow_nan=False) + "\n").encode())

    def create(self, name: str, data: bytes) -> bool:
        """Write a file only if it is not there; False if it is. Atomic on local disks, best effort elsewhere."""
        if self.is_local:
            target = self._at(name)
            parent, base = posixpath.split(target)
            os.makedirs(parent, exist_ok=True)
            partial = posixpath.join(parent, f"{_CLAIM}{uuid.uuid4().hex}-{base}")
            with open(partial, "xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                # A link appears whole or not at all, and never over another file.
                os.link(partial, target)
            except FileExistsError:
                return False
            finally:
                os.unlink(partial)
            return True
        if self.exists(name):
            return False
        self.write_bytes(name, data)
        return True

    @contextlib.contextmanager
    def guard(self, name: str) -> Iterator[None]:
        """Hold off other processes that guard the same name, for the moment of a check and a change; on disks that have locks only."""
        if not self.is_local:
            yield
            return
        path = self._at(f"{_GUARD}{name}")
        while True:
            with open(path, "wb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX)
                except OSError as error:
                    if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                        raise
                if not _is_at(file, path):
                    continue  # who held it before has deleted it
                try:
                    yield
                finally:
                    with contextlib.suppress(FileNotFoundError):
                        os.unlink(path)
                return

    def upload(self, local_path: str, name: str) -> None:
        """Copy a local file into the folder under ``name``, atomically."""
        with open(local_path, "rb") as source, self.writer(name) as sink:
            shutil.copyfileobj(source, sink, CHUNK)

    def delete(self, name: str) -> None:
        """Delete a file; nothing happens if it is not there."""
        try:
            self.fs.delete_file(self._at(name))
        except FileNotFoundError:
            pass

    def rename(self, name: str, new_name: str) -> None:
        """Give a file of an object store another name, in place of a file that has it; the store copies it by itself."""
        self.fs.copy_file(self._at(name), self._at(new_name))
        self.delete(name)

    def sweep(self) -> None:
        """Delete what writers that were killed left unfinished. Only for the one writer of a folder, before it begins."""
        if not self.is_local:
            return  # a store shows a file when it is whole
        for partial in Path(self.path).rglob(".tmp-*"):
            if not partial.name.startswith((_GUARD, _CLAIM)):
                partial.unlink(missing_ok=True)

    def delete_all(self, keep: tuple[str, ...] = ()) -> None:
        """Delete the folder with all that is in it, except the files named in ``keep``; nothing happens if it is not there."""
        if any(self.exists(name) for name in keep):
            for name in self.folders():
                (self / name).delete_all()
            for entry in self.files():
                if entry.name not in keep:
                    self.delete(entry.name)
            return
        try:
            self.fs.delete_dir(self.path)
        except FileNotFoundError:
            pass


def cache_folder() -> str:
    """A folder of this user for copies of remote files; nobody else can write to it.

    Raises:
        PermissionError: somebody else made it first.
    """
    path = os.path.join(tempfile.gettempdir(), f"paris_ray-cache-{os.getuid()}")
    os.makedirs(path, mode=0o700, exist_ok=True)
    info = os.lstat(path)
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise PermissionError(f"{path} is not a folder that only this user can write to; remove it, or set TMPDIR to a folder of your own")
    return path


def link_all(source: Folder, target: Folder, last: str) -> None:
    """Have all files of a folder in another one as well: the same bytes on a local disk, else copies. Files there already are left as they are.

    Nothing here changes a file in place, so neither folder notices what is later written in the other.

    Args:
        source: from where; locks (``_lock.json``) stay.
        target: to where.
        last: the file that says that the folder is whole; it comes after all others.
    """
    names = [entry.name for entry in source.files(recursive=True) if posixpath.basename(entry.name) != "_lock.json"]
    for name in sorted(names, key=lambda name: name == last):
        if not target.exists(name):
            link_file(source, name, target)


def link_file(source: Folder, name: str, target: Folder) -> None:
    """Have a file of one folder in another one as well, in place of one of that name: the same bytes on a local disk, else a copy."""
    if not (source.is_local and target.is_local):
        copy_file(source, name, target)
        return
    here, there = source._at(name), target._at(name)
    os.makedirs(posixpath.dirname(there), exist_ok=True)
    if os.path.exists(there) and os.path.samefile(here, there):
        return
    partial = posixpath.join(posixpath.dirname(there), f".tmp-{uuid.uuid4().hex}")
    try:
        os.link(here, partial)
    except OSError:  # another disk, or one without links
        copy_file(source, name, target)
    else:
        os.replace(partial, there)


def copy_file(source: Folder, name: str, target: Folder, new_name: str | None = None) -> None:
    """Copy one file between two folders, atomically at the target."""
    with source.open(name) as reader, target.writer(new_name or name) as sink:
        shutil.copyfileobj(reader, sink, CHUNK)


def safetensors_at(uri: str | os.PathLike[str]) -> tuple[Folder, list[str]]:
    """The safetensors files that a path or URI names: the one file, or those directly in the folder; none if nothing is there."""
    text = os.fspath(uri).rstrip("/")
    parent, last = posixpath.split(text)
    if last.endswith(".safetensors"):
        folder = Folder(parent or ".")
        return folder, [last] if folder.exists(last) else []
    folder = Folder(text)
    return folder, [entry.name for entry in folder.files() if entry.name.endswith(".safetensors")]
