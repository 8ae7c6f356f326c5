"""What a machine is like: the facts that :mod:`jobs.doctor` judges, gathered on the spot. Imports neither Ray nor torch until it is asked.

python -m jobs.facts

Prints this machine's facts as JSON; as a job of a Ray cluster (with ``RAY_ADDRESS``), those of all its nodes, each asked by an actor there, and
what each sees of a run's store.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import resource
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from jobs import access_facts, store_facts

PROJECT = Path(__file__).resolve().parent.parent
MARK = "PARIS-RAY-FACTS "
"""What the line begins with in which a job tells its facts."""
NODE_SECONDS = 120.0
"""How long a node may take to answer; on a busy one its worker starts for half a minute."""
STORE_SECONDS = 180.0
"""How long a node may take to write and read its file: a store that is away is asked again for a minute and a half."""
SMALL_BYTES = 1000
"""What nodes write to a store but one, which measures it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m jobs.facts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="URI", help="a run directory, in which each node writes, reads and deletes a file")
    parser.add_argument("--within", default="", metavar="FOLDER/", help="in this part of it")
    parser.add_argument("--mark", metavar="NAME", help="a file that must be there")
    args = parser.parse_args(argv)
    probe = (args.store, args.within, args.mark) if args.store else None
    if os.environ.get("RAY_ADDRESS"):
        found = cluster(probe)
    else:
        seen = store_facts.store(args.store, folder=args.within, mark=args.mark) if args.store else None
        found = {"nodes": [{**node(), "store": seen}], "scales": False}
    print(f"{MARK}{json.dumps(found)}", flush=True)
    return 0


def node() -> dict[str, Any]:
    """The facts of this machine, as JSON."""
    memory, shm, temp = psutil.virtual_memory(), _disk("/dev/shm"), _disk(tempfile.gettempdir())
    return {
        "node": socket.gethostname(),
        "python": platform.python_version(),
        "pins": pins(),
        "packages": packages(),
        "torch_cuda": torch_cuda(),
        "driver": driver(),
        "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        "memory": memory.total,
        "memory_free": memory.available,
        "disk": temp,
        "shm": shm,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "open_files_most": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "processes": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
        "cloud": cloud(),
        "public_addresses": access_facts.public_addresses(),
        "open_ports": access_facts.open_ports(),
        "object_store": None,
        "store": None,
        "clock_offset": 0.0,
        "clock_error": 0.0,
    }


