"""What workers do with one unit of the source: sum its patches for the codec, or encode it into a part of the corpus. No Ray here."""

from __future__ import annotations

import collections
import pickle
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paris_ray.config import DataConfig, PatchPcaCodec
from paris_ray.data import encoders, schema
from paris_ray.data.attempts import Begun, Work, attempt
from paris_ray.data.codec import PatchSums, load_codec
from paris_ray.data.filters import check_caption, check_key, check_score, check_shape
from paris_ray.data.images import PIXEL_BYTES, RejectError, load_square
from paris_ray.data.phash import phash
from paris_ray.data.sources import open_source
from paris_ray.data.sources.base import Item, Source, Unit
from paris_ray.data.sources.files import MAX_FILE_BYTES
from paris_ray.data.splits import key_id, row_id, split_of
from paris_ray.storage import Folder

ROW_GROUP = 1024
"""Rows of a part that are held in memory before they are written."""

AHEAD_BYTES = 128 << 20
"""Bytes of image files that are held while they wait to be decoded."""

MAX_REASON = 500
"""Characters of a reject's reason."""


def worker_bytes(data: DataConfig, threads: int) -> int:
    """What a worker that reads units takes at most, beside what it keeps of them: files that wait, the largest of all, and pictures being decoded."""
    return AHEAD_BYTES + MAX_FILE_BYTES + PIXEL_BYTES * data.max_pixels * threads


def encoder_bytes(data: DataConfig, encoded: Folder) -> int:
    """What an encoder takes: the same, the encoders' weights, and a row group, as arrays and as a table.

    Args:
        data: of the config.
        encoded: ``RUN/encoders``.
    """
    meta = encoded.read_json(encoders.FILE)
    row = schema.tensor_bytes(field.type for field in schema.corpus_schema(meta, data.store_text))
    weights = meta["embedding"]["bytes"] + sum(entry.size for entry in encoded.files(recursive=True))
    return worker_bytes(data, _threads(data)) + weights + 2 * ROW_GROUP * row


def _threads(data: DataConfig) -> int:
    return max(1, int(data.encoder_cpus))


def unit_table(unit: Unit) -> pa.Table:
    """A unit as one row of a table, for Ray Data."""
    return pa.table({"unit": pa.array([pickle.dumps(unit)], pa.binary())})


def unit_of(table: pa.Table) -> Unit:
    """The inverse of :func:`unit_table`."""
    unit: Unit = pickle.loads(table["unit"][0].as_py())
    return unit


