"""Walks the stages of a run: a Ray job each, several at a time, in one cluster or several, followed to their end. Keeps nothing in memory that a
restart would need.

What is done stands in the manifests, what is running in the clusters' lists of jobs, so the same command picks up where another died.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from jobs import cli
from jobs.attempt import Attempt
from jobs.board import Board
from jobs.clusters import ENDED, LOST, AwayError, Cluster
from jobs.departures import Departures, Leaving
from jobs.forecast import training_to_go, work
from jobs.job_logs import JobLogs, tail
from jobs.nodes import Nodes
from jobs.spending import Spending
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.manifest import fingerprint
from paris_ray.progress import clock
from paris_ray.resources import HERE
from paris_ray.storage import Folder
from paris_ray.training import stopping
from paris_ray.training.machines import QUEUED, wants
from paris_ray.training.worker import resources

POLL_SECONDS = 1.0
LOOK_SECONDS = 5.0
"""How often the events of trainings are looked at for what they wait for and what they have cost."""
LOST_SECONDS = 60.0
"""How long the cluster here may not answer before it counts as gone."""


class ClusterLostError(RuntimeError):
    """The cluster here no longer answers."""


class CostReachedError(RuntimeError):
    """As much money is spent as may be; the trainings have stopped in order."""


class Runner:
    """Runs stages of one config.

    Args:
        config: the run's; ``RUN/config.yaml`` holds the same.
        here: the cluster of all stages but the experts that the config has elsewhere.
        others: the clusters that the config names.
        retries: how often a failed job is submitted again.
        rebuild: stages to delete and make anew.
        on_done: called with each stage that becomes valid.
        planned: all stages that the caller will run, in this walk or a later one, for the count on the board; ``None`` for the run's own.
        max_cost: money after which the trainings are asked to stop.
    """

    def __init__(
        self,
        config: RunConfig,
        here: Cluster,
        others: Sequence[Cluster] = (),
        retries: int = 1,
        rebuild: Sequence[str] = (),
        on_done: Callable[[str], None] | None = None,
        planned: Sequence[str] | None = None,
        max_cost: float | None = None,
    ):
        self.config, self.retries, self.rebuild, self.on_done, self.max_cost = config, retries, set(rebuild), on_done, max_cost
        self.clusters = {one.name: one for one in (here, *others)}
        self.run_folder = Folder(config.run_dir)
        self.events = self.run_folder / "events"
        self.logs = JobLogs(self.events)
        self.prefix = f"{config.name}-{hashlib.sha256(self.run_folder.uri.encode()).hexdigest()[:8]}"
        self.running: dict[str, Attempt] = {}
        self.leaving = Departures()
        self.failures: dict[str, int] = {}
        self.seconds: dict[str, float] = {}
        self.planned = stages.names(config) if planned is None else planned
        self.board = Board(self.events)
        for one in self.clusters.values():
            one.say = self._say
        self._met: dict[str, int] = {}  # after which of its losses each cluster's jobs have been looked at
        self._looked = 0.0
        self._spending = Spending(config, self.events)
        self._nodes = Nodes(self.events)

    def _say(self, text: str) -> None:
        self.board.say(text)

    # -- the walk -----------------------------------------------------------------------------------------------

    def run(self, names: Sequence[str], arguments: Mapping[str, Sequence[str]] | None = None) -> bool:
        """Bring stages to ``valid``.

        Args:
            names: the stages, parents first.
            arguments: further arguments of some stages' jobs.

        Returns:
            whether all are; what failed has been printed.

        Raises:
            ClusterLostError: the cluster here is gone. Another that does not answer is asked again for as long as it takes.
            CostReachedError: ``max_cost`` is spent.
        """
        arguments = arguments or {}
        every = {*stages.names(self.config), *self.planned, *names}
        done = {name for name in every if name not in self.rebuild and cli.status(self.config, name).state == "valid"}
        todo = [name for name in names if name not in done]
        failed: list[str] = []
        self._met.clear()
        while True:
            self._meet(todo)
            self.leaving.see_off(self.clusters)
            for name, status in self._ended().items():
                if self._settle(name, status):
                    todo.remove(name)
                    done.add(name)
                    if self.on_done:
                        self.on_done(name)
            self._look(todo, arguments)
            for name in self._ready(todo, done):
                self._submit(name, arguments.get(name, ()))
            for name in self._given_up(todo):
                todo.remove(name)
                failed.append(name)
            if not self.running and not self.leaving and not self._ready(todo, done):
                break
            running = {name: one.since for name, one in self.running.items()}
            self.board.show(len(done), len(every), running, lambda events: training_to_go(self.config, todo, events), self._notes())
            time.sleep(POLL_SECONDS)
        self._nodes.keep(self.clusters.values())
        for name in failed:
            self.board.say(f"{name}: failed; its logs are in {self.logs.folder.uri}/{name}-a*.log")
        if todo:
            self.board.say(f"not started, because what they need failed: {', '.join(todo)}")
        return not failed and not todo

    def stop(self, names: Sequence[str] | None = None) -> None:
        """End the jobs of some stages that run, or of all."""
        attempts = [self.running.pop(name) for name in (list(self.running) if names is None else names)]
        for attempt in attempts:
            self.board.say(f"{attempt.stage}: stopping")
            with contextlib.suppress(RuntimeError):  # below it is seen what becomes of it
                self._cluster(attempt.stage).call("stop_job", attempt.id)
        for attempt in attempts:
            cluster = self._cluster(attempt.stage)
            try:
                cluster.end(attempt.id)
                self.logs.save(attempt, cluster)
            except AwayError:
                self.board.say(f"{attempt.stage}: {cluster.label} does not answer, so {attempt.id} may go on there")

    # -- the clusters -------------------------------------------------------------------------------------------

    def _cluster(self, name: str) -> Cluster:
        """Where a stage runs."""
        return self.clusters[self.config.cluster_of(name)]

    def _meet(self, todo: Sequence[str]) -> None:
        """Learn what runs in each cluster, now or as soon as it answers again."""
        for name, cluster in self.clusters.items():
            if not self._known(cluster):
                with contextlib.suppress(AwayError):
                    losses = cluster.losses
                    self._adopt(cluster, todo)
                    self._met[name] = losses
        here = self.clusters[HERE]
        if here.away > LOST_SECONDS:
            raise ClusterLostError(f"the cluster has not answered for {LOST_SECONDS:.0f} s ({here.why})")

    def _known(self, cluster: Cluster) -> bool:
        """Whether it answers, and what runs there has been looked at since it last did not."""
        return cluster.answers and self._met.get(cluster.name) == cluster.losses

    def _adopt(self, cluster: Cluster, todo: Sequence[str]) -> None:
        """Take over this run's jobs that already run in a cluster; end those that were submitted with another config."""
        for job in cluster.call("list_jobs"):
            meta = job.metadata or {}
            if meta.get("run_dir") != self.run_folder.uri or job.submission_id is None or job.status in ENDED:
                continue
            name, moved = meta["stage"], False
            since = (job.start_time or time.time() * 1000) / 1000
            if name not in (*stages.names(self.config), "evaluate"):
                why = "is of a stage that this config does not have"
            elif name in self.rebuild:
                why = "is to be made anew"
            elif self.config.cluster_of(name) != cluster.name:
                why, moved = f"runs in {cluster.label}, and the config now has it in {self._cluster(name).label}", True
            elif meta["config"] != self._fingerprint(name):
                why = "was submitted with another config"
            else:
                if name in todo and name not in self.running:
                    self.running[name] = Attempt(name, int(meta["attempt"]), job.submission_id, since, fallback=meta.get("fallback") == "yes")
                    self.board.say(f"{name}: already running as {job.submission_id}{self._at(name)}, following it")
                continue
            if job.submission_id in self.leaving:
                continue
            leaves = moved and name not in self.running and self._trains_since(name, since)
            self.board.say(f"{name}: {job.submission_id} {why}, ending it{' after a checkpoint' if leaves else ''}")
            if leaves:
                stopping.wish(self.events, name)
                self.leaving[job.submission_id] = Leaving(name, cluster.name)
            else:
                cluster.end(job.submission_id)

    def _at(self, name: str) -> str:
        """For people: where, if not here."""
        return "" if self.config.cluster_of(name) == HERE else f" in {self.config.cluster_of(name)}"

    def _notes(self) -> list[str]:
        """What is worth saying all the time: who leaves a cluster, and the clusters that do not answer."""
        away = [f"{one.label} has not answered for {clock(one.away)}" for one in self.clusters.values() if not one.answers]
        return [*self.leaving.notes(self.clusters), *away]

    # -- waiting, and money -------------------------------------------------------------------------------------

    def _look(self, todo: Sequence[str], arguments: Mapping[str, Sequence[str]]) -> None:
        """See now and then which nodes there are, which trainings have no room, and what all have cost."""
        if time.monotonic() - self._looked < LOOK_SECONDS:
            return
        self._looked = time.monotonic()
        self._nodes.keep(self.clusters.values())
        if self.max_cost is not None and any(map(stages.trains, todo)) and (spent := self._spending.total()) >= self.max_cost:
            self._stop_in_order(f"{spent:.2f} is spent, and --max-cost is {self.max_cost:g}")
        for name, attempt in list(self.running.items()):
            event = self.board.event(name, attempt.since)
            if event is not None and event["state"] == QUEUED:
                self._no_room(attempt, event["message"], arguments.get(name, ()))

    def _no_room(self, attempt: Attempt, message: str, arguments: Sequence[str]) -> None:
        """A training's machines do not come: take the fallback, or say it once."""
        name, fallback = attempt.stage, resources(self.config, attempt.stage).on_fallback
        if resources(self.config, name).fallback is None or attempt.fallback:
            if not attempt.told:
                self.board.say(f"{name}: {message}; it goes on waiting")
                attempt.told = True
            return
        with contextlib.suppress(AwayError):
            self._cluster(name).end(attempt.id)
            self.logs.save(attempt, self._cluster(name))
            self.board.say(f"{name}: {message}; now its fallback: {wants(fallback())}")
            del self.running[name]
            self._submit(name, arguments, fallback=True)

    def _trains_since(self, name: str, since: float) -> bool:
        """Whether a training has begun to train since then, and so has something to save."""
        event = self.board.event(name, since)
        return event is not None and event["state"] == "running"

    def _stop_in_order(self, why: str) -> None:
        """Have the trainings leave a checkpoint and end, also where nobody answers now, then raise CostReachedError."""
        self.board.say(f"{why}: the trainings are asked to stop")
        for name in stages.names(self.config):
            if stages.trains(name) and cli.status(self.config, name).state != "valid":
                stopping.wish(self.events, name)
        # The others have nothing to save.
        self.stop([name for name, attempt in self.running.items() if not self._trains_since(name, attempt.since)])
        deadline = time.monotonic() + stopping.CHECKPOINT_S
        while self.running and time.monotonic() < deadline:
            for name, status in self._ended().items():
                self._settle(name, status)
            time.sleep(POLL_SECONDS)
        self.stop()
        raise CostReachedError(f"{why}. The same command with a higher one goes on from the checkpoints")

    # -- parts --------------------------------------------------------------------------------------------------

    def _ready(self, todo: Sequence[str], done: set[str]) -> list[str]:
        """What can be submitted now, in the order of submission; a stage that trains waits for one of its cluster's ``max_parallel`` places."""
        taken = {*self.running, *self._given_up(todo), *self.leaving.stages()}
        ready = [name for name in todo if name not in taken and done.issuperset(stages.parents(self.config, name))]
        training = sorted((name for name in ready if stages.trains(name)), key=lambda name: (name == stages.CONTROL_ROUTER, -work(self.config, name)))
        chosen = [name for name in ready if not stages.trains(name)]
        for place in self.clusters:
            free = self.config.max_parallel - sum(stages.trains(name) and self.config.cluster_of(name) == place for name in self.running)
            chosen += [name for name in training if self.config.cluster_of(name) == place][: max(0, free)]
        return chosen

    def _given_up(self, todo: Sequence[str]) -> list[str]:
        return [name for name in todo if self.failures.get(name, 0) > self.retries]

    def _submit(self, name: str, arguments: Sequence[str], fallback: bool = False) -> None:
        """Submit a stage, if its cluster answers: what may run there already must be known first."""
        cluster = self._cluster(name)
        if not self._known(cluster):
            return
        with contextlib.suppress(AwayError):
            number = self.logs.next_number(name, self._job_ids())
            attempt = Attempt(name, number, f"{self.prefix}-{name}-a{number}", rebuild=name in self.rebuild, fallback=fallback)
            arguments = [*arguments, *(["--set", f"run_dir={cluster.run_dir}"] if cluster.run_dir != self.run_folder.uri else [])]
            meta = {"run_dir": self.run_folder.uri, "stage": name, "attempt": str(number), "config": self._fingerprint(name)}
            try:
                cluster.call(
                    "submit_job",
                    entrypoint=f"{cluster.python} -m {attempt.command(f'{cluster.run_dir}/{cli.CONFIG}', arguments)}",
                    submission_id=attempt.id,
                    metadata={**meta, "fallback": "yes"} if fallback else meta,
                    entrypoint_num_cpus=0,
                    **({"runtime_env": cluster.runtime_env} if cluster.runtime_env else {}),
                )
            except AwayError:
                raise
            except (RuntimeError, ValueError) as error:
                self.failures[name] = self.failures.get(name, 0) + 1
                self.board.say(f"{name}: could not be submitted{self._at(name)}: {error}")
                return
            self.rebuild.discard(name)  # once: the next attempt resumes what this one begins
            self.running[name] = attempt
            self.board.say(f"{name}: submitted{self._at(name)} as {attempt.id}")

    def _job_ids(self) -> Iterator[str]:
        """The ids of this run's jobs, in the clusters that answer."""
        for cluster in filter(self._known, self.clusters.values()):
            yield from (job.submission_id for job in cluster.call("list_jobs") if (job.submission_id or "").startswith(self.prefix))

    def _ended(self) -> dict[str, str]:
        """The jobs that have ended, and how, as far as their clusters answer."""
        found = {}
        for name, attempt in self.running.items():
            with contextlib.suppress(AwayError):
                if (status := self._cluster(name).status(attempt.id)) in ENDED:
                    found[name] = status
        return found

    def _settle(self, name: str, status: str) -> bool:
        """Account for an ended job; whether its stage is valid now."""
        attempt, cluster = self.running[name], self._cluster(name)
        try:
            text = self.logs.save(attempt, cluster)
            info = None if status == LOST else cluster.call("get_job_info", attempt.id)
        except AwayError:
            return False  # asked again when it is back
        except RuntimeError:  # forgotten since
            info = None
        del self.running[name]
        took = time.time() - attempt.since
        state = cli.status(self.config, name).state
        if state == "valid" and (not attempt.rebuild or status == "SUCCEEDED"):
            self.seconds[name] = took
            self.board.say(f"{name}: done in {clock(took)}{self._counts(name)}")
            return True
        if attempt.rebuild and state not in ("absent", "partial"):
            self.rebuild.add(name)  # it did not get as far as deleting the old one
        if info is None:
            self.board.say(f"{name}: {cluster.label} no longer knows {attempt.id}, its head must have been started anew; trying again")
            return False
        if info.driver_exit_code == cli.STOPPED:
            self.board.say(f"{name}: stopped in order, with a checkpoint")
            return False
        # A wrong input stays wrong.
        self.failures[name] = self.retries + 1 if info.driver_exit_code == cli.USER_ERROR else self.failures.get(name, 0) + 1
        again = self.failures[name] <= self.retries
        why = f"exit code {info.driver_exit_code}" if info.driver_exit_code is not None else (info.message or str(info.status))
        self.board.say(
            f"{name}: {attempt.id} ended without finishing the stage ({why}; the stage is {state}). Its last lines:\n{tail(text)}\n"
            f"{name}: {'trying again' if again else 'giving up'}"
        )
        if cluster.name != HERE and (status == "SUCCEEDED" or info.driver_exit_code == cli.USER_ERROR):
            self.board.say(
                f"{name}: {cluster.label} was told that {cluster.run_dir} is this run; see that it is the same store as {self.run_folder.uri}"
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

    def _fingerprint(self, name: str) -> str:
        return fingerprint(json.loads(json.dumps([stages.config_part(self.config, part) for part in cli.parts(self.config, name)])))
