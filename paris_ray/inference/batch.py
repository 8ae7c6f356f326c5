"""A file's worth of pictures as files: what is drawn already is kept, routing and a contact sheet beside them."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import re
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from paris_ray.hub import Snapshot
from paris_ray.inference.engine import Engine
from paris_ray.inference.experts import LocalExperts
from paris_ray.inference.prompt_file import Order
from paris_ray.inference.request import ImageRequest, ImageResult
from paris_ray.inference.weights import ModelFacts, ParisModel, load_model
from paris_ray.manifest import fingerprint
from paris_ray.progress import Progress
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from PIL.Image import Image

Drawn = tuple[int, "ImageResult | Exception"]
"""The number of a request and what became of it."""

ROUTING = "routing.jsonl"
TILE, PER_SHEET, COLUMNS = 192, 240, 8


class Artist:
    """A model with its experts in one process: this one, or that of a Ray actor.

    Args:
        model: folder or URI.
        device: torch device.
        precision: of the experts.
        max_resident: experts in memory at once; ``None`` is as many as fit.
        threads: of this process's matrix products on a CPU; ``None`` leaves them as they are.
        max_rows: pictures stepped at once.
        compile: compile the blocks of experts and router.
    """

    def __init__(
        self,
        model: str,
        device: str = "cpu",
        precision: str = "fp32",
        max_resident: int | None = None,
        threads: int | None = None,
        max_rows: int = 64,
        compile: bool = False,
    ):
        self.model = load_model(model, device, precision, compile=compile)
        self.engine = Engine(self.model, LocalExperts(self.model, threads=threads, lazy=True, max_resident=max_resident), max_rows, 2 * max_rows)

    def draw(self, requests: Sequence[ImageRequest]) -> Iterator[Drawn]:
        """Pictures as they are finished, each with the number of its request; one that fails does not stop the others."""
        waiting = deque(enumerate(requests))
        running: dict[int, Future[ImageResult]] = {}
        while waiting or running:
            while waiting and len(running) < self.engine.max_queue:
                number, request = waiting.popleft()
                running[number] = self.engine.submit(request)
            self.engine.tick()
            for number in [number for number, future in running.items() if future.done()]:
                future = running.pop(number)
                error = future.exception()
                yield number, error if isinstance(error, Exception) else future.result()

    def draw_all(self, numbers: Sequence[int], requests: Sequence[ImageRequest]) -> list[Drawn]:
        """As :meth:`draw`, all at once and with the numbers given: what an actor is asked."""
        return [(numbers[i], result) for i, result in self.draw(requests)]


@dataclass
class Summary:
    """How a batch went: pictures drawn now, kept from before, and failed with the reason, by name."""

    drawn: int = 0
    kept: int = 0
    failed: dict[str, str] = field(default_factory=dict)
    sheets: list[str] = field(default_factory=list)


def identity(model: ParisModel | ModelFacts, precision: str) -> str:
    """What tells a model from another: its fingerprint and precision; without one, its repository's commit or a sketch of its weight files."""
    found = model.info.get("model_fingerprint")
    if not found and isinstance(model.folder, Snapshot):
        found = model.folder.commit
    if not found:
        names = [entry.name for entry in model.folder.files(recursive=True) if entry.name.endswith((".safetensors", "config.json"))]
        found = fingerprint({name: model.folder.sketch(name) for name in names})
    return f"{found}:{precision}"


def name_of(request: ImageRequest, model: str) -> str:
    """File name of a picture: readable, and the same exactly when the same is asked of the same model."""
    asked = {**dataclasses.asdict(request), "guidance_scale": float(request.guidance_scale or 0.0), "client": "", "model": model}
    words = re.sub(r"[^a-z0-9]+", "-", request.prompt.lower()).strip("-")[:40].strip("-") or "picture"
    return f"{words}-{request.seed}-{request.index}-{fingerprint(asked)[:12]}.png"