@dataclass(slots=True)
class Row:
    """A row that can be used: what goes into the corpus beside what the encoders make of it."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    caption: str
    id: str
    split: str
    group: str
    phash: int
    source: str
    width: int
    height: int
    split_given: bool


def shown(name: str) -> str:
    """A name as text that can be stored: bytes that are no Unicode become question marks."""
    return name.encode("utf-8", "replace").decode()


def _reason(text: str) -> str:
    """A reason as it is stored: it may quote a field of any length."""
    return shown(text if len(text) <= MAX_REASON else f"{text[: MAX_REASON - 1]}…")


def read_row(source: Source, item: Item, data: DataConfig, seed: int) -> Row | str:
    """Read, check and decode one row, or the reason why it cannot be used. Raises OSError when the store fails."""
    if item.reason is not None:
        return _reason(item.reason)
    try:
        sample = source.load(item)
        caption = check_caption(sample.caption, data.filter)
        identity = row_id(sample.content, caption) if sample.key is None else key_id(check_key(sample.key))
        check_score(sample.score, data.filter)
        pixels, width, height = load_square(
            sample.image, data.image_size, data.max_pixels, lambda width, height: check_shape(width, height, data.filter)
        )
    except RejectError as error:
        return _reason(str(error))
    looks = phash(pixels)
    # Rows that look alike are one group, and no split may see one of them beside another. Where the source has groups of its own, these hold
    # what differs, and only the whole group is held out as one.
    group, unit = (f"{looks:016x}",) * 2 if sample.group is None else (sample.group, identity)
    split = split_of(data.split, seed, group, unit, sample.held_out)
    return Row(pixels, caption, identity, split, group, looks, shown(item.source), width, height, sample.held_out is not None)


def read_rows(source: Source, unit: Unit, data: DataConfig, seed: int, threads: int, begun: Begun | None = None) -> Iterator[tuple[str, Row | str]]:
    """Rows in order, each with its source's name, read ahead by a few threads: decoders and stores release the lock.

    Args:
        source: the source.
        unit: a unit of it.
        data: the run's config.
        seed: the run's.
        threads: rows that are read at once.
        begun: the attempt at the unit. Where workers have died before, rows are read one by one, but for those that kill.
    """
    if begun is not None and begun.alone:
        yield from _read_alone(source, unit, data, seed, begun)
        return
    ahead: collections.deque[tuple[str, int, Future[Row | str]]] = collections.deque()
    held = 0
    with ThreadPoolExecutor(threads) as pool:
        for item in source.read(unit):
            size = len(item.image) if isinstance(item.image, bytes) else 0
            held += size
            ahead.append((shown(item.source), size, pool.submit(read_row, source, item, data, seed)))
            while len(ahead) >= data.encoder_batch + 2 * threads or held > AHEAD_BYTES:
                name, size, result = ahead.popleft()
                held -= size
                yield name, result.result()
        for name, _, result in ahead:
            yield name, result.result()


def _read_alone(source: Source, unit: Unit, data: DataConfig, seed: int, begun: Begun) -> Iterator[tuple[str, Row | str]]:
    for number, item in enumerate(source.read(unit)):
        if number in begun.refused:
            yield shown(item.source), "kills its worker: two died while they read this row alone, of memory or of a decoder that crashed"
            continue
        with begun.reading(number):
            row = read_row(source, item, data, seed)
        yield shown(item.source), row


class SumPart:
    """Partial sums over a unit's training rows, for the codec.

    Args:
        data: the run's ``data`` config, as a dict.
        seed: the run's seed.
        run_dir: the run directory as seen from the worker.
    """

    def __init__(self, data: dict[str, Any], seed: int, run_dir: str):
        self.data, self.seed, self.run_dir = data, seed, run_dir

    def __call__(self, table: pa.Table) -> pa.Table:
        """One unit → one row: how many rows it has, and its sums."""
        data, unit = DataConfig.model_validate(self.data), unit_of(table)
        assert isinstance(data.codec, PatchPcaCodec)
        sums, rows = PatchSums.zero(data.codec.downsampling), 0
        with attempt(Folder(self.run_dir) / "encoders", Work.of(unit)) as begun:
            for _, row in read_rows(open_source(data), unit, data, self.seed, 1, begun):
                rows += 1
                if isinstance(row, Row) and row.split == "train":
                    sums.add(row.pixels[None], data.codec.downsampling)
        return pa.table({"rows": [rows], "count": [sums.count], "total": [sums.total.tobytes()], "outer": [sums.outer.tobytes()]})


class EncodePart:
    """Reads, decodes and encodes units and writes parts; loads the encoders once.

    Args:
        data: the run's ``data`` config, as a dict.
        seed: the run's seed.
        run_dir: the run directory as seen from the worker.

    Raises:
        ValueError: the embedding backbone here is not the one that ``RUN/encoders`` names.
    """

    def __init__(self, data: dict[str, Any], seed: int, run_dir: str):
        import torch

        from paris_ray.data.embedding import build_embedder
        from paris_ray.data.text import load_text_encoder

        torch.set_num_threads(1)
        self.data, self.seed, self.run = DataConfig.model_validate(data), seed, Folder(run_dir)
        self.source = open_source(self.data)
        folder = self.run / "encoders"
        self.meta = folder.read_json(encoders.FILE)
        device = encoders.default_device(self.data.encoder_gpus)
        if device != "cpu":
            # TF32, as convolutions are by torch's default; a latent is stored in float16. Float32 takes seven times as long (H100's data sheet).
            torch.set_float32_matmul_precision("high")
        self.codec = load_codec(folder.uri, self.meta["codec"], device)
        self.text = load_text_encoder(folder.uri, self.meta["text"], device)
        self.embedder = build_embedder(self.data.embedding, device)
        if self.embedder.fingerprint != self.meta["embedding"]["fingerprint"]:
            raise ValueError(
                f"data.embedding: the backbone on this node has the fingerprint {self.embedder.fingerprint}, {folder.uri}/{encoders.FILE} says "
                f"{self.meta['embedding']['fingerprint']}; install the same weights on every node, or pass --rebuild embed"
            )
        self.schema = schema.corpus_schema(self.meta, self.data.store_text)

    def __call__(self, table: pa.Table) -> pa.Table:
        """One unit → its files in ``corpus/`` and ``rejected/``, and one row that counts it."""
        unit = unit_of(table)
        name = schema.part_name(unit.number)
        rejects: list[tuple[str, str]] = []
        batch: list[Row] = []
        made: list[pa.Table] = []
        listed = 0

        def flush(writer: schema.PartWriter, last: bool) -> None:
            if batch:
                content, refused = self._encode(batch)
                made.append(content)
                rejects.extend(refused)
                batch.clear()
            if made and (last or sum(map(len, made)) >= ROW_GROUP):
                writer.write(pa.concat_tables(made))
                made.clear()

        # The part of the corpus appears last: where it is, the part is done.
        with attempt(self.run / "corpus", Work.of(unit)) as begun, schema.PartWriter(self.run / "corpus", name, self.schema) as writer:
            for source, row in read_rows(self.source, unit, self.data, self.seed, _threads(self.data), begun):
                listed += 1
                if isinstance(row, str):
                    rejects.append((source, row))
                else:
                    batch.append(row)
                    if row.split_given:
                        writer.notes[schema.SPLIT_GIVEN] = 1
                    if len(batch) == self.data.encoder_batch:
                        flush(writer, last=False)
            flush(writer, last=True)
            writer.notes["listed"] = listed
            if rejects:
                columns = {"source": [source for source, _ in rejects], "reason": [reason for _, reason in rejects]}
                schema.write_table(self.run / "rejected", name, schema.table(schema.REJECTED, columns))
        return pa.table({"rows": [listed], "rejected": [len(rejects)]})

    def _encode(self, rows: list[Row]) -> tuple[pa.Table, list[tuple[str, str]]]:
        """Rows → a piece of the corpus, and those whose latent or embedding is not finite."""
        import torch

        pixels = np.stack([row.pixels for row in rows])
        latents = self.codec.encode(pixels).cpu().numpy().astype(np.float16)
        vectors = self.embedder(pixels).astype(np.float16)
        ids, lengths = self.text.tokenize([row.caption for row in rows])
        # Only captions that fill their tokens may have been cut.
        cut = lengths == self.text.max_length
        cut[cut] = np.array(self.text.count([row.caption for row, full in zip(rows, cut, strict=True) if full]), int) > self.text.max_length
        fields: dict[str, NDArray[Any]] = {"latent": latents, "embedding": vectors, "text_len": lengths, "caption_cut": cut}
        if self.data.store_text == "states":
            states = self.text.encode(torch.from_numpy(ids), torch.from_numpy(lengths))
            fields["text"] = states.cpu().numpy().astype(np.float16)
        else:
            fields["token_ids"] = ids
        finite = np.isfinite(latents).all(axis=(1, 2, 3)) & np.isfinite(vectors).all(axis=1)
        if "text" in fields:
            finite &= np.isfinite(fields["text"]).all(axis=(1, 2))
        kept = [row for row, good in zip(rows, finite, strict=True) if good]
        columns: dict[str, Any] = {name: values[finite] for name, values in fields.items()}
        for name in ("id", "caption", "split", "group", "source", "width", "height"):
            columns[name] = [getattr(row, name) for row in kept]
        columns["phash"] = np.array([row.phash for row in kept], np.uint64).view(np.int64)
        bad = [(row.source, "not finite: an encoder overflows float16 on it") for row, good in zip(rows, finite, strict=True) if not good]
        return schema.table(self.schema, columns), bad
