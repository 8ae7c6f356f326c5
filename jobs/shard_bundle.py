"""Pack what one expert needs to be trained on somebody else's machine: config, encoders, its shard, and nothing of the others.

python -m jobs.shard_bundle --config RUN/config.yaml --expert 3 --out expert-3

Whoever has the folder trains the expert and hands the folder back, for ``python -m jobs.accept``:

python -m jobs.train_expert --config expert-3/config.yaml --set run_dir=expert-3 --expert 3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray import config as configs
from paris_ray.config import ConfigError
from paris_ray.stages import expert_name
from paris_ray.storage import Folder
from paris_ray.training.contribution import bundle


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.shard_bundle", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser)
    parser.add_argument("--expert", type=int, required=True, metavar="K", help="which expert")
    parser.add_argument("--out", required=True, metavar="DIR", help="new folder or URI")
    args = parser.parse_args(argv)
    try:
        config = cli.load(args, [expert_name(args.expert)])
        size = bundle(config, args.expert, Folder(args.out))
    except (ConfigError, ValueError, FileNotFoundError) as error:
        return cli.complain(parser, error)
    train = f"python -m jobs.train_expert --config {args.out}/config.yaml --set run_dir={args.out} --expert {args.expert}"
    print(f"shard_bundle: {args.out}: {size / 1e6:.1f} MB. Train it anywhere with Ray:\n  {train}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
