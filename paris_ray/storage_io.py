"""How files of a store are read and written: asked again where that helps, and never left in part. :mod:`paris_ray.storage` alone uses it."""

from __future__ import annotations

import io
import os
import posixpath
import random
import re
import shutil
import tempfile
import threading
import time
import uuid
from typing import IO, Any

import pyarrow.fs as pafs

CHUNK = 1 << 22
ATTEMPTS = 10
"""How often S3 is asked when it is busy, fails, or breaks the connection: with pauses that double up to 20 s, for about a minute and a half."""
UPLOADS = 3
_AGAIN = re.compile(
    r"SLOW_DOWN|THROTTLING|INTERNAL_FAILURE|SERVICE_UNAVAILABLE|REQUEST_TIMEOUT|NETWORK_CONNECTION|NO_SUCH_UPLOAD|curlCode|HTTP status (429|5\d\d)"
)
"""What a store says that may be well the next time: busy, broken, a connection lost; an upload whose end was lost, which it then knows no more."""
_CUT = "response stream"
"""What pyarrow says of S3's answer that was cut short."""


def asked(fs: pafs.FileSystem, attempts: int, seconds: float | None = None) -> pafs.FileSystem:
    """The same S3, asked so often, and for so long at most without an answer; a small file goes in one request, which happens or does not.

    Other stores, whose own clients ask again, are left as they are.
    """
    if not isinstance(fs, pafs.S3FileSystem):
        return fs
    options: dict[str, Any] = fs.__reduce__()[1][0]  # pickle's, which no document promises: a test has its form
    if seconds is not None:
        options = {**options, "request_timeout": seconds, "connect_timeout": seconds}
    strategy = pafs.AwsStandardS3RetryStrategy(max_attempts=attempts)
    return pafs.S3FileSystem(**{**options, "allow_delayed_open": True, "retry_strategy": strategy})


class PatientReader(io.RawIOBase):
    """A file of a store, of which a piece is asked for again when its answer was cut short: pyarrow passes that on as an error."""

    def __init__(self, file: Any):
        self._file, self._at = file, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def size(self) -> int:
        return int(self._file.size())

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + (0, self._at, self.size() if whence == os.SEEK_END else 0)[whence]
        return self._at

    def read(self, size: int | None = -1) -> bytes:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                self._file.seek(self._at)
                data = bytes(self._file.read() if size is None or size < 0 else self._file.read(size))
            except (FileNotFoundError, PermissionError):
                raise
            except OSError as error:
                if attempt == ATTEMPTS or _CUT not in str(error):  # what else is worth it has been asked again below
                    raise
                time.sleep(0.1 * 2.0**attempt * random.random())
            else:
                self._at += len(data)
                return data
        raise AssertionError

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer).cast("B")
        data = self.read(len(view))
        view[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class AtomicWriter:
    """A context manager that yields a binary file which appears under its name only when closed without error.

    Args:
        fs: where.
        target: its path there.
        uploads: how often a store may be sent the whole file.
    """

    def __init__(self, fs: pafs.FileSystem, target: str, uploads: int = UPLOADS):
        self.fs, self.target, self.uploads = fs, target, uploads
        self.is_local = isinstance(fs, pafs.LocalFileSystem)

    def __enter__(self) -> IO[bytes]:
        parent, base = posixpath.split(self.target)
        if self.is_local:
            os.makedirs(parent, exist_ok=True)
            self.partial = posixpath.join(parent, f".tmp-{uuid.uuid4().hex}-{base}")
            self.file: IO[bytes] = open(self.partial, "wb")
        else:
            # Uploaded when it is whole: a store's stream that is dropped half-way commits what it has.
            self.file = tempfile.TemporaryFile()
        return self.file

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if not self.is_local:
            with self.file:
                if kind is None:
                    self._undisturbed()
            return
        if kind is not None:
            self.file.close()
            os.unlink(self.partial)
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.partial, self.target)

    def _undisturbed(self) -> None:
        """Upload in a thread, which no signal reaches: what a signal raises here is raised once the file is there."""
        failed: list[BaseException] = []
        done = threading.Event()  # a thread whose join is interrupted looks as if it had ended

        def act() -> None:
            try:
                self._upload()
            except BaseException as error:
                failed.append(error)
            finally:
                done.set()

        threading.Thread(target=act, name="upload").start()
        interrupted: BaseException | None = None
        while not done.is_set():
            try:
                done.wait()
            except BaseException as error:
                interrupted = error
        if interrupted is not None:
            raise interrupted
        if failed:
            raise failed[0]

    def _upload(self) -> None:
        """Send the whole file; again from its beginning where its end was lost: a store that has it may refuse to be told so a second time."""
        for attempt in range(1, self.uploads + 1):
            self.file.seek(0)
            try:
                with self.fs.open_output_stream(self.target) as sink:
                    shutil.copyfileobj(self.file, sink, CHUNK)
                return
            except OSError as error:
                if attempt == self.uploads or not (isinstance(error, ConnectionError | TimeoutError) or _AGAIN.search(str(error))):
                    raise
                time.sleep(2.0**attempt * random.random())
