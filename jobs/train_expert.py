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


def action(config: RunConfig, args: argparse.Namespace) -> int:
    """Train the expert."""
    return cli.train(expert_name(args.expert), args, config, lambda config: train_expert(config, args.expert))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_expert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", type=int, required=True, metavar="K", help="which expert, from 0")
    cli.add_fallback(parser)
    return cli.run(parser, action, argv, stage=lambda args: expert_name(args.expert))


if __name__ == "__main__":
    sys.exit(main())
