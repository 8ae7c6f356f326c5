"""Job: add rows to a run that has its clusters (new versions of ``RUN/corpus``, ``RUN/clusters`` and each ``RUN/shards/expert=K``).

    python -m jobs.append --config RUN/config.yaml --source '{kind: folder, uri: s3://bucket/more}'

    python -m jobs.append --config RUN/config.yaml --source '{kind: folder, uri: s3://bucket/other}' --new-expert

Encoders, centroids and everything trained stay as they are; ``--dry-run`` of any job says what was made from an earlier version. To train an expert
on the new rows too: ``--rebuild expert-K``, with ``init_from`` from its old weights. With ``--new-expert`` the rows go to an expert of their own,
which ``RUN/config.yaml`` then has, and to no other; the router is to be trained anew, from what it knows. A run of this job that was stopped goes on
where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import yaml

from jobs import checks, cli
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.lock import Lock
from paris_ray.manifest import STARTED, StaleError, published, require

UNBALANCED = 2.0
"""Times an equal share above which an expert is said to be large, where the config has no cap; so does the report."""


def action(config: RunConfig, args: argparse.Namespace) -> None:
    """Embed the source, if there is one, and label and cut what the clusters do not know yet."""
    from paris_ray.data.append import append_corpus, append_partition, keep_router, with_another_expert

    if args.new_expert and not args.source:
        raise ConfigError("--new-expert: it learns what a source has; name it with --source")
    checks.check_parent(config, "partition")
    # What the run would be is checked before the corpus grows.
    more, k = with_another_expert(config) if args.new_expert else config, config.num_experts
    _check_half_trained(config, args.new_expert)
    if args.new_expert and (bad := cli.refused(more, _knows_fewer(more))):
        raise StaleError(cli.refusal(more, bad))
    if args.source:
        other = with_source(args)
        checks.check_source(other, "--source")
    cli.connect()
    if args.source:
        before = require(stages.folder(config, "embed"), "embed")
        with Lock(stages.folder(config, "embed"), "append"):
            rows = append_corpus(config, other.data.source)
        print(f"{rows} rows appended to {config.run_dir}/corpus")
        print_refused(config, before["counts"], require(stages.folder(config, "embed"), "embed")["counts"])
    if not args.new_expert:
        sizes = stages.cluster_sizes(config)
        rows = append_partition(config)
        print(f"{rows} rows appended to {config.run_dir}/clusters and shards")
        if rows:
            print_shares(config, sizes, stages.cluster_sizes(config))
        return
    append_partition(more, k)
    if published(stages.folder(more, f"shard-{k}")) is None:
        raise ConfigError("--new-expert: the source has no row that the run does not have already, so that there is nothing to learn")
    keep_router(config)
    # Last: until then, the same command goes on.
    rebuilt = _knows_fewer(more)
    cli.write_config(more, rebuilt)
    again = "".join(f" --rebuild {name}" for name in rebuilt if stages.folder(more, name).exists(STARTED))
    print(f"expert-{k} is added; to train it and the router: python -m jobs.run_all --config {config.run_dir}/{cli.CONFIG}{again}")


def with_source(args: argparse.Namespace) -> RunConfig:
    """The run's config with ``--source`` in the place of its own. Raises ConfigError."""
    example = "'{kind: folder, uri: s3://bucket/more}'"
    try:
        source = yaml.safe_load(args.source)
    except yaml.YAMLError:
        raise ConfigError(f"--source: {args.source!r} is not valid YAML; write it as {example}") from None
    if not isinstance(source, dict):
        raise ConfigError(f"--source: {args.source!r} does not say of which kind it is; write it as data.source of a config, {example}")
    return cli.load(argparse.Namespace(config=args.config, sets=[*args.sets, f"data.source={args.source}"], rebuild=[]))


def print_refused(config: RunConfig, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Print how many rows of a source were refused, and why."""
    if new := after.get("rejected", 0) - before.get("rejected", 0):
        more = Counter(after["reasons"])
        more.subtract(before["reasons"])
        reasons = ", ".join(f"{reason} ({n})" for reason, n in more.most_common() if n > 0)
        print(f"{new} rows refused, each with its reason in {config.run_dir}/rejected: {reasons}")


def print_shares(config: RunConfig, before: list[int], after: list[int]) -> None:
    """Print who got the training rows, what of it is out of balance, and how to train on them."""
    print("training rows: " + ", ".join(f"expert {k} +{now - then}" for k, (then, now) in enumerate(zip(before, after, strict=True))))
    cap = config.partition.max_share or UNBALANCED
    for k, size in enumerate(after):
        share = size * len(after) / sum(after)
        if share > cap and size > before[k]:
            said = f"partition.max_share is {cap:g}" if config.partition.max_share else "which is much"
            print(f"expert {k} now has {share:.2f} × an equal share, {said}: a source of another kind may want an expert of its own, --new-expert")
    if trained := [stages.expert_name(k) for k in range(len(after)) if after[k] > before[k] and stages.folder(config, f"expert-{k}").exists(STARTED)]:
        again = " ".join(f"--rebuild {name}" for name in trained)
        print(f"What was trained stays valid, without the new rows; to train on them too: {again}, with init_from from the old weights")
    print(f"{config.run_dir}/clusters/report.html shows the clusters without the new rows; --dry-run counts the cost with them")


def _knows_fewer(more: RunConfig) -> list[str]:
    """What was made of the experts that there were before."""
    return [name for name in ("router", stages.CONTROL_ROUTER, "assemble", "evaluate") if cli.status(more, name).state != "absent"]


def _check_half_trained(config: RunConfig, new_expert: bool) -> None:
    """Raise StaleError for trainings that are under way on shards which would get a new version; of another router nothing is lost."""
    names = [*map(stages.expert_name, range(config.num_experts)), *([] if new_expert else ["router", stages.CONTROL_ROUTER])]
    if half := [name for name in names if cli.status(config, name).state == "partial"]:
        raise StaleError(
            f"append: {', '.join(half)} {'is' if len(half) == 1 else 'are'} half trained, on shards that would get a new version; nothing was "
            "appended. Finish training first (python -m jobs.run_all), or delete what was trained, and run this again."
        )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.append", description="Add rows to the corpus and the shards of a run.")
    parser.add_argument(
        "--source",
        metavar="YAML",
        help="where the rows come from, as data.source of a config: '{kind: folder, uri: s3://bucket/more}'; without it, what the corpus has more",
    )
    parser.add_argument("--new-expert", action="store_true", help="give the source's rows to an expert of their own")
    return cli.run(parser, action, argv, stage="partition")


if __name__ == "__main__":
    sys.exit(main())
