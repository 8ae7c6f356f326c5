"""Stage manifests and the one rule for skip, resume and refuse.

A stage writes ``_started.json`` first and ``_manifest.json`` last. The manifest names every file with size and checksum, the part of the
config that the stage depends on, and the fingerprints of its parents' manifests. From these two files alone follows what a stage does:

=========  ==============================================  =====================================
status     found                                           done
=========  ==============================================  =====================================
``absent``  nothing                                        run
``partial`` started with the same inputs, not finished     resume
``valid``   manifest with the same inputs, files in place  skip
``stale``   started or finished with other inputs          refuse, say what changed (``--rebuild``)
``damaged`` manifest whose files are missing or altered    refuse, say which (``--rebuild``)
=========  ==============================================  =====================================

Where only a part of the files is the result (``export/`` of an expert), the others, such as its checkpoints, may be deleted.

Rows that are appended make a new version of a manifest, which names the fingerprints of the versions before it. What was finished from one of these
is still valid, and its status says from which.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import json
import os
import posixpath
import shlex
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from paris_ray import lock
from paris_ray.lock import LOCK
from paris_ray.software import software
from paris_ray.storage import Folder
from paris_ray.storage_io import given_up

STARTED = "_started.json"
APPENDING = "_append.json"
MANIFEST = "_manifest.json"
FORMAT = 1
HASHED_AT_ONCE = 8
"""Files whose checksums are made at once: one connection to a store is slow, and there may be 100 GB."""


class StaleError(ValueError):
    """What is in a stage's folder was made from other inputs, or is damaged."""


