"""Columns of the Parquet files that stages hand each other. Arrow's own fixed-shape tensors, so plain pyarrow reads them."""

from __future__ import annotations

import collections
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paris_ray.manifest import published
from paris_ray.storage import Folder

T = TypeVar("T")
U = TypeVar("U")

SPLITS = ("train", "validation", "held_out", "unused")
"""The first three are drawn. ``unused`` are appended rows that look like earlier ones of several splits: they are in no shard, and nothing asks for
them."""

SPLIT_GIVEN = "split_given"
"""Note of a part of the corpus whose rows have the split that their source gives; rows that look like them do not change it."""

READ_AHEAD = 8

GROUP_ROWS = 1 << 16
"""Rows of a row group at most: a writer holds one, encoded, in memory."""

LABELS = "labels"
"""Stem of the files of ``RUN/clusters`` with the label of every row: each version adds one, of the rows that it adds."""

REJECTED = pa.schema([("source", pa.string()), ("reason", pa.string())])
"""Rows that were refused, and why: ``kind: detail``."""


def part_name(index: int) -> str:
    """File name of a part; names sort in the order of their rows, up to ten million of them."""
    return f"part-{index:07d}.parquet"


def part_number(name: str) -> int:
    """The number in a part's file name."""
    return int(name.removeprefix("part-").removesuffix(".parquet"))


def _text(text: Mapping[str, Any], store_text: str) -> pa.Field:
    length = int(text["max_length"])
    if store_text == "states":
        return pa.field("text", pa.fixed_shape_tensor(pa.float16(), (length, int(text["width"]))))
    return pa.field("token_ids", pa.fixed_shape_tensor(pa.int32(), (length,)))


def _latent(codec: Mapping[str, Any]) -> pa.Field:
    side = int(codec["latent_size"])
    return pa.field("latent", pa.fixed_shape_tensor(pa.float16(), (int(codec["channels"]), side, side)))


def corpus_schema(encoders: Mapping[str, Any], store_text: str) -> pa.Schema:
    """Schema of ``RUN/corpus/part-*.parquet``.

    Args:
        encoders: the content of ``RUN/encoders/encoders.json``.
        store_text: ``states`` (a column ``text``, float16 (T, D)) or ``token_ids`` (int32 (T,)).
    """
    return pa.schema(
        [
            pa.field("id", pa.string()),
            pa.field("caption", pa.string()),
            _text(encoders["text"], store_text),
            pa.field("text_len", pa.int32()),
            pa.field("caption_cut", pa.bool_()),
            _latent(encoders["codec"]),
            pa.field("embedding", pa.fixed_shape_tensor(pa.float16(), (int(encoders["embedding"]["width"]),))),
            pa.field("split", pa.string()),
            pa.field("group", pa.string()),
            pa.field("phash", pa.int64()),
            pa.field("source", pa.string()),
            pa.field("width", pa.int32()),
            pa.field("height", pa.int32()),
        ]
    )


def shard_schema(encoders: Mapping[str, Any], store_text: str) -> pa.Schema:
    """Schema of ``RUN/shards/expert=K/part-*.parquet``; arguments as in :func:`corpus_schema`."""
    return pa.schema(
        [
            pa.field("id", pa.string()),
            _text(encoders["text"], store_text),
            pa.field("text_len", pa.int32()),
            _latent(encoders["codec"]),
            pa.field("fine", pa.int32()),
            pa.field("split", pa.string()),
        ]
    )


