"""A file of prompts → requests, all of them checked before anything is drawn.

One prompt a line; empty lines are skipped. In a file whose name ends in ``.jsonl``, each line is an object with ``prompt`` and any of
``negative_prompt``, ``seed``, ``n``, ``steps``, ``guidance_scale``, ``routing``, ``solver``, ``guidance_interval``; what it leaves out is as on the
command line.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paris_ray.inference.request import ImageRequest, validate

if TYPE_CHECKING:
    from paris_ray.inference.weights import Described

MAX_PICTURES = 100_000
SHOWN = 20
FIELDS = tuple(f.name for f in dataclasses.fields(ImageRequest) if f.name not in ("index", "client"))


class PromptFileError(ValueError):
    """Lines of a prompts file that cannot be drawn; the message has one line for each, ``file:number: what is wrong``."""


@dataclass(frozen=True)
class Order:
    """One picture that a file asks for: the number of its line, from 1, and its request with every default filled in."""

    line: int
    request: ImageRequest


def read_prompts(path: str, model: Described, defaults: ImageRequest, n: int = 1) -> list[Order]:
    """The pictures that a file asks for, in its order.

    Picture i of a line is the engine's picture ``ImageRequest(seed, index=i)``, the same that serving draws; lines that name no seed share the
    default's, so that pictures of two prompts can be compared.

    Args:
        path: the file, UTF-8.
        model: what the requests are checked against; its facts are enough (:func:`paris_ray.inference.weights.read_facts`).
        defaults: fields of lines that do not say; its prompt is not used.
        n: pictures of each prompt.

    Raises:
        PromptFileError: for all wrong lines at once.
        OSError: the file cannot be read.
    """
    jsonl = path.endswith((".jsonl", ".ndjson"))
    orders: list[Order] = []
    wrong: list[str] = []
    for number, raw in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            text = raw.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            if text:
                fields = _object(text) if jsonl else {"prompt": text}
                orders += [Order(number, request) for request in _requests(fields, model, defaults, n)]
        except ValueError as error:
            wrong.append(f"{path}:{number}: {error}")
        if len(orders) > MAX_PICTURES:
            raise PromptFileError(f"{path}:{number}: more than {MAX_PICTURES} pictures; draw them in several files")
    if wrong:
        more = f"\n… and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise PromptFileError("\n".join(wrong[:SHOWN]) + more)
    if not orders:
        raise PromptFileError(f"{path}: no prompt in it; write one a line")
    return orders


def _object(text: str) -> dict[str, Any]:
    try:
        fields = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not valid JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(fields, dict):
        raise ValueError(f'{text[:60]!r} is no object; write {{"prompt": "…"}}')
    allowed = (*FIELDS, "n")
    for name in fields:
        if name not in allowed:
            near = difflib.get_close_matches(name, allowed, 1)
            raise ValueError(f"{name!r} is not a field" + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(allowed)}"))
    if "prompt" not in fields:
        raise ValueError("prompt is missing")
    return fields


def _requests(fields: dict[str, Any], model: Described, defaults: ImageRequest, n: int) -> list[ImageRequest]:
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items() if value is not None}  # null: not said
    count = fields.pop("n", n)
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= MAX_PICTURES:
        raise ValueError(f"n: {count!r} must be a whole number from 1 to {MAX_PICTURES}")
    one = validate(dataclasses.replace(defaults, index=0, **fields), model)
    return [dataclasses.replace(one, index=i) for i in range(count)]
