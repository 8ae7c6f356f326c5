"""The corpus → clusters and one shard per expert: two-level k-means over the semantic embeddings (arXiv 2510.03434, 2501.05450). Torch-free.

Labels are computed once, from the float16 embeddings as stored, and everything later reads them from ``clusters/labels.parquet`` and, of rows that
were appended, ``clusters/labels-<version>.parquet``.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.data import schema
from paris_ray.data.cluster_report import draw_sheets, write_report
from paris_ray.data.cut import cut_all, groups
from paris_ray.data.fit import CLUSTERS, fit_clusters
from paris_ray.data.splits import split_codes
from paris_ray.manifest import Stage, StaleError, refuse_half_appended
from paris_ray.progress import Progress
from paris_ray.storage import Folder

_DIGESTED = 1 << 16  # ids at a time


def partition(config: RunConfig) -> None:
    """Fit the clusters, label all rows, cut the shards, write the report; publish ``clusters/`` and each ``shards/expert=K``.

    Running it again skips what is published and goes on with what is not. Needs a connection to Ray.

    Raises:
        FileNotFoundError: the corpus is not there yet.
        ConfigError: the corpus is too small for the number of clusters, the cap on an expert's share cannot be held, or experts were added later.
        StaleError: the folders hold something made from other inputs, or an append was cut off.
    """
    begun = time.monotonic()
    clusters, run = stages.stage(config, "partition"), Folder(config.run_dir)
    for folder in (run / "corpus", clusters.folder):
        refuse_half_appended(folder)
    if unknown := stages.unknown_experts(config):
        raise StaleError(f"partition: {unknown[0]}")
    shards = [stages.stage(config, f"shard-{k}") for k in range(config.num_experts)]
    with contextlib.ExitStack() as attempts:
        found = []
        for stage in (clusters, *shards):
            found.append(stage.begin())
            attempts.enter_context(stage.attempt())
        if all(status.state == "valid" for status in found):
            return
        config.check_none_added()
        with Progress(run / "events", "partition", 0, "rows") as progress:
            _partition(config, clusters, shards, found[0].state == "valid", progress, begun)
            progress.finish(f"{config.num_experts} shards, report at {clusters.folder.uri}/report.html")


def _partition(config: RunConfig, clusters: Stage, shards: list[Stage], fitted: bool, progress: Progress, begun: float) -> None:
    run = Folder(config.run_dir)
    if not schema.versions(clusters.folder, schema.LABELS):  # the last file of the fit
        fit_clusters(config, run / "corpus", clusters, progress)
    labels = schema.read_labels(clusters.folder, ["id", "fine", "expert", "split"])
    progress.total = len(labels)
    sheets = None if fitted else draw_sheets(config)
    grouped = groups(run / "corpus", schema.parts(run / "corpus"))
    _cut(run, grouped, labels, shards, progress, begun)
    if not fitted:
        write_report(config, sheets)
        summary = clusters.folder.read_json(CLUSTERS)
        counts = {name: summary[name] for name in ("sizes", "imbalance")}
        counts |= {"rows": len(labels), "fine": len(summary["fine_sizes"]), "groups": len(grouped)}
        clusters.publish(counts, time.monotonic() - begun)


def _cut(run: Folder, grouped: list[list[str]], labels: pa.Table, shards: list[Stage], progress: Progress, begun: float) -> None:
    found = [shard_counts(labels, k) for k in range(len(shards))]
    open_ = []
    for stage, counts in zip(shards, found, strict=True):
        status = stage.status()
        if status.state != "valid":
            open_.append(stage)
        elif status.manifest and status.manifest["counts"]["labels"] != counts["labels"]:
            raise StaleError(f"{stage.folder.uri} was cut with other labels than {run.uri}/clusters has; pass --rebuild partition to make both anew")
    if not open_:
        return
    done = 0
    for rows in cut_all(run / "corpus", grouped, labels["fine"].to_numpy(), labels["expert"].to_numpy(), run / "shards", 0):
        done += rows
        progress.update(done, message="cutting shards")
    for stage, counts in zip(shards, found, strict=True):
        if stage in open_:
            stage.publish(counts, time.monotonic() - begun)


def shard_counts(labels: pa.Table, k: int) -> dict[str, Any]:
    """What the manifest of a shard says of its rows: how many, and ``labels``, a fingerprint of their ids and fine clusters."""
    fine, split, mine = labels["fine"].to_numpy(), split_codes(labels["split"]), labels["expert"].to_numpy() == k
    counts = {name: int((mine & (split == schema.SPLITS.index(name))).sum()) for name in ("train", "validation")}
    mine &= split <= schema.SPLITS.index("validation")
    own = labels["id"].filter(pa.array(mine)).combine_chunks()
    order = pc.sort_indices(own)
    digest = hashlib.sha256(fine[mine][order.to_numpy()].tobytes())
    for low in range(0, len(order), _DIGESTED):
        digest.update("\n".join(own.take(order[low : low + _DIGESTED]).to_pylist()).encode())
    return {"rows": sum(counts.values()), **counts, "labels": digest.hexdigest()[:32]}
