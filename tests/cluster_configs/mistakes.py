"""Planting one."""

from __future__ import annotations

from typing import Any


def change(documents: list[dict[str, Any]], kind: str, path: str, value: Any) -> None:
    """Set, or with ``None`` take away, what is at a path in the first object of a kind."""
    tree: Any = next(one for one in documents if one["kind"] == kind)
    *parents, last = path.split()
    for key in parents:
        tree = tree[int(key) if isinstance(tree, list) else key]
    key = int(last) if isinstance(tree, list) else last
    if value is None:
        del tree[key]
    else:
        tree[key] = value
