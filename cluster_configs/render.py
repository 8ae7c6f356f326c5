"""Print a file for ``ray up`` at a size of :file:`sizes.yaml`, and with what else is to be in it.

python -m cluster_configs.render cluster_configs/aws.yaml --size paris_xl2 > aws.yaml
python -m cluster_configs.render cluster_configs/gcp.yaml --size paris_xl2 --more cluster_configs/multi_cloud/gcp_overlay.yaml > gcp.yaml
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster_configs.check import read
from paris_ray.config import ConfigError, merge

SIZES = Path(__file__).parent / "sizes.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Print it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.render", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", metavar="FILE", help="a file for `ray up`, with your own account in it")
    parser.add_argument("--size", required=True, choices=sorted(sizes()), help="what will be trained")
    parser.add_argument("--more", action="append", default=[], metavar="FILE", help="a part of such a file, which is laid over it")
    args = parser.parse_args(argv)
    try:
        tree = read(Path(args.file))
        for more in args.more:
            tree = merge(tree, read(Path(more)))
        print(text(sized(tree, args.size)), end="")
    except ConfigError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def sizes() -> dict[str, dict[str, int]]:
    """Of each size, the most machines of each kind."""
    return dict(yaml.safe_load(SIZES.read_text()))


def sized(tree: dict[str, Any], size: str) -> dict[str, Any]:
    """A file's content with the bounds of a size. Raises ConfigError if it has no node types to bound."""
    if "available_node_types" not in tree:
        raise ConfigError("provider local has the machines that it names, and no other size; give it to `ray up` as it is")
    most = sizes()[size]
    types = {name: {**one, "max_workers": most.get(name, 0)} for name, one in tree["available_node_types"].items()}
    kept = {name: one for name, one in types.items() if one["max_workers"] or name == tree["head_node_type"]}
    made = {**tree, "available_node_types": kept, "max_workers": sum(one["max_workers"] for one in kept.values())}
    made.pop("metadata", None)  # what stood there is where it belongs by now
    return made


class _Plain(yaml.SafeDumper):
    """Writes what is there twice twice, without anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text(tree: dict[str, Any]) -> str:
    """As YAML."""
    return yaml.dump(tree, Dumper=_Plain, sort_keys=False, width=150)


if __name__ == "__main__":
    sys.exit(main())
