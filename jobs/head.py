"""The head process of a :class:`jobs.local_cluster.LocalCluster`: what ``ray start --head --block`` does, on loopback only and in half the time.

``ray start`` replaces 127.0.0.1 by the machine's own address, always opens the Ray client's port and imports four seconds of command line
first, hence the node is started as :class:`ray.cluster_utils.Cluster` does it. The other processes die with this one, however it dies.
"""

from __future__ import annotations

import contextlib
import json
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

OPEN_FILES = 65536


def main(argv: list[str], **more: Any) -> int:
    """Start the node that ``argv[0]`` (a JSON file) describes, write its addresses beside it, and keep it up until SIGTERM.

    Args:
        argv: arguments.
        more: other parameters of the node, Ray's ``RayParams``.
    """
    from ray._private.node import Node
    from ray._private.parameter import RayParams
    from ray._private.utils import write_ray_address

    spec = Path(argv[0])
    wanted = json.loads(spec.read_text())
    many_files()
    ports = free_ports(4)
    params = RayParams(
        node_ip_address="127.0.0.1",
        node_name="127.0.0.1",
        # Port 0: the system chooses, so two clusters never meet. The agents' are chosen here, see announce.
        gcs_server_port=0,
        dashboard_host="127.0.0.1",
        dashboard_port=wanted["port"],
        dashboard_agent_listen_port=ports[0],
        metrics_agent_port=ports[1],
        metrics_export_port=ports[2],
        runtime_env_agent_port=ports[3],
        min_worker_port=0,
        max_worker_port=0,
        num_cpus=wanted["num_cpus"],
        object_store_memory=wanted["object_store_bytes"],
        temp_dir=str(spec.parent / "ray"),
        include_dashboard=True,
        # The autoscaler's monitor has nothing to do here.
        no_monitor=True,
    )
    params.update(**more)
    threading.Thread(target=announce, args=(spec.parent / "ray", ports[0]), daemon=True).start()
    node = Node(params, head=True, shutdown_at_exit=True, spawn_reaper=True)
    # Where jobs learn it; without the file they would be told the address of any Ray on this machine.
    write_ray_address(node.gcs_address, params.temp_dir)

    def stop(*_: object) -> None:
        # The exit hook of Node ends what it started.
        sys.exit(0)

    signal.signal(signal.SIGTERM, stop)
    write_whole(spec.with_name("ready.json"), json.dumps({"gcs": node.gcs_address, "dashboard": node.webui_url}))
    while node.remaining_processes_alive():
        time.sleep(1.0)
    print("a process of the cluster has died; ending the others", file=sys.stderr)
    return 1


def many_files() -> None:
    """Let this process and those that it starts open as many files as they may, as ``ray.init`` does: shells of most systems leave them 1024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def announce(temp_dir: Path, port: int) -> None:
    """Tell the raylet the dashboard agent's port in the agent's stead.

    The raylet waits at most 15 seconds for the file in which a starting agent leaves its port, then dies; on a busy machine the agent's imports
    alone take longer. The port is given, so the file can be there before the agent.
    """
    known = "gcs_server_port_"
    while not (found := list(temp_dir.glob(f"session_*/{known}*"))):
        time.sleep(0.05)
    node_id = found[0].name.removeprefix(known)
    write_whole(found[0].with_name(f"dashboard_agent_listen_port_{node_id}"), str(port))


def write_whole(path: Path, text: str) -> None:
    """Write a small file that readers find whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(text)
    partial.rename(path)


def free_ports(count: int) -> list[int]:
    """Ports of the loopback device that nobody listens on."""
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in sockets]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
