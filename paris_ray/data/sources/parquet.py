"""Parquet files of images and captions."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pyarrow.parquet as pq

from paris_ray.config import ConfigError, ParquetSource
from paris_ray.data.images import RejectError
from paris_ray.data.sources.base import Item, Sample, Unit
from paris_ray.data.sources.columns import Columns
from paris_ray.data.sources.files import MAX_FILE_BYTES, Steady, bomb, files_of, one_line, too_many
from paris_ray.storage import Folder

FOOTERS = 16
"""Footers read at once."""
READ_BYTES = 4 << 20
"""Read of a column at once; without, a row group's whole column would be held in memory."""
BATCH = 32
"""Rows decoded at once, at most: images are large."""

Piece = tuple[int, int, int, int]
"""Row group, first row in it, rows, and the number of the first row in the file."""


class Parquet:
    """Parquet files, each row an image (bytes, a struct with bytes, or a name below a folder) and its caption.

    A unit is a run of row groups of one file, or a piece of a row group that has more rows than a part. Such a piece is read from its row group's
    beginning: write images as bytes in row groups of at most some thousand rows.

    Args:
        source: where they are, and the names of the columns.
        score: the column with scores, if there is one.
    """

    def __init__(self, source: ParquetSource, score: str | None):
        self.columns, self.uri = Columns(source, score), source.uri

    def units(self, rows: int) -> list[Unit]:
        """All files in the order of their names; only their footers are read. Raises ConfigError when no file can be read."""
        folder, files = files_of(self.uri, ".parquet", "a Parquet file or a folder with some")
        with ThreadPoolExecutor(FOOTERS) as pool:
            found = list(pool.map(lambda file: self._footer(Steady(folder, file[0]), file[1]), files))
        problems = [problem for _, problem in found if problem is not None]
        if len(problems) == len(files):
            raise ConfigError(f"data.source: none of the {len(files)} Parquet files in {self.uri} can be read. {files[0][0]}: {problems[0]}")
        units: list[Unit] = []
        for (name, size), (groups, problem) in zip(files, found, strict=True):
            whole = [(0, 0, 1, 0)] if problem is not None and not groups else None
            for pieces in [whole] if whole else _units(groups, rows):
                rows_here, first = sum(piece[2] for piece in pieces), pieces[0][3]
                what = f"{name} rows {first} … {first + rows_here - 1}"
                units.append(Unit(len(units), (folder.uri, name, size, tuple(pieces), problem), rows_here, what))
        return units

    def _footer(self, file: Steady, size: int) -> tuple[list[int], str | None]:
        """Rows of each row group, and why none of them can be read."""
        try:
            with file, pq.ParquetFile(file) as content:
                groups = [content.metadata.row_group(i).num_rows for i in range(content.num_row_groups)]
                problem = self.columns.problem(content.schema_arrow)
        except RejectError as error:
            return [], str(error)
        except Exception as error:  # of a broken footer anything
            if file.failure is not None:
                raise file.failure from None
            return [], f"broken Parquet file: {one_line(error)}"
        if (reason := too_many(-1 if min(groups, default=0) < 0 else sum(groups), size)) is not None:
            return [], f"broken Parquet file: {reason}"
        return groups, None if problem is None else f"wrong columns: {problem}"

    def read(self, unit: Unit) -> Iterator[Item]:
        """The rows of a unit, a few decoded at once. Of a broken row group the rows from the damage on become rejects, each its own."""
        uri, name, _, pieces, problem = unit.where
        if problem is not None:
            yield from (Item(f"{name} row {first + i}", reason=problem) for *_, rows, first in pieces for i in range(rows))
            return
        file = Steady(Folder(uri), name)
        with file, pq.ParquetFile(file, buffer_size=READ_BYTES, pre_buffer=False) as content:
            for piece in pieces:
                yield from self._piece(content, file, name, piece)

    def _piece(self, content: pq.ParquetFile, file: Steady, name: str, piece: Piece) -> Iterator[Item]:
        group, skip, rows, first = piece
        at, end, reason = 0, skip + rows, "it has fewer rows than its footer says"
        size, refused = self._size(content.metadata.row_group(group))
        if refused is not None:
            yield from (Item(f"{name} row {first + i}", reason=refused) for i in range(rows))
            return
        count = max(1, min(BATCH, MAX_FILE_BYTES // max(1, size)))
        try:
            for batch in content.iter_batches(count, row_groups=[group], columns=self.columns.names, use_threads=False):
                low, high = max(at, skip), min(at + len(batch), end)
                if low < high:
                    yield from self.columns.items(batch.slice(low - at, high - low), name, first + low - skip)
                at += len(batch)
                if at >= end:
                    return
        except Exception as error:  # as above
            if file.failure is not None:
                raise file.failure from None
            reason = one_line(error)
        for row in range(max(at, skip), end):
            yield Item(f"{name} row {first + row - skip}", reason=f"broken row group: {reason}")

    def _size(self, group: pq.RowGroupMetaData) -> tuple[int, str | None]:
        """Bytes that one row may take, at most: all that the row group has, as often as rows name a value of its dictionary; why it is refused."""
        read = [column for column in map(group.column, range(group.num_columns)) if self.columns.reads(column.path_in_schema)]
        unpacked, packed = (sum(getattr(column, f"total_{kind}_size") for column in read) for kind in ("uncompressed", "compressed"))
        if unpacked > MAX_FILE_BYTES * group.num_rows:
            return unpacked, f"file too large: {group.num_rows} rows are {unpacked} bytes unpacked, at most {MAX_FILE_BYTES} are read of each"
        return unpacked, bomb(packed, unpacked)

    def load(self, item: Item) -> Sample:
        """Read the file of a row that has only its name. Raises RejectError; OSError when the store fails."""
        return self.columns.load(item)


def _units(groups: list[int], rows: int) -> Iterator[list[Piece]]:
    """Row groups in runs of at most ``rows`` rows; a row group that has more is cut."""
    run: list[Piece] = []
    first = 0
    for group, count in enumerate(groups):
        if run and sum(piece[2] for piece in run) + count > rows:
            yield run
            run = []
        if count > rows:
            yield from ([(group, skip, min(rows, count - skip), first + skip)] for skip in range(0, count, rows))
        elif count:
            run.append((group, 0, count, first))
        first += count
    if run:
        yield run
