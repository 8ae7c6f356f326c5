"""What a run's trainings have cost so far, from the bills that they write."""

from __future__ import annotations

import contextlib

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.storage import Folder
from paris_ray.training.machines import read_bill


class Spending:
    """Reads the bills.

    Args:
        config: the run's.
        events: ``RUN/events``.
    """

    def __init__(self, config: RunConfig, events: Folder):
        self._config, self._events = config, events
        self._costs: dict[str, float] = {}  # as last read

    def total(self) -> float:
        """Money, over all starts of all trainings; of a bill that cannot be read now, what it last said."""
        for name in filter(stages.trains, stages.names(self._config)):
            with contextlib.suppress(OSError, ValueError):
                self._costs[name] = read_bill(self._events, name)["cost"] or 0.0
        return sum(self._costs.values())
