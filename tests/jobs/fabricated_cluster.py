"""A cluster that only pretends: jobs that publish their stage's manifest, or fail, after a few polls."""

from __future__ import annotations

import re
import time
from types import SimpleNamespace
from typing import Any

from jobs import cli
from jobs.clusters import Cluster
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.resources import HERE
from paris_ray.storage import Folder


def tiny(folder: object, *sets: str) -> RunConfig:
    """The preset ``tiny`` in a folder."""
    return configs.load("tiny", [f"run_dir={folder}", *sets])


def publish(config: RunConfig, name: str, content: str = "made up", counts: dict[str, Any] | None = None) -> None:
    """Make a stage valid."""
    for part in cli.parts(config, name):
        stage = stages.stage(config, part)
        if stage.begin().state == "valid":
            continue
        stage.folder.write_bytes("file.txt", f"{content} {part}".encode())
        sizes = {"sizes": [10 * (k + 1) for k in range(config.num_experts)]} if part == "partition" else {}
        stage.publish({**(counts or {"rows": 3}), **sizes})


class FakeClient:
    """Answers as ``JobSubmissionClient`` does.

    Args:
        config: of the run.
        polls: how many status calls a job lasts.
        fail: how many of each stage's first attempts fail.
        code: exit code of a failure.
    """

    def __init__(self, config: RunConfig, polls: int = 2, fail: dict[str, int] | None = None, code: int = 1):
        self.config, self.polls, self.fail, self.code = config, polls, dict(fail or {}), code
        self.jobs: dict[str, SimpleNamespace] = {}
        self.order: list[str] = []
        self.most_training = 0

    def add(self, submission_id: str, metadata: dict[str, str], entrypoint: str = "", status: str = "RUNNING") -> SimpleNamespace:
        """Put a job on the cluster."""
        job = SimpleNamespace(
            submission_id=submission_id, metadata=metadata, entrypoint=entrypoint, status=status, left=self.polls,
            start_time=int(time.time() * 1000), driver_exit_code=None, message="",
        )  # fmt: skip
        self.jobs[submission_id] = job
        return job

    def submit_job(self, *, entrypoint: str, submission_id: str, metadata: dict[str, str], entrypoint_num_cpus: int, **_: Any) -> str:
        assert submission_id not in self.jobs
        assert entrypoint_num_cpus == 0
        self.add(submission_id, metadata, entrypoint)
        self.order.append(metadata["stage"])
        training = sum(j.status == "RUNNING" and bool(re.match("expert-|.*router", j.metadata["stage"])) for j in self.jobs.values())
        self.most_training = max(self.most_training, training)
        return submission_id

    def get_job_status(self, submission_id: str) -> str:
        job = self._job(submission_id)
        job.left -= 1
        if job.status == "RUNNING" and job.left <= 0:
            name = job.metadata["stage"]
            if self.fail.get(name, 0) > 0:
                self.fail[name] -= 1
                job.status, job.driver_exit_code = "FAILED", self.code
            else:
                publish(self.config, name)
                job.status, job.driver_exit_code = "SUCCEEDED", 0
        return job.status

    def get_job_info(self, submission_id: str) -> SimpleNamespace:
        return self._job(submission_id)

    def get_job_logs(self, submission_id: str) -> str:
        self._job(submission_id)
        return "".join(f"{submission_id} line {n}\n" for n in range(50))

    def list_jobs(self) -> list[SimpleNamespace]:
        return list(self.jobs.values())

    def list_nodes(self) -> list[dict[str, Any]]:
        return []

    def stop_job(self, submission_id: str) -> bool:
        job = self._job(submission_id)
        if job.status == "RUNNING":
            job.status = "STOPPED"
        return True

    def _job(self, submission_id: str) -> SimpleNamespace:
        if submission_id not in self.jobs:
            raise RuntimeError(f"Request failed with status code 404: Job {submission_id} does not exist.")
        return self.jobs[submission_id]


def on(client: FakeClient, name: str = HERE, run_dir: str | None = None) -> Cluster:
    """The cluster of a client, as the runner takes it."""
    return Cluster(name, lambda: client, run_dir or Folder(client.config.run_dir).uri)
