"""What is asked of Ray for a worker, so that a node is not given more of them than its memory holds."""

from __future__ import annotations

import logging

PROCESS_BYTES = 512 << 20
"""Memory of a worker beside its data: Python with its libraries, and what it computes with."""


def memory(size: int) -> int:
    """Bytes to ask for, for a worker that takes ``size`` at most beside its process.

    No more than the largest node of the cluster has: what fits nowhere would wait for ever, and what a worker may take is not what it takes.
    """
    import ray

    nodes = [int(node["Resources"].get("memory", 0)) for node in ray.nodes() if node["Alive"]]
    return min(PROCESS_BYTES + size, max(nodes, default=0) or PROCESS_BYTES + size)


def quiet() -> None:
    """Progress is reported once, by the stage; Ray Data's warnings (no resources, slow workers) are kept."""
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # it warns of bars that are off
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
