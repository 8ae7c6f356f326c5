"""What a pod does before it ends (preStop): has Ray send nothing more to this node, and lets trainings on it leave
their checkpoints, and replicas of Serve finish.

python -m cluster_configs.drain --seconds 100
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil

WORKER, REPLICA = "ray::RayTrainWorker", "ray::ServeReplica:"
"""How Ray calls the processes that train, and those that serve."""


def main(argv: Sequence[str] | None = None) -> int:
    """Drain; returns the exit code, 2 outside a pod, where processes of others would be ended."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.drain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, required=True, help="until the pod is killed, a little less than its terminationGracePeriodSeconds")
    args = parser.parse_args(argv)
    if "KUBERNETES_SERVICE_HOST" not in os.environ:
        print(
            f"{parser.prog}: this is no pod of Kubernetes, and the trainings that run here are not all of one that ends; stop them by their jobs",
            file=sys.stderr,
        )
        return 2
    deadline = time.monotonic() + args.seconds
    # Trainings first: a checkpoint takes longer than Ray's answer. They do on a SIGTERM what they do on a cloud's notice.
    trainings = processes(WORKER)
    for process in trainings:
        process.terminate()
    drain(args.seconds)
    # Replicas are ended by Serve, once they have finished what they had begun.
    psutil.wait_procs([*trainings, *processes(REPLICA)], timeout=max(0.0, deadline - time.monotonic()))
    return 0


def processes(title: str) -> list[psutil.Process]:
    """Of this pod, by the beginning of their titles."""
    return [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[0].startswith(title)]


def drain(seconds: int) -> None:
    """Tell the head that this node goes; what Ray says against it is printed."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod ends"]
    try:
        subprocess.run(["ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds)], timeout=seconds, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        print(f"ray drain-node: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
