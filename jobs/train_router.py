"""Train the router: ``python -m jobs.train_router --config RUN/config.yaml``; with ``--control`` the text-blind one of the evaluation.

Needs all shards and ``encoders/`` of the run directory, and no expert. The same command again resumes, or does nothing when done.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray.config import RunConfig
from paris_ray.stages import CONTROL_ROUTER
from paris_ray.training.launch import TrainingError
from paris_ray.training.router import train_router


def action(config: RunConfig, args: argparse.Namespace) -> int:
    """Train the router; exit code 1 if training itself cannot go on."""
    cli.connect()
    try:
        train_router(config, control=args.control)
    except TrainingError as error:
        print(error, file=sys.stderr)
        return cli.USER_ERROR  # another try would end the same
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, return the exit code."""
    parser = argparse.ArgumentParser(prog="train_router", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", action="store_true", help="the paper's text-blind router, for the evaluation's table")
    return cli.run(parser, action, argv, stage=lambda args: CONTROL_ROUTER if args.control else "router")


if __name__ == "__main__":
    sys.exit(main())