def fingerprint(value: Any) -> str:
    """Fingerprint of a JSON value: 32 hex digits of SHA-256 over its canonical form."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Status:
    """State of a stage's folder: ``absent``, ``partial``, ``valid``, ``stale`` or ``damaged``, why, and what of a valid one is worth knowing."""

    state: str
    reasons: tuple[str, ...] = ()
    manifest: dict[str, Any] | None = field(default=None, repr=False)
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Stage:
    """A stage's folder together with all that its result depends on.

    Args:
        name: the stage, as the user knows it (``embed``, ``expert-3`` …).
        folder: where its files go.
        config: the part of the config that decides the result, as JSON.
        parents: fingerprints of the manifests it reads from, by name.
        earlier: fingerprints of the versions before them, oldest first, by name.
    """

    name: str
    folder: Folder
    config: dict[str, Any]
    parents: dict[str, str]
    earlier: dict[str, list[str]] = field(default_factory=dict)

    @property
    def inputs(self) -> dict[str, Any]:
        return {"format": FORMAT, "stage": self.name, "config": self.config, "parents": self.parents}

    def status(self, verify: bool = False) -> Status:
        """Look at the folder.

        Args:
            verify: compare checksums too, not only presence and size.
        """
        manifest = _read(self.folder, MANIFEST)
        started = _read(self.folder, STARTED)
        found = manifest or started
        if found is None:
            return Status("absent")
        # A result is of the version it was finished from; what is half done would mix two.
        old = {} if manifest is None else {name: one for name, one in found["inputs"]["parents"].items() if one in self.earlier.get(name, ())}
        changes = differences(found["inputs"], {**self.inputs, "parents": {**self.parents, **old}})
        if changes:  # keys that another kind has not, and that say nothing here, only hide what has changed
            return Status("stale", tuple(change for change in changes if not change.endswith(": null → null")) or tuple(changes), manifest)
        if manifest is None:
            return Status("partial")
        if broken := tuple(damage(self.folder, manifest, verify)):
            return Status("damaged", broken, manifest)
        versions = {name: (self.earlier[name].index(one) + 1, len(self.earlier[name]) + 1) for name, one in old.items()}
        return Status("valid", (), manifest, tuple(f"made from version {one} of {of} of {name}" for name, (one, of) in versions.items()))

    def begin(self, rebuild: bool = False) -> Status:
        """Decide what to do and mark the stage as started.

        Returns:
            the status found; ``valid`` means that there is nothing to do.

        Raises:
            StaleError: the folder holds something made from other inputs, or damaged, and ``rebuild`` is off.
        """
        status = self.status()
        if status.state in ("stale", "damaged") and not rebuild:
            what = "was made from other inputs" if status.state == "stale" else "is damaged"
            listed = "\n".join(f"  - {reason}" for reason in status.reasons[:20])
            raise StaleError(
                f"{self.name}: {self.folder.uri} {what}:\n{listed}\n"
                f"Put back what changed, choose another run_dir, or pass --rebuild {self.name} to delete it and make it anew."
            )
        if rebuild and status.state != "absent":
            self.folder.delete_all(keep=(LOCK,))
            status = Status("absent")
        if status.state == "partial":
            self.folder.sweep()
        if status.state == "absent":
            self.folder.write_json(STARTED, {"inputs": self.inputs})
        return status

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """After :meth:`begin`: an error that ends the work before it has made anything takes back the mark; the next start may have other inputs.

        Not once a lock is lost, when the mark may be the next owner's, nor while the store is away.
        """
        try:
            yield
        except BaseException:
            if not (lock.lost() or given_up()) and {entry.name for entry in self.folder.files(recursive=True)} <= {STARTED, LOCK}:
                self.folder.delete(STARTED)
            raise

    def publish(
        self, counts: dict[str, Any] | None = None, seconds: float | None = None, result: str = "", after: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Write the manifest over all files in the folder; the last act of a stage.

        Args:
            counts: figures a reader wants (rows, images, rejects …).
            seconds: how long the stage took.
            result: prefix of the files that are the result (``export/``). The others are listed with their checksums too, but the fingerprint
                leaves them out: metrics hold times and rates, which differ between runs that made the same weights.
            after: the manifest that this one is a new version of.
        """
        found = [entry for entry in self.folder.files(recursive=True) if not os.path.basename(entry.name).startswith("_") or "/" in entry.name]
        with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
            sums = pool.map(self.folder.sha256, [entry.name for entry in found])
            files: list[dict[str, Any]] = [
                {"name": entry.name, "bytes": entry.size, "sha256": sha256} for entry, sha256 in zip(found, sums, strict=True)
            ]
        manifest = {
            "inputs": self.inputs,
            "files": files,
            "result": result,
            "counts": counts or {},
            "seconds": seconds,
            "version": 1 if after is None else after["version"] + 1,
            "previous": [] if after is None else [*previous(after), after["fingerprint"]],
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "software": software(),
        }
        # The identity of a result is its inputs and its bytes, not when or where it was made.
        identity = [file for file in files if str(file["name"]).startswith(result)]
        manifest["fingerprint"] = fingerprint({"inputs": manifest["inputs"], "files": identity})
        self.folder.write_json(MANIFEST, manifest)
        return manifest


def require(folder: Folder, made_by: str) -> dict[str, Any]:
    """The manifest of a parent. Raises FileNotFoundError that names the stage to run first."""
    manifest = _read(folder, MANIFEST)
    if manifest is None:
        raise FileNotFoundError(f"{folder.uri} has no {MANIFEST}: run the stage {made_by!r} first (python -m jobs.{made_by} --config …)")
    return manifest


def refuse_half_appended(folder: Folder) -> None:
    """Raise StaleError while an append to a folder, which leaves :data:`APPENDING` there until its new version is published, is not finished."""
    if folder.exists(APPENDING):
        half = folder.read_json(APPENDING)
        again = f"python -m jobs.append --config {posixpath.dirname(folder.uri)}/config.yaml"
        again += f" --source {shlex.quote(json.dumps(half['source']))}" if "source" in half else ""
        again += " --source … --new-expert" if "expert" in half else ""
        raise StaleError(f"{folder.uri} is half appended; when nobody does so now, finish it with the same command again: {again}")


def previous(manifest: dict[str, Any]) -> list[str]:
    """Fingerprints of the versions before a manifest, oldest first."""
    return list(manifest["previous"] or [])


def published(folder: Folder) -> dict[str, Any] | None:
    """The manifest of a folder, or ``None``."""
    return _read(folder, MANIFEST)


def recorded(folder: Folder) -> dict[str, Any] | None:
    """The inputs that a stage's folder was finished or started with, ``None`` if it was not."""
    found = _read(folder, MANIFEST) or _read(folder, STARTED)
    return None if found is None else dict(found["inputs"])


def damage(folder: Folder, manifest: dict[str, Any], verify: bool = False) -> list[str]:
    """What of a manifest's files is altered (by size; with ``verify`` by checksum too), and what of its result is missing."""
    found = {entry.name: entry.size for entry in folder.files(recursive=True)}
    broken = []
    for file in manifest["files"]:
        name, size = file["name"], file["bytes"]
        if name not in found:
            if name.startswith(manifest.get("result", "")):
                broken.append(f"{name} is missing")
        elif found[name] != size:
            broken.append(f"{name} has {found[name]} bytes, its manifest says {size}")
        elif verify and folder.sha256(name) != file["sha256"]:
            broken.append(f"{name} has another checksum than its manifest says")
    return broken


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Where two JSON values differ, a line each: ``config.train.lr: 0.001 → 0.003``."""
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted(old.keys() | new.keys()):
            here = f"{path}.{key}" if path else key
            if key not in old or key not in new:
                before, after = json.dumps(old.get(key)), json.dumps(new.get(key))
                lines.append(f"{here}: {before} → {after}")
            else:
                lines += differences(old[key], new[key], here)
        return lines
    return [] if old == new else [f"{path}: {json.dumps(old)} → {json.dumps(new)}"]


def _read(folder: Folder, name: str) -> dict[str, Any] | None:
    try:
        return dict(folder.read_json(name))
    except FileNotFoundError:
        return None
