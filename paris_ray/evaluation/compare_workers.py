"""Processes that do a comparison's units, one at a time each; torch is imported in them only.

They heed SIGTERM: a training leaves a checkpoint and goes, all else is dropped, to be made anew. They go when their parent does.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from typing import Any

from paris_ray.storage import Folder

GRACE_S = 40.0
"""How long a process may take to go: a checkpoint of a training has :data:`paris_ray.training.termination.GRACE_S`."""


@dataclass(frozen=True)
class Ended:
    """What came of a unit.

    Attributes:
        key: the unit's.
        error: why it failed, with its trace; ``None``: it is done.
    """

    key: str
    error: str | None


class Workers:
    """Processes, each with at most one unit.

    Args:
        count: how many.
        tree: the comparison's config as JSON.
        logs: a local folder for what they say.
        gpus: how many GPUs there are; process i gets the i-th, modulo these.
    """

    def __init__(self, count: int, tree: dict[str, Any], logs: str, gpus: int):
        os.makedirs(logs, exist_ok=True)
        context = multiprocessing.get_context("spawn")
        self._ends: list[Any] = []
        self._processes = []
        self.busy: dict[int, str] = {}
        for i in range(count):
            here, there = context.Pipe()
            log = os.path.join(logs, f"worker-{i}.log")
            process = context.Process(target=_serve, args=(there, tree, log, i % gpus if gpus else None), name=f"compare-{i}", daemon=True)
            process.start()
            there.close()
            self._ends.append(here)
            self._processes.append(process)

    @property
    def idle(self) -> list[int]:
        """Processes without a unit."""
        return [i for i in range(len(self._ends)) if i not in self.busy]

    def give(self, i: int, key: str, kind: str, arguments: tuple[Any, ...]) -> None:
        """Have process i do a unit."""
        self.busy[i] = key
        self._ends[i].send((kind, arguments))

    def wait(self, seconds: float) -> list[Ended]:
        """Units that end within so many seconds; returns with the first ones."""
        ready = multiprocessing.connection.wait([self._ends[i] for i in self.busy], seconds)
        found = []
        for i in [i for i in self.busy if self._ends[i] in ready]:
            try:
                error = self._ends[i].recv()
            except (EOFError, ConnectionResetError):
                self._processes[i].join(5)
                error = f"the process died (exit code {self._processes[i].exitcode}); most likely of memory: set workers to fewer"
            found.append(Ended(self.busy.pop(i), error))
        return found

    def stop(self) -> None:
        """Ask all to go, and wait until they have."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        for process in self._processes:
            process.join(GRACE_S)
            if process.is_alive():
                process.kill()
                process.join()


def _serve(end: Any, tree: dict[str, Any], log: str, gpu: int | None) -> None:
    """A process: units come, errors go."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to all of a terminal's processes; the parent says what it means
    with open(log, "a", buffering=1) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= place(gpu, os.environ.get("CUDA_VISIBLE_DEVICES"))
    from paris_ray.evaluation import compare_config
    from paris_ray.training import termination

    termination.listen()
    threading.Thread(target=_go_with_parent, daemon=True).start()
    import torch

    from paris_ray.evaluation.compare_work import WORK

    if gpu is None:
        torch.set_num_threads(1)
    compare = compare_config.build(tree)
    while True:
        try:
            kind, arguments = end.recv()
        except EOFError:
            return
        try:
            WORK[kind](compare, *arguments)
        except termination.TerminatedError as went:
            print(went, flush=True)
            sys.exit(termination.EXIT_CODE)
        except Exception:
            traceback.print_exc()
            end.send(traceback.format_exc())
        else:
            end.send(None)


def place(gpu: int | None, visible: str | None) -> dict[str, str]:
    """Environment of a process, to be set before it imports torch: its one GPU; or one thread and no GPU, whatever the machine has.

    Args:
        gpu: which of those there are.
        visible: ``CUDA_VISIBLE_DEVICES`` of its parent.
    """
    if gpu is None:
        return {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return {"CUDA_VISIBLE_DEVICES": visible.split(",")[gpu] if visible else str(gpu)}


def _go_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        multiprocessing.connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGTERM)


def local_folder(folder: Folder, name: str) -> str:
    """Where logs may be appended to: below the folder where it is local, else below the working directory."""
    return f"{folder.path}/{name}" if folder.is_local else os.path.abspath(name)
