"""Small charts as HTML and inline SVG, and pictures as data URIs. No plotting library: a page of charts in milliseconds.

Widths are shares of the column, heights and letters are CSS pixels, so a chart is as readable on a phone as on a desk. Colours are CSS variables of
the page (``--ink``, ``--muted``, ``--line``, ``--e0`` …), so that one chart serves light and dark.
"""

from __future__ import annotations

import base64
import colorsys
import html
import io
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# After Okabe & Ito's set: any two differ also to eyes that lack a kind of cone (CIE distance above 20; tests/pages/test_charts.py).
_LIGHT = ("#0e64c0", "#f49305", "#0e9a68", "#c27aa5", "#48bef7", "#cb5002", "#4b1d74", "#734f25")
_DARK = ("#4981e4", "#f49100", "#02b16c", "#be6ba6", "#97d9e9", "#d9582a", "#daf6e2", "#fef250")

NOTHING = '<p class="none">nothing to show yet</p>'


def expert_colours(k: int) -> tuple[list[str], list[str]]:
    """Colours of ``k`` experts on light and on dark ground; beyond eight, hues in golden steps, which only labels tell apart for everybody."""

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
    if high - low <= 1e-9 * abs(low):  # equal, but for rounding
        high = low + (abs(low) or 1.0)
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def legend(names: Iterable[tuple[str, str]]) -> str:
    """Which colour is what: (name, CSS colour)."""
    return '<div class="legend">' + "".join(f'<span><i style="background:{escape(c)}"></i>{escape(name)}</span>' for name, c in names) + "</div>"


def svg(height: float | None, body: str, title: str, kind: str = "", style: str = "") -> str:
    """An inline SVG as wide as its column that names itself to screen readers; without a height, ``style`` gives its shape."""
    label = escape(title)
    size = f'height="{height:g}"' if height is not None else f'style="{style}"'
    return f'<svg {size} role="img" aria-label="{label}" class="{f"plot {kind}".strip()}"><title>{label}</title>{body}</svg>'


def stretched(width: float, height: float, body: str) -> str:
    """A drawing in its own units, stretched over the chart that it is put into; strokes keep their width."""
    return f'<svg viewBox="0 0 {width:g} {height:g}" preserveAspectRatio="none" width="100%" height="100%" overflow="visible">{body}</svg>'


def text(x: str, y: float | str, content: object, anchor: str = "start", kind: str = "") -> str:
    """Letters at a place in percent or pixels."""
    css = f' class="{kind}"' if kind else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}"{css}>{escape(content)}</text>'


