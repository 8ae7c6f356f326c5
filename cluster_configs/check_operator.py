"""What KubeRay's operator (1.7) refuses although its schema takes it: the rules of its ``utils/validation.go``, as far as schemas/kuberay.yaml has
the fields. It writes such a refusal as an event of the object, and starts no pod.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import yaml

from cluster_configs.check_together import cluster_of

IN_PARAMS = ("num-cpus", "num-gpus", "memory", "resources")
"""What rayStartParams may not say beside ``resources``."""
PART = "[a-z0-9]([-a-z0-9]*[a-z0-9])?"
V2 = "RAY_enable_autoscaler_v2"


def groups_of(one: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """The head and the workers of an object's cluster, by name."""
    cluster = cluster_of(one)
    workers = [(each["groupName"], each) for each in cluster.get("workerGroupSpecs") or []]
    return [("headGroupSpec", cluster["headGroupSpec"]), *workers] if cluster else []


def no_containers(one: dict[str, Any]) -> Iterator[str]:
    """Groups whose pods have none; the other rules look into the first."""
    for name, group in groups_of(one):
        if not group["template"]["spec"].get("containers"):
            yield f"{name}: it has no container"


def refused(one: dict[str, Any]) -> Iterator[str]:
    """Of an object that the schema takes, what the operator does not."""
    kind, spec, cluster = one["kind"], one["spec"], cluster_of(one)
    scales = bool(cluster.get("enableInTreeAutoscaling"))
    for name, group in groups_of(one):
        yield from (f"{name}: {text}" for text in _group(group))
    if cluster:
        yield from _cluster(cluster, (one["metadata"].get("annotations") or {}))
        head = cluster["headGroupSpec"]
        auth = cluster.get("authOptions") or {}
        if auth.get("enableK8sTokenAuth") and (kind != "RayCluster" or auth.get("secretName")):
            yield "authOptions.enableK8sTokenAuth is for RayClusters without a secretName alone"
        if kind != "RayCluster" and cluster.get("upgradeStrategy"):
            yield f"the cluster's upgradeStrategy must not be set in a {kind}"
        if kind == "RayService" and ((head.get("headService") or {}).get("metadata") or {}).get("name"):
            yield "headGroupSpec.headService.metadata.name must not be set in a RayService"
    if kind == "RayJob":
        yield from _job(spec)
    if kind == "RayService":
        yield from _upgrade(spec.get("upgradeStrategy") or {}, scales)


def _group(group: dict[str, Any]) -> Iterator[str]:
    params = group["rayStartParams"]
    twice = [name for name in IN_PARAMS if params.get(name)]
    if twice and group.get("resources"):
        yield f"rayStartParams has {', '.join(twice)} beside resources; say it in resources alone"
    if "labels" in params:
        yield "rayStartParams has labels; they go into the group's own labels"
    for key, value in (group.get("labels") or {}).items():
        prefix, slash, name = key.rpartition("/")
        if not name or not _label(name) or (slash and not (len(prefix) <= 253 and re.fullmatch(rf"{PART}(\.{PART})*", prefix))):
            yield f"{key!r} is no name of a label"
        if not _label(value):
            yield f"labels.{key} is {value!r}; at most 63 letters, digits, '-', '_' and '.', with a letter or digit at both ends"


def _label(text: str) -> bool:
    return len(text) <= 63 and re.fullmatch(r"([A-Za-z0-9]([-\w.]*[A-Za-z0-9])?)?", text, re.ASCII) is not None


def _environment(pod: dict[str, Any]) -> dict[str, Any]:
    return {each["name"]: each.get("value") for each in pod["containers"][0].get("env") or []}


