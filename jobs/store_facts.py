"""What a run's store is like as it is seen from somewhere. Facts, which :mod:`jobs.access_checks` judges."""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import os
import posixpath
import re
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from http.client import HTTPException
from typing import Any

from paris_ray.config import RunConfig
from paris_ray.resources import HERE
from paris_ray.storage import Folder

PROBE_BYTES = 16 << 20
STORE_HOSTS = {"gs": "https://storage.googleapis.com", "gcs": "https://storage.googleapis.com", "hf": "https://huggingface.co"}


def within(config: RunConfig, cluster: str) -> str:
    """The part of a run's folder that a cluster may write: where all stages run all of it, elsewhere the folders of the experts that train there."""
    if cluster == HERE:
        return ""
    return next((f"experts/{k}/" for k, one in enumerate(config.experts) if one.cluster == cluster), "")


@contextlib.contextmanager
def mark(uri: str, folder: str) -> Iterator[dict[str, Any]]:
    """A small file that lies in a part of a run's folder for as long as others look for it.

    Yields:
        its ``name``, which is its content too, ``None`` if it could not be written; ``error`` says why it could not, or in the end why it could not
        be deleted (``step``).
    """
    name, made = f"{folder}_doctor-seen-{uuid.uuid4().hex}", list[str]()
    found: dict[str, Any] = {"uri": f"{uri}/{folder}".rstrip("/"), "step": "write", "name": None, "error": None, "offset": None}
    with _noted(found):
        there = Folder(uri)
        made = _missing(uri, name)
        there.write_bytes(name, name.encode())
        found["name"] = name
    try:
        yield found
    finally:
        if found["name"] is not None:
            found["step"] = "delete"
            with _noted(found):
                there.delete(name)
        _remove(made)


@contextlib.contextmanager
def _noted(found: dict[str, Any]) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever a store's library raises is what there is to say
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def store(uri: str, size: int = PROBE_BYTES, folder: str = "", mark: str | None = None) -> dict[str, Any]:
    """What a store does with a file of ``size`` bytes, which is written, read back, and deleted; and what time it is there.

    Args:
        uri: the run's directory.
        size: of the file.
        folder: the part of it in which to write.
        mark: name of what somebody else has put there (:func:`mark`); ``sees`` says whether it is.
    """
    found: dict[str, Any] = {"uri": uri, "bytes": size, "step": "open", "error": None, "offset": None, "sees": None}
    data = os.urandom(size)
    name = f"{folder}_doctor-{uuid.uuid4().hex}"
    with _noted(found):
        there = Folder(uri)
        if mark is not None:
            found["step"], found["sees"] = "look", _sees(there, mark)
        made = _missing(uri, name)
        found["step"] = "write"
        try:
            found["write_s"] = _timed(lambda: there.write_bytes(name, data))
            found["step"] = "read"
            read: list[str] = []
            found["read_s"] = _timed(lambda: read.append(there.sha256(name)))
            found["same"] = read[0] == hashlib.sha256(data).hexdigest()
        finally:
            if found["step"] == "read":
                found["step"] = "delete"
                there.delete(name)
            _remove(made)
        found["deleted"] = not there.exists(name)
        found["step"] = "done"
    found["offset"] = store_clock(uri)
    return found


def _sees(folder: Folder, mark: str) -> bool:
    try:
        return folder.read_bytes(mark) == mark.encode()
    except FileNotFoundError:
        return False


def _missing(uri: str, name: str) -> list[str]:
    """The local folders that writing a file will make, the deepest first; an object store has none."""
    folder, made = Folder(uri), []
    path = posixpath.dirname(posixpath.join(folder.path, name))
    while folder.is_local and not os.path.lexists(path):
        made.append(path)
        path = posixpath.dirname(path)
    return made


def _remove(made: list[str]) -> None:
    with contextlib.suppress(OSError):  # somebody else writes there by now
        for path in made:
            os.rmdir(path)


def _timed(act: Any) -> float:
    before = time.monotonic()
    act()
    return time.monotonic() - before


def asked_clock(ask: Any) -> tuple[float, float]:
    """For how long somebody was asked, and how far their clock is ahead of ours."""
    before = time.time()
    theirs = ask()
    after = time.time()
    return after - before, theirs - (before + after) / 2


def store_clock(uri: str, timeout: float = 5.0) -> float | None:
    """How far the clock of an object store is ahead of ours, from the Date of any answer, be it a refusal; ``None`` if it tells none."""
    scheme, _, rest = uri.partition("://")
    if scheme in ("s3", "s3a"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or f"https://s3.{region}.amazonaws.com"
    elif scheme in ("abfs", "abfss", "az"):
        account = re.search(r"@([^/]+)", rest)
        name = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or os.environ.get("AZURE_STORAGE_ACCOUNT")
        url = f"https://{account[1]}" if account else f"https://{name}.blob.core.windows.net" if name else ""
    else:
        url = STORE_HOSTS.get(scheme, "")
    if not url:
        return None

    def ask() -> float:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as answer:
                said = answer.headers["Date"]
        except urllib.error.HTTPError as error:
            said = error.headers["Date"]
        return email.utils.parsedate_to_datetime(said).timestamp() + 0.5  # it counts whole seconds

    try:
        return asked_clock(ask)[1]
    except (OSError, HTTPException, TypeError, ValueError):
        return None