@dataclass(frozen=True)
class Series:
    """One line of a chart; ``colour`` is a CSS colour."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str


def line_chart(
    series: Sequence[Series],
    x_label: str,
    y_label: str,
    title: str,
    log_x: bool = False,
    y_range: tuple[float, float] | None = None,
    at: Sequence[float] | None = None,
) -> str:
    """Lines over a shared grid, which ``y_range`` fixes, with a legend when they are several. Points that are not finite are left out.

    Numbers below stand at the values of ``at``, where it is given, else at round ones.
    """
    cleaned = [(s, [(float(x), float(y)) for x, y in zip(s.x, s.y, strict=True) if math.isfinite(y) and (x > 0 or not log_x)]) for s in series]
    cleaned = [(s, points) for s, points in cleaned if points]
    if not cleaned:
        return '<p class="none">no points yet</p>'
    if all(len(points) == 1 for _, points in cleaned):
        return bar_chart([(s.name, y, number(y), s.colour) for s, [(_, y)] in cleaned], title)
    warp: Callable[[float], float] = math.log10 if log_x else float
    xs = [warp(x) for _, points in cleaned for x, _ in points]
    ys = [y for _, points in cleaned for _, y in points]
    y_ticks = ticks(*(y_range or (min(ys), max(ys))))
    low_x, high_x = min(xs), max(xs) if max(xs) > min(xs) else min(xs) + 1
    top, inner = 20, 180  # pixels; across, thousandths of the width
    px = lambda x: 1000 * (warp(x) - low_x) / (high_x - low_x)  # noqa: E731
    py = lambda y: top + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * inner  # noqa: E731
    parts = [text("-44", 10, y_label)]
    for value in y_ticks:
        parts.append(f'<line x1="0" x2="100%" y1="{py(value):.1f}" y2="{py(value):.1f}" class="grid"/>')
        parts.append(text("-6", f"{py(value) + 4:.1f}", number(value), "end"))
    round_ = _log_ticks(low_x, high_x) if log_x else ticks(low_x, high_x, 4)
    x_ticks = [value for value in (round_ if at is None else at) if low_x <= warp(value) <= high_x]
    parts += [text(f"{px(value) / 10:.1f}%", top + inner + 17, number(value), "middle") for value in x_ticks]
    parts.append(text("100%", top + inner + 33, x_label, "end"))
    lines = []
    for s, points in cleaned:
        # A lone point is a line of no length, which its round ends make a dot.
        path = " ".join(f"{px(x):.1f},{py(y):.1f}" for x, y in (points if len(points) > 1 else points * 2))
        lines.append(f'<polyline points="{path}" class="line" style="stroke:{s.colour}"><title>{escape(s.name)}</title></polyline>')
    height = top + inner + 38
    drawn = svg(height, "".join(parts) + stretched(1000, height, "".join(lines)), title, "lines")
    return drawn + (legend((s.name, s.colour) for s, _ in cleaned) if len(cleaned) > 1 else "")


@dataclass(frozen=True)
class Point:
    """One point of a chart with its interval; ``colour`` is a CSS colour."""

    name: str
    x: float
    y: float
    low: float
    high: float
    colour: str


def scatter_chart(points: Sequence[Point], x_label: str, y_label: str, title: str) -> str:
    """Named points with whiskers, x > 0 on a logarithmic scale. Names give way to each other, and a line leads to one that has."""
    if not points:
        return NOTHING
    xs = [math.log10(point.x) for point in points]
    low_x, high_x = min(xs) - 0.05, max(xs) + 0.05
    y_ticks = ticks(min(point.low for point in points), max(point.high for point in points))
    top, inner = 20, 240
    px = lambda x: 96 * (math.log10(x) - low_x) / (high_x - low_x) + 2  # noqa: E731
    py = lambda y: top + (y_ticks[-1] - y) / (y_ticks[-1] - y_ticks[0]) * inner  # noqa: E731
    parts = [text("-44", 10, y_label)]
    for value in y_ticks:
        parts.append(f'<line x1="0" x2="100%" y1="{py(value):.1f}" y2="{py(value):.1f}" class="grid"/>')
        parts.append(text("-6", f"{py(value) + 4:.1f}", number(value), "end"))
    parts += [text(f"{px(value):.1f}%", top + inner + 17, number(value), "middle") for value in _log_ticks(low_x, high_x)]
    parts.append(text("100%", top + inner + 33, x_label, "end"))
    names = _beside([(px(point.x), py(point.y), point.name) for point in points], (top, top + inner))
    for point, (left, down) in zip(points, names, strict=True):
        x, y = f"{px(point.x):.2f}%", f"{py(point.y):.1f}"
        whisker = f'y1="{py(point.low):.1f}" y2="{py(point.high):.1f}"'
        parts.append(f'<line x1="{x}" x2="{x}" {whisker} style="stroke:{point.colour};stroke-width:2;opacity:.6"/>')
        said = f"{point.name}: {number(point.y)} ({number(point.low)} … {number(point.high)}) at {number(point.x)}"
        parts.append(f'<circle cx="{x}" cy="{y}" r="5" style="fill:{point.colour}"><title>{escape(said)}</title></circle>')
        away = -8 if left else 8
        lead = f'<line x1="0" x2="{away}" y1="0" y2="{down}" class="grid"/>' if down else ""
        name = text(f"{away}", down + 4, point.name, "end" if left else "start")
        parts.append(f'<svg x="{x}" y="{y}" overflow="visible">{lead}{name}</svg>')
    return svg(top + inner + 38, "".join(parts), title, "lines")


_ACROSS, _LETTER, _LETTERS = 640, 7, 14
"""Pixels: a chart's usual width, a letter's width, and the height of a line of letters."""


def _beside(points: Sequence[tuple[float, float, str]], between: tuple[float, float]) -> list[tuple[bool, int]]:
    """Where names stand so that none lies on another or on another's point: whether left of its own point, and how many pixels below it.

    Args:
        points: x in percent, y in pixels, name.
        between: pixels from the top between which there is room; where it is full, a name lies on another.
    """
    boxes = [(_ACROSS * x / 100 - 6, y - 6, _ACROSS * x / 100 + 6, y + 6) for x, y, _ in points]
    found: dict[int, tuple[bool, int]] = {}
    for i in sorted(range(len(points)), key=lambda i: points[i][1]):
        x, y, name = points[i]
        left, across = x > 50, _ACROSS * x / 100
        ends = (across - 8 - _LETTER * len(name), across - 8) if left else (across + 8, across + 8 + _LETTER * len(name))
        steps = [0, *(sign * _LETTERS * n for n in range(1, 2 * len(points) + 1) for sign in (1, -1))]
        steps = [down for down in steps if not down or between[0] <= y + down <= between[1]]
        others = [box for j, box in enumerate(boxes) if j != i]
        tried = [(ends[0], y + down - _LETTERS / 2, ends[1], y + down + _LETTERS / 2) for down in steps]
        free = [not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in others) for a in tried]
        best = free.index(True) if any(free) else 0
        found[i] = (left, steps[best])
        boxes.append(tried[best])
    return [found[i] for i in range(len(points))]


def matrix_table(values: NDArray[np.floating], row: str, column: str, title: str) -> str:
    """Numbers as a table, shaded within each column from its least (darkest) to its greatest; the least is bold."""
    n, m = values.shape
    head = "".join(f"<th class=n>{escape(column)} {c}</th>" for c in range(m))
    body = []
    for r in range(n):
        cells = []
        for c in range(m):
            own = values[:, c]
            if not np.isfinite(own).all():
                cells.append("<td class=n>–</td>")
                continue
            share = 1 - (values[r, c] - own.min()) / ((own.max() - own.min()) or 1.0)
            shown = f"<b>{values[r, c]:.4f}</b>" if r == own.argmin() else f"{values[r, c]:.4f}"
            cells.append(f'<td class=n style="background:color-mix(in srgb,var(--e0) {45 * share:.0f}%,transparent)">{shown}</td>')
        body.append(f"<tr><td>{escape(row)} {r}</td>{''.join(cells)}</tr>")
    table = f'<table class="wide" aria-label="{escape(title)}"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(body)}</tbody></table>'
    return f'<div class="scroll">{table}</div>'


def _log_ticks(low: float, high: float) -> list[float]:
    """At most five values 1, 2 or 5 times a power of ten, between two powers of ten; where these are closer than such values, round ones."""
    decades = [10.0**p for p in range(math.floor(low), math.ceil(high) + 1)]
    found = [m * d for d in decades for m in ((1,) if len(decades) > 3 else (1, 2, 5)) if low <= math.log10(m * d) <= high]
    if len(found) < 2:  # within a part of a decade
        return [value for value in ticks(10**low, 10**high, 4) if low <= math.log10(value) <= high]
    return found[:: math.ceil(len(found) / 5)]


def _rows(rows: Iterable[tuple[str, str, str]], title: str) -> str:
    """A table of (label, HTML of a track, note)."""
    body = "".join(
        f'<tr><td>{escape(label)}</td><td><div class="track">{track}</div></td><td>{escape(note)}</td></tr>' for label, track, note in rows
    )
    return f'<table class="bars" aria-label="{escape(title)}">{body}</table>'


def bar_chart(items: Sequence[tuple[str, float, str, str]], title: str, marks: Sequence[tuple[float, str, str]] = ()) -> str:
    """Horizontal bars: (label, value ≥ 0, what to write at the end, CSS colour); ``marks`` are lines across: (value, CSS class, what it is)."""
    if not items:
        return NOTHING
    top = max(*(value for _, value, _, _ in items), *(value for value, _, _ in marks), 0.0) or 1.0
    lines = "".join(f'<i class="tick {kind}" style="left:{100 * value / top:.2f}%" title="{escape(what)}"></i>' for value, kind, what in marks)
    fill = lambda value, colour: f'<i class="fill" style="width:{100 * value / top:.2f}%;background:{colour}"></i>{lines}'  # noqa: E731
    return _rows([(label, fill(value, colour), note) for label, value, note, colour in items], title)


def interval_chart(items: Sequence[tuple[str, float, float, float, str]], title: str) -> str:
    """Shares with their intervals, a dot and a whisker each: (label, share, low, high, CSS colour)."""
    if not items:
        return NOTHING
    grid = "".join(f'<i class="tick" style="left:{at}%"></i>' for at in (0, 25, 50, 75, 100))
    scale = "".join(f'<i class="at" style="left:{at}%;font-style:normal">{at} %</i>' for at in (0, 50, 100))

    def track(value: float, low: float, high: float, colour: str) -> str:
        whisker = f'<i class="whisker" style="left:{100 * low:.2f}%;width:{100 * (high - low):.2f}%;background:{colour}"></i>'
        return f'{grid}{whisker}<i class="dot" style="left:{100 * value:.2f}%;background:{colour}"></i>'

    return _rows([("", scale, ""), *((label, track(*figures), f"{figures[0]:.0%}") for label, *figures in items)], title)  # type: ignore[arg-type]


def stacked_columns(shares: NDArray[np.floating], title: str, height: float = 120, ends: tuple[str, str] = ("", "")) -> str:
    """One column per step (left to right), filled from the bottom by experts' shares.

    Args:
        shares: (S, K), rows sum to 1 (or to 0 where nothing is known).
        title: for screen readers and the tooltip.
        height: of the columns, in pixels.
        ends: what to write below the first and the last column.
    """
    steps, experts = shares.shape
    column = 1000 / max(1, steps)
    parts = []
    for s in range(steps):
        bottom = height
        for k in range(experts):
            tall = float(shares[s, k]) * height
            if tall > 0.05:
                width = 0.88 * column
                parts.append(f'<rect x="{s * column:.2f}" y="{bottom - tall:.2f}" width="{width:.2f}" height="{tall:.2f}" class="f{k}"/>')
                bottom -= tall
    below = f'<div class="ends"><span>{escape(ends[0])}</span><span>{escape(ends[1])}</span></div>' if any(ends) else ""
    return svg(height, stretched(1000, height, "".join(parts)), title) + below


def share_bar(shares: Sequence[float], title: str) -> str:
    """One bar divided among the experts, numbered where there is room."""
    parts = "".join(f'<i class="g{k}" style="flex:{share:g} 0 0;font-style:normal">{k}</i>' for k, share in enumerate(shares))
    return f'<div class="shares" role="img" aria-label="{escape(title)}" title="{escape(title)}">{parts}</div>'


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
