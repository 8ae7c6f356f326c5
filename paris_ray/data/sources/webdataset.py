"""Tars of images in webdataset's convention, as img2dataset writes them; read from beginning to end, nothing is unpacked."""

from __future__ import annotations

import posixpath
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Self

from paris_ray.data.images import EXTENSIONS, RejectError
from paris_ray.data.sources.base import Item, Sample, Unit, content_hash
from paris_ray.data.sources.files import MAX_FILE_BYTES, MAX_TEXT_BYTES, Steady, check_name, files_of, one_line, parse_json
from paris_ray.storage import Folder

READ_BYTES = 8 << 20
"""Read from the store at once."""
MAX_HEADER_BYTES = 8 << 10
"""An extended header (a long name) larger than this is no header: no store has such names, and older Pythons parse one in the square of its size."""

MAX_MEMBERS = 32
"""Members of one sample; what follows under its key is the next one."""

TEXTS = ("txt", "json")

KINDS = {
    tarfile.SYMTYPE: "a symbolic link",
    tarfile.LNKTYPE: "a hard link",
    tarfile.CHRTYPE: "a device",
    tarfile.BLKTYPE: "a device",
    tarfile.FIFOTYPE: "a pipe",
    tarfile.GNUTYPE_SPARSE: "a sparse file",
}
"""Members that are no plain file."""


class _Header(tarfile.TarInfo):
    """A header whose damage is an error, where Python's reader takes it for the end of the tar."""

    @classmethod
    def fromtarfile(cls, tar: tarfile.TarFile) -> Self:
        try:
            return super().fromtarfile(tar)
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            raise  # the end mark
        except tarfile.EmptyHeaderError:  # type: ignore[attr-defined]
            raise tarfile.ReadError("it ends without an end mark") from None
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from None

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        extended = self.type in (
            tarfile.XHDTYPE,
            tarfile.XGLTYPE,
            tarfile.SOLARIS_XHDTYPE,
            tarfile.GNUTYPE_LONGNAME,
            tarfile.GNUTYPE_LONGLINK,
            tarfile.GNUTYPE_SPARSE,
        )
        if self.size < 0 or (extended and self.size > MAX_HEADER_BYTES):
            raise tarfile.ReadError(f"a header claims {self.size} bytes")
        return super()._proc_member(tar)  # type: ignore[misc]


