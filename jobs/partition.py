"""Cluster the corpus and cut one shard per expert: ``python -m jobs.partition --config RUN/config.yaml``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.manifest import refuse_half_appended


def _partition(config: RunConfig, args: argparse.Namespace) -> None:
    from paris_ray.data.partition import partition

    if cli.status(config, "partition").state == "valid":
        for name in ("embed", "partition"):
            refuse_half_appended(stages.folder(config, name))
        print("partition: nothing to do, the shards are cut")
    else:
        cli.connect()
        partition(config)
    print("training rows: " + ", ".join(f"expert {k} {size}" for k, size in enumerate(stages.cluster_sizes(config))))
    print(f"the clusters to look at, and what training will cost: {config.run_dir}/clusters/report.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the stage ``partition``; returns the exit code."""
    about = "Fit the clusters, label all rows, write one shard per expert and a report page."
    parser = argparse.ArgumentParser(prog="python -m jobs.partition", description=about)
    return cli.run(parser, _partition, argv, stage="partition")


if __name__ == "__main__":
    sys.exit(main())
