"""The tables of a comparison as cells of text: claims, ways to draw, unseen combinations. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
from numpy.typing import NDArray

from paris_ray.data.scenes import UNSEEN
from paris_ray.evaluation import compare_cost, compare_measures
from paris_ray.evaluation.compare_claims import BETTER, PUBLISHED_EXPERTS, Claim
from paris_ray.evaluation.compare_plan import MORE_STEPS, QUALITY
from paris_ray.evaluation.compare_protocol import protocol
from paris_ray.evaluation.compare_results import GROUNDED, Results, Way
from paris_ray.evaluation.compare_rows import MAIN, ROWS
from paris_ray.evaluation.intervals import Interval, signed
from paris_ray.pages import charts

# -- claims -------------------------------------------------------------------------------------------------------------

CLAIM_HEADER = (
    "source", "claim", "published", "router", "experts", f"{QUALITY}, first minus second (95 %)", "trainings of that sign", "verdict",
    "objects (95 %)", "distance, second minus first (95 %)",
)  # fmt: skip
VERDICT = CLAIM_HEADER.index("verdict")
THEIRS, OURS, SAME = "blind, as in the papers", "reads the caption", "as the rows have it"


def claims(results: Results, listed: Iterable[Claim], judge: Callable[..., str]) -> list[list[str]]:
    """Cells under :data:`CLAIM_HEADER`: what papers say with their router first, then with the main row's; questions with that alone."""
    found, k = [], results.compare.base.num_experts
    for one in listed:
        text = f"{one.text} ({results.monolith})" if results.monolith and BETTER in (one.better, one.worse) else one.text
        experts = f"{k}, published of {PUBLISHED_EXPERTS}" if one.published != "–" and k != PUBLISHED_EXPERTS else str(k)
        theirs = one.published != "–" and one.blind() is not None
        for blind in (True, False) if theirs else (False,):
            router = THEIRS if blind else OURS if theirs else SAME
            found.append([one.source, text, one.published, router, experts, *_judged(results, one, blind, judge)])
    return found


def _judged(results: Results, claim: Claim, blind: bool, judge: Callable[..., str]) -> list[str]:
    if claim.experts not in (None, results.compare.base.num_experts):
        return [f"the main row has {results.compare.base.num_experts} experts", "–", judge(None), "–", "–"]
    sides = results.sides(claim, blind)
    assert sides is not None
    if missing := [side for side in sides if results.way(side) is None]:
        return [f"no row {', '.join(missing)}", "–", judge(None), "–", "–"]
    interval = results.difference(*sides)
    scored = results.score_difference(*sides) is not None
    objects = results.score_difference(*sides, "objects") if scored else None
    distance = results.distance_difference(*sides) if scored or not results.independent else None
    agree = "–" if interval is None else f"{interval.agree} of {interval.seeds}"
    if open_ := _open(results, claim, sides, interval):
        return ["; ".join([signed(interval), *open_]), agree, judge(None), signed(objects), signed(distance)]
    others = (objects, distance if results.independent else None)
    return [signed(interval), agree, judge(interval, others), signed(objects), signed(distance)]


def _open(results: Results, claim: Claim, sides: tuple[str, str], interval: Interval | None) -> list[str]:
    """Why nothing is told of two sides that are both there, whatever the interval; empty: it decides."""
    found = []
    if interval is None:
        found.append("no scenes and no independent judge")
    elif results.whole(interval) is None:
        found.append(f"{interval.seeds} of {len(results.compare.seeds)} trainings")
    if not any(results.above_chance(side) for side in sides):
        found.append("both at chance")
    if claim.equal and (costs := results.unequal(*sides)) is not None:
        found.append(f"not equal: {costs[0] / 1e9:.3g} and {costs[1] / 1e9:.3g} GFLOP a picture")
    return found


# -- the tables ---------------------------------------------------------------------------------------------------------


def way_header(results: Results) -> tuple[str, ...]:
    """Of :func:`way_rows`."""
    count = results.compare.seen_captions
    pictures = f"{count // 1000}K" if count % 1000 == 0 else str(count)
    of_clusters = "" if results.independent else " (clusters' encoder, decides nothing)"
    names = (f"FID-{pictures}", f"KID-{pictures}") if results.fid else (f"Fréchet distance{of_clusters}",)
    return (
        "way", "what", QUALITY, "95 %", "by chance", "objects", "by chance", *names, "loss", "GFLOP a picture", "rate", "guidance", "steps", "seeds",
    )  # fmt: skip


def way_rows(results: Results) -> list[list[str]]:
    """A row for each way to draw, of captions like those of training; the last one is the originals, as the codec gives them back."""
    found = []
    for way in results.ways.values():
        name = way.key.partition("/")[2]
        loss = results.loss(way.row, f"loss-{name}" if name else "routed")
        distance, kernel = results.distance(way), results.kernel(way)
        wanted = len(results.compare.seeds) if "/expert-" not in way.key else 1
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
                str(len(way.folders)) if len(way.folders) == wanted else f"{len(way.folders)} of {wanted}",
            ]
        )
    return found + _ceiling(results, "seen", 8 if results.fid else 7)


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


UNSEEN_HEADER = (
    "row", "what", QUALITY, "95 %", "by chance", "objects", "by chance", f"{MAIN} minus it, {GROUNDED} (95 %)",
    *(f"of kind {kind}" for kind in UNSEEN),
)  # fmt: skip


def unseen_rows(results: Results) -> list[list[str]]:
    """A row for each row of the comparison, of captions that each have a combination which training never sees."""
    groups, found = results.unseen_groups(), []
    for way in results.unseen.values():
        differences = results.unseen_differences(way.row) if way.row != MAIN else [None] * (1 + len(UNSEEN))
        found.append([way.key, ROWS[way.row].title, *_scored(results, way, groups), *(signed(one) for one in differences)])
    return found + (_ceiling(results, "held_out", len(UNSEEN) + 1) if found else [])


def markdown(results: Results, judged: list[list[str]], asked: list[list[str]]) -> str:
    """The tables as Markdown."""

    def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
        header = list(header)
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])

    return "\n\n".join(
        [
            "Captions like those of training:",
            table(way_header(results), way_rows(results)),
            table(CLAIM_HEADER, judged),
            table(CLAIM_HEADER, asked),
            "Captions with a combination that training never sees, a question of our own:",
            table(UNSEEN_HEADER, unseen_rows(results)),
            *(part for meaning, header, rows in compare_measures.tables(results) for part in (meaning, table(header, rows))),
            table(compare_cost.COLUMNS, compare_cost.matched_table(results.compare, results.plan)),
            *(f"Left out: {one}." for one in results.left_out()),
            protocol(results),
        ]
    )
