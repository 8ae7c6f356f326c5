"""Job: add rows to a run that has its clusters (new versions of ``RUN/corpus``, ``RUN/clusters`` and each ``RUN/shards/expert=K``).

    python -m jobs.append --config RUN/config.yaml --source '{kind: folder, uri: s3://bucket/more}'

Encoders, centroids and everything trained stay as they are; ``--dry-run`` of any job says what was made from an earlier version. To train an expert
on the new rows too: ``--rebuild expert-K``, with ``init_from`` from its old weights. A run of this job that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.manifest import Lock


def action(config: RunConfig, args: argparse.Namespace) -> None:
    """Embed the source, if there is one, and label and cut what the clusters do not know yet."""
    from paris_ray.data.append import append_corpus, append_partition

    if args.source:
        named = argparse.Namespace(config=args.config, sets=[*args.sets, f"data.source={args.source}"], rebuild=[])
        other = cli.load(named)
        cli.check_source(other)
    cli.connect()
    if args.source:
        with Lock(stages.folder(config, "embed"), "append"):
            print(f"{append_corpus(config, other.data.source)} rows appended to {config.run_dir}/corpus")
    print(f"{append_partition(config)} rows appended to {config.run_dir}/clusters and shards")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.append", description="Add rows to the corpus and the shards of a run.")
    parser.add_argument("--source", metavar="YAML", help="where the rows come from, as data.source of a config; without it, what the corpus has more")
    return cli.run(parser, action, argv, stage="partition")


if __name__ == "__main__":
    sys.exit(main())
