"""The tables of a comparison as Markdown: ``table.md``. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterable

from paris_ray.evaluation import compare_clusters, compare_cost, compare_lead, compare_measures
from paris_ray.evaluation.compare_protocol import protocol
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_tables import PAIR_HEADER, SAID_HEADER, pair_rows, said_rows, unseen_header, unseen_rows, way_header, way_rows
from paris_ray.evaluation.compare_verdicts import Findings


def markdown(results: Results, findings: Findings) -> str:
    """The whole file: what decides first, how it was measured last."""
    tiles = [
        f"{part[0].upper()}{part[1:]}: {', '.join(f'{name} {count}' for count, name in compare_lead.tiles(results, findings.papers, i))}."
        for i, part in enumerate(compare_lead.PARTS)
    ]
    return "\n\n".join(
        [
            f"# {results.compare.base.name}: experts beside what they are compared with",
            *compare_lead.lead(results, findings),
            table(compare_lead.LEAD_HEADER, compare_lead.lead_rows(results, findings)[0]),
            "## What papers compare",
            compare_lead.meaning(results, findings),
            *tiles,
            table(SAID_HEADER, said_rows(results, findings.papers)),
            "The same with a router that reads the caption:",
            table(PAIR_HEADER, pair_rows(results, findings.reading)),
            "## What critics ask, and we do",
            table(PAIR_HEADER, pair_rows(results, findings.asked)),
            "## Captions like those of training",
            table(way_header(results), way_rows(results)),
            "## Captions with unseen combinations",
            table(unseen_header(results), unseen_rows(results)),
            "## Pictures among originals, and routers",
            *(part for meaning, header, rows in compare_measures.tables(results) for part in (meaning, table(header, rows))),
            "## What each expert was trained on",
            compare_clusters.MEANING,
            table(compare_clusters.HEADER, compare_clusters.rows(results)),
            "## What is matched",
            compare_cost.MEANING,
            table(compare_cost.COLUMNS, compare_cost.matched_table(results.compare, results.plan)),
            *(f"Left out: {one}." for one in results.left_out()),
            "## How it was measured",
            "\n".join(f"- **{head}.** {words}" for head, words in protocol(results, findings)),
        ]
    )


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Cells as Markdown."""
    header = list(header)
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])
