"""What papers say of experts and monoliths, and when a measurement says the same. No torch.

Published numbers are FID, lower is better. A claim is a difference between two ways to make pictures; what decides is the interval of that difference
here, the same captions and seeds on both sides: above zero the claim is reproduced, below zero it is not, and across zero nobody can tell.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from paris_ray.evaluation.compare_rows import BLIND, MAIN
from paris_ray.evaluation.intervals import Interval

REPRODUCED, NOT, UNTOLD = "reproduced", "not reproduced", "cannot be told here"

LEAST_SEEDS = 3
"""Trainings of each side without which nothing is decided."""

PUBLISHED_EXPERTS = 8
"""Of all papers' claims here."""

BETTER = "monolith/better"
"""As a side: of the monoliths with an equal training the better one on validation captions."""


@dataclass(frozen=True)
class Claim:
    """One side is better than the other.

    Attributes:
        source: who says so.
        text: in words.
        published: their numbers.
        better: a row, or ``experts/ROUTING``.
        worse: the other one; may be :data:`BETTER`.
        experts: how many the main row must have; ``None``: any.
        equal: a picture of one side must cost what one of the other does.
    """

    source: str
    text: str
    published: str
    better: str
    worse: str
    experts: int | None = None
    equal: bool = False

    def blind(self) -> tuple[str, str] | None:
        """The sides with the papers' router, which does not read the caption; ``None``: a side is a row that has no such form."""
        sides = (self.better, self.worse)
        if not all(side == "monolith" or side.startswith(f"{MAIN}/") for side in sides):
            return None
        # The oracle asks no router.
        better, worse = (side if side in ("monolith", ORACLE) else side.replace(MAIN, BLIND, 1) for side in sides)
        return better, worse


PARIS, DDM, HETEROGENEOUS = "Paris (2510.03434)", "DDM (2501.05450)", "Heterogeneous DDM (2603.06741)"

TOP2, TOP1, FULL, ORACLE = (f"{MAIN}/{routing}" for routing in ("top-2", "top-1", "full", "oracle"))

CLAIMS = (
    Claim(PARIS, "top-2 is better than a monolith", "22.60 against 29.64", TOP2, "monolith"),
    Claim(PARIS, "a monolith is better than top-1", "29.64 against 30.60", "monolith", TOP1),
    Claim(PARIS, "a monolith is better than asking all experts", "29.64 against 47.89", "monolith", FULL),
    Claim(PARIS, "top-2 is better than top-1", "22.60 against 30.60", TOP2, TOP1),
    Claim(PARIS, "top-2 is better than all experts", "22.60 against 47.89", TOP2, FULL),
    Claim(DDM, "top-1 is better than a monolith", "9.84 against 12.81", TOP1, "monolith"),
    Claim(DDM, "top-2 is better than a monolith", "10.31 against 12.81", TOP2, "monolith"),
    Claim(DDM, "asking all experts is better than a monolith", "10.52 against 12.81", FULL, "monolith"),
    Claim(DDM, "top-1 is better than top-2", "9.84 against 10.31", TOP1, TOP2),
    Claim(DDM, "top-1 is better than the oracle", "9.84 against 10.46", TOP1, ORACLE),
    Claim(DDM, "semantic clusters are better than random parts", "far better", TOP2, "random"),
    Claim(DDM, "8 experts are better than 4", "in a figure", TOP2, "experts-4", 8),
    Claim(DDM, "8 experts are better than 16", "in a figure", TOP2, "experts-16", 8),
    Claim(DDM, "a student of the experts is better than a monolith", "7.76 against 7.82, at a third of the compute", "distilled", "monolith"),
    Claim(
        HETEROGENEOUS, "2 DDPM experts among 8 are better than none", "11.88 against 12.45; in another table 32.67 against 20.23", "mixed", TOP2, 8
    ),
)
"""In words as here, so that "better" is always the first side. Not of this comparison: Heterogeneous DDM's diversity within prompts."""

QUESTIONS = (
    Claim("critics", "better than a monolith of equal training and inference FLOPs (wider)?", "–", TOP2, "monolith-inference", equal=True),
    Claim("critics", "better than the monolith with as many FLOPs a picture (more steps)?", "–", TOP2, "monolith/more-steps", equal=True),
    Claim("critics", "better than a monolith with an expert's batch, so of more steps?", "–", TOP2, "monolith-steps"),
    Claim("ours", "are the experts better than the student that learns from them?", "–", TOP2, "distilled"),
    Claim("critics", "better than whichever of these two is better on validation captions?", "–", TOP2, BETTER),
    Claim("ours", "does it help the router to read the caption?", "–", TOP2, BLIND),
    Claim("ours", "is top-2 better than one expert by the caption?", "–", TOP2, f"{MAIN}/caption"),
    Claim("ours", "do experts with initial weights of their own mix better than those that share them?", "–", TOP2, "shared-init"),
    Claim("ours", "are all experts better than 2?", "–", TOP2, "experts-2"),
)


def verdict(interval: Interval | None, others: Sequence[Interval | None] = ()) -> str:
    """Of a claim, by the 95 % interval of (better − worse) in a quality that is higher for the better; ``None``: not measured.

    Args:
        interval: of the quality that decides.
        others: of other measures, likewise: one that says the contrary leaves nothing told.
    """
    if interval is None or _side(interval) == 0 or any(other is not None and _side(other) == -_side(interval) for other in others):
        return UNTOLD
    return REPRODUCED if _side(interval) > 0 else NOT


def _side(interval: Interval) -> int:
    """Of zero on which an interval lies: 1, -1, or 0 where it has zero, or is of too few trainings."""
    return 0 if interval.seeds < LEAST_SEEDS else int(interval.low > 0) - int(interval.high < 0)


def answer(interval: Interval | None, others: Sequence[Interval | None] = ()) -> str:
    """Of a question."""
    return {REPRODUCED: "yes", NOT: "no", UNTOLD: UNTOLD}[verdict(interval, others)]
