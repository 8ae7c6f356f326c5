"""What a comparison's report says first: the comparison that was named in advance, and how many others came out how. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Sequence

from paris_ray.evaluation.compare_claims import PUBLISHED_EXPERTS
from paris_ray.evaluation.compare_protocol import repeated
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_tables import kinds
from paris_ray.evaluation.compare_verdicts import (
    FAILS,
    HOLDS,
    SPLIT,
    UNDERTRAINED,
    UNMEASURED,
    UNTOLD,
    Both,
    Finding,
    Findings,
    half_width,
    paper_words,
)
from paris_ray.evaluation.intervals import signed

ROUTERS = ("papers' router, which does not read the caption", "router that reads the caption")
PARTS = ("captions like those of training", "unseen combinations")

LEAD_HEADER = ("captions and router", "verdict", "measure", "experts", "monolith", "first minus second (95 %)", "half-width")


def lead(results: Results, findings: Findings) -> list[str]:
    """The answer in sentences."""
    k = results.compare.base.num_experts
    said = [f"One question was named in advance: are {k} experts, of which a router asks two, better than one model of equal training FLOPs?"]
    for i, part in enumerate(PARTS):
        each = (f"with the {router}: {_plain(both[i], k)}" for router, both in zip(ROUTERS, findings.primary, strict=True))
        said.append(f"On {part}: {'; '.join(each)}.")
    if (shares := repeated(results)) is not None:
        said.append(
            f"{shares['train']:.0%} of the captions like those of training stand word for word in training rows: what is said of them is of captions "
            "learnt. Unseen combinations stand in none."
        )
    return said


def _plain(finding: Finding, experts: int) -> str:
    """The verdict in words, and the figures that it is of."""
    if finding.values is None or finding.interval is None:
        return finding.state
    a, b = finding.values
    width = "" if finding.state == UNTOLD else f", half-width {half_width(finding.interval):.2g}"
    return f"{finding.words(experts)}, {finding.measure} {a:.3f} against {b:.3f}, difference {signed(finding.interval)}{width}"


def lead_rows(results: Results, findings: Findings) -> tuple[list[list[str]], list[str]]:
    """Cells under :data:`LEAD_HEADER`, and each row's colour."""
    rows, colours, k = [], [], results.compare.base.num_experts
    for i, part in enumerate(PARTS):
        for router, both in zip(ROUTERS, findings.primary, strict=True):
            one = both[i]
            values = ("–", "–") if one.values is None else tuple(f"{value:.3f}" for value in one.values)
            width = "–" if one.interval is None else f"{half_width(one.interval):.3g}"
            rows.append([f"{part}, {router}", one.words(k), one.measure or "–", *values, signed(one.interval), width])
            colours += kinds([(one, one)])
    return rows, colours


def tiles(results: Results, found: Sequence[Both], part: int) -> list[tuple[str, str]]:
    """How many pairs of which papers speak came out how, each once: (figure, what it is).

    Args:
        results: of the comparison.
        found: these pairs.
        part: index in :data:`PARTS`.
    """
    yes, no = paper_words(results.compare.base.num_experts)
    states = [both[part].papers for both in found]
    names = {HOLDS: yes, FAILS: no, SPLIT: "told, and papers contradict one another", **{one: one for one in (UNTOLD, UNDERTRAINED, UNMEASURED)}}
    return [(str(states.count(state)), name) for state, name in names.items()]


def meaning(results: Results, findings: Findings) -> str:
    """What the tiles and the tables of pairs are of."""
    k = results.compare.base.num_experts
    said = (
        f"Each of the {len(findings.papers)} comparisons that papers speak of is counted once, with a router that does not read the caption, as "
        "theirs, where it has such a form. Better and worse are said of the first side, by the interval of the difference of the same captions and "
        "seeds. "
        "Published numbers are FID of other corpora and sizes; here whether all that the caption says is in the picture decides. "
    )
    if k != PUBLISHED_EXPERTS:
        said += (
            f"Papers have {PUBLISHED_EXPERTS} experts, these are {k}: nothing of theirs is reproduced here, it holds with {k} experts or does not. "
        )
    return said + "Unseen combinations are drawn of rows alone: other ways to draw are not measured there."
