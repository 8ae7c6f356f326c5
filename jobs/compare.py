"""Experts beside what they are compared with: monoliths of equal cost, random parts, other routings; trained, drawn, measured, with a report.

    python -m jobs.compare --config compare_tiny              # goes on where it was; sized for two CPU cores and 90 minutes
    python -m jobs.compare --config compare_tiny --minutes 20 # so long at most, then the same again
    python -m jobs.compare --config compare_paper --dry-run   # what is matched, and what it would cost

Processes of this machine do the work, one for each GPU or core; Ray runs only while the corpus is embedded and cut. FOLDER/report.html and
FOLDER/table.md are of whatever is done so far.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence

from jobs import checks, cli
from paris_ray import config as configs
from paris_ray.config import ConfigError
from paris_ray.evaluation import compare_captions, compare_config, compare_rows
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.lock import Lock, LockedError
from paris_ray.manifest import StaleError, published
from paris_ray.opening import open_folder
from paris_ray.storage import Folder, link_all


def main(argv: Sequence[str] | None = None) -> int:
    """Compare; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = ", ".join(compare_config.PRESETS)
    parser.add_argument("--config", required=True, metavar="YAML|PRESET", help=f"a YAML overlay (with preset: NAME), or a preset: {known}")
    parser.add_argument(
        "--set", action="append", default=[], dest="sets", metavar="KEY=VALUE", help="change one setting, e.g. base.data.image_size=64"
    )
    parser.add_argument("--minutes", type=float, metavar="M", help="stop in order after so long; the same command goes on")
    parser.add_argument("--dry-run", action="store_true", help="print what is matched and what it would cost; do nothing")
    parser.add_argument("--report-only", action="store_true", help="write the report of what is done, and nothing else")
    args = parser.parse_args(argv)
    from paris_ray.evaluation import compare, compare_cost, compare_scenes

    began = time.monotonic()
    try:
        config = load(args.config, args.sets)
        if args.dry_run:
            print(compare_cost.text(config))
            if config.base.expert.resources.price_per_hour is None:
                print("What that is in money: --set base.expert.resources.price_per_hour=…")
            print_rows(config)
            return 0
        if args.report_only:  # without the lock: beside a running comparison too, for a unit is there whole or not at all
            compare.agree(config)
            return report(config)
        folder = Folder(config.folder)
        with Lock(folder, "the comparison"):
            compare.settle(config)
            cut(config)
            main_row = Folder(compare_rows.partition_config(config, compare_rows.MAIN).run_dir)
            compare_captions.check(config, main_row)
            if warning := compare_scenes.undivided(config, main_row):
                print(f"compare: {warning}", file=sys.stderr, flush=True)
            done = compare.run(config, None if args.minutes is None else 60 * args.minutes - (time.monotonic() - began))
            report(config)
        return 0 if done else cli.STOPPED
    except compare.UnitError as error:
        print(error, file=sys.stderr)
        return 1
    except (ConfigError, StaleError, LockedError) as error:
        return cli.complain(parser, error)
    except KeyboardInterrupt:
        print("compare: stopped; the same command goes on", file=sys.stderr)
        return cli.INTERRUPTED


def print_rows(compare: CompareConfig) -> None:
    """Print how many rows are asked for, and how many there are. Raises ConfigError when the source is not there, or has too few for validation."""
    choose, losses, pictures, held_out = (compare.asked(part) for part in compare_captions.PARTS)
    judge = max(losses, pictures)
    print(f"Rows asked for: {choose + judge:,} for validation, {choose:,} to choose by and {judge:,} to judge by; {held_out:,} held out.")
    checks.check_source(compare.base, "--set base.data.source.uri")
    source, share = compare.base.data.source, compare.base.data.split.validation_rows
    listed = checks.listed_rows(compare.base)
    if listed is None:
        print(f"The source is there; how many rows a {source.kind} has, only reading tells.")
        return
    there = checks.expected_rows(compare.base, listed)["validation"]
    print(f"The source lists {listed:,} rows, of which about {there:,} are for validation (base.data.split.validation_rows {share:g}).")
    if there < choose + judge:
        raise ConfigError(
            f"base.data.split.validation_rows is {share:g}, of {listed:,} rows about {there:,}, and {choose + judge:,} are asked for; "
            "raise it or the rows, or lower validation_captions, seen_captions or loss_rows"
        )


def load(source: str, sets: Sequence[str]) -> CompareConfig:
    """The config, with an absolute folder: the processes may have another working directory. Raises ConfigError."""
    if source in configs.PRESETS:
        raise ConfigError(
            f"--config: {source} is a preset of a run, and a comparison has {', '.join(compare_config.PRESETS)}; to compare with that run "
            f"as its base: --config compare_tiny --set base.preset={source}"
        )
    config = compare_config.load(source, sets)
    return config.model_copy(update={"folder": open_folder("folder", config.folder).uri})


def cut(compare: CompareConfig) -> None:
    """Embed the corpus once, and cut it for each kind of row, on a Ray of this process."""
    base = compare.base.model_copy(update={"run_dir": f"{compare.folder}/base"})
    wanted = {compare_rows.partition_name(compare, name): compare_rows.partition_config(compare, name) for name in compare.rows}
    if any(compare_rows.ROWS[name].fault == "router" for name in compare.rows):
        wanted[compare_rows.partition_name(compare, "random")] = compare_rows.partition_config(compare, "random")
    missing = {name: config for name, config in wanted.items() if published(Folder(config.run_dir) / "clusters") is None}
    if not missing:
        return
    from paris_ray.data.embed import embed
    from paris_ray.data.partition import partition

    cli.connect()
    import ray

    try:
        embed(base)
        for name, config in missing.items():
            print(f"compare: cutting {name}", file=sys.stderr, flush=True)
            for part in ("encoders", "corpus"):
                link_all(Folder(base.run_dir) / part, Folder(config.run_dir) / part, "_manifest.json")
            partition(config)
    finally:
        ray.shutdown()


def report(compare: CompareConfig) -> int:
    """Write the report, and say where it is and what its table says."""
    from paris_ray.evaluation.compare_report import write_report

    print(write_report(compare))
    print(f"compare: report in {Folder(compare.folder).uri}/report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
