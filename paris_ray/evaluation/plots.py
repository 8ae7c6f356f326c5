"""Small charts as SVG text and pictures as data URIs, for the report. No plotting library: a page of charts in milliseconds.

Colours are CSS variables of the page (``--ink``, ``--muted``, ``--line``, ``--e0`` …), so that one chart serves light and dark.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LIGHT = ("#2a78d6", "#eb6834", "#1baf7a", "#eda100", "#e87ba4", "#008300", "#4a3aa7", "#e34948")
_DARK = ("#3987e5", "#d95926", "#199e70", "#c98500", "#d55181", "#35a835", "#9085e9", "#e66767")

WIDTH = 760
HALF = 480
"""Widths of charts that take the page's column, and of those that stand two abreast."""


def expert_colours(k: int) -> tuple[list[str], list[str]]:
    """Colours of ``k`` experts on light and on dark ground; beyond eight, hues in golden steps."""

    def more(lightness: float) -> list[str]:
        hues = [(0.58 + i * 0.61803398875) % 1.0 for i in range(len(_LIGHT), k)]
        rgb = [colorsys.hls_to_rgb(hue, lightness, 0.6) for hue in hues]
        return ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in rgb]

    return [*_LIGHT[:k], *more(0.45)], [*_DARK[:k], *more(0.6)]


def escape(text: object) -> str:
    """Text made safe for HTML, in elements and in quoted attributes."""
    return html.escape(str(text), quote=True)


def number(value: float) -> str:
    """A number as people write it: 12 345, 3.2, 0.041."""
    if not math.isfinite(value):
        return "–"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}".replace(",", "\u202f")
    return f"{value:.3g}"


def duration(seconds: float) -> str:
    """Seconds as 8.1 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values that cover [low, high]: steps of 1, 2 or 5 times a power of ten."""
    if not high > low:
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def svg(width: float, height: float, body: str, title: str) -> str:
    """An inline SVG that scales with its column and names itself to screen readers."""
    label = escape(title)
    # Not much larger than drawn, or its letters would outgrow the page's.
    size = f'viewBox="0 0 {width:g} {height:g}" style="max-width:{1.15 * width:.0f}px"'
    return f'<svg {size} role="img" aria-label="{label}" class="plot"><title>{label}</title>{body}</svg>'


def _text(x: float, y: float, content: object, anchor: str = "start", kind: str = "t") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" class="{kind}">{escape(content)}</text>'


