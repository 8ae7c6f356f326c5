"""The report of a comparison: ``report.html``, one file without links, and ``table.md``; of whatever is done. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from paris_ray.data.openmoji import ATTRIBUTION
from paris_ray.evaluation import alignment_figures, compare_cost, compare_rows
from paris_ray.evaluation.compare_claims import CLAIMS, QUESTIONS, Claim, answer, verdict
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.evaluation.compare_curves import training_curves
from paris_ray.evaluation.compare_plan import QUALITY
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import MAIN, ROWS, Run
from paris_ray.evaluation.intervals import Interval
from paris_ray.manifest import published, software
from paris_ray.pages import blocks, charts
from paris_ray.storage import Folder

SHOWN = 10
"""Captions of the grid."""


def write_report(compare: CompareConfig) -> str:
    """Write both files; returns the table as Markdown."""
    results, folder = Results(compare), Folder(compare.folder)
    judged = claims(results, CLAIMS, verdict)
    asked = claims(results, QUESTIONS, answer)
    text = markdown(results, judged, asked)
    folder.write_bytes("table.md", text.encode())
    folder.write_bytes("report.html", page(results, judged, asked).encode())
    return text


# -- claims -------------------------------------------------------------------------------------------------------------

CLAIM_HEADER = ("source", "claim", "published", "here, first minus second (95 %)", "verdict", "distance, second minus first (95 %)")


def claims(results: Results, listed: Iterable[Claim], judge: object) -> list[list[str]]:
    """Cells under :data:`CLAIM_HEADER`, decided by quality; beside it, for scenes, what distances say."""
    found = []
    for one in listed:
        interval = results.difference(one.better, one.worse)
        distance = results.distance_difference(one.better, one.worse) if results.score_difference(one.better, one.worse) is not None else None
        missing = [side for side in (one.better, one.worse) if results.way(side) is None]
        here = f"no row {', '.join(missing)}" if missing else signed(interval)
        found.append([one.source, one.text, one.published, here, judge(interval), signed(distance)])  # type: ignore[operator]
    return found


def signed(interval: Interval | None) -> str:
    """``+0.031 (+0.010 … +0.052)``, or a dash."""
    return "–" if interval is None else f"{interval.value:+.3g} ({interval.low:+.3g} … {interval.high:+.3g})"


# -- the table ----------------------------------------------------------------------------------------------------------

WAY_HEADER = ("way", "what", QUALITY, "95 %", "all right", "distance", "held-out loss", "GFLOP a picture", "rate", "guidance", "steps", "seeds")


def way_rows(results: Results) -> list[list[str]]:
    """A row for each way to draw."""
    found = []
    for way in results.ways.values():
        quality, all_right, distance = results.quality(way), results.quality(way, "all"), results.distance(way)
        loss = results.loss(way.row)
        if "/" in way.key:
            loss = results.loss(way.row, f"loss-{way.drawing.routing}") if way.row == MAIN else None
        found.append(
            [
                way.key,
                ROWS[way.row].title if "/" not in way.key else way.drawing.routing if way.row == MAIN else "the same, with more steps",
                "–" if quality is None else f"{quality.value:.3f}",
                "–" if quality is None else f"{quality.low:.3f} … {quality.high:.3f}",
                "–" if all_right is None else f"{all_right.value:.1%}",
                "–" if distance is None else charts.number(distance),
                "–" if loss is None else f"{loss.mean():.4f}",
                f"{results.picture_flops(way) / 1e9:.3g}",
                f"{results.plan.rate(way.row):g}",
                f"{way.drawing.guidance:g}",
                str(way.drawing.steps),
                str(len(way.folders)),
            ]
        )
    return found


def markdown(results: Results, judged: list[list[str]], asked: list[list[str]]) -> str:
    """The tables as Markdown."""

    def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
        header = list(header)
        lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        return "\n".join([*lines, *("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)])

    return "\n\n".join(
        [
            table(WAY_HEADER, way_rows(results)),
            table(CLAIM_HEADER, judged),
            table(CLAIM_HEADER, asked),
            table(compare_cost.COLUMNS, compare_cost.matched_table(results.compare, results.plan)),
            protocol(results),
        ]
    )


def protocol(results: Results) -> str:
    """How it was measured, in words."""
    compare = results.compare
    made = published(Folder(compare.folder) / "reference")
    judge = (compare.judge or compare.base.data.embedding).kind
    said = [
        f"Captions of held-out rows, the first {compare.held_out_captions} by hash ({compare.routing_captions} for other routings), one picture each "
        f"under {len(compare.seeds)} seeds of training and noise, the same for all rows; {compare.base.sampling.solver}.",
        f"Learning rate (of {len(compare.learning_rates)}) by the loss on {compare.loss_rows} validation rows, guidance (of "
        f"{len(compare.guidance_scales)}) by {compare.validation_captions} validation captions, for each row alone, under the first seed.",
        f"{QUALITY}: the share of named things that are at their place, read from the picture (scenes); Fréchet distance in the features of {judge}, "
        f"along their first axes, to all held-out originals as the codec gives them back. Intervals: bootstrap over captions and seeds.",
    ]
    if made is not None:
        floor = results.floor(compare.routing_captions)
        said.append(
            f"{made['counts']['rows']} originals; {compare.routing_captions} of them, as many as pictures are measured by the distance in the first "
            f"table, have {floor} to the others."
            if floor is not None
            else f"{made['counts']['rows']} originals."
        )
        if not made["counts"]["independent"]:
            said.append("That encoder also made the clusters: its distances are no independent judge.")
    return " ".join(said)


# -- the page -----------------------------------------------------------------------------------------------------------


def page(results: Results, judged: list[list[str]], asked: list[list[str]]) -> str:
    """The whole document."""
    compare = results.compare
    parts = [
        ("claims", "What papers claim", _claims(judged, asked)),
        ("table", "The table", _table(results)),
        ("matched", "What is matched", _matched(results)),
        ("cost", "Quality and cost", _cost(results)),
        ("experts", "Experts and their data", _experts(results)),
        ("pictures", "Pictures", _pictures(results)),
        ("choices", "What was chosen, and on what", _choices(results)),
        ("faults", "Planted faults", _faults(results)),
        ("how", "How it was measured", blocks.paragraph(protocol(results)) + _software(compare)),
    ]
    html = (
        f"<h1>{charts.escape(compare.base.name)}: experts beside what they are compared with</h1>"
        + blocks.navigation((anchor, title) for anchor, title, _ in parts)
        + "".join(blocks.section(anchor, title, body) for anchor, title, body in parts)
    )
    if compare.base.data.of_openmoji:
        html += f'<footer><p><small id="attribution">{charts.escape(ATTRIBUTION)}</small></p></footer>'
    return blocks.page(compare.base.name, html, max(compare.base.num_experts, len(results.ways), 2))


def _claims(judged: list[list[str]], asked: list[list[str]]) -> str:
    counts = [sum(row[4] == name for row in judged) for name in ("reproduced", "not reproduced", "cannot be told here")]
    tiles = blocks.tiles(
        zip((str(n) for n in counts), ("claims reproduced", "claims not reproduced", "claims that cannot be told here"), strict=True)
    )
    said = (
        "A claim is that one way to draw is better than another. Published numbers are FID of other corpora and sizes; here the same captions and "
        "seeds are drawn in both ways, and the interval of the difference decides: above zero it is reproduced, below zero not, else nobody can tell."
    )
    return (
        tiles
        + blocks.paragraph(said)
        + blocks.table(CLAIM_HEADER, judged)
        + "<h3>What critics ask, and what we do</h3>"
        + blocks.table(CLAIM_HEADER, asked)
    )


def _table(results: Results) -> str:
    rows = way_rows(results)
    if not rows:
        return blocks.absent("Nothing is drawn yet: the same command goes on.")
    return blocks.table(WAY_HEADER, rows, numeric=range(2, len(WAY_HEADER)), key=[i for i, row in enumerate(rows) if row[0] == MAIN])


def _matched(results: Results) -> str:
    cells = compare_cost.matched_table(results.compare, results.plan)
    return blocks.paragraph(compare_cost.MEANING) + blocks.table(compare_cost.COLUMNS, cells, numeric=range(2, len(compare_cost.COLUMNS)))


def _colours(results: Results) -> dict[str, str]:
    return {row: f"var(--e{i})" for i, row in enumerate(results.compare.rows)}


def _cost(results: Results) -> str:
    colours, points = _colours(results), []
    for way in results.ways.values():
        quality = results.quality(way)
        if quality is not None:
            points.append(charts.Point(way.key, results.picture_flops(way) / 1e9, quality.value, quality.low, quality.high, colours[way.row]))
    drawn = charts.scatter_chart(points, "GFLOP a picture", QUALITY, "Quality against inference cost")
    curves = [charts.Series(row, x, y, colours[row]) for row, x, y in training_curves(results.plan)]
    learnt = (
        charts.line_chart(curves, "training PFLOP", "training loss", "Loss against training cost") if curves else blocks.absent("No training yet.")
    )
    return "<h3>Against the cost of a picture</h3>" + drawn + "<h3>Loss against the cost of training</h3>" + learnt


def _experts(results: Results) -> str:
    found = results.alignment()
    if found is None:
        return blocks.absent("Not measured yet.")
    k = len(found.matrix)
    said = [
        f"Held-out loss of each expert (row) on the rows of each cluster (column), mean over times and trainings. The own expert is the best on "
        f"{found.known - len(found.failing)} of {found.known} clusters."
    ]
    said += [f"On cluster {c} expert {best} is better than its own, by {share:.2%}." for c, best, share in found.failing]
    html = "".join(blocks.paragraph(line) for line in said) + charts.matrix_table(found.matrix, "expert", "cluster", "Loss by expert and cluster")
    told = verdict(found.advantage)
    lines = [
        f"Those asked know more than the others (arXiv 2602.02685): loss of those not asked minus loss of the {alignment_figures.ASKED} asked "
        f"{signed(found.advantage)}: {told}."
    ]
    if found.nearness is not None:
        lines.append(
            f"Those asked have near clusters: mean rank {(k - 1) / 2 - found.nearness.value:.2f} of the {k} (0: nearest, chance: {(k - 1) / 2:g}); "
            f"nearer than chance by {signed(found.nearness)}: {verdict(found.nearness)}."
        )
    correlations = ", ".join(f"{one:+.2f}" for one in found.correlations)
    same = all(one > 0 for one in found.correlations)
    lines.append(
        f"Where experts disagree the mixture is worse: rank correlation over states {correlations} (one for each training): "
        f"{'reproduced' if same and len(found.correlations) > 1 else 'cannot be told here'}."
    )
    ends = ("t near 1, noise", "t near 0, picture")
    shares = charts.stacked_columns(found.share[::-1], "Mean probability of each expert by time", ends=ends)
    html += "".join(blocks.paragraph(line) for line in lines)
    html += "<h3>Whom the router names, over time</h3>" + charts.legend((f"expert {i}", f"var(--e{i})") for i in range(k)) + shares
    main = results.way(MAIN)
    if main is not None:
        weights = [results.array(folder, "weights") for folder in main.folders.values()]
        mean = np.mean([one.mean(0) for one in weights if one is not None], axis=0)
        html += "<h3>Whom it asks while it draws</h3>" + charts.stacked_columns(
            mean, "Mean weights over the steps", ends=("first step, noise", "last step, picture")
        )
    return html


def _pictures(results: Results) -> str:
    ways = [way for way in results.ways.values() if results.compare.seeds[0] in way.folders]
    if not ways:
        return blocks.absent("Nothing is drawn yet.")
    lines = []
    original = results.array(Folder(results.compare.folder) / "reference", "pictures")
    rows: list[tuple[str, np.ndarray]] = [] if original is None else [("original", original)]
    for way in ways:
        found = results.array(way.folders[results.compare.seeds[0]], "pictures")
        if found is not None:
            rows.append((way.key, found))
    for name, pictures in rows:
        cells = "".join(f"<td>{blocks.image(charts.picture_uri(one), f'{name}, picture {i}')}</td>" for i, one in enumerate(pictures[:SHOWN]))
        lines.append(f"<tr><td>{charts.escape(name)}</td>{cells}</tr>")
    said = "A column is a caption with one noise, a row a way to draw: the first held-out captions by hash, the first seed. Nothing chosen."
    return blocks.paragraph(said) + f'<div class="scroll"><table class="wide">{"".join(lines)}</table></div>'


def _choices(results: Results) -> str:
    compare, rates, scales = results.compare, [], []
    for row in compare.rows:
        if ROWS[row].fault:
            continue
        losses, chosen = results.plan.validation_losses(row), results.plan.rate(row)
        rates.append([row, *(_marked(losses.get(rate), rate == chosen, ".4f") for rate in compare.learning_rates)])
        qualities, guided = results.plan.guidance_qualities(row), results.plan.guidance(row)
        scales.append([row, *(_marked(qualities.get(scale), scale == guided, ".3f") for scale in compare.guidance_scales)])
    first = blocks.table(["loss on validation rows", *(f"{rate:g}" for rate in compare.learning_rates)], rates, numeric=range(1, 20))
    second = blocks.table(["quality on validation captions", *(f"{scale:g}" for scale in compare.guidance_scales)], scales, numeric=range(1, 20))
    edge = [row for row in compare.rows if results.plan.rate(row) in (min(compare.learning_rates), max(compare.learning_rates))]
    said = f"At an end of the rates, where another might be better still: {', '.join(edge)}." if edge and len(compare.learning_rates) > 2 else ""
    return first + (blocks.paragraph(said) if said else "") + second


def _marked(value: float | None, chosen: bool, form: str) -> str:
    return "–" if value is None else f"{value:{form}}" + (" ←" if chosen else "")


def _faults(results: Results) -> str:
    found = results.faults()
    if not found:
        return blocks.absent("None asked for: rows fault-router, fault-swapped, fault-raw.")
    rows = [[row, ROWS[row].title, signed(quality), verdict_of_fault(quality), signed(loss), verdict_of_fault(loss)] for row, quality, loss in found]
    return blocks.table(["fault", "what", "quality lost (95 %)", "shown", "loss gained (95 %)", "shown"], rows)


def verdict_of_fault(interval: Interval | None) -> str:
    """Whether a measurement shows the fault: it moves by more than its interval, in whatever direction."""
    return "no" if interval is None or interval.low <= 0 <= interval.high else "yes"


def _software(compare: CompareConfig) -> str:
    rows = [[name, version] for name, version in software().items()]
    run = Run(MAIN, compare.seeds[0], compare.learning_rates[0])
    rows.append(["main row", compare_rows.run_config(compare, run).expert.model.model_dump_json()])
    return blocks.table(["what", "version"], rows)
