"""Trainings that have moved to another cluster, while their jobs in the old one leave a checkpoint. Nobody waits for them but their own stages."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from jobs.clusters import ENDED, AwayError, Cluster
from paris_ray.training import stopping


@dataclass
class Leaving:
    """Such a job.

    Attributes:
        stage: what it trains.
        cluster: the name of the one where it runs.
        until: on the monotonic clock, after which it is ended.
    """

    stage: str
    cluster: str
    until: float = field(default_factory=lambda: time.monotonic() + stopping.CHECKPOINT_S)


class Departures(dict[str, Leaving]):
    """Jobs that leave, by their ids in their clusters."""

    def see_off(self, clusters: Mapping[str, Cluster]) -> None:
        """Forget the jobs that have gone, and end those that take too long. Where nobody answers for as long, they count as gone."""
        for job, one in list(self.items()):
            late = time.monotonic() > one.until
            try:
                gone = clusters[one.cluster].status(job) in ENDED
                if late and not gone:
                    clusters[one.cluster].end(job)
            except AwayError:
                gone = False
            if gone or late:
                del self[job]

    def stages(self) -> set[str]:
        """The stages that cannot start yet."""
        return {one.stage for one in self.values()}

    def notes(self, clusters: Mapping[str, Cluster]) -> list[str]:
        """For people."""
        return [f"{one.stage} leaves {clusters[one.cluster].label}" for one in self.values()]
