"""Print a RayJob for each stage of a run, each with a cluster of its own that is there for as long as it takes.

    python -m cluster_configs.rayjobs --config run.yaml --set run_dir=s3://bucket/run --stages expert-3 --image REGISTRY/paris-ray:0.1.0 \\
        --annotation eks.amazonaws.com/role-arn=arn:aws:iam::ACCOUNT:role/paris-{stage} | kubectl apply -n paris -f -

A stage waits for nobody: apply embed, then partition, then experts and router, then assemble, or let `jobs.run_all` do all of it in one cluster
(kuberay/training/cluster.yaml). A job is tried once; one that ended goes on from its last checkpoint when it is deleted and applied again.

An expert's pods have a ServiceAccount of their own, paris-expert-K, for a role that reads its shard and writes its folder (policies.py):
`--annotation` ties the two, with the stage's name for {stage}. A training has all its workers from the beginning, of the first group that has what
it asks for and the GPU memory that it needs, so that nothing needs to scale: the head of a cluster that does may change every pod and cluster of its
namespace.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster_configs import render
from cluster_configs.check_kubernetes import LONGEST, ONE_DRIVER_GB
from cluster_configs.check_run import gpu_memory, short_of_memory
from cluster_configs.demand import Demand, demands, fits
from jobs.attempt import module
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.config_errors import nearest

CLUSTER = Path(__file__).parent / "kuberay/training/cluster.yaml"
CONFIG = "/etc/paris-run/run.yaml"
NO_GROUP = f"{{one.name}} asks for {{one}}, which no group of {CLUSTER.name} has; change what it asks for, or add a group"


def main(argv: Sequence[str] | None = None) -> int:
    """Print them; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.rayjobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config of the run: a preset, or a YAML file; its run_dir must be a URI")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="a.b=c", help="as for jobs")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these; default: all")
    parser.add_argument("--image", required=True, help="of all pods, with its registry")
    parser.add_argument("--annotation", metavar="KEY=VALUE", help="of the experts' ServiceAccounts, which ties them to roles of the store")
    args = parser.parse_args(argv)
    try:
        config = configs.load(args.config, args.sets)
        known = stages.names(config)
        for name in args.stages or []:
            if name not in known:
                raise ConfigError(f"--stages: {name!r} is not a stage of this run.{nearest(name, known)} Known: {', '.join(known)}")
        wanted = args.stages or known
        documents = list(manifests(config, wanted, args.image, args.annotation))
        if args.annotation is None and any(name.startswith("expert-") for name in wanted):
            print(f"{parser.prog}: without --annotation the experts' pods have no role, and a store refuses them", file=sys.stderr)
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("---\n".join(render.text(one) for one in documents), end="")
    return 0


def manifests(config: RunConfig, names: Sequence[str], image: str, annotation: str | None = None) -> Iterator[dict[str, Any]]:
    """The run's config, and of each stage its account and its job. Raises ConfigError when no group has what a stage asks for."""
    if "/" not in image:
        raise ConfigError(f"--image {image} names no registry, and pods would look for it at a public one; give REGISTRY/NAME:VERSION")
    if annotation is not None and (not re.fullmatch(r"[^=]+=.+", annotation) or re.search(r"[{}]", annotation.replace("{stage}", ""))):
        raise ConfigError(f"--annotation {annotation!r} is not KEY=VALUE, with no other braces than those of {{stage}}")
    if "://" not in config.run_dir:
        raise ConfigError(f"run_dir is {config.run_dir}, which other pods do not see; give a URI, --set run_dir=s3://bucket/run")
    base = config.name.replace("_", "-").strip("-")
    longest = LONGEST["RayJob"] - len("-control-router")
    if not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", base) or len(base) > longest:
        raise ConfigError(
            f"name is {config.name!r}; names of Kubernetes are small letters, digits and -, here at most {longest} of them: --set name=x"
        )
    yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{base}-run"}, "data": {"run.yaml": configs.dump(config)}}
    for name in names:
        account = f"paris-{name}" if name.startswith("expert-") else "paris-stages"
        if name.startswith("expert-"):
            tied = {"annotations": dict([annotation.replace("{stage}", name).split("=", 1)])} if annotation else {}
            yield {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, **tied}}
        yield _job(config, name, f"{base}-{name.replace('_', '-')}", account, f"{base}-run", image)


