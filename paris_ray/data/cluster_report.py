"""What the clusters look like, before anyone pays for training: a contact sheet per expert and one self-contained page. Torch only in a Ray task."""

from __future__ import annotations

import base64
import collections
import html
import io
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from paris_ray.config import OpenMojiSource, RunConfig
from paris_ray.data import schema
from paris_ray.storage import Folder

TILE = 72
"""Side of a picture on a contact sheet, in pixels (or the whole multiple of a smaller picture's side below it)."""

CAPTION_ROWS = 200_000
"""Captions that the terms are taken from, at most; from evenly spaced part files of a larger corpus."""

_CSS = """
:root { --ink: #1d2433; --soft: #667085; --line: #e4e7ec; --paper: #fff; --ground: #f6f7f9; --bar: #3b6fd4; --mark: #d9480f; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ef; --soft: #98a2b3; --line: #2f3747; --paper: #171c26; --ground: #0f131a; --bar: #6b9bff; --mark: #ff8f57; } }
body { margin: 0 auto; max-width: 1040px; padding: 32px 20px 64px; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 26px; margin: 0 0 4px; } h2 { font-size: 18px; margin: 0 0 12px; } p { margin: 4px 0; } .soft { color: var(--soft); }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 20px; margin-top: 18px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
td, th { padding: 5px 8px; text-align: right; font-weight: 400; }
th { color: var(--soft); font-size: 13px; } td:first-child, th:first-child { text-align: left; white-space: nowrap; } td.bar { width: 46%; }
tr + tr td { border-top: 1px solid var(--line); }
.track { position: relative; height: 14px; } .fill { height: 14px; background: var(--bar); border-radius: 3px; }
.tick { position: absolute; top: -3px; bottom: -3px; border-left: 2px solid var(--soft); } .tick.cap { border-color: var(--mark); }
.sheet { width: 100%; image-rendering: pixelated; border-radius: 6px; margin-top: 10px; display: block; }
.term { display: inline-block; border: 1px solid var(--line); border-radius: 12px; padding: 1px 10px; margin: 2px 4px 2px 0; }
.warn { color: var(--mark); font-weight: 600; } .pair { display: grid; grid-template-columns: 1fr 1fr; gap: 24px; }
svg { width: 100%; height: auto; } svg text { fill: var(--soft); font: 12px system-ui, sans-serif; } a { color: inherit; }
"""


# -- contact sheets -----------------------------------------------------------------------------------------------------


def choose(distance: NDArray[np.float32], groups: Sequence[str], n: int) -> tuple[list[int], list[int]]:
    """Rows for a sheet of ``n``: the nearest to the centroid first, then an eighth of the farthest, at most one of each near-duplicate group.

    Args:
        distance: of the expert's rows.
        groups: near-duplicate group of each of them.
        n: pictures.

    Returns:
        positions of the nearest and of the farthest, the farthest last.
    """
    order = np.argsort(distance, kind="stable")
    seen: set[str] = set()
    single = [int(i) for i in order if groups[i] not in seen and not seen.add(groups[i])]  # type: ignore[func-returns-value]
    if len(single) <= n:
        return single, []
    far = n // 8
    return single[: n - far], single[len(single) - far :]


def draw_sheets(config: RunConfig) -> Any:
    """Begin to draw ``clusters/contact-K.png`` in a Ray task; returns its reference."""
    import ray

    run = Folder(config.run_dir)
    labels = schema.read_table(run / "clusters", "labels.parquet", ["expert", "split", "distance"])
    expert, split, distance = (labels[name].to_numpy() for name in ("expert", "split", "distance"))
    groups = pa.chunked_array(
        [chunk for name in schema.parts(run / "corpus") for chunk in schema.read_table(run / "corpus", name, ["group"])["group"].chunks]
    ).to_numpy()
    picks = []
    for k in range(config.num_experts):
        rows = np.flatnonzero((expert == k) & (split == "train"))
        near, far = choose(distance[rows], groups[rows], config.partition.contact_sheet)
        picks.append((rows[near], rows[far]))
    return ray.remote(_draw).options(num_cpus=1).remote(run.uri, picks)


