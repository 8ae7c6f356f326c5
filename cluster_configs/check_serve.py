"""Check a Serve config: strictly by Ray's schema, whose models let unknown keys pass, and by what the application it names takes.

    python -m cluster_configs.check_serve serve.yaml

Of a RayService, cluster_configs.check_kubernetes checks it with all else. Exit codes as those of cluster_configs.check.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin

import pydantic
import yaml
from pydantic import BaseModel

from cluster_configs.serve import deploy_config
from paris_ray.config import ConfigError
from paris_ray.config_errors import nearest

OURS = "serve_app.app:build"


def main(argv: Sequence[str] | None = None) -> int:
    """Check; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m cluster_configs.check_serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="what `serve deploy` would be given")
    parser.add_argument("--experts", type=int, default=8, metavar="K", help="how many the model has (default 8)")
    args = parser.parse_args(argv)
    try:
        found = list(serve_problems(args.file.read_text(), args.experts))
    except OSError as error:
        print(f"{parser.prog}: {args.file} cannot be read ({error.strerror}); name what `python -m cluster_configs.serve` printed", file=sys.stderr)
        return 2
    print("".join(f"{args.file}: {one}\n" for one in found) or f"{args.file}: nothing found\n", end="")
    return 1 if found else 0


def serve_problems(text: str, experts: int = 8) -> Iterator[str]:
    """What is wrong with a Serve config.

    Args:
        text: YAML.
        experts: of the model that it serves.
    """
    from ray.serve.schema import ServeDeploySchema

    try:
        config = yaml.safe_load(text)
    except yaml.YAMLError as error:
        yield f"it is not YAML: {' '.join(str(error).split())}"
        return
    if not isinstance(config, dict):
        yield "it is not a Serve config; `python -m cluster_configs.serve` makes one"
        return
    unknown = list(_unknown(ServeDeploySchema, config, ""))
    yield from unknown
    try:
        ServeDeploySchema.model_validate(config)
    except pydantic.ValidationError as error:
        yield from (f"{'.'.join(str(part) for part in one['loc'])}: {one['msg']}" for one in error.errors())
        return
    for one in config["applications"]:
        yield from (f"{one.get('name')}: {said}" for said in _application(one, experts))


def _unknown(model: type[BaseModel], tree: dict[str, Any], where: str) -> Iterator[str]:
    """Keys that a model does not have, in all models below it."""
    for key, value in tree.items():
        field = model.model_fields.get(key)
        if field is None:
            yield f"{where}{key}: there is no such key.{nearest(str(key), model.model_fields)}"
            continue
        for inner in _models(field.annotation):
            for one in value if isinstance(value, list) else [value]:
                if isinstance(one, dict):
                    yield from _unknown(inner, one, f"{where}{key}.")


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [one for each in get_args(annotation) for one in _models(each)] if get_origin(annotation) is not dict else []


def _application(one: dict[str, Any], experts: int) -> Iterator[str]:
    name, _, attribute = one["import_path"].rpartition(":") if ":" in one["import_path"] else one["import_path"].rpartition(".")
    try:
        if not hasattr(importlib.import_module(name), attribute):
            raise ImportError
    except ImportError:
        yield f"import_path {one['import_path']} is nothing that can be imported"
        return
    if one["import_path"] != OURS:
        return
    try:
        made = deploy_config(one.get("args") or {}, experts, "127.0.0.1")["applications"][0]["deployments"]
    except ConfigError as error:
        yield f"args: {error}"
        return
    known = [each["name"] for each in made]
    for each in one.get("deployments") or []:
        if each["name"] not in known:
            yield f"deployments: the application has no {each['name']}.{nearest(each['name'], known)} It has {', '.join(known)}"


if __name__ == "__main__":
    sys.exit(main())
