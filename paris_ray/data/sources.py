"""Where pictures and captions come from, which rows belong together, and who never sees them in training."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import posixpath
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from PIL import Image

from paris_ray import rng
from paris_ray.config import ConfigError, DataConfig, FolderSource, SplitConfig
from paris_ray.data.images import EXTENSIONS, RejectError
from paris_ray.storage import Entry, Folder

TABLES = ("captions.csv", "captions.jsonl")
READ_TRIES = 3


@dataclass(frozen=True, slots=True)
class Item:
    """One row of a source, before anything is read.

    Args:
        source: unique name, as shown in the corpus and among the rejects.
        file: what :meth:`Source.load` opens.
        size: bytes, where the listing says so.
        caption: where a table says so; else it is read with the picture.
        reason: why the row is refused already.
    """

    source: str
    file: str
    size: int = 0
    caption: str | None = None
    reason: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One row, read: a file's content or a drawn picture, its caption, what identifies the content, and the group that is split as one."""

    image: bytes | Image.Image
    caption: str
    content: str
    group: str


class Source(Protocol):
    """A list of rows and a way to read one of them."""

    def items(self) -> list[Item]:
        """All rows, in an order that depends on nothing but the source. Nothing is decoded."""
        ...

    def load(self, item: Item) -> Sample:
        """Read one row. Raises RejectError with the reason."""
        ...


def open_source(data: DataConfig) -> Source:
    """The source that a config names."""
    if isinstance(data.source, FolderSource):
        return ImageFolder(data.source.uri, data.max_caption_chars)
    from paris_ray.data.openmoji import OpenMoji

    return OpenMoji(data.source, data.image_size)


def check_caption(caption: str, max_chars: int) -> str:
    """A caption with its white space collapsed. Raises RejectError."""
    try:
        caption.encode()
    except UnicodeEncodeError:
        raise RejectError("undecodable caption: it is not valid Unicode") from None
    text = " ".join(caption.replace("\0", " ").split())
    if not text:
        raise RejectError("empty caption: it has no characters")
    if len(text) > max_chars:
        raise RejectError(f"caption too long: {len(text)} characters, max_caption_chars is {max_chars}")
    return text


class ImageFolder:
    """Pictures below a folder, captions beside them (``name.txt`` for ``name.jpg``) or in ``captions.csv`` or ``captions.jsonl`` at its top.

    A table has the fields ``file`` (relative to the folder) and ``caption``; a picture may have several rows, one caption each. A picture that
    the table does not name takes its sidecar. Everything else in the folder becomes a reject.

    Args:
        uri: local path or URI.
        max_caption_chars: refuse longer captions.
    """

    def __init__(self, uri: str, max_caption_chars: int):
        self.folder, self.max_caption_chars = Folder(uri), max_caption_chars

    def items(self) -> list[Item]:
        """All files in the order of their names. Raises ConfigError for a folder that is missing, empty, or has two caption tables."""
        uri = self.folder.uri
        if not self.folder.exists():
            raise ConfigError(f"data.source.uri: the folder {uri} does not exist; name one that holds images and captions, --set data.source.uri=…")
        entries = {entry.name: entry for entry in self.folder.files(recursive=True)}
        if not any(_is_image(name) for name in entries):
            raise ConfigError(
                f"data.source.uri: the folder {uri} holds no image ({', '.join(sorted(EXTENSIONS))}) among its {len(entries)} files; "
                "name one that holds images and captions, --set data.source.uri=…"
            )
        tables = [name for name in TABLES if name in entries]
        if len(tables) > 1:
            raise ConfigError(f"data.source.uri: {uri} holds both {' and '.join(tables)}; captions come from one table, remove the other")
        rows = list(self._table(tables[0], entries)) if tables else []
        named = {item.file for item in rows}
        stems = {posixpath.splitext(name)[0] for name in entries if _is_image(name)}
        found = []
        for name, entry in entries.items():
            stem, extension = posixpath.splitext(name)
            if name in named or name in tables or (extension.lower() == ".txt" and stem in stems):
                continue
            reason = None
            if not _is_image(name):
                reason = (
                    "caption without image: no picture has this name" if extension.lower() == ".txt" else "neither image nor caption: by its name"
                )
            elif f"{stem}.txt" not in entries:
                reason = "no caption: neither a row in a table nor a .txt of the same name"
            found.append(Item(name, name, entry.size, None, reason))
        return sorted(rows + found, key=lambda item: (item.file, item.source))

    def _table(self, table: str, entries: dict[str, Entry]) -> Iterator[Item]:
        # Bytes that are no UTF-8 become lone surrogates, which check_caption refuses row by row.
        text = self.folder.read_bytes(table).decode("utf-8-sig", errors="surrogateescape")
        seen: dict[str, int] = {}
        for number, row in _csv_rows(text, f"{self.folder.uri}/{table}") if table.endswith(".csv") else _jsonl_rows(text):
            where = f"{table} row {number}"
            if isinstance(row, str):
                yield Item(where, where, reason=f"broken table row: {row}")
                continue
            file, caption = row
            shown = file.encode(errors="replace").decode()
            if file.startswith("/") or "://" in file or ".." in file.split("/") or not file:
                yield Item(where, where, reason=f"file outside the folder: {shown!r}; names are relative, without '..'")
            elif file not in entries:
                yield Item(where, where, reason=f"no such file: {shown!r}")
            elif not _is_image(file):
                yield Item(where, where, reason=f"neither image nor caption: {shown!r} by its name")
            else:
                seen[file] = seen.get(file, 0) + 1
                source = file if seen[file] == 1 else f"{file}#{seen[file]:03d}"
                try:
                    yield Item(source, file, entries[file].size, check_caption(caption, self.max_caption_chars))
                except RejectError as error:
                    yield Item(source, file, entries[file].size, None, str(error))

    def load(self, item: Item) -> Sample:
        """Read picture and caption. Raises RejectError; OSError when the store fails, which is no property of the row."""
        data = self._read(item.file)
        caption = item.caption
        if caption is None:
            raw = self._read(posixpath.splitext(item.file)[0] + ".txt")
            try:
                text = raw.decode("utf-8-sig")
            except UnicodeDecodeError as error:
                raise RejectError(f"undecodable caption: {error}") from None
            caption = check_caption(text, self.max_caption_chars)
        digest = hashlib.sha256(data).hexdigest()[:32]
        return Sample(data, caption, digest, digest)

    def _read(self, name: str) -> bytes:
        for attempt in range(READ_TRIES):
            try:
                return self.folder.read_bytes(name)
            except (FileNotFoundError, PermissionError) as error:
                raise RejectError(f"unreadable file: {error}") from None
            except OSError:
                if attempt == READ_TRIES - 1:
                    raise
                time.sleep(2.0**attempt)
        raise AssertionError("unreachable")


