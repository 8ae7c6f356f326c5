"""Print a RayJob for each stage of a run, each with a cluster of its own that is there for as long as it takes.

    python -m cluster_configs.rayjobs --config mine.yaml --set run_dir=s3://bucket/run --stages expert-3 | kubectl apply -n paris -f -

A stage waits for nobody: apply embed, then partition, then experts and router, then assemble, or let `jobs.run_all` do all of it in one cluster
(kuberay/base/cluster.yaml). An expert's pods have a ServiceAccount of their own, paris-expert-K, for a role that reads its shard and writes its
folder (policies.py): `--annotation` ties the two, with the stage's name for {stage}.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster_configs import render
from cluster_configs.demand import Demand, demands, fits
from jobs.attempt import module
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.config_errors import nearest

CLUSTER = Path(__file__).parent / "kuberay/base/cluster.yaml"
CONFIG = "/etc/paris-run/run.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Print them; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.rayjobs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="config of the run: a preset, or a YAML file; its run_dir must be a URI")
    parser.add_argument("--set", dest="sets", action="append", default=[], metavar="a.b=c", help="as for jobs")
    parser.add_argument("--stages", nargs="+", metavar="STAGE", help="only these; default: all")
    parser.add_argument("--image", help="of all pods; default: that of kuberay/base/cluster.yaml")
    parser.add_argument("--annotation", metavar="KEY=VALUE", help="of the experts' ServiceAccounts")
    args = parser.parse_args(argv)
    try:
        config = configs.load(args.config, args.sets)
        known = stages.names(config)
        for name in args.stages or []:
            if name not in known:
                raise ConfigError(f"--stages: {name!r} is not a stage of this run.{nearest(name, known)} Known: {', '.join(known)}")
        documents = list(manifests(config, args.stages or known, args.image, args.annotation))
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    print("---\n".join(render.text(one) for one in documents), end="")
    return 0


def manifests(config: RunConfig, names: Sequence[str], image: str | None = None, annotation: str | None = None) -> Iterator[dict[str, Any]]:
    """The run's config, and of each stage its account and its job. Raises ConfigError when no group has what a stage asks for."""
    if "://" not in config.run_dir:
        raise ConfigError(f"run_dir is {config.run_dir}, which other pods do not see; give a URI, --set run_dir=s3://bucket/run")
    base = config.name.replace("_", "-").strip("-")
    yield {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": f"{base}-run"}, "data": {"run.yaml": configs.dump(config)}}
    for name in names:
        account = f"paris-{name}" if name.startswith("expert-") else "paris-stages"
        if name.startswith("expert-"):
            tied = {"annotations": dict([annotation.format(stage=name).split("=", 1)])} if annotation else {}
            yield {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": account, **tied}}
        yield _job(config, name, f"{base}-{name.replace('_', '-')}", account, f"{base}-run", image)


def _job(config: RunConfig, stage: str, name: str, account: str, config_map: str, image: str | None) -> dict[str, Any]:
    spec = json.loads(json.dumps(yaml.safe_load(CLUSTER.read_text())["spec"]))  # what YAML's anchors share becomes two
    spec["workerGroupSpecs"] = _groups(config, stage, spec["workerGroupSpecs"])
    head = spec["headGroupSpec"]["template"]["spec"]
    for pod in (head, *(one["template"]["spec"] for one in spec["workerGroupSpecs"])):
        pod["serviceAccountName"] = account
        if image is not None:
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
            # Each in a new cluster, when a head is lost; it goes on from the last checkpoint.
            "backoffLimit": 3,
            "shutdownAfterJobFinishes": True,
            "ttlSecondsAfterFinished": 600,
            "rayClusterSpec": spec,
        },
    }


def _groups(config: RunConfig, stage: str, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of a cluster's groups, those that have what a stage asks for; a training needs no more of them than it has workers."""
    asked, kept = _asked(config, stage), []
    for group in groups:
        if not stages.trains(stage) and stage != "embed" and node_type(group)["resources"]["GPU"]:
            continue  # it would stand idle
        most = max((one.workers if stages.trains(stage) else group["maxReplicas"] for one in asked if fits(one, node_type(group))), default=0)
        if most:
            kept.append({**group, "maxReplicas": min(most, group["maxReplicas"])})
    for one in asked:
        if not any(fits(one, node_type(group)) for group in kept):
            raise ConfigError(f"{one.name} asks for {one}, which no group of {CLUSTER.name} has; change what it asks for, or add a group")
    return kept


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
