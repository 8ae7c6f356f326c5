"""Check Kubernetes manifests before they are applied, without a Kubernetes.

    python -m cluster_configs.check_kubernetes my_kuberay/overlays/paris_xl2                                        # an overlay, built by kubectl
    python -m cluster_configs.check_kubernetes my_kuberay/overlays/paris_xl2 my_kuberay/overlays/paris_serving      # with what is applied later
    python -m cluster_configs.check_kubernetes jobs.yaml my_kuberay/base/*.yaml                                     # files
    kubectl kustomize my_kuberay/overlays/paris_xl2 | python -m cluster_configs.check_kubernetes -

Says what is wrong and what is still to be filled in, a line each.

Kubernetes' own objects are compared with its schemas (package kubernetes-validate, in this project's dev extra), KubeRay's with schemas/kuberay.yaml,
serveConfigV2 with Ray's schema and with what the application takes. Exit codes as those of cluster_configs.check.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from cluster_configs.check import HEAD_GB
from cluster_configs.check_operator import no_containers, refused
from cluster_configs.check_serve import serve_problems
from cluster_configs.check_together import CLUSTER_SPEC, cluster_of, names, namespaces, together, unfilled
from cluster_configs.providers import SCHEMAS, WORLD, schema_problems
from cluster_configs.unfilled import UNFILLED, placeholders, places, ready
from paris_ray.config import ConfigError

PLAN = "kustomization.yaml"
PLANS = ("Kustomization", "Component")
"""Kinds of kustomize's own files, which are no objects."""
KUBERNETES = "1.33"
"""Of the schemas: old enough for what clouds offer."""
LONGEST = {"RayCluster": 53, "RayJob": 47, "RayService": 47}
"""Letters of a name, to which KubeRay adds some."""
GRACE_S = 20
"""Seconds between the end of a preStop and the end of the pod."""
ONE_DRIVER_GB = 8
"""Memory of a head that serves, where no training's driver runs, or that of a job which trains, where one does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.check_kubernetes", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="manifests, or a folder that `kubectl kustomize` builds; - reads from it")
    parser.add_argument("--template", action="store_true", help="pass what is still to be filled in, too")
    args = parser.parse_args(argv)
    try:
        documents = [one for file in args.files for one in read(file)]
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    found = list(problems(documents))
    if not args.template:
        found += where_unfilled(args.files, documents)
    print("".join(f"{one}\n" for one in found) or f"{len(documents)} objects, {ready(unfilled(documents))}\n", end="")
    return 1 if found else 0


def read(file: str) -> list[dict[str, Any]]:
    """The objects of a file, of a folder that kubectl builds, or, for ``-``, of standard input. Raises ConfigError."""
    try:
        text = sys.stdin.read() if file == "-" else _built(Path(file)) if Path(file).is_dir() else Path(file).read_text()
        return [one for one in yaml.safe_load_all(text) if one is not None and not (isinstance(one, dict) and one.get("kind") in PLANS)]
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror}); name manifests, or a folder with a kustomization.yaml") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not valid YAML: {' '.join(str(error).split())}") from None


def _built(folder: Path) -> str:
    if not (folder / PLAN).is_file():
        raise ConfigError(f"{folder} has no {PLAN}; name an overlay, such as cluster_configs/kuberay/overlays/paris_xl2, or files")
    try:
        made = subprocess.run(["kubectl", "kustomize", str(folder)], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{folder} is built by kubectl, which is not here; install it, or name the files in it") from None
    if made.returncode:
        raise ConfigError(f"{folder}: kubectl kustomize says {' '.join(made.stderr.split())[:500]}")
    return made.stdout


def sources(file: Path) -> list[Path]:
    """The files that are read for one, or for a folder with a plan of kustomize's."""
    if not file.is_dir():
        return [file]
    plan = yaml.safe_load((file / PLAN).read_text())
    named = [*plan.get("resources", []), *plan.get("components", []), *(one["path"] for one in plan.get("patches", []) if "path" in one)]
    return [file / PLAN, *(source for name in named for source in sources(Path(os.path.normpath(file / name))))]


def where_unfilled(files: Sequence[str], documents: list[dict[str, Any]]) -> list[str]:
    """What is left to fill in, and where: files with lines; of standard input the objects."""
    found = places([source for file in files if file != "-" for source in sources(Path(file))], documents)
    if "-" in files:
        told = [(f"{one.get('kind')}/{(one.get('metadata') or {}).get('name')}", placeholders(one)) for one in documents]
        found += [f"{which}: {UNFILLED} {', '.join(left)}" for which, left in told if left]
    return found + [f"{UNFILLED} {one}" for one in unfilled(documents) if one not in placeholders(documents)]


