"""The report's sections about results: the table and its reading, samples beside originals, held-out captions, routing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from paris_ray import stages
from paris_ray.evaluation.facts import Facts
from paris_ray.pages import blocks, charts
from paris_ray.pages.charts import escape

HEADLINE = "top-2"
GALLERY = 24
ROUTED = 12

_COLOURS = {HEADLINE: "var(--accent)", "round_trip": "var(--good)", "shuffled": "var(--muted)", "swapped": "var(--bad)"}


def percent(share: dict[str, Any]) -> str:
    """``47 % (30 of 64)``; ``2 %`` for an exact mean; or a dash."""
    if share["share"] is None:
        return "–"
    return f"{100 * share['share']:.0f}\u00a0%" + (f" ({share['hits']} of {share['of']})" if isinstance(share["hits"], int) else "")


def interval(share: dict[str, Any]) -> str:
    """``35–59 %``; ``exact`` for an exact mean."""
    if share["share"] is None:
        return "–"
    return f"{100 * share['low']:.0f}–{100 * share['high']:.0f}\u00a0%" if isinstance(share["hits"], int) else "exact"


def table_section(facts: Facts) -> str:
    """The table, its picture and what it says in words."""
    table = facts.table
    if table is None:
        return blocks.absent("Not run. Serve the model, then: python -m jobs.evaluate --config RUN/config.yaml --endpoint http://127.0.0.1:8000")
    rows = table["rows"]
    drawn = [row for row in rows if row["right"]["share"] is not None]
    chart = charts.interval_chart(
        [(row["title"], row["right"]["share"], row["right"]["low"], row["right"]["high"], _COLOURS.get(row["key"], "var(--e0)")) for row in drawn],
        "Share of pictures whose nearest original is of the caption's group, with 95 % intervals",
    )
    with_ground = any(row.get("ground") and row["ground"]["of"] for row in rows)
    extra = {"exact": "same picture", "copies": "copies", "pixel_copies": "to the eye"} | ({"ground": "right ground"} if with_ground else {})
    header = ["row", "measured", "right", "95 %", *extra.values(), "experts/step"]
    cells = []
    for row in rows:
        judged = [percent(row[name]).partition(" ")[0] if row.get(name) else "–" for name in extra]
        experts = "–" if row.get("experts_per_step") is None else f"{row['experts_per_step']:.2f}"
        cells.append([row["title"], row["where"], percent(row["right"]), interval(row["right"]), *judged, experts])
    listed = blocks.table(header, cells, numeric=range(2, len(header)), key=[i for i, row in enumerate(rows) if row["key"] == HEADLINE])
    sampling = table["sampling"]
    how = (
        f"{table['captions']['trained']} captions from training, the same number from each cluster where it has them, one picture each with a "
        f"fixed seed, {sampling['steps']} {sampling['solver']} steps, guidance {sampling['guidance_scale']:g}. A picture is right when its nearest "
        f"original among all {table['originals']} rows (cosine of the {table['embedder']} embedding) is of the caption's group; “same picture” asks "
        f"for the very row. A copy is nearer to a training row (as the codec gives it back) than {table['copy_bound']:.3f}, as one in a hundred "
        "originals is to its nearest in another group; “to the eye”, less than 2/255 away from it on average. Intervals are Wilson's. The embedder "
        "also made the clusters: it is no independent judge."
    )
    clusters = blocks.table(
        ["cluster", "right with top-2", "95 %"],
        [[f"expert {one['cluster']}", percent(one["right"]), interval(one["right"])] for one in table["by_cluster"]],
        numeric=(1, 2),
    )
    return (
        "".join(blocks.paragraph(line) for line in reading(table))
        + chart
        + listed
        + f"<details><summary>By cluster</summary>{clusters}</details>"
        + f"<p><small>{escape(how)}</small></p>"
    )


def reading(table: dict[str, Any]) -> list[str]:
    """What the table says, in words; only comparisons whose intervals are apart are called differences."""
    rows = {row["key"]: row for row in table["rows"]}
    if HEADLINE not in rows or rows[HEADLINE]["right"]["share"] is None:
        return ["The headline row was not measured."]
    head = rows[HEADLINE]["right"]

    def share(key: str) -> str:
        return f"{100 * rows[key]['right']['share']:.0f}\u00a0%"

    def against(key: str) -> str:
        other = rows[key]["right"]
        if other["low"] > head["high"]:
            return "more than the deployed model, with intervals apart"
        if other["high"] < head["low"]:
            return "less than the deployed model, with intervals apart"
        return "no difference that these intervals could show"

    known = {key for key, row in rows.items() if row["right"]["share"] is not None}
    first = f"Asked over HTTP, the model drew what the caption says {percent(head)} of the time (95 % interval {interval(head)})."
    if "shuffled" in known:
        first += f" By chance, with the captions shuffled, it would be {share('shuffled')}."
    if "round_trip" in known:
        first += f" The ceiling is {share('round_trip')}: originals sent through the codec and back."
    lines = [first]
    sayings = {
        "oracle": "Told the caption's own cluster (oracle), it is {}: {}.",
        "top-1": "With one expert a step (top-1) it is {}: {}.",
        "full": "With all experts at every step (full) it is {}: {}.",
        "caption": "With one expert per picture, chosen from the caption, it is {}: {}.",
        "blind": "With the paper's router, which does not read the caption, it is {}: {}.",
    }
    compared = [saying.format(share(key), against(key)) for key, saying in sayings.items() if key in known]
    if compared:
        lines.append(" ".join(compared))
    if "swapped" in known:
        lines.append(f"With the experts exchanged on purpose under the same router it is {share('swapped')}: {against('swapped')}.")
    if "held_out" in known:
        text = f"Captions that training never saw, of things that it did: {percent(rows['held_out']['right'])} show the right thing"
        ground = rows["held_out"].get("ground")
        text += f", {percent(ground)} are on the right ground." if ground and ground["of"] else "."
        lines.append(text)
    copies = rows[HEADLINE].get("copies")
    if copies and copies["of"]:
        lines.append(
            f"{percent(copies)} of the headline's pictures are as near to a training picture as a copy would be. "
            "A small corpus that is passed over many times is learnt by heart; what goes beyond it shows in the held-out captions only."
        )
    return lines


def strip(facts: Facts) -> str:
    """A row of generated pictures for the top of the blocks."""
    chosen = _spread(facts.records(HEADLINE), 30)
    pictures = [blocks.image(charts.picture_uri(facts.picture(record["picture"])), record["caption"]) for record in chosen]
    return f'<div class="strip">{"".join(pictures)}</div>' if pictures else ""


def samples_section(facts: Facts, row: str, count: int = GALLERY) -> str:
    """Generated pictures (left) beside their nearest originals (right)."""
    records = _spread(facts.records(row), count)
    if not records:
        return blocks.absent("Not run.")
    originals = facts.originals([record["nearest"] for record in records])
    parts = []
    for record in records:
        made = blocks.image(charts.picture_uri(facts.picture(record["picture"])), f"generated: {record['caption']}")
        original = originals.get(record["nearest"])
        beside = "" if original is None else blocks.image(charts.picture_uri(original), f"nearest original: {record['nearest_caption']}")
        verdict, sign = ("right", "✓") if record["right"] else ("wrong", "✗")
        said = f'<span class="mark">{sign}</span> {escape(record["caption"])}'
        if record["nearest_caption"] != record["caption"]:
            said += f"<br>nearest: {escape(record['nearest_caption'])}"
        parts.append(f'<figure class="pair {verdict}"><div class="two-up">{made}{beside}</div><figcaption>{said}</figcaption></figure>')
    return (
        '<p class="muted">Left the generated picture, right its nearest original (as the codec gives it back).</p>'
        + f'<div class="pairs">{"".join(parts)}</div>'
    )


def routing_section(facts: Facts) -> str:
    """Who did what at which step: a few pictures, and the average over all."""
    experts = facts.config.num_experts
    records = [record for record in facts.records(HEADLINE) if record["routing"]]
    if not records:
        return blocks.absent("Not run.")
    average = np.mean([np.asarray(record["routing"]) for record in records if len(record["routing"]) == len(records[0]["routing"])], axis=0)
    own = [float(np.asarray(record["routing"])[:, record["cluster"]].mean()) for record in facts.records("full") if record["routing"]]
    parts = [
        blocks.paragraph(
            "Each column is one step, from noise (left) to the picture (right); its colours are the weights of the experts that were asked. "
            "A colour that stays is a router that knows from the start where the picture belongs."
        ),
        charts.legend((f"expert {k}", f"var(--e{k})") for k in range(experts)),
        '<div class="two">',
    ]
    for record in _spread(records, ROUTED):
        weights = np.asarray(record["routing"], np.float64)
        mine = weights[:, record["cluster"]].mean()
        picture = blocks.image(charts.picture_uri(facts.picture(record["picture"])), record["caption"])
        bars = charts.stacked_columns(weights, f"Experts' weights over the steps of: {record['caption']}", height=44)
        said = f"{escape(record['caption'])} · <small>cluster {record['cluster']}, own expert’s share {mine:.0%}</small>"
        parts.append(f'<figure class="route">{picture}<div>{bars}<figcaption>{said}</figcaption></div></figure>')
    parts.append("</div><h3>On average over all pictures</h3>")
    ends = ("t = 1, noise", "t = 0, picture")
    parts.append(charts.stacked_columns(average, "Average weights of the experts over the steps, top-2", ends=ends))
    if own:
        parts.append(
            blocks.paragraph(f"The router's unrestricted weights (routing “full”) give the caption's own expert {np.mean(own):.0%} on average.")
        )
    return "".join(parts)


def router_section(facts: Facts) -> str:
    """How often the router's first choice is the right cluster, by time, and whether its weights mean what they say."""
    return _accuracy(facts) + _calibration(facts)


