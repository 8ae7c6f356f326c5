"""Pictures below a folder, captions beside them or in one table."""

from __future__ import annotations

import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from paris_ray.config import ConfigError
from paris_ray.data.images import EXTENSIONS, RejectError
from paris_ray.data.sources.base import Item, Sample, Unit, content_hash
from paris_ray.data.sources.captions import TABLES, table_rows
from paris_ray.data.sources.files import MAX_FILE_BYTES, MAX_TEXT_BYTES, check_name, parse_json, read_file
from paris_ray.storage import Folder

SIDECARS = (".txt", ".json")


@dataclass(frozen=True, slots=True)
class _Beside:
    """Stands for a caption that is still to be read: the names of the files beside the picture."""

    txt: str | None
    json: str | None


class ImageFolder:
    """Pictures below a folder, captions beside them (``name.txt`` or ``name.json`` for ``name.jpg``) or in ``captions.csv`` or ``captions.jsonl``.

    A table lies at the top and has the fields ``file`` (relative to the folder) and ``caption``; a picture may have several rows, one caption
    each. A picture that the table does not name takes its sidecar, of a ``.json`` the field ``caption``; extensions may be in capitals. Everything
    else in the folder becomes a reject. The driver lists all files by name: past some millions, tars or Parquet files are the better form.

    Args:
        uri: local path or URI.
        score: field of a table or of a ``.json`` with the picture's score.
    """

    def __init__(self, uri: str, score: str | None = None):
        self.folder, self.score = Folder(uri), score

    def units(self, rows: int) -> list[Unit]:
        """All files in the order of their names. Raises ConfigError for a folder that is missing, empty, or has two caption tables."""
        listed = self._list()
        pieces = [listed[start : start + rows] for start in range(0, len(listed), rows)]
        # As text: a unit waits in the driver, and a name need not be valid Unicode.
        return [Unit(number, json.dumps(piece), len(piece), f"{piece[0][1]} … {piece[-1][1]}") for number, piece in enumerate(pieces)]

    def read(self, unit: Unit) -> Iterator[Item]:
        """The items of a unit; no file is opened."""
        for source, file, _, caption, beside, score, reason in json.loads(unit.where):  # sizes are there to be compared with those of the next start
            yield Item(source, file, _Beside(*beside) if caption is None else caption, None, score, reason)

    def _list(self) -> list[tuple[Any, ...]]:
        uri = self.folder.uri
        if not self.folder.exists():
            raise ConfigError(f"data.source.uri: the folder {uri} does not exist; name one that holds images and captions, --set data.source.uri=…")
        sizes = {entry.name: entry.size for entry in self.folder.files(recursive=True)}
        if not any(_is_image(name) for name in sizes):
            raise ConfigError(
                f"data.source.uri: the folder {uri} holds no image ({', '.join(sorted(EXTENSIONS))}) among its {len(sizes)} files; "
                "name one that holds images and captions, --set data.source.uri=…"
            )
        tables = [name for name in TABLES if name in sizes]
        if len(tables) > 1:
            raise ConfigError(f"data.source.uri: {uri} holds both {' and '.join(tables)}; captions come from one table, remove the other")
        rows = list(self._table(tables[0], sizes)) if tables else []
        named = {row[1] for row in rows}
        stems = {posixpath.splitext(name)[0] for name in sizes if _is_image(name)}
        sidecars: dict[tuple[str, str], str] = {}  # by stem and extension; of two that differ in capitals the last, which is the one in small letters
        for name in sizes:
            stem, extension = posixpath.splitext(name)
            if stem in stems and extension.lower() in SIDECARS:
                sidecars[stem, extension.lower()] = name
        used = set(sidecars.values())
        for name, size in sizes.items():
            if name in named or name in tables or name in used:
                continue
            stem, extension = posixpath.splitext(name)
            beside = tuple(sidecars.get((stem, kind)) for kind in SIDECARS)
            reason = None
            if extension.lower() in SIDECARS:
                why = "no picture has this name" if stem not in stems else "the picture takes the file whose extension is in small letters"
                reason = f"caption without image: {why}"
            elif not _is_image(name):
                reason = "neither image nor caption: by its name"
            elif not any(beside):
                reason = "no caption: neither a row in a table nor a .txt or .json of the same name"
            rows.append((name, name, [size, *(sizes[one] for one in beside if one)], None, beside, None, reason))
        return sorted(rows, key=lambda row: (row[1], row[0]))

    def _table(self, table: str, sizes: dict[str, int]) -> Iterator[tuple[Any, ...]]:
        seen: dict[str, int] = {}
        for number, row in table_rows(self.folder, table, self.score):
            where = f"{table} row {number}"
            if isinstance(row, str):
                yield (where, where, 0, None, (None, None), None, f"broken table row: {row}")
                continue
            file, caption, score = row
            reason = None
            try:
                check_name(file)
            except RejectError as error:
                reason = str(error)
            else:
                if file not in sizes:
                    reason = f"no such file: {file!r}"
                elif not _is_image(file):
                    reason = f"neither image nor caption: {file!r} by its name"
            if reason is not None:
                yield (where, where, 0, None, (None, None), None, reason)
                continue
            seen[file] = seen.get(file, 0) + 1
            source = file if seen[file] == 1 else f"{file}#{seen[file]:03d}"
            yield (source, file, sizes[file], caption, (None, None), score, None)

    def load(self, item: Item) -> Sample:
        """Read picture and caption. Raises RejectError; OSError when the store fails."""
        assert isinstance(item.image, str)
        caption, score = item.caption, item.score
        if isinstance(caption, _Beside):
            caption, score = self._beside(caption)
        data = self._read(item.image)
        return Sample(data, caption, content_hash(data), score=score)

    def _read(self, name: str, limit: int = MAX_FILE_BYTES) -> bytes:
        return read_file(self.folder, name, limit, beside=posixpath.dirname(name))

    def _beside(self, beside: _Beside) -> tuple[Any, Any]:
        """Caption and score of a picture from the files beside it."""
        fields = {}
        if beside.json and (self.score is not None or not beside.txt):
            fields = parse_json(self._read(beside.json, MAX_TEXT_BYTES))
        caption = self._read(beside.txt, MAX_TEXT_BYTES) if beside.txt else fields.get("caption")
        return caption, fields.get(self.score) if self.score else None


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in EXTENSIONS
