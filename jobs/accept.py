"""Take an expert that was trained elsewhere (jobs.shard_bundle) into the run, after looking at all that can be checked.

python -m jobs.accept --config RUN/config.yaml --expert 3 --from expert-3
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray.config import RunConfig
from paris_ray.stages import expert_name
from paris_ray.storage import Folder
from paris_ray.training.contribution import RefusedError, accept


def action(config: RunConfig, args: argparse.Namespace) -> int:
    """Accept it, or say why not."""
    try:
        taken = accept(config, args.expert, Folder(args.source), args.replace)
    except (RefusedError, FileExistsError) as error:
        print(f"accept: {error}", file=sys.stderr)
        return cli.USER_ERROR
    print(
        f"accept: {expert_name(args.expert)} is taken, {taken['bytes'] / 1e6:.1f} MB: held-out loss {taken['validation_loss']:.4f}, "
        f"as reported ({taken['nothing']:.4f} for predicting nothing). Assemble the model anew: python -m jobs.assemble"
    )
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, accept, return the exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.accept", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--expert", type=int, required=True, metavar="K", help="which expert")
    parser.add_argument("--from", dest="source", required=True, metavar="DIR", help="the contributor's run directory, a folder or a URI")
    parser.add_argument("--replace", action="store_true", help="take it in the place of a finished expert")
    return cli.run(parser, action, argv, stage=lambda args: expert_name(args.expert))


if __name__ == "__main__":
    sys.exit(main())
