"""More rows for a run that has its clusters: labelled with the centroids there are, added to the shards, nothing fitted anew and no file changed.

Each folder that gets more becomes a new version of itself (:mod:`paris_ray.manifest`). What was made from an earlier one, such as an expert, stays
valid.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import RunConfig, Source
from paris_ray.data import embed, schema
from paris_ray.data.cut import cut_all, groups
from paris_ray.data.fit import Index, Model, label_others, random_experts
from paris_ray.data.partition import shard_counts
from paris_ray.data.sources import open_source
from paris_ray.data.sources.base import listing
from paris_ray.layout import EARLIER_ROUTERS, ROUTER_FILE
from paris_ray.manifest import APPENDING, Stage, StaleError, published, refuse_half_appended, require
from paris_ray.progress import Progress
from paris_ray.storage import Folder, copy_file


def append_corpus(config: RunConfig, source: Source) -> int:
    """Embed another source with the run's encoders, and publish a new version of ``RUN/corpus``. Needs a connection to Ray.

    Rows that the corpus has already are refused; a row that looks like one of them gets its split, and none if it looks like several of different
    splits. Running it again goes on where it was, and does nothing once the source is in the corpus.

    Args:
        config: of the run.
        source: as ``data.source`` of a config.

    Returns:
        rows appended.

    Raises:
        FileNotFoundError: the run has no corpus yet.
        ConfigError: the source cannot be used.
        StaleError: the corpus was made from other inputs, or another source is half appended, to the corpus or to the clusters.
    """
    run, stage = Folder(config.run_dir), stages.stage(config, "embed")
    before = require(stage.folder, "embed")
    _check_inputs(stage)
    other = config.model_copy(update={"data": config.data.model_copy(update={"source": source})})
    units = open_source(other.data).units(config.data.rows_per_part)
    found = {"source": source.model_dump(mode="json"), "listing": listing(units)}
    done = before["counts"].get("appended", [])
    half = stage.folder.read_json(APPENDING) if stage.folder.exists(APPENDING) else None
    if half is not None and half["listing"] in done:  # it died when all was published
        stage.folder.delete(APPENDING)
        half = None
    if done[-1:] != [found["listing"]]:  # else what follows finishes it
        refuse_half_appended(run / "clusters")
        _refuse_unknown_rows(run, before)
    if found["listing"] in done:
        return 0
    begun = time.monotonic()
    if half is None:
        published = set(schema.parts(stage.folder))
        for folder in (stage.folder, run / "rejected"):  # of an append that was given up
            for name in set(schema.written(folder)) - published:
                folder.delete(name)
        stage.folder.write_json(APPENDING, found)
    elif half["listing"] != found["listing"]:
        raise StaleError(
            f"append: {stage.folder.uri} has half of {half['source']}; append that first, as it was then, or delete {APPENDING} there to give it up"
        )
    first = schema.part_number(schema.parts(stage.folder)[-1]) + 1
    with Progress(run / "events", "append", found["listing"]["rows"] or 0, "rows") as progress:
        embed.encode(other, run, [dataclasses.replace(unit, number=unit.number + first) for unit in units], progress)
        counts = embed.finish(run, before)
        stage.publish({**counts, "appended": [*done, found["listing"]]}, time.monotonic() - begun, after=before)
        stage.folder.delete(APPENDING)
        more = int(counts["rows"]) - int(before["counts"]["rows"])
        unused = counts["splits"]["unused"] - before["counts"]["splits"]["unused"]
        progress.finish(f"{more} rows embedded" + (f", {unused} of them unused: they look like rows of several splits" if unused else ""))
    return more


def _refuse_unknown_rows(run: Folder, corpus: dict[str, Any]) -> None:
    """Raise StaleError while the clusters do not know all rows of the corpus: who gets them is said by the append that they came with."""
    clusters = published(run / "clusters")
    if clusters is not None and (more := int(corpus["counts"]["rows"]) - int(clusters["counts"]["rows"])) > 0:
        raise StaleError(
            f"{run.uri}/corpus has {more} rows of an earlier append that {run.uri}/clusters does not know; finish that first, with the same command "
            f"again, or give the rows to their clusters: python -m jobs.append --config {run.uri}/config.yaml"
        )


def with_another_expert(config: RunConfig) -> RunConfig:
    """A run with one expert more, as ``expert`` says, and a router that starts from the one there is, if there is one.

    Where replicas are named, it has one of its own.
    """
    tree = config.model_dump(mode="json")
    tree["experts"] = [*tree["experts"], {}]
    tree["partition"]["added"] += 1
    if isinstance(config.serve.placement, tuple):
        tree["serve"]["placement"] = [*tree["serve"]["placement"], [config.num_experts]]
    run, earlier = Folder(config.run_dir), f"{EARLIER_ROUTERS}/{config.num_experts}"
    if published(run / "router") is not None or (run / earlier).exists("config.json"):
        tree["router"]["init_from"] = f"{run.uri}/{earlier}"
    return configs.build(tree)


def keep_router(config: RunConfig) -> None:
    """Copy the router's weights to where they outlive its training anew."""
    run = Folder(config.run_dir)
    if published(run / "router") is not None:
        for name in (ROUTER_FILE, "config.json"):
            copy_file(run / "router" / "export", name, run / EARLIER_ROUTERS / str(config.num_experts))


