"""What is wrong with nodes, from their facts (:mod:`jobs.facts`) alone: a function for each question."""

from __future__ import annotations

from collections.abc import Iterator

from jobs.findings import Facts, Finding, asks_for_gpus, fault

MEMORY = 4 << 30
"""What the smallest run takes, with Ray."""
DISK, DISK_SHARE = 10 << 30, 0.05
"""Free beside Ray's files. Ray makes no object on a disk that is fuller than 95 %."""
OBJECT_STORE = 256 << 20
"""Blocks of a corpus are up to 128 MB, and two are held at once."""
OPEN_FILES, PROCESSES = 8192, 4096
SKEW_S = 5.0
"""Leases of locks are told by the clocks of two nodes, and stores refuse requests that are minutes old."""
STORE_SKEW_S = 60.0
DRIVERS = {11: 450, 12: 525, 13: 580}
"""The least driver for each CUDA."""


def reached(facts: Facts) -> Iterator[Finding]:
    """Whether every cluster has told, and every node of it."""
    for name, why in facts.silent.items():
        yield fault(
            "nodes",
            name,
            why,
            "a cluster that is asked tells what its nodes are like",
            "read why it did not; `ray list nodes` and `ray job logs` on its head say more",
        )
    for name, nodes in facts.nodes.items():
        for one in nodes:
            if "error" in one:
                yield fault(
                    "nodes",
                    one["node"],
                    one["error"],
                    "every node that is alive runs a task",
                    "look at the logs of the node; end it, and let the autoscaler or `ray start` bring another",
                )
        yield Finding("nodes", name, f"{sum('error' not in one for one in nodes)} of {len(nodes)} told")


def versions(facts: Facts) -> Iterator[Finding]:
    """Whether Python and packages are the same on all nodes, and the pinned ones."""
    nodes = list(facts.all_nodes())
    for one in nodes if facts.here else ():
        if facts.nodes and (theirs := one["packages"].get("ray")) != (ours := facts.here["packages"].get("ray")):
            yield fault(
                "versions",
                one["node"],
                f"ray {theirs} there, {ours} here",
                "who submits jobs has the Ray of the cluster",
                "make setup here with the cluster's constraints.txt, or the nodes anew with this one's",
            )
    for one in nodes:
        if not one["pins"]:
            yield Finding("versions", one["node"], "constraints.txt is not there", "not asked")
            continue
        for name, pin in one["pins"].items():
            if (has := one["packages"].get(name)) != pin:
                yield fault(
                    "versions",
                    one["node"],
                    f"{name} {has or 'is not installed'}",
                    f"{name}=={pin}, as constraints.txt has it",
                    "make setup; on a cluster's nodes make their image or environment anew with constraints.txt",
                )
    for key in ("python", *sorted({name for one in nodes for name in one["packages"]})):
        by: dict[str | None, list[str]] = {}
        for one in nodes:
            by.setdefault(one["python"] if key == "python" else one["packages"].get(key), []).append(one["node"])
        if len(by) > 1:
            value = "; ".join(f"{version or 'none'} on {', '.join(where)}" for version, where in by.items())
            yield fault(
                "versions",
                key,
                value,
                f"{key} is the same on all nodes, or an expert's bits depend on where it trains",
                "make all nodes from one image",
            )
    if nodes:
        yield Finding("versions", "", f"Python {', '.join(sorted({one['python'] for one in nodes}))} on {len(nodes)} of {len(nodes)}")


def gpus(facts: Facts) -> Iterator[Finding]:
    """Whether there is a GPU where the run asks for one, with a driver that torch's CUDA takes."""
    asked = asks_for_gpus(facts.config)
    nodes = list(facts.all_nodes())
    for one in nodes:
        if not one["gpus"]:
            continue
        cuda, driver = one["torch_cuda"], one["driver"]
        if cuda is None:
            yield fault(
                "gpu",
                one["node"],
                "torch was built without CUDA",
                "a node with a GPU has torch with CUDA",
                "install torch from an index with CUDA wheels",
            )
        elif driver is None:
            yield fault(
                "gpu",
                one["node"],
                "no NVIDIA driver answers",
                "a node with a GPU has its driver",
                "install the driver, or give the container the GPU (--gpus all; on Kubernetes the device plugin)",
            )
        elif int(driver.split(".")[0]) < (least := DRIVERS.get(int(cuda.split(".")[0]), max(DRIVERS.values()))):
            yield fault(
                "gpu",
                one["node"],
                f"driver {driver}, torch with CUDA {cuda}",
                f"CUDA {cuda} wants driver {least} or later",
                "update the driver (a newer machine image), or install torch for an older CUDA",
            )
        else:
            yield Finding("gpu", one["node"], f"{one['gpus']}, driver {driver}, torch with CUDA {cuda}")
    if asked and nodes and not any(one["gpus"] for one in nodes):
        if any(facts.scales.values()):
            told = "no node has one yet; whether the autoscaler can bring one says `python -m cluster_configs.check FILE --run CONFIG`"
            yield Finding("gpu", "", told, "not asked")
            return
        yield fault(
            "gpu",
            "",
            "no node has one",
            f"{', '.join(asked)} ask for GPUs",
            "add a node with a GPU, or set resources.gpus=0",
        )


