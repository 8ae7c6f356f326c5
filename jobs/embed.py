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
    splits = ", ".join(f"{n} {split}" for split, n in counts["splits"].items() if n)
    print(f"{counts['rows']} rows ({splits}) in {config.run_dir}/corpus")
    print(
        f"{counts['groups']} groups of rows that look alike; {counts['near_duplicates']} rows look like one of another group, "
        f"{counts['split_changed']} of them changed their split for it"
    )
    if counts["unchecked"]:
        print(f"{counts['unchecked']} pictures look so much like very many others that not all pairs of them were compared")
    if counts["captions_cut"]:
        print(f"{counts['captions_cut']} captions have more than the {config.data.text.max_length} tokens that the text encoder reads, and were cut")
    if counts["rejected"]:
        print(f"\n{counts['rejected']} of {counts['listed']} rows refused; each with its reason in {config.run_dir}/rejected")
        for reason, n in counts["reasons"].items():
            print(f"{n:>10}  {100 * n / counts['listed']:5.1f} %  {reason}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.embed", description="Embed images and captions into the corpus of a run.")
    return cli.run(parser, action, argv, stage="embed")


if __name__ == "__main__":
    sys.exit(main())