def _cluster(cluster: dict[str, Any], annotations: dict[str, str]) -> Iterator[str]:
    head = cluster["headGroupSpec"]
    options, environment = cluster.get("autoscalerOptions") or {}, _environment(head["template"]["spec"])
    scales, params = bool(cluster.get("enableInTreeAutoscaling")), head["rayStartParams"]
    told = environment.get(V2) in ("1", "true")
    for group in cluster.get("workerGroupSpecs") or []:
        name = group["groupName"]
        for key in ("idleTimeoutSeconds", "priority"):
            # A priority of 0 is none; an idle time of 0 is one.
            if (group.get(key) if key == "priority" else group.get(key) is not None) and options.get("version") != "v2" and not told:
                yield f"{name}: {key} is set without autoscalerOptions.version v2; take it away where nothing scales"
        if scales and group.get("suspend"):
            yield f"{name}: suspend is set in a cluster that scales"
    if told and not scales:
        yield f"headGroupSpec: {V2} is set in a cluster that does not scale"
    if V2 in environment and scales and options.get("version"):
        yield f"headGroupSpec: {V2} is set beside autoscalerOptions.version; the latter is enough"
    if any(each.get("name") == "KUBERAY_GEN_AUTOSCALER_START_CMD" for each in options.get("env") or []):
        yield "autoscalerOptions.env has KUBERAY_GEN_AUTOSCALER_START_CMD, which is KubeRay's own"
    kept = cluster.get("gcsFaultToleranceOptions")
    tolerant = "ray.io/ft-enabled" in annotations
    if kept is not None and (tolerant or "ray.io/external-storage-namespace" in annotations):
        yield "gcsFaultToleranceOptions and annotations say the same; keep the former"
    if kept is not None and (params.get("redis-password") or {"REDIS_PASSWORD", "RAY_REDIS_ADDRESS"} & set(environment)):
        yield "headGroupSpec: where Redis is stands in gcsFaultToleranceOptions, and in neither rayStartParams nor env"
    if kept is None and "RAY_REDIS_ADDRESS" in environment and annotations.get("ray.io/ft-enabled", "").lower() != "true":
        yield "headGroupSpec: RAY_REDIS_ADDRESS is set without gcsFaultToleranceOptions"
    if params.get("redis-username") or "REDIS_USERNAME" in environment:
        yield "headGroupSpec: Redis' user stands in gcsFaultToleranceOptions.redisUsername, and in neither rayStartParams nor env"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    mode, selects = spec.get("submissionMode"), "clusterSelector" in spec
    if spec.get("suspend") and (selects or not spec.get("shutdownAfterJobFinishes")):
        yield "spec.suspend needs a cluster of the job's own that ends with it"
    if selects and not spec["clusterSelector"].get("ray.io/cluster"):
        yield "spec.clusterSelector must name ray.io/cluster"
    if spec.get("backoffLimit") and (selects or mode == "InteractiveMode"):
        yield "spec.backoffLimit goes with neither clusterSelector nor InteractiveMode"
    if mode == "SidecarMode" and (selects or {"submitterPodTemplate", "submitterConfig"} & set(spec)):
        yield "spec.submissionMode SidecarMode goes with no clusterSelector, submitterPodTemplate or submitterConfig"
    try:
        told = yaml.safe_load(spec.get("runtimeEnvYAML") or "{}")
    except yaml.YAMLError:
        told = None
    if not isinstance(told, dict):
        yield "spec.runtimeEnvYAML is no YAML of keys and values"


def _upgrade(strategy: dict[str, Any], scales: bool) -> Iterator[str]:
    options = strategy.get("clusterUpgradeOptions") or {}
    incremental = strategy.get("type") == "NewClusterWithIncrementalUpgrade"
    if incremental != bool(options):
        yield "spec.upgradeStrategy: NewClusterWithIncrementalUpgrade and clusterUpgradeOptions go together"
    elif incremental and not scales:
        yield "spec.upgradeStrategy: NewClusterWithIncrementalUpgrade needs enableInTreeAutoscaling"
    elif incremental and options["stepSizePercent"] > options.get("maxSurgePercent", 100):
        yield "spec.upgradeStrategy.clusterUpgradeOptions: stepSizePercent is more than maxSurgePercent"
