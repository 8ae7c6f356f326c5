"""A Ray cluster of our own on this machine: loopback only, own ports, own token, and nothing left behind. Imports no Ray."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

PROJECT = Path(__file__).resolve().parent.parent
STATE = "cluster.json"
MARK = "PARIS_RAY_CLUSTER"
"""Environment variable by which every process of a cluster is known, whoever its parent is by now."""

START_SECONDS = 180.0
STOP_SECONDS = 15.0
ANSWER_SECONDS = 60.0
"""How long the dashboard of a living head may not answer before the cluster counts as broken."""
_PREFIX = "paris-"


class ClusterError(RuntimeError):
    """The local cluster did not come up; the message names its logs."""


class LocalCluster:
    """One head node on 127.0.0.1, found again through ``cluster.json`` in a folder.

    A context manager: starts on entry, ends on exit, also after an error, Ctrl-C or SIGTERM (:func:`exit_on_signals`). After a SIGKILL of its
    owner the cluster and its jobs go on; :meth:`find` takes them over, :func:`stop_all` ends them.

    Args:
        folder: local folder of the state file, as a rule the run directory.
        num_cpus: CPUs that Ray may hand out; ``None`` takes the machine's, at least two.
        object_store_bytes: shared memory for objects.
        port: of the dashboard; 0 takes a free one.
    """

    head = ("-m", "jobs.head")
    """What Python runs as the head."""

    def __init__(self, folder: str | os.PathLike[str], num_cpus: int | None = None, object_store_bytes: int = 512 << 20, port: int = 0):
        self.folder = Path(folder).absolute()
        self.num_cpus = num_cpus or max(2, os.cpu_count() or 2)
        self.object_store_bytes, self.port = object_store_bytes, port
        self.state: dict[str, Any] = {}

    # -- what clients need --------------------------------------------------------------------------------------

    @property
    def address(self) -> str:
        """URL of the dashboard, for the Jobs API."""
        return f"http://{self.state['dashboard']}"

    @property
    def gcs(self) -> str:
        """Address for ``ray.init``."""
        return str(self.state["gcs"])

    @property
    def temp_dir(self) -> Path:
        """Token and logs; Ray's own folder is inside, because Ray opens that to everybody. Short, for a Unix socket's path has 107 bytes."""
        return Path(self.state["temp_dir"])

    def env(self) -> dict[str, str]:
        """The environment of this process, changed so that a client started in it reaches the cluster and no other one."""
        return {
            # A token in RAY_AUTH_TOKEN would win over the file, an address in RAY_ADDRESS over ours.
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(self.temp_dir / "token"),
            "RAY_USAGE_STATS_ENABLED": "0",
            # The name is historical; the effect is that Ray takes 127.0.0.1 as this machine's address.
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    def use(self) -> None:
        """Change this process's environment to :meth:`env`."""
        env = self.env()
        os.environ.clear()
        os.environ.update(env)

    def request(self, path: str, body: Any = None, method: str = "GET", timeout: float = 10.0) -> Any:
        """One call of the dashboard's REST API; the answer's JSON, ``None`` when empty. Raises OSError."""
        token = (self.temp_dir / "token").read_text()
        data = None if body is None else json.dumps(body).encode()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        with urllib.request.urlopen(urllib.request.Request(self.address + path, data, headers, method=method), timeout=timeout) as answer:
            text = answer.read()
        return json.loads(text) if text else None

    # -- life ---------------------------------------------------------------------------------------------------

    @classmethod
    def find(cls, folder: str | os.PathLike[str]) -> LocalCluster | None:
        """The living cluster that an earlier process left in the folder, ready to use; a dead or half-started one is cleared away."""
        cluster = cls(folder)
        try:
            state = json.loads((cluster.folder / STATE).read_text())
        except (FileNotFoundError, ValueError):
            return None
        if not _trusted(state, cluster.folder):
            return None  # copied with its folder, or not written by us: nothing it names is ours to use or to delete
        cluster.state = state
        if cluster.alive() and cluster.state.get("dashboard"):
            # On a busy machine a living dashboard may take its time; ending it would end the jobs with it.
            deadline = time.monotonic() + ANSWER_SECONDS
            while cluster.alive() and time.monotonic() < deadline:
                try:
                    cluster.request("/api/version")
                except OSError:
                    time.sleep(1.0)
                    continue
                if cluster.ours:
                    cluster.state["owner"] = _me()
                    cluster._save()
                return cluster
        cluster.stop()
        return None

    def start(self) -> LocalCluster:
        """Start the head and wait until it takes jobs.

        Raises:
            ClusterError: it did not come up in :data:`START_SECONDS`.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = {"id": secrets.token_hex(8), "temp_dir": tempfile.mkdtemp(prefix=_PREFIX, dir=_short_temp()), "project": str(PROJECT)}
        self.state["owner"] = _me()
        token = self.temp_dir / "token"
        token.touch(mode=0o600)
        token.write_text(secrets.token_hex(32))
        wanted = {"num_cpus": self.num_cpus, "object_store_bytes": self.object_store_bytes, "port": self.port}
        (self.temp_dir / "head.json").write_text(json.dumps(wanted))
        self._save()
        try:
            with open(self.temp_dir / "head.log", "wb") as log:
                head = subprocess.Popen(
                    [sys.executable, *self.head, str(self.temp_dir / "head.json")],
                    env=self._server_env(),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    # Its own session: a Ctrl-C in the terminal is for the owner, who then ends the cluster in order.
                    start_new_session=True,
                )
            self.state |= {"pid": head.pid, "started": psutil.Process(head.pid).create_time()}
            self._save()
            self._wait_ready(head)
        except BaseException as error:
            logs, tail = self.temp_dir, _tail(self.temp_dir / "head.log")
            self.stop(keep_logs=isinstance(error, ClusterError))
            if isinstance(error, ClusterError):
                raise ClusterError(f"{error}; its logs are in {logs}\n{tail}") from None
            raise
        return self

    def _wait_ready(self, head: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + START_SECONDS
        ready = self.temp_dir / "ready.json"
        while time.monotonic() < deadline:
            if head.poll() is not None:
                raise ClusterError(f"the local Ray cluster ended at its start (exit code {head.returncode})")
            if "dashboard" not in self.state and ready.exists():
                self.state |= json.loads(ready.read_text())
                self._save()
            if "dashboard" in self.state:
                with contextlib.suppress(OSError):
                    self.request("/api/jobs/")
                    return
            time.sleep(0.1)
        raise ClusterError(f"the local Ray cluster was not ready after {START_SECONDS:.0f} s")

    @property
    def ours(self) -> bool:
        """Whether it is this process's to end: it started the cluster, or who did so is gone."""
        owner = self.state.get("owner", {})
        return owner == _me() or _process(owner) is None

    def alive(self) -> bool:
        """Whether the head process runs."""
        return _process(self.state) is not None

    def stop(self, keep_logs: bool = False) -> None:
        """End every process of this cluster and no other, and remove its files. Safe to call again."""
        if not self.state:
            return
        with _signals_held():
            head = _process(self.state)
            if head is not None:
                with contextlib.suppress(psutil.NoSuchProcess):
                    head.terminate()
                    psutil.wait_procs([head], timeout=STOP_SECONDS)
            # Workers and job drivers end by themselves once the head is gone; what has not is ended here.
            left = self.processes()
            for process in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(left, timeout=STOP_SECONDS)
            if not keep_logs:
                shutil.rmtree(self.temp_dir, ignore_errors=True)
            (self.folder / STATE).unlink(missing_ok=True)
            self.state = {}

    def processes(self) -> list[psutil.Process]:
        """All living processes of this cluster, known by the mark in their environment."""
        found = []
        mine = os.getuid()
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied, psutil.ZombieProcess):
                if process.uids().real == mine and process.environ().get(MARK) == self.state["id"]:
                    found.append(process)
        return found

    def __enter__(self) -> LocalCluster:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # -- parts --------------------------------------------------------------------------------------------------

    def _server_env(self) -> dict[str, str]:
        return {
            **self.env(),
            MARK: self.state["id"],
            # A busy machine of two cores needs longer than Ray's half minute.
            "RAY_raylet_start_wait_time_s": f"{START_SECONDS / 2:.0f}",
            # Nobody reclaims this machine, and each training would start a process to watch for it.
            "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
            # `python` in a job is this interpreter, and it finds the jobs without a copy of the project.
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(PROJECT), os.environ.get("PYTHONPATH")])),
            # One thread a process: parallelism is Ray's, and results do not depend on the number of cores.
            **dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1"),
        }

    def _save(self) -> None:
        # Beside the run for the next process; beside Ray's files for `make stop`, which does not know the runs.
        text = json.dumps({**self.state, "folder": str(self.folder)}, indent=1) + "\n"
        for target in (self.temp_dir / STATE, self.folder / STATE):
            partial = target.with_name(f".{target.name}-{os.getpid()}")
            partial.write_text(text)
            partial.replace(target)


