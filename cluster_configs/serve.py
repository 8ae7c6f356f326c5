"""Print a Serve config: what ``serve build`` would, if it could give an application its arguments.

    python -m cluster_configs.serve model=s3://bucket/run/model placement=apart gpus=1 > serve.yaml && serve deploy serve.yaml
    python -m cluster_configs.serve --args my_kuberay/serving.yaml --service my_kuberay/serving/service.yaml               # the RayService with it
    python -m cluster_configs.serve --args my_kuberay/serving.yaml --service my_kuberay/serving/service.yaml --in-place    # written to the file

The arguments are those of ``serve run serve_app.app:build``. Each deployment is named, so that its ``user_config`` can be changed while it serves.
With ``--service`` a RayService is printed with the config as its ``serveConfigV2``; with ``--in-place`` its file is written. Such a service
listens to its pods' network, and its Secret has the keys. Else Serve listens on the machine itself, and you come through a tunnel.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from paris_ray.config import ConfigError
from paris_ray.config_errors import explain
from paris_ray.placement import serve_groups


def main(argv: Sequence[str] | None = None) -> int:
    """Print or write it; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("words", nargs="*", metavar="KEY=VALUE", help="arguments of serve_app.app:build")
    parser.add_argument("--args", type=Path, metavar="FILE", help="the same, as a YAML file")
    parser.add_argument("--experts", type=int, default=8, metavar="K", help="how many the model has (default 8)")
    parser.add_argument("--service", type=Path, metavar="FILE", help="print this RayService with it")
    parser.add_argument("--in-place", action="store_true", help="write that file, and print nothing")
    args = parser.parse_args(argv)
    try:
        if args.in_place and args.service is None:
            raise ConfigError("--in-place writes the file of --service; name one")
        given = yaml.safe_load(_text_of("--args", args.args)) if args.args else {}
        if not isinstance(given, dict):
            raise ConfigError(f"--args {args.args} holds no settings; write KEY: VALUE, a line each")
        for one in args.words:
            if "=" not in one:
                raise ConfigError(f"{one!r} is not KEY=VALUE, such as model=s3://bucket/run/model")
        host = "127.0.0.1" if args.service is None else "0.0.0.0"
        config = text(deploy_config({**given, **dict(one.split("=", 1) for one in args.words)}, args.experts, host))
        made = config if args.service is None else in_service(_text_of("--service", args.service), config)
        if args.in_place:
            args.service.write_text(made)
        else:
            print(made, end="")
    except (ConfigError, OSError, yaml.YAMLError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        return 2
    return 0


def _text_of(option: str, path: Path) -> str:
    try:
        return path.read_text()
    except OSError as error:
        example = "cluster_configs/kuberay/serving.yaml" if option == "--args" else "cluster_configs/kuberay/serving/service.yaml"
        raise ConfigError(f"{option} {path} cannot be read ({error.strerror}); name a file such as {example}") from None


def deploy_config(given: dict[str, Any], experts: int, host: str) -> dict[str, Any]:
    """A Serve config with all deployments.

    Args:
        given: arguments of :func:`serve_app.app.build`.
        experts: of the model.
        host: at which each node's proxy listens.

    Raises:
        ConfigError: there are no such arguments.
    """
    from serve_app.app import Args

    try:
        args = Args.model_validate(given)
        groups = serve_groups(args.placement, experts)
    except pydantic.ValidationError as error:
        raise ConfigError(explain(error, Args)) from None
    except ValueError as error:
        raise ConfigError(str(error)) from None
    names = ["Api", "Sampler", *(f"ExpertGroup-{number}" for number in range(len(groups)))]
    # Another text: the experts' files are looked at again, and what differs is loaded, while it serves.
    loads = names[2:] or ["Sampler"]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": host, "port": 8000},
        "applications": [
            {
                "name": "paris",
                "route_prefix": "/",
                "import_path": "serve_app.app:build",
                "args": args.model_dump(mode="json", exclude_unset=True),
                "deployments": [{"name": name, **({"user_config": {"revision": "1"}} if name in loads else {})} for name in names],
            }
        ],
    }


def text(config: dict[str, Any]) -> str:
    """As YAML."""
    return yaml.safe_dump(config, sort_keys=False, width=120)


def in_service(service: str, config: str) -> str:
    """A RayService's file with another ``serveConfigV2``, all else as it was."""
    lines = "".join(f"    {line}\n" for line in config.splitlines())
    made, count = re.subn(r"(?m)^  serveConfigV2: \|\n(?:    .*\n|\n)*", lambda _: f"  serveConfigV2: |\n{lines}", service)
    if count != 1:
        raise ConfigError("it has no `serveConfigV2: |` two spaces in; name a file such as cluster_configs/kuberay/serving/service.yaml")
    return made


if __name__ == "__main__":
    sys.exit(main())
