"""What the next rows of an Arrow stream would take unpacked, from their headers: pyarrow unpacks what it reads, however large it says it is."""

from __future__ import annotations

import io
import struct

from paris_ray.data.sources.files import Steady

_DICTIONARY, _RECORDS = 2, 3  # kinds of messages (Arrow's Message.fbs)


def sizes(file: Steady) -> tuple[int, int]:
    """Bytes of the next record batch, with the dictionaries before it, as stored and unpacked; 0 at the end. The file stays where it is.

    Raises:
        struct.error, ValueError: this is no message.
    """
    begin = at = file.tell()
    stored = unpacked = 0
    while True:
        length, at = _int(_at(file, at, 4)), at + 4
        if length == -1:  # as every version since 0.15 begins a message
            length, at = _int(_at(file, at, 4)), at + 4
        header, body = _at(file, at, max(length, 0)), at + length
        if not header:
            break
        message = struct.unpack_from("<I", header)[0]
        kind = header[place] if (place := _field(header, message, 1)) else 0
        size = struct.unpack_from("<q", header, place)[0] if (place := _field(header, message, 3)) else 0
        if size < 0:
            raise ValueError(f"a message claims {size} bytes")
        if kind in (_DICTIONARY, _RECORDS):
            table = _table(header, message, 2)
            batch = _table(header, table, 1) if kind == _DICTIONARY else table
            stored, unpacked = stored + size, unpacked + _unpacked(file, header, batch, body, size)
        if kind == _RECORDS:
            break
        at = body + size
    file.seek(begin)
    return stored, unpacked


def _unpacked(file: Steady, header: bytes, batch: int, body: int, size: int) -> int:
    if not _field(header, batch, 3):  # not compressed
        return size
    total, buffers = 0, _table(header, batch, 2)
    for i in range(struct.unpack_from("<I", header, buffers)[0]):
        offset, length = struct.unpack_from("<qq", header, buffers + 4 + 16 * i)
        if length >= 8:  # each begins with its size, or with -1 if it is as it was
            own = struct.unpack("<q", _at(file, body + offset, 8))[0]
            total += length if own == -1 else max(own, 0)
    return total


def _at(file: Steady, place: int, count: int) -> bytes:
    file.seek(place, io.SEEK_SET)
    return file.read(count)


def _int(data: bytes) -> int:
    return int.from_bytes(data, "little", signed=True)


def _field(header: bytes, table: int, number: int) -> int:
    """Where a field of a FlatBuffers table is; 0 if it has none."""
    vtable = table - struct.unpack_from("<i", header, table)[0]
    entry = 4 + 2 * number
    offset = struct.unpack_from("<H", header, vtable + entry)[0] if entry < struct.unpack_from("<H", header, vtable)[0] else 0
    return table + offset if offset else 0


def _table(header: bytes, table: int, number: int) -> int:
    """Where the table or vector is that a field refers to."""
    place = _field(header, table, number)
    return place + int(struct.unpack_from("<I", header, place)[0])