class Webdataset:
    """Tars whose members ``KEY.jpg``, ``KEY.txt`` and ``KEY.json`` follow each other; each tar is one unit.

    The caption is the ``.txt``, else the field ``caption`` of the ``.json``. Other members of a key are not read, and members never become files:
    their names are names only. A member that has no image beside it, or is no plain file, becomes a reject.

    Args:
        uri: local path or URI of a folder with tars, or of one.
        key: field of the ``.json`` that identifies a row.
        score: field of the ``.json`` with the image's score.
    """

    def __init__(self, uri: str, key: str | None = None, score: str | None = None):
        self.uri, self.key, self.score = uri, key, score

    def units(self, rows: int) -> list[Unit]:
        """A unit per tar, in the order of their names; none is opened. Raises ConfigError when there is none."""
        folder, files = files_of(self.uri, ".tar", "a tar or a folder with some")
        return [Unit(number, (folder.uri, name, size), what=name) for number, (name, size) in enumerate(files)]

    def read(self, unit: Unit) -> Iterator[Item]:
        """The samples of one tar. Where it breaks off, the rest is one reject: nothing says how many samples it had."""
        uri, name, _ = unit.where
        file, seen, sample = Steady(Folder(uri), name), dict[str, int](), _Sample("")
        broken: str | None = None
        try:
            with file, tarfile.open(fileobj=file, mode="r|", bufsize=READ_BYTES, tarinfo=_Header) as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                    if member.isdir():
                        continue
                    if (refused := _refused(member)) is not None:
                        yield Item(_unique(f"{name}/{member.name}", seen), reason=refused)
                        continue
                    key, extension = _split(member.name)
                    if key != sample.key or extension in sample.sizes or len(sample.sizes) == MAX_MEMBERS:
                        yield from self._items(sample, name, seen)
                        sample = _Sample(key)
                    if _is_image(extension) and (others := [one for one in sample.sizes if _is_image(one)]):
                        sample.members.pop(others[0], None)  # refused for it: none is held
                    elif member.size <= _limit(extension):
                        content = tar.extractfile(member)
                        assert content is not None
                        sample.members[extension] = content.read()
                    sample.sizes[extension] = member.size
        except RejectError as error:
            broken = str(error)
        except Exception as error:  # of broken content anything
            if file.failure is not None:
                raise file.failure from None
            broken = f"broken tar: {one_line(error)}"
        yield from self._items(sample, name, seen)
        if broken is not None:
            yield Item(f"{name} from {sample.key!r} on", reason=broken)

    def _items(self, sample: _Sample, tar: str, seen: dict[str, int]) -> Iterator[Item]:
        """The item of a sample; none of the empty one before the first."""
        if not sample.sizes:
            return
        source = _unique(f"{tar}/{sample.key}", seen)
        try:
            yield self._item(sample, source)
        except RejectError as error:
            yield Item(source, reason=str(error))

    def _item(self, sample: _Sample, source: str) -> Item:
        kinds = ", ".join(f".{extension}" for extension in sample.sizes)
        images = [extension for extension in sample.sizes if _is_image(extension)]
        if len(images) != 1:
            raise RejectError(f"several images: the key has {kinds}" if images else f"no image: the key has {kinds}")
        for extension, size in sample.sizes.items():
            if size > (limit := _limit(extension)) >= 0:
                raise RejectError(f"file too large: .{extension} has {size} bytes, at most {limit} are read")
        texts = {extension.lower(): content for extension, content in sample.members.items() if extension.lower() in TEXTS}
        if not texts:
            raise RejectError(f"no caption: neither .txt nor .json, the key has {kinds}")
        fields: dict[str, Any] = {}
        if "txt" not in texts or self.key is not None or self.score is not None:
            fields = parse_json(texts.get("json", b"{}"))
        key = fields.get(self.key) if self.key is not None else None
        if self.key is not None and not (isinstance(key, str | int) and not isinstance(key, bool)):
            raise RejectError(f"no key: {self.key!r} in .json is {key!r}, neither a string nor an integer")
        caption = texts["txt"] if "txt" in texts else fields.get("caption")
        score = fields.get(self.score) if self.score is not None else None
        return Item(source, sample.members[images[0]], caption, None if key is None else str(key), score)

    def load(self, item: Item) -> Sample:
        """The sample of an item; all of it was read with the tar."""
        assert isinstance(item.image, bytes)
        return Sample(item.image, item.caption, content_hash(item.image), item.key, None, item.score)


@dataclass(slots=True)
class _Sample:
    """Members of one key: their sizes, and the content of those that are read."""

    key: str
    sizes: dict[str, int] = field(default_factory=dict)
    members: dict[str, bytes] = field(default_factory=dict)


def _split(name: str) -> tuple[str, str]:
    """Key and extension: the name is cut at the first dot after the last slash."""
    folder, base = posixpath.split(name)
    stem, _, extension = base.partition(".")
    return posixpath.join(folder, stem), extension


def _is_image(extension: str) -> bool:
    return f".{extension.lower()}" in EXTENSIONS


def _limit(extension: str) -> int:
    """Bytes up to which a member is read; -1 for those that are not."""
    return MAX_FILE_BYTES if _is_image(extension) else MAX_TEXT_BYTES if extension.lower() in TEXTS else -1


def _refused(member: tarfile.TarInfo) -> str | None:
    kind = "a sparse file" if member.issparse() else KINDS.get(member.type, None if member.isreg() else f"of type {member.type!r}")
    if kind is not None:
        return f"not a file: {kind}"
    try:
        check_name(member.name)
    except RejectError as error:
        return str(error)
    return None


def _unique(name: str, seen: dict[str, int]) -> str:
    """The name, with a number from its second use on."""
    seen[name] = seen.get(name, 0) + 1
    return name if seen[name] == 1 else f"{name}#{seen[name]:03d}"
