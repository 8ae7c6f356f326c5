"""Walks the stages of a run: a Ray job each, several at a time, followed to their end. Keeps nothing in memory that a restart would need.

What is done stands in the manifests, what is running in the cluster's list of jobs, so the same command picks up where another died.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from jobs import cli
from jobs.board import Board
from jobs.forecast import training_to_go, work
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.manifest import fingerprint
from paris_ray.progress import clock
from paris_ray.storage import Folder

POLL_SECONDS = 1.0
LOST_SECONDS = 60.0
"""How long a cluster may not answer before it counts as gone."""
LOG_LINES = 30
STOP_SECONDS = 20.0
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")


class ClusterLostError(RuntimeError):
    """The cluster no longer answers."""


@dataclass
class Attempt:
    """One submitted job."""

    stage: str
    number: int
    id: str
    since: float = field(default_factory=time.time)
    rebuild: bool = False


class Runner:
    """Runs stages of one config on one cluster.

    Args:
        config: the run's; ``RUN/config.yaml`` holds the same.
        client: a ``ray.job_submission.JobSubmissionClient``.
        python: what starts Python in an entrypoint: an interpreter, with variables before it where needed.
        runtime_env: for a cluster that does not see this project: ``working_dir`` and so on.
        retries: how often a failed job is submitted again.
        rebuild: stages to delete and make anew.
        on_done: called with each stage that becomes valid.
        planned: all stages that the caller will run, in this walk or a later one, for the count on the board; ``None`` for the run's own.
    """

    def __init__(
        self,
        config: RunConfig,
        client: Any,
        python: str = "python",
        runtime_env: dict[str, Any] | None = None,
        retries: int = 1,
        rebuild: Sequence[str] = (),
        on_done: Callable[[str], None] | None = None,
        planned: Sequence[str] | None = None,
    ):
        self.config, self.client, self.python = config, client, python
        self.runtime_env, self.retries, self.rebuild, self.on_done = runtime_env, retries, set(rebuild), on_done
        self.run_folder = Folder(config.run_dir)
        self.events = self.run_folder / "events"
        self.logs = self.events / "logs"
        self.prefix = f"{config.name}-{hashlib.sha256(self.run_folder.uri.encode()).hexdigest()[:8]}"
        self.running: dict[str, Attempt] = {}
        self.failures: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.planned = stages.names(config) if planned is None else planned
        self.board = Board(self.events)

    # -- the walk -----------------------------------------------------------------------------------------------

    def run(self, names: Sequence[str], arguments: Mapping[str, Sequence[str]] | None = None) -> bool:
        """Bring stages to ``valid``.

        Args:
            names: the stages, parents first.
            arguments: further arguments of some stages' jobs.

        Returns:
            whether all are; what failed has been printed.

        Raises:
            ClusterLostError: the cluster is gone.
        """
        arguments = arguments or {}
        every = {*stages.names(self.config), *self.planned, *names}
        done = {name for name in every if name not in self.rebuild and cli.status(self.config, name).state == "valid"}
        todo = [name for name in names if name not in done]
        failed: list[str] = []
        self.adopt(todo)
        while True:
            for name in self._ended():
                if self._settle(name):
                    todo.remove(name)
                    done.add(name)
                    if self.on_done:
                        self.on_done(name)
            for name in self._ready(todo, done):
                self._submit(name, arguments.get(name, ()))
            for name in self._given_up(todo):
                todo.remove(name)
                failed.append(name)
            if not self.running and not self._ready(todo, done):
                break
            running = {name: one.since for name, one in self.running.items()}
            self.board.show(len(done), len(every), running, lambda events: training_to_go(self.config, todo, events))
            time.sleep(POLL_SECONDS)
        for name in failed:
            self.board.say(f"{name}: failed; its logs are in {self.logs.uri}/{name}-a*.log")
        if todo:
            self.board.say(f"not started, because what they need failed: {', '.join(todo)}")
        return not failed and not todo

    def adopt(self, todo: Sequence[str]) -> None:
        """Take over this run's jobs that already run on the cluster; end those that were submitted with another config."""
        for job in self._call(self.client.list_jobs):
            meta = job.metadata or {}
            if meta.get("run_dir") != self.run_folder.uri or job.submission_id is None or job.status in ENDED:
                continue
            name = meta["stage"]
            if name not in (*stages.names(self.config), "evaluate"):
                self.board.say(f"{name}: {job.submission_id} is of a stage that this config does not have, ending it")
                self._end(job.submission_id)
            elif name in self.rebuild:
                self.board.say(f"{name}: ending {job.submission_id}, it is to be made anew")
                self._end(job.submission_id)
            elif name in todo and meta["config"] == self._fingerprint(name) and name not in self.running:
                number = int(meta["attempt"])
                self.running[name] = Attempt(name, number, job.submission_id, (job.start_time or time.time() * 1000) / 1000)
                self.board.say(f"{name}: already running as {job.submission_id}, following it")
            elif meta["config"] != self._fingerprint(name):
                self.board.say(f"{name}: {job.submission_id} was submitted with another config, ending it")
                self._end(job.submission_id)

    def stop(self) -> None:
        """End the jobs that run."""
        for attempt in self.running.values():
            self.board.say(f"{attempt.stage}: stopping")
            self._call(self.client.stop_job, attempt.id)
        for attempt in self.running.values():
            self._end(attempt.id)
            self._save_log(attempt)
        self.running.clear()

    # -- parts --------------------------------------------------------------------------------------------------

    def _ready(self, todo: Sequence[str], done: set[str]) -> list[str]:
        """What can be submitted now, in the order of submission; a stage that trains waits for one of ``max_parallel`` places."""
        given_up = self._given_up(todo)
        ready = [name for name in todo if name not in self.running and name not in given_up and done.issuperset(stages.parents(self.config, name))]
        training = sorted((name for name in ready if stages.trains(name)), key=lambda name: (name == stages.CONTROL_ROUTER, -work(self.config, name)))
        free = self.config.max_parallel - sum(stages.trains(name) for name in self.running)
        return [name for name in ready if not stages.trains(name)] + training[: max(0, free)]

    def _given_up(self, todo: Sequence[str]) -> list[str]:
        return [name for name in todo if self.failures.get(name, 0) > self.retries]

    def _submit(self, name: str, arguments: Sequence[str]) -> None:
        number = self._next_number(name)
        attempt = Attempt(name, number, f"{self.prefix}-{name}-a{number}", rebuild=name in self.rebuild)
        words = [*module(name), "--config", f"{self.run_folder.uri}/{cli.CONFIG}", *arguments]
        if attempt.rebuild:
            # Once: the next attempt resumes what this one begins.
            words += ["--rebuild", name]
            self.rebuild.discard(name)
        meta = {"run_dir": self.run_folder.uri, "stage": name, "attempt": str(number), "config": self._fingerprint(name)}
        options = {"runtime_env": self.runtime_env} if self.runtime_env else {}
        try:
            self._call(
                self.client.submit_job,
                entrypoint=f"{self.python} -m {shlex.join(words)}",
                submission_id=attempt.id,
                metadata=meta,
                entrypoint_num_cpus=0,
                **options,
            )
        except (RuntimeError, ValueError) as error:
            self.failures[name] = self.failures.get(name, 0) + 1
            self.board.say(f"{name}: could not be submitted: {error}")
            return
        self.running[name] = attempt
        self.board.say(f"{name}: submitted as {attempt.id}")

    def _next_number(self, name: str) -> int:
        """One above every attempt that the cluster or the saved logs know."""
        pattern = re.compile(rf"{re.escape(name)}-a(\d+)(\.log)?$")
        known = [job.submission_id or "" for job in self._call(self.client.list_jobs) if (job.submission_id or "").startswith(self.prefix)]
        known += [entry.name for entry in self.logs.files()]
        return 1 + max((int(found[1]) for one in known if (found := pattern.search(one))), default=0)

    def _ended(self) -> list[str]:
        return [name for name, attempt in self.running.items() if str(self._call(self.client.get_job_status, attempt.id)) in ENDED]

    def _settle(self, name: str) -> bool:
        """Account for an ended job; whether its stage is valid now."""
        attempt = self.running.pop(name)
        took = time.time() - attempt.since
        text = self._save_log(attempt)
        state = cli.status(self.config, name).state
        info = self._call(self.client.get_job_info, attempt.id)
        if state == "valid" and (not attempt.rebuild or str(info.status) == "SUCCEEDED"):
            self.seconds[name] = took
            self.board.say(f"{name}: done in {clock(took)}{self._counts(name)}")
            return True
        if attempt.rebuild and state not in ("absent", "partial"):
            self.rebuild.add(name)  # it did not get as far as deleting the old one
        # A wrong input stays wrong.
        self.failures[name] = self.retries + 1 if info.driver_exit_code == cli.USER_ERROR else self.failures.get(name, 0) + 1
        again = self.failures[name] <= self.retries
        why = f"exit code {info.driver_exit_code}" if info.driver_exit_code is not None else (info.message or str(info.status))
        tail = "\n".join(f"    {line}" for line in text.splitlines()[-LOG_LINES:])
        self.board.say(
            f"{name}: {attempt.id} ended without finishing the stage ({why}; the stage is {state}). Its last lines:\n{tail}\n"
            f"{name}: {'trying again' if again else 'giving up'}"
        )
        return False

    def _counts(self, name: str) -> str:
        manifest = cli.status(self.config, name).manifest or {}
        shown = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in manifest.get("counts", {}).items()
            if isinstance(value, int | float)
        ]
        return f" ({', '.join(shown[:6])})" if shown else ""

    def _save_log(self, attempt: Attempt) -> str:
        try:
            text = str(self._call(self.client.get_job_logs, attempt.id))
        except RuntimeError as error:
            text = f"(no log: {error})"
        self.logs.write_bytes(f"{attempt.stage}-a{attempt.number}.log", text.encode())
        return text

    def _end(self, submission_id: str) -> None:
        self._call(self.client.stop_job, submission_id)
        deadline = time.monotonic() + STOP_SECONDS
        while time.monotonic() < deadline and str(self._call(self.client.get_job_status, submission_id)) not in ENDED:
            time.sleep(0.3)

    def _fingerprint(self, name: str) -> str:
        return fingerprint(json.loads(json.dumps([stages.config_part(self.config, part) for part in cli.parts(self.config, name)])))

    def _call(self, function: Callable[..., Any], *args: Any, **options: Any) -> Any:
        """One call of the Jobs API; a cluster that is away for a moment is asked again."""
        asked = time.monotonic()
        while True:
            try:
                return function(*args, **options)
            except OSError as error:  # requests' errors are OSErrors
                if time.monotonic() - asked > LOST_SECONDS:
                    raise ClusterLostError(f"the cluster has not answered for {LOST_SECONDS:.0f} s ({error})") from error
                time.sleep(POLL_SECONDS)


def module(name: str) -> list[str]:
    """The job script of a stage with its own arguments."""
    if name.startswith("expert-"):
        return ["jobs.train_expert", "--expert", name.removeprefix("expert-")]
    if name == stages.CONTROL_ROUTER:
        return ["jobs.train_router", "--control"]
    return ["jobs.train_router"] if name == "router" else [f"jobs.{name}"]
