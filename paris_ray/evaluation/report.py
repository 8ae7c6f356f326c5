"""``RUN/report.html``: one self-contained page about a run, from the corpus to the table. Whatever has not run is said to be missing."""

from __future__ import annotations

import os
import platform
import shlex
from typing import Any

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.data.openmoji import ATTRIBUTION
from paris_ray.evaluation import results
from paris_ray.evaluation.facts import Facts
from paris_ray.pages import blocks, charts
from paris_ray.pages.charts import duration, escape, number

REPORT = "report.html"


def write_report(config: RunConfig) -> str:
    """Write the report of a run, complete or not.

    Returns:
        where it is.
    """
    facts = Facts(config)
    facts.run.write_bytes(REPORT, build(facts).encode())
    return f"{facts.run.uri}/{REPORT}"


def build(facts: Facts) -> str:
    """The report as HTML."""
    parts = [
        ("table", "Does it draw what the caption says?", results.table_section(facts)),
        ("pipeline", "From pictures to an endpoint", pipeline_section(facts)),
        ("clusters", "Clusters: one expert each", clusters_section(facts)),
        ("training", "Training", training_section(facts)),
        ("router", "The router", results.router_section(facts)),
        ("samples", "Samples and their nearest originals", results.samples_section(facts, results.HEADLINE)),
        ("held-out", "Held-out captions", held_out_section(facts)),
        ("routing", "Which expert drew what", results.routing_section(facts)),
        ("time", "Where the time went", time_section(facts)),
        ("versions", "Versions and hardware", versions_section(facts)),
        ("next", "Serve it, ask it", next_section(facts)),
    ]
    links = blocks.navigation((anchor, title) for anchor, title, _ in parts)
    html = head(facts) + links + "".join(blocks.section(*part) for part in parts) + attribution(facts)
    return blocks.page(f"{facts.config.name}: report", html, facts.config.num_experts)


def head(facts: Facts) -> str:
    """Name, figures, pictures."""
    config = facts.config
    rows = None if facts.corpus is None else len(facts.corpus["id"])
    items = [
        (number(rows) if rows is not None else "–", "captioned pictures"),
        (str(config.num_experts), "experts, each trained alone on its own cluster"),
        (f"{config.data.image_size} px", "side of a picture"),
    ]
    row = next((row for row in (facts.table or {}).get("rows", []) if row["key"] == results.HEADLINE), None)
    if row is not None and row["right"]["share"] is not None:
        share = row["right"]
        items.append(
            (f"{share['share']:.0%}".replace("%", " %"), f"right over HTTP, {share['hits']:g} of {share['of']} (95 %: {results.interval(share)})")
        )
    if facts.wall_seconds is not None:
        items.append((duration(facts.wall_seconds), "from the first stage's start to the last one's end"))
    lead = (
        "A text-to-image model trained the decentralized way (Paris): the corpus is cut into clusters, one diffusion expert learns each cluster "
        "without ever hearing of the others, a small router says whom to ask, and their velocities are mixed at every step."
    )
    return f'<h1>{escape(config.name)}</h1><p class="lead">{escape(lead)}</p>' + results.strip(facts) + blocks.tiles(items)


def pipeline_section(facts: Facts) -> str:
    """The stages with their figures, and what was refused."""
    config = facts.config
    boxes = [_stage("embed", facts, _embed_lines(facts))]
    sizes = (facts.clusters or {}).get("sizes")
    boxes.append(_stage("partition", facts, [f"{len(sizes)} clusters", f"{min(sizes)}–{max(sizes)} training rows"] if sizes else []))
    experts = [stages.expert_name(k) for k in range(config.num_experts)]
    trained = [facts.counts(name) for name in experts if name in facts.manifests]
    lines = [f"{len(trained)} of {config.num_experts} trained"] if trained else []
    if images := sum(int(counts.get("images", 0)) for counts in trained):
        lines.append(f"{number(images)} images seen")
        # Of the training loops: a stage that was resumed counts the seconds of its last attempt only.
        if seconds := sum(float(counts.get("seconds", 0.0)) for counts in trained):
            lines.append(f"{number(images / seconds)} images/s each on average")
    boxes.append(_box("train experts", lines, sum(facts.seconds(name) or 0.0 for name in experts) or None, "summed over experts"))
    router = facts.counts("router")
    boxes.append(_stage("router", facts, [f"{number(router['images'])} images seen", "beside the experts"] if "images" in router else []))
    boxes.append(_stage("assemble", facts, [f"{number(_megabytes(facts, 'assemble'))} MB"] if "assemble" in facts.manifests else []))
    boxes.append(_stage("evaluate", facts, [f"{len((facts.table or {}).get('rows', []))} rows in the table"] if facts.table else []))
    html = f'<div class="flow">{"".join(boxes)}</div>'
    if facts.rejected:
        refused = [[kind, len(details), details[0][:160]] for kind, details in facts.rejected.items()]
        html += "<h3>Refused rows</h3>" + blocks.table(["reason", "rows", "for example"], refused, numeric=(1,))
    elif facts.rejected is not None:
        html += blocks.paragraph("No row was refused.")
    return html


