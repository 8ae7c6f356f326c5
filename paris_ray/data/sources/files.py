"""Files of a source: names and links that may not leave its folder, a limit on what is read whole, and a store that fails for a moment."""

from __future__ import annotations

import errno
import io
import json
import os
import posixpath
import stat
import time
from collections.abc import Callable
from typing import IO, Any, TypeVar

from paris_ray.config import ConfigError
from paris_ray.data.images import RejectError
from paris_ray.storage import Folder

READ_TRIES = 3
MAX_FILE_BYTES = 256 << 20
"""An image file larger than this is refused: it would be held in memory whole, several at a time."""
MAX_TEXT_BYTES = 1 << 20
"""The same for a caption's file."""
MAX_NAME = 1024
MAX_RATIO = 20
"""What compression may save of rows that are larger than a file may be: images are packed already; a few kB of packed zeros fill any memory."""

T = TypeVar("T")


def steadily(read: Callable[[], T]) -> T:
    """What ``read`` returns; a store that fails is asked again. A file that is not there, or closed to us, is not."""
    for attempt in range(READ_TRIES):
        try:
            return read()
        except (FileNotFoundError, PermissionError):
            raise
        except OSError:
            if attempt == READ_TRIES - 1:
                raise
            time.sleep(2.0**attempt)
    raise AssertionError("unreachable")


def check_name(name: str) -> str:
    """A name relative to a folder. Raises RejectError for one that could leave it."""
    if not name or name.startswith("/") or "://" in name or ".." in name.split("/") or "\0" in name:
        raise RejectError(f"file outside the folder: {name!r}; names are relative, without '..'")
    if len(name) > MAX_NAME:
        raise RejectError(f"unreadable file: {name[:40]!r}… is longer than any store allows")
    return name


def read_file(folder: Folder, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
    """A whole file of a source.

    Raises:
        RejectError: it is not there, closed to us, too large, or a link out of the folder.
        OSError: the store fails.
    """
    check_name(name)
    if folder.is_local:
        _check_local(folder.path, name)

    def read() -> bytes:
        with folder.open(name) as file:
            size = file.seek(0, io.SEEK_END)
            if size > limit:
                raise RejectError(f"file too large: {size} bytes, at most {limit} are read")
            file.seek(0)
            return bytes(file.read())

    try:
        return steadily(read)
    except (FileNotFoundError, PermissionError) as error:
        raise RejectError(f"unreadable file: {error}") from None


def parse_json(data: bytes) -> dict[str, Any]:
    """The fields of an image's .json. Raises RejectError."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RejectError(f"broken .json: {error}") from None
    if not isinstance(value, dict):
        raise RejectError(f"broken .json: it holds {type(value).__name__}, not fields")
    return value


def _check_local(root: str, name: str) -> None:
    """Raise RejectError unless a name is that of a file below a local folder, whose disk may still fail."""
    target, top = os.path.realpath(posixpath.join(root, name)), os.path.realpath(root)
    if not target.startswith(top.rstrip("/") + "/"):
        raise RejectError(f"file outside the folder: {name!r} is a link that leads out of it; put the file itself there")
    try:
        mode = os.stat(target).st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES):
            raise RejectError(f"unreadable file: {error}") from None
        raise
    if not stat.S_ISREG(mode):
        raise RejectError(f"unreadable file: {name!r} is a folder or a device")


def check_link(folder: Folder, name: str) -> None:
    """Raise RejectError for a link that leads out of a local folder, nowhere, or to what is no file. Whether anything has this name is not asked."""
    if folder.is_local and os.path.lexists(posixpath.join(folder.path, name)):
        _check_local(folder.path, name)


class Steady(io.RawIOBase):
    """A file for readers of a format; tells a store that fails from content that is broken. Raises RejectError for a link out of its folder.

    Args:
        folder: where it is.
        name: its name there.
    """

    def __init__(self, folder: Folder, name: str):
        self.folder, self.name = folder, name
        self.failure: OSError | None = None  # what the store said when it failed for good; else what a reader raises is the content's fault
        self._file: IO[bytes] | None = None
        self._at = 0

    def _do(self, act: Callable[[IO[bytes]], T]) -> T:
        def once() -> T:
            try:
                if self._file is None:
                    check_link(self.folder, self.name)
                    self._file = self.folder.open(self.name)
                    self._file.seek(self._at)
                return act(self._file)
            except OSError:
                self._file = None
                raise

        try:
            return steadily(once)
        except OSError as error:
            self.failure = error
            raise

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``size`` bytes; fewer at the end only."""
        data = bytes(self._do(lambda file: file.read() if size is None or size < 0 else file.read(size)))
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As files do."""
        if whence == io.SEEK_CUR:
            offset, whence = self._at + offset, io.SEEK_SET
        self._at = self._do(lambda file: file.seek(offset, whence))
        return self._at

    def tell(self) -> int:
        """As files do."""
        return self._at

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def close(self) -> None:
        """Close the store's file."""
        if self._file is not None:
            self._file.close()
            self._file = None
        super().close()


def bomb(packed: int, unpacked: int) -> str | None:
    """The reason to refuse rows of a compressed table before they are unpacked, or ``None``."""
    if unpacked <= max(MAX_FILE_BYTES, MAX_RATIO * packed):
        return None
    return f"file too large: rows of {packed} bytes are {unpacked} unpacked, at most {MAX_FILE_BYTES} are read at once"


def too_many(rows: int, stored: int) -> str | None:
    """The reason to refuse a table with more rows than bytes, or ``None``: without image and name each is a reject to be kept."""
    return f"it claims {rows} rows in {stored} bytes" if not 0 <= rows <= stored else None


def one_line(error: Exception) -> str:
    """What a reader of a format says of broken content, short."""
    text = " ".join(f"{type(error).__name__}: {error}".split())
    return text if len(text) <= 200 else text[:199] + "…"


def files_of(uri: str, extension: str, what: str) -> tuple[Folder, list[tuple[str, int]]]:
    """The files with an extension that a path or URI names: the one file, or all below the folder, with their sizes.

    What the path itself names may be a link. A link below the folder is listed and, if it leads out, refused by whoever opens it.

    Raises:
        ConfigError: there is none.
    """
    folder = Folder(uri)
    parent, last = posixpath.split(os.path.realpath(folder.path) if folder.is_local else uri.rstrip("/"))
    if uri.rstrip("/").lower().endswith(extension) and (size := Folder(parent or ".").size(last)) is not None:
        return Folder(parent or "."), [(last, size)]
    if not folder.exists():
        raise ConfigError(f"data.source.uri: {uri} does not exist; name {what}, --set data.source.uri=…")
    found = [(entry.name, entry.size) for entry in folder.files(recursive=True) if entry.name.lower().endswith(extension)]
    if not found:
        raise ConfigError(f"data.source.uri: {uri} holds no *{extension} file; name {what}, --set data.source.uri=…")
    return folder, found
