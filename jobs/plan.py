"""Where to train what, how long it will take, what it will cost, and what preemptions will take of it.

    python -m jobs.plan --config RUN/config.yaml                            # measures this machine: the run's own training steps
    python -m jobs.plan --config RUN/config.yaml --machines machines.yaml   # trains nothing

Before there are clusters, with ``--machines``, equal shares of the rows are assumed. To measure, the run's encoders and clusters are needed; what was
measured is printed as a table of machines, to be edited and given with ``--machines``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import yaml

from jobs import checks, cli
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.data.report.cost import time_text
from paris_ray.evaluation.matching import inputs_of
from paris_ray.manifest import StaleError
from paris_ray.storage import Folder
from paris_ray.training import plan
from paris_ray.training.plan import Devices, MachineTable, Plan


def main(argv: Sequence[str] | None = None) -> int:
    """Plan; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser)
    parser.add_argument("--machines", metavar="YAML", help="what there is to train on; without it, this machine is measured")
    parser.add_argument("--equal-hours", action="store_true", help="give unequal machines unequal budgets, so that all experts end together")
    args = parser.parse_args(argv)
    try:
        config = cli.load(args)
        table = configs.read(MachineTable, args.machines, "--machines").machines if args.machines else None
        rows = rows_of(config) if table else stages.cluster_sizes(config)
        if len(rows) != config.num_experts:
            raise StaleError(f"the clusters are of {len(rows)} experts, the config has {config.num_experts}; make them anew, or set experts")
        found = plan.trainings(config, rows, encoders_of(config))
        print(text(plan.make(found, table or (measured(config),)), args.equal_hours))
    except (ConfigError, StaleError, FileNotFoundError) as error:
        return cli.complain(parser, error)
    return 0


def rows_of(config: RunConfig) -> list[int]:
    """Train rows of each expert; before there are clusters, equal shares of the corpus, or of what the source lists, which is said.

    Raises:
        ConfigError: a training counts passes over its rows, and nobody knows how many there are.
    """
    try:
        return stages.cluster_sizes(config)
    except FileNotFoundError:
        pass
    parts = {"router": config.router, **{f"experts.{k}": one for k, one in enumerate(config.experts)}}
    counting = [name for name, one in parts.items() if one.train.images is None]
    corpus = stages.status(config, "embed").manifest
    if corpus is not None:
        total, of = int(corpus["counts"]["splits"]["train"]), "the corpus has"
    elif counting:
        total, of = _listed(config, counting), "the source lists, as far as none is refused"
    else:
        total, of = config.num_experts, ""
    print("There are no clusters yet; counted with equal ones" + (f" of the {total:,} rows for training that {of}.\n" if of else ".\n"))
    return [max(1, total // config.num_experts)] * config.num_experts


def _listed(config: RunConfig, counting: Sequence[str]) -> int:
    """Rows for training, on average, of a source that has not been read."""
    remedy = f"passes over rows are counted by {', '.join(counting)}; say how many images instead, --set {counting[0]}.train.images=…, or run embed"
    try:
        checks.check_source(config)
        listed = checks.listed_rows(config)
    except ConfigError as error:
        raise ConfigError(f"{error}; {remedy}") from None
    if listed is None:
        raise ConfigError(f"data.source: how many rows a {config.data.source.kind} has, only reading tells; {remedy}")
    return checks.expected_rows(config, listed)["train"]


def encoders_of(config: RunConfig) -> dict[str, Any]:
    """What the networks read; before there are encoders, what those of the config have."""
    try:
        return dict(Folder(config.run_dir).read_json("encoders/encoders.json"))
    except FileNotFoundError:
        return encoders_before(config)


def encoders_before(config: RunConfig) -> dict[str, Any]:
    """What the networks will read, by the config alone."""
    inputs = inputs_of(config)
    return {
        "codec": {"channels": inputs.channels, "latent_size": inputs.side},
        "text": {"max_length": inputs.text_tokens, "width": inputs.text_width},
    }


def measured(config: RunConfig) -> Devices:
    """Measure this machine and print what was found."""
    from paris_ray.training.measure import this_machine

    machine = this_machine(config)
    print(yaml.safe_dump({"machines": [machine.model_dump(exclude_defaults=True)]}, sort_keys=False))
    return machine


COLUMNS = {"stage": 16, "machine": 24, "begins": 13, "ends": 13, "images/s": 11, "checkpoint": 13, "goodput": 10, "price": 0}


def text(made: Plan, equal: bool = False) -> str:
    """A plan for people."""
    lines = ["".join(f"{name:<{width}}" for name, width in COLUMNS.items())]
    for one, spot, fit in zip(made.trainings, made.placement.spots, made.fits, strict=True):
        machine = made.machines[spot.kind]
        cells = {
            "stage": one.stage,
            "machine": f"{machine.name} {', '.join(str(d) for d in spot.devices)}" + (f" ({machine.cluster})" if machine.cluster else ""),
            "begins": time_text(spot.begins) if spot.begins else "at once",
            "ends": time_text(spot.ends),
            "images/s": f"{fit.rate:.4g}",
            "checkpoint": f"{fit.checkpoint:.1f} s",
            "goodput": f"{fit.goodput:.1%}",
            "price": f"{(spot.ends - spot.begins) * machine.price_per_hour * one.workers:,.2f}",
        }
        lines.append("".join(f"{cells[name]:<{width}}" for name, width in COLUMNS.items()).rstrip())
    placed = made.placement
    lines.append("")
    lines.append(f"All have ended after {time_text(placed.hours)}, for {placed.cost:,.2f}; of the experts {made.critical} ends last.")
    if not placed.exact:
        lines.append("There were too many placements to look at all; a better one may exist.")
    lines += advice(made)
    if equal:
        lines.append("Budgets with which the experts end together there (in proportion to their speed, the same number of images in all):")
        lines += [f"  --set experts.{name.removeprefix('expert-')}.train.images={images}" for name, images in plan.equal_hours(made).items()]
    return "\n".join(lines)


def advice(made: Plan) -> list[str]:
    """What to set so that preemptions cost less; trainings that are told the same share a line."""
    told: dict[str, list[str]] = {}
    for one, spot, fit in zip(made.trainings, made.placement.spots, made.fits, strict=True):
        cloud, train = made.machines[spot.kind].preemption, one.spec.train
        if fit.checkpoint_images is not None and fit.goodput < plan.ENOUGH and fit.best_goodput > fit.goodput:
            every = f"every {train.checkpoint_images} images" if train.checkpoint_images else "at the end only"
            best = f"at Young's interval it is {fit.best_goodput:.0%}: train.checkpoint_images={fit.checkpoint_images}"
            told.setdefault(f"{fit.goodput:.0%} of the time in steps, with checkpoints {every}; {best}", []).append(one.stage)
        if fit.loses_nothing and one.spec.resources.preemption != cloud:
            said = f"counted with preemptions that lose no step, for which their notice must be heeded: resources.preemption={cloud}"
            told.setdefault(said, []).append(one.stage)
    experts = [one.stage for one in made.trainings if one.is_expert]
    if len(experts) > 1:
        told = {said: ["all experts", *names[len(experts) :]] if names[: len(experts)] == experts else names for said, names in told.items()}
    return [f"{', '.join(names)}: {said}" for said, names in told.items()]


if __name__ == "__main__":
    sys.exit(main())
