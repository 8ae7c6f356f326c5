"""Whether a run and the cluster of a file for ``ray up`` go together: what could not start there, and what would cost more than it need."""

from __future__ import annotations

import os
import urllib.parse
from collections.abc import Iterable, Iterator
from typing import Any

from cluster_configs.demand import Demand, demands, fits, trainings, unmet
from cluster_configs.policies import SCHEMES
from jobs.plan import encoders_before
from paris_ray.config import RunConfig
from paris_ray.resources import HERE
from paris_ray.training import plan


def unmet_demands(tree: dict[str, Any], run: RunConfig, cluster: str = HERE) -> Iterator[str]:
    """What a run asks for, or needs, that a cluster of this file could not give."""
    if tree["provider"]["type"] == "local":
        return  # what machines there are, only they know
    types, needs = workers(tree), gpu_memory(run)
    for demand in demands(run, cluster):
        said = unmet(demand, types) or short_of_memory(demand, needs, types)
        if said is not None:
            yield said


def workers(tree: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The node types of a file but the head's."""
    return {name: one for name, one in tree["available_node_types"].items() if name != tree["head_node_type"]}


def gpu_memory(run: RunConfig) -> dict[str, float]:
    """GB that the GPU of each training must have, counted, by the name of what it asks for."""
    needs: dict[str, float] = {}
    for one in plan.trainings(run, [1] * run.num_experts, encoders_before(run)):
        asked = one.spec.resources
        name = f"experts.{one.stage.removeprefix('expert-')}.resources" if one.is_expert else "router.resources"
        if asked.gpus:
            gigabytes = one.memory / 2**30 / plan.USABLE / min(1.0, asked.gpus)
            needs[name] = max(needs.get(name, 0.0), gigabytes)
    return needs


def short_of_memory(demand: Demand, needs: dict[str, float], node_types: dict[str, dict[str, Any]]) -> str | None:
    """Which node types a training could land on whose GPUs are too small for it, ``None`` if there are none.

    Args:
        demand: what it asks for.
        needs: what :func:`gpu_memory` gives.
        node_types: of which some fit the demand.
    """
    need = needs.get(demand.name.removesuffix(".fallback"), 0.0)
    has = {name: int(one["labels"]["gpu_memory"]) for name, one in node_types.items() if "gpu_memory" in one.get("labels", {})}
    could = {name: has[name] for name, one in node_types.items() if name in has and one["max_workers"] and fits(demand, one)}
    small = {name: size for name, size in could.items() if size < need}
    if not small:
        return None
    said = f"{demand.name}: the training needs a GPU of {need:.0f} GB (counted)"
    listed = ", ".join(f"{name} {size} GB" for name, size in small.items())
    if small == could:
        remedy = "lower train.micro_batch or set train.gradient_checkpointing, or ask for, or add, machines with larger ones"
        return f"{said}, and no node type that it asks for has one ({listed}); {remedy}"
    sizes = sorted({size for size in has.values() if size < need})
    selector = f"!{sizes[0]}" if len(sizes) == 1 else f"!in({', '.join(map(str, sizes))})"
    return f'{said}, and may land on {listed}; set {demand.name}.labels.gpu_memory: "{selector}"'


def costly(tree: dict[str, Any], run: RunConfig, cluster: str = HERE) -> list[str]:
    """What would start, and then cost more than it need, or fail late."""
    cloud = tree["provider"]["type"]
    own = _only_they_know(run, cluster) if cloud == "local" else [*_spot(tree, run, cluster), *_stores(cloud, run, cluster)]
    return [*_notices(cloud, run, cluster), *own]


def _notices(cloud: str, run: RunConfig, cluster: str) -> list[str]:
    """Notices that nobody gives there."""
    told = "machines of one's own get no notice" if cloud == "local" else f"the file is of {cloud}"
    said = [
        (f"{one.name}.preemption", f"is {one.preemption}, and {told}: when a machine goes, what was trained since the last checkpoint goes with it")
        for one in trainings(run, cluster)
        if one.preemption not in (None, cloud)
    ]
    return _joined(said)


def _spot(tree: dict[str, Any], run: RunConfig, cluster: str) -> list[str]:
    """Trainings on GPUs that may be taken away, whose notice they do not heed."""
    cloud, said = tree["provider"]["type"], []
    for one in trainings(run, cluster):
        spot = [name for name, each in workers(tree).items() if (each.get("labels") or {}).get("market") == "spot" and fits(one, each)]
        if spot and one.preemption is None and one.resources["GPU"]:
            text = (
                f"is not set, and {', '.join(spot)} {'is' if len(spot) == 1 else 'are'} on spot: what was trained since the last checkpoint is lost"
            )
            said.append((f"{one.name}.preemption", f"{text} whenever a machine is taken away; set it to {cloud}"))
    return _joined(said)


def _stores(cloud: str, run: RunConfig, cluster: str) -> list[str]:
    """Stores of another cloud than the machines', but for an S3 of one's own, which the environment names."""
    if cluster == HERE:
        uris = {"run_dir": run.run_dir, "data.source.uri": str(getattr(run.data.source, "uri", ""))}
    else:
        stored = run.clusters[cluster].storage
        uris = {f"clusters.{cluster}.storage": stored} if stored else {"run_dir": run.run_dir}
    said = []
    for key, uri in uris.items():
        scheme = urllib.parse.urlsplit(uri).scheme
        of = next((name for name, schemes in SCHEMES.items() if scheme in schemes), cloud)
        if of != cloud and not (scheme == "s3" and os.environ.get("AWS_ENDPOINT_URL")):
            said.append((key, f"is {uri}, a store of {of}, and the machines are of {cloud}: what goes from one to the other is paid for, by the GB"))
    return _joined(said)


def _only_they_know(run: RunConfig, cluster: str) -> list[str]:
    """What is asked of machines of one's own that not every machine has."""
    needs, said = gpu_memory(run), []
    for one in demands(run, cluster):
        if one.labels or any(amount for name, amount in one.resources.items() if name != "CPU"):
            need = needs.get(one.name.removesuffix(".fallback"))
            counted = f" (of {need:.0f} GB, counted)" if need else ""
            said.append((one.name, f"asks for {one}{counted}; whether your machines have it, only they know: run jobs.doctor after `ray up`"))
    return _joined(said)


def _joined(said: Iterable[tuple[str, str]]) -> list[str]:
    """What is said of several keys, once."""
    keys: dict[str, list[str]] = {}
    for key, text in said:
        keys.setdefault(text, []).append(key)
    return [f"{of[0]}{f' (and {len(of) - 1} more)' if of[1:] else ''} {text}" for text, of in keys.items()]