def _draw(run_uri: str, picks: list[tuple[NDArray[np.int64], NDArray[np.int64]]]) -> None:
    import torch

    from paris_ray.data.codec import load_codec

    run = Folder(run_uri)
    codec = load_codec((run / "encoders").uri, run.read_json("encoders/encoders.json")["codec"])
    wanted = np.unique(np.concatenate([rows for pair in picks for rows in pair]))
    images: dict[int, NDArray[np.uint8]] = {}
    for rows, latents in _latents(run / "corpus", wanted):
        decoded = codec.decode(torch.from_numpy(latents.astype(np.float32)))
        images.update(zip(rows.tolist(), decoded, strict=True))
    for k, (near, far) in enumerate(picks):
        png = sheet([images[i] for i in near.tolist()], [images[i] for i in far.tolist()])
        (run / "clusters").write_bytes(f"contact-{k}.png", png)


def _latents(corpus: Folder, wanted: NDArray[np.int64]) -> Any:
    """Rows (ascending) and their latents, one part file after the other; a file without any is not read."""
    first = 0
    for name in schema.parts(corpus):
        with corpus.open(name) as source:
            count = pq.read_metadata(source).num_rows
        here = wanted[(wanted >= first) & (wanted < first + count)]
        if len(here):
            table = schema.read_table(corpus, name, ["latent"]).take(pa.array(here - first))
            yield here, schema.to_numpy(table["latent"])
        first += count


def sheet(near: Sequence[NDArray[np.uint8]], far: Sequence[NDArray[np.uint8]]) -> bytes:
    """A PNG of pictures (H, W, 3) in rows of twelve; the farthest have a frame."""
    from PIL import Image, ImageDraw

    side = (near or far)[0].shape[0]
    shown = side * (TILE // side) if side <= TILE else TILE
    cell, columns = shown + 6, min(12, len(near) + len(far))
    lines = math.ceil((len(near) + len(far)) / columns)
    page = Image.new("RGB", (columns * cell, lines * cell), (246, 247, 249))
    pen = ImageDraw.Draw(page)
    for i, pixels in enumerate(itertools.chain(near, far)):
        x, y = i % columns * cell, i // columns * cell
        if i >= len(near):
            pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=(217, 72, 15))
        picture = Image.fromarray(pixels)
        method = Image.Resampling.NEAREST if side <= TILE else Image.Resampling.LANCZOS
        page.paste(picture.resize((shown, shown), method), (x + 3, y + 3))
    out = io.BytesIO()
    page.save(out, "PNG", optimize=True)
    return out.getvalue()


# -- terms --------------------------------------------------------------------------------------------------------------


def terms(captions: Sequence[str], expert: NDArray[np.int32], num_experts: int, n: int = 10) -> list[list[tuple[str, float]]]:
    """Words that stand out in each expert's captions, with z-scores, best first.

    Log-odds of a caption having the word, in the cluster against the others, with an informative Dirichlet prior, over its standard deviation
    (Monroe, Colaresi & Quinn 2008, eqs. 16 and 22). Words with z > 1.64 in at least two captions.
    """
    counts = [collections.Counter[str]() for _ in range(num_experts)]
    for caption, k in zip(captions, expert.tolist(), strict=True):
        counts[k].update(set(re.findall(r"[^\W\d_]{2,}", caption.lower())))
    every = sum(counts, collections.Counter[str]())
    total = every.total()
    prior = min(500.0, 0.1 * total) / max(total, 1)
    found = []
    for own in counts:
        n_own, scored = own.total(), []
        for word, y in own.items():
            if every[word] == total:
                continue  # the only word of all captions tells nothing apart, and its odds are infinite
            a, rest = prior * every[word], every[word] - y
            a0 = prior * total
            delta = math.log((y + a) / (n_own + a0 - y - a)) - math.log((rest + a) / (total - n_own + a0 - rest - a))
            z = delta / math.sqrt(1 / (y + a) + 1 / (rest + a))
            if z > 1.64 and y >= 2:
                scored.append((word, z))
        found.append(sorted(scored, key=lambda pair: (-pair[1], pair[0]))[:n])
    return found


