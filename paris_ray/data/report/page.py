"""``clusters/report.html``: the clusters to look at, and their figures to read, on one self-contained page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray.data import schema
from paris_ray.data.report import cost
from paris_ray.pages import blocks, charts
from paris_ray.pages.charts import escape, number

CAPTION_CHARS = 160
"""Longer captions are cut on the page."""


READ = ("listed", "rows", "rejected", "reasons", "examples", "groups", "near_duplicates", "split_changed", "unchecked", "enlarged", "captions_cut")
"""What of the corpus' counts is on the page."""


@dataclass(frozen=True)
class Map:
    """The sample and the centroids on a plane.

    Attributes:
        points: sampled rows of each expert, (n, 2).
        fine: fine centroids, (F, 2).
        fine_expert: the expert of each, (F,).
        variance: shares of the sample's variance along the two axes.
    """

    points: list[NDArray[np.float64]]
    fine: NDArray[np.float64]
    fine_expert: NDArray[np.integer]
    variance: tuple[float, float]


def render(report: dict[str, Any], where: Map, sheets: Sequence[bytes], attribution: str | None = None) -> str:
    """The page.

    Args:
        report: the content of ``report.json``.
        where: the map.
        sheets: the contact sheet (PNG) of each expert.
        attribution: the credit that the pictures need.
    """
    experts = len(report["sizes"])
    parts = [
        ("sizes", "Sizes", _sizes(report)),
        *([("read", "What was read", _read(report["read"]))] if report["read"] else []),
        ("cost", "What training will cost", _cost(report)),
        ("map", "Map", _map(report, where)),
        ("apart", "How far apart they are", _silhouette(report)),
        *([("k-means", "How k-means went", _curves(report))] if report["method"] == "kmeans" else []),
        ("experts", "What each expert will see", _experts(report, sheets)),
    ]
    splits = ", ".join(f"{number(report['splits'][split])} {split.replace('_', '-')}" for split in schema.SPLITS if report["splits"].get(split))
    made = (
        f"over {len(report['fine_sizes'])} fine clusters, {report['metric']} k-means" if report["method"] == "kmeans" else "at random, as a control"
    )
    lead = f"{experts} experts {made}. Rows: {splits}. This page is of version 1 of the clusters: rows that are appended later are not on it."
    warnings = "".join(blocks.paragraph(line, "warn") for line in report["warnings"])
    credit = f"<footer><p><small>{escape(attribution)}</small></p></footer>" if attribution else ""
    title = f"Clusters of {report['name']}"
    head = f"<h1>{escape(title)}</h1>" + blocks.paragraph(lead, "lead") + warnings
    body = "".join(blocks.section(*part) for part in parts)
    return blocks.page(title, head + blocks.navigation((anchor, name) for anchor, name, _ in parts) + body + credit, experts)


def warn(clusters: dict[str, Any]) -> list[str]:
    """What of the clusters somebody should know before training."""
    lines = []
    if unwatched := [str(k) for k, rows in enumerate(clusters["sizes_validation"]) if not rows]:
        lines.append(f"No validation row has expert {', '.join(unwatched)}: its loss cannot be watched. Raise data.split.validation_rows.")
    if clusters["over_cap"]:
        over = ", ".join(map(str, clusters["over_cap"]))
        lines.append(f"No packing within the cap of {clusters['cap']:.0f} rows was found: experts {over} are above it. Raise partition.fine.")
    if clusters["imbalance"] > 2:
        lines.append("One expert has more than twice an equal share: consider partition.max_share.")
    share, fine = clusters["largest_fine_share"], clusters["fine_sizes"]
    if share > 0.5 and max(fine) > 4 * sum(fine) / len(fine):
        lines.append(f"One fine cluster is {share:.2f} of an expert's equal share: a catch-all. Raise partition.fine, or look at its pictures.")
    return lines