def problems(documents: list[dict[str, Any]]) -> Iterator[str]:
    """What is wrong with manifests that are applied together."""
    called = [(one.get("kind"), (one.get("metadata") or {}).get("name")) for one in documents]
    accounts = {str(name) for kind, name in called if kind == "ServiceAccount"}
    for (kind, name), one in zip(called, documents, strict=True):
        if not kind or not name:
            yield f"{kind}/{name}: an object needs kind and metadata.name"
            continue
        where = f"{kind}/{name}"
        if kind in CLUSTER_SPEC:
            yield from (f"{where}: {text}" for text in _ray_problems(one, accounts))
        else:
            yield from (f"{where}: {text}" for text in kubernetes_problems(one))
            yield from (f"{where}: {text}" for text in _exposed(one))
    for twice in sorted({f"{kind}/{name}" for kind, name in called if called.count((kind, name)) > 1}):
        yield f"{twice} is there twice"
    yield from names(documents)
    yield from namespaces(documents)
    clusters = [one for one in documents if one.get("kind") in CLUSTER_SPEC]
    if any(one["kind"] != "RayJob" for one in clusters):  # jobs are applied to a namespace that has these
        yield from together(documents)


def _exposed(one: dict[str, Any]) -> Iterator[str]:
    spec = one.get("spec") or {}
    if one["kind"] == "Service" and spec.get("type") in ("LoadBalancer", "NodePort"):
        yield f"spec.type {spec['type']} opens it to others than this cluster; ClusterIP, behind an ingress that asks for TLS"
    if one["kind"] == "Secret" and (one.get("data") or one.get("stringData")):
        yield "a Secret's content has no place in a manifest; make it with `kubectl create secret`"
    for rule in spec.get("ingress") or [] if one["kind"] == "NetworkPolicy" else []:
        blocks = [each.get("ipBlock", {}).get("cidr") for each in rule.get("from") or []]
        if not rule.get("from") or any(cidr in WORLD for cidr in blocks):
            yield "spec.ingress lets the world in; say from whom"


@cache
def _ray_schema() -> dict[str, Any]:
    return dict(yaml.safe_load((SCHEMAS / "kuberay.yaml").read_text()))


def kubernetes_problems(one: dict[str, Any]) -> Iterator[str]:
    """Where an object of Kubernetes' own is not one, by its schemas."""
    yield from _kubernetes_problems(json.dumps(one))