def _caption_terms(run: Folder, num_experts: int) -> list[list[tuple[str, float]]]:
    corpus = run / "corpus"
    expert = schema.read_table(run / "clusters", "labels.parquet", ["expert"])["expert"].to_numpy()
    step = math.ceil(len(expert) / CAPTION_ROWS)
    captions: list[str] = []
    kept: list[NDArray[np.int32]] = []
    first = 0
    for i, name in enumerate(schema.parts(corpus)):
        with corpus.open(name) as source:
            count = pq.read_metadata(source).num_rows
        if i % step == 0:
            captions += schema.read_table(corpus, name, ["caption"])["caption"].to_pylist()
            kept.append(expert[first : first + count])
        first += count
    return terms(captions, np.concatenate(kept), num_experts)


# -- the page -----------------------------------------------------------------------------------------------------------


def write_report(config: RunConfig, sheets: Any) -> None:
    """Wait for the contact sheets and write ``clusters/report.html``: one file, nothing loaded from elsewhere."""
    import ray

    ray.get(sheets)
    run = Folder(config.run_dir)
    pictures = [run.read_bytes(f"clusters/contact-{k}.png") for k in range(config.num_experts)]
    attribution = None
    if isinstance(config.data.source, OpenMojiSource):
        from paris_ray.data.openmoji import ATTRIBUTION

        attribution = ATTRIBUTION
    page = render(config.name, run.read_json("clusters/clusters.json"), _caption_terms(run, config.num_experts), pictures, attribution)
    run.write_bytes("clusters/report.html", page.encode())


def render(
    name: str, clusters: dict[str, Any], words: list[list[tuple[str, float]]], pictures: Sequence[bytes], attribution: str | None = None
) -> str:
    """The page, from ``clusters.json``, the terms and the contact sheets (PNG) of each expert."""
    sizes, fine = clusters["sizes"], clusters["fine_sizes"]
    total, k = sum(sizes), len(sizes)
    longest = max(*sizes, clusters["cap"] or 0.0, total / k)
    ticks = f'<i class="tick" style="left:{100 * total / k / longest:.2f}%" title="equal share"></i>'
    if clusters["cap"]:
        ticks += f'<i class="tick cap" style="left:calc({100 * clusters["cap"] / longest:.2f}% - 2px)" title="cap"></i>'
    rows = "".join(
        f'<tr><td><a href="#expert-{i}">Expert {i}</a></td><td>{size:,}</td><td>{size / total:.1%}</td><td>{size * k / total:.2f} ×</td>'
        f'<td class="bar"><div class="track"><div class="fill" style="width:{100 * size / longest:.2f}%"></div>{ticks}</div></td></tr>'
        for i, size in enumerate(sizes)
    )
    cards = "".join(
        f'<section id="expert-{i}"><h2>Expert {i} <span class="soft">· {size:,} training rows</span></h2><p>{_words(words[i])}</p>'
        f'<img class="sheet" alt="Pictures of expert {i}, nearest to its centroid first" src="data:image/png;base64,'
        f'{base64.b64encode(png).decode()}">'
        "</section>"
        for i, (size, png) in enumerate(zip(sizes, pictures, strict=True))
    )
    splits = ", ".join(f"{clusters['splits'][split]:,} {split.replace('_', '-')}" for split in schema.SPLITS)
    warnings = "".join(f'<p class="warn">{html.escape(line)}</p>' for line in warn(clusters))
    credit = f'<p class="soft">{html.escape(attribution)}</p>' if attribution else ""
    curves = "".join(
        f"<div><h2>{title}</h2>{curve(values)}</div>"
        for title, values in (("Fine clusters: inertia", clusters["inertia"][0]), ("Coarse clusters: inertia", clusters["inertia"][1]))
    )
    cap = f", orange line: cap of {clusters['cap']:,.0f}" if clusters["cap"] else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Clusters of {html.escape(name)}</title><style>{_CSS}</style></head><body>
