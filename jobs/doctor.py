"""Whether a machine, a cluster or a run's clusters are as training and serving need them.

python -m jobs.doctor                                                            # this machine
python -m jobs.doctor --config RUN/config.yaml                                   # and the run: its store, its other clusters, their tokens
python -m jobs.doctor --config RUN/config.yaml --address http://head:8265        # and all nodes of this cluster

Prints what was found: a fault with its value, the rule, and what to do about it. Nothing is changed; files are written to the store, here and on
every node, and deleted.
The exit code is 0 without a fault, 1 with one, 2 for a wrong command.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
import urllib.parse
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from jobs import access_checks, access_facts, cli, clusters, facts, node_checks, quota_checks, store_facts
from jobs.clusters import ENDED, AwayError, Cluster
from jobs.findings import Facts, Finding, clouds
from paris_ray import config as configs
from paris_ray.config import ConfigError, RunConfig
from paris_ray.opening import absolute
from paris_ray.resources import HERE

JOB_SECONDS = 600.0
"""How long a cluster may take to tell its facts."""
NO_MARK = {"name": None, "error": None}
"""Of a store where none was tried."""
RAY_PORTS = (6379, 8265, 10001)
"""Where `ray start --head` listens, unless told otherwise."""

CHECKS: tuple[Callable[[Facts], Iterator[Finding]], ...] = (
    node_checks.reached, node_checks.versions, node_checks.gpus, access_checks.storage, access_checks.tokens, access_checks.web_identities,
    access_checks.ports, node_checks.room, node_checks.limits, node_checks.clocks, quota_checks.quotas,
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Look; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.doctor", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, works=False, required=False)
    parser.add_argument("--address", help="URL of a Ray dashboard, http://HOST:8265: all nodes of that cluster are asked too")
    parser.add_argument("--json", action="store_true", help="one finding a line, for programs")
    args = parser.parse_args(argv)
    try:
        if args.sets and not args.config:
            raise ConfigError("--set: there is nothing to change without --config")
        if args.address is not None and not is_url(args.address):
            raise ConfigError(f"--address: {args.address!r} is no URL of a Ray dashboard; give the one that `ray start` printed: http://HOST:8265")
        config = cli.load(args, opened=False) if args.config else None  # what its store says is a finding
        found = judge(gather(config, args.address))
    except ConfigError as error:
        return cli.complain(parser, error)
    print("\n".join(json.dumps(asdict(one)) for one in found) if args.json else text(found))
    return int(any(one.state == "fault" for one in found))


def is_url(address: str) -> bool:
    """Whether a web server may be there."""
    try:
        parts = urllib.parse.urlsplit(address)
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname)


def judge(found: Facts) -> list[Finding]:
    """Ask every question of the facts."""
    return [one for check in CHECKS for one in check(found)]


def text(found: Sequence[Finding]) -> str:
    """Findings for people, faults last, where they are seen."""
    lines = []
    for one in sorted(found, key=lambda one: one.state == "fault"):
        lines.append(f"{one.state:<10} {one.what:<10} {f'{one.where}: ' if one.where else ''}{one.value}")
        if one.state == "fault":
            lines += [f"{'':<11}rule:   {one.rule}", f"{'':<11}remedy: {one.remedy}"]
    faults = sum(one.state == "fault" for one in found)
    return "\n".join([*lines, "", "No fault was found." if not faults else f"Faults found: {faults}"])


def gather(config: RunConfig | None, address: str | None) -> Facts:
    """The facts of this machine, of the store as it is seen here, and of each cluster as it is seen there.

    Raises:
        ConfigError: nobody answers at ``address``, or it refuses our token.
    """
    run_dir = absolute(config.run_dir) if config else None
    found = Facts(config=config, address=address, here=facts.node())
    found.token = None if (path := access_facts.token_file()) is None else access_facts.token_of_file(path)
    if run_dir is not None:
        if "://" in run_dir:
            print(f"doctor: asking {run_dir}, which takes a minute or two where nobody answers", file=sys.stderr, flush=True)
        found.stores["here"] = store_facts.store(run_dir)
    if address is None:
        serve = [config.serve.port] if config else []
        found.ports = [access_facts.port(number) for number in dict.fromkeys([*RAY_PORTS, *serve])]
    asked: list[tuple[Cluster, str, str | None, str | None]] = []
    if address is not None:
        one = clusters.here(config or configs.load("tiny"), address)
        asked.append((one, address, run_dir, access_facts.token()))
    for name, spec in (config.clusters if config else {}).items():
        assert config is not None
        if spec.token_file is not None:
            found.token_files[name] = access_facts.token_of_file(Path(spec.token_file))
        token = access_facts.read_token(spec.token_file) if spec.token_file else None
        asked.append((clusters.other(config, name), spec.address, spec.storage or run_dir, token))
    for cluster, url, storage, token in asked:
        name = "the cluster" if cluster.name == HERE else cluster.name
        if any(url.rstrip("/") == one["address"].rstrip("/") for one in found.dashboards.values()):
            continue  # the same by another name
        found.dashboards[name] = access_facts.dashboard(url, token)
        part = store_facts.within(config, cluster.name) if config else ""
        writable = run_dir is not None and found.stores["here"]["error"] is None
        with store_facts.mark(run_dir, part) if run_dir is not None and writable else contextlib.nullcontext(NO_MARK) as mark:
            try:
                told = ask(cluster, storage, part, mark["name"])
            except (AwayError, ConfigError, RuntimeError, ValueError) as error:
                told = {"nodes": [], "scales": False, "lacks": (str(error).strip() or type(error).__name__).splitlines()[0]}
        if mark["error"] is not None:
            found.stores[f"here, for {name}"] = mark
        if told["lacks"] is not None:
            found.silent[name] = told["lacks"]
        if told["nodes"]:
            found.nodes[name], found.scales[name] = told["nodes"], told["scales"]
        found.stores |= {one["node"]: one["store"] for one in told["nodes"] if one.get("store")}
    for cloud in clouds(config):
        found.quotas[cloud] = access_facts.quotas(cloud)
    return found


def ask(cluster: Cluster, storage: str | None, part: str = "", seen: str | None = None) -> dict[str, Any]:
    """Have a cluster tell its facts, by a job of :mod:`jobs.facts`.

    Args:
        cluster: which.
        storage: the run as it is seen there.
        part: where in it the cluster may write.
        seen: a file that must be there.

    Returns:
        ``nodes`` and ``scales``, as far as they were told; ``lacks`` says why that may not be all, ``None`` if it is.

    Raises:
        AwayError, ConfigError: it does not answer, or refuses our token.
        RuntimeError, ValueError: it refuses the job.
    """
    job = f"doctor-{uuid.uuid4().hex[:12]}"
    told = ["--store", storage, *(["--within", part] if part else []), *(["--mark", seen] if seen else [])] if storage else []
    command = f"{cluster.python} -m jobs.facts {shlex.join(told)}".strip()
    cluster.call("submit_job", entrypoint=command, submission_id=job, runtime_env=cluster.runtime_env, entrypoint_num_cpus=0)
    deadline = time.monotonic() + JOB_SECONDS
    while (state := cluster.status(job)) not in ENDED and time.monotonic() < deadline:
        time.sleep(0.5)
    said = str(cluster.call("get_job_logs", job))
    if state not in ENDED:
        cluster.end(job)
    with contextlib.suppress(AwayError, RuntimeError):  # one that does not end stays in the cluster's list
        cluster.call("delete_job", job)
    last = ([line for line in said.strip().splitlines() if not line.startswith(facts.MARK)] or ["it said nothing else"])[-1]
    lacks = None if state == "SUCCEEDED" else f"the job that asks its nodes did not come to its end ({state}): {last}"[:400]
    return {**(facts.heard(said) or {"nodes": [], "scales": False}), "lacks": lacks}


if __name__ == "__main__":
    sys.exit(main())