@cache
def _kubernetes_problems(one: str) -> tuple[str, ...]:
    """As above, of JSON: many pods are alike, and each look opens dozens of files."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(json.loads(one), KUBERNETES, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(str(part) for part in error.path)}: {error.message[:300]}",)
    except kubernetes_validate.SchemaNotFoundError as error:
        return (f"Kubernetes {KUBERNETES} knows no {error.kind} of {error.api_version}",)
    return ()


def _ray_problems(one: dict[str, Any], accounts: set[str]) -> Iterator[str]:
    kind, spec = one["kind"], one.get("spec") or {}
    if one.get("apiVersion") != "ray.io/v1":
        yield f"apiVersion is {one.get('apiVersion')}, and must be ray.io/v1"
    name = one["metadata"]["name"]
    if len(name) > LONGEST[kind] or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"metadata.name must be small letters, digits and -, at most {LONGEST[kind]}"
    schema = {"$defs": _ray_schema()["$defs"], **_ray_schema()[kind]}
    said = [*schema_problems(schema, spec, "spec")] or [*no_containers(one)]
    yield from said
    if said:
        return
    yield from refused(one)
    if cluster := cluster_of(one):
        trains = kind == "RayJob" and str(spec["entrypoint"]).startswith("python -m jobs.train_")
        yield from _cluster(cluster, accounts, ONE_DRIVER_GB if trains or kind == "RayService" else HEAD_GB)
    if kind == "RayJob":
        yield from _job(spec)
    if kind == "RayService":
        yield from (f"spec.serveConfigV2: {text}" for text in serve_problems(spec["serveConfigV2"]))


def _cluster(cluster: dict[str, Any], accounts: set[str], head_gb: int) -> Iterator[str]:
    import ray

    if (cluster.get("authOptions") or {}).get("mode") != "token":
        yield "authOptions.mode is not token; without it whoever reaches Ray's ports runs what he likes"
    if cluster.get("rayVersion") != ray.__version__:
        yield f"rayVersion is {cluster.get('rayVersion')}, and the pinned Ray is {ray.__version__}"
    head, workers = cluster["headGroupSpec"], cluster.get("workerGroupSpecs") or []
    fixed = workers and all(one["minReplicas"] == one.get("replicas") == one["maxReplicas"] > 0 for one in workers)
    if cluster.get("enableInTreeAutoscaling"):
        if (cluster.get("autoscalerOptions") or {}).get("version") != "v2":
            yield "autoscalerOptions.version must be v2: the first autoscaler knows no labels"
    elif not fixed:
        yield "enableInTreeAutoscaling (autoscalerOptions.version v2) is needed where minReplicas, replicas and maxReplicas of a group differ"
    elif head["template"]["spec"].get("automountServiceAccountToken") is not False:
        yield "headGroupSpec: automountServiceAccountToken is not false; a head without an autoscaler asks nothing of Kubernetes"
    yield from (f"headGroupSpec: {text}" for text in _head(head, head_gb))
    groups = [one["groupName"] for one in workers]
    for group in workers:
        yield from (f"{group['groupName']}: {text}" for text in _group(group))
    if len(set(groups)) < len(groups):
        yield f"two groups have one name: {', '.join(groups)}"
    for where, group in [("headGroupSpec", head), *zip(groups, workers, strict=True)]:
        yield from (f"{where}: {text}" for text in _pod(group["template"], accounts))


def _head(head: dict[str, Any], least_gb: int) -> Iterator[str]:
    pod = head["template"]["spec"]
    if head.get("resources", {}).get("CPU") != "0":
        yield 'resources.CPU must be "0", so that no task takes the head\'s memory'
    if (head.get("labels") or {}).get("market") != "on-demand" or any("spot" in str(one.get("key")) for one in pod.get("tolerations", [])):
        yield "the head may be on a spot machine; when it is taken away, all jobs go with it: labels {market: on-demand}, no toleration of spot"
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield "the dashboard can be reached from outside; serviceType ClusterIP, no ingress, and `kubectl port-forward`"
    memory = pod["containers"][0].get("resources", {}).get("requests", {}).get("memory", "0")
    if _gib(memory) < least_gb:
        yield f"requests.memory is {memory}, and needs {least_gb}Gi"


def _group(group: dict[str, Any]) -> Iterator[str]:
    if not group["minReplicas"] <= group.get("replicas", group["minReplicas"]) <= group["maxReplicas"]:
        yield f"minReplicas {group['minReplicas']} ≤ replicas {group.get('replicas')} ≤ maxReplicas {group['maxReplicas']} does not hold"
    resources = group.get("resources", {})
    for name, amount in resources.items():
        if not re.fullmatch(r"\d+", amount):
            yield f"resources.{name} is {amount!r}, and must be a whole number"
    gpus = int(group["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("nvidia.com/gpu", 0))
    labelled = (group.get("labels") or {}).get("ray.io/accelerator-type")
    accelerators = [name.partition(":")[2] for name in resources if name.startswith("accelerator_type:")]
    if bool(gpus) != bool(labelled) or accelerators != ([labelled] if labelled else []):
        yield f"it has {gpus} GPUs, the label ray.io/accelerator-type {labelled} and the accelerator types {accelerators}; these go together"
    if "market" not in (group.get("labels") or {}):
        yield "labels.market is not set; spot or on-demand"
    pod = group["template"]["spec"]
    hook = pod["containers"][0].get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
    grace = pod.get("terminationGracePeriodSeconds", 30)
    if hook[:3] != ["python", "-m", "cluster_configs.drain"]:
        yield "no preStop drains the node (python -m cluster_configs.drain --seconds N)"
    elif int(hook[-1]) + GRACE_S > grace:
        yield f"preStop takes up to {hook[-1]} s, and the pod is killed after {grace}; terminationGracePeriodSeconds must be {GRACE_S} more"


def _pod(template: dict[str, Any], accounts: set[str]) -> Iterator[str]:
    pod = template["spec"]
    yield from kubernetes_problems({"apiVersion": "v1", "kind": "Pod", "metadata": template.get("metadata") or {"name": "x"}, "spec": pod})
    if pod.get("restartPolicy") not in (None, "Never"):
        yield f"restartPolicy is {pod['restartPolicy']}, and must be Never with this autoscaler"
    if pod.get("serviceAccountName") not in accounts:
        known = f"and these files have {', '.join(sorted(accounts)) or 'none'}"
        yield f"serviceAccountName is {pod.get('serviceAccountName')}, {known}; name one of them, or also the file that has it (base/accounts.yaml)"
    if not pod.get("nodeSelector"):
        yield "no nodeSelector says which machines it is for"
    if not (pod.get("securityContext") or {}).get("runAsNonRoot"):
        yield "securityContext.runAsNonRoot is not true"
    volumes = {one["name"] for one in pod.get("volumes", [])}
    for container in pod.get("containers", []):
        if not re.search(r"(:(?!latest$)[\w.-]+|@sha256:[0-9a-f]{64})$", container.get("image", "")):
            yield f"image {container.get('image')!r} has no version"
        for mount in container.get("volumeMounts", []):
            if mount["name"] not in volumes:
                yield f"it mounts {mount['name']}, which is no volume of it"


def _job(spec: dict[str, Any]) -> Iterator[str]:
    found = re.match(r"python -m ([\w.]+)", spec["entrypoint"])
    root = Path(__file__).parents[1]
    if found is None or not (root / f"{found[1].replace('.', '/')}.py").is_file():
        yield f"spec.entrypoint {spec['entrypoint']!r} runs no module of this project"
    if spec.get("backoffLimit"):
        yield f"spec.backoffLimit is {spec['backoffLimit']}: what was stopped, or cannot succeed, would start again on machines that cost"
    if not spec.get("shutdownAfterJobFinishes"):
        yield "spec.shutdownAfterJobFinishes is not true; the cluster would stay, and cost"


UNITS = {"": 2**30, "Ki": 2**20, "Mi": 2**10, "Gi": 1, "Ti": 1 / 2**10}


def _gib(quantity: str) -> float:
    found = re.fullmatch(r"(\d+)(|Ki|Mi|Gi|Ti)", str(quantity))
    return float(found[1]) / UNITS[found[2]] if found else 0.0


if __name__ == "__main__":
    sys.exit(main())
