"""What is wrong with a config, in words: key, value, rule, remedy. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import pydantic
from pydantic import BaseModel

from paris_ray.resources import SECRET


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that was meant, to be put behind an error; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _known_keys(schema: type[BaseModel], location: tuple[Any, ...]) -> list[str]:
    """Keys of the model at a location of a schema (list indices and union tags are passed over)."""
    kinds: list[type[BaseModel]] = [schema]
    for part in location:
        inner: list[type[BaseModel]] = []
        for kind in kinds:
            if part in kind.model_fields:
                inner += _models_in(kind.model_fields[part].annotation)
        kinds = inner or kinds
    return [key for kind in kinds for key in kind.model_fields]


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


_UNIONS = ("source", "embedding", "codec", "text")
_TAGS = ("openmoji", "folder", "parquet", "webdataset", "hf_dataset", "timm", "open_clip", "efficientnet_lite0", "vae", "patch_pca", "clip", "minilm")


def _is_type(part: Any) -> bool:
    """Whether a part of a location names a type of a union: ``int``, ``constrained-int``, ``literal['auto']``."""
    return isinstance(part, str) and (part == "int" or any(mark in part for mark in "-[<"))


def explain(error: pydantic.ValidationError, schema: type[BaseModel], source: str = "config") -> str:
    """An error of validation in words, a line for each setting.

    Args:
        error: what pydantic said.
        schema: what was validated.
        source: where it was read, for the message.
    """
    lines = []
    for item in error.errors():
        location = item["loc"]
        # A union's tag is pydantic's, not a key that anybody writes.
        tags = [bool(i) and ((location[i - 1] in _UNIONS and part in _TAGS) or _is_type(part)) for i, part in enumerate(location)]
        key = ".".join(str(part) for part, tag in zip(location, tags, strict=True) if not tag) or "config"
        if item["type"] == "extra_forbidden":
            known = _known_keys(schema, location[:-1])
            hint = nearest(str(location[-1]), known) or f" Known here: {', '.join(known)}."
            lines.append(f"{key}: no such key.{hint}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required and not given.")
        elif item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # pydantic counts the valid items only; what is wrong with the others has lines of its own
        elif item["type"] == SECRET:
            lines.append(f"{key}: {item['msg']}")
        else:
            value = repr(item["input"])
            shown = value if len(value) < 80 else value[:77] + "…"
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')} (got {shown})")
    # A wrong default is reported once, not again for each expert that inherits it.
    own = {line.split(": ", 1)[0].split(".", 1)[-1] for line in lines if line.startswith("expert.")}
    kept = [line for line in lines if not (line.startswith("experts.") and line.split(": ", 1)[0].split(".", 2)[-1] in own)]
    return f"{source}: " + "\n        ".join(dict.fromkeys(kept))
