"""What workers do with one part of the source: sum its patches for the codec, or encode and write it. No Ray here."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paris_ray.config import DataConfig, PatchPcaCodec
from paris_ray.data import encoders, schema
from paris_ray.data.codec import PatchSums, load_codec
from paris_ray.data.images import RejectError, load_square
from paris_ray.data.sources import Item, Source, open_source, row_id, split_of
from paris_ray.storage import Folder

_ITEM = pa.struct([(field.name, pa.int64() if field.name == "size" else pa.binary()) for field in dataclasses.fields(Item)])


def part_rows(number: int, items: Sequence[Item]) -> pa.Table:
    """A part as one row of a table: its number and its items. Names are bytes, as a file system's names need not be Unicode."""

    def plain(value: Any) -> Any:
        return value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value

    rows = [{field.name: plain(getattr(item, field.name)) for field in dataclasses.fields(Item)} for item in items]
    return pa.table({"part": pa.array([number], pa.int64()), "items": pa.array([rows], pa.list_(_ITEM))})


def items_of(table: pa.Table) -> tuple[int, list[Item]]:
    """The inverse of :func:`part_rows`."""

    def plain(value: Any) -> Any:
        return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value

    row = table.to_pylist()[0]
    return int(row["part"]), [Item(**{name: plain(value) for name, value in item.items()}) for item in row["items"]]


@dataclass(slots=True)
class Row:
    """A row that can be used: what goes into the corpus beside what the encoders make of it."""

    pixels: NDArray[np.uint8]  # (S, S, 3)
    caption: str
    id: str
    split: str
    group: str
    source: str
    width: int
    height: int


def shown(name: str) -> str:
    """A name as text that can be stored: bytes that are no Unicode become question marks."""
    return name.encode("utf-8", "replace").decode()


def read_row(source: Source, item: Item, data: DataConfig, seed: int) -> Row | str:
    """Read and decode one row, or the reason why it cannot be used. Raises OSError when the store fails."""
    if item.reason is not None:
        return shown(item.reason)
    try:
        sample = source.load(item)
        pixels, width, height = load_square(sample.image, data.image_size, data.max_pixels)
    except RejectError as error:
        return shown(str(error))
    identity = row_id(sample.content, sample.caption)
    # Where a group is one picture, its rows differ in captions only: no split may see the picture beside another.
    unit = sample.group if sample.group == sample.content else identity
    return Row(pixels, sample.caption, identity, split_of(data.split, seed, sample.group, unit), sample.group, shown(item.source), width, height)


def read_rows(source: Source, items: Sequence[Item], data: DataConfig, seed: int, threads: int) -> Iterator[tuple[Item, Row | str]]:
    """Rows in order, read ahead by a few threads: decoders and stores release the lock."""
    ahead: collections.deque[tuple[Item, Future[Row | str]]] = collections.deque()
    with ThreadPoolExecutor(threads) as pool:
        for item in items:
            ahead.append((item, pool.submit(read_row, source, item, data, seed)))
            if len(ahead) >= data.encoder_batch + 2 * threads:
                first, result = ahead.popleft()
                yield first, result.result()
        for first, result in ahead:
            yield first, result.result()


class SumPart:
    """Partial sums over a part's training rows, for the codec.

    Args:
        data: the run's ``data`` config, as a dict.
        seed: the run's seed.
    """

    def __init__(self, data: dict[str, Any], seed: int):
        self.data, self.seed = data, seed

    def __call__(self, table: pa.Table) -> pa.Table:
        """One part → one row: how many rows it has, and its sums."""
        data = DataConfig.model_validate(self.data)
        assert isinstance(data.codec, PatchPcaCodec)
        _, items = items_of(table)
        sums = PatchSums.zero(data.codec.downsampling)
        for _, row in read_rows(open_source(data), items, data, self.seed, 1):
            if isinstance(row, Row) and row.split == "train":
                sums.add(row.pixels[None], data.codec.downsampling)
        return pa.table({"rows": [len(items)], "count": [sums.count], "total": [sums.total.tobytes()], "outer": [sums.outer.tobytes()]})


class EncodePart:
    """Reads, decodes, encodes and writes parts; loads the encoders once.

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
        """One part → its files in ``corpus/`` and ``rejected/``, and one row that counts it."""
        number, items = items_of(table)
        name = schema.part_name(number)
        tables: list[pa.Table] = []
        rejects: list[tuple[str, str]] = []
        batch: list[Row] = []

        def flush() -> None:
            if batch:
                made, refused = self._encode(batch)
                tables.append(made)
                rejects.extend(refused)
                batch.clear()

        for item, row in read_rows(self.source, items, self.data, self.seed, max(1, int(self.data.encoder_cpus))):
            if isinstance(row, str):
                rejects.append((shown(item.source), row))
            else:
                batch.append(row)
                if len(batch) == self.data.encoder_batch:
                    flush()
        flush()
        # The part of the corpus comes last: where it is, the part is done.
        if rejects:
            columns = {"source": [source for source, _ in rejects], "reason": [reason for _, reason in rejects]}
            schema.write_table(self.run / "rejected", name, schema.table(schema.REJECTED, columns))
        corpus = pa.concat_tables(tables).combine_chunks() if tables else self.schema.empty_table()
        schema.write_table(self.run / "corpus", name, corpus)
        return pa.table({"rows": [len(items)], "rejected": [len(rejects)]})

    def _encode(self, rows: list[Row]) -> tuple[pa.Table, list[tuple[str, str]]]:
        """Rows → a piece of the corpus, and those whose latent or embedding is not finite."""
        import torch

        pixels = np.stack([row.pixels for row in rows])
        latents = self.codec.encode(pixels).cpu().numpy().astype(np.float16)
        vectors = self.embedder(pixels).astype(np.float16)
        ids, lengths = self.text.tokenize([row.caption for row in rows])
        fields: dict[str, NDArray[Any]] = {"latent": latents, "embedding": vectors, "text_len": lengths}
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
        columns["dup_of"] = [None] * len(kept)
        bad = [(row.source, "not finite: an encoder overflows float16 on it") for row, good in zip(rows, finite, strict=True) if not good]
        return schema.table(self.schema, columns), bad
