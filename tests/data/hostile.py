"""What goes wrong with pictures and captions, for every form of a source: what each kind is, and what must become of it."""

from __future__ import annotations

import json
import os
import pickle
import struct
import tarfile
import zlib

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from .corpora import member, tar_bytes, write_arrow, write_state
from .test_images import bomb, chunk, encoded, exif, jpeg_of_scans, tiff

MAX_PIXELS, MAX_CAPTION = 1_000_000, 200
RIGHT = None
"""In place of a reason: the row is used."""


class Payload:
    """Unpickled, it writes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return open, (str(self.marker), "w")


def noise(seed, size=(60, 44)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def png_with(name, body):
    """A whole PNG with one chunk more after its header."""
    data = encoded(noise(90), "PNG")
    return data[:33] + chunk(name, body) + data[33:]


def images(marker):
    """Name → content and what becomes of it."""
    good, photo = encoded(noise(1), "PNG"), encoded(noise(2), "JPEG")
    frames = [noise(10 + i) for i in range(3)]
    floats = Image.fromarray(np.full((30, 30), 0.5, np.float32))
    deep = Image.fromarray(np.random.default_rng(5).integers(0, 65536, (30, 30), dtype=np.uint16))
    rgba = noise(6).convert("RGBA")
    rgba.putalpha(noise(7).convert("L"))
    gif = bytearray(encoded(noise(8), "GIF"))
    gif[6:10] = struct.pack("<HH", 65535, 65535)
    webp = bytearray(encoded(noise(9), "WEBP", lossless=True, exif=exif(1)))
    webp[24:30] = (16382).to_bytes(3, "little") * 2
    bmp = bytearray(encoded(noise(9), "BMP"))
    bmp[18:26] = struct.pack("<ii", 60000, 60000)
    torn = bytearray(encoded(noise(3), "PNG"))
    torn[len(torn) // 2] ^= 0xFF
    return {
        "good.png": (good, RIGHT),
        "wrong_extension.jpg": (encoded(noise(4), "PNG"), RIGHT),
        "cmyk.jpg": (encoded(noise(20).convert("CMYK"), "JPEG"), RIGHT),
        "sixteen_bits.png": (encoded(deep, "PNG"), RIGHT),
        "animated.gif": (encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]), RIGHT),
        "rotated.jpg": (encoded(noise(21), "JPEG", exif=exif(6)), RIGHT),
        "transparent.webp": (encoded(rgba, "WEBP", lossless=True), RIGHT),
        "one_pixel.png": (encoded(noise(22, (1, 1)), "PNG"), RIGHT),
        "long_strip.png": (encoded(noise(23, (900, 3)), "PNG"), RIGHT),
        "damaged_exif.jpg": (encoded(noise(24), "JPEG", exif=b"Exif\0\0II*\0" + b"\xff" * 40), RIGHT),
        "zero.png": (b"", "empty file"),
        "text.png": (b"I am a text", "not an image"),
        "page.jpg": (b"<html><body>404</body></html>", "not an image"),
        "drawing.png": (b"<svg xmlns='http://www.w3.org/2000/svg'><script>1</script></svg>", "not an image"),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n(rm) run\n", "not an image"),
        "pickle.png": (pickle.dumps(Payload(marker)), "not an image"),
        "archive.png": (b"PK\x03\x04" + bytes(60), "not an image"),
        "truncated_png.png": (encoded(noise(30, (300, 300)), "PNG")[:5000], "broken image"),
        "truncated_jpeg.jpg": (encoded(noise(31, (300, 300)), "JPEG")[:5000], "broken image"),
        "torn.png": (bytes(torn), "broken image"),
        "header_only.png": (bomb(100, 100), "broken image"),
        "bomb_png.png": (bomb(30_000, 30_000), "too many pixels"),
        "bomb_gif.gif": (bytes(gif), "too many pixels"),
        "bomb_webp.webp": (bytes(webp), "too many pixels"),
        "bomb_bmp.bmp": (bytes(bmp), "too many pixels"),
        "large.jpg": (encoded(noise(32, (1200, 1000)), "JPEG"), "too many pixels"),
        "text_bomb.png": (png_with(b"zTXt", b"c\0\0" + zlib.compress(bytes(100 << 20), 9)), "broken image"),
        "scans.jpg": (jpeg_of_scans(400), "broken image"),
        "tile.tiff": (tiff([(322, 2048), (323, 2048), (324, "at"), (325, "length")], zlib.compress(bytes(2048 * 2048 * 3))), "too many pixels"),
        "float.tiff": (encoded(floats, "TIFF"), "unknown range"),
        "photo.jpg": (photo, RIGHT),
    }


CAPTIONS = {
    "unicode": ("naïve 写真 😀 e\u0301", RIGHT),
    "spaces": (" \t a caption \n", RIGHT),
    "nul": ("a\0b", RIGHT),
    "empty": ("", "empty caption"),
    "blank": (" \n\t ", "empty caption"),
    "long": ("long " * 50, "caption too long"),
    "latin1": (b"caf\xe9", "undecodable caption"),
}
"""Name → caption and what becomes of it, where captions are files."""

FIELDS = {
    **{name: pair for name, pair in CAPTIONS.items() if name != "latin1"},
    "null": (None, "no caption"),
    "number": (5, "caption is not text"),
    "list": (["a"], "caption is not text"),
    "fields": ({"a": "b"}, "caption is not text"),
    "surrogate": ("\ud800", "undecodable caption"),
}
"""The same where captions are values of JSON."""


def samples(marker):
    """Key, extension, content, caption and what becomes of it: all images, all captions of files, and enough good rows to fit a codec on."""
    found = [(*name.split("."), content, f"the {name}", reason) for name, (content, reason) in images(marker).items()]
    found += [(f"caption_{name}", "png", encoded(noise(200 + i), "PNG"), *pair) for i, (name, pair) in enumerate(CAPTIONS.items())]
    return found + [(f"filler_{i:02d}", "png", encoded(noise(300 + i), "PNG"), f"filler {i}", RIGHT) for i in range(16)]


def to_bytes(caption):
    return caption if isinstance(caption, bytes) else caption.encode()


def write_folder(path, marker):
    """Returns what must become of each row, by its source name."""
    path.mkdir()
    wanted = {}
    for key, extension, content, caption, reason in samples(marker):
        (path / f"{key}.{extension}").write_bytes(content)
        (path / f"{key}.txt").write_bytes(to_bytes(caption))
        wanted[f"{key}.{extension}"] = reason
    for i, (name, (caption, reason)) in enumerate(FIELDS.items()):
        (path / f"json_{name}.png").write_bytes(encoded(noise(400 + i), "PNG"))
        (path / f"json_{name}.json").write_text(json.dumps({"caption": caption}))
        wanted[f"json_{name}.png"] = reason
    (path / "json_broken.png").write_bytes(encoded(noise(420), "PNG"))
    (path / "json_broken.json").write_text("[" * 100_000)
    (path / "no_caption.png").write_bytes(encoded(noise(421), "PNG"))
    for name in ("orphan.txt", "notes.md", "vector.svg", "weights.pkl"):
        (path / name).write_bytes(pickle.dumps(Payload(marker)))
    for name in ("写真 ünï.png", "b\udcff.png"):  # the second is no UTF-8
        (path / name).write_bytes(encoded(noise(422 + len(name)), "PNG"))
        (path / name).with_suffix(".txt").write_text(f"unicode {len(name)}")
    outside = path.parent / "outside"
    outside.mkdir()
    (outside / "secret.txt").write_text("a password")
    (outside / "private.png").write_bytes(encoded(noise(424), "PNG"))
    links = {"link_out.png": "photo.jpg", "link_out.txt": outside / "secret.txt", "link_nowhere.png": "gone", "link_in.png": "good.png"}
    links |= {"image_out.png": outside / "private.png", "folder_out": outside}
    for name, target in links.items():
        (path / name).symlink_to(target)
    (path / "link_nowhere.txt").write_text("x")
    (path / "image_out.txt").write_text("x")
    (outside / "private.txt").write_text("x")
    (path / "link_in.txt").write_text("by a link")
    return wanted | {
        "json_broken.png": "broken .json",
        "no_caption.png": "no caption",
        "orphan.txt": "caption without image",
        "notes.md": "neither image nor caption",
        "vector.svg": "neither image nor caption",
        "weights.pkl": "neither image nor caption",
        "写真 ünï.png": RIGHT,
        "b?.png": RIGHT,
        "link_out.png": "file outside the folder",
        "image_out.png": "file outside the folder",
        "folder_out/private.png": "file outside the folder",
        "folder_out/secret.txt": "caption without image",
        "link_nowhere.png": "unreadable file",
        "link_in.png": RIGHT,
    }


def write_links(path, ending, content):
    """Links to a whole file: out of the folder, from one folder of it to another, nowhere, and to a pipe, which would wait for ever."""
    outside = path.parent / "outside"
    outside.mkdir()
    (outside / f"private.{ending}").write_bytes(content)
    (path / "sub").mkdir()
    os.mkfifo(path / "pipe")
    for name, target in {"link_out": outside / f"private.{ending}", "link_nowhere": "gone", "link_pipe": "pipe"}.items():
        (path / f"{name}.{ending}").symlink_to(target)
    (path / f"sub/link_in.{ending}").symlink_to(f"../whole.{ending}")
    (path / "folder_out").symlink_to(outside)


LINKS = {
    "link_out": "file outside the folder",
    "folder_out/private": "file outside the folder",
    "link_nowhere": "unreadable file",
    "link_pipe": "unreadable file",
}
"""Without its extension: what becomes of each, where one that leads to another file of the folder is as good as that."""


def pickled_type(marker):
    """A column whose type's metadata, and whose values, run code when they are unpickled."""
    evil = pickle.dumps(Payload(marker))
    metadata = {"ARROW:extension:name": "ray.data.arrow_pickled_object", "ARROW:extension:metadata": evil}
    return pa.field("extra", pa.large_binary(), metadata=metadata), evil


