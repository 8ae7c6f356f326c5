"""The experts of one process: how they come, are exchanged and go while it serves."""

from __future__ import annotations

import itertools
import logging
import math
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall
from paris_ray.diffusion.path import Objective
from paris_ray.inference.experts import LocalExperts
from paris_ray.inference.residency import moved
from paris_ray.inference.weights import ExpertFiles, open_experts
from paris_ray.layout import EXPERT_FILE
from paris_ray.manifest import fingerprint
from paris_ray.models import DiT
from paris_ray.storage import Folder
from serve_app.cards import ExpertState, State

log = logging.getLogger("ray.serve")

RETIRED = "retired by the server's user_config"
FILES = ("config.json", EXPERT_FILE)
"""Of an expert."""
AGAIN_SECONDS, MOST_AGAIN_SECONDS = 3.0, 60.0
"""Pause before files that storage did not give are asked for again; twice as long each time, up to the second."""


class Changes(BaseModel):
    """``user_config`` of a deployment that holds experts: what can be changed of it without a restart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Any text. With another one, the files of all its experts are looked at again, and those that differ from what is served are loaded; with the
    # same one only those of experts that are not served.
    revision: str = ""
    # Experts that are left out until they are no longer named.
    retired: tuple[int, ...] = ()


class Keeper:
    """Local experts whose weights may come, be exchanged and go.

    Each is named by the fingerprint of its files, the one that ``paris.json`` has. Weights that cannot be read, are not finite, or whose velocity is
    not, are not taken: those before them go on serving, and the expert's state says why.

    Args:
        model: folder or URI of the model.
        indices: which experts this process is meant to have; ``None`` is all.
        device: torch device.
        precision: of the experts.
        compile: compile their blocks.
        threads: CPU threads of this process.

    Raises:
        FileNotFoundError: there is no such model.
        ValueError: it cannot be used.
    """

    def __init__(
        self, model: str, indices: Sequence[int] | None = None, device: str = "cpu", precision: str = "fp32", compile: bool = False, threads: int = 1
    ):
        self._open = lambda: open_experts(model, device, precision, compile=compile)
        self.files = self._open()
        self.indices = tuple(range(self.files.num_experts)) if indices is None else tuple(indices)
        self.experts = LocalExperts(self.files, indices=(), threads=threads, load=self._evicted)
        self._lock = threading.Lock()
        self._states = {k: ExpertState(k, "loading") for k in self.indices}
        self._refused = ""
        self._next = itertools.cycle(self.indices)
        self._suspect: int | None = None
        self._revision = ""
        self._again: dict[int, tuple[float, float]] = {}  # expert → when, and the pause before
        self._worker = ThreadPoolExecutor(1, "keeper")
        for k in self.indices:
            self._load(k)

    # -- what is there ------------------------------------------------------------------------------------------------------

    def states(self) -> list[ExpertState]:
        """Of each of its experts, now."""
        with self._lock:
            return [replace(state, reason="; ".join(filter(None, (state.reason, self._refused)))) for state in self._states.values()]

    def _set(self, k: int, **changes: Any) -> None:
        with self._lock:
            self._states[k] = replace(self._states[k], **changes)

    def check(self) -> None:
        """One forward pass of the next expert in turn, unless it has answered somebody since the last time; of one that failed until it passes,
        because Serve replaces a process only when it fails several times in a row. Raises what the forward pass raises.

        Experts whose files could not be had are tried again.
        """
        self._try_again()
        ready = {state.index for state in self.states() if state.state == "ready"}
        suspected = self._suspect in ready
        k = self._suspect if suspected else next((k for k in itertools.islice(self._next, len(self.indices)) if k in ready), None)
        if k is None:
            return
        answer = self.experts.latest.pop(k, None)
        # One that is not finite may have been asked something that was not.
        if suspected or answer is None or not bool(torch.isfinite(answer).all()):
            self._suspect = k
            self._run(self.experts, k)
            self._suspect = None
            self.experts.latest.pop(k, None)

    def close(self) -> None:
        """Change nothing any more."""
        self._worker.shutdown(wait=False, cancel_futures=True)

    # -- what changes -------------------------------------------------------------------------------------------------------

    def reconfigure(self, user_config: Any) -> Future[None] | None:
        """Take a ``user_config``; what it changes follows in a thread of its own, expert by expert, while the others serve.

        One that makes no sense is refused in the log and in the experts' states, and changes nothing: an error would have Serve end the process.

        Returns:
            done when all has been changed; None of one that is refused.
        """
        try:
            changes = Changes.model_validate(user_config or {})
            if strange := sorted(set(changes.retired) - set(self.indices)):
                raise ValueError(f"retired: {strange} are not here; this process has experts {list(self.indices)}")
        except ValueError as error:
            said = error.errors(include_url=False)[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
            name = ".".join(str(part) for part in said["loc"])
            self._refused = f"user_config was refused, {name}{': ' if name else ''}{said['msg']}"
            log.error("experts %s: %s", self.indices, self._refused)
            return None
        self._refused = ""
        return self._worker.submit(self._apply, changes)

    def _apply(self, changes: Changes) -> None:
        for k in changes.retired:
            self._again.pop(k, None)
            self.experts.unload(k)
            self._set(k, state="missing", reason=RETIRED, fingerprint=None)
        served, look_again = self.experts.available(), changes.revision != self._revision
        self._revision = changes.revision
        for k in self.indices:
            if k not in changes.retired and (look_again or not served[k]):
                self._load(k)

    def _load(self, k: int) -> None:
        """Serve what is in the files of an expert now, unless it is served already."""
        serving = self.experts.available()[k]
        began = time.monotonic()
        pause = self._again.pop(k, (0.0, AGAIN_SECONDS / 2))[1]
        try:
            files = self._open()  # anew: its config may be another, too
            folder = files.folder / f"expert_{k}"
            if not files.present[k]:
                raise FileNotFoundError(f"there are no weights in {folder.uri}")
            now, then = ((of.latent_shape, of.text_width) for of in (files, self.files))
            if now != then:
                raise ValueError(f"latents and text width of the model in {files.folder.uri} are {now}, and this process serves {then}; restart it")
            stamps = _stamps(folder)
            version = _fingerprint(folder)
            if serving and version == self._states[k].fingerprint:
                self._set(k, reason="")
                return
            self._set(k, **({"reason": "its new weights are being loaded"} if serving else {"state": "loading", "reason": ""}))
            loaded = _read(files, k, stamps)
            # On the host first, where they are: what cannot compute never comes to the place of what does.
            trial = LocalExperts(replace(files, device=torch.device("cpu"), compile=False), indices=())
            trial.put(k, loaded)
            self._run(trial, k)
        except Exception as error:
            self._not_loaded(k, error, pause)
            return
        try:
            self.experts.put(k, loaded, version)
            self._run(self.experts, k)
        except Exception as error:
            self._drop(k, "dead", _said(k, error))
            return
        self._set(k, state="ready", reason="", fingerprint=version, objective=files.objectives[k])
        log.info("expert %d: serving %s after %.1f s", k, version, time.monotonic() - began)

    def _not_loaded(self, k: int, error: Exception, pause: float) -> None:
        said = _said(k, error)
        if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):  # the storage's fault, which may pass
            pause = min(2 * pause, MOST_AGAIN_SECONDS)
            self._again[k] = (time.monotonic() + pause, pause)
            said += f"; it is tried again after {pause:g} s"
        if self.experts.available()[k]:
            self._set(k, reason=f"what is in its files now could not be loaded, the weights before it serve: {said}")
        else:
            self._drop(k, "dead" if isinstance(error, ArithmeticError) else "missing", said)

    def _drop(self, k: int, state: State, reason: str) -> None:
        self.experts.unload(k)
        self._set(k, state=state, reason=reason, fingerprint=None)

    def _try_again(self) -> None:
        for k, (when, pause) in list(self._again.items()):
            if time.monotonic() >= when:
                self._again[k] = (math.inf, pause)
                self._worker.submit(self._load_again, k)

    def _load_again(self, k: int) -> None:
        if k in self._again:  # and was not retired meanwhile
            self._load(k)

    def _evicted(self, k: int) -> tuple[DiT, Objective]:
        """An expert that had to leave memory, from its files. Raises ValueError if these are others by now."""
        stamps, version = _stamps(self.files.folder / f"expert_{k}"), _fingerprint(self.files.folder / f"expert_{k}")
        if version != self._states[k].fingerprint:
            raise ValueError(f"expert {k} had to leave memory, and its files hold other weights by now; change the revision")
        return _read(self.files, k, stamps)

    @torch.inference_mode()
    def _run(self, experts: LocalExperts, k: int) -> None:
        """One guided velocity of zeros. Raises ArithmeticError of one that is not finite, and of what the expert raises."""
        files, device = self.files, experts.model.device
        text, zeros = [torch.zeros(1, files.text_width, device=device)], torch.zeros(1, *files.latent_shape, device=device)
        cond = Conditioning(text, torch.zeros(1, 0), text, torch.full((1,), 2.0), ("warm-up",), ("warm-up",))
        try:
            v, _ = experts.answer(ExpertCall(k, zeros, torch.full((1,), 0.5, device=device), cond))
        except Exception as error:
            raise ArithmeticError(f"its first forward pass failed: {error}") from error
        if not bool(torch.isfinite(v).all()):
            raise ArithmeticError("its velocity of zeros is not finite")


def _said(k: int, error: Exception) -> str:
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    log.error("expert %d could not be loaded: %s", k, said)
    return said


def _stamps(folder: Folder) -> list[tuple[str, int, int, int]]:
    """What would not be the same of an expert's files if they had changed, without reading them."""
    paths = [folder.local_copy(name) for name in FILES]
    return [(path, (stat := os.stat(path)).st_ino, stat.st_size, stat.st_mtime_ns) for path in paths]


def _fingerprint(folder: Folder) -> str:
    """As :mod:`paris_ray.inference.assemble` makes it, of the files as they are now."""
    checksums = {}
    for name in FILES:
        path, file = os.path.split(folder.local_copy(name))
        checksums[name] = Folder(path).sha256(file)
    return fingerprint(checksums)


def _read(files: ExpertFiles, k: int, stamps: list[tuple[str, int, int, int]]) -> tuple[DiT, Objective]:
    """An expert in CPU memory. Raises ValueError if its files have changed since they had these stamps, or it is not finite."""
    module, objective = files.load_expert(k, on_host=True)
    # Not mapped to its file: that may be written over while it is served.
    module = moved(module, torch.clone)
    if _stamps(files.folder / f"expert_{k}") != stamps:
        raise ValueError("its files changed while they were read; change the revision again when they are whole")
    if bad := [name for name, value in module.state_dict().items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]:
        raise ValueError(f"{bad[0]} has values that are not finite")
    return module, objective