@dataclass(frozen=True)
class Series:
    """One line of a chart; ``colour`` is a CSS colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def line_chart(
    series: Sequence[Series], x_label: str, y_label: str, title: str, log_x: bool = False, y_range: tuple[float, float] | None = None
) -> str:
    """Lines over a shared grid, which ``y_range`` fixes; the legend below wraps. Points that are not finite are left out."""
    width, height = HALF, 240
    cleaned = [(s, [(float(x), float(y)) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y) and (x > 0 or not log_x)]) for s in series]
    cleaned = [(s, points) for s, points in cleaned if points]
    if not cleaned:
        return '<p class="none">no points yet</p>'
    warp: Callable[[float], float] = math.log10 if log_x else float
    xs = [warp(x) for _, points in cleaned for x, _ in points]
    ys = [y for _, points in cleaned for _, y in points]
    y_ticks = ticks(*(y_range or (min(ys), max(ys))))
    left, right, top, bottom = 52, 12, 18, 40
    legend_columns = max(1, int((width - left) // (34 + 6.6 * max(len(s.name) for s, _ in cleaned))))
    legend_rows = math.ceil(len(cleaned) / legend_columns)
    inner_w, inner_h = width - left - right, height - top - bottom
    low_x, high_x = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    px = lambda x: left + (warp(x) - low_x) / (high_x - low_x) * inner_w  # noqa: E731
    py = lambda y: top + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * inner_h  # noqa: E731
    parts = [_text(left, 11, y_label, kind="t m")]
    for value in y_ticks:
        parts.append(f'<line x1="{left}" x2="{width - right}" y1="{py(value):.1f}" y2="{py(value):.1f}" class="grid"/>')
        parts.append(_text(left - 6, py(value) + 4, number(value), "end", "t m"))
    if log_x:
        decades = [10.0**p for p in range(math.floor(low_x), math.ceil(high_x) + 1)]
        x_ticks = [m * d for d in decades for m in ((1,) if len(decades) > 3 else (1, 2, 5)) if low_x <= math.log10(m * d) <= high_x]
    else:
        x_ticks = [value for value in ticks(low_x, high_x) if low_x <= value <= high_x]
    parts += [_text(px(value), height - bottom + 16, number(value), "middle", "t m") for value in x_ticks]
    parts.append(_text(width - right, height - bottom + 32, x_label, "end", "t m"))
    for s, points in cleaned:
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in points)
        if len(points) == 1:
            parts.append(f'<circle cx="{px(points[0][0]):.1f}" cy="{py(points[0][1]):.1f}" r="3" style="fill:{s.colour}"/>')
        parts.append(f'<polyline points="{path}" class="line" style="stroke:{s.colour}"><title>{escape(s.name)}</title></polyline>')
    for i, (s, _) in enumerate(cleaned):
        x = left + i % legend_columns * (inner_w / legend_columns)
        y = height + 6 + i // legend_columns * 18
        parts.append(f'<line x1="{x:.1f}" x2="{x + 16:.1f}" y1="{y}" y2="{y}" class="line" style="stroke:{s.colour}"/>')
        parts.append(_text(x + 21, y + 4, s.name))
    return svg(width, height + 8 + legend_rows * 18, "".join(parts), title)


def bar_chart(items: Sequence[tuple[str, float, str, str]], title: str) -> str:
    """Horizontal bars: (label, value ≥ 0, what to write at the end, CSS colour)."""
    if not items:
        return '<p class="none">nothing to show yet</p>'
    row, left, right = 24, 150, 150
    top = max(value for _, value, _, _ in items) or 1.0
    parts = []
    for i, (label, value, note, colour) in enumerate(items):
        y = i * row
        width = max(1.5, value / top * (WIDTH - left - right))
        parts.append(_text(left - 8, y + 16, label, "end"))
        parts.append(f'<rect x="{left}" y="{y + 4}" width="{width:.1f}" height="{row - 8}" rx="3" style="fill:{colour}"/>')
        parts.append(_text(left + width + 7, y + 16, note, kind="t m"))
    return svg(WIDTH, len(items) * row + 4, "".join(parts), title)


def interval_chart(items: Sequence[tuple[str, float, float, float, str]], title: str) -> str:
    """Shares with their intervals, a dot and a whisker each: (label, share, low, high, CSS colour)."""
    if not items:
        return '<p class="none">nothing to show yet</p>'
    row, left, right, top = 26, 210, 62, 20
    inner = WIDTH - left - right
    px = lambda share: left + share * inner  # noqa: E731
    height = top + len(items) * row
    parts = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<line x1="{px(share):.1f}" x2="{px(share):.1f}" y1="{top - 4}" y2="{height}" class="grid"/>')
        parts.append(_text(px(share), 11, f"{share:.0%}", "middle", "t m"))
    for i, (label, value, low, high, colour) in enumerate(items):
        y = top + i * row + row / 2
        parts.append(_text(left - 12, y + 4, label, "end"))
        parts.append(f'<line x1="{px(low):.1f}" x2="{px(high):.1f}" y1="{y}" y2="{y}" class="whisker" style="stroke:{colour}"/>')
        parts.append(f'<circle cx="{px(value):.1f}" cy="{y}" r="5" style="fill:{colour}"/>')
        parts.append(_text(WIDTH - right + 14, y + 4, f"{value:.0%}", kind="t b"))
    return svg(WIDTH, height + 4, "".join(parts), title)


def stacked_columns(shares: NDArray[np.floating], title: str, width: float = WIDTH, height: float = 120, ends: tuple[str, str] = ("", "")) -> str:
    """One column per step (left to right), filled from the bottom by experts' shares.

    Args:
        shares: (S, K), rows sum to 1 (or to 0 where nothing is known).
        title: for screen readers and the tooltip.
        width: of the drawing, in its own units.
        height: of the columns.
        ends: what to write below the first and the last column.
    """
    steps, experts = shares.shape
    column = width / max(1, steps)
    gap = min(1.0, column * 0.12)
    parts = []
    for s in range(steps):
        bottom = height
        for k in range(experts):
            tall = float(shares[s, k]) * height
            if tall > 0.05:
                x, w = s * column, column - gap
                parts.append(f'<rect x="{x:.2f}" y="{bottom - tall:.2f}" width="{w:.2f}" height="{tall:.2f}" class="f{k}"/>')
                bottom -= tall
    extra = 0
    if any(ends):
        extra = 18
        parts.append(_text(0, height + 14, ends[0], kind="t m"))
        parts.append(_text(width, height + 14, ends[1], "end", "t m"))
    return svg(width, height + extra, "".join(parts), title)


def share_bar(shares: Sequence[float], title: str, height: float = 26) -> str:
    """One bar divided among the experts, numbered where there is room."""
    total = sum(shares) or 1.0
    x = 0.0
    parts = []
    for k, part in enumerate(shares):
        width = part / total * WIDTH
        parts.append(f'<rect x="{x:.1f}" y="0" width="{max(0.0, width - 1.5):.1f}" height="{height}" rx="2" class="f{k}"/>')
        if width > 16:
            parts.append(_text(x + width / 2, height / 2 + 4.5, k, "middle", "t on"))
        x += width
    return svg(WIDTH, height, "".join(parts), title)


# -- pictures -----------------------------------------------------------------------------------------------------------

THUMB = 128
"""Larger pictures are shown at this side, in pixels."""


def picture_uri(image: NDArray[np.uint8]) -> str:
    """A picture (H, W, 3) as a data URI: lossless PNG when small, else a WebP thumbnail."""
    from PIL import Image

    picture = Image.fromarray(np.ascontiguousarray(image))
    if max(picture.size) <= THUMB:
        return data_uri(_encoded(picture, "PNG", optimize=True), "image/png")
    picture.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
    return data_uri(_encoded(picture, "WEBP", quality=88), "image/webp")


def data_uri(content: bytes, media_type: str) -> str:
    """Bytes as a data URI."""
    return f"data:{media_type};base64,{base64.b64encode(content).decode()}"


def _encoded(picture: object, kind: str, **options: object) -> bytes:
    sink = io.BytesIO()
    picture.save(sink, kind, **options)  # type: ignore[attr-defined]
    return sink.getvalue()
