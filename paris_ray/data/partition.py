"""The corpus → clusters and one shard per expert: two-level k-means over the semantic embeddings (arXiv 2510.03434, 2501.05450). Torch-free.

Centroids are fitted on the train rows only; validation and held-out rows get the nearest fine centroid and its expert. Labels are computed once, from
the float16 embeddings as stored, and everything later reads them from ``clusters/labels.parquet``. While the embeddings of the train rows fit
:data:`DRIVER_BYTES`, k-means runs in this process straight from the Parquet files; past it, in actors, with the same bits.
"""

from __future__ import annotations

import hashlib
import json
import time
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from paris_ray import rng, stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.data import schema
from paris_ray.data.balance import coarse_clusters
from paris_ray.data.cluster_report import draw_sheets, write_report
from paris_ray.data.cut import cut_all
from paris_ray.data.kmeans import Rows, kmeans
from paris_ray.data.remote_rows import Piece, RemoteRows, load_rows
from paris_ray.manifest import Stage, StaleError
from paris_ray.progress import Progress
from paris_ray.storage import Folder

DRIVER_BYTES = 1 << 30
"""Embeddings, as float32, up to which k-means runs in the driver (262,144 rows of 1024); also what one actor holds past that."""

LABELS, CENTROIDS, CLUSTERS = "labels.parquet", "centroids.safetensors", "clusters.json"


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
            _fit(config, run / "corpus", clusters.folder, progress)
        labels = schema.read_table(clusters.folder, LABELS)
        progress.total = len(labels)
        sheets = draw_sheets(config) if found[0].state != "valid" else None
        _cut(run, labels, shards, progress, begun)
        if found[0].state != "valid":
            write_report(config, sheets)
            summary = clusters.folder.read_json(CLUSTERS)
            counts = {"rows": len(labels), "sizes": summary["sizes"], "imbalance": summary["imbalance"], "fine": config.partition.fine}
            clusters.publish(counts, time.monotonic() - begun)
    except BaseException as error:
        progress.fail(f"{type(error).__name__}: {error}".splitlines()[0])
        raise
    progress.finish(f"{config.num_experts} shards, report at {clusters.folder.uri}/report.html")


def _fit(config: RunConfig, corpus: Folder, out: Folder, progress: Progress) -> None:
    part, experts = config.partition, config.num_experts
    light = {name: schema.read_table(corpus, name, ["id", "split"]) for name in schema.parts(corpus)}
    splits = {name: table["split"].to_numpy() for name, table in light.items()}
    train = [(name, np.flatnonzero(split == "train")) for name, split in splits.items()]
    total = sum(len(rows) for _, rows in train)
    if total < part.fine:
        raise ConfigError(
            f"partition.fine: {part.fine} fine clusters need at least as many training rows, and the corpus has {total}; "
            f"lower it (--set partition.fine={max(experts, total // 8)}) or embed more pictures"
        )
    width = schema.read_table(corpus, train[0][0], ["embedding"])["embedding"].type.shape[0]
    say = lambda message: progress.update(0, message=message)  # noqa: E731
    remote = total * width * 4 > DRIVER_BYTES
    rows: Rows | RemoteRows
    rows = RemoteRows(corpus, train, width, part.metric, DRIVER_BYTES, say) if remote else Rows(load_rows(corpus, train, part.metric, total))
    fit = kmeans(
        rows, part.fine, rng.key(config.seed, "fine"), part.max_iterations, lambda i, inertia, changed: say(f"iteration {i}, {changed} rows moved")
    )
    if fit.counts.min() == 0:
        distinct = int((fit.counts > 0).sum())
        raise ConfigError(
            f"partition.fine: {part.fine} fine clusters, but the embeddings of the {total} training rows are only {distinct} different ones; "
            f"lower it (--set partition.fine={distinct})"
        )
    coarse = coarse_clusters(fit.centroids, fit.counts, experts, config.seed, part.max_iterations, part.max_share)
    sizes = np.bincount(coarse.fine_to_coarse, fit.counts, experts).astype(int)
    if sizes.min() == 0:
        raise ConfigError(
            f"partition: expert {int(sizes.argmin())} of {experts} would get no training row (sizes {sizes.tolist()}); "
            "raise partition.fine or partition.max_iterations, or ask for fewer experts"
        )
    labels = _label(corpus, splits, rows, part.metric, total, fit.centroids, coarse.centroids, coarse.fine_to_coarse)
    if isinstance(rows, RemoteRows):
        rows.close()
    everyone = np.concatenate(list(splits.values()))
    summary: dict[str, Any] = {
        "sizes": sizes.tolist(),
        "sizes_all": np.bincount(labels["expert"], minlength=experts).tolist(),
        "fine_sizes": fit.counts.tolist(),
        "inertia": [fit.inertia, coarse.inertia],
        "converged": fit.converged,
        "metric": part.metric,
        "imbalance": float(sizes.max() * experts / total),
        "largest_fine_share": float(fit.counts.max() * experts / total),
        "cap": coarse.cap,
        "over_cap": list(coarse.over),
        "splits": {split: int((everyone == split).sum()) for split in schema.SPLITS},
    }
    weights: dict[str, NDArray[Any]] = {"fine": fit.centroids, "coarse": coarse.centroids, "fine_to_coarse": coarse.fine_to_coarse}
    out.write_bytes(CENTROIDS, save_safetensors(weights))
    out.write_json(CLUSTERS, summary)
    ids = pa.chunked_array([chunk for table in light.values() for chunk in table["id"].chunks])
    columns = {"id": ids, **{name: pa.array(values) for name, values in labels.items()}, "split": pa.array(everyone, pa.string())}
    schema.write_table(out, LABELS, pa.table(columns))


def _label(
    corpus: Folder,
    splits: dict[str, NDArray[Any]],
    rows: Rows | RemoteRows,
    metric: str,
    total: int,
    fine: NDArray[np.float32],
    coarse: NDArray[np.float32],
    fine_to_coarse: NDArray[np.int64],
) -> dict[str, NDArray[Any]]:
    """Columns fine, expert and distance (squared, to the expert's centroid) of all rows, in the corpus' order."""
    is_train = np.concatenate([split == "train" for split in splits.values()])
    label, distance = np.empty(len(is_train), np.int32), np.empty(len(is_train), np.float32)
    label[is_train], distance[is_train] = rows.labels, rows.distances_to(coarse, fine_to_coarse)
    others: list[Piece] = [(name, np.flatnonzero(split != "train")) for name, split in splits.items()]
    first = 0
    for name, at in others:
        if len(at):
            rest = Rows(load_rows(corpus, [(name, at)], metric, total))
            rest.assign(fine)
            label[first + at], distance[first + at] = rest.labels, rest.distances_to(coarse, fine_to_coarse)
        first += len(splits[name])
    return {"fine": label, "expert": fine_to_coarse[label].astype(np.int32), "distance": distance}


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


def read_centroids(clusters: Folder) -> dict[str, NDArray[Any]]:
    """``fine`` (F, D), ``coarse`` (K, D) float32 and ``fine_to_coarse`` (F,) int64 of ``RUN/clusters``."""
    return load_safetensors(clusters.read_bytes(CENTROIDS))
