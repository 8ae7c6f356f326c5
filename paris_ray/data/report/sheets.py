"""Contact sheets: pictures of an expert's members in rows, the farthest framed. Torch only where latents are decoded."""

from __future__ import annotations

import io
import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.data import schema
from paris_ray.data.report.members import Members, read_rows
from paris_ray.storage import Folder

TILE = 72
"""Side of a picture on a contact sheet, in pixels (or the whole multiple of a smaller picture's side below it)."""

COLUMNS = 12
FRAME = (203, 80, 2, 255)


def draw_sheets(run: Folder, members: Members) -> list[dict[str, list[dict[str, Any]]]]:
    """Write ``clusters/contact-K.png`` of each expert.

    Returns:
        of each expert, what is on its sheet, in order: ``nearest`` and ``farthest``, each with the rows' ``id`` and ``caption``.
    """
    import torch

    from paris_ray.data.codec import load_codec

    codec = load_codec((run / "encoders").uri, run.read_json("encoders/encoders.json")["codec"])
    wanted = np.unique(np.array(list(itertools.chain(*members.near, *members.far)), np.int64))
    images: dict[int, NDArray[np.uint8]] = {}
    said: dict[int, dict[str, Any]] = {}
    for rows, table in read_rows(run / "corpus", members.parts, wanted, ["id", "caption", "latent"]):
        latents = schema.to_numpy(table["latent"]).astype(np.float32)
        images.update(zip(rows.tolist(), codec.decode(torch.from_numpy(latents)), strict=True))
        said.update(zip(rows.tolist(), table.select(["id", "caption"]).to_pylist(), strict=True))
    shown = []
    for k, (near, far) in enumerate(zip(members.near, members.far, strict=True)):
        (run / "clusters").write_bytes(f"contact-{k}.png", sheet([images[i] for i in near], [images[i] for i in far]))
        shown.append({"nearest": [said[i] for i in near], "farthest": [said[i] for i in far]})
    return shown


def sheet(near: Sequence[NDArray[np.uint8]], far: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG of pictures (H, W, 3) in rows of twelve on a transparent ground; the farthest have a frame."""
    from PIL import Image, ImageDraw

    side = (near or far)[0].shape[0]
    shown = side * (TILE // side) if side <= TILE else TILE
    cell, columns = shown + 6, min(COLUMNS, len(near) + len(far))
    lines = math.ceil((len(near) + len(far)) / columns)
    page = Image.new("RGBA", (columns * cell, lines * cell), (0, 0, 0, 0))
    pen = ImageDraw.Draw(page)
    for i, pixels in enumerate(itertools.chain(near, far)):
        x, y = i % columns * cell, i // columns * cell
        if i >= len(near):
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=FRAME)
        picture = Image.fromarray(pixels)
        method = Image.Resampling.NEAREST if side <= TILE else Image.Resampling.LANCZOS
        page.paste(picture.resize((shown, shown), method), (x + 3, y + 3))
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()
