"""What papers say of experts and monoliths: two ways to draw, and which of them is better. No torch.

Published numbers are FID, lower is better. What is found here is in :mod:`paris_ray.evaluation.compare_verdicts`.
"""

from __future__ import annotations

from dataclasses import dataclass

from paris_ray.evaluation.compare_rows import BLIND, MAIN

PUBLISHED_EXPERTS = 8
"""Of all papers' comparisons here."""

BETTER_MONOLITH = "monolith/better"
"""As a side: of the monoliths with an equal training the better one on validation captions."""


@dataclass(frozen=True)
class Saying:
    """What a paper says of a pair.

    Attributes:
        paper: who says it.
        better: whether of the first side that it is better; else that the second is.
        published: their numbers, of the first side and of the second.
    """

    paper: str
    better: bool
    published: str


@dataclass(frozen=True)
class Pair:
    """Two ways to draw that are compared. No two pairs have the same sides.

    Attributes:
        text: in words, the first side first.
        first: a row, or ``experts/ROUTING``.
        second: the other one; may be :data:`BETTER_MONOLITH`.
        says: what papers say of it; nothing where critics ask, or we do.
        experts: how many the main row must have; ``None``: any.
        equal: a picture of one side must cost what one of the other does.
    """

    text: str
    first: str
    second: str
    says: tuple[Saying, ...] = ()
    experts: int | None = None
    equal: bool = False

    def blind(self) -> tuple[str, str] | None:
        """The sides with the papers' router, which does not read the caption; ``None``: a side is a row that has no such form."""
        sides = (self.first, self.second)
        if not all(side == "monolith" or side.startswith(f"{MAIN}/") for side in sides):
            return None
        # The oracle asks no router.
        first, second = (side if side in ("monolith", ORACLE) else side.replace(MAIN, BLIND, 1) for side in sides)
        return first, second


PARIS, DDM, HETEROGENEOUS = "Paris (2510.03434)", "DDM (2501.05450)", "Heterogeneous DDM (2603.06741)"

TOP2, TOP1, FULL, ORACLE = (f"{MAIN}/{routing}" for routing in ("top-2", "top-1", "full", "oracle"))

PRIMARY = Pair("top-2 against a monolith", TOP2, "monolith", (Saying(PARIS, True, "22.60 against 29.64"), Saying(DDM, True, "10.31 against 12.81")))
"""The one comparison that was named before any judged picture was drawn; all others are looked at beside it."""

SAID = (
    PRIMARY,
    Pair("top-1 against a monolith", TOP1, "monolith", (Saying(PARIS, False, "30.60 against 29.64"), Saying(DDM, True, "9.84 against 12.81"))),
    Pair("all experts against a monolith", FULL, "monolith", (Saying(PARIS, False, "47.89 against 29.64"), Saying(DDM, True, "10.52 against 12.81"))),
    Pair("top-2 against top-1", TOP2, TOP1, (Saying(PARIS, True, "22.60 against 30.60"), Saying(DDM, False, "10.31 against 9.84"))),
    Pair("top-2 against all experts", TOP2, FULL, (Saying(PARIS, True, "22.60 against 47.89"),)),
    Pair("top-1 against the oracle", TOP1, ORACLE, (Saying(DDM, True, "9.84 against 10.46"),)),
    Pair("semantic clusters against random parts", TOP2, "random", (Saying(DDM, True, "far better"),)),
    Pair("8 experts against 4", TOP2, "experts-4", (Saying(DDM, True, "in a figure"),), 8),
    Pair("8 experts against 16", TOP2, "experts-16", (Saying(DDM, True, "in a figure"),), 8),
    Pair(
        "a student of the experts against a monolith", "distilled", "monolith",
        (Saying(DDM, True, "7.76 against 7.82, at a third of the compute"),),
    ),
    Pair(
        "2 DDPM experts among 8 against none", "mixed", TOP2,
        (Saying(HETEROGENEOUS, True, "11.88 against 12.45; in another table 32.67 against 20.23"),), 8,
    ),
)  # fmt: skip
"""Of which papers speak. Not of this comparison: Heterogeneous DDM's diversity within prompts."""

ASKED = (
    Pair("top-2 against a monolith of equal training and inference FLOPs (wider)", TOP2, "monolith-inference", equal=True),
    Pair("top-2 against the monolith with as many FLOPs a picture (more steps)", TOP2, "monolith/more-steps", equal=True),
    Pair("top-2 against a monolith with an expert's batch, so of more steps", TOP2, "monolith-steps"),
    Pair("top-2 against the monolith that is better on validation captions, of the papers' and the one of more steps", TOP2, BETTER_MONOLITH),
    Pair("top-2 against the student that learns from it", TOP2, "distilled"),
    Pair("a router that reads the caption against one that does not", TOP2, BLIND),
    Pair("top-2 against one expert by the caption", TOP2, f"{MAIN}/caption"),
    Pair("initial weights of each expert's own against shared ones", TOP2, "shared-init"),
    Pair("top-2 of these experts against 2 experts", TOP2, "experts-2"),
)
"""What critics ask, and we do."""
