"""What is wrong with a config, in words: key, value, rule, remedy. Imports nothing heavy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import pydantic
from pydantic import BaseModel

from paris_ray.strict import SECRET


def nearest(word: str, known: Iterable[str]) -> str:
    """A hint at the known word that was meant, to be put behind an error; empty if none is near."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def _models_at(schema: type[BaseModel], location: tuple[Any, ...]) -> list[type[BaseModel]]:
    """Models at a location of a schema; a union's tag chooses its own, list indices are passed over."""
    kinds: list[type[BaseModel]] = [schema]
    for part in location:
        inner: list[type[BaseModel]] = []
        for kind in kinds:
            if part in kind.model_fields:
                inner += _models_in(kind.model_fields[part].annotation)
        kinds = inner or [kind for kind in kinds if _tag(kind) == part] or kinds
    return kinds


def _tag(model: type[BaseModel]) -> Any:
    return model.model_fields["kind"].default if "kind" in model.model_fields else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for inner in getattr(annotation, "__args__", ()) for model in _models_in(inner)]


_UNIONS = ("source", "embedding", "codec", "text")
_TAGS = (
    *("openmoji", "scenes", "folder", "parquet", "webdataset", "hf_dataset"),
    *("timm", "open_clip", "efficientnet_lite0", "vae", "patch_pca", "clip", "minilm"),
)


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
            lines.append(f"{key}: no such key{_no_such_key(schema, location)}")
        elif item["type"] == "missing":
            lines.append(f"{key}: required and not given.")
        elif item["type"] == "too_short" and len(item["input"]) >= item["ctx"]["min_length"]:
            continue  # pydantic counts the valid items only; what is wrong with the others has lines of its own
        elif item["type"] == "too_short":
            lines.append(f"{key}: there must be at least {item['ctx']['min_length']}, and there are {len(item['input'])}; raise their number")
        elif item["type"] == "union_tag_invalid":
            expected = item["ctx"]["expected_tags"].replace("'", "")
            lines.append(f"{key}.kind: {item['ctx']['tag']!r} is none of {expected}.{nearest(item['ctx']['tag'], expected.split(', '))}")
        elif item["type"] == "union_tag_not_found":
            lines.append(f"{key}.kind: required and not given; one of {', '.join(str(_tag(one)) for one in _models_at(schema, location))}.")
        elif item["type"] == "model_attributes_type" and location[-1] in _UNIONS:
            example = "{kind: folder, uri: /path/to/pictures}" if location[-1] == "source" else f"{{kind: {_tag(_models_at(schema, location)[0])}}}"
            lines.append(f"{key}: it has keys of its own; write them as YAML, such as {example} (got {_shown(item['input'])})")
        elif item["type"] == SECRET:
            lines.append(f"{key}: {item['msg']}")
        elif item["type"] == "value_error" and isinstance(item["input"], dict | BaseModel):  # the message names what of it is wrong
            lines.append((f"{key}: " if location else "") + item["msg"].removeprefix("Value error, "))
        else:
            remedy = {"less": "; lower it", "greater": "; raise it"}.get(item["type"].split("_")[0], "")
            lines.append(f"{key}: {item['msg'].removeprefix('Value error, ')} (got {_shown(item['input'])}){remedy}")
    # A wrong default is reported once, not again for each expert that inherits it.
    own = {line.split(": ", 1)[0].split(".", 1)[-1] for line in lines if line.startswith("expert.")}
    kept = [line for line in lines if not (line.startswith("experts.") and line.split(": ", 1)[0].split(".", 2)[-1] in own)]
    return f"{source}: " + "\n        ".join(dict.fromkeys(kept))


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) < 80 else text[:77] + "…"


def _no_such_key(schema: type[BaseModel], location: tuple[Any, ...]) -> str:
    """Which key was meant, or which kinds have it."""
    name, (*above, last) = location[-1], location[:-1] or (None,)
    here = _models_at(schema, location[:-1])
    known = list(dict.fromkeys(key for one in here for key in one.model_fields))
    siblings = _models_at(schema, tuple(above)) if last in _TAGS and last == _tag(here[0]) else []
    if owners := [str(_tag(one)) for one in siblings if name in one.model_fields]:
        return f" for kind {last}; {', '.join(owners)} {'has' if len(owners) == 1 else 'have'} it. Known here: {', '.join(known)}."
    return "." + (nearest(str(name), known) or f" Known here: {', '.join(known)}.")
