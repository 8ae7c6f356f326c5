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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from jobs import access_facts, store_facts
from paris_ray import host_memory

T = TypeVar("T")

PROJECT = Path(__file__).resolve().parent.parent
MARK = "PARIS-RAY-FACTS "
"""What the lines begin with in which a job tells its facts."""
NODES_SECONDS = 120.0
"""How long the nodes may take to answer, all of them together; on a busy one its worker starts for half a minute."""
CLOCK_SECONDS = 5.0
"""How long one that has answered may take to say what time it is."""
STORE_SECONDS = 150.0
"""How long nodes may take to write and read a file, first the one that measures, then the others together: a store that is away is asked again for a
minute and a half."""
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
        cluster(tell, probe)
    else:
        seen = store_facts.store(args.store, folder=args.within, mark=args.mark) if args.store else None
        tell({"nodes": [{**node(), "store": seen}], "scales": False})
    return 0


def tell(found: dict[str, Any]) -> None:
    """Print some facts."""
    print(f"{MARK}{json.dumps(found)}", flush=True)


def heard(said: str) -> dict[str, Any] | None:
    """All facts that a job has told, from what it printed; ``None`` for none."""
    lines = [json.loads(line.removeprefix(MARK)) for line in said.splitlines() if line.startswith(MARK)]
    nodes = {one["node"]: one for line in lines for one in line["nodes"]}
    return {"nodes": list(nodes.values()), "scales": lines[-1]["scales"]} if lines else None


def node() -> dict[str, Any]:
    """The facts of this machine, as JSON."""
    (memory, memory_free), shm, temp = host_memory.memory(), _disk("/dev/shm"), _disk(tempfile.gettempdir())
    return {
        "node": socket.gethostname(),
        "python": platform.python_version(),
        "pins": pins(),
        "packages": packages(),
        "torch_cuda": torch_cuda(),
        "driver": driver(),
        "gpus": len(list(Path("/proc/driver/nvidia/gpus").glob("*"))),
        "memory": memory,
        "memory_free": memory_free,
        "disk": temp,
        "shm": shm,
        "open_files": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        "open_files_most": resource.getrlimit(resource.RLIMIT_NOFILE)[1],
        "processes": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
        "web_identity": access_facts.web_identity(),
        "cloud": cloud(),
        "public_addresses": access_facts.public_addresses(),
        "open_ports": access_facts.open_ports(),
        "object_store": None,
        "store": None,
        "clock_offset": 0.0,
        "clock_error": 0.0,
    }


def cluster(tell: Callable[[dict[str, Any]], None], probe: tuple[str, str, str | None] | None = None) -> None:
    """Tell the facts of all nodes of the Ray cluster that ``RAY_ADDRESS`` names, and whether it has an autoscaler (``scales``).

    They are told as they come, so that whatever comes after, so much is known: first that there are such nodes, then what each is like, then what it
    sees of the store. What is told later of a node takes the place of what was told before. One that has not answered has ``error`` instead.

    Args:
        tell: called with ``nodes``, some of them, and ``scales``.
        probe: a run directory, the part of it in which to write, and a file that must be there: each node looks (``store``), and the first measures.
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

    scales, actor, asked, lost = _scales(), ray.remote(num_cpus=0)(Asked), {}, (ray.exceptions.RayError, TimeoutError)
    for one in ray.nodes():
        if one["Alive"]:
            handle = actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)).remote()
            asked[handle.facts.remote()] = (one, handle, f"{one['NodeManagerHostname']} ({one['NodeID'][:8]})")
    tell({"nodes": [{"node": name, "error": f"it has not answered in {NODES_SECONDS:.0f} s"} for _, _, name in asked.values()], "scales": scales})

    answering: list[tuple[Any, dict[str, Any]]] = []
    uri, folder, mark = probe or ("", "", None)
    unseen = {"uri": uri, "step": "ask", "error": f"no answer in {STORE_SECONDS:.0f} s", "offset": None} if probe else None
    for (one, handle, name), answer in as_they_come(asked, NODES_SECONDS):
        try:
            told = ray.get(answer)
            # Of three questions the one that came back fastest: the other clock is known to half of that.
            took, offset = min(store_facts.asked_clock(lambda handle=handle: ray.get(handle.now.remote(), timeout=CLOCK_SECONDS)) for _ in range(3))
            told |= {"node": name, "clock_offset": offset, "clock_error": took / 2, "store": unseen}
            told["object_store"] = int(one["Resources"].get("object_store_memory", 0))
            told["gpus"] = max(told["gpus"], int(one["Resources"].get("GPU", 0)))
            answering.append((handle, told))
        except lost as error:
            told = {"node": name, "error": _said(error)}
        tell({"nodes": [told], "scales": scales})
    for some, size in ((answering[:1], store_facts.PROBE_BYTES), (answering[1:], SMALL_BYTES)) if probe else ():
        looking = {handle.store.remote(uri, size, folder, mark): told for handle, told in some}
        for told, answer in as_they_come(looking, STORE_SECONDS):
            try:
                told["store"] = ray.get(answer)
            except lost as error:
                told["store"] = {**told["store"], "error": _said(error)}
            tell({"nodes": [told], "scales": scales})


def as_they_come(asked: dict[Any, T], seconds: float) -> Iterator[tuple[T, Any]]:
    """What was asked, each with its answer's reference as soon as that is there; those that take longer than ``seconds`` from now never come."""
    import ray

    deadline = time.monotonic() + seconds
    while asked and (ready := ray.wait(list(asked), timeout=max(0.0, deadline - time.monotonic()))[0]):
        yield asked.pop(ready[0]), ready[0]


def _said(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


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
