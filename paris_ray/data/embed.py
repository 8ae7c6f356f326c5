"""From a source of pictures and captions to the corpus: latents, text, semantic embeddings, splits. Ray Data does the work.

A unit of the source becomes one part: the unit of work, of resumption and of one Parquet file. The worker that reads its rows writes it, so that
only counts travel. A part's bytes depend on the rows and the config, not on who made it or beside whom. The driver holds the list of units and,
at the end, while it looks for duplicates, some 70 bytes of each row.
"""

from __future__ import annotations

import collections
import os
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq

from paris_ray import stages
from paris_ray.config import ConfigError, DataConfig, PatchPcaCodec, RunConfig
from paris_ray.data import duplicates, encoders, schema
from paris_ray.data.attempts import Work, counted
from paris_ray.data.codec import PatchPcaCodec as FittedPca
from paris_ray.data.codec import PatchSums
from paris_ray.data.openmoji import ATTRIBUTION
from paris_ray.data.part import EncodePart, SumPart, encoder_bytes, unit_table, worker_bytes
from paris_ray.data.placement import memory, quiet
from paris_ray.data.sources import open_source
from paris_ray.data.sources.base import Unit, listing
from paris_ray.data.splits import read_splits
from paris_ray.manifest import Stage, StaleError, refuse_half_appended
from paris_ray.progress import Progress
from paris_ray.storage import Folder

EXAMPLES = 3
"""Rows that the manifest names for each reason to refuse some."""


def embed(config: RunConfig) -> dict[str, Any]:
    """Make ``RUN/encoders``, ``RUN/corpus`` and ``RUN/rejected``; what is there already is kept. Needs a connection to Ray.

    Returns:
        the manifest of ``RUN/corpus``.

    Raises:
        ConfigError: the source or an encoder cannot be used, or no row survives.
        StaleError: what is there was made from other inputs, or an append was cut off.
    """
    with Progress(Folder(config.run_dir) / "events", "embed", 0, "rows") as progress:
        manifest = _embed(config, progress)
        counts = manifest["counts"]
        progress.total = counts["rows"] + counts["rejected"]
        progress.update(progress.total)
        progress.finish(f"{counts['rows']} rows, {counts['rejected']} rejected")
    return manifest


def _embed(config: RunConfig, progress: Progress) -> dict[str, Any]:
    run = Folder(config.run_dir)
    refuse_half_appended(run / "corpus")
    first, began = stages.stage(config, "encoders"), time.monotonic()
    fitted = first.begin()
    if fitted.state == "valid" and (done := stages.status(config, "embed")).state == "valid" and done.manifest is not None:
        return done.manifest
    with first.attempt():
        units = open_source(config.data).units(config.data.rows_per_part)
        found = listing(units)
        progress.total = found["rows"] or 0
        if fitted.state != "valid":
            try:
                counts = _make_encoders(config, run, units, found, progress)
            except ConfigError:
                first.folder.delete_all()  # none of it is of use with other settings
                raise
            first.publish(counts, time.monotonic() - began)
    meta = (run / "encoders").read_json(encoders.FILE)
    if meta["listing"] != found:
        then, now = (f"{one['units']} parts" + (f" of {one['rows']} rows" if one["rows"] is not None else "") for one in (meta["listing"], found))
        raise StaleError(
            f"embed: the source has changed since {run.uri}/encoders was made: {then} then, {now} now, or other names, sizes or tables. "
            "Put it back, choose another run_dir, or pass --rebuild embed to delete what was made and make it anew."
        )
    second, began = stages.stage(config, "embed"), time.monotonic()
    state = second.begin()
    if state.state == "valid" and state.manifest is not None:
        return state.manifest
    if state.state == "absent":
        (run / "rejected").delete_all()
    with second.attempt():
        encode(config, run, units, progress)
    progress.update(progress.done, message="looking for duplicates", force=True)
    counts = finish(run)
    if not counts["splits"]["train"]:
        reasons = ", ".join(f"{kind} ({n})" for kind, n in counts["reasons"].items()) or "all are held out"
        raise ConfigError(
            f"data.source: none of {counts['listed']} rows is left to train on: {reasons}. {run.uri}/rejected lists every row with its reason; "
            "mend the source, then pass --rebuild embed"
        )
    return second.publish(counts, time.monotonic() - began)


# -- encoders -----------------------------------------------------------------------------------------------------------


