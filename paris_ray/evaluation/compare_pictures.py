"""Pictures of a comparison to look at: a column for each caption, a row for each way to draw. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from paris_ray.evaluation import compare_rows
from paris_ray.evaluation.compare_captions import choose
from paris_ray.evaluation.compare_plan import QUALITY
from paris_ray.evaluation.compare_results import Results, Way
from paris_ray.evaluation.compare_rows import MAIN
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import published
from paris_ray.pages import blocks, charts
from paris_ray.storage import Folder

SHOWN = 10
"""Captions of each kind."""

PIXELATED = 72
"""Pictures of so many pixels or fewer are shown with their pixels as squares, not smoothed."""


def pictures(results: Results) -> str:
    """Of captions like those of training, and of those with unseen combinations."""
    seen, unseen = (_grid(results, ways.values(), part) for ways, part in ((results.ways, "seen"), (results.unseen, "held_out")))
    if not seen:
        return blocks.absent("Nothing is drawn yet.")
    said = "A column is a caption with one noise, a row a way to draw: the first captions by hash, the first seed. Nothing chosen."
    if results.array(Folder(results.compare.folder) / "reference", "scores-seen") is not None:
        said += " Framed in green: all that the caption says is there, and nothing else; dashed red: not."
    below = f"<h3>Captions with unseen combinations</h3>{unseen}" if unseen else ""
    return blocks.paragraph(said) + seen + below


def _grid(results: Results, ways: Iterable[Way], part: str) -> str:
    """Empty: nothing is drawn."""
    compare, lines = results.compare, []
    for way in ways:
        folder = way.folders.get(compare.seeds[0])
        found = None if folder is None else results.array(folder, "pictures")
        if folder is not None and found is not None:
            lines.append(_line(way.key, found, results.array(folder, "scores")))
    if not lines:
        return ""
    reference = Folder(compare.folder) / "reference"
    if (original := results.array(reference, f"pictures-{part}")) is not None:
        lines.insert(0, _line("original", original, results.array(reference, f"scores-{part}")))
    head = "".join(f"<th>{charts.escape(caption)}</th>" for caption in _captions(results, part))
    return f'<div class="scroll"><table class="wide gallery"><thead><tr><th></th>{head}</tr></thead><tbody>{"".join(lines)}</tbody></table></div>'


def _captions(results: Results, part: str) -> list[str]:
    """None while there is no corpus."""
    compare = results.compare
    run = Folder(compare_rows.partition_config(compare, MAIN).run_dir)
    if published(run / "corpus") is None:
        return []
    return [one.caption for one in choose(compare, run, part, min(SHOWN, compare.seen_captions if part == "seen" else compare.held_out_captions))]


def _line(name: str, found: NDArray[np.uint8], scores: NDArray[np.floating] | None) -> str:
    cells = []
    for i, one in enumerate(found[:SHOWN]):
        right = None if scores is None else bool(scores[i, SCORES.index(QUALITY)] == 1)
        marks = [] if right is None else ["right" if right else "wrong"]
        kinds = [*marks, *(["pixelated"] if max(one.shape) <= PIXELATED else [])]
        cells.append(f"<td>{blocks.image(charts.picture_uri(one), ', '.join([name, f'picture {i}', *marks]), ' '.join(kinds))}</td>")
    return f"<tr><td>{charts.escape(name)}</td>{''.join(cells)}</tr>"
