"""Put the trained experts, the router and the encoders together as RUN/model, in the released layout.

python -m jobs.assemble --config RUN/config.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from jobs import cli
from paris_ray.config import RunConfig


def assemble(config: RunConfig, args: argparse.Namespace) -> None:
    """Assemble, and say where the model is."""
    from paris_ray.inference.assemble import assemble as work
    from paris_ray.stages import folder

    manifest = work(config)
    size = sum(file["bytes"] for file in manifest["files"])
    print(f"assemble: {folder(config, 'assemble').uri}: {config.num_experts} experts, {size / 1e6:.1f} MB, {manifest['counts']['model_fingerprint']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.assemble", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    return cli.run(parser, assemble, argv, stage="assemble")


if __name__ == "__main__":
    sys.exit(main())
