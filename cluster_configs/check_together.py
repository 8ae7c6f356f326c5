"""What manifests that are applied together must have to do with each other: names, selectors, budgets; and what in them is still to be filled in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from cluster_configs.unfilled import placeholders

CLUSTER_SPEC = {"RayCluster": (), "RayJob": ("rayClusterSpec",), "RayService": ("rayClusterConfig",)}
"""Where a cluster is in the ``spec`` of a kind."""
OF_NO_NAMESPACE = {"Namespace", "ClusterRole", "ClusterRoleBinding", "PersistentVolume", "StorageClass", "PriorityClass", "Kustomization"}
NEVER = 1000
"""More pods than there are: a budget that wants so many lets none go."""
SUBMITTER = {"ray.io/originated-from-crd": "RayJob"}
"""What KubeRay, since 1.7, puts on the pod that submits a RayJob. Pods of Ray's nodes have no such label, whatever they came from."""


@dataclass(frozen=True)
class Pods:
    """Of one group: their labels, and how many there are at least."""

    labels: dict[str, str]
    least: int


def cluster_of(one: dict[str, Any]) -> dict[str, Any]:
    """The cluster in an object of KubeRay's; empty where there is none."""
    cluster = one.get("spec") or {}
    for key in CLUSTER_SPEC[one["kind"]]:
        cluster = cluster.get(key) or {}
    return dict(cluster)


def pods(documents: list[dict[str, Any]]) -> Iterator[Pods]:
    """Those that KubeRay makes: with labels of its own, of the pod's template, and of the group."""
    for one in documents:
        if one.get("kind") not in CLUSTER_SPEC:
            continue
        cluster, name = cluster_of(one), one["metadata"]["name"]
        head = cluster.get("headGroupSpec") or {}
        groups = [("head", "headgroup", 1, head)]
        groups += [("worker", each.get("groupName", ""), each.get("minReplicas", 0), each) for each in cluster.get("workerGroupSpecs") or []]
        for node_type, group, least, spec in groups:
            own = {
                "ray.io/is-ray-node": "yes",
                "ray.io/node-type": node_type,
                "ray.io/group": group,
                "ray.io/cluster": name,
                "app.kubernetes.io/name": "kuberay",
                "app.kubernetes.io/created-by": "kuberay-operator",
            }
            told = ((spec.get("template") or {}).get("metadata") or {}).get("labels") or {}
            yield Pods({**own, **told, **(spec.get("labels") or {})}, least if isinstance(least, int) else 0)
    yield Pods(SUBMITTER, 0)  # jobs are applied later, to the same namespace


def selected(selector: dict[str, Any], every: list[Pods]) -> list[Pods]:
    """Those that a selector takes."""
    wanted = (selector.get("matchLabels") or {}).items()
    return [one for one in every if wanted <= one.labels.items()]


def names(documents: list[dict[str, Any]]) -> Iterator[str]:
    """No two of KubeRay's objects have one name, whatever they are: the service of the head is NAME-head-svc of each."""
    by: dict[str, list[str]] = {}
    for one in documents:
        if one.get("kind") in CLUSTER_SPEC:
            by.setdefault(str((one.get("metadata") or {}).get("name")), []).append(one["kind"])
    for name, kinds in by.items():
        if len(set(kinds)) > 1:
            yield f"{' and '.join(kinds)} are both called {name}, so they would share the service {name}-head-svc, and each other's nodes; rename one"


def namespaces(documents: list[dict[str, Any]]) -> Iterator[str]:
    """All go to one namespace: kubectl sends what names none to wherever its context points. Kustomize names none for what a component adds."""
    by: dict[str, list[str]] = {}
    for one in documents:
        if one.get("kind") not in OF_NO_NAMESPACE:
            told = one.get("metadata") or {}
            by.setdefault(str(told.get("namespace") or "none"), []).append(f"{one.get('kind')}/{told.get('name')}")
    most = max(by, key=lambda name: len(by[name]), default="")
    for name, which in by.items():
        if name != most:
            yield f"{', '.join(which)}: namespace {name}, and the others are in {most}; give the overlay `namespace: {most}`"


def together(documents: list[dict[str, Any]]) -> Iterator[str]:
    """What policies and budgets there are, and whether each selects pods that there will be."""
    every = list(pods(documents))
    policies = [one for one in documents if one.get("kind") == "NetworkPolicy"]
    specs = [one.get("spec") or {} for one in policies]
    if not any(spec.get("podSelector") == {} and not spec.get("ingress") and "Ingress" in spec.get("policyTypes", []) for spec in specs):
        yield "no NetworkPolicy forbids what the others do not allow: one with `podSelector: {}`, policyTypes Ingress and Egress, and no rules"
    for one in policies:
        spec = one.get("spec") or {}
        peers = [peer for key, way in (("ingress", "from"), ("egress", "to")) for rule in spec.get(key) or [] for peer in rule.get(way) or []]
        here = [peer["podSelector"] for peer in peers if "podSelector" in peer and "namespaceSelector" not in peer]
        for selector in (spec.get("podSelector") or {}, *here):
            if not selected(selector, every):
                yield f"NetworkPolicy/{one['metadata']['name']}: {selector} selects no pod of these clusters; what it should open stays closed"
    yield from _budgets([one for one in documents if one.get("kind") == "PodDisruptionBudget"], every)


def _budgets(budgets: list[dict[str, Any]], every: list[Pods]) -> Iterator[str]:
    heads = [one for one in every if one.labels.get("ray.io/node-type") == "head"]
    kept: list[Pods] = []
    for one in budgets:
        spec, where = one.get("spec") or {}, f"PodDisruptionBudget/{one['metadata']['name']}"
        of, least = selected(spec.get("selector") or {}, every), spec.get("minAvailable")
        if not of:
            yield f"{where}: {spec.get('selector')} selects no pod of these clusters; it guards nothing"
        elif not isinstance(least, int):
            yield f"{where}: it needs minAvailable, a whole number: Kubernetes cannot count what a RayCluster should have, and would let none go"
        elif least >= NEVER:
            kept += of
        elif least and least >= (there := sum(each.least for each in of)):
            yield f"{where}: minAvailable is {least}, and there may be {there} pods of it; none could be moved, so no node be upgraded"
    if any(one not in kept for one in heads):
        yield f"no PodDisruptionBudget keeps the heads (minAvailable: {NEVER}), whose end is that of all their jobs"


def unfilled(documents: list[dict[str, Any]]) -> list[str]:
    """What in manifests is yours to fill in: accounts, registries, buckets, and roles that are tied to no account of the store."""
    found = {text for one in documents for text in placeholders(one)}
    used = set()
    for one in documents:
        if one.get("kind") not in CLUSTER_SPEC:
            continue
        cluster = cluster_of(one)
        for group in (cluster.get("headGroupSpec") or {}, *(cluster.get("workerGroupSpecs") or [])):
            pod = (group.get("template") or {}).get("spec") or {}
            used.add(pod.get("serviceAccountName"))
            images = [each.get("image", "") for each in pod.get("containers") or []]
            found |= {f"image {image} (no registry)" for image in images if "/" not in image}
    for one in documents:
        if one.get("kind") == "ServiceAccount" and one["metadata"]["name"] in used and not one["metadata"].get("annotations"):
            found.add(f"the annotation of ServiceAccount {one['metadata']['name']}, without which the store knows its pods by no role")
    return sorted(found)
