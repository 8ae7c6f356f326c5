"""Rows of Arrow tables: which column holds what, and what of it can be used. Shared by Parquet files and Hugging Face datasets."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pyarrow as pa
from pyarrow import types

from paris_ray.config import HfDatasetSource, ParquetSource
from paris_ray.data.sources.base import Item, Sample, content_hash
from paris_ray.data.sources.files import MAX_FILE_BYTES, MAX_TEXT_BYTES, read_file
from paris_ray.storage import Folder

STRUCT = ("bytes", "path")
"""Fields of an image in a Hugging Face dataset; the bytes count where there are some."""

_BINARY = {pa.string(): pa.binary(), pa.large_string(): pa.large_binary(), pa.string_view(): pa.binary_view()}
"""Strings are read as bytes: one that is no UTF-8 then costs its own row, not its batch."""


def _is_text(kind: pa.DataType) -> bool:
    return kind in _BINARY


def _is_bytes(kind: pa.DataType) -> bool:
    return kind in _BINARY.values()


def _is_number(kind: pa.DataType) -> bool:
    return types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)


class Columns:
    """The columns that a source reads; all others are left alone, whatever they hold.

    Args:
        source: their names.
        score: the column with scores, if there is one.
    """

    def __init__(self, source: ParquetSource | HfDatasetSource, score: str | None):
        self.source, self.score = source, score
        self.names = list(dict.fromkeys(name for name in (source.image, source.caption, source.key, score) if name is not None))
        self.images = Folder(source.images) if source.images is not None else None

    def reads(self, path: str) -> bool:
        """Whether a Parquet file's column of numbers or bytes is one of these, or inside one."""
        return any(path == name or path.startswith(f"{name}.") for name in self.names)

    def problem(self, schema: pa.Schema) -> str | None:
        """Why rows of this schema cannot be read, ``None`` if they can."""
        keys = {"image": self.source.image, "caption": self.source.caption, "key": self.source.key}
        for name in self.names:
            if schema.get_field_index(name) < 0:
                key = next((f"data.source.{key}" for key, column in keys.items() if column == name), "data.filter.score_column")
                if name in schema.names:
                    return f"there are {schema.names.count(name)} columns {name!r}; give {key} one that is there once"
                return f"there is no column {name!r}; name one of {', '.join(schema.names)}: {key}=…"
        kinds = {name: _plain(schema.field(name).type) for name in self.names}
        image = kinds[self.source.image]
        held = [image]
        if types.is_struct(image):
            held = [_plain(image.field(name).type) for name in STRUCT if image.get_field_index(name) >= 0]
        if not held or not all(_is_bytes(kind) or _is_text(kind) or types.is_null(kind) for kind in held):
            return f"the column {self.source.image!r} of images holds {image}, neither bytes nor a struct with bytes nor names"
        if _is_text(image) and self.images is None:
            return f"the column {self.source.image!r} holds names; say below which folder these files lie, data.source.images=…"
        for column, what, rule, allowed in (
            (self.source.caption, "captions", "strings", (_is_text, _is_bytes)),
            (self.source.key, "keys", "strings or integers", (_is_text, types.is_integer)),
            (self.score, "scores", "numbers", (_is_number,)),
        ):
            if column is not None and not any(one(kinds[column]) for one in (*allowed, types.is_null)):
                return f"the column {column!r} of {what} holds {kinds[column]}, not {rule}"
        return None

    def items(self, batch: pa.RecordBatch, file: str, first: int) -> Iterator[Item]:
        """Rows of a batch whose schema has no problem.

        Args:
            batch: with at least :attr:`names`.
            file: where they are from.
            first: number of the first row there.

        Raises:
            pyarrow.ArrowInvalid: the batch's buffers do not fit together.
        """
        caption = _values(batch.column(self.source.caption))
        key, score = (None if name is None else _values(batch.column(name)) for name in (self.source.key, self.score))
        held = [(name == "path" or _is_text(_plain(column.type)), _values(column)) for name, column in _held(batch.column(self.source.image))]
        for i in range(len(batch)):
            found: Any = None
            reason = _too_large(caption[i], "caption too long", MAX_TEXT_BYTES)
            for named, column in held:
                if column[i].is_valid:
                    if (large := _too_large(column[i], "file too large", MAX_FILE_BYTES)) is None:
                        found = column[i].as_py().decode("utf-8", "surrogateescape") if named else column[i].as_py()
                    reason = large or reason
                    break
            identity = key[i].as_py() if key is not None else None
            if reason is not None:
                pass
            elif found is None:
                reason = "no image: it is null"
            elif isinstance(found, str) and self.images is None:
                reason = f"no image: the row has only the name {found!r}; say below which folder it lies, data.source.images=…"
            elif key is not None and identity is None:
                reason = f"no key: {self.source.key!r} is null"
            if identity is not None:
                identity = identity.decode("utf-8", "surrogateescape") if isinstance(identity, bytes) else str(identity)
            name, text = f"{file} row {first + i}", caption[i].as_py() if reason is None else None
            yield Item(name, found if reason is None else None, text, identity, None if score is None else score[i].as_py(), reason)

    def load(self, item: Item) -> Sample:
        """Read the file of an item that has only its name. Raises RejectError; OSError when the store fails."""
        data = item.image
        if isinstance(data, str):
            assert self.images is not None
            data = read_file(self.images, data)
        assert data is not None
        return Sample(data, item.caption, content_hash(data), item.key, None, item.score)


def _plain(kind: pa.DataType) -> pa.DataType:
    """The type of a dictionary's values. An extension type stays what it is, and is refused: its values may run code when they are looked at."""
    return kind.value_type if types.is_dictionary(kind) else kind


def _held(images: pa.Array) -> list[tuple[str, pa.Array]]:
    """The columns in which an image may be, with their names: of a struct those of :data:`STRUCT`, and no other field, whatever it is."""
    if not types.is_struct(images.type):
        return [("", images)]
    fields = dict(zip([field.name for field in images.type], images.flatten(), strict=True))
    return [(name, fields[name]) for name in STRUCT if name in fields]


def _too_large(value: pa.Scalar, what: str, limit: int) -> str | None:
    """The reason to refuse bytes or a string over a limit, which are then never copied."""
    size = value.as_buffer().size if value.is_valid and value.type in _BINARY.values() else 0
    return f"{what}: {size} bytes, at most {limit} are read" if size > limit else None


class _Named:
    """Values of a dictionary, one by one: decoded whole, a large one that many rows name would be there for each of them."""

    def __init__(self, column: pa.DictionaryArray):
        column.validate(full=True)
        self.rows: pa.Array = column.indices
        self.values: Any = _values(column.dictionary)

    def __getitem__(self, i: int) -> pa.Scalar:
        row = self.rows[i].as_py()
        return pa.scalar(None, self.values.type) if row is None else self.values[row]


def _values(column: pa.Array) -> pa.Array | _Named:
    """Values that may be looked at one by one: offsets within the buffers, strings as bytes."""
    if types.is_dictionary(column.type):
        return _Named(column)
    column = column.cast(_BINARY[column.type]) if column.type in _BINARY else column
    column.validate(full=True)
    return column