def _is_image(name: str) -> bool:
    return posixpath.splitext(name)[1].lower() in EXTENSIONS


Row = tuple[str, str] | str
"""File and caption, or what is wrong with the row."""


def _csv_rows(text: str, uri: str) -> Iterator[tuple[int, Row]]:
    reader = csv.reader(io.StringIO(text, newline=""))
    header = [field.strip().lower() for field in next(reader, [])]
    if not {"file", "caption"} <= set(header):
        raise ConfigError(f"data.source.uri: the first row of {uri} is {header}; it must name the columns 'file' and 'caption'")
    file, caption = header.index("file"), header.index("caption")
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
        if len(fields) <= max(file, caption):
            yield number, f"{len(fields)} fields, the header has {len(header)}"
        else:
            yield number, (fields[file].strip(), fields[caption])


def _jsonl_rows(text: str) -> Iterator[tuple[int, Row]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, f"not valid JSON: {error}"
            continue
        if isinstance(value, dict) and isinstance(value.get("file"), str) and isinstance(value.get("caption"), str):
            yield number, (value["file"], value["caption"])
        else:
            yield number, "needs the strings 'file' and 'caption'"


def row_id(content: str, caption: str) -> str:
    """Identity of a row: 32 hex digits of a hash of its content's hash (or key) and its caption."""
    return hashlib.sha256(f"{content}\n{caption}".encode()).hexdigest()[:32]


def split_of(split: SplitConfig, seed: int, group: str, identity: str) -> str:
    """The split of a row, by hash alone, so that it is known before anything is fitted and stays when rows are added.

    Args:
        split: the shares.
        seed: the run's seed.
        group: rows of one group are held out together.
        identity: of what is drawn as one within a group: the row's id, or the picture's where rows share a picture.
    """
    if rng.key(seed, "split-group", group) < split.held_out_groups * 2**63:
        return "held_out"
    draw = rng.key(seed, "split-row", identity) / 2**63
    if draw < split.held_out_rows:
        return "held_out"
    return "validation" if draw < split.held_out_rows + split.validation_rows else "train"


def listing(items: list[Item]) -> dict[str, int | str]:
    """What was listed, in two figures: if they change, parts made before and after do not belong together."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(repr((item.source, item.file, item.size, item.caption, item.reason)).encode("utf-8", "surrogateescape"))
    return {"items": len(items), "fingerprint": digest.hexdigest()[:32]}