def _sizes(report: dict[str, Any]) -> str:
    sizes, fine, cap = report["sizes"], report["fine_sizes"], report["cap"]
    total, k = sum(sizes), len(sizes)
    marks = [(total / k, "strong", "equal share"), *([(cap, "cap", "cap")] if cap else [])]
    bars = [
        (f"expert {i}", size, f"{number(size)} · {size / total:.1%} · {size * k / total:.2f} × · {number(watched)}", f"var(--e{i})")
        for i, (size, watched) in enumerate(zip(sizes, report["sizes_validation"], strict=True))
    ]
    said = (
        f"The largest expert has {report['imbalance']:.2f} × an equal share of the training rows. The largest fine cluster has "
        f"{number(max(fine))} rows, the smallest {number(min(fine))}."
    )
    dashed = f"; dashed: the cap of {number(cap)}" if cap else ""
    lines = f"Training rows, their share of all, how many times an equal share (grey line) they are, and rows for validation{dashed}."
    return blocks.paragraph(said) + blocks.paragraph(lines, "muted") + charts.bar_chart(bars, "Training rows of each expert", marks)


def _read(counts: dict[str, Any]) -> str:
    said = (
        f"{number(counts['listed'])} rows were read and {number(counts['rejected'])} refused. Of the {number(counts['rows'])} others "
        f"{number(counts['near_duplicates'])} look nearly like another (their perceptual hashes, which ignore colour, differ by three bits or "
        f"fewer) and share its split; {number(counts['split_changed'])} changed theirs for it."
    )
    more = [
        ("enlarged", "pictures are smaller than data.image_size and were enlarged"),
        ("captions_cut", "captions are longer than the text encoder reads and were cut"),
        ("unchecked", "pictures look so much like very many others that not all pairs were compared"),
    ]
    said += "".join(f" {number(counts[name])} {what}." for name, what in more if counts[name])
    if not counts["rejected"]:
        return blocks.paragraph(said)
    reasons = sorted(counts["reasons"].items(), key=lambda one: (-one[1], one[0]))
    rows = [[reason, n, f"{n / counts['listed']:.1%}", ", ".join(_cut(name, 60) for name in counts["examples"][reason])] for reason, n in reasons]
    return blocks.paragraph(said) + blocks.table(["refused because of", "rows", "of all", "such as"], rows, (1, 2))


def _cost(report: dict[str, Any]) -> str:
    found = report["cost"]
    devices = list(found["peak_tflops"])
    header = ["stage", "rows", "images", "passes", "GFLOP/image", "PFLOP", *(f"on one {device}" for device in devices)]
    rows = [
        [
            line["stage"],
            *(number(line[key]) for key in ("rows", "images", "passes")),
            number(line["flops_per_image"] / 1e9),
            number(line["flops"] / 1e15),
        ]
        + [cost.time_text(line["gpu_hours"][device]) for device in devices]
        for line in found["stages"]
    ]
    images, flops = (number(sum(line[key] for line in found["stages"]) / unit) for key, unit in (("images", 1), ("flops", 1e15)))
    rows.append(
        ["all", "", images, "", "", flops, *(cost.time_text(sum(line["gpu_hours"][device] for line in found["stages"])) for device in devices)]
    )
    slowest = next(line for line in found["stages"] if line["stage"] == found["critical"])
    times = ", ".join(f"{cost.time_text(slowest['gpu_hours'][device] / slowest['workers'])} on {device}" for device in devices)
    workers = f" with its {slowest['workers']} workers" if slowest["workers"] > 1 else ""
    said = f"The critical one is {slowest['stage']}: when all experts train at once, the run is as long as it takes"
    said += (
        f", {times}{workers}." if slowest["gpus"] else ". It asks for no GPU, so the times are what one would take at best, not what this run takes."
    )
    peaks = ", ".join(f"{device} {peak:g}" for device, peak in found["peak_tflops"].items())
    how = (
        "An estimate, not a measurement. Images follow from the config as it stood when this page was written; run_all --dry-run counts them anew. "
        "Arithmetic is counted from the networks' shapes: three forward passes an image (four with gradient checkpointing), two operations for each "
        f"multiply-add. Times assume one GPU at {found['mfu']:.0%} of its dense bfloat16 peak ({peaks} TFLOP/s): float32, a small model or a small "
        "batch reach far less. Not in it: embedding, validation, and encoding captions anew where token ids are stored (about 1.5 % for DiT-XL/2)."
    )
    return blocks.paragraph(said) + blocks.table(header, rows, range(1, len(header)), [len(rows) - 1]) + f"<p><small>{escape(how)}</small></p>"