def as_table(rows, marker):
    """Rows as a table of images and captions, with a column more that must be left alone."""
    field, evil = pickled_type(marker)
    raw = pa.array([None if row[3] is None else to_bytes(row[3]) for row in rows], pa.binary())
    captions = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())  # one is no UTF-8
    content = pa.array([row[2] for row in rows], pa.binary())
    schema = pa.schema([("image", pa.binary()), ("caption", pa.string()), field])
    return pa.Table.from_arrays([content, captions, pa.array([evil] * len(rows), pa.large_binary())], schema=schema)


def one_row(marker):
    return as_table([("whole", "png", encoded(noise(530), "PNG"), "whole", RIGHT)], marker)


def table_rows(marker):
    null = [("null_caption", "png", encoded(noise(500), "PNG"), None, "no caption"), ("null_image", "png", None, "no image", "no image")]
    return samples(marker) + null


def write_parquet(path, marker):
    path.mkdir()
    rows = table_rows(marker)
    pq.write_table(as_table(rows, marker), path / "a.parquet", row_group_size=7)
    wanted = {f"a.parquet row {i}": row[4] for i, row in enumerate(rows)}
    few = as_table([(f"k{i}", "png", encoded(noise(510 + i), "PNG"), f"few {i}", RIGHT) for i in range(9)], marker)
    pq.write_table(few.rename_columns(["picture", "caption", "extra"]), path / "wrong_columns.parquet")
    numbers = pa.table({"image": few["image"], "caption": range(9)})
    pq.write_table(numbers, path / "wrong_types.parquet")
    for name in ("wrong_columns", "wrong_types"):
        wanted |= {f"{name}.parquet row {i}": "wrong columns" for i in range(9)}
    # The images of the second of three row groups are overwritten.
    pq.write_table(few.select(["image", "caption"]), path / "torn.parquet", row_group_size=3, compression="zstd", use_dictionary=False)
    column = pq.read_metadata(path / "torn.parquet").row_group(1).column(0)
    torn = bytearray((path / "torn.parquet").read_bytes())
    torn[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = b"\xa5" * column.total_compressed_size
    (path / "torn.parquet").write_bytes(torn)
    wanted |= {f"torn.parquet row {i}": "broken row group" if 3 <= i < 6 else RIGHT for i in range(9)}
    whole = (path / "torn.parquet").read_bytes()
    (path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (path / "zero.parquet").write_bytes(b"")
    (path / "text.parquet").write_text("I am a text")
    (path / "pickle.parquet").write_bytes(pickle.dumps(Payload(marker)))
    pq.write_table(few.slice(0, 0), path / "no_rows.parquet")
    pq.write_table(one_row(marker), path / "whole.parquet")
    write_links(path, "parquet", (path / "whole.parquet").read_bytes())
    wanted |= {"sub/link_in.parquet row 0": RIGHT, "whole.parquet row 0": "duplicate"}
    wanted |= {f"{name}.parquet row 0": reason for name, reason in LINKS.items()}
    return wanted | {f"{name}.parquet row 0": "broken Parquet file" for name in ("cut", "zero", "text", "pickle")}


def write_hf_dataset(path, marker):
    path.mkdir()
    rows = table_rows(marker)
    write_arrow(path / "a.arrow", as_table(rows, marker), batch=5)
    wanted = {f"a.arrow row {i}": row[4] for i, row in enumerate(rows)}
    few = as_table([(f"k{i}", "png", encoded(noise(510 + i), "PNG"), f"few {i}", RIGHT) for i in range(9)], marker)
    write_arrow(path / "wrong_columns.arrow", few.rename_columns(["picture", "caption", "extra"]))
    wanted |= {f"wrong_columns.arrow row {i}": "wrong columns" for i in range(9)}
    write_arrow(path / "cut.arrow", few, batch=3)
    whole = (path / "cut.arrow").read_bytes()
    (path / "cut.arrow").write_bytes(whole[: len(whole) // 2])  # in the second batch
    wanted |= {f"cut.arrow row {i}": RIGHT for i in range(3)} | {"cut.arrow from row 3": "broken Arrow file"}
    # Offsets of captions that lead out of their buffer: read unchecked, they would read other memory.
    write_arrow(path / "offsets.arrow", pa.table({"image": few["image"].slice(0, 2), "caption": ["hello", "x"]}))
    offsets = (path / "offsets.arrow").read_bytes()
    assert offsets.count(struct.pack("<iii", 0, 5, 6)) == 1
    (path / "offsets.arrow").write_bytes(offsets.replace(struct.pack("<iii", 0, 5, 6), struct.pack("<iii", 0, 5, 1 << 30)))
    for name in ("zero", "text", "pickle"):
        (path / f"{name}.arrow").write_bytes({"zero": b"", "text": b"I am a text", "pickle": pickle.dumps(Payload(marker))}[name])
    write_arrow(path / "whole.arrow", one_row(marker))
    write_links(path, "arrow", (path / "whole.arrow").read_bytes())
    wanted |= {"sub/link_in.arrow row 0": RIGHT, "whole.arrow row 0": "duplicate"}
    links = ("link_out", "folder_out/private")  # a file that is not there says that the copy is not whole
    wanted |= {f"{name}.arrow from row 0": LINKS[name] for name in links}
    names = ["zero", "a", "wrong_columns", "cut", "offsets", "text", "pickle", "sub/link_in", "whole", *links]
    write_state(path, [f"{name}.arrow" for name in names])
    return wanted | {f"{name}.arrow from row 0": "broken Arrow file" for name in ("zero", "offsets", "text", "pickle")}


def write_webdataset(path, marker):
    path.mkdir()
    members, wanted = [], {}
    for key, extension, content, caption, reason in samples(marker):
        members += [member(f"{key}.{extension}", content), member(f"{key}.txt", to_bytes(caption))]
        wanted[f"a.tar/{key}"] = reason
    for i, (name, (caption, reason)) in enumerate(FIELDS.items()):
        fields = json.dumps({"caption": caption}).encode()
        members += [member(f"json_{name}.png", encoded(noise(400 + i), "PNG")), member(f"json_{name}.json", fields)]
        wanted[f"a.tar/json_{name}"] = reason
    evil = pickle.dumps(Payload(marker))
    some = [encoded(noise(430 + i), "PNG") for i in range(12)]
    members += [
        member("beside.png", some[0]), member("beside.txt", b"a pickle is beside it"), member("beside.pkl", evil),
        member("alone.pkl", evil), member("alone2.pyd", evil),
        member("no_caption.png", some[1]),
        member("../up.png", some[2]), member("../up.txt", b"x"), member("a/../../up.png", some[2]),
        member("/etc/abs.png", some[3]), member("/etc/abs.txt", b"x"),
        member("soft.png", kind=tarfile.SYMTYPE, linkname="/etc/passwd"), member("soft.txt", b"x"),
        member("hard.png", kind=tarfile.LNKTYPE, linkname="good.png"),
        member("null.png", kind=tarfile.CHRTYPE, devmajor=1, devminor=3), member("disk.png", kind=tarfile.BLKTYPE),
        member("pipe.png", kind=tarfile.FIFOTYPE), member("pipe:touch.png", some[4]), member("pipe:touch.txt", b"a name like a command"),
        member("folder", kind=tarfile.DIRTYPE), member("folder/inside.png", some[5]), member("folder/inside.txt", b"in a folder"),
        member("nested.tar", tar_bytes([member("n.png", some[6]), member("n.txt", b"x")])),
        member("写真.png", some[7]), member("写真.txt", b"unicode"), member("b\udcff.png", some[8]), member("b\udcff.txt", b"not utf-8"),
        member("twice.png", some[9]), member("twice.txt", b"first"), member("twice.png", some[10]), member("twice.txt", b"second"),
    ]  # fmt: skip
    wanted |= {
        "a.tar/beside": RIGHT, "a.tar/alone": "no image", "a.tar/alone2": "no image", "a.tar/no_caption": "no caption",
        "a.tar/../up.png": "file outside the folder", "a.tar/../up.txt": "file outside the folder",
        "a.tar/a/../../up.png": "file outside the folder", "a.tar//etc/abs.png": "file outside the folder",
        "a.tar//etc/abs.txt": "file outside the folder",
        "a.tar/soft.png": "not a file", "a.tar/soft": "no image", "a.tar/hard.png": "not a file", "a.tar/null.png": "not a file",
        "a.tar/disk.png": "not a file", "a.tar/pipe.png": "not a file", "a.tar/pipe:touch": RIGHT, "a.tar/folder/inside": RIGHT,
        "a.tar/nested": "no image", "a.tar/写真": RIGHT, "a.tar/b?": RIGHT, "a.tar/twice": RIGHT, "a.tar/twice#002": RIGHT,
    }  # fmt: skip
    (path / "a.tar").write_bytes(tar_bytes(members, format=tarfile.GNU_FORMAT))
    wholes = []
    for n in range(3):
        few = [(member(f"{i}.txt", b"few"), member(f"{i}.png", encoded(noise(520 + 3 * n + i), "PNG"))) for i in range(3)]
        wholes.append(tar_bytes([one for pair in few for one in pair]))
    (path / "cut.tar").write_bytes(wholes[0][: wholes[0].index(b"1.png") + 3000])
    header = wholes[1].index(b"1.txt")
    (path / "torn.tar").write_bytes(wholes[1][: header + 20] + b"\xa5" * 400 + wholes[1][header + 420 :])
    (path / "no_end.tar").write_bytes(wholes[2][: wholes[2].index(b"2.txt")])
    wanted |= {"cut.tar/0": RIGHT, "cut.tar/1": "no image", "cut.tar from '1' on": "broken tar"}
    wanted |= {"torn.tar/0": RIGHT, "torn.tar from '0' on": "broken tar"}
    wanted |= {"no_end.tar/0": RIGHT, "no_end.tar/1": RIGHT, "no_end.tar from '1' on": "broken tar"}
    huge = bytearray(tar_bytes([member("x" * 200, b"y")], format=tarfile.PAX_FORMAT))
    huge[124:136] = b"77777777777\0"  # the long name's size: 8 GiB
    huge[148:156] = b"%06o\0 " % (sum(huge[:148]) + 8 * 32 + sum(huge[156:512]))
    (path / "huge_header.tar").write_bytes(huge)
    (path / "zero.tar").write_bytes(b"")
    (path / "text.tar").write_text("I am a text")
    (path / "pickle.tar").write_bytes(evil)
    (path / "whole.tar").write_bytes(tar_bytes([member("0.png", encoded(noise(530), "PNG")), member("0.txt", b"whole")]))
    write_links(path, "tar", (path / "whole.tar").read_bytes())
    wanted |= {"sub/link_in.tar/0": RIGHT, "whole.tar/0": "duplicate"} | {f"{name}.tar from '' on": reason for name, reason in LINKS.items()}
    return wanted | {f"{name}.tar from '' on": "broken tar" for name in ("huge_header", "zero", "text", "pickle")}


IDENTITIES = {
    "good": ("k", 6, RIGHT),
    "unicode": ("写真 😀", 6.5, RIGHT),
    "number": (2**63 - 1, 6, RIGHT),
    "low": ("l", 5, "low score"),
    "null_key": (None, 6, "no key"),
    "half_a_character": ("\ud800", 6, "no key"),
    "list": ([1], 6, "no key"),
    "null_score": ("n", None, "no score"),
    "nan": ("o", float("nan"), "no score"),
    "huge": ("h", 10**400, "no score"),
    "huge_negative": ("i", -(10**400), "no score"),
    "text_score": ("t", "6" * 10_000, "no score"),
    "infinite": ("f", float("inf"), RIGHT),
}
"""Name → key and score of JSON, and what becomes of the row where keys are asked for and scores of at least 6."""


def write_identities(path, kind):
    """Rows with keys and scores, in the forms of a source in which they can occur. Returns what must become of each row, by its source name."""
    path.mkdir()
    content = {name: encoded(noise(600 + i), "PNG") for i, name in enumerate(IDENTITIES)}
    fields = {name: json.dumps({"file": f"{name}.png", "caption": name, "id": key, "score": score}) for name, (key, score, _) in IDENTITIES.items()}
    reason = {name: reason for name, (*_, reason) in IDENTITIES.items()}
    if kind == "webdataset":
        pairs = [(member(f"{name}.png", content[name]), member(f"{name}.json", fields[name].encode())) for name in IDENTITIES]
        (path / "a.tar").write_bytes(tar_bytes([one for pair in pairs for one in pair]))
        return {f"a.tar/{name}": what for name, what in reason.items()}
    if kind in ("folder", "table"):  # which have no keys
        for name in IDENTITIES:
            (path / f"{name}.png").write_bytes(content[name])
            if kind == "folder":
                (path / f"{name}.json").write_text(fields[name])
        if kind == "table":
            (path / "captions.jsonl").write_text("\n".join(fields.values()))
        return {f"{name}.png": RIGHT if what == "no key" else what for name, what in reason.items()}
    # A column has one type: keys are strings, one of them no UTF-8, and scores are numbers.
    typed = {name: row for name, row in IDENTITIES.items() if name in ("good", "unicode", "low", "null_key", "null_score", "nan", "infinite")}
    raw = pa.array([*(None if key is None else key.encode() for key, *_ in typed.values()), b"\xff"], pa.binary())
    keys = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers(), raw.null_count)
    images, captions = [*(content[name] for name in typed), encoded(noise(650), "PNG")], [*typed, "no UTF-8"]
    scores = pa.array([*(score for _, score, _ in typed.values()), 6], pa.float64(), from_pandas=False)
    table = pa.table({"image": images, "caption": captions, "id": keys, "score": scores})
    if kind == "parquet":
        pq.write_table(table, path / "a.parquet")
    else:
        write_arrow(path / "a.arrow", table)
        write_state(path, ["a.arrow"])
    ending = "parquet" if kind == "parquet" else "arrow"
    return {f"a.{ending} row {i}": what for i, what in enumerate([*(reason[name] for name in typed), RIGHT])}


WRITERS = {"folder": write_folder, "parquet": write_parquet, "webdataset": write_webdataset, "hf_dataset": write_hf_dataset}
