"""The experts of one process: how they come, are exchanged and go while it serves."""

from __future__ import annotations

import itertools
import logging
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
from serve_app.cards import ExpertState

log = logging.getLogger("ray.serve")

RETIRED = "retired by the server's user_config"


class Changes(BaseModel):
    """``user_config`` of a deployment that holds experts: what can be changed of it without a restart."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Any text. With another one, the files of all its experts are looked at again, and those that differ from what is served are loaded.
    revision: str = ""
    # Experts that are left out until they are no longer named.
    retired: tuple[int, ...] = ()


class Keeper:
    """Local experts whose weights may come, be exchanged and go.

    Each is named by the fingerprint of its files, the one that ``paris.json`` has. Weights that cannot be read, or are not finite, are not taken:
    those before them go on serving, and the expert's state says why.

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
        self.experts = LocalExperts(self.files, indices=(), threads=threads)
        self._lock = threading.Lock()
        self._states = {k: ExpertState(k, "loading") for k in self.indices}
        self._refused = ""
        self._next = itertools.cycle(self.indices)
        self._asked: dict[int, int] = {}
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
        """One forward pass of the next expert in turn, unless it has answered somebody since the last time. Raises what it raises."""
        ready = {state.index for state in self.states() if state.state == "ready"}
        k = next((k for k in itertools.islice(self._next, len(self.indices)) if k in ready), None)
        if k is not None:
            answered = self.experts.answered[k]
            if self._asked.get(k) == answered:
                self._run(k)
            self._asked[k] = self.experts.answered[k]

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
            self.experts.unload(k)
            self._set(k, state="missing", reason=RETIRED, fingerprint=None)
        for k in self.indices:
            if k not in changes.retired:
                self._load(k)

    def _load(self, k: int) -> None:
        """Serve what is in the files of an expert now, unless it is served already."""
        serving = self.experts.available()[k]
        began = time.monotonic()
        try:
            files = self._open()  # anew: its config may be another, too
            folder = files.folder / f"expert_{k}"
            if not files.present[k]:
                raise FileNotFoundError(f"there are no weights in {folder.uri}")
            version = _fingerprint(folder)
            if serving and version == self._states[k].fingerprint:
                self._set(k, reason="")
                return
            self._set(k, **({"reason": "its new weights are being loaded"} if serving else {"state": "loading", "reason": ""}))
            self.experts.put(k, _read(files, k, version), version)
            self._run(k)
        except Exception as error:
            self._not_loaded(k, error)
            return
        self._set(k, state="ready", reason="", fingerprint=version, objective=files.objectives[k])
        log.info("expert %d: serving %s after %.1f s", k, version, time.monotonic() - began)

    def _not_loaded(self, k: int, error: Exception) -> None:
        said = f"{type(error).__name__}: {error}".partition("\n")[0]
        log.error("expert %d could not be loaded: %s", k, said)
        if self.experts.available()[k] and not isinstance(error, ArithmeticError):
            self._set(k, reason=f"what is in its files now could not be loaded, the weights before it serve: {said}")
        else:
            self.experts.unload(k)
            self._set(k, state="dead" if isinstance(error, ArithmeticError) else "missing", reason=said, fingerprint=None)

    @torch.inference_mode()
    def _run(self, k: int) -> None:
        """One guided velocity of zeros. Raises ArithmeticError of one that is not finite, and what the expert raises."""
        files = self.files
        text, zeros = [torch.zeros(1, files.text_width, device=files.device)], torch.zeros(1, *files.latent_shape, device=files.device)
        cond = Conditioning(text, torch.zeros(1, 0), text, torch.full((1,), 2.0), ("warm-up",), ("warm-up",))
        try:
            v, _ = self.experts.answer(ExpertCall(k, zeros, torch.full((1,), 0.5, device=files.device), cond))
        except Exception as error:
            raise ArithmeticError(f"its first forward pass failed: {error}") from error
        if not bool(torch.isfinite(v).all()):
            raise ArithmeticError("its velocity of zeros is not finite")


def _fingerprint(folder: Folder) -> str:
    """As :mod:`paris_ray.inference.assemble` makes it, of the files as they are now."""
    checksums = {}
    for name in ("config.json", EXPERT_FILE):
        path, file = os.path.split(folder.local_copy(name))
        checksums[name] = Folder(path).sha256(file)
    return fingerprint(checksums)


def _read(files: ExpertFiles, k: int, version: str) -> tuple[DiT, Objective]:
    """An expert in CPU memory. Raises ValueError if it is not what the fingerprint says, or not finite."""
    module, objective = files.load_expert(k, on_host=True)
    # Not mapped to its file: that may be written over while it is served.
    module = moved(module, torch.clone)
    if _fingerprint(files.folder / f"expert_{k}") != version:
        raise ValueError("its files changed while they were read; change the revision again when they are whole")
    if bad := [name for name, value in module.state_dict().items() if value.is_floating_point() and not bool(torch.isfinite(value).all())]:
        raise ValueError(f"{bad[0]} has values that are not finite")
    return module, objective