def _map(report: dict[str, Any], where: Map) -> str:
    x, y = where.variance
    shown = sum(len(points) for points in where.points)
    said = (
        f"{number(shown)} training rows, chosen by hash of their ids, at least {report['map']['at_least']} of each expert where it has them. "
        f"Principal components of their embeddings: across {x:.1%} of the variance, up {y:.1%}. The other {max(0.0, 1 - x - y):.0%} cannot be seen "
        "here, so what overlaps on the map may be apart. Rings are fine centroids; numbers stand at the middle of each expert's rows."
    )
    legend = charts.legend((f"expert {k}", f"var(--e{k})") for k in range(len(where.points)))
    return blocks.paragraph(said) + draw_map(where) + legend


def draw_map(where: Map) -> str:
    """The map as SVG: a dot for each row, a ring for each fine centroid, a number for each expert."""
    everything = np.concatenate([*where.points, where.fine])
    low, high = everything.min(0), everything.max(0)
    scale = 960 / max(float((high - low)[0]), float((high - low)[1]) / 0.72, 1e-12)  # one scale for both axes
    height = max(240.0, scale * float((high - low)[1]) + 40)
    middle = (low + high) / 2
    place = lambda points: np.array([500.0, height / 2]) + (points - middle) * np.array([scale, -scale])  # noqa: E731
    dots, rings = [], []
    for k, points in enumerate(where.points):
        dots.append(f'<path d="{_dots(place(points))}" class="dots s{k}" style="stroke-width:3.5px;opacity:.55"/>')
        own = _dots(place(where.fine[where.fine_expert == k]))
        # A ring is a large dot under a smaller one under a colour's.
        rings += [f'<path d="{own}" class="dots{css}" style="stroke-width:{width}px{ink}"/>' for css, width, ink in _ring(k)]
    middles = [place(np.median(points, 0, keepdims=True))[0] for points in where.points if len(points)]
    numbers = [k for k, points in enumerate(where.points) if len(points)]
    labels = "".join(
        charts.text(f"{x / 10:.1f}%", f"{100 * y / height:.1f}%", k, "middle", "label") for k, (x, y) in zip(numbers, apart(middles), strict=True)
    )
    body = charts.stretched(1000, height, "".join(dots + rings)) + labels
    return charts.svg(None, body, "Map of the clusters", style=f"aspect-ratio:1000/{height:.0f}")


def _ring(k: int) -> list[tuple[str, float, str]]:
    return [("", 11, ";stroke:var(--ink)"), ("", 9, ";stroke:var(--bg)"), (f" s{k}", 7, "")]


def _dots(points: NDArray[np.float64]) -> str:
    """Lines of no length, which their round ends make dots: a few bytes a point."""
    return "".join(f"M{x:.0f} {y:.0f}h0" for x, y in points)


def apart(places: Sequence[NDArray[np.float64]]) -> list[tuple[float, float]]:
    """Places of labels, each moved down until it covers no earlier one; in thousandths of the width."""
    done: list[tuple[float, float]] = []
    for x, y in places:
        while any(abs(x - a) < 40 and abs(y - b) < 44 for a, b in done):
            y += 4  # noqa: PLW2901
        done.append((float(x), float(y)))
    return done


