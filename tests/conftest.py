"""One Ray cluster per test module that asks for it; threads capped; authentication explicit."""

from __future__ import annotations

import os
import secrets

# Before torch or NumPy is imported anywhere.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ[_name] = "1"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["HF_HUB_OFFLINE"] = "1"
# A busy machine of two cores needs longer than Ray's half minute to start.
os.environ["RAY_raylet_start_wait_time_s"] = "180"  # noqa: SIM112, Ray spells it so
# Explicit: an unset mode would be switched to tokens by the first ray.init, but not in its clients.
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def process_as_it_was() -> Iterator[None]:
    """What a training worker sets for its process does not outlast the test that ran one in this process."""
    before = sys.modules.get("torch")
    threads, deterministic = (before.get_num_threads(), before.are_deterministic_algorithms_enabled()) if before else (1, False)
    yield
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
        # With denormal numbers flushed the sums of k-means have other last bits, and hypothesis refuses to draw.
        torch.set_flush_denormal(False)


@pytest.fixture(scope="module")
def ray_local() -> Iterator[None]:
    """A real local Ray with two CPUs and no dashboard, shared by the tests of one module."""
    import ray

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()
