"""A folder with everything that goes wrong, and two rows that are fine."""

from __future__ import annotations

import io

from PIL import Image

from .test_images import bomb

HOSTILE = {
    "text.png": "not an image",
    "page.jpg": "not an image",
    "zero.png": "empty file",
    "truncated.png": "broken image",
    "truncated.jpg": "broken image",
    "bomb.png": "too many pixels",
    "large.png": "too many pixels",
    "nocaption.png": "no caption",
    "emptycaption.png": "empty caption",
    "blankcaption.png": "empty caption",
    "longcaption.png": "caption too long",
    "latin1.png": "undecodable caption",
    "orphan.txt": "caption without image",
    "notes.md": "neither image nor caption",
    "drawing.svg": "neither image nor caption",
    "weights.pkl": "neither image nor caption",
}
"""Source name → kind of its reason, at max_pixels 1 000 000 and max_caption_chars 200."""


def write_hostile(folder):
    """Write them below a folder; returns the names of the good rows."""

    def encoded(size, kind):
        sink = io.BytesIO()
        Image.effect_noise(size, 80).convert("RGB").save(sink, kind)
        return sink.getvalue()

    good = encoded((64, 48), "PNG")
    images = {
        "a_good.png": good,
        "z_good.webp": encoded((50, 60), "WEBP"),
        "text.png": b"I am a text",
        "page.jpg": b"<html><body>404</body></html>",
        "zero.png": b"",
        "truncated.png": encoded((300, 300), "PNG")[:5000],
        "truncated.jpg": encoded((300, 300), "JPEG")[:5000],
        "bomb.png": bomb(30_000, 30_000),
        "large.png": encoded((1200, 1000), "PNG"),
        **{f"{name}.png": good for name in ("nocaption", "emptycaption", "blankcaption", "longcaption", "latin1")},
    }
    captions = {"emptycaption": b"", "blankcaption": b" \n\t ", "longcaption": b"long " * 50, "latin1": b"caf\xe9"}
    for name, content in images.items():
        (folder / name).write_bytes(content)
        stem = name.rsplit(".", 1)[0]
        if stem != "nocaption":
            (folder / f"{stem}.txt").write_bytes(captions.get(stem, f"the {stem}".encode()))
    for name in ("orphan.txt", "notes.md", "drawing.svg", "weights.pkl"):
        (folder / name).write_bytes(b"x")
    return ["a_good.png", "z_good.webp"]
