"""How files of a store are read and written: asked again where that helps, and never left in part.

:mod:`paris_ray.storage` alone uses it, but for what a lock and a stage ask about an error or an upload.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import io
import math
import os
import posixpath
import random
import re
import sys
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
_GOOGLES = re.compile(r"Status\((UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|INTERNAL)")
SOON_S = 10.0
"""How long an upload that is interrupted may take to end."""
_GIVEN_UP: list[threading.Event] = []


def asked(fs: pafs.FileSystem, attempts: int, seconds: float | None = None) -> pafs.FileSystem:
    """The same store, asked so often, and for so long at most without an answer.

    A small file goes to S3 in one request, which happens or does not. Google's client counts no attempts: it asks again for ``seconds``, where they
    are given. Azure's and fsspec's have no such settings here, and are left as they are.
    """
    if fs.type_name == "gcs" and seconds is not None:
        make, (options,) = fs.__reduce__()
        return make({**options, "retry_time_limit": datetime.timedelta(seconds=math.ceil(seconds))})
    if not isinstance(fs, pafs.S3FileSystem):
        return fs
    options = fs.__reduce__()[1][0]  # pickle's, which no document promises: a test has its form
    if seconds is not None:
        options = {**options, "request_timeout": seconds, "connect_timeout": seconds}
    strategy = pafs.AwsStandardS3RetryStrategy(max_attempts=attempts)
    return pafs.S3FileSystem(**{**options, "allow_delayed_open": True, "retry_strategy": strategy})


def passes(error: OSError) -> bool:
    """Whether a store that says so may do the next time."""
    text = str(error)
    return isinstance(error, ConnectionError | TimeoutError) or _CUT in text or any(known.search(text) for known in (_AGAIN, _GOOGLES))


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
        self._interrupted, self._given_up, self._done = threading.Event(), threading.Event(), threading.Event()

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
            if kind is None:
                self._undisturbed()
            else:
                self.file.close()
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
        """Upload in a thread, which no signal reaches. One that comes lets the file arrive if it does so soon; a second one gives it up at once.

        What was given up is not cut off in its middle: it may still arrive, as a whole, while this process lives (:func:`given_up`). So long the
        store is away, and what else is written has the same while only.
        """
        failed: list[BaseException] = []

        def act() -> None:
            try:
                with self.file:
                    self._upload()
            except BaseException as error:
                failed.append(error)
            finally:
                self._done.set()

        try:
            try:
                try:
                    threading.Thread(target=act, name="upload", daemon=True).start()
                except RuntimeError:  # there are too many
                    self._done.set()
                    raise
                if not self._ends_within(SOON_S if given_up() else math.inf):
                    raise TimeoutError(f"the upload of {self.target} was given up, as one before it")
            except BaseException:
                self._interrupted.set()
                self._ends_within(SOON_S)
                raise
        finally:
            if not self._done.is_set():
                self._given_up.set()
                _GIVEN_UP.append(self._done)
        if failed:
            raise failed[0]

    def _ends_within(self, seconds: float) -> bool:
        """Whether the upload does; in steps, as a signal that comes just before a wait does not end it."""
        end = time.monotonic() + seconds
        while not self._done.wait(0.2):
            if time.monotonic() >= end:
                return False
        return True

    def _upload(self) -> None:
        """Send the whole file; again from its beginning where its end was lost: a store that has it may refuse to be told so a second time."""
        for attempt in range(1, self.uploads + 1):
            self.file.seek(0)
            try:
                self._send()
                return
            except OSError as error:
                if attempt == self.uploads or not (isinstance(error, ConnectionError | TimeoutError) or _AGAIN.search(str(error))):
                    raise
                if self._interrupted.wait(2.0**attempt * random.random()):
                    raise

    def _send(self) -> None:
        sink = self.fs.open_output_stream(self.target)
        try:
            while chunk := self.file.read(CHUNK):
                self._go_on()
                sink.write(chunk)
            self._go_on()
        except BaseException:
            # A stream that is closed commits what it has, and so does one that is deleted. This one is never.
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(sink))
            raise
        sink.close()

    def _go_on(self) -> None:
        if self._given_up.is_set():
            raise InterruptedError(f"the upload of {self.target} was given up")


def given_up() -> bool:
    """Whether an upload of this process was given up, and may still arrive."""
    return not all(done.is_set() for done in _GIVEN_UP)


def _end() -> None:
    """At the end of a process: wait for no upload that was given up, as pyarrow would."""
    if given_up():
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(130)


atexit.register(_end)  # after pyarrow's, so it runs before
