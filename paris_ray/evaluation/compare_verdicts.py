"""What is found of two ways to draw, and in which words. No torch.

What decides is the 95 % interval of the difference, the same captions and seeds on both sides: above zero the first is better, below zero worse, and
across zero nobody can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paris_ray.evaluation.compare_claims import ASKED, BETTER_MONOLITH, PRIMARY, PUBLISHED_EXPERTS, SAID, Pair
from paris_ray.evaluation.compare_plan import QUALITY
from paris_ray.evaluation.compare_results import GROUNDED, Results
from paris_ray.evaluation.intervals import Interval

BETTER, WORSE, UNTOLD = "better", "worse", "cannot be told"
UNDERTRAINED, UNMEASURED = "undertrained here", "not measured"

WHOLLY = "wholly right"
"""How the score that decides is called for people."""

HOLDS, FAILS, SPLIT = "holds", "does not hold", "papers contradict one another"
"""Of what papers say of a pair, where it can be told: all of it, nothing of it, some of it."""

LEAST_SEEDS = 3
"""Trainings of each side without which nothing is decided."""

TRAINED = 0.5
"""The share of named things at their place that a side must reach to count as trained: one of two sides must."""

EQUAL = 0.05
"""By what share costs of a picture may differ that are called equal."""


@dataclass(frozen=True)
class Finding:
    """Of a pair.

    Attributes:
        pair: of which.
        state: :data:`BETTER`, :data:`WORSE`, :data:`UNTOLD`, :data:`UNDERTRAINED` or :data:`UNMEASURED`.
        why: reasons of what is not told.
        measure: what decides, in words.
        values: of both sides, in that.
        interval: of first minus second, in a quality that is higher for the better.
        reached: share of named things at their place of both sides, on captions like those of training.
        objects: first minus second of that share; ``None`` on unseen combinations, of which it is part of what decides.
        distance: of Fréchet distances, second minus first.
    """

    pair: Pair
    state: str
    why: tuple[str, ...] = ()
    measure: str = ""
    values: tuple[float, float] | None = None
    interval: Interval | None = None
    reached: tuple[float, float] | None = None
    objects: Interval | None = None
    distance: Interval | None = None

    @property
    def papers(self) -> str:
        """How it is with what papers say: :data:`HOLDS`, :data:`FAILS` or :data:`SPLIT`, and where nothing is told the state."""
        if self.state not in (BETTER, WORSE) or not self.pair.says:
            return self.state
        right = {one.better == (self.state == BETTER) for one in self.pair.says}
        return SPLIT if len(right) == 2 else HOLDS if True in right else FAILS

    def words(self, experts: int) -> str:
        """The verdict: that a paper is reproduced is said of as many experts as papers have only.

        Args:
            experts: of the main row.
        """
        why = f": {'; '.join(self.why)}" if self.why else ""
        if self.state == UNTOLD:
            width = "" if self.interval is None else f" (half-width {half_width(self.interval):.2g})"
            return f"{UNTOLD}{width}{why}"
        if self.state not in (BETTER, WORSE) or not self.pair.says:
            return self.state + why
        yes, no = paper_words(experts)
        if self.papers != SPLIT:
            return f"{self.state}: {yes if self.papers == HOLDS else no}"
        right, wrong = (
            ", ".join(one.paper.partition(" (")[0] for one in self.pair.says if (one.better == (self.state == BETTER)) == is_)
            for is_ in (True, False)
        )
        return f"{self.state}: {yes} as {right} says, not as {wrong} does"


def paper_words(experts: int) -> tuple[str, str]:
    """In which words a paper's comparison is found with so many experts, or is not."""
    return (
        ("reproduced", "not reproduced")
        if experts == PUBLISHED_EXPERTS
        else (f"holds with {experts} experts", f"does not hold with {experts} experts")
    )


def half_width(interval: Interval) -> float:
    """Of an interval."""
    return (interval.high - interval.low) / 2


def told(interval: Interval | None, others: Sequence[Interval | None] = ()) -> str:
    """:data:`BETTER`, :data:`WORSE` or :data:`UNTOLD`, by the interval of (first − second) in a quality that is higher for the better.

    Args:
        interval: of the quality that decides; ``None``: not measured.
        others: of other measures, likewise: one that says the contrary leaves nothing told.
    """
    if interval is None or _side(interval) == 0 or any(other is not None and _side(other) == -_side(interval) for other in others):
        return UNTOLD
    return BETTER if _side(interval) > 0 else WORSE


def _side(interval: Interval) -> int:
    """Of zero on which an interval lies: 1, -1, or 0 where it has zero, or is of too few trainings."""
    return 0 if interval.seeds < LEAST_SEEDS else int(interval.low > 0) - int(interval.high < 0)


