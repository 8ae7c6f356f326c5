"""The logs of a run's jobs, kept in ``RUN/events/logs/`` beyond the clusters that wrote them; they tell which number the next attempt has."""

from __future__ import annotations

import re
from collections.abc import Iterable

from jobs.attempt import Attempt
from jobs.clusters import AwayError, Cluster
from paris_ray.storage import Folder

LAST_LINES = 30


class JobLogs:
    """Keeps them.

    Args:
        events: ``RUN/events``.
    """

    def __init__(self, events: Folder):
        self.folder = events / "logs"

    def save(self, attempt: Attempt, cluster: Cluster) -> str:
        """Keep what a job has written so far; returns it. Raises AwayError."""
        try:
            text = str(cluster.call("get_job_logs", attempt.id))
        except AwayError:
            raise
        except RuntimeError as error:
            text = f"(no log: {error})"
        self.folder.write_bytes(f"{attempt.stage}-a{attempt.number}.log", text.encode())
        return text

    def next_number(self, stage: str, jobs: Iterable[str]) -> int:
        """One above every attempt at a stage that has a log here, or is among the ids of some jobs."""
        pattern = re.compile(rf"{re.escape(stage)}-a(\d+)(\.log)?$")
        known = [*(entry.name for entry in self.folder.files()), *jobs]
        return 1 + max((int(found[1]) for one in known if (found := pattern.search(one))), default=0)


def tail(text: str) -> str:
    """The last lines of a log, set in."""
    return "\n".join(f"    {line}" for line in text.splitlines()[-LAST_LINES:])
