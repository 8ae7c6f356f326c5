"""From a source of pictures and captions to the corpus: latents, text, semantic embeddings, splits. Ray Data does the work.

A part is a fixed range of the source's rows. It is the unit of work, of resumption and of one Parquet file; the worker that reads its rows
writes it, so that only counts travel. A part's bytes depend on the rows and the config, not on who made it or beside whom.
"""

from __future__ import annotations

import collections
import logging
import os
import tempfile
import time
from typing import Any

import numpy as np
import pyarrow as pa

from paris_ray import stages
from paris_ray.config import ConfigError, DataConfig, PatchPcaCodec, RunConfig
from paris_ray.data import encoders, schema
from paris_ray.data.codec import PatchPcaCodec as FittedPca
from paris_ray.data.codec import PatchSums
from paris_ray.data.openmoji import ATTRIBUTION
from paris_ray.data.part import EncodePart, SumPart, part_rows
from paris_ray.data.sources import Item, listing, open_source
from paris_ray.manifest import StaleError
from paris_ray.progress import Progress
from paris_ray.storage import Folder


def embed(config: RunConfig) -> dict[str, Any]:
    """Make ``RUN/encoders``, ``RUN/corpus`` and ``RUN/rejected``; what is there already is kept. Needs a connection to Ray.

    Returns:
        the manifest of ``RUN/corpus``.

    Raises:
        ConfigError: the source or an encoder cannot be used, or no row survives.
        StaleError: what is there was made from other inputs.
    """
    progress = Progress(Folder(config.run_dir) / "events", "embed", 0, "rows")
    try:
        manifest = _embed(config, progress)
    except BaseException as error:
        progress.fail(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
        raise
    counts = manifest["counts"]
    progress.total = counts["rows"] + counts["rejected"]
    progress.update(progress.total)
    progress.finish(f"{counts['rows']} rows, {counts['rejected']} rejected")
    return manifest


def _embed(config: RunConfig, progress: Progress) -> dict[str, Any]:
    run = Folder(config.run_dir)
    first, began = stages.stage(config, "encoders"), time.monotonic()
    fitted = first.begin()
    if fitted.state == "valid" and (done := stages.status(config, "embed")).state == "valid" and done.manifest is not None:
        return done.manifest
    items = open_source(config.data).items()
    parts, found = _parts(items, config.data.rows_per_part), listing(items)
    progress.total = len(items)
    if fitted.state != "valid":
        counts = _make_encoders(config, run, parts, found, progress)
        first.publish(counts, time.monotonic() - began)
    meta = (run / "encoders").read_json(encoders.FILE)
    if meta["listing"] != found:
        raise StaleError(
            f"embed: the source has changed since {run.uri}/encoders was made: {meta['listing']['items']} rows then, {len(items)} now, or other "
            "names, sizes or captions. Put it back, choose another run_dir, or pass --rebuild embed to delete what was made and make it anew."
        )
    second, began = stages.stage(config, "embed"), time.monotonic()
    state = second.begin()
    if state.state == "valid" and state.manifest is not None:
        return state.manifest
    if state.state == "absent":
        (run / "rejected").delete_all()
    _encode(config, run, parts, progress)
    progress.update(len(items), message="looking for duplicates", force=True)
    _drop_duplicates(run)
    counts = _count(run)
    if not counts["splits"]["train"]:
        reasons = ", ".join(f"{kind} ({n})" for kind, n in counts["reasons"].items()) or "all are held out"
        raise ConfigError(
            f"data.source: none of {len(items)} rows is left to train on: {reasons}. {run.uri}/rejected lists every row with its reason; "
            "mend the source, then pass --rebuild embed"
        )
    return second.publish(counts, time.monotonic() - began)


def _parts(items: list[Item], rows: int) -> list[pa.Table]:
    """The rows in tables of one row each: the part's number and its items."""
    return [part_rows(number, items[start : start + rows]) for number, start in enumerate(range(0, len(items), rows))]


def _quiet() -> None:
    import ray.data

    # Progress is reported once, by the stage; Ray Data's warnings (no resources, slow workers) are kept.
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False


# -- encoders -----------------------------------------------------------------------------------------------------------


def _make_encoders(config: RunConfig, run: Folder, parts: list[pa.Table], found: dict[str, Any], progress: Progress) -> dict[str, Any]:
    """Fit or fetch the encoders and write ``RUN/encoders``. A worker loads the heavy ones while others sum patches for the codec."""
    import ray

    data, folder = config.data, run / "encoders"
    loading = ray.remote(_save_frozen).options(num_cpus=data.encoder_cpus).remote(data.model_dump(mode="json"), folder.uri)
    counts: dict[str, Any] = {}
    codec: dict[str, Any] | None = None
    if isinstance(data.codec, PatchPcaCodec):
        fitted = FittedPca.fit(data.codec, _sum_patches(config, parts, progress))
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
    attribution = ATTRIBUTION if data.source.kind == "openmoji" else None
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


def _sum_patches(config: RunConfig, parts: list[pa.Table], progress: Progress) -> PatchSums:
    import ray.data

    assert isinstance(config.data.codec, PatchPcaCodec)
    _quiet()
    total, done = PatchSums.zero(config.data.codec.downsampling), 0
    dataset = ray.data.from_arrow(parts).map_batches(
        SumPart(config.data.model_dump(mode="json"), config.seed), batch_size=1, batch_format="pyarrow", num_cpus=1
    )
    for row in dataset.iter_rows():
        total.merge(PatchSums(row["count"], np.frombuffer(row["total"]).copy(), np.frombuffer(row["outer"]).reshape(total.outer.shape).copy()))
        done += row["rows"]
        progress.update(0, message=f"fitting the codec: {done} rows read")
    return total


# -- corpus -------------------------------------------------------------------------------------------------------------


def _encode(config: RunConfig, run: Folder, parts: list[pa.Table], progress: Progress) -> None:
    """Encode and write every part that is not there yet."""
    import ray.data

    data = config.data
    there = set(schema.parts(run / "corpus"))
    rows = {int(part["part"][0].as_py()): len(part["items"][0]) for part in parts}
    todo = [part for part in parts if schema.part_name(part["part"][0].as_py()) not in there]
    done = sum(rows.values()) - sum(rows[part["part"][0].as_py()] for part in todo)
    progress.update(done, message="encoding" if not done else f"resuming after {done} rows", force=True)
    if not todo:
        return
    _quiet()
    most = min(data.max_encoders, len(todo))
    dataset = ray.data.from_arrow(todo).map_batches(
        EncodePart,
        fn_constructor_kwargs={"data": data.model_dump(mode="json"), "seed": config.seed, "run_dir": run.uri},
        batch_size=1,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(min_size=min(data.min_encoders, most), max_size=most),
        num_cpus=data.encoder_cpus,
        num_gpus=data.encoder_gpus,
    )
    rejected = 0
    for row in dataset.iter_rows():
        done += row["rows"]
        rejected += row["rejected"]
        progress.update(done, message=f"{rejected} rejected" if rejected else "encoding")


def _drop_duplicates(run: Folder) -> None:
    """Move rows whose picture and caption an earlier row has already to the rejects. Done again it finds nothing more."""
    corpus, rejected = run / "corpus", run / "rejected"
    names = schema.parts(corpus)
    ids = [np.array(schema.read_table(corpus, name, ["id"])["id"].to_pylist(), "S32") for name in names]
    _, first = np.unique(np.concatenate(ids), return_index=True)
    keep = np.zeros(sum(len(part) for part in ids), bool)
    keep[first] = True
    for name, kept in zip(names, np.split(keep, np.cumsum([len(part) for part in ids])[:-1]), strict=True):
        if kept.all():
            continue
        content = schema.read_table(corpus, name)
        old = schema.read_table(rejected, name).to_pylist() if rejected.exists(name) else []
        # A run that died between the two writes has these rejects already.
        listed = {row["source"] for row in old}
        again = content.filter(pa.array(~kept)).select(["source", "id"]).to_pylist()
        new = [{"source": row["source"], "reason": f"duplicate: of {row['id']}"} for row in again if row["source"] not in listed]
        schema.write_table(rejected, name, pa.Table.from_pylist(old + new, schema=schema.REJECTED))
        schema.write_table(corpus, name, content.filter(pa.array(kept)))


def _count(run: Folder) -> dict[str, Any]:
    """Rows, rejects by the kind of their reason, rows by split; read back from the files, so that it is true after any number of resumptions."""
    splits: collections.Counter[str] = collections.Counter()
    for name in schema.parts(run / "corpus"):
        splits.update(schema.read_table(run / "corpus", name, ["split"])["split"].to_pylist())
    reasons: collections.Counter[str] = collections.Counter()
    for name in schema.parts(run / "rejected"):
        reasons.update(reason.split(":", 1)[0] for reason in schema.read_table(run / "rejected", name, ["reason"])["reason"].to_pylist())
    return {
        "rows": splits.total(),
        "rejected": reasons.total(),
        "reasons": dict(reasons.most_common()),
        "splits": {split: splits[split] for split in schema.SPLITS},
    }
