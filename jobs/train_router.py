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
from paris_ray.training.router import train_router


def stage(args: argparse.Namespace) -> str:
    """Which router."""
    return CONTROL_ROUTER if args.control else "router"


def action(config: RunConfig, args: argparse.Namespace) -> int:
    """Train the router."""
    return cli.train(stage(args), args, config, lambda config: train_router(config, control=args.control))


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, train, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.train_router", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--control", action="store_true", help="the paper's text-blind router, for the evaluation's table")
    cli.add_fallback(parser)
    return cli.run(parser, action, argv, stage=stage)


if __name__ == "__main__":
    sys.exit(main())
