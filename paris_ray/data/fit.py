"""From the corpus to ``clusters/``: centroids, the label of every row, and the figures that the report shows. Torch-free.

Centroids are fitted on the train rows only; validation and held-out rows get the nearest fine centroid and its expert. While the embeddings of the
train rows fit :data:`DRIVER_BYTES`, k-means runs in this process straight from the Parquet files; past it, in actors, with the same bits.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from paris_ray import rng
from paris_ray.config import ConfigError, PartitionConfig, RunConfig
from paris_ray.data import schema
from paris_ray.data.balance import coarse_clusters
from paris_ray.data.kmeans import Fit, Keys, Labels, Rows, State, inertia_of, lloyd, means, start
from paris_ray.data.nearest import F32
from paris_ray.data.placement import memory
from paris_ray.data.remote_rows import Piece, RemoteRows, load
from paris_ray.data.splits import read_each
from paris_ray.manifest import Stage, fingerprint
from paris_ray.progress import Progress, clock
from paris_ray.storage import Folder

DRIVER_BYTES = 1 << 30
"""Embeddings up to which k-means runs in the driver (524,288 rows of 1024); also what one actor holds past that, at most."""

SAVE_SECONDS = 30.0
"""What a run that dies in k-means loses, at most, beside the iteration it is in."""

PIECES_AT_ONCE = 64
"""Part files whose validation and held-out rows one task labels."""

CENTROIDS, CLUSTERS = "centroids.safetensors", "clusters.json"


@dataclass(frozen=True)
class Index:
    """What the driver holds of each row of the corpus, in the corpus' order: 37 bytes, with ids of 32 characters.

    Attributes:
        parts: part files, and the places of their rows.
        ids: of the rows.
        split: place in :data:`paris_ray.data.schema.SPLITS`, (N,) int8.
    """

    parts: dict[str, slice]
    ids: pa.ChunkedArray
    split: NDArray[np.int8]

    @classmethod
    def read(cls, corpus: Folder) -> Index:
        """From ``RUN/corpus``."""
        parts: dict[str, slice] = {}
        ids: list[pa.Array] = []
        splits: list[NDArray[np.int8]] = []
        first = 0
        for part, light, codes in read_each(corpus, ["id"]):
            ids += light["id"].chunks
            splits.append(codes)
            parts[part] = slice(first, first + len(codes))
            first += len(codes)
        return cls(parts, pa.chunked_array(ids, pa.string()), np.concatenate(splits))

    def pieces(self, wanted: NDArray[np.bool_]) -> list[Piece]:
        """The rows for which ``wanted`` (N,) is true."""
        found = [(name, np.flatnonzero(wanted[here])) for name, here in self.parts.items()]
        return [(name, rows) for name, rows in found if len(rows)]

    def keys(self, wanted: NDArray[np.bool_]) -> Keys:
        """Rank of the id of each wanted row among them: the same in whatever order the corpus is."""
        order = pc.sort_indices(self.ids).to_numpy()  # of all: to take the wanted ids out would copy them
        order = order[wanted[order]]
        keys = np.empty(len(wanted), np.int32)
        keys[order] = np.arange(len(order), dtype=np.int32)
        return keys[wanted]


@dataclass(frozen=True)
class Model:
    """What labels a row: ``fine`` (F, D), ``coarse`` (K, D) float32 and ``fine_to_coarse`` (F,) int64 of ``clusters/centroids.safetensors``."""

    fine: F32
    coarse: F32
    fine_to_coarse: NDArray[np.int64]

    @classmethod
    def read(cls, clusters: Folder) -> Model:
        """From ``RUN/clusters``."""
        return cls(**load_safetensors(clusters.read_bytes(CENTROIDS)))

    def write(self, clusters: Folder) -> None:
        """To ``RUN/clusters``."""
        clusters.write_bytes(CENTROIDS, save_safetensors(vars(self).copy()))


def fit_clusters(config: RunConfig, corpus: Folder, stage: Stage, progress: Progress) -> None:
    """Write ``centroids.safetensors``, ``clusters.json`` and, last, the labels into the stage's folder.

    Raises:
        ConfigError: the corpus is too small for the number of clusters, the backend is not installed, or the cap on an expert's share cannot be held.
    """
    part, experts, out = config.partition, config.num_experts, stage.folder
    index = Index.read(corpus)
    train = index.split == schema.SPLITS.index("train")
    total = int(train.sum())
    config.check_train_rows(total)
    part.check_backend()
    say = lambda message: progress.update(0, message=message)  # noqa: E731
    rows = _open(corpus, index.pieces(train), index.keys(train), part, say)
    try:
        if part.method == "kmeans":
            model, summary = _two_levels(config, rows, stage, say)
            given = None
        else:
            given = random_experts(corpus, index, experts, config.seed)
            model, summary = _means_of(rows, given[train], experts)
        fine, distance = np.empty(len(train), np.int32), np.empty(len(train), np.float32)
        fine[train], distance[train] = label(rows, model, None if given is None else given[train])
    except ConfigError:
        out.delete(_saved(stage))  # of settings that are refused
        raise
    finally:
        if isinstance(rows, RemoteRows):
            rows.close()
    for places, own_fine, own_distance in label_others(corpus, index, ~train, part, model, given):
        fine[places], distance[places] = own_fine, own_distance
    expert = model.fine_to_coarse[fine].astype(np.int32)
    sizes = summary["sizes"]
    model.write(out)
    out.write_json(
        CLUSTERS,
        {
            **summary,
            "sizes_validation": np.bincount(expert[index.split == schema.SPLITS.index("validation")], minlength=experts).tolist(),
            "sizes_all": np.bincount(expert, minlength=experts).tolist(),
            "method": part.method,
            "metric": part.metric,
            "imbalance": max(sizes) * experts / total,
            "largest_fine_share": max(summary["fine_sizes"]) * experts / total,
            "splits": {name: int((index.split == code).sum()) for code, name in enumerate(schema.SPLITS)},
        },
    )
    split = pa.DictionaryArray.from_arrays(pa.array(index.split), pa.array(schema.SPLITS)).cast(pa.string())
    labels = pa.table({"id": index.ids, "fine": fine, "expert": expert, "distance": distance, "split": split})
    schema.write_table(out, schema.version_name(schema.LABELS, 1), labels)
    out.delete(_saved(stage))


def _open(corpus: Folder, pieces: list[Piece], keys: Keys, part: PartitionConfig, say: Callable[[str], None]) -> Rows | RemoteRows:
    width = schema.read_table(corpus, pieces[0][0], ["embedding"])["embedding"].type.shape[0]
    if len(keys) * width * 2 > DRIVER_BYTES:
        return RemoteRows(corpus, pieces, keys, width, part.metric, part.backend, DRIVER_BYTES, say)
    return Rows(*load(corpus, pieces, width, part.metric, len(keys)), keys, backend=part.backend, threads=_threads())


def _threads() -> int:
    return len(os.sched_getaffinity(0))


# -- k-means ------------------------------------------------------------------------------------------------------------


def _two_levels(config: RunConfig, rows: Rows | RemoteRows, stage: Stage, say: Callable[[str], None]) -> tuple[Model, dict[str, Any]]:
    part, experts = config.partition, config.num_experts
    fit = _fit_fine(part, rows, rng.key(config.seed, "fine"), stage, say)
    if fit.counts.min() == 0:
        distinct = int((fit.counts > 0).sum())
        if not fit.converged:
            raise ConfigError(
                f"partition.max_iterations: after {part.max_iterations}, {part.fine - distinct} of {part.fine} fine clusters are still empty and "
                "would start again at rows far from the others; raise it, or lower partition.fine"
            )
        raise ConfigError(
            f"partition.fine: {part.fine} fine clusters, but the embeddings of the {rows.total} training rows are only {distinct} different ones; "
            f"lower it (--set partition.fine={distinct})"
        )
    coarse = coarse_clusters(fit.centroids, fit.counts, experts, config.seed, part.max_iterations, part.max_share, part.weighted, say)
    sizes = np.bincount(coarse.fine_to_coarse, fit.counts, experts).astype(int)
    if sizes.min() == 0:
        raise ConfigError(
            f"partition: expert {int(sizes.argmin())} of {experts} would get no training row (sizes {sizes.tolist()}); "
            "raise partition.fine or partition.max_iterations, or ask for fewer experts"
        )
    summary = {
        "sizes": sizes.tolist(),
        "fine_sizes": fit.counts.tolist(),
        "inertia": [fit.inertia, coarse.inertia],
        "converged": fit.converged,
        "cap": coarse.cap,
        "over_cap": list(coarse.over),
    }
    return Model(fit.centroids, coarse.centroids, coarse.fine_to_coarse), summary


def _fit_fine(part: PartitionConfig, rows: Rows | RemoteRows, seed: int, stage: Stage, say: Callable[[str], None]) -> Fit:
    """The fine level; goes on where a run with the same inputs was."""
    name, folder = _saved(stage), stage.folder
    saved = begun = time.monotonic()

    def save(state: State) -> None:
        nonlocal saved
        if state.previous is None or time.monotonic() - saved >= SAVE_SECONDS:
            previous = {} if state.previous is None else {"previous": state.previous}
            folder.write_bytes(name, save_safetensors({"centroids": state.centroids, "inertia": np.array(state.inertia), **previous}))
            saved = time.monotonic()

    def tell(iteration: int, inertia: float, changed: int) -> None:
        nonlocal begun
        seconds, begun = time.monotonic() - begun, time.monotonic()
        left = clock(seconds * (part.max_iterations - iteration - 1))
        say(
            f"k-means: iteration {iteration + 1}, inertia {inertia:.6g}, {changed} rows ({changed / rows.total:.2%}) moved, "
            f"{rows.total / seconds:,.0f} rows/s, at most {left} to go"
        )

    if folder.exists(name):
        found = load_safetensors(folder.read_bytes(name))
        state = State(found["centroids"], found.get("previous"), tuple(found["inertia"].tolist()))
        say(f"k-means: going on after iteration {len(state.inertia)}")
    else:
        say(f"k-means++: {part.fine} centroids from a sample")
        state = start(rows, part.fine, seed, _threads())
        save(state)
    return lloyd(rows, state, part.max_iterations, tell, save)


def _saved(stage: Stage) -> str:
    """File of the state between iterations: named after all that the fit depends on, and not in the manifest, as it begins with _."""
    return f"_kmeans-{fingerprint(stage.inputs)}.safetensors"


# -- random -------------------------------------------------------------------------------------------------------------


def random_experts(corpus: Folder, index: Index, experts: int, seed: int) -> Labels:
    """Expert of each row by hash of its near-duplicate group: equal shares are expected.

    Where the source itself says what is held out, groups are of rows with the same meaning, and would make experts of meanings: there by hash
    of the id.
    """
    labels = np.empty(len(index.split), np.int32)
    for name, content, notes in schema.read_each(corpus, ["id", "group"], index.parts):
        keys = content["id" if schema.SPLIT_GIVEN in notes else "group"].to_pylist()
        labels[index.parts[name]] = [rng.key(seed, "random-partition", key) % experts for key in keys]
    return labels


def _means_of(rows: Rows | RemoteRows, labels: Labels, experts: int) -> tuple[Model, dict[str, Any]]:
    part = rows.sums_by(labels, experts)
    if part.counts.min() == 0:
        raise ConfigError(f"partition: by chance, expert {int(part.counts.argmin())} of {experts} would get no training row; ask for fewer experts")
    centroids = means(part)
    summary = {
        "sizes": part.counts.tolist(),
        "fine_sizes": part.counts.tolist(),
        "inertia": [[inertia_of(rows.squares(), part, centroids)], [0.0]],
        "converged": True,
        "cap": None,
        "over_cap": [],
    }
    return Model(centroids, centroids, np.arange(experts)), summary


# -- labels -------------------------------------------------------------------------------------------------------------


def label(rows: Rows | RemoteRows, model: Model, given: Labels | None = None) -> tuple[Labels, F32]:
    """Fine cluster of each row (the nearest, unless given) and its squared distance to the expert's centroid."""
    fine = rows.labels(model.fine) if given is None else given
    return fine, rows.distances(model.fine_to_coarse[fine].astype(np.int32), model.coarse)


