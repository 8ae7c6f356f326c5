"""What a machine is like: the facts that :mod:`jobs.doctor` judges, gathered on the spot. Imports neither Ray nor torch until it is asked.

python -m jobs.facts

Prints this machine's facts as JSON; as a job of a Ray cluster (with ``RAY_ADDRESS``), those of all its nodes, each asked by an actor there.
"""

from __future__ import annotations

import argparse
import email.utils
import hashlib
import importlib.metadata
import importlib.util
import ipaddress
import json
import os
import platform
import re
import resource
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import time
import tomllib
import urllib.error
import urllib.request
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from paris_ray.storage import Folder

PROJECT = Path(__file__).resolve().parent.parent
MARK = "PARIS-RAY-FACTS "
"""What the line begins with in which a job tells its facts."""
NODE_SECONDS = 120.0
"""How long a node may take to answer; on a busy one its worker starts for half a minute."""
PROBE_BYTES = 16 << 20
STORE_HOSTS = {"gs": "https://storage.googleapis.com", "gcs": "https://storage.googleapis.com", "hf": "https://huggingface.co"}


def main(argv: Sequence[str] | None = None) -> int:
    """Print the facts; returns 0."""
    parser = argparse.ArgumentParser(prog="python -m jobs.facts", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", metavar="URI", help="a run directory, in which a file is written, read and deleted")
    args = parser.parse_args(argv)
    found = {"nodes": cluster() if os.environ.get("RAY_ADDRESS") else [node()], "store": store(args.store) if args.store else None}
    print(f"{MARK}{json.dumps(found)}", flush=True)
    return 0


# -- nodes --------------------------------------------------------------------------------------------------------------


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
        "processes": resource.getrlimit(resource.RLIMIT_NPROC)[0],
        "auth_mode": os.environ.get("RAY_AUTH_MODE"),
        "public_addresses": public_addresses(),
        "open_ports": open_ports(),
        "object_store": None,
        "clock_offset": 0.0,
        "clock_error": 0.0,
    }


def cluster() -> list[dict[str, Any]]:
    """The facts of all nodes of the Ray cluster that ``RAY_ADDRESS`` names; one that does not answer has ``error`` instead."""
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

    alive = [one for one in ray.nodes() if one["Alive"]]
    actor = ray.remote(num_cpus=0)(Asked)
    actors = [actor.options(scheduling_strategy=NodeAffinitySchedulingStrategy(one["NodeID"], soft=False)).remote() for one in alive]
    asked, found = [one.facts.remote() for one in actors], []
    for one, handle, answer in zip(alive, actors, asked, strict=True):
        name = f"{one['NodeManagerHostname']} ({one['NodeID'][:8]})"
        try:
            facts = ray.get(answer, timeout=NODE_SECONDS)
            # Of three questions the one that came back fastest: the other clock is known to half of that.
            took, offset = min(_asked_clock(lambda handle=handle: ray.get(handle.now.remote(), timeout=NODE_SECONDS)) for _ in range(3))
            facts |= {"node": name, "clock_offset": offset, "clock_error": took / 2}
            facts["object_store"] = int(one["Resources"].get("object_store_memory", 0))
            facts["gpus"] = max(facts["gpus"], int(one["Resources"].get("GPU", 0)))
        except (ray.exceptions.RayError, TimeoutError) as error:
            facts = {"node": name, "error": (str(error).strip() or type(error).__name__).splitlines()[0]}
        found.append(facts)
    return found


def _asked_clock(ask: Any) -> tuple[float, float]:
    """For how long somebody was asked, and how far their clock is ahead of ours."""
    before = time.time()
    theirs = ask()
    after = time.time()
    return after - before, theirs - (before + after) / 2


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


def public_addresses() -> list[str]:
    """Addresses of this machine that the whole internet can route to."""
    found = [address.address.partition("%")[0] for addresses in psutil.net_if_addrs().values() for address in addresses]
    return sorted({one for one in found if is_public(one)})


def is_public(host: str) -> bool:
    """Whether a host is given as an address that the whole internet can route to."""
    try:
        return ipaddress.ip_address(host).is_global
    except ValueError:
        return False


def open_ports() -> list[dict[str, Any]]:
    """Where this user's processes of Ray listen, and not on loopback alone."""
    found = {}
    for process in psutil.process_iter():
        try:
            name = " ".join(process.cmdline()[:3])
            if not re.search(r"gcs_server|raylet|dashboard|ray::|ray\b", name):
                continue
            for one in process.net_connections("tcp"):
                ip = one.laddr.ip.removeprefix("::ffff:") if one.laddr else ""
                if one.status == psutil.CONN_LISTEN and not ipaddress.ip_address(ip).is_loopback:
                    found[ip, one.laddr[1]] = process.name()
        except (psutil.Error, OSError, ValueError):
            continue
    return [{"ip": ip, "port": port, "process": process} for (ip, port), process in sorted(found.items())]


# -- the store ----------------------------------------------------------------------------------------------------------


def store(uri: str, size: int = PROBE_BYTES) -> dict[str, Any]:
    """What a store does with a file of ``size`` bytes, which is written, read back, and deleted; and what time it is there."""
    found: dict[str, Any] = {"uri": uri, "bytes": size, "step": "open", "error": None, "offset": None}
    data = os.urandom(size)
    name = f"_doctor-{uuid.uuid4().hex}"
    try:
        folder = Folder(uri)
        found["step"], made = "look", not folder.exists()
        found["step"] = "write"
        try:
            found["write_s"] = _timed(lambda: folder.write_bytes(name, data))
            found["step"] = "read"
            read: list[str] = []
            found["read_s"] = _timed(lambda: read.append(folder.sha256(name)))
            found["same"] = read[0] == hashlib.sha256(data).hexdigest()
        finally:
            if found["step"] == "read":
                found["step"] = "delete"
                folder.delete(name)
                if made and folder.is_local:
                    os.rmdir(folder.path)
        found["deleted"] = not folder.exists(name)
        found["step"] = "done"
    except Exception as error:  # whatever a store's library raises is what there is to say
        found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]
    found["offset"] = store_clock(uri)
    return found