def _accuracy(facts: Facts) -> str:
    measured = (facts.table or {}).get("router")
    if not measured:
        return blocks.absent("Not run.")
    colours = {"pooled": "var(--e0)", "none": "var(--e1)"}
    names = {"pooled": "reads the caption", "none": "text-blind (the paper's)"}
    series = [
        charts.Series(names[kind], measured["t"], [one["share"] for one in shares], colours[kind]) for kind, shares in measured["accuracy"].items()
    ]
    chart = charts.line_chart(series, "t (0 data, 1 noise)", "share right", "Accuracy of the router over time", y_range=(0.0, 1.0))
    rows = [[names[kind], *(percent(one) for one in shares)] for kind, shares in measured["accuracy"].items()]
    listed = blocks.table(["router", *(f"t = {t:g}" for t in measured["t"])], rows, numeric=range(1, len(measured["t"]) + 1))
    said = f"On {measured['rows']} rows that training did not see: the share whose cluster is the router's first choice."
    return blocks.paragraph(said) + chart + listed


def _calibration(facts: Facts) -> str:
    """Of the last look at the validation rows."""
    rows, bins, prior = [], 0, 0.0
    for title, stage in (("router", "router"), ("text-blind router", stages.CONTROL_ROUTER)):
        last = next((line for line in reversed(facts.metrics(stage)) if "ece_by_time" in line), None)
        if last is None:
            continue
        bins, prior = len(last["ece_by_time"]), last["prior"]
        blind = {f"{title}, without its caption": last["without_text"]} if "without_text" in last else {}
        for name, one in ({title: last} | blind).items():
            cells = [f"{right:.0%}, {error:.3f}" for right, error in zip(one["accuracy_by_time"], one["ece_by_time"], strict=True)]
            rows.append([name, *(cell.replace("%", "\u00a0%") for cell in cells)])
    if not rows:
        return ""
    said = (
        "On the validation rows: how often the first choice is right, and the expected calibration error (Guo et al. 2017, 15 bins), which is 0 "
        "where of the choices made with 80\u00a0% four in five are right. "
        f"Always naming the largest cluster would be right {100 * prior:.0f}\u00a0% of the time."
    )
    header = ["accuracy, calibration error", *(f"t = {(b + 0.5) / bins:g}" for b in range(bins))]
    return "<h3>Calibration</h3>" + blocks.paragraph(said) + blocks.table(header, rows, numeric=range(1, bins + 1))


def _spread(records: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """``count`` records, evenly spaced, so that every cluster shows."""
    if len(records) <= count:
        return list(records)
    return [records[i] for i in np.unique(np.linspace(0, len(records) - 1, count).round().astype(int)).tolist()]
