"""Train one expert: ``python -m jobs.train_expert --config RUN/config.yaml --expert 3``.

Needs ``shards/expert=3`` and ``encoders/`` of the run directory, and no other expert. The same command again resumes, or does nothing when done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray.config import RunConfig
from paris_ray.stages import expert_name
from paris_ray.training.expert import train_expert
from paris_ray.training.launch import TrainingError


def action(config: RunConfig, args: argparse.Namespace) -> int:
    """Train the expert; exit code 1 if training itself cannot go on."""
    cli.connect()
    try:
        train_expert(config, args.expert)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return cli.USER_ERROR  # another try would end the same
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, return the exit code."""
    parser = argparse.ArgumentParser(prog="train_expert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", type=int, required=True, metavar="K", help="which expert, from 0")
    return cli.run(parser, action, argv, stage=lambda args: expert_name(args.expert))


if __name__ == "__main__":
    sys.exit(main())