def stop_all() -> list[str]:
    """End all local clusters that this copy of the project started; returns the folders of their runs."""
    stopped = []
    for path in sorted(Path(_short_temp()).glob(f"{_PREFIX}*/{STATE}")):
        with contextlib.suppress(OSError, ValueError):
            state = json.loads(path.read_text())
            if path.stat().st_uid != os.getuid() or state["project"] != str(PROJECT):
                continue
            cluster = LocalCluster(state.pop("folder"))
            cluster.state = state
            if not cluster.ours and (owner := _process(state["owner"])) is not None:
                # A demo or a run that still follows: it ends its jobs and its cluster in order.
                owner.terminate()
                psutil.wait_procs([owner], timeout=2 * STOP_SECONDS)
            cluster.stop()
            stopped.append(str(cluster.folder))
    return stopped


def exit_on_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, so that context managers clean up; what `nohup` ignores stays ignored."""

    def unwind(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, unwind)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, unwind)


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """Hold back the signals of an impatient user while processes are being ended; one that came is delivered afterwards."""
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers can be set, and run, in the main thread only
        return
    came: list[int] = []
    # Handlers, not a mask: a mask holds for one thread, and Python runs handlers in this one whichever thread the signal reached.
    before = {number: signal.signal(number, lambda n, _: came.append(n)) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            os.kill(os.getpid(), came[0])


def _me() -> dict[str, Any]:
    return {"pid": os.getpid(), "started": psutil.Process().create_time()}


def _process(state: dict[str, Any]) -> psutil.Process | None:
    """The process of a number, if it is still the one that had it then."""
    try:
        process = psutil.Process(state["pid"])
        same = abs(process.create_time() - state["started"]) < 1.0 and process.status() != psutil.STATUS_ZOMBIE
    except (KeyError, psutil.NoSuchProcess):
        return None
    return process if same else None


def _trusted(state: Any, folder: Path) -> bool:
    """Whether a state file found in a folder was written there, and names a temporary folder that one of this user's clusters made."""
    try:
        temp = Path(state["temp_dir"])
        own = temp.parent == Path(_short_temp()) and temp.name.startswith(_PREFIX)
        return own and state["folder"] == str(folder) and (not temp.exists() or (temp.stat().st_uid == os.getuid() and not temp.is_symlink()))
    except (TypeError, KeyError):
        return False


def _short_temp() -> str:
    """The folder for temporary files, unless it is too long for Ray's sockets."""
    folder = tempfile.gettempdir()
    return folder if len(folder) <= 30 else "/tmp"


def _tail(path: Path, lines: int = 20) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return ""
