"""The tables of a comparison as cells of text: pairs, ways to draw, unseen combinations. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from paris_ray.data.scenes import UNSEEN
from paris_ray.evaluation.compare_claims import BETTER_MONOLITH, DDM, PARIS, Pair
from paris_ray.evaluation.compare_plan import MORE_STEPS, QUALITY
from paris_ray.evaluation.compare_results import GROUNDED, Results, Way
from paris_ray.evaluation.compare_rows import MAIN, ROWS
from paris_ray.evaluation.compare_verdicts import BETTER, FAILS, HOLDS, UNMEASURED, WHOLLY, WORSE, Both
from paris_ray.evaluation.intervals import signed
from paris_ray.pages import charts
from paris_ray.storage import Folder

# -- pairs --------------------------------------------------------------------------------------------------------------

PAIR_HEADER = (
    "comparison", "found here", "on unseen combinations", "first and second", "first minus second (95 %)", "trainings of that sign", "objects (95 %)",
    "distance, second minus first (95 %)",
)  # fmt: skip
SAID_HEADER = (*PAIR_HEADER[:3], "Paris says", "DDM says", *PAIR_HEADER[3:])


def pair_rows(results: Results, found: Iterable[Both]) -> list[list[str]]:
    """Cells under :data:`PAIR_HEADER`, a row for each pair."""
    k, cells = results.compare.base.num_experts, []
    for seen, unseen in found:
        more = "" if unseen.interval is None else f"; {signed(unseen.interval)}"
        rare = unseen.state if unseen.state == UNMEASURED and unseen.why == seen.why else unseen.words(k)
        values = "–" if seen.values is None else f"{seen.measure} {seen.values[0]:.3f} and {seen.values[1]:.3f}"
        objects = "–" if seen.reached is None else f"{seen.reached[0]:.2f} and {seen.reached[1]:.2f}; {signed(seen.objects)}"
        agree = "–" if seen.interval is None else f"{seen.interval.agree} of {seen.interval.seeds}"
        text = f"{seen.pair.text} ({results.monolith})" if results.monolith and seen.pair.second == BETTER_MONOLITH else seen.pair.text
        cells.append([text, seen.words(k), rare + more, values, signed(seen.interval), agree, objects, signed(seen.distance)])
    return cells


def said_rows(results: Results, found: Sequence[Both]) -> list[list[str]]:
    """Cells under :data:`SAID_HEADER`."""
    return [
        [*cells[:3], _says(seen.pair, paris=True), _says(seen.pair, paris=False), *cells[3:]]
        for (seen, _), cells in zip(found, pair_rows(results, found), strict=True)
    ]


def _says(pair: Pair, paris: bool) -> str:
    """What Paris says of the first side, or the others."""
    found = [one for one in pair.says if (one.paper == PARIS) == paris]
    names = {one: "" if one.paper in (PARIS, DDM) else f"{one.paper}: " for one in found}
    return "; ".join(f"{names[one]}{BETTER if one.better else WORSE}, {one.published}" for one in found) or "–"


def kinds(found: Iterable[Both]) -> list[str]:
    """Of each pair, for its colour."""
    return [{HOLDS: "right", FAILS: "wrong"}.get(seen.papers, "") or {BETTER: "right", WORSE: "wrong"}.get(seen.papers, "") for seen, _ in found]


# -- the tables ---------------------------------------------------------------------------------------------------------


def way_header(results: Results) -> tuple[str, ...]:
    """Of :func:`way_rows`."""
    count = results.compare.seen_captions
    pictures = f"{count // 1000}K" if count % 1000 == 0 else str(count)
    of_clusters = "" if results.independent else " (clusters' encoder, decides nothing)"
    names = (f"FID-{pictures}", f"KID-{pictures}") if results.fid else (f"Fréchet distance{of_clusters}",)
    return (
        "way", "what", WHOLLY, "95 %", "by chance", "objects", "by chance", *names, "loss", "GFLOP a picture", "rate", "guidance", "steps", "seeds",
    )  # fmt: skip


def way_rows(results: Results) -> list[list[str]]:
    """A row for each way to draw, of captions like those of training; the last one is the originals, as the codec gives them back."""
    found = []
    for way in results.ways.values():
        name = way.key.partition("/")[2]
        loss = results.loss(way.row, f"loss-{name}" if name else "routed")
        distance, kernel = results.distance(way), results.kernel(way)
        found.append(
            [
                way.key,
                _title(way),
                *_scored(results, way),
                "–" if distance is None else charts.number(distance),
                *(["–" if kernel is None else f"{kernel:.3g}"] if results.fid else []),
                "–" if loss is None else f"{loss:.4f}",
                f"{results.picture_flops(way) / 1e9:.3g}",
                f"{results.plan.rate(way.row):g}",
                f"{way.drawing.guidance:g}",
                str(way.drawing.steps),
                _seeds(results, way),
            ]
        )
    return found + _ceiling(results, "seen", 8 if results.fid else 7)


def _seeds(results: Results, way: Way) -> str:
    wanted = len(results.compare.seeds) if "/expert-" not in way.key else 1
    return str(wanted) if len(way.folders) == wanted else f"{len(way.folders)} of {wanted}"


def _title(way: Way) -> str:
    name = way.key.partition("/")[2]
    return ("the same, with more steps" if name == MORE_STEPS else name) or ROWS[way.row].title


def _scored(results: Results, way: Way, groups: NDArray[np.int64] | None = None) -> list[str]:
    """Scores of scenes and what chance gives."""
    found = []
    for name in (QUALITY, "objects"):
        quality, chance = results.quality(way, name, groups), results.chance(way, name)
        found.append("–" if quality is None else f"{quality.value:.3f}")
        if name == QUALITY:
            found.append("–" if quality is None else f"{quality.low:.3f} … {quality.high:.3f}")
        found.append("–" if chance is None else f"{chance:.3f}")
    return found


def _ceiling(results: Results, part: str, rest: int) -> list[list[str]]:
    right, objects = results.ceiling(part), results.ceiling(part, "objects")
    if right is None or objects is None:
        return []
    said = "as the codec gives them back: the most that can be"
    return [["originals", said, f"{right:.3f}", "–", "–", f"{objects:.3f}", *["–"] * (rest + 1)]]


def unseen_header(results: Results) -> tuple[str, ...]:
    """Of :func:`unseen_rows`, with the number of combinations that each difference is of."""
    groups = results.array(Folder(results.compare.folder) / "reference", "groups-held_out")
    combinations = ["" if groups is None else f" ({len(np.unique(groups[groups[:, 1] == kind, 0]))} combinations)" for kind in range(len(UNSEEN))]
    of_all = "" if groups is None else f" of {len(np.unique(groups[:, 0]))} combinations"
    return (
        "row", "what", WHOLLY, "95 %", "by chance", "objects", "by chance", "seeds", f"{MAIN} minus it, {GROUNDED}{of_all} (95 %)",
        *(f"of kind {kind}{count}" for kind, count in zip(UNSEEN, combinations, strict=True)),
    )  # fmt: skip


def unseen_rows(results: Results) -> list[list[str]]:
    """A row for each row of the comparison, of captions that each have a combination which training never sees."""
    groups, found = results.unseen_groups(), []
    for way in results.unseen.values():
        differences = results.unseen_differences(way.row) if way.row != MAIN else [None] * (1 + len(UNSEEN))
        found.append([way.key, ROWS[way.row].title, *_scored(results, way, groups), _seeds(results, way), *map(signed, differences)])
    return found + (_ceiling(results, "held_out", len(UNSEEN) + 2) if found else [])
