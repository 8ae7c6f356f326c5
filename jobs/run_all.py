"""Run all stages of a run as Ray jobs and follow them.

python -m jobs.run_all --config demo
python -m jobs.run_all --config RUN/config.yaml --address http://head:8265
python -m jobs.run_all --config RUN/config.yaml --address http://head:8265 --until partition   # then look at the clusters

Without an address a Ray cluster is started on this machine for as long as the run takes. Experts whose `cluster` is one of the config's `clusters`
are trained there. The same command again skips what is done, follows what is running in any of them, and resumes what was cut off.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from jobs import checks, cli, clusters
from jobs.local_cluster import ClusterError, LocalCluster, exit_on_signals
from jobs.runner import ClusterLostError, CostReachedError, Runner
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.config_errors import nearest
from paris_ray.lock import Lock, LockedError
from paris_ray.manifest import StaleError
from paris_ray.opening import heard
from paris_ray.progress import clock
from paris_ray.storage import Folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run it; returns the exit code: 0 all valid, 1 something failed, 2 wrong input, 3 ``--max-cost`` is spent, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m jobs.run_all", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser)
    parser.add_argument("--address", help="URL of a Ray dashboard, http://HOST:8265; default: a cluster of our own on this machine")
    parser.add_argument("--until", metavar="STAGE", help="only this stage and what it needs; the same command without it goes on")
    parser.add_argument("--retries", type=int, default=1, metavar="N", help="how often a failed job is tried again (default 1)")
    parser.add_argument(
        "--max-cost",
        type=float,
        metavar="MONEY",
        help="when the run's trainings have cost so much, by resources.price_per_hour, stop them, with checkpoints",
    )
    parser.add_argument("--detach", action="store_true", help="on Ctrl-C leave the jobs running; the same command follows them again")
    args = parser.parse_args(argv)
    exit_on_signals()
    try:
        config = cli.load(args)
        names = wanted(config, args.until)
        check_source(config, args.rebuild)
        if args.max_cost is not None:
            check_prices(config)
        if args.dry_run:
            cli.print_plan(config, args.rebuild, None if args.until is None else names)
            return 0
        checks.check_run_dir(config)
        with Lock(Folder(config.run_dir), "run_all"):
            prepare(config, args.rebuild)
            if not args.rebuild and finished(config, names):
                print(farewell(config, args.until, "nothing to do; "))
                return 0
            return _run(config, names, args)
    except (ConfigError, StaleError, LockedError) as error:
        return cli.complain(parser, error)
    except (ClusterError, ClusterLostError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 1
    except CostReachedError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return cli.STOPPED
    except KeyboardInterrupt:
        return cli.INTERRUPTED


def _run(config: RunConfig, names: Sequence[str], args: argparse.Namespace) -> int:
    with ExitStack() as stack:
        cluster = None
        if args.address is None:
            folder = local_folder(config)
            cluster = LocalCluster.find(folder) or LocalCluster(folder).start()
            if cluster.ours:
                stack.callback(cluster.stop)
        runner = make_runner(config, cluster or args.address, retries=args.retries, rebuild=args.rebuild, max_cost=args.max_cost)
        try:
            if not follow(runner, names, detach=args.detach):
                return 1
        except KeyboardInterrupt:
            if args.detach:
                stack.pop_all()  # the jobs go on, so their cluster does
            raise
        finally:
            print_goodput(config)
    print(farewell(config, args.until))
    return 0


def wanted(config: RunConfig, until: str | None) -> list[str]:
    """The stages to run, parents first: all, or one and what it needs. Raises ConfigError when there is no such stage."""
    names = stages.names(config)
    if until is None:
        return names
    if until not in names:
        raise ConfigError(f"--until: {until!r} is not a stage of this run.{nearest(until, names)} Known: {', '.join(names)}")
    return [name for name in names if name == until or _descends(config, until, [name])]


def farewell(config: RunConfig, until: str | None, more: str = "") -> str:
    """What is done, and where to look at it."""
    if until is None:
        return f"{config.name}: all stages are done; {more}the model is in {stages.folder(config, 'assemble').uri}"
    look = f"the clusters to look at, and what training will cost: {stages.folder(config, until).uri}/report.html; " if until == "partition" else ""
    return f"{config.name}: {until} is done; {more}{look}the same command without --until goes on"


def print_goodput(config: RunConfig) -> None:
    """Print which share of the time of the trainings that are done was steps that counted; starts, waiting and lost work are the rest."""
    counts = [(cli.status(config, name).manifest or {}).get("counts", {}) for name in stages.names(config) if stages.trains(name)]
    known = [one for one in counts if one.get("goodput")]  # not of an expert that somebody else trained
    if known:
        steps, wall = sum(one["seconds"] for one in known), sum(one["seconds"] / one["goodput"] for one in known)
        print(f"{config.name}: {steps / wall:.0%} of the {clock(wall)} of training were spent in steps (goodput)")


def check_source(config: RunConfig, rebuild: Sequence[str] = ()) -> None:
    """Raise ConfigError when the folder of images is not there and has yet to be read."""
    with heard("run_dir", config.run_dir):
        made = "embed" not in rebuild and cli.status(config, "embed").state == "valid"
    if not made:
        checks.check_source(config)


def check_prices(config: RunConfig) -> None:
    """Raise ConfigError when something trains whose price is not known."""
    parts = [*((f"experts.{k}", one) for k, one in enumerate(config.experts)), ("router", config.router)]
    if unknown := [f"{name}.resources.price_per_hour" for name, one in parts if one.resources.price_per_hour is None]:
        raise ConfigError(
            f"--max-cost: what {', '.join(unknown)} is must be known, 0 for machines of your own; --set expert.resources.price_per_hour=…"
        )


def prepare(config: RunConfig, rebuild: Sequence[str] = ()) -> None:
    """Check that the run can start, and write ``RUN/config.yaml``.

    Raises:
        StaleError: a stage was made from other inputs, or a rebuild would make one so.
        ConfigError: the corpus is too small for the clusters.
    """
    if bad := cli.refused(config, rebuild):
        raise StaleError(cli.refusal(config, bad))
    every = [*stages.names(config), "evaluate"]
    below = {name for name in every if _descends(config, name, rebuild)} - set(rebuild)
    if kept := [name for name in every if name in below and cli.status(config, name).state not in ("absent", "waiting")]:
        flags = " ".join(f"--rebuild {name}" for name in [*rebuild, *kept])
        raise StaleError(f"{', '.join(kept)} would no longer fit what --rebuild makes anew; nothing was started. Pass {flags}, or none of them.")
    checks.check_clusters(config, rebuild)
    cli.write_config(config, rebuild)


def _descends(config: RunConfig, name: str, ancestors: Sequence[str]) -> bool:
    return any(parent in ancestors or _descends(config, parent, ancestors) for parent in stages.parents(config, name))


def finished(config: RunConfig, names: Sequence[str]) -> bool:
    """Whether these stages are valid."""
    return all(cli.status(config, name).state == "valid" for name in names)


def local_folder(config: RunConfig) -> str:
    """Where the state of a local cluster goes: the run directory, or a local stand-in for one in an object store."""
    run = Folder(config.run_dir)
    return run.path if run.is_local else os.path.join("runs", config.name)


def make_runner(config: RunConfig, where: LocalCluster | str, **options: Any) -> Runner:
    """A runner on our own cluster, or on the one whose dashboard is at a URL, and on the clusters that the config names.

    Raises:
        ConfigError: no dashboard answers here, or one of the clusters refuses its token.
    """
    here = clusters.here(config, where)
    runner = Runner(config, here, [clusters.other(config, name) for name in config.clusters], **options)
    for one in runner.clusters.values():
        one.check()
    return runner


def follow(runner: Runner, names: Sequence[str], arguments: dict[str, Sequence[str]] | None = None, detach: bool = False) -> bool:
    """Run stages to their end; on an interruption end their jobs first, unless ``detach``."""
    try:
        return runner.run(names, arguments)
    except KeyboardInterrupt:
        if detach:
            runner.board.say("left; the jobs go on, and the same command follows them again")
        else:
            runner.stop()
        raise


if __name__ == "__main__":
    sys.exit(main())