def tensor_bytes(kinds: Iterable[pa.DataType]) -> int:
    """Bytes of a row's tensors in memory: padding is there in full, whatever compression makes of it on disk."""
    tensors = [kind for kind in kinds if isinstance(kind, pa.FixedShapeTensorType)]
    return sum(math.prod(kind.shape) * kind.value_type.bit_width // 8 for kind in tensors)


def tensor_array(values: NDArray[Any], kind: pa.FixedShapeTensorType) -> pa.ExtensionArray:
    """Rows of a tensor column: (N, *kind.shape) → an Arrow array of N tensors."""
    shape = tuple(kind.shape)
    if values.shape[1:] != shape:
        raise ValueError(f"rows have the shape {values.shape[1:]}, the column holds {shape}")
    flat = np.ascontiguousarray(values, dtype=kind.value_type.to_pandas_dtype()).reshape(-1)
    return pa.ExtensionArray.from_storage(kind, pa.FixedSizeListArray.from_arrays(pa.array(flat), int(np.prod(shape))))


def table(schema: pa.Schema, columns: Mapping[str, Any]) -> pa.Table:
    """A table of the schema from lists and arrays; tensor columns are given as (N, …) arrays.

    Raises:
        ValueError: a column is missing, too many, or of another shape.
    """
    if set(columns) != set(schema.names):
        raise ValueError(f"columns are {sorted(columns)}, the schema has {sorted(schema.names)}")
    arrays = [
        tensor_array(columns[field.name], field.type)
        if isinstance(field.type, pa.FixedShapeTensorType)
        else pa.array(columns[field.name], type=field.type)
        for field in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def layout(schema: pa.Schema) -> dict[str, Any]:
    """How columns are written.

    Numbers of a float16 tensor hardly repeat: to look for a dictionary of them takes longer than all else, and what can be compressed is their upper
    bytes, put together.
    """
    half = {field.name for field in schema if isinstance(field.type, pa.FixedShapeTensorType) and field.type.value_type == pa.float16()}
    leaves = {field.name: f"{field.name}.list.element" if isinstance(field.type, pa.FixedShapeTensorType) else field.name for field in schema}
    return {
        "compression": "zstd",
        "use_dictionary": [leaf for name, leaf in leaves.items() if name not in half],
        "use_byte_stream_split": [leaf for name, leaf in leaves.items() if name in half],
    }


def write_table(folder: Folder, name: str, content: pa.Table) -> None:
    """Write one Parquet file atomically; equal tables give equal bytes."""
    with folder.writer(name) as sink:
        pq.write_table(content, sink, row_group_size=GROUP_ROWS, **layout(content.schema))


class PartWriter:
    """Writes one part file piece by piece, each a row group; a context manager. The file appears when it is left without error.

    Args:
        folder: where.
        name: of the file.
        schema: of all pieces.
        notes: whole numbers about the file, kept in its metadata; more may be added until the end.
    """

    def __init__(self, folder: Folder, name: str, schema: pa.Schema, notes: Mapping[str, int] | None = None):
        self._sink, self._schema, self.notes = folder.writer(name), schema, dict(notes or {})

    def __enter__(self) -> PartWriter:
        self._file = pq.ParquetWriter(self._sink.__enter__(), self._schema, **layout(self._schema))
        return self

    def write(self, content: pa.Table) -> None:
        """Add a row group."""
        self._file.write_table(content.combine_chunks())

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if kind is None:
            self._file.add_key_value_metadata({name: str(value) for name, value in self.notes.items()})
        self._file.close()
        self._sink.__exit__(kind, error, trace)


def notes(content: pq.ParquetFile) -> dict[str, int]:
    """What :class:`PartWriter` noted about a file."""
    return {key.decode(): int(value) for key, value in (content.metadata.metadata or {}).items() if value.isdigit()}


def written(folder: Folder) -> list[str]:
    """Names of the part files that are directly in a folder, published or not, in the order of their rows: for the stage that writes them."""
    return _parts(entry.name for entry in folder.files())


def parts(folder: Folder) -> list[str]:
    """Names of a folder's part files for all who read it, in the order of their rows.

    Those that its manifest lists: what lies beside them is of an append that is not finished. All that are there, while there is no manifest.
    """
    manifest = published(folder)
    return written(folder) if manifest is None else _parts(file["name"] for file in manifest["files"])


def version_name(stem: str, version: int) -> str:
    """Name of the Parquet file that a version of a folder adds to those of its stem: no published file is changed by a later version."""
    return f"{stem}.parquet" if version == 1 else f"{stem}-{version:06d}.parquet"


def versions(folder: Folder, stem: str) -> list[str]:
    """The published files of a stem, as :func:`parts` knows them, those of the first version first."""
    manifest = published(folder)
    names = [entry.name for entry in folder.files()] if manifest is None else [file["name"] for file in manifest["files"]]
    first = version_name(stem, 1)
    return sorted((name for name in names if name == first or name.startswith(f"{stem}-")), key=lambda name: (name != first, name))


def _parts(names: Iterable[str]) -> list[str]:
    return [name for name in names if name.startswith("part-") and name.endswith(".parquet")]


def arrow_schema(folder: Folder, name: str) -> pa.Schema:
    """Columns of a file, with their types."""
    with folder.open(name) as source, pq.ParquetFile(source) as content:
        return content.schema_arrow


def read_table(folder: Folder, name: str, columns: Sequence[str] | None = None) -> pa.Table:
    """One Parquet file, or some of its columns."""
    with folder.open(name) as source:
        return pq.read_table(source, columns=list(columns) if columns is not None else None)


def ahead(read: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
    """``map(read, items)``, a few items read ahead: an object store takes its time to answer."""
    waiting: collections.deque[Future[U]] = collections.deque()
    with ThreadPoolExecutor(READ_AHEAD) as pool:
        for item in items:
            waiting.append(pool.submit(read, item))
            if len(waiting) > READ_AHEAD:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def read_each(folder: Folder, columns: Sequence[str], names: Iterable[str] | None = None) -> Iterator[tuple[str, pa.Table, dict[str, int]]]:
    """Some columns of part files (all of :func:`parts` by default), a few files read ahead: name, columns, and the notes of its writer."""

    def read(name: str) -> tuple[str, pa.Table, dict[str, int]]:
        with folder.open(name) as source, pq.ParquetFile(source) as content:
            return name, content.read(columns=list(columns), use_threads=False), notes(content)

    return ahead(read, parts(folder) if names is None else names)


def count_rows(folder: Folder, names: Iterable[str]) -> list[int]:
    """Rows of each of these files."""

    def count(name: str) -> int:
        with folder.open(name) as source, pq.ParquetFile(source) as content:
            return int(content.metadata.num_rows)

    return list(ahead(count, names))


def read_labels(clusters: Folder, columns: Sequence[str]) -> pa.Table:
    """Columns ``id``, ``fine``, ``expert``, ``distance`` (squared, to the expert's centroid) or ``split`` of every row, in the corpus' order.

    Raises:
        FileNotFoundError: there are no labels yet.
    """
    names = versions(clusters, LABELS)
    if not names:
        raise FileNotFoundError(f"{clusters.uri} has no {version_name(LABELS, 1)}; run the stage 'partition' first")
    return pa.concat_tables(read_table(clusters, name, columns) for name in names)


def to_numpy(column: pa.ChunkedArray) -> NDArray[Any]:
    """A column as an array: tensors as (N, …), numbers as they are, strings as objects (null is ``None``)."""
    if isinstance(column.type, pa.FixedShapeTensorType):
        if not len(column):
            return np.empty((0, *column.type.shape), column.type.value_type.to_pandas_dtype())
        whole = column.combine_chunks()
        whole = whole.chunk(0) if isinstance(whole, pa.ChunkedArray) else whole
        return np.asarray(whole.to_numpy_ndarray())
    return np.asarray(column.to_numpy())


def read_columns(folder: Folder, columns: Sequence[str]) -> dict[str, NDArray[Any]]:
    """Columns over all part files of a folder (:func:`parts`), in their order.

    Args:
        folder: ``RUN/corpus`` or ``RUN/shards/expert=K``.
        columns: names; tensors come as (N, …) arrays, strings as object arrays.

    Raises:
        FileNotFoundError: the folder has no part file.
    """
    names = parts(folder)
    if not names:
        raise FileNotFoundError(f"{folder.uri} has no part-*.parquet; run the stage that writes it first")
    pieces: dict[str, list[NDArray[Any]]] = {column: [] for column in columns}
    for name in names:
        content = read_table(folder, name, columns)
        for column in columns:
            pieces[column].append(to_numpy(content.column(column)))
    return {column: np.concatenate(arrays) for column, arrays in pieces.items()}