def generate_files(
    orders: Sequence[Order],
    names: Sequence[str],
    out: str,
    draw: Callable[[Sequence[ImageRequest]], Iterable[Drawn]],
    encode: Callable[[ImageRequest, ImageResult], bytes],
) -> Summary:
    """Draw what is not there yet, then write ``routing.jsonl`` and the contact sheets of all of it.

    Args:
        orders: the pictures.
        names: their files' names, :func:`name_of`; equal ones are drawn once.
        out: folder or URI; other files there are left alone.
        draw: gives pictures in any order.
        encode: a picture as PNG, with a text chunk ``routing``: JSON with ``steps`` and ``degraded``.
    """
    folder, summary = Folder(out), Summary()
    folder.sweep()  # what a killed attempt left unfinished
    wanted = {name: order.request for name, order in zip(names, orders, strict=True)}
    there = {name for name in wanted if folder.exists(name) and _is_whole(folder, name)}
    summary.kept = len(there)
    progress = Progress(folder / "events", "generate", len(wanted), "pictures")
    progress.update(summary.kept, message=f"{summary.kept} are there already" if there else "", force=bool(there))
    todo = [name for name in wanted if name not in there]
    try:
        for number, result in draw([wanted[name] for name in todo]):
            name = todo[number]
            if isinstance(result, Exception):
                summary.failed[name] = f"{type(result).__name__}: {result}"
            else:
                folder.write_bytes(name, encode(wanted[name], result))
                summary.drawn += 1
            progress.update(summary.kept + summary.drawn, message=f"{len(summary.failed)} failed" if summary.failed else "")
        rows = [(order, name) for order, name in zip(orders, names, strict=True) if name not in summary.failed]
        lines: list[str] = []
        for i in range(0, len(rows), PER_SHEET):
            part = rows[i : i + PER_SHEET]
            summary.sheets.append(f"contact-sheet-{i // PER_SHEET:03d}.png")
            folder.write_bytes(summary.sheets[-1], contact_sheet([order for order, _ in part], _pictures(folder, part, lines)))
        folder.write_bytes(ROUTING, "".join(lines).encode())
    except BaseException as error:
        progress.fail(f"{type(error).__name__}; the same command goes on from here")
        raise
    progress.finish(f"{summary.drawn} drawn, {summary.kept} kept, {len(summary.failed)} failed")
    return summary


def _is_whole(folder: Folder, name: str) -> bool:
    """Whether a file is a picture of ours with all its bytes; its checksums say so, and nothing is decoded."""
    try:
        with _open(folder, name) as image:
            said = json.loads(image.info["routing"])
            image.verify()
    except (OSError, SyntaxError, LookupError, ValueError):
        return False
    return isinstance(said, dict) and "steps" in said


def _open(folder: Folder, name: str) -> Image:
    from PIL import Image

    return Image.open(io.BytesIO(folder.read_bytes(name)), formats=["PNG"])


def _pictures(folder: Folder, rows: Sequence[tuple[Order, str]], lines: list[str]) -> Iterator[Image]:
    """The pictures, one after the other, and their lines of :data:`ROUTING`: each file is opened once for both."""
    for order, name in rows:
        with _open(folder, name) as picture:
            said = json.loads(picture.info["routing"])
            request = {key: value for key, value in dataclasses.asdict(order.request).items() if key != "client"}
            line = {"file": name, "line": order.line, **request, "degraded": said.get("degraded", []), "weights": said.get("steps", [])}
            lines.append(json.dumps(line, ensure_ascii=False) + "\n")
            yield picture


def contact_sheet(orders: Sequence[Order], pictures: Iterable[Image]) -> bytes:
    """A PNG with all pictures in the order of the file, each over the start of its prompt; a row a prompt where all have as many pictures."""
    from PIL import Image, ImageDraw, ImageFont

    counts = {sum(other.line == order.line for other in orders) for order in orders}
    columns = counts.pop() if len(counts) == 1 and 1 not in counts and max(counts) <= 12 else min(COLUMNS, len(orders))
    font = ImageFont.load_default(11)
    for i, (order, picture) in enumerate(zip(orders, pictures, strict=True)):
        if i == 0:
            side = picture.width * max(1, TILE // picture.width) if picture.width <= TILE else TILE
            cell = side + 8
            page = Image.new("RGB", (columns * cell, math.ceil(len(orders) / columns) * (cell + 14)), (246, 247, 249))
            pen = ImageDraw.Draw(page)
        x, y = i % columns * cell, i // columns * (cell + 14)
        method = Image.Resampling.NEAREST if picture.width <= side else Image.Resampling.LANCZOS
        page.paste(picture.convert("RGB").resize((side, side), method), (x + 4, y + 4))
        label = order.request.prompt
        while label and pen.textlength(label, font) > side:
            label = label[: min(len(label) - 1, 80)]
        pen.text((x + 4, y + side + 5), label, (60, 64, 70), font)
    file = io.BytesIO()
    page.save(file, "PNG", optimize=True)
    return file.getvalue()