<h1>Clusters of {html.escape(name)}</h1>
<p class="soft">{k} experts over {len(fine)} fine clusters, {clusters["metric"]} k-means; rows: {splits}.</p>{credit}
<section><h2>Sizes</h2>
<p>The largest expert has <b>{clusters["imbalance"]:.2f} ×</b> an equal share;
the largest fine cluster has {max(fine):,} rows, the smallest {min(fine):,}.</p>
{warnings}
<table><tr><th>expert</th><th>rows</th><th>share</th><th>of equal</th><th>grey line: equal share{cap}</th></tr>{rows}</table></section>
<section><div class="pair">{curves}</div>
<p class="soft">Sum of squared distances after each iteration{"" if clusters["converged"] else "; the fine level stopped at its limit of iterations"}.
Where the coarse curve rises, it is the price of the cap.</p></section>
<p class="soft" style="margin-top:18px">Below: decoded latents, nearest to the centroid first; framed in orange, some of the farthest.
One of each near-duplicate group. Words: captions' log-odds against the other experts.</p>
{cards}</body></html>
"""


def warn(clusters: dict[str, Any]) -> list[str]:
    """What somebody should know before training."""
    lines = []
    if clusters["over_cap"]:
        over = ", ".join(map(str, clusters["over_cap"]))
        lines.append(f"No packing within the cap of {clusters['cap']:.0f} rows was found: experts {over} are above it. Raise partition.fine.")
    if clusters["imbalance"] > 2:
        lines.append("One expert has more than twice an equal share: consider partition.max_share.")
    share, fine = clusters["largest_fine_share"], clusters["fine_sizes"]
    if share > 0.5 and max(fine) > 4 * sum(fine) / len(fine):
        lines.append(f"One fine cluster is {share:.2f} of an expert's equal share: a catch-all. Raise partition.fine, or look at its pictures.")
    return lines


def _words(words: list[tuple[str, float]]) -> str:
    if not words:
        return '<span class="soft">No caption word stands out.</span>'
    return "".join(f'<span class="term" title="z = {z:.1f}">{html.escape(word)}</span>' for word, z in words)


def curve(values: Sequence[float]) -> str:
    """A line chart as inline SVG."""
    width, height, left, bottom = 460, 190, 64, 26
    low, high = min(values), max(values)
    span = (high - low) or max(abs(high), 1.0)
    xs = [left + (width - left - 8) * i / max(len(values) - 1, 1) for i in range(len(values))]
    ys = [8 + (height - bottom - 16) * (high - value) / span for value in values]
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in zip(xs, ys, strict=True))
    ends = ((8, high), (height - bottom - 8, low))
    labels = "".join(f'<text x="{left - 8}" y="{y + 4:.0f}" text-anchor="end">{value:.4g}</text>' for y, value in ends)
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="from {values[0]:.4g} to {values[-1]:.4g}">{labels}'
        f'<line x1="{left}" x2="{width - 8}" y1="{height - bottom}" y2="{height - bottom}" stroke="var(--line)"/>'
        f'<polyline points="{points}" fill="none" stroke="var(--bar)" stroke-width="2"/>'
        f'<circle cx="{xs[-1]:.1f}" cy="{ys[-1]:.1f}" r="3" fill="var(--bar)"/>'
        f'<text x="{left}" y="{height - 6}">1</text><text x="{width - 8}" y="{height - 6}" text-anchor="end">iteration {len(values)}</text></svg>'
    )