def _silhouette(report: dict[str, Any]) -> str:
    found = report["silhouette"]
    if found is None:
        return blocks.absent("Needs rows of two experts.")
    said = (
        "The silhouette says for each picture whether it is nearer to its own cluster than to the next one: 1 far nearer, 0 between the two, below 0 "
        f"nearer to the other. Here it is {found['overall']:.3f} on average, on a sample of {number(found['rows'])} rows, weighted by the experts' "
        "sizes. Semantic clusters of natural images are typically low, between 0 and 0.1: they shade into one another, and experts do not need gaps "
        "between them. Look instead for an expert far below the others: its pictures have little in common."
    )
    rows = [
        [f"expert {k}", "–" if value is None else f"{value:.3f}", count]
        for k, (value, count) in enumerate(zip(found["experts"], found["sampled"], strict=True))
    ]
    return blocks.paragraph(said) + blocks.table(["expert", "mean silhouette", "rows in the sample"], rows, (1, 2))


def _curves(report: dict[str, Any]) -> str:
    fine, coarse = report["inertia"]
    drawn = [
        f"<div><h3>{level} clusters</h3>"
        + charts.line_chart([charts.Series(level, range(1, len(values) + 1), values, "var(--accent)")], "iteration", "inertia", f"Inertia: {level}")
        + "</div>"
        for level, values in (("Fine", fine), ("Coarse", coarse))
    ]
    said = (
        f"Sum of squared distances after each iteration{'' if report['converged'] else '; the fine level stopped at its limit of iterations'}. "
        "Where the coarse curve rises, it is the price of the cap."
    )
    return blocks.paragraph(said) + f'<div class="two">{"".join(drawn)}</div>'


def _experts(report: dict[str, Any], sheets: Sequence[bytes]) -> str:
    intro = (
        f"Nearest to the centroid first; framed, some of the farthest. One of each near-duplicate group. {blocks.CODEC_NOTE} "
        "Words: captions' log-odds against the other experts."
    )
    cards = []
    for k, (own, png, size) in enumerate(zip(report["experts"], sheets, report["sizes"], strict=True)):
        words = "".join(f'<span class="term" title="z = {term["z"]:.1f}">{escape(term["word"])}</span>' for term in own["terms"])
        text = f"Contact sheet of expert {k}: nearest {_some(own['nearest'])}" + (
            f"; farthest {_some(own['farthest'][::-1])}" if own["farthest"] else ""
        )
        picture = blocks.image(charts.data_uri(png, "image/png"), text, "contact")
        cards.append(
            f'<section id="expert-{k}"><h3><i class="swatch g{k}"></i>expert {k} <small>{number(size)} training rows</small></h3>'
            + (f"<p>{words}</p>" if words else blocks.absent("No caption word stands out."))
            + f'<div class="scroll">{picture}</div>{_captions(own)}</section>'
        )
    return blocks.paragraph(intro) + "".join(cards)


def _captions(own: dict[str, Any]) -> str:
    """The captions of a sheet, in its order."""
    listed = "".join(f"<li>{escape(_cut(row['caption']))}</li>" for row in own["nearest"])
    listed += "".join(f"<li>{escape(_cut(row['caption']))} <b>(far)</b></li>" for row in own["farthest"])
    return f'<details><summary>Captions of these pictures, row by row</summary><ol class="captions">{listed}</ol></details>'


def _some(rows: Sequence[dict[str, Any]]) -> str:
    return ", ".join(f"“{_cut(row['caption'], 60)}”" for row in rows[:3])


def _cut(caption: str, length: int = CAPTION_CHARS) -> str:
    return caption if len(caption) <= length else caption[: length - 1] + "…"


def warnings(report: dict[str, Any]) -> list[str]:
    """What somebody should know before training: of the clusters and of the budgets."""
    return [*warn(report), *cost.warnings(report["cost"])]