def label_pieces(
    corpus: Folder, pieces: list[Piece], model: Model, metric: str, backend: str, given: Labels | None = None, threads: int = 1
) -> tuple[Labels, F32]:
    """:func:`label` for rows that the clusters were not fitted on."""
    stored, scale = load(corpus, pieces, model.fine.shape[1], metric, sum(len(rows) for _, rows in pieces))
    return label(Rows(stored, scale, backend=backend, threads=threads), model, given)


def label_others(
    corpus: Folder, index: Index, others: NDArray[np.bool_], part: PartitionConfig, model: Model, given: Labels | None
) -> Iterator[tuple[NDArray[np.int64], Labels, F32]]:
    """:func:`label_pieces` for some rows: places, fine clusters, distances. Some part files are read here, more of them in Ray tasks."""
    pieces = index.pieces(others)
    batches = [pieces[low : low + PIECES_AT_ONCE] for low in range(0, len(pieces), PIECES_AT_ONCE)]
    places = [np.concatenate([index.parts[name].start + at for name, at in batch]) for batch in batches]
    fixed = [None if given is None else given[at] for at in places]
    if len(batches) > 1:
        import ray

        size = 2 * model.fine.shape[1] * max(map(len, places))  # embeddings are float16
        task = ray.remote(label_pieces).options(num_cpus=1, memory=memory(size), scheduling_strategy="SPREAD")
        shared = ray.put(model)
        found = [task.remote(corpus, batch, shared, part.metric, part.backend, own) for batch, own in zip(batches, fixed, strict=True)]
        results: Iterable[tuple[Labels, F32]] = map(ray.get, found)
    else:
        results = (label_pieces(corpus, batch, model, part.metric, part.backend, own, _threads()) for batch, own in zip(batches, fixed, strict=True))
    for at, (fine, distance) in zip(places, results, strict=True):
        yield at, fine, distance
