import io
import struct
import subprocess
import sys
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from paris_ray.data import images
from paris_ray.data.images import RejectError, load_square, to_rgb

LIMIT = 1_000_000


def encoded(image, kind, **options):
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def tiff(tags, samples):
    """A deflated RGB TIFF of 64 × 64; of each tag number, type 4 and value. ``"at"`` and ``"length"`` are those of the samples."""
    needed = [(256, 64), (257, 64), (259, 8), (262, 2), (277, 3), (284, 1), *tags]
    bits = 14 + 12 * (len(needed) + 1)
    place = {"at": bits + 6, "length": len(samples)}
    entries = [(tag, struct.pack("<HHII", tag, 4, 1, place.get(value, value))) for tag, value in needed]
    entries = sorted([*entries, (258, struct.pack("<HHII", 258, 3, 3, bits))], key=lambda entry: entry[0])
    head = struct.pack("<2sHIH", b"II", 42, 8, len(entries))
    return head + b"".join(entry for _, entry in entries) + bytes(4) + struct.pack("<HHH", 8, 8, 8) + samples


def jpeg_of_scans(repeats, size=(64, 64)):
    """A progressive JPEG whose last scan is there so many times more."""
    data = encoded(gradient(*size), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (1 + repeats) + data[-2:]


def exif(orientation):
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def gradient(width=40, height=40):
    x = np.linspace(0, 255, width, dtype=np.float64)[None].repeat(height, 0)
    y = np.linspace(0, 255, height, dtype=np.float64)[:, None].repeat(width, 1)
    return Image.fromarray(np.stack([x, y, 255 - x], -1).astype(np.uint8))


@pytest.mark.parametrize(("kind", "options"), [("PNG", {}), ("BMP", {}), ("TIFF", {}), ("WEBP", {"lossless": True})])
def test_lossless_formats_give_the_pixels(kind, options):
    pixels, width, height = load_square(encoded(gradient(), kind, **options), 40, LIMIT)
    assert (pixels == np.asarray(gradient())).all()
    assert (width, height) == (40, 40)


def test_jpeg_is_near_and_reduced_decoding_changes_little():
    big = gradient(640, 640)
    pixels, width, _ = load_square(encoded(big, "JPEG", quality=95), 40, LIMIT)
    assert width == 640
    assert np.abs(pixels.astype(int) - np.asarray(big.resize((40, 40), Image.Resampling.LANCZOS)).astype(int)).mean() < 2


@pytest.mark.parametrize("size", [(60, 20), (20, 60)])
def test_the_centre_is_kept(size):
    image = Image.new("RGB", size, "red")
    image.paste("blue", ((size[0] - 20) // 2, (size[1] - 20) // 2, (size[0] + 20) // 2, (size[1] + 20) // 2))
    pixels, *both = load_square(encoded(image, "PNG"), 20, LIMIT)
    assert (pixels == (0, 0, 255)).all()
    assert tuple(both) == size


def test_downscaling_is_antialiased():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    pixels, *_ = load_square(encoded(Image.fromarray(stripes), "PNG"), 8, LIMIT)
    assert np.abs(pixels.astype(int) - 127).max() < 12  # nearest neighbour would give 0 or 255


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation):
    upright = gradient(30, 20)
    # The stored picture is the upright one under the inverse of what the tag asks for.
    inverse = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(inverse[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    pixels, width, height = load_square(encoded(stored, "PNG", exif=exif), 20, LIMIT)
    assert (width, height) == (30, 20)
    assert (pixels == np.asarray(upright)[:, 5:25]).all()


def test_damaged_exif_costs_nothing():
    data = encoded(gradient(), "JPEG", exif=b"Exif\x00\x00II*\x00" + b"\xff" * 40)
    assert load_square(data, 40, LIMIT)[0].shape == (40, 40, 3)


def test_transparency_is_laid_on_white():
    rgba = Image.new("RGBA", (10, 10), (255, 0, 0, 0))
    rgba.paste((0, 0, 255, 128), (0, 0, 5, 10))
    for image in (rgba, rgba.convert("LA")):
        pixels, *_ = load_square(encoded(image, "PNG"), 10, LIMIT)
        assert (pixels[:, 5:] == 255).all()
    pixels, *_ = load_square(encoded(rgba, "PNG"), 10, LIMIT)
    assert np.abs(pixels[0, 0].astype(int) - (127, 127, 255)).max() <= 1
    palette = Image.new("P", (10, 10), 1)
    palette.putpalette([0, 255, 0, 255, 0, 0])
    palette.paste(0, (0, 0, 5, 10))
    pixels, *_ = load_square(encoded(palette, "PNG", transparency=1), 10, LIMIT)
    assert (pixels[:, :5] == (0, 255, 0)).all()
    assert (pixels[:, 5:] == 255).all()


def test_sixteen_bits_are_scaled_not_cut():
    deep = np.linspace(0, 65535, 100).round().astype(np.uint16).reshape(10, 10)
    for kind in ("PNG", "TIFF"):
        pixels, *_ = load_square(encoded(Image.fromarray(deep), kind), 10, LIMIT)
        assert np.abs(pixels[..., 0] - deep / 257).max() <= 0.5 + 1e-9


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_every_value_of_sixteen_bits_in_little_memory(mode):
    """255/65535 is 1/257, which no whole number is half of: rounding is exact."""
    values = np.tile(np.arange(65536), 32).reshape(2048, 1024)
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "<i4"}[mode]
    image = Image.frombytes(mode, values.shape[::-1], values.astype(kind).tobytes())
    tracemalloc.start()
    rgb = to_rgb(image)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (np.asarray(rgb) == np.rint(values / 257)[..., None]).all()
    assert peak <= 9 * values.size  # twice what it was read from (4 at most), and 1


@pytest.mark.parametrize("value", [-1, 65536])
def test_samples_beyond_sixteen_bits_are_refused(value):
    samples = np.zeros((9, 9), np.int32)
    samples[8, 8] = value
    with pytest.raises(RejectError, match="unknown range"):
        to_rgb(Image.fromarray(samples))


def test_other_modes():
    for mode in ("1", "L", "CMYK", "YCbCr"):
        source = gradient().convert(mode)
        kind = "TIFF" if mode in ("1", "L") else "JPEG"
        pixels, *_ = load_square(encoded(source, kind), 40, LIMIT)
        assert np.abs(pixels.astype(int) - np.asarray(source.convert("RGB")).astype(int)).mean() < 6, mode


def test_first_frame_of_an_animation():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "green", "blue")]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **({"lossless": True} if kind == "WEBP" else {}))
        assert (load_square(data, 8, LIMIT)[0] == (255, 0, 0)).all(), kind


