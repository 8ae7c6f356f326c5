"""The report of a comparison: ``report.html``, one file without links, and ``table.md``; of whatever is done. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from paris_ray.data.openmoji import ATTRIBUTION
from paris_ray.evaluation import alignment_figures, compare_clusters, compare_cost, compare_lead, compare_looks, compare_measures, compare_rows
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.evaluation.compare_curves import training_curves
from paris_ray.evaluation.compare_markdown import markdown
from paris_ray.evaluation.compare_pictures import pictures
from paris_ray.evaluation.compare_plan import GRADED, QUALITY
from paris_ray.evaluation.compare_protocol import made_with, protocol
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import BLIND, MAIN, ROWS, Run
from paris_ray.evaluation.compare_tables import (
    PAIR_HEADER,
    SAID_HEADER,
    kinds,
    pair_rows,
    said_rows,
    unseen_header,
    unseen_rows,
    way_header,
    way_rows,
)  # fmt: skip
from paris_ray.evaluation.compare_verdicts import BETTER, LEAST_SEEDS, UNMEASURED, UNTOLD, WORSE, Findings, find_all, paper_words, told, whole
from paris_ray.evaluation.intervals import Interval, signed
from paris_ray.evaluation.times import TIMES
from paris_ray.manifest import published
from paris_ray.pages import blocks, charts
from paris_ray.storage import Folder


def write_report(compare: CompareConfig) -> str:
    """Write both files; returns the tables as Markdown."""
    results, folder = Results(compare), Folder(compare.folder)
    findings = find_all(results)
    compare_looks.keep(results, findings)
    text = markdown(results, findings)
    folder.write_bytes("table.md", text.encode())
    folder.write_bytes("report.html", page(results, findings).encode())
    return text


# -- the page -----------------------------------------------------------------------------------------------------------


def page(results: Results, findings: Findings) -> str:
    """The whole document."""
    compare = results.compare
    parts = [
        ("pairs", "What papers compare", _pairs(results, findings)),
        ("table", "Captions like those of training", _table(results)),
        ("unseen", "Captions with unseen combinations", _unseen(results)),
        ("among", "Pictures among originals", _among(results)),
        ("matched", "What is matched", _matched(results)),
        ("cost", "Quality and cost", _cost(results)),
        ("experts", "Experts and their data", _experts(results)),
        ("routers", "Routers, and losses by time", _routers(results)),
        ("pictures", "Pictures", pictures(results)),
        ("choices", "What was chosen, and on what", _choices(results)),
        ("faults", "Planted faults", _faults(results)),
        ("how", "How it was measured", _how(results, findings)),
    ]
    html = (
        f"<h1>{charts.escape(compare.base.name)}: experts beside what they are compared with</h1>"
        + _lead(results, findings)
        + blocks.navigation((anchor, title) for anchor, title, _ in parts)
        + "".join(blocks.section(anchor, title, body) for anchor, title, body in parts)
    )
    if compare.base.data.of_openmoji:
        html += f'<footer><p><small id="attribution">{charts.escape(ATTRIBUTION)}</small></p></footer>'
    return blocks.page(compare.base.name, html, max(compare.base.num_experts, len(results.ways), 2))


def _lead(results: Results, findings: Findings) -> str:
    """The first screen."""
    rows, colours = compare_lead.lead_rows(results, findings)
    tiles = "".join(
        blocks.paragraph(f"Comparisons that papers speak of, on {part}:") + blocks.tiles(compare_lead.tiles(results, findings.papers, i))
        for i, part in enumerate(compare_lead.PARTS)
    )
    said = "".join(blocks.paragraph(line, "lead") for line in compare_lead.lead(results, findings))
    return said + blocks.table(compare_lead.LEAD_HEADER, rows, kinds=colours) + tiles


def _pairs(results: Results, findings: Findings) -> str:
    return (
        blocks.paragraph(compare_lead.meaning(results, findings))
        + blocks.table(SAID_HEADER, said_rows(results, findings.papers), kinds=kinds(findings.papers))
        + "<h3>The same with a router that reads the caption</h3>"
        + blocks.table(PAIR_HEADER, pair_rows(results, findings.reading), kinds=kinds(findings.reading))
        + "<h3>What critics ask, and we do</h3>"
        + blocks.table(PAIR_HEADER, pair_rows(results, findings.asked), kinds=kinds(findings.asked))
    )


def _how(results: Results, findings: Findings) -> str:
    lines = "".join(f"<li><b>{charts.escape(head)}.</b> {charts.escape(words)}</li>" for head, words in protocol(results, findings))
    return f"<ul>{lines}</ul>" + _software(results)


def _table(results: Results) -> str:
    rows = way_rows(results)
    if not rows:
        return blocks.absent("Nothing is drawn yet: the same command goes on.")
    header = way_header(results)
    return blocks.table(header, rows, numeric=range(2, len(header)), key=[i for i, row in enumerate(rows) if row[0] == MAIN])


def _unseen(results: Results) -> str:
    rows = unseen_rows(results)
    if not rows:
        return blocks.absent("Nothing is drawn yet, or held_out_captions is 0.")
    said = "No paper speaks of these: each caption has a thing at a place, a thing on a colour or two things together that no training row has."
    header = unseen_header(results)
    return blocks.paragraph(said) + blocks.table(header, rows, numeric=range(2, len(header)))


def _among(results: Results) -> str:
    meaning, header, rows = compare_measures.among_table(results)
    if not rows:
        return blocks.absent("Nothing is drawn yet.")
    html = blocks.paragraph(meaning) + blocks.table(header, rows, numeric=range(1, len(header)))
    meaning, header, rows = compare_measures.distance_table(results)
    return html + "<h3>As a set</h3>" + blocks.paragraph(meaning) + blocks.table(header, rows, numeric=range(1, len(header)))


def _routers(results: Results) -> str:
    losses, colours = compare_measures.measures(results).losses_by_time(), _colours(results)
    if not losses:
        return blocks.absent("Not measured yet.")
    lines = [charts.Series(row, one.times, one.losses, colours[row]) for row, one in losses.items()]
    meaning, header, rows = compare_measures.router_table(results)
    html = blocks.paragraph(meaning) + blocks.table(header, rows, numeric=range(1, len(header)))
    return html + "<h3>Loss by time</h3>" + charts.line_chart(lines, "t, from picture to noise", "held-out loss", "Held-out loss by time", at=TIMES)


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
            x = results.picture_flops(way) / 1e9
            points.append(charts.Point(way.key, x, quality.value, quality.low, quality.high, colours[way.row]))
    drawn = charts.scatter_chart(points, "GFLOP a picture", QUALITY, "Quality against inference cost")
    curves = [charts.Series(row, x, y, colours[row]) for row, x, y in training_curves(results.plan)]
    learnt = (
        charts.line_chart(curves, "training PFLOP", "training loss", "Loss against training cost") if curves else blocks.absent("No training yet.")
    )
    learnt += blocks.paragraph(
        "Of experts each on its own rows, of a monolith on all: the curves say how each learns, not which is better. Losses of other kinds, of DDPM "
        "experts and of students, are left out."
    )
    return "<h3>Against the cost of a picture</h3>" + drawn + "<h3>Loss against the cost of training</h3>" + learnt


def _experts(results: Results) -> str:
    found, each = results.alignment(), compare_clusters.rows(results)
    html = blocks.paragraph(compare_clusters.MEANING) + blocks.table(compare_clusters.HEADER, each, numeric=range(1, 10)) if each else ""
    if found is None:
        return html + blocks.absent("Losses are not measured yet.")
    k = len(found.matrix)
    beyond = sum(one.lead.low > 0 and one.lead.seeds >= LEAST_SEEDS for one in found.own)
    said = (
        f"Loss of each expert (row) on the rows of each cluster (column) that training did not see, mean over times and trainings. The own expert "
        f"is the best on {sum(one.lead.value > 0 for one in found.own)} of {len(found.own)} clusters, by more than the interval over rows and "
        f"trainings on {beyond}."
    )
    html += _shared(results) + blocks.paragraph(said)
    html += charts.matrix_table(found.matrix, "expert", "cluster", "Loss by expert and cluster")
    leads = [[str(one.cluster), str(one.rows), str(one.rival), signed(one.lead), f"{one.best} of {one.lead.seeds}"] for one in found.own]
    html += blocks.table(OWN_HEADER, leads, numeric=range(1, len(OWN_HEADER)))
    lines = _asked(results, found)
    if found.nearness is not None:
        lines.append(
            f"Ours, the router's accuracy in other words: mean rank of the asked experts' clusters by distance to the clean row "
            f"{(k - 1) / 2 - found.nearness.value:.2f} of {k} (0: nearest, chance: {(k - 1) / 2:g}). The paper's is the "
            "distance to the state; not measured."
        )
    row = MAIN if results.alignment(BLIND) is None else BLIND
    if (apart := results.disagreement_in_pictures(row)) is not None:
        lines.append(
            f"Ours: rank correlation of the experts' disagreement about a row with how good the picture of its caption is, within rows of equally "
            f"many things, below zero where pictures are worse: {signed(apart)}, row {row}. The paper's is of states on the way to that picture; not "
            "measured, nor is whether asking all is the most stable."
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


OWN_HEADER = ("cluster", "rows", "best other expert", "its loss minus the own one's (95 %)", "own is the best in trainings")


def _asked(results: Results, found: alignment_figures.Alignment) -> list[str]:
    """Whether those asked predict better, with the paper's router and with the main row's."""
    theirs = results.alignment(BLIND)
    said = (
        f"Those asked predict better than the others, as arXiv 2602.02685 has it of states on the way to a picture (here: of rows on the training "
        f"path): loss of those not asked minus loss of the {alignment_figures.ASKED} asked, with a router that does not read the caption, as the "
    )
    if theirs is None:
        said += f"paper's: {UNMEASURED}: no row {BLIND}."
    else:
        state = told(theirs.advantage) if whole(results, theirs.advantage) else UNTOLD
        yes, no = paper_words(results.compare.base.num_experts)
        said += f"paper's, {signed(theirs.advantage)}: { {BETTER: yes, WORSE: no}.get(state, state) }.{_by_time(theirs)}"
    return [said, f"With the router of the main row {signed(found.advantage)}, of which no paper speaks.{_by_time(found)}"]


def _by_time(found: alignment_figures.Alignment) -> str:
    """Nothing where all experts are asked."""
    if found.advantage is None:
        return ""
    return f" By time, from picture to noise: {', '.join(f'{gain:+.3g}' for gain in found.advantage_at)}."


def _shared(results: Results) -> str:
    """How much of what scenes show the clusters divide."""
    shared = (results.originals or {"counts": {}})["counts"].get("shared")
    if not shared:
        return ""
    said = (
        "What the clusters divide: normalised mutual information of a row's cluster with what it shows, beside that of shuffled clusters. Where it "
        "is next to nothing, every expert has to learn what the monolith does, from fewer rows."
    )
    rows = [[name, f"{own:.3f}", f"{none:.3f}"] for name, (own, none) in shared.items()]
    return blocks.paragraph(said) + blocks.table(("what", "clusters", "shuffled"), rows, numeric=(1, 2))


def _choices(results: Results) -> str:
    compare, plan, rates, scales = results.compare, results.plan, [], []
    rows = [row for row in compare.rows if not ROWS[row].fault]
    tried = sorted({rate for row in rows for rate in plan.rates(row)})
    edge, last = [], []
    for row in rows:
        for way in plan.ways(row, compare.seeds[0]):
            if "/expert-" in way:
                continue
            guided, means = plan.guidance(way), {scale: float(one.mean()) for scale, one in plan.guidance_qualities(way).items()}
            scales.append([way, *(_marked(means.get(scale), scale == guided, ".3f") for scale in compare.guidance_scales)])
            last += [way] if guided is not None and at_end(means) else []
        if ROWS[row].borrows:
            continue
        losses, chosen = plan.validation_losses(row), plan.rate(row)
        rates.append([row, *(_marked(losses.get(rate), rate == chosen, ".4f") for rate in tried)])
        edge += [row] if len(losses) > 1 and chosen in (min(losses), max(losses)) else []
    first = blocks.table(["loss on validation rows", *(f"{rate:g}" for rate in tried)], rates, numeric=range(1, 20))
    second = blocks.table(["quality on validation captions", *(f"{scale:g}" for scale in compare.guidance_scales)], scales, numeric=range(1, 20))
    said = [f"At an end of the rates, where another might be better still: {', '.join(edge)}."] if edge else []
    said += [f"Came to no end: {'; '.join(lost)}."] if (lost := results.lost()) else []
    said += [f"Left out: {one}." for one in results.left_out()]
    below = [GUIDANCE_MEANING]
    below += [f"Best at the end of the scales, where one beyond might be better still (guidance_scales may grow): {', '.join(last)}."] if last else []
    return first + "".join(map(blocks.paragraph, said)) + second + "".join(map(blocks.paragraph, below))


GUIDANCE_MEANING = (
    f"Quality is the mean of {', '.join(GRADED)} where pictures are scenes, else minus a Fréchet distance. The arrow is at the least guidance scale, "
    "which is nearest to the data, whose quality is within one standard error of the best one's, by the differences on the same captions; so a "
    "greater number may stand beside it. Faults and single experts have their row's."
)


def at_end(means: Mapping[float, float]) -> bool:
    """Whether the best of several guidance scales is the greatest, or the least where that one guides: below 1, which is off, there is none."""
    best = max(means, key=lambda scale: (means[scale], -scale))
    return len(means) > 1 and (best == max(means) or best == min(means) > 1)


def _marked(value: float | None, chosen: bool, form: str) -> str:
    return "–" if value is None else f"{value:{form}}" + (" ←" if chosen else "")


def _faults(results: Results) -> str:
    found = results.faults()
    if not found:
        return blocks.absent("None asked for: rows fault-router, fault-swapped, fault-raw.")
    rows = [[row, ROWS[row].title, signed(quality), verdict_of_fault(quality), signed(loss), verdict_of_fault(loss)] for row, quality, loss in found]
    return blocks.table(["fault", "what", "quality lost (95 %)", "shown", "loss gained (95 %)", "shown"], rows)


def verdict_of_fault(interval: Interval | None) -> str:
    """Whether a measurement shows the fault: it moves by more than its interval, in whatever direction; of too few trainings nobody can tell."""
    if interval is None or interval.seeds < LEAST_SEEDS:
        return UNTOLD
    return "no" if interval.low <= 0 <= interval.high else "yes"


def _software(results: Results) -> str:
    compare = results.compare
    run = Run(MAIN, compare.seeds[0], compare.learning_rates[0])
    rows = [*made_with(results), *_made_when(results), ["main row", compare_rows.run_config(compare, run).expert.model.model_dump_json()]]
    return blocks.table(["what", "of the units that are done"], rows)


def _made_when(results: Results) -> list[list[str]]:
    """When the units that are done were, and how long they took, as their manifests have it; what is another row's, linked, is counted there."""
    plan = results.plan
    made = [one for unit in plan.units() if unit.flops and plan.done(unit.key) and (one := published(plan.folder / unit.key)) is not None]
    ends, seconds = sorted(one["created"] for one in made if "created" in one), sum(one.get("seconds") or 0 for one in made)
    return [["done", f"{ends[0]} … {ends[-1]}; {charts.duration(seconds)} of its processes, taken together"]] if ends else []