def _embed_lines(facts: Facts) -> list[str]:
    if facts.corpus is None:
        return []
    splits = facts.corpus["split"].tolist()
    lines = [f"{number(splits.count(name))} {name.replace('_', ' ')}" for name in ("train", "validation", "held_out")]
    refused = sum(len(details) for details in (facts.rejected or {}).values())
    seconds = facts.seconds("embed")
    return [*lines, f"{number(refused)} refused", *([f"{number(len(splits) / seconds)} rows/s"] if seconds else [])]


def _stage(name: str, facts: Facts, lines: list[str]) -> str:
    return _box(name, lines if name in facts.manifests else [], facts.seconds(name))


def _box(title: str, lines: list[str], seconds: float | None, of: str = "") -> str:
    if not lines and seconds is None:
        return f'<div class="stage off"><b>{escape(title)}</b><div>not run</div></div>'
    said = [*lines, *([f"{duration(seconds)} {of}".strip()] if seconds is not None else [])]
    return f'<div class="stage"><b>{escape(title)}</b>' + "".join(f"<div>{escape(line)}</div>" for line in said) + "</div>"


def _megabytes(facts: Facts, name: str) -> float:
    return sum(file["bytes"] for file in facts.manifests[name]["files"]) / 1e6


def clusters_section(facts: Facts) -> str:
    """Sizes, contact sheets and telling words."""
    clusters = facts.clusters
    if clusters is None:
        return blocks.absent("Not run.")
    sizes = clusters["sizes"]
    total = sum(sizes) or 1
    cards = []
    for k, size in enumerate(sizes):
        sheet = facts.contact_sheet(k)
        picture = blocks.image(charts.data_uri(sheet, "image/png"), f"contact sheet of cluster {k}", "sheet") if sheet else ""
        words = f"<p>{escape(', '.join(facts.terms[k]))}</p>" if facts.terms[k] else ""
        swatch = f'<i class="swatch g{k}"></i>'
        cards.append(
            f'<div class="card"><h3><span>{swatch}expert {k}</span><small>{number(size)} rows, {size / total:.0%}</small></h3>{picture}{words}</div>'
        )
    said = (
        f"Two-level k-means ({clusters.get('metric', facts.config.partition.metric)}): {facts.config.partition.fine} fine clusters, then "
        f"{facts.config.num_clusters} coarse ones over their centroids. The largest holds {max(sizes) / total:.0%} of the training rows, the "
        f"smallest {min(sizes) / total:.0%}; an equal share would be {1 / len(sizes):.0%}. Below each sheet, the words that set its captions apart. "
        f"{blocks.CODEC_NOTE} The clusters' own page, clusters/report.html, has a map and what training was estimated to cost."
    )
    if facts.config.partition.added:
        said += f" The last {facts.config.partition.added} experts were added later, each with a source of its own."
    if clusters["version"] > 1:
        said += f" Rows were appended since: sizes are of version {clusters['version']} of the clusters, sheets and their own page of version 1."
    return blocks.paragraph(said) + charts.share_bar(sizes, "Shares of the training rows") + f'<div class="cards">{"".join(cards)}</div>'


def training_section(facts: Facts) -> str:
    """Loss curves and figures of the experts and the router."""
    config = facts.config
    names = [stages.expert_name(k) for k in range(config.num_experts)]
    curves = {name: facts.metrics(name) for name in [*names, "router", stages.CONTROL_ROUTER]}
    if not any(curves.values()):
        return blocks.absent("Not run.")
    experts = [_curve(f"expert {k}", curves[name], f"var(--e{k})") for k, name in enumerate(names)]
    watched = [_curve(f"expert {k}", curves[name], f"var(--e{k})", "validation_loss") for k, name in enumerate(names)]
    routers = [_curve("router", curves["router"], "var(--e0)"), _curve("text-blind router", curves[stages.CONTROL_ROUTER], "var(--e1)")]
    left = charts.line_chart(experts, "images (log)", "loss", "Training loss of the experts", log_x=True)
    right = charts.line_chart(routers, "images (log)", "cross-entropy", "Training loss of the routers", log_x=True)
    html = f"<div><h3>Experts: training loss</h3>{left}</div><div><h3>Routers: cross-entropy</h3>{right}</div>"
    if any(one.y for one in watched):
        below = charts.line_chart(watched, "images (log)", "loss", "Validation loss of the experts", log_x=True)
        html += f"<div><h3>Experts: validation loss</h3>{below}</div>"
    html = f'<div class="two">{html}</div>'
    rows = []
    for name in curves:
        counts = facts.counts(name)
        if counts:
            spec = config.experts[int(name.removeprefix("expert-"))] if name.startswith("expert-") else None
            model = (spec or config.router).model
            shape = model.size or f"{model.hidden_size} wide, {model.num_layers} deep"
            figures = [_figure(counts.get(key)) for key in ("rows", "images", "images_per_second", "loss", "validation_loss", "restarts", "goodput")]
            rows.append([name.replace("_", " "), shape, spec.objective if spec else "–", *figures, duration(facts.seconds(name) or 0.0)])
    header = ["stage", "model", "objective", "rows", "images", "images/s", "loss", "validation loss", "restarts", "goodput", "time"]
    return html + blocks.table(header, rows, numeric=range(3, len(header)))


