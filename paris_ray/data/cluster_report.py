"""What the clusters look like and what they will cost, before anyone pays for training: ``clusters/report.html`` and ``report.json``.

A Ray task draws and computes while shards are cut; torch is imported there only. Memory is bounded: the corpus is passed over part by part, and
latents and embeddings are read for the rows on the sheets and in the sample.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from safetensors.numpy import load as load_safetensors

from paris_ray import config as configs
from paris_ray.config import RunConfig
from paris_ray.data import schema
from paris_ray.data.report import page
from paris_ray.data.report.cost import estimate
from paris_ray.data.report.members import AT_LEAST, Members, look, quotas, read_rows
from paris_ray.data.report.shape import as_clustered, principal_plane, silhouettes
from paris_ray.data.report.sheets import draw_sheets as draw_on_sheets
from paris_ray.data.report.terms import terms
from paris_ray.manifest import require
from paris_ray.storage import Folder

MAP_ROWS = 4000
"""Rows on the map, at most."""

SILHOUETTE_ROWS = 2000
"""Rows of the silhouette, at most; it takes the square of them."""


def draw_sheets(config: RunConfig) -> Any:
    """Begin the report's heavy half in a Ray task: the contact sheets, the map, the silhouette, the terms. Returns the task's reference."""
    import ray

    return ray.remote(gather).options(num_cpus=1).remote(config.model_dump(mode="json"))


def write_report(config: RunConfig, sheets: Any) -> None:
    """Wait for that task and write ``clusters/report.html``, one file that loads nothing from elsewhere, and its figures as ``report.json``."""
    import ray

    clusters = Folder(config.run_dir) / "clusters"
    report, where = ray.get(sheets)
    pictures = [clusters.read_bytes(f"contact-{k}.png") for k in range(config.num_experts)]
    attribution = None
    if config.data.of_openmoji:
        from paris_ray.data.openmoji import ATTRIBUTION

        attribution = ATTRIBUTION
    clusters.write_json("report.json", report)
    clusters.write_bytes("report.html", page.render(report, where, pictures, attribution).encode())


def gather(tree: dict[str, Any]) -> tuple[dict[str, Any], page.Map]:
    """Write the contact sheets; returns the content of ``report.json``, and the map. Takes the config as JSON."""
    config = configs.build(tree)
    run = Folder(config.run_dir)
    clusters = run.read_json("clusters/clusters.json")
    counts = require(run / "corpus", "embed")["counts"]
    members = look(run, clusters["sizes"], config.partition.contact_sheet, MAP_ROWS)
    shown = draw_on_sheets(run, members)
    words = terms(members.captions, members.caption_expert, config.num_experts)
    where, silhouette = _shape(run, members, clusters)
    report: dict[str, Any] = {
        "name": config.name,
        **clusters,
        "read": {name: counts[name] for name in page.READ} if counts.keys() >= set(page.READ) else None,
        "cost": estimate(config, clusters["sizes"], run.read_json("encoders/encoders.json")),
        "map": {"rows": [len(points) for points in where.points], "at_least": AT_LEAST, "variance": list(where.variance)},
        "silhouette": silhouette,
        "experts": [{"terms": [{"word": word, "z": z} for word, z in own], **on} for own, on in zip(words, shown, strict=True)],
    }
    report["warnings"] = page.warnings(report)
    return report, where


def _shape(run: Folder, members: Members, clusters: dict[str, Any]) -> tuple[page.Map, dict[str, Any] | None]:
    """The map of the sample, and the silhouette of the part of it with the smallest hashes."""
    wanted = np.sort(np.concatenate(members.sample))
    stored = [schema.to_numpy(table["embedding"]) for _, table in read_rows(run / "corpus", members.parts, wanted, ["embedding"])]
    rows = as_clustered(np.concatenate(stored), clusters["metric"])
    at = [np.searchsorted(wanted, sample) for sample in members.sample]
    centroids = load_safetensors((run / "clusters").read_bytes("centroids.safetensors"))
    (points, fine), variance = principal_plane(rows, centroids["fine"].astype(np.float64))
    where = page.Map([points[own] for own in at], fine, centroids["fine_to_coarse"], variance)
    fewer = [own[:quota] for own, quota in zip(at, quotas(clusters["sizes"], SILHOUETTE_ROWS), strict=True)]
    label = np.repeat(np.arange(len(fewer)), [len(own) for own in fewer])
    if len(np.unique(label)) < 2:
        return where, None
    values = silhouettes(rows[np.concatenate(fewer)], label)
    means = [float(values[label == k].mean()) if len(own) else None for k, own in enumerate(fewer)]
    known = [(mean, size) for mean, size in zip(means, clusters["sizes"], strict=True) if mean is not None]
    overall = sum(mean * size for mean, size in known) / sum(size for _, size in known)
    return where, {"rows": len(label), "sampled": [len(own) for own in fewer], "overall": overall, "experts": means}