def find(results: Results, pair: Pair, blind: bool = False, unseen: bool = False) -> Finding:
    """What is found of a pair.

    Args:
        results: of the comparison.
        pair: whose sides.
        blind: with the papers' router, where the pair has such a form.
        unseen: on captions with combinations that training never sees, which are drawn of rows alone.
    """
    k = results.compare.base.num_experts
    if pair.experts not in (None, k):
        return Finding(pair, UNMEASURED, (f"of {pair.experts} experts, and the main row has {k}",))
    first, second = sides = sides_of(results, pair, blind)
    if missing := dict.fromkeys(_missing(results, side, unseen) for side in sides if results.way(side, unseen) is None):
        return Finding(pair, UNMEASURED, tuple(missing))
    interval = results.difference(first, second, unseen)
    scored = results.score_difference(first, second, unseen=unseen) is not None
    measure = GROUNDED if unseen else WHOLLY if scored else "FID" if results.fid else "Fréchet distance"
    if scored or not results.independent:
        a, b = (results.value(side, GROUNDED if unseen else QUALITY, unseen) for side in sides)
    else:
        a, b = (None if (way := results.way(side)) is None else results.distance(way) for side in sides)
    objects = results.score_difference(first, second, "objects") if scored and not unseen else None
    distance = None if unseen or (results.independent and not scored) else results.distance_difference(first, second)
    c, d = (results.value(side, "objects") for side in sides)
    reached = None if c is None or d is None else (c, d)
    others = {"objects say": objects, "the distance says": distance if results.independent else None}
    state, why = _decided(results, pair, sides, interval, others, reached, unseen)
    return Finding(pair, state, why, measure, None if a is None or b is None else (a, b), interval, reached, objects, distance)


def _decided(
    results: Results,
    pair: Pair,
    sides: tuple[str, str],
    interval: Interval | None,
    others: dict[str, Interval | None],
    reached: tuple[float, float] | None,
    unseen: bool,
) -> tuple[str, tuple[str, ...]]:
    """State and reasons of two sides that are both there."""
    if interval is None:
        return UNTOLD, ("no scenes" if unseen else "no scenes and no independent judge",)
    if not whole(results, interval):
        return UNTOLD, (f"{interval.seeds} of {len(results.compare.seeds)} trainings",)
    if reached is not None and max(reached) < TRAINED:
        return UNDERTRAINED, (f"objects {' and '.join(f'{one:.2f}' for one in reached)}, where one side must reach {TRAINED:g}",)
    why = [] if any(results.above_chance(side, unseen) for side in sides) else ["both at chance"]
    if pair.equal:
        a, b = (results.picture_flops(way) for side in sides if (way := results.way(side)) is not None)
        why += [f"not equal: {a / 1e9:.3g} and {b / 1e9:.3g} GFLOP a picture"] if max(a, b) > (1 + EQUAL) * min(a, b) else []
    why += [f"{who} the contrary" for who, other in others.items() if told(interval, [other]) != told(interval)]
    return (UNTOLD, tuple(why)) if why else (told(interval), ())


def sides_of(results: Results, pair: Pair, blind: bool) -> tuple[str, str]:
    """The ways that a pair is about, with the papers' router or the main row's."""
    sides = (pair.blind() if blind else None) or (pair.first, pair.second)
    first, second = (results.monolith or "monolith" if side == BETTER_MONOLITH else side for side in sides)
    return first, second


def _missing(results: Results, side: str, unseen: bool) -> str:
    row = side.partition("/")[0]
    if row not in results.compare.rows:
        return f"no row {row}"
    if unseen and results.way(side) is not None:
        return "rows alone are drawn of these"
    return f"{side} is not drawn"


def whole(results: Results, interval: Interval | None) -> bool:
    """Whether an interval is of all planned trainings: what is looked at again and again while some are missing, or lost, is told too often."""
    return interval is not None and interval.seeds == len(results.compare.seeds)


Both = tuple[Finding, Finding]
"""Of one pair: on captions like those of training, and on unseen combinations."""


@dataclass(frozen=True)
class Findings:
    """All of a comparison.

    Attributes:
        papers: of what papers speak of, with their router where there is such a form.
        reading: of those of these that have such a form, with a router that reads the caption.
        asked: what critics ask, and we do.
    """

    papers: list[Both]
    reading: list[Both]
    asked: list[Both]

    @property
    def primary(self) -> list[Both]:
        """Of the comparison that was named in advance, with the papers' router and with one that reads."""
        return [both for both in (*self.papers, *self.reading) if both[0].pair == PRIMARY]


def find_all(results: Results) -> Findings:
    """Of all pairs."""

    def both(pair: Pair, blind: bool = False) -> Both:
        return find(results, pair, blind), find(results, pair, blind, unseen=True)

    reading = [both(pair) for pair in SAID if pair.blind() is not None]
    return Findings([both(pair, True) for pair in SAID], reading, [both(pair) for pair in ASKED])
