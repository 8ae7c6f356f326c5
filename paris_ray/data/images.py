"""From untrusted bytes to a square RGB picture."""

from __future__ import annotations

import contextlib
import io
import re
import struct
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Decoders that may run. Others (EPS starts Ghostscript) may not, whatever a file's name says."""

EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff"})

PIXEL_BYTES = 17
"""Memory of a picture that is being decoded, for each of its pixels, at most: of a WebP, whose decoder holds two canvases beside what it returns.
Other formats take four to nine."""

BAND = 64
"""Lines that are made RGB at once."""

MAX_SCANS = 64
"""Passes over a JPEG's blocks. Ten are usual; a file of 1 MB can ask for 30,000, each as long as the picture takes."""

_MARKER = re.compile(rb"\xff+([\x01-\xcf\xd8-\xfe])")
"""What ends a JPEG's samples: no stuffed zero, and no restart."""
_START_OF_SCAN, _END_OF_IMAGE, _ALONE = 0xDA, 0xD9, (0x01, 0xD8)
_TILE = (322, 323)
"""Tags of a TIFF: a tile's width and length."""

# A header that claims more than the limit is an error before anything is decoded, not a line in a log.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)


class RejectError(ValueError):
    """A row that cannot be used; the message is its reason, ``kind: detail``."""


def open_image(data: bytes, max_pixels: int) -> Image.Image:
    """Read an image's header; nothing is decoded yet.

    Raises:
        RejectError: empty, not one of :data:`FORMATS`, more than ``max_pixels`` pixels, or more work than its pixels are.
    """
    if not data:
        raise RejectError("empty file: it has no bytes")
    Image.MAX_IMAGE_PIXELS = max_pixels
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        tile = _tile(data, image) if image.format == "TIFF" else 0
    except (Image.DecompressionBombWarning, Image.DecompressionBombError):
        raise RejectError(f"too many pixels: more than twice the limit of {max_pixels} (data.max_pixels)") from None
    except UnidentifiedImageError:
        raise RejectError(f"not an image: the content is none of {', '.join(FORMATS)}") from None
    except Exception as error:  # decoders of broken headers raise anything: SyntaxError, struct.error, ValueError …
        raise RejectError(f"broken image: {type(error).__name__}: {error}") from None
    if image.width * image.height > max_pixels:
        raise RejectError(f"too many pixels: {image.width} × {image.height}, the limit is {max_pixels} (data.max_pixels)")
    if tile > max_pixels:
        raise RejectError(f"too many pixels: a tile of the TIFF has {tile} samples, the limit is {max_pixels} (data.max_pixels)")
    if data.startswith(b"\xff\xd8") and scans(data) > MAX_SCANS:
        raise RejectError(f"broken image: the JPEG has more than {MAX_SCANS} scans")
    return image


def scans(data: bytes) -> int:
    """How often a JPEG's decoder goes over its blocks; counted up to one more than :data:`MAX_SCANS`."""
    at, found = 2, 0
    while found <= MAX_SCANS and (marker := _MARKER.search(data, at)) is not None:
        kind, at = marker[1][0], marker.end()
        if kind == _END_OF_IMAGE:
            break
        if kind not in _ALONE:
            found += kind == _START_OF_SCAN
            at += int.from_bytes(data[at : at + 2], "big")
    return found


def _tile(data: bytes, image: Any) -> int:
    """Samples of a TIFF's tile, which is unpacked whole, however small the picture is; 0 without tiles. Raises ValueError for two answers."""
    order = "<" if data[:2] == b"II" else ">"
    (first,), count, entry = (
        (struct.unpack_from(f"{order}Q", data, 8), "Q", 20) if 43 in data[2:4] else (struct.unpack_from(f"{order}I", data, 4), "H", 12)
    )
    (tags,) = struct.unpack_from(order + count, data, first)
    start = first + struct.calcsize(count)
    found = [struct.unpack_from(f"{order}H", data, start + entry * i)[0] for i in range(tags)]
    if max(map(found.count, _TILE)) > 1:
        raise ValueError("its tiles have several sizes")  # Pillow takes the last, and libtiff the first
    width, length = (image.tag_v2.get(tag, 0) for tag in _TILE)
    return int(width * length * len(image.getbands()))


def _orient(image: Image.Image) -> None:
    with contextlib.suppress(Exception):  # a damaged EXIF block says nothing about orientation; the pixels are whole
        ImageOps.exif_transpose(image, in_place=True)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any mode to 8-bit RGB: 16-bit grey is scaled, transparency is laid on white. A picture that is that already is not copied.

    Raises:
        RejectError: samples whose range nobody knows (floats, 32-bit integers).
    """
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    out = Image.new("RGB", image.size)
    for top in range(0, image.height, BAND):  # whole, what is between would take several times the picture
        out.paste(_flat(image.crop((0, top, image.width, min(top + BAND, image.height)))), (0, top))
    return out


def _flat(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode == "I":
        samples: NDArray[Any] = np.asarray(image)
        if samples.min(initial=0) < 0 or samples.max(initial=0) > 65535:
            raise RejectError("unknown range: 32-bit samples beyond 0…65535")
        image = Image.fromarray(((samples.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise RejectError("unknown range: floating-point samples")
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        # RGBa and La are premultiplied and convert only to their plain forms.
        image = image.convert({"La": "LA", "RGBa": "RGBA"}.get(image.mode, image.mode)).convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def square(image: Image.Image, side: int) -> NDArray[np.uint8]:
    """Centre crop to a square, resize with an antialiasing filter: → (side, side, 3) uint8."""
    short = min(image.size)
    left, top = (image.width - short) / 2, (image.height - short) / 2
    box = (left, top, left + short, top + short)
    return np.asarray(image.resize((side, side), Image.Resampling.LANCZOS, box=box, reducing_gap=3.0))


def load_square(
    data: bytes | Image.Image, side: int, max_pixels: int, check: Callable[[int, int], None] | None = None
) -> tuple[NDArray[np.uint8], int, int]:
    """Decode, orient, flatten to RGB, crop and resize. Colour profiles are ignored, as everywhere in this field: samples are taken for sRGB.

    Args:
        data: a file's content, or a picture that a source has drawn itself.
        side: side of the result in pixels.
        max_pixels: refuse a header that claims more.
        check: told width and height before anything is decoded, raises RejectError for a picture that is not wanted.

    Returns:
        the picture (side, side, 3) uint8, and width and height before cropping. Of an animation the first frame.

    Raises:
        RejectError: with the reason.
    """
    if isinstance(data, Image.Image):
        return square(to_rgb(data), side), data.width, data.height
    image = open_image(data, max_pixels)
    width, height = image.size
    if check is not None:
        check(width, height)
    try:
        # JPEG can be decoded at 1/2, 1/4 or 1/8; twice the wanted side leaves the filter enough to work with.
        image.draft(image.mode, (2 * side, 2 * side))
        image.load()
        stored = image.size
        _orient(image)
        if image.size != stored:
            width, height = height, width
        return square(to_rgb(image), side), width, height
    except RejectError:
        raise
    except Exception as error:  # as above: a hostile file may make a decoder raise anything, and costs only its own row
        raise RejectError(f"broken image: {type(error).__name__}: {error}") from None