def cluster(probe: tuple[str, str, str | None] | None = None) -> dict[str, Any]:
    """The facts of all nodes of the Ray cluster that ``RAY_ADDRESS`` names, and whether it has an autoscaler (``scales``).

    Args:
        probe: a run directory, the part of it in which to write, and a file that must be there: each node looks (``store``), and the first measures.

    A node that does not answer has ``error`` instead.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    from jobs import cli

    cli.connect()

    class Asked:
        """On a node."""

        def facts(self) -> dict[str, Any]:
            return node()

        def now(self) -> float:
            return time.time()

        def store(self, uri: str, size: int, folder: str, mark: str | None) -> dict[str, Any]:
            return store_facts.store(uri, size, folder, mark)

    alive = [one for one in ray.nodes() if one["Alive"]]
    actor = ray.remote(num_cpus=0)(Asked)
    actors = [actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)).remote() for one in alive]
    asked, found = [one.facts.remote() for one in actors], []
    for one, handle, answer in zip(alive, actors, asked, strict=True):
        name = f"{one['NodeManagerHostname']} ({one['NodeID'][:8]})"
        try:
            facts = ray.get(answer, timeout=NODE_SECONDS)
            # Of three questions the one that came back fastest: the other clock is known to half of that.
            took, offset = min(store_facts.asked_clock(lambda handle=handle: ray.get(handle.now.remote(), timeout=NODE_SECONDS)) for _ in range(3))
            facts |= {"node": name, "clock_offset": offset, "clock_error": took / 2}
            facts["object_store"] = int(one["Resources"].get("object_store_memory", 0))
            facts["gpus"] = max(facts["gpus"], int(one["Resources"].get("GPU", 0)))
        except (ray.exceptions.RayError, TimeoutError) as error:
            facts = {"node": name, "error": (str(error).strip() or type(error).__name__).splitlines()[0]}
        found.append(facts)
    answering = [(handle, facts) for handle, facts in zip(actors, found, strict=True) if "error" not in facts]
    for some, size in ((answering[:1], store_facts.PROBE_BYTES), (answering[1:], SMALL_BYTES)):
        uri, folder, mark = probe or ("", "", None)
        seen = [handle.store.remote(uri, size, folder, mark) for handle, _ in some] if probe else []
        for (_, facts), one in zip(some, seen, strict=False):
            try:
                facts["store"] = ray.get(one, timeout=STORE_SECONDS)
            except (ray.exceptions.RayError, TimeoutError) as error:
                facts["store"] = {"uri": uri, "step": "ask", "error": f"{type(error).__name__} in {STORE_SECONDS:.0f} s", "offset": None}
    return {"nodes": found, "scales": _scales()}


def _scales() -> bool:
    """Whether an autoscaler has told the cluster of itself."""
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    reply = GetClusterStatusReply()
    reply.ParseFromString(ray._raylet.GcsClient(address=ray.get_runtime_context().gcs_address).get_cluster_status(timeout_s=10))
    return bool(reply.HasField("autoscaling_state"))


def cloud() -> str | None:
    """Whose machine this is, as its firmware says it, where that is a cloud's: there a public address is on no interface of the machine."""
    try:
        vendor = Path("/sys/class/dmi/id/sys_vendor").read_text().strip()
    except OSError:
        return None
    return vendor if re.search(r"Amazon|Google|Microsoft", vendor) else None


def pins() -> dict[str, str]:
    """The versions in ``constraints.txt`` of what the project itself depends on, for this Python."""
    from packaging.requirements import Requirement

    try:
        asked, lines = (PROJECT / "pyproject.toml").read_text(), (PROJECT / "constraints.txt").read_text().splitlines()
    except FileNotFoundError:  # installed without the project's folder
        return {}
    names = {_canonical(Requirement(one).name) for one in tomllib.loads(asked)["project"]["dependencies"]}
    found = {}
    for line in lines:
        text = line.partition(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        one = Requirement(text)
        if _canonical(one.name) in names and (one.marker is None or one.marker.evaluate()):
            found[_canonical(one.name)] = next(iter(one.specifier)).version
    return found


def packages() -> dict[str, str | None]:
    """The versions that are installed of what is pinned; without the build of a wheel (``+cu132``), which differs by the machine's GPU."""
    found: dict[str, str | None] = {}
    for name in pins():
        try:
            found[name] = importlib.metadata.version(name).partition("+")[0]
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def torch_cuda() -> str | None:
    """The CUDA that torch was built with, ``None`` for none; torch is not imported."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.submodule_search_locations:
        return None
    text = (Path(next(iter(spec.submodule_search_locations))) / "version.py").read_text()
    found = re.search(r"^cuda\b[^=\n]*=\s*['\"]([\d.]+)['\"]", text, re.M)
    return found[1] if found else None


def driver() -> str | None:
    """The version of NVIDIA's driver, ``None`` without one."""
    tool = shutil.which("nvidia-smi")
    if tool:
        told = subprocess.run([tool, "--query-gpu=driver_version", "--format=csv,noheader"], capture_output=True, text=True, timeout=60, check=False)
        if told.returncode == 0 and (lines := told.stdout.split()):
            return lines[0]
    try:
        found = re.search(r"\b(\d{3}\.\d[\d.]*)\b", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return found[1] if found else None


def _disk(path: str) -> dict[str, Any]:
    try:
        usage = shutil.disk_usage(path)
    except OSError:
        return {"path": path, "total": 0, "free": 0}
    return {"path": path, "total": usage.total, "free": usage.free}


if __name__ == "__main__":
    sys.exit(main())