def _job(config: RunConfig, stage: str, name: str, account: str, config_map: str, image: str) -> dict[str, Any]:
    spec = json.loads(json.dumps(yaml.safe_load(CLUSTER.read_text())["spec"]))  # what YAML's anchors share becomes two
    spec["workerGroupSpecs"] = _groups(config, stage, spec["workerGroupSpecs"])
    head = spec["headGroupSpec"]["template"]["spec"]
    if stages.trains(stage):
        del spec["autoscalerOptions"]
        spec["enableInTreeAutoscaling"] = head["automountServiceAccountToken"] = False
        _small(head)
    for pod in (head, *(one["template"]["spec"] for one in spec["workerGroupSpecs"])):
        pod["serviceAccountName"] = account
        pod["containers"][0]["image"] = image
    # A driver runs on the head.
    head["volumes"].append({"name": "run", "configMap": {"name": config_map}})
    head["containers"][0]["volumeMounts"].append({"name": "run", "mountPath": CONFIG.rpartition("/")[0], "readOnly": True})
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayJob",
        "metadata": {"name": name, "labels": {"paris-ray/stage": stage}},
        "spec": {
            "entrypoint": shlex.join(["python", "-m", *module(stage), "--config", CONFIG]),
            # KubeRay would try again what was stopped and what cannot succeed, too.
            "backoffLimit": 0,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": spec,
        },
    }


def _small(head: dict[str, Any]) -> None:
    """A head for one training's driver, which needs about a GB."""
    disk = {"ephemeral-storage": "20Gi"}
    memory = {"memory": f"{ONE_DRIVER_GB}Gi"}
    head["containers"][0]["resources"] = {"requests": {"cpu": "2", **memory, **disk}, "limits": {**memory, **disk}}
    for volume in head["volumes"]:
        if "emptyDir" in volume:
            volume["emptyDir"]["sizeLimit"] = disk["ephemeral-storage"]


def _groups(config: RunConfig, stage: str, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a cluster's groups, those that have what a stage asks for; of a training the first, with as many pods as it has workers."""
    asked, kept = _asked(config, stage), []
    if stages.trains(stage):
        return [_trains(config, stage, asked, groups)]
    for group in groups:
        if stage != "embed" and node_type(group)["resources"]["GPU"]:
            continue  # it would stand idle
        if any(fits(one, node_type(group)) for one in asked):
            kept.append(group)
    for one in asked:
        if not any(fits(one, node_type(group)) for group in kept):
            raise ConfigError(NO_GROUP.format(one=one))
    return kept


def _trains(config: RunConfig, stage: str, asked: list[Demand], groups: list[dict[str, Any]]) -> dict[str, Any]:
    part = config.router if stage.endswith("router") else config.experts[int(stage.removeprefix("expert-"))]
    where = asked[0].name
    if part.resources.preemption is not None:
        raise ConfigError(
            f"{where}.preemption is {part.resources.preemption}, whose notice no pod sees; leave it out: a pod that ends drains its node"
        )
    if len(asked) > 1:
        raise ConfigError(f"{where}.fallback wants a second kind of machine, and a RayJob's training has one; leave it out, or use jobs.run_all")
    [one] = asked
    could = {group["groupName"]: node_type(group) for group in groups if fits(one, node_type(group))}
    needs = gpu_memory(config)
    group = next((group for group in groups if (name := group["groupName"]) in could and not short_of_memory(one, needs, {name: could[name]})), None)
    if group is None:
        raise ConfigError(short_of_memory(one, needs, could) or NO_GROUP.format(one=one))
    count = -(-one.workers // fits(one, node_type(group)))
    if count > group["maxReplicas"]:
        raise ConfigError(
            f"{where}.num_workers is {one.workers}, and takes {count} pods of {group['groupName']}, whose maxReplicas is {group['maxReplicas']}"
        )
    # Which only an autoscaler heeds: KubeRay refuses them without.
    kept = {key: value for key, value in group.items() if key not in ("idleTimeoutSeconds", "priority")}
    return {**kept, "minReplicas": count, "replicas": count, "maxReplicas": count}


def _asked(config: RunConfig, stage: str) -> list[Demand]:
    if stage.startswith("expert-"):
        k = int(stage.removeprefix("expert-"))
        here = config.without_clusters()  # this cluster is the one where it trains
        return [one for one in demands(here) if one.name.split(".")[:2] == ["experts", str(k)]]
    every = list(demands(config))
    if stages.trains(stage):
        return [one for one in every if one.name.startswith("router")]
    encoders = [one for one in every if one.name.startswith("data")] if stage == "embed" else []
    return [*encoders, Demand(stage, {"CPU": 1.0})]


def node_type(group: dict[str, Any]) -> dict[str, Any]:
    """A worker group as :mod:`cluster_configs.demand` sees it."""
    limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
    resources = {name: float(amount) for name, amount in group.get("resources", {}).items()}
    has = {"GPU": float(limits.get("nvidia.com/gpu", 0)), **resources}
    return {"resources": has, "labels": group.get("labels", {}), "max_workers": group["maxReplicas"]}


if __name__ == "__main__":
    sys.exit(main())
