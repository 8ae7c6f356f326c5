"""Job: from images and captions to the corpus (``RUN/encoders``, ``RUN/corpus``, ``RUN/rejected``).

    python -m jobs.embed --config RUN/config.yaml
    ray job submit --working-dir . -- python -m jobs.embed --config s3://bucket/run/config.yaml

Parts that are there already are kept, so a run that was stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from jobs import cli
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.manifest import refuse_half_appended


def action(config: RunConfig, args: argparse.Namespace) -> None:
    """Embed, and say what became of the rows."""
    from paris_ray.data.embed import embed

    found = cli.status(config, "embed")
    if found.state == "valid" and found.manifest is not None:
        refuse_half_appended(stages.folder(config, "embed"))
        print("embed: nothing to do, the corpus is made")
        return report(config, found.manifest["counts"])
    cli.connect()
    return report(config, embed(config)["counts"])


def report(config: RunConfig, counts: dict[str, Any]) -> None:
    """Print what became of the rows: the counts of the manifest of ``RUN/corpus``."""
    from paris_ray.data.schema import SPLITS

    splits, data = counts["splits"], config.data
    print(f"{counts['rows']} rows ({', '.join(f'{splits[one]} {one}' for one in SPLITS if splits.get(one))}) in {config.run_dir}/corpus")
    kinds = {"openmoji": "emoji", "scenes": "sets of things"}
    groups = kinds.get(data.source.kind, "different ones to the look-alike hash, which ignores colour")
    changed = f"{counts['split_changed']} changed their split for it"
    print(f"{counts['groups']} {groups}; {counts['near_duplicates']} rows look nearly like another, {changed}")
    if not splits.get("validation"):
        print(f"No row is for validation, so that no loss can be watched: raise data.split.validation_rows, now {data.split.validation_rows:g}")
    if counts.get("enlarged"):
        print(
            f"Smaller than data.image_size, {data.image_size}, and enlarged: {counts['enlarged']}; "
            f"data.filter.min_side={data.image_size} refuses such pictures"
        )
    if counts["unchecked"]:
        print(f"{counts['unchecked']} pictures look so much like very many others that not all pairs of them were compared")
    if counts["captions_cut"]:
        print(f"{counts['captions_cut']} captions have more than the {data.text.max_length} tokens that the text encoder reads, and were cut")
    if counts["rejected"]:
        print(f"\n{counts['rejected']} of {counts['listed']} rows refused; each with its reason in {config.run_dir}/rejected")
        for reason, n in sorted(counts["reasons"].items(), key=lambda one: (-one[1], one[0])):
            examples = counts.get("examples", {}).get(reason, [])
            named = ", ".join(map(repr, examples)) + (" …" if n > len(examples) else "")
            print(f"{n:>10}  {100 * n / counts['listed']:5.1f} %  {reason}: {named}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.embed", description="Embed images and captions into the corpus of a run.")
    return cli.run(parser, action, argv, stage="embed")


if __name__ == "__main__":
    sys.exit(main())
