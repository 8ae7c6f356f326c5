"""One submitted job of a stage, and what starts it."""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from paris_ray import stages


@dataclass
class Attempt:
    """One submitted job."""

    stage: str
    number: int
    id: str
    since: float = field(default_factory=time.time)
    rebuild: bool = False
    fallback: bool = False
    told: bool = False  # that it waits for machines

    def command(self, config: str, arguments: Sequence[str]) -> str:
        """What follows ``python -m`` in its entrypoint.

        Args:
            config: where the job finds the run's config.
            arguments: further ones.
        """
        own = [*(["--fallback"] if self.fallback else []), *(["--rebuild", self.stage] if self.rebuild else [])]
        return shlex.join([*module(self.stage), "--config", config, *arguments, *own])


def module(name: str) -> list[str]:
    """The job script of a stage with its own arguments."""
    if name.startswith("expert-"):
        return ["jobs.train_expert", "--expert", name.removeprefix("expert-")]
    if name == stages.CONTROL_ROUTER:
        return ["jobs.train_router", "--control"]
    return ["jobs.train_router"] if name == "router" else [f"jobs.{name}"]