def room(facts: Facts) -> Iterator[Finding]:
    """Whether there is memory, disk, and shared memory."""
    for one in facts.all_nodes():
        bad = False
        if one["memory_free"] < MEMORY:
            bad = True
            yield fault(
                "room",
                one["node"],
                f"{_gib(one['memory_free'])} of memory free of {_gib(one['memory'])}",
                f"at least {_gib(MEMORY)} free: Ray ends workers where memory runs out",
                "end what else runs there, or take a larger machine",
            )
        disk = one["disk"]
        if disk["free"] < max(DISK, DISK_SHARE * disk["total"]):
            bad = True
            yield fault(
                "room",
                one["node"],
                f"{_gib(disk['free'])} free of {_gib(disk['total'])} at {disk['path']}",
                f"{_gib(DISK)} and 5 % free beside Ray's files",
                "delete old sessions (/tmp/ray), enlarge the disk, or start Ray with --temp-dir elsewhere",
            )
        store, shm = one["object_store"] or OBJECT_STORE, one["shm"]
        if shm["total"] < store:
            bad = True
            yield fault(
                "room",
                one["node"],
                f"{shm['path']} has {_gib(shm['total'])}",
                f"it holds the object store, {_gib(store)}",
                "docker run --shm-size; on Kubernetes an emptyDir with medium: Memory at /dev/shm; or a smaller --object-store-memory",
            )
        if one["object_store"] is not None and one["object_store"] < OBJECT_STORE:
            bad = True
            yield fault(
                "room",
                one["node"],
                f"object store of {_gib(one['object_store'])}",
                f"at least {_gib(OBJECT_STORE)}: blocks would go to disk",
                "ray start --object-store-memory, or more memory",
            )
        if not bad:
            told = f"{_gib(one['memory_free'])} of memory free, {_gib(disk['free'])} of disk, {_gib(shm['total'])} of {shm['path']}"
            yield Finding("room", one["node"], told + (f", object store {_gib(one['object_store'])}" if one["object_store"] else ""))


def _gib(size: float) -> str:
    return f"{size / 2**30:,.1f} GiB"


def limits(facts: Facts) -> Iterator[Finding]:
    """Whether processes may open as many files, and users start as many processes, as Ray takes."""
    # Where a Ray is still to start, it takes as many as it may have.
    files = "open_files" if facts.nodes else "open_files_most"
    for one in facts.all_nodes():
        for key, least, flag in ((files, OPEN_FILES, "n"), ("processes", PROCESSES, "u")):
            if 0 <= one[key] < least:  # -1: unlimited
                yield fault(
                    "limits",
                    one["node"],
                    f"{key.removesuffix('_most').replace('_', ' ')}: {one[key]}",
                    f"ulimit -{flag} is at least {least}",
                    f"ulimit -{flag} {max(least, 65536)} before `ray start`; for good in /etc/security/limits.conf or the container's runtime",
                )


def clocks(facts: Facts) -> Iterator[Finding]:
    """Whether all clocks tell the same time."""
    remedy = "run chrony or systemd-timesyncd there: `timedatectl` says whether it is synchronized"
    for nodes in facts.nodes.values():
        told = [one for one in nodes if "error" not in one]
        for one in told:
            if abs(one["clock_offset"]) - one["clock_error"] > SKEW_S:
                yield fault(
                    "clock", one["node"], f"{one['clock_offset']:+.1f} s against the head's", f"within {SKEW_S:.0f} s: locks end by the clock", remedy
                )
        if told:
            yield Finding("clock", "", f"nodes within {max(abs(one['clock_offset']) for one in told):.2f} s")
    for where, one in facts.stores.items():
        if one["offset"] is None:
            continue
        if abs(one["offset"]) > STORE_SKEW_S:
            yield fault(
                "clock",
                where,
                f"the store's is {one['offset']:+.0f} s against ours",
                f"within {STORE_SKEW_S:.0f} s; signed requests are refused when they differ by minutes (RequestTimeTooSkewed)",
                remedy,
            )
        else:
            yield Finding("clock", where, f"the store's is within {abs(one['offset']):.1f} s")
