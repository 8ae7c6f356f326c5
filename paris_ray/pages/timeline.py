"""Bars over time as a picture that stands alone: an SVG file with its own colours, for pages that cannot style it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paris_ray.pages.charts import duration, escape, expert_colours, ticks

WIDTH, LEFT, ROW, TOP = 960, 150, 22, 30
WAITS = "url(#waits)"
STEPS_S = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 28800, 86400)


@dataclass(frozen=True)
class Bar:
    """From when until when something was.

    Attributes:
        start: seconds on the axis.
        end: likewise.
        kind: what gives it its colour; ``None`` for waiting.
        note: what a pointer over it reads.
        broken: it ended by a death.
    """

    start: float
    end: float
    kind: str | None
    note: str = ""
    broken: bool = False


Rows = Sequence[tuple[str, Sequence[Bar]]]


def picture(groups: Sequence[tuple[str, Rows]], title: str) -> str:
    """Groups of rows of bars, one colour for each kind, over one axis of seconds."""
    bars = [bar for _, rows in groups for _, row in rows for bar in row]
    end = max((bar.end for bar in bars), default=1.0)
    kinds = sorted({bar.kind for bar in bars if bar.kind is not None})
    colours = dict(zip(kinds, expert_colours(len(kinds))[0], strict=True))
    scale = (WIDTH - LEFT - 20) / max(end, 1e-9)
    height = TOP + sum(ROW * (len(rows) + 1) for _, rows in groups) + 50
    parts, y = [f'<text x="{LEFT}" y="18" font-weight="bold">{escape(title)}</text>'], TOP
    marks = axis(end)
    for at in marks:
        x = LEFT + at * scale
        parts.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{height - 50}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{height - 36}" text-anchor="middle" fill="#555">{escape(duration(at) if at else "0")}</text>')
    for name, rows in groups:
        parts.append(f'<text x="8" y="{y + 16}" font-weight="bold">{escape(name)}</text>')
        y += ROW
        for label, row in rows:
            parts.append(f'<text x="{LEFT - 8}" y="{y + 15}" text-anchor="end">{escape(label)}</text>')
            for bar in row:
                parts.append(_bar(bar, LEFT + bar.start * scale, max(1.0, (bar.end - bar.start) * scale), y, colours))
            y += ROW
    x = LEFT
    for name, colour in [*colours.items(), *([("waits", WAITS)] if any(bar.kind is None for bar in bars) else [])]:
        parts.append(
            f'<rect x="{x}" y="{height - 22}" width="14" height="12" fill="{colour}"/><text x="{x + 19}" y="{height - 12}">{escape(name)}</text>'
        )
        x += 36 + 7 * len(name)
    if any(bar.broken for bar in bars):
        parts.append(f'<text x="{x}" y="{height - 12}"><tspan fill="#c00" font-weight="bold">✕</tspan> died</text>')
    hatch = (
        '<defs><pattern id="waits" width="6" height="6" patternUnits="userSpaceOnUse" patternTransform="rotate(45)">'
        '<rect width="6" height="6" fill="#eee"/><rect width="2" height="6" fill="#aaa"/></pattern></defs>'
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" viewBox="0 0 {WIDTH} {height}" role="img" '
        f'font-family="sans-serif" font-size="12" fill="#222"><title>{escape(title)}</title>{hatch}'
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


def axis(end: float) -> list[float]:
    """Marks of at most nine round numbers of seconds, minutes, hours."""
    step = next((step for step in STEPS_S if end / step <= 8), None)
    return [n * step for n in range(int(end / step) + 1)] if step else [one for one in ticks(0.0, end, 8) if one <= end]


def _bar(bar: Bar, x: float, width: float, y: float, colours: dict[str, str]) -> str:
    colour = WAITS if bar.kind is None else colours[bar.kind]
    drawn = f'<rect x="{x:.1f}" y="{y + 3}" width="{width:.1f}" height="{ROW - 6}" fill="{colour}"><title>{escape(bar.note)}</title></rect>'
    if bar.broken:
        drawn += f'<text x="{x + width:.1f}" y="{y + 17}" text-anchor="middle" fill="#c00" font-size="16" font-weight="bold">✕</text>'
    return drawn
