"""Tables of captions: ``captions.csv`` and ``captions.jsonl``."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from typing import Any

from paris_ray.config import ConfigError
from paris_ray.data.images import RejectError
from paris_ray.data.sources.files import check_link
from paris_ray.storage import Folder

TABLES = ("captions.csv", "captions.jsonl")

Row = tuple[str, str, Any] | str
"""File, caption and score, or what is wrong with the row."""


def table_rows(folder: Folder, table: str, score: str | None) -> Iterator[tuple[int, Row]]:
    """Rows of a table with their numbers.

    Args:
        folder: where it lies.
        table: one of :data:`TABLES`.
        score: the field with the score, if there is one.

    Raises:
        ConfigError: the table is a link out of the folder, or a CSV's first row does not name the fields.
    """
    try:
        check_link(folder, table)
    except RejectError as error:
        raise ConfigError(f"data.source.uri: {folder.uri} has a table that cannot be read: {error}") from None
    # Bytes that are no UTF-8 become lone surrogates, which are refused row by row later.
    text = folder.read_bytes(table).decode("utf-8-sig", errors="surrogateescape")
    return _csv_rows(text, f"{folder.uri}/{table}", score) if table.endswith(".csv") else _jsonl_rows(text, score)


def _csv_rows(text: str, uri: str, score: str | None) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [field.strip() for field in next(reader, [])]
    names = [field.lower() for field in header]
    if not {"file", "caption"} <= set(names):
        raise ConfigError(f"data.source.uri: the first row of {uri} is {names}; it must name the columns 'file' and 'caption'")
    if score is not None and score not in header:
        raise ConfigError(f"data.filter.score_column is {score!r}, which is no column of {uri}; it has {', '.join(header)}")
    file, caption = names.index("file"), names.index("caption")
    at = header.index(score) if score is not None else None
    number = 1
    while True:
        number += 1
        try:
            fields = next(reader, None)
        except csv.Error as error:
            yield number, str(error)
            continue
        if fields is None:
            return
        if not fields:
            continue
        if len(fields) <= max(file, caption, at or 0):
            yield number, f"{len(fields)} fields, the header has {len(header)}"
        else:
            yield number, (fields[file].strip(), fields[caption], _number(fields[at]) if at is not None else None)


def _number(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _jsonl_rows(text: str, score: str | None) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not valid JSON: {error}"
            continue
        if isinstance(value, dict) and isinstance(value.get("file"), str) and isinstance(value.get("caption"), str):
            yield number, (value["file"], value["caption"], value.get(score) if score is not None else None)
        else:
            yield number, "needs the strings 'file' and 'caption'"