def _timed(act: Any) -> float:
    before = time.monotonic()
    act()
    return time.monotonic() - before


def store_clock(uri: str, timeout: float = 5.0) -> float | None:
    """How far the clock of an object store is ahead of ours, from the Date of any answer, be it a refusal; ``None`` if it tells none."""
    scheme, _, rest = uri.partition("://")
    if scheme in ("s3", "s3a"):
        region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1"
        url = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or f"https://s3.{region}.amazonaws.com"
    elif scheme in ("abfs", "abfss", "az"):
        account = re.search(r"@([^/]+)", rest)
        name = os.environ.get("AZURE_STORAGE_ACCOUNT_NAME") or os.environ.get("AZURE_STORAGE_ACCOUNT")
        url = f"https://{account[1]}" if account else f"https://{name}.blob.core.windows.net" if name else ""
    else:
        url = STORE_HOSTS.get(scheme, "")
    if not url:
        return None

    def ask() -> float:
        try:
            with urllib.request.urlopen(urllib.request.Request(url, method="HEAD"), timeout=timeout) as answer:
                said = answer.headers["Date"]
        except urllib.error.HTTPError as error:
            said = error.headers["Date"]
        return email.utils.parsedate_to_datetime(said).timestamp() + 0.5  # it counts whole seconds

    try:
        return _asked_clock(ask)[1]
    except (OSError, TypeError, ValueError):
        return None


# -- tokens and ports ---------------------------------------------------------------------------------------------------


def token_file() -> Path | None:
    """The file that Ray's clients would take their token from; ``None`` where ``RAY_AUTH_TOKEN`` holds it."""
    if os.environ.get("RAY_AUTH_TOKEN"):
        return None
    return Path(os.environ.get("RAY_AUTH_TOKEN_PATH") or "~/.ray/auth_token").expanduser()


def token() -> str | None:
    """The token that Ray's clients would take here, ``None`` without one."""
    path = token_file()
    return os.environ["RAY_AUTH_TOKEN"] if path is None else read_token(path)


def read_token(path: str | Path) -> str | None:
    """What a file of a token holds, ``None`` if that cannot be read."""
    try:
        return Path(path).expanduser().read_text().strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def token_of_file(path: Path) -> dict[str, Any]:
    """Whose a file of a token is, who may read it, and what is in it: ``state`` is ``there``, ``absent``, ``unreadable`` or ``empty``."""
    found: dict[str, Any] = {"path": str(path), "state": "there", "mode": None, "own": None}
    try:
        info = path.stat()
        found |= {"mode": stat.S_IMODE(info.st_mode), "own": info.st_uid == os.getuid()}
        if not path.read_text().strip():
            found["state"] = "empty"
    except FileNotFoundError:
        found["state"] = "absent"
    except (OSError, UnicodeDecodeError):
        found["state"] = "unreadable"
    return found


def dashboard(address: str, token: str | None, timeout: float = 10.0) -> dict[str, Any]:
    """What a dashboard answers to a question about its jobs: with no token, a wrong one, ours. Codes of HTTP, or why none came."""

    def ask(told: str | None) -> int | str:
        headers = {} if told is None else {"Authorization": f"Bearer {told}"}
        try:
            with urllib.request.urlopen(urllib.request.Request(f"{address.rstrip('/')}/api/jobs/", headers=headers), timeout=timeout) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as error:
            return error.code
        except OSError as error:
            return str(getattr(error, "reason", error))

    return {"address": address, "without": ask(None), "wrong": ask(uuid.uuid4().hex * 2), "ours": ask(token) if token else None}


def port(number: int) -> dict[str, Any]:
    """Who listens at a port of this machine: ``holder`` is ``None`` for nobody, else the process, or ``somebody``."""
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            one.bind(("127.0.0.1", number))
            return {"port": number, "holder": None, "ray": False}
        except OSError:
            pass
    holder, ray = "somebody", False
    try:
        for found in psutil.net_connections("tcp"):
            if found.status == psutil.CONN_LISTEN and found.laddr and found.laddr[1] == number and found.pid:
                process = psutil.Process(found.pid)
                holder, ray = f"{process.name()} (process {found.pid})", bool(re.search(r"gcs_server|raylet|ray[/:.]", " ".join(process.cmdline())))
                break
    except psutil.Error:
        pass
    return {"port": number, "holder": holder, "ray": ray}


# -- quotas -------------------------------------------------------------------------------------------------------------

AWS_QUOTAS = {"L-DB2E81BA": "on-demand G and VT", "L-3819A6DF": "spot G and VT", "L-417A185B": "on-demand P", "L-7212CCBC": "spot P4, P3 and P2"}
"""EC2's quotas of vCPUs by their codes."""


def quotas(cloud: str) -> dict[str, float] | str:
    """What a cloud lets this account have at once, by name; or why it was not asked."""
    if cloud != "aws":
        return f"no reader for {cloud}'s quotas; look at them in its console"
    try:
        import boto3
    except ImportError:
        return "boto3 is not installed here"
    try:
        client = boto3.client("service-quotas")
        return {name: float(client.get_service_quota(ServiceCode="ec2", QuotaCode=code)["Quota"]["Value"]) for code, name in AWS_QUOTAS.items()}
    except Exception as error:  # no region, no credentials, no right to ask: botocore has a class for each
        return f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]


if __name__ == "__main__":
    sys.exit(main())