def _make_encoders(config: RunConfig, run: Folder, units: list[Unit], found: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fit or fetch the encoders and write ``RUN/encoders``. A worker loads the heavy ones while others sum patches for the codec."""
    import ray

    data, folder = config.data, run / "encoders"
    loading = ray.remote(_save_frozen).options(num_cpus=data.encoder_cpus).remote(data.model_dump(mode="json"), folder.uri)
    counts: dict[str, Any] = {}
    codec: dict[str, Any] | None = None
    if isinstance(data.codec, PatchPcaCodec):
        try:
            fitted = FittedPca.fit(data.codec, _sum_patches(config, units, progress))
        except ConfigError:
            ray.wait([loading])  # it writes
            raise
        with tempfile.TemporaryDirectory() as local:
            fitted.save(local)
            for entry in Folder(local).files(recursive=True):
                folder.upload(os.path.join(local, entry.name), entry.name)
        codec, counts["codec_kept_variance"] = fitted.meta(), fitted.kept
    try:
        meta = ray.get(loading)
    except ray.exceptions.RayTaskError as error:
        # The user's mistakes are to be read, not to be searched for in a worker's traceback.
        raise error.cause if isinstance(error.cause, ConfigError) else error from None
    meta["codec"] = codec or meta["codec"]
    config.check_downsampling(meta["codec"]["downsampling"])
    meta["codec"]["latent_size"] = data.image_size // meta["codec"]["downsampling"]
    attribution = ATTRIBUTION if data.of_openmoji else None
    folder.write_json(encoders.FILE, {**meta, "image_size": data.image_size, "listing": found, "attribution": attribution})
    return counts


def _save_frozen(data: dict[str, Any], target: str) -> dict[str, Any]:
    """In a worker: load the encoders that are not fitted here, write what the run must carry, return what ``encoders.json`` says."""
    import torch
    from safetensors.numpy import save as to_safetensors

    from paris_ray.data.codec import build_vae
    from paris_ray.data.embedding import build_embedder
    from paris_ray.data.text import build_text_encoder

    torch.set_num_threads(1)
    config, folder = DataConfig.model_validate(data), Folder(target)
    text = build_text_encoder(config.text)
    ids, lengths = text.tokenize([""])
    states = text.encode(torch.from_numpy(ids), torch.from_numpy(lengths))
    meta: dict[str, Any] = {"text": text.meta(), "embedding": build_embedder(config.embedding).meta(), "codec": None}
    with tempfile.TemporaryDirectory() as local:
        text.save(local)
        if config.codec.kind == "vae":
            codec = build_vae(config.codec)
            codec.save(local)
            meta["codec"] = codec.meta()
        for entry in Folder(local).files(recursive=True):
            folder.upload(os.path.join(local, entry.name), entry.name)
    null = {"states": states[0].numpy(), "token_ids": ids[0], "length": lengths}
    folder.write_bytes(encoders.NULL_TEXT, to_safetensors(null))
    return meta


def _sum_patches(config: RunConfig, units: list[Unit], progress: Progress) -> PatchSums:
    import ray.data

    assert isinstance(config.data.codec, PatchPcaCodec)
    quiet()
    total, done = PatchSums.zero(config.data.codec.downsampling), 0
    dataset = ray.data.from_arrow([unit_table(unit) for unit in units]).map_batches(
        SumPart(config.data.model_dump(mode="json"), config.seed, config.run_dir),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=1,
        memory=memory(worker_bytes(config.data, 1)),
    )
    with counted(Folder(config.run_dir) / "encoders", [Work.of(unit) for unit in units]):
        for row in dataset.iter_rows():
            total.merge(PatchSums(row["count"], np.frombuffer(row["total"]).copy(), np.frombuffer(row["outer"]).reshape(total.outer.shape).copy()))
            done += row["rows"]
            progress.update(0, message=f"fitting the codec: {done} rows read")
    return total


# -- corpus -------------------------------------------------------------------------------------------------------------


def encode(config: RunConfig, run: Folder, units: list[Unit], progress: Progress) -> None:
    """Encode and write every part that is not there yet."""
    import ray.data

    data = config.data
    there = set(schema.written(run / "corpus"))
    todo = [unit for unit in units if schema.part_name(unit.number) not in there]
    listed = [read_listed(run / "corpus", unit) for unit in units if schema.part_name(unit.number) in there]
    done, parts = sum(listed), len(listed)
    how = f"{'encoding' if not done else f'resuming after {done} rows'}; rows are counted part by part, {len(todo)} to go"
    progress.update(done, message=how if todo else "", force=True)
    if not todo:
        return
    quiet()
    most = min(data.max_encoders, len(todo))
    dataset = ray.data.from_arrow([unit_table(unit) for unit in todo]).map_batches(
        EncodePart,
        fn_constructor_kwargs={"data": data.model_dump(mode="json"), "seed": config.seed, "run_dir": run.uri},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(data.min_encoders, most), max_size=most),
        num_cpus=data.encoder_cpus,
        num_gpus=data.encoder_gpus,
        memory=memory(encoder_bytes(data, run / "encoders")),
    )
    rejected, known = 0, all(unit.rows is not None for unit in units)
    with counted(run / "corpus", [Work.of(unit) for unit in todo]):
        for row in dataset.iter_rows():
            done += row["rows"]
            rejected += row["rejected"]
            parts += 1
            if not known:  # as many rows as the parts so far would have, were they all
                progress.total = round(done / parts * len(units))
            progress.update(done, message=f"part {parts} of {len(units)}" + (f", {rejected} rejected" if rejected else ""))


def read_listed(corpus: Folder, unit: Unit) -> int:
    """How many rows a unit had, now that its part is there."""
    if unit.rows is not None:
        return unit.rows
    with corpus.open(schema.part_name(unit.number)) as source, pq.ParquetFile(source) as content:
        return schema.notes(content)["listed"]


def finish(run: Folder, before: dict[str, Any] | None = None) -> dict[str, Any]:
    """Drop rows that are there twice, give near-duplicates one split, count everything and publish ``RUN/rejected``.

    Done again it finds nothing more. What is counted is read back from the files, so that it is true after any number of resumptions.

    Args:
        run: the run directory.
        before: the manifest of the corpus while it gets more rows. Those that it counts stay as they are, in the splits they have.

    Returns:
        what the manifest of the corpus says of its rows.

    Raises:
        RuntimeError: rows were lost or doubled.
    """
    corpus, rejected = run / "corpus", run / "rejected"
    for folder in (corpus, rejected):
        folder.sweep()  # of workers that were killed
    rows = duplicates.read_rows(corpus)
    settled, version = (0, 1) if before is None else (int(before["counts"]["rows"]), int(before["version"]) + 1)
    if settled:
        rows.splits[:settled] = np.concatenate(list(read_splits(corpus).values()))
    kept = duplicates.first_of_equals(rows.ids)
    _in_tasks(duplicates.drop, [(run, name, keep) for name, keep in rows.by_part(kept).items() if not keep.all()])
    rows.keep(kept)
    near = duplicates.join_near_duplicates(corpus, rows, settled, version)
    splits = np.bincount(rows.splits, minlength=len(schema.SPLITS))
    cut, enlarged, listed = 0, 0, 0
    side = (run / "encoders").read_json(encoders.FILE)["image_size"]
    for _, content, notes in schema.read_each(corpus, ["caption_cut", "width", "height"], schema.written(corpus)):
        cut += int(pc.sum(content["caption_cut"]).as_py() or 0)
        enlarged += int((np.minimum(content["width"].to_numpy(), content["height"].to_numpy()) < side).sum())
        listed += notes["listed"]
    reasons: collections.Counter[str] = collections.Counter()
    examples: dict[str, list[str]] = {}
    for _, content, _ in schema.read_each(rejected, ["reason", "source"], schema.written(rejected)):
        for reason, name in zip(content["reason"].to_pylist(), content["source"].to_pylist(), strict=True):
            kind = reason.split(":", 1)[0]
            reasons[kind] += 1
            if len(own := examples.setdefault(kind, [])) < EXAMPLES:
                own.append(name)
    counts: dict[str, Any] = {
        "listed": listed,
        "rows": len(rows.ids),
        "rejected": reasons.total(),
        "reasons": dict(reasons.most_common()),
        "examples": examples,
        "splits": {split: int(n) for split, n in zip(schema.SPLITS, splits, strict=True)},
        "captions_cut": cut,
        "enlarged": enlarged,
        **near,
    }
    if counts["rows"] + counts["rejected"] != listed:
        raise RuntimeError(
            f"{run.uri}: {counts['rows']} rows in corpus/ and {counts['rejected']} in rejected/ are not the {listed} that were read; "
            "something else has written there: pass --rebuild embed"
        )
    Stage("rejected", rejected, {}, {}).publish({"rows": counts["rejected"]})
    return counts


def _in_tasks(function: Callable[..., None], calls: list[tuple[Any, ...]]) -> None:
    """Call a function in Ray tasks, as many at once as there are processors."""
    import ray

    if not calls:
        return
    task, waiting = ray.remote(function).options(num_cpus=1), list[Any]()
    for call in calls:
        waiting.append(task.remote(*call))
        if len(waiting) >= max(1, int(ray.cluster_resources().get("CPU", 1))):
            done, waiting = ray.wait(waiting)
            ray.get(done)
    ray.get(waiting)
