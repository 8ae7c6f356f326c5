"""Whether what AWS lets an account have at once is enough for a run. Quotas are of vCPUs, for all machines of a family together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from fractions import Fraction

from cluster_configs.check import HEAD_GB
from cluster_configs.demand import selects, times
from cluster_configs.providers import Machine, machines
from jobs.findings import Facts, Finding, fault
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.resources import Resources
from paris_ray.training.worker import resources

FAMILIES = {"T4": "G and VT", "L4": "G and VT", "A10G": "G and VT", "L40S": "G and VT", "V100": "P3", "A100": "P4", "H100": "P5", "H200": "P5"}
"""AWS's family of machines for each GPU."""
STANDARD = "Standard"
"""That of all machines without one."""
OF_HEAD = f"on-demand {STANDARD}"
ASK = "ask for more in Service Quotas, in the region of the cluster; it takes days"


def quotas(facts: Facts) -> Iterator[Finding]:
    """Whether the account's quotas let the head start, and the machines that the run trains on, as many as train at once."""
    for cloud, told in facts.quotas.items():
        if isinstance(told, str):
            yield Finding("quotas", cloud, told, "not asked")
            continue
        short = told.get(OF_HEAD, math.inf) < head()
        if short:
            rule = f"a cluster's head is a machine on demand with {HEAD_GB} GB of memory and no GPU, which has at least {head()} vCPUs"
            yield fault("quotas", cloud, f"{OF_HEAD}: {told[OF_HEAD]:.0f} vCPUs", rule, f"{ASK}. Without a head nothing starts")
        for of, at_once in _at_once(facts.config, cloud, told):
            needs = {name: least(at_once.values(), name) + (head() if name == OF_HEAD else 0) for name in of}
            if any(told[name] >= needs[name] for name in of):
                continue
            short = True
            yield fault(
                "quotas",
                cloud,
                ", ".join(f"{name}: {told[name]:.0f} vCPUs" for name in of),
                f"{', '.join(at_once)} train at once{' beside the head' if OF_HEAD in of else ''}, in machines of at least "
                + (" or ".join(f"{needs[name]} vCPUs" + (f" ({name})" if len(of) > 1 else "") for name in of)),
                f"{ASK}. Or let fewer train at once (max_parallel)",
            )
        if not short:
            yield Finding("quotas", cloud, ", ".join(f"{name}: {vcpus:.0f} vCPUs" for name, vcpus in told.items()))


def head() -> int:
    """vCPUs of the smallest machine that a head may be."""
    return min(one.cpus for one in machines("aws").values() if one.gpu is None and one.memory >= HEAD_GB)


def _at_once(config: RunConfig | None, cloud: str, names: Iterable[str]) -> Iterator[tuple[list[str], dict[str, Resources]]]:
    """The trainings of each cluster that run at once and come out of the same quotas: the quotas, and who asks for what.

    Each cluster for itself, as another one may be in another region, which has quotas of its own.
    """
    found: dict[tuple[str, tuple[str, ...]], dict[str, Resources]] = {}
    for stage in filter(stages.trains, stages.names(config) if config else ()):
        assert config is not None
        asked = resources(config, stage)
        if asked.preemption in (None, cloud) and (of := tuple(quotas_of(asked, names))):
            found.setdefault((config.cluster_of(stage), of), {})[stage] = asked
    for (_, of), trainings in found.items():
        assert config is not None
        largest = sorted(trainings, key=lambda stage: -max(_share(trainings[stage], name) for name in of))[: config.max_parallel]
        yield list(of), {stage: trainings[stage] for stage in trainings if stage in largest}


def quotas_of(asked: Resources, names: Iterable[str]) -> list[str]:
    """Which of AWS's quotas a machine with such a GPU, or with none, comes out of; several where the settings leave it open."""
    gpus = {asked.accelerator_type} if asked.accelerator_type else {one.gpu for one in _holding(asked)} or set(FAMILIES)
    families = {FAMILIES.get(gpu or "", "") for gpu in gpus} if asked.gpus else {STANDARD}
    markets = {"spot", "on-demand"} if (market := asked.labels.get("market")) not in ("spot", "on-demand") else {market}
    if asked.preemption:
        markets = {"spot"}
    # On demand, all of P are one.
    kinds = {(market, "P" if market == "on-demand" and family.startswith("P") else family) for market in markets for family in families}
    return [name for name in names if any(name.startswith(f"{market} ") and family and family in name for market, family in kinds)]


def least(asked: Iterable[Resources], quota: str) -> int:
    """The vCPUs that trainings take at the least which run at once, in machines of a quota; 1 where no such machine is known.

    The rule: what the smallest machines for any one of them have, and no less than what goes with all their GPUs where a GPU comes with the fewest
    vCPUs, as several may share a machine. Without GPUs it is the cores that they ask for.
    """
    every = list(asked)
    alone = max(
        min((-(-one.num_workers // _workers(one, machine)) * machine.cpus for machine in _holding(one, quota)), default=1) for one in every
    )  # fmt: skip
    return max(alone, math.ceil(sum(_share(one, quota) for one in every)))


def _share(asked: Resources, quota: str) -> Fraction:
    """Of vCPUs, as much as goes with the GPUs of a training, or as it asks for."""
    if not asked.gpus:
        return Fraction(asked.cpus).limit_denominator(1000) * asked.num_workers
    gpus = Fraction(asked.gpus).limit_denominator(1000) * asked.num_workers
    return min((gpus * machine.cpus / machine.gpus for machine in _holding(asked, quota)), default=Fraction(0))


def _holding(asked: Resources, quota: str | None = None) -> list[Machine]:
    """AWS's machines that hold a worker, those of a quota."""
    memory = asked.labels.get("gpu_memory")
    return [
        one
        for one in machines("aws").values()
        if _workers(asked, one)
        and asked.accelerator_type in (None, one.gpu)
        and (memory is None or selects(memory, str(one.gpu_memory)))
        and (quota is None or (family := FAMILIES[one.gpu] if one.gpu else STANDARD) in quota or (quota == "on-demand P" and family.startswith("P")))
    ]


def _workers(asked: Resources, machine: Machine) -> int:
    """How many workers of a training a machine holds."""
    cores = times("CPU", machine.cpus, asked.cpus)
    return min(times("GPU", machine.gpus, asked.gpus), cores) if asked.gpus else cores
