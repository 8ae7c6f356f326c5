"""The corpus → clusters and one shard per expert: two-level k-means over the semantic embeddings (arXiv 2510.03434, 2501.05450). Torch-free.

Labels are computed once, from the float16 embeddings as stored, and everything later reads them from ``clusters/labels.parquet``.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.data import schema
from paris_ray.data.cluster_report import draw_sheets, write_report
from paris_ray.data.cut import cut_all
from paris_ray.data.fit import CLUSTERS, LABELS, fit_clusters
from paris_ray.manifest import Stage, StaleError
from paris_ray.progress import Progress
from paris_ray.storage import Folder


def partition(config: RunConfig) -> None:
    """Fit the clusters, label all rows, cut the shards, write the report; publish ``clusters/`` and each ``shards/expert=K``.

    Running it again skips what is published and goes on with what is not. Needs a connection to Ray.

    Raises:
        FileNotFoundError: the corpus is not there yet.
        ConfigError: the corpus is too small for the number of clusters, or the cap on an expert's share cannot be held.
        StaleError: the folders hold something made from other inputs.
    """
    begun = time.monotonic()
    clusters = stages.stage(config, "partition")
    shards = [stages.stage(config, f"shard-{k}") for k in range(config.num_experts)]
    found = [stage.begin() for stage in (clusters, *shards)]
    if all(status.state == "valid" for status in found):
        return
    run = Folder(config.run_dir)
    progress = Progress(run / "events", "partition", 0, "rows")
    try:
        if not clusters.folder.exists(LABELS):  # the last file of the fit
            fit_clusters(config, run / "corpus", clusters, progress)
        labels = schema.read_table(clusters.folder, LABELS)
        progress.total = len(labels)
        sheets = draw_sheets(config) if found[0].state != "valid" else None
        _cut(run, labels, shards, progress, begun)
        if found[0].state != "valid":
            write_report(config, sheets)
            summary = clusters.folder.read_json(CLUSTERS)
            counts = {"rows": len(labels), "sizes": summary["sizes"], "imbalance": summary["imbalance"], "fine": len(summary["fine_sizes"])}
            clusters.publish(counts, time.monotonic() - begun)
    except BaseException as error:
        progress.fail(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    progress.finish(f"{config.num_experts} shards, report at {clusters.folder.uri}/report.html")


def _cut(run: Folder, labels: pa.Table, shards: list[Stage], progress: Progress, begun: float) -> None:
    fine, expert, split = (labels[name].to_numpy() for name in ("fine", "expert", "split"))
    ids, kept = labels["id"].to_numpy(), split != "held_out"
    digests = [_digest(ids[kept & (expert == k)], fine[kept & (expert == k)]) for k in range(len(shards))]
    open_ = []
    for stage, digest in zip(shards, digests, strict=True):
        status = stage.status()
        if status.state != "valid":
            open_.append(stage)
        elif status.manifest and status.manifest["counts"]["labels"] != digest:
            raise StaleError(f"{stage.folder.uri} was cut with other labels than {run.uri}/clusters has; pass --rebuild partition to make both anew")
    if not open_:
        return
    done = 0
    for rows in cut_all(run / "corpus", fine, expert, run / "shards"):
        done += rows
        progress.update(done, message="cutting shards")
    for k, (stage, digest) in enumerate(zip(shards, digests, strict=True)):
        if stage in open_:
            counts = {name: int(((split == name) & (expert == k)).sum()) for name in ("train", "validation")}
            stage.publish({"rows": sum(counts.values()), **counts, "labels": digest}, time.monotonic() - begun)


def _digest(ids: NDArray[Any], fine: NDArray[np.int32]) -> str:
    """Which rows an expert has, as 32 hex digits."""
    order = np.argsort(ids.astype(str), kind="stable")
    text = json.dumps([ids[order].tolist(), fine[order].tolist()])
    return hashlib.sha256(text.encode()).hexdigest()[:32]