def _figure(value: Any) -> str:
    return "–" if value is None else number(float(value))


def _curve(name: str, lines: list[dict[str, Any]], colour: str, key: str = "loss") -> charts.Series:
    known = [line for line in lines if line.get(key) is not None]
    return charts.Series(name, [line["images"] for line in known], [line[key] for line in known], colour)


def held_out_section(facts: Facts) -> str:
    """Captions that training never saw."""
    if not facts.records("held_out"):
        return blocks.absent("Not run, or no such rows.")
    intro = "Training saw each of these things in other rows, but never these rows."
    return blocks.paragraph(intro) + results.samples_section(facts, "held_out")


def time_section(facts: Facts) -> str:
    """Seconds of each stage."""
    bars = []
    for name in facts.manifests:
        seconds = facts.seconds(name)
        if seconds is not None:
            colour = f"var(--e{name.removeprefix('expert-')})" if name.startswith("expert-") else "var(--muted)"
            bars.append((name.replace("_", " "), seconds, duration(seconds), colour))
    if not bars:
        return blocks.absent("Not run.")
    said = f"Sum of the stages: {duration(sum(bar[1] for bar in bars))}."
    if facts.wall_seconds is not None:
        said += f" From the first one's start to the last one's end: {duration(facts.wall_seconds)}; stages that do not depend on each other overlap."
    return blocks.paragraph(said) + charts.bar_chart(bars, "Seconds of each stage")


def versions_section(facts: Facts) -> str:
    """What computed it."""
    if not facts.manifests:
        return blocks.absent("Not run.")
    keys = sorted({key for manifest in facts.manifests.values() for key in manifest.get("software", {})})
    rows = []
    for key in keys:
        used = {manifest["software"].get(key) for manifest in facts.manifests.values() if "software" in manifest}
        rows.append([key, ", ".join(sorted(str(value) for value in used if value))])
    hardware = (facts.table or {}).get("hardware") or {"written on": f"{os.cpu_count()} cores, {platform.machine()}"}
    rows += [[f"evaluation: {key}" if facts.table else key, value] for key, value in hardware.items()]
    if facts.model is not None:
        rows.append(["model fingerprint", facts.model["model_fingerprint"]])
    return blocks.table(["what", "version"], rows)


def next_section(facts: Facts) -> str:
    """How to use the model."""
    run = facts.run.uri
    serve = facts.config.serve
    url = f"http://{serve.host}:{serve.port}"
    caption = facts.records(results.HEADLINE)[0]["caption"] if facts.records(results.HEADLINE) else "a red apple"
    body = f'{{"prompt": "{_shell(caption)}", "seed": 7, "routing": "top-2"}}'
    commands = (
        f".venv/bin/python -m jobs.serve --config {shlex.quote(f'{run}/config.yaml')}\n\n"
        f"curl -s {url}/v1/images/generations -H 'Content-Type: application/json' \\\n  -d '{body}' \\\n"
        '  | python3 -c \'import base64, json, sys; open("picture.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\''
    )
    return (
        blocks.paragraph("All that serving needs is in model/. Each PNG carries its prompt, seed, steps and routing.")
        + f"<pre>{escape(commands)}</pre>"
    )


def _shell(text: str) -> str:
    """A caption inside JSON inside single quotes: only what is safe in both."""
    return "".join(character for character in text if character.isalnum() or character in " ,.-")[:120]


def attribution(facts: Facts) -> str:
    """The credit that the pictures on this page need."""
    text = (facts.model or {}).get("attribution") or (ATTRIBUTION if facts.config.data.of_openmoji else None)
    return f'<footer><p><small id="attribution">{escape(text)}</small></p></footer>' if text else ""
