"""As much of kustomize as the overlays use, so that they are checked where there is none: resources, components, JSON patches, images, namespace."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml


def build(folder: Path) -> list[dict[str, Any]]:
    """The objects of a folder with a ``kustomization.yaml``."""
    return _transform(folder, [])


def _transform(folder: Path, objects: list[dict[str, Any]]) -> list[dict[str, Any]]:
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    known = {"apiVersion", "kind", "namespace", "resources", "components", "patches", "images"}
    assert set(plan) <= known, set(plan) - known
    for name in plan.get("resources", []):
        path = folder / name
        objects = objects + (build(path) if path.is_dir() else [copy.deepcopy(one) for one in yaml.safe_load_all(path.read_text())])
    objects = [_unshared(one) for one in objects]
    for name in plan.get("components", []):
        objects = _transform(folder / name, objects)
    for one in objects:
        if "namespace" in plan and one["kind"] != "Namespace":
            one["metadata"]["namespace"] = plan["namespace"]
    for patch in plan.get("patches", []):
        operations = yaml.safe_load(patch["patch"] if "patch" in patch else (folder / patch["path"]).read_text())
        target = patch["target"]
        found = [one for one in objects if one["kind"] == target["kind"] and one["metadata"]["name"] == target.get("name", one["metadata"]["name"])]
        assert found, target
        for one in found:
            for operation in operations:
                _patch(one, **operation)
    for image in plan.get("images", []):
        for one in objects:
            _rename(one, image)
    return objects


def _unshared(tree: Any) -> Any:
    """YAML's anchors make one of two."""
    if isinstance(tree, dict):
        return {key: _unshared(value) for key, value in tree.items()}
    return [_unshared(one) for one in tree] if isinstance(tree, list) else tree


def _patch(tree: Any, op: str, path: str, value: Any = None) -> None:
    *parents, last = [part.replace("~1", "/").replace("~0", "~") for part in path.removeprefix("/").split("/")]
    for key in parents:
        tree = tree[int(key) if isinstance(tree, list) else key]
    key = int(last) if isinstance(tree, list) else last
    if op in ("replace", "remove"):
        tree[key]  # must be there
    if op == "remove":
        del tree[key]
    else:
        assert op in ("add", "replace"), op
        tree[key] = _unshared(value)


def _rename(tree: Any, image: dict[str, str]) -> None:
    if isinstance(tree, list):
        for one in tree:
            _rename(one, image)
    if isinstance(tree, dict):
        for key, value in tree.items():
            if key in ("containers", "initContainers"):
                for one in value:
                    name, _, tag = one["image"].partition(":")
                    if name == image["name"]:
                        one["image"] = f"{image.get('newName', name)}:{image.get('newTag', tag)}"
            _rename(value, image)
