"""Job: from images and captions to the corpus (``RUN/encoders``, ``RUN/corpus``, ``RUN/rejected``).

    python -m jobs.embed --config RUN/config.yaml
    ray job submit --working-dir . -- python -m jobs.embed --config s3://bucket/run/config.yaml

Parts that are there already are kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray.config import RunConfig


def action(config: RunConfig, args: argparse.Namespace) -> None:
    """Embed, and say what became of the rows."""
    from paris_ray.data.embed import embed

    cli.connect()
    manifest = embed(config)
    counts = manifest["counts"]
    splits = ", ".join(f"{n} {split}" for split, n in counts["splits"].items())
    print(f"{counts['rows']} rows ({splits}) in {config.run_dir}/corpus")
    if counts["rejected"]:
        print(f"{counts['rejected']} rows refused, listed with their reasons in {config.run_dir}/rejected:")
        for reason, n in counts["reasons"].items():
            print(f"  {n:>8}  {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.embed", description="Embed images and captions into the corpus of a run.")
    return cli.run(parser, action, argv, stage="embed")


if __name__ == "__main__":
    sys.exit(main())
