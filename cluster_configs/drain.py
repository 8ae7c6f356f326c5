"""What a pod does before it ends (preStop): has Ray send nothing more to this node, then lets trainings on it leave
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

from paris_ray.training import termination

HEAD_S = 10.0
"""How long trainings wait for the head's answer."""
WORKER, REPLICA = "ray::RayTrainWorker", "ray::ServeReplica:"
"""How Ray calls the processes that train, and those that serve."""


def main(argv: Sequence[str] | None = None) -> int:
    """Drain; returns the exit code, 2 outside a pod, where processes of others would be ended."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.drain", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=int, required=True, help="until the pod is killed, a little less than its terminationGracePeriodSeconds")
    args = parser.parse_args(argv)
    if termination.IN_POD not in os.environ:
        print(
            f"{parser.prog}: this is no pod of Kubernetes, and the trainings that run here are not all of one that ends; stop them by their jobs",
            file=sys.stderr,
        )
        return 2
    deadline = time.monotonic() + args.seconds
    # First the head, else Train would place the worker here again. The command takes seconds to start; one that does not end stops no checkpoint.
    asking = ask_head(args.seconds)
    # They do on a SIGTERM what they do on a cloud's notice, within the seconds that are left.
    trainings = processes(WORKER)
    termination.told(deadline)
    for process in trainings:
        process.terminate()
    # Replicas are ended by Serve, once they have finished what they had begun.
    psutil.wait_procs([*trainings, *processes(REPLICA)], timeout=max(0.0, deadline - time.monotonic()))
    if asking is not None and asking.poll() is None:
        asking.kill()
    return 0


def processes(title: str) -> list[psutil.Process]:
    """Of this pod, by the beginning of their titles."""
    return [one for one in psutil.process_iter(["cmdline"]) if (one.info["cmdline"] or [""])[0].startswith(title)]


def ask_head(seconds: int) -> subprocess.Popen[bytes] | None:
    """Tell the head that this node goes, and wait :data:`HEAD_S` for its answer; what is against it is printed."""
    reason = ["--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "the pod ends"]
    try:
        asking = subprocess.Popen(["ray", "drain-node", *reason, "--deadline-remaining-seconds", str(seconds)])
        if code := asking.wait(HEAD_S):
            print(f"ray drain-node ended with {code}", file=sys.stderr)
    except subprocess.TimeoutExpired:
        print(f"ray drain-node has not ended after {HEAD_S:.0f} s; trainings are ended meanwhile", file=sys.stderr)
    except OSError as error:
        print(f"ray drain-node: {error}", file=sys.stderr)
        return None
    return asking


if __name__ == "__main__":
    sys.exit(main())
