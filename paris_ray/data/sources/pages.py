"""What the pages of a Parquet file take unpacked, from their own headers: pyarrow unpacks what these say, whatever the footer says."""

from __future__ import annotations

import pyarrow.parquet as pq

from paris_ray.data.sources.files import Steady
from paris_ray.storage import Folder

MAX_HEADER_BYTES = 1 << 20
"""A page's header that is larger is none; the smallest and the largest value of the page may be in it."""

_BOOLS, _BYTE, _INTS, _DOUBLE, _BINARY, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, 12  # types of fields in Thrift's compact protocol


class PagedFile(Steady):
    """A file whose pages are looked at as they pass to the reader: those of a column may not be larger together than the footer says they are."""

    def __init__(self, folder: Folder, name: str):
        super().__init__(folder, name)
        self._chunks: list[_Chunk] = []

    def watch(self, columns: list[pq.ColumnChunkMetaData]) -> None:
        """From now on only these columns of a row group are read."""
        self._chunks = [_Chunk(column) for column in columns]

    def read(self, size: int | None = -1) -> bytes:
        """As files do. Raises ValueError before the reader sees a page that it would unpack to more than it should, or one that was skipped to."""
        at = self._at
        data = super().read(size)
        if data and self._chunks and not [chunk for chunk in self._chunks if chunk.take(at, data)]:
            raise ValueError(f"its reader is at byte {at}, where none of its columns has a page")
        return data


class _Chunk:
    """The pages of one column of a row group, read from the first to the last."""

    def __init__(self, column: pq.ColumnChunkMetaData):
        places = [place for place in (column.dictionary_page_offset, column.data_page_offset) if place is not None and place > 0]
        self.first = self.next = min(places)
        self.end = self.first + column.total_compressed_size
        self.name, self.claimed, self.found = column.path_in_schema, column.total_uncompressed_size, 0
        self.held = b""  # of the next header, as far as it was read

    def take(self, at: int, data: bytes) -> bool:
        """Look at what was read; whether it goes on where this column's pages are."""
        known = self.next + len(self.held)
        if not self.first <= at <= known:
            return False
        if at + len(data) <= known:
            return True  # the inside of a page
        self.held += data[known - at :]
        while self.held and self.next < self.end:
            try:
                length, unpacked, packed = page_sizes(self.held)
            except IndexError:
                if len(self.held) > MAX_HEADER_BYTES:
                    raise ValueError(f"a page's header has more than {MAX_HEADER_BYTES} bytes") from None
                break
            if unpacked < 0 or packed < 0:
                raise ValueError(f"a page claims {min(unpacked, packed)} bytes")
            self.found += unpacked
            if self.found > self.claimed:
                raise ValueError(f"the pages of {self.name} are {self.found} bytes or more unpacked, its footer says {self.claimed}")
            self.next += length + packed
            self.held = self.held[length + packed :]
        if self.next >= self.end:
            self.held = b""
        return True


def page_sizes(data: bytes) -> tuple[int, int, int]:
    """Length of the page header that bytes begin with, and the page's size unpacked and as stored. Raises IndexError if it goes on after them."""
    found, at, last = {2: -1, 3: -1}, 0, 0
    while data[at]:
        last, kind, at = _field(data, at, last)
        if last in found and kind in _INTS:
            value, at = _varint(data, at)
            found[last] = (value >> 1) ^ -(value & 1)
        else:
            at = _skip(data, at, kind)
    return at + 1, found[2], found[3]


def _field(data: bytes, at: int, last: int) -> tuple[int, int, int]:
    """Number and type of a field, and where its value is."""
    head, at = data[at], at + 1
    if head >> 4:
        return last + (head >> 4), head & 15, at
    number, at = _varint(data, at)
    return (number >> 1) ^ -(number & 1), head & 15, at


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        if (shift := shift + 7) > 63:
            raise ValueError("a page's header has a number of more than 64 bits")


def _skip(data: bytes, at: int, kind: int, depth: int = 0) -> int:
    """Where a value ends."""
    if depth > 8:
        raise ValueError("a page's header is nested too deep")
    if kind in _BOOLS:  # the type is the value
        return at
    if kind == _BYTE:
        return at + 1
    if kind in _INTS:
        return _varint(data, at)[1]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        size, at = _varint(data, at)
        return at + size
    if kind == _STRUCT:
        last = 0
        while data[at]:
            last, inner, at = _field(data, at, last)
            at = _skip(data, at, inner, depth + 1)
        return at + 1
    raise ValueError(f"a page's header has a field of type {kind}")