def append_partition(config: RunConfig, expert: int | None = None) -> int:
    """Label what ``RUN/corpus`` has more than ``RUN/clusters``, and publish new versions of ``clusters/`` and of each ``shards/expert=K``.

    Running it again after it died finishes what is left; once all is done it does nothing. Needs a connection to Ray.

    Args:
        config: of the run.
        expert: whose the rows are, instead of their clusters'; one that has no shard yet gets one.

    Returns:
        rows appended.

    Raises:
        FileNotFoundError: the run has no corpus or no clusters yet.
        StaleError: the clusters are not of an earlier version of this corpus, a source is half appended to it, or other rows to the clusters.
    """
    run, clusters = Folder(config.run_dir), stages.stage(config, "partition")
    before = require(clusters.folder, "partition")
    refuse_half_appended(run / "corpus")
    _check_inputs(clusters)
    if unknown := [] if expert is not None else stages.unknown_experts(config):
        raise StaleError(f"append: {unknown[0]}")
    index, known = Index.read(run / "corpus"), before["counts"]["rows"]
    labels = schema.read_labels(clusters.folder, ["id", "fine", "expert", "split"])
    if labels["id"] != index.ids.slice(0, known):
        raise StaleError(f"{run.uri}/corpus does not begin with the rows of {clusters.folder.uri}; appended rows are in part files of higher numbers")
    more = len(index.split) - known
    if not more:
        clusters.folder.delete(APPENDING)
        return 0
    begun = time.monotonic()
    if clusters.folder.exists(APPENDING) and clusters.folder.read_json(APPENDING).get("expert") != expert:
        refuse_half_appended(clusters.folder)
    clusters.folder.write_json(APPENDING, {} if expert is None else {"expert": expert})
    with Progress(run / "events", "append", more, "rows") as progress:
        progress.update(0, message="labelling", force=True)
        new = np.arange(len(index.split)) >= known
        parts = [name for name, rows in index.parts.items() if rows.start >= known]
        added = _label(config, run / "corpus", index, new, Model.read(clusters.folder), expert)
        grouped = groups(run / "corpus", parts)
        done = 0
        fine, experts = (added[name].to_numpy() for name in ("fine", "expert"))
        for rows in cut_all(run / "corpus", grouped, fine, experts, run / "shards", before["counts"]["groups"]):
            done += rows
            progress.update(done, message="cutting shards")
        labels = pa.concat_tables([labels, added.select(labels.column_names)])
        for k in range(config.num_experts):
            shard = stages.stage(config, f"shard-{k}")
            old = published(shard.folder) if k == expert else require(shard.folder, "partition")
            if old is None or old["inputs"]["parents"] != shard.parents:  # else this has been done
                shard.publish(shard_counts(labels, k), time.monotonic() - begun, after=old)
        schema.write_table(clusters.folder, schema.version_name(schema.LABELS, before["version"] + 1), added)
        train = labels["expert"].to_numpy()[labels["split"].to_numpy() == "train"]
        sizes = np.bincount(train, minlength=config.num_experts)
        counts = {"rows": len(labels), "sizes": sizes.tolist(), "imbalance": float(sizes.max() * len(sizes) / sizes.sum())}
        counts |= {"fine": before["counts"]["fine"], "groups": before["counts"]["groups"] + len(grouped)}
        clusters.publish(counts, time.monotonic() - begun, after=before)
        clusters.folder.delete(APPENDING)
        progress.finish(f"{more} rows appended")
    return more


def _check_inputs(stage: Stage) -> None:
    """Raise StaleError unless a stage was made with this config, from this version of its parents or an earlier one."""
    if (status := stage.status()).state == "stale":
        listed = "\n".join(f"  - {reason}" for reason in status.reasons)
        raise StaleError(f"append: {stage.folder.uri} was made from other inputs:\n{listed}\nPut back what changed; nothing was appended.")


def _label(config: RunConfig, corpus: Folder, index: Index, new: NDArray[np.bool_], model: Model, given_to: int | None) -> pa.Table:
    """Labels of the new rows; their distances are to their clusters, whoever gets them."""
    first = int(new.argmax())
    given = random_experts(corpus, index, config.num_clusters, config.seed) if config.partition.method == "random" else None
    fine, distance = np.empty(int(new.sum()), np.int32), np.empty(int(new.sum()), np.float32)
    for places, own_fine, own_distance in label_others(corpus, index, new, config.partition, model, given):
        fine[places - first], distance[places - first] = own_fine, own_distance
    expert = model.fine_to_coarse[fine].astype(np.int32) if given_to is None else np.full(len(fine), given_to, np.int32)
    split = pa.array([schema.SPLITS[code] for code in index.split[new]], pa.string())
    return pa.table({"id": index.ids.slice(first), "fine": fine, "expert": expert, "distance": distance, "split": split})