def chunk(name, body):
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


def bomb(width, height):
    """A PNG whose header claims any size; there is next to nothing behind it."""
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


@pytest.mark.parametrize(("data", "kind"), [
    (b"", "empty file"),
    (b"just text", "not an image"),
    (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image"),
    (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
    (encoded(gradient(400, 400), "PNG")[:900], "broken image"),
    (encoded(gradient(400, 400), "JPEG")[:2000], "broken image"),
    (bomb(30000, 30000), "too many pixels"),
    (bomb(1001, 1000), "too many pixels"),
    (bomb(100, 100), "broken image"),
    (encoded(Image.fromarray(np.full((4, 4), 0.5, np.float32)), "TIFF"), "unknown range"),
    (encoded(Image.fromarray(np.full((4, 4), 10**6, np.int32)), "TIFF"), "unknown range"),
])  # fmt: skip
def test_what_cannot_be_used_has_a_reason(data, kind):
    with pytest.raises(RejectError, match=f"^{kind}: "):
        load_square(data, 16, LIMIT)


def test_the_limit_is_checked_before_decoding(monkeypatch):
    data = encoded(gradient(), "BMP")
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RejectError, match="too many pixels"):
        images.open_image(data, 1000)


def test_profiles_are_ignored():
    # A profile that says that red is green would change every sample, were it applied.
    swapped = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {bytes(swapped[i : i + 4]): i + 4 for i in range(132, 132 + 12 * int.from_bytes(swapped[128:132], "big"), 12)}
    red, green = (int.from_bytes(swapped[tags[name] : tags[name] + 4], "big") for name in (b"rXYZ", b"gXYZ"))
    swapped[red : red + 20], swapped[green : green + 20] = swapped[green : green + 20], swapped[red : red + 20]
    applied = ImageCms.profileToProfile(gradient(), ImageCms.ImageCmsProfile(io.BytesIO(bytes(swapped))), ImageCms.createProfile("sRGB"))
    assert np.abs(np.asarray(applied).astype(int) - np.asarray(gradient()).astype(int)).mean() > 20
    for kind in ("PNG", "WEBP"):
        options = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(gradient(), kind, icc_profile=bytes(swapped), **options)
        assert (load_square(data, 40, LIMIT)[0] == np.asarray(gradient())).all()


def test_cmyk_of_photoshop_is_inverted():
    """Files with four colours hold them inverted, with Adobe's marker and without; libjpeg-turbo through torchvision says the same."""
    from torchvision.io import ImageReadMode, decode_jpeg

    data = encoded(Image.new("CMYK", (16, 16), (0, 200, 50, 20)), "JPEG", quality=98)
    start = data.index(b"\xff\xee")
    assert b"Adobe" in data[start : start + 12]
    bare = data[:start] + data[start + 16 :]
    for one in (data, bare):
        pixels, *_ = load_square(one, 16, LIMIT)
        other = decode_jpeg(torch.frombuffer(bytearray(one), dtype=torch.uint8), ImageReadMode.RGB).permute(1, 2, 0).numpy()
        assert np.abs(pixels.astype(int) - other).max() <= 2
        assert np.abs(pixels[0, 0].astype(int) - (235, 51, 189)).max() <= 3  # 255 (1 - c) (1 - k)


def test_sixteen_bits_of_colour():
    """A PNG of three 16-bit samples, written here: the high bytes are the picture."""
    deep = np.random.default_rng(0).integers(0, 65536, (12, 12, 3), dtype=np.uint16)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in deep)
    header = struct.pack(">IIBBBBB", 12, 12, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")
    pixels, *_ = load_square(data, 12, LIMIT)
    assert np.abs(pixels - deep / 257).max() <= 1


def test_a_webp_header_is_checked_before_its_canvas_is_made(monkeypatch):
    data = bytearray(encoded(gradient(), "WEBP", lossless=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0"))
    at = data.index(b"VP8X") + 12
    data[at : at + 6] = (16382).to_bytes(3, "little") * 2
    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", lambda *a: pytest.fail("a canvas of a gigabyte"))
    with pytest.raises(RejectError, match="too many pixels"):
        load_square(bytes(data), 40, LIMIT)


def test_a_check_of_the_shape_comes_before_decoding(monkeypatch):
    data = encoded(gradient(40, 30), "PNG")
    seen = []
    load_square(data, 10, LIMIT, lambda *size: seen.append(size))
    assert seen == [(40, 30)]
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))

    def refuse(width, height):
        raise RejectError("image too small: no")

    with pytest.raises(RejectError, match="too small"):
        load_square(data, 10, LIMIT, refuse)


def test_a_tile_of_a_tiff_is_no_larger_than_a_picture_may_be():
    place = [(324, "at"), (325, "length")]
    samples = zlib.compress(np.full((256, 256, 3), 7, np.uint8).tobytes())
    assert (load_square(tiff([(322, 256), (323, 256), *place], samples), 64, 200_000)[0] == 7).all()
    with pytest.raises(RejectError, match=r"too many pixels: a tile of the TIFF has 196608 samples, the limit is 190000"):
        load_square(tiff([(322, 256), (323, 256), *place], samples), 64, 190_000)
    # Of two widths Pillow believes the last one, and libtiff unpacks by the first.
    with pytest.raises(RejectError, match=r"broken image: ValueError: its tiles have several sizes"):
        load_square(tiff([(322, 256), (322, 64), (323, 256), *place], samples), 64, 190_000)
    for kind in ("raw", "tiff_deflate"):
        assert load_square(encoded(gradient(), "TIFF", compression=kind), 40, LIMIT)[1:] == (40, 40)
        assert load_square(encoded(gradient(), "TIFF", compression=kind, big_tiff=True), 40, LIMIT)[1:] == (40, 40)


def test_a_jpeg_whose_scans_go_on_and_on_is_refused():
    assert images.scans(encoded(gradient(), "JPEG")) == 1
    plain = encoded(gradient(), "JPEG", progressive=True, comment=b"\xff\xda" * 100)
    usual = plain.count(b"\xff\xda") - 100
    assert images.scans(plain) == images.scans(plain + b"\xff\xda" * 100) == usual == 10  # what a phone puts after the picture is no scan
    assert images.scans(encoded(gradient(), "JPEG", restart_marker_blocks=1)) == 1
    assert load_square(jpeg_of_scans(images.MAX_SCANS - usual), 64, LIMIT)[1:] == (64, 64)
    with pytest.raises(RejectError, match=r"broken image: the JPEG has more than 64 scans"):
        load_square(jpeg_of_scans(images.MAX_SCANS + 1 - usual), 64, LIMIT)


PEAK = """
import sys
from pathlib import Path
from paris_ray.data.images import load_square

def status(key):
    return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key)).split()[1])

load_square(Path(sys.argv[1]).read_bytes(), 64, 10**8)
data = Path(sys.argv[2]).read_bytes()
Path("/proc/self/clear_refs").write_text("5")  # from here on the peak is counted anew
before = status("VmRSS")
load_square(data, 64, 10**8)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux does")
@pytest.mark.parametrize(("kind", "mode", "most", "options"), [
    ("PNG", "RGBA", 9, {}), ("PNG", "RGB", 9, {"exif": exif(6)}), ("WEBP", "RGBA", images.PIXEL_BYTES, {"lossless": True}),
])  # fmt: skip
def test_memory_of_a_picture(tmp_path, kind, mode, most, options):
    """A worker asks for as much, for each of its threads."""
    for name, side in (("small", 100), ("large", 2500)):
        Image.new(mode, (side, side)).save(tmp_path / name, kind, **options)
    run = [sys.executable, "-c", PEAK, str(tmp_path / "small"), str(tmp_path / "large")]
    taken = int(subprocess.run(run, capture_output=True, text=True, check=True).stdout)
    assert 2500**2 * 4 < taken < 2500**2 * most + (4 << 20)
