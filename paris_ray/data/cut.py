"""Cutting the corpus into one shard folder per expert, group of part files by group of part files. Torch-free.

A group is read once and gives one file to each expert that has rows in it: no shuffle, no picture travels. A file that is there already is not
written again, files appear whole, and equal rows give equal bytes; so a run that died goes on where it was. A corpus in another order or in other
files gives a shard the same rows, though in other files of it once there are several groups; who reads it puts them in the order of their ids.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from paris_ray.data import schema
from paris_ray.data.attempts import Work, attempt, counted
from paris_ray.data.placement import memory, quiet
from paris_ray.data.splits import read_each
from paris_ray.storage import Folder

GROUP_BYTES = 512 << 20
"""Rows that one task reads at once, in bytes as they are in memory: bounds what it takes, and makes few files per expert."""
LIGHT_BYTES = 100
"""Of a row beside its tensors: id, fine cluster, split and Arrow's offsets."""


def part_bytes(corpus: Folder, parts: list[str]) -> list[int]:
    """Memory that the rows of each of these part files take, as far as cutting reads them."""
    kinds = [field.type for field in schema.arrow_schema(corpus, parts[0]) if field.name in ("text", "token_ids", "latent")] if parts else []
    row = LIGHT_BYTES + schema.tensor_bytes(kinds)
    return [row * rows for rows in schema.count_rows(corpus, parts)]


def groups(corpus: Folder, parts: Collection[str]) -> list[list[str]]:
    """Consecutive ones of these part files, of at most :data:`GROUP_BYTES` together, at least one."""
    grouped: list[list[str]] = []
    ordered, room = sorted(parts), 0
    for name, size in zip(ordered, part_bytes(corpus, ordered), strict=True):
        if not grouped or size > room:
            grouped.append([])
            room = GROUP_BYTES
        grouped[-1].append(name)
        room -= size
    return grouped


def cut(corpus: Folder, parts: list[str], index: int, fine: NDArray[np.int32], expert: NDArray[np.int32], shards: Folder) -> int:
    """Write a group's rows into ``shards/expert=K/part-<index>.parquet``, in the order of their ids: those of train and validation.

    Args:
        corpus: ``RUN/corpus``.
        parts: names of the group's files.
        index: number of the group.
        fine: fine cluster of each row of the group, in the files' order.
        expert: expert of each row of the group.
        shards: ``RUN/shards``.

    Returns:
        rows read.
    """
    found = list(read_each(corpus, ["id"], parts))
    ids, split = np.concatenate([light["id"].to_numpy() for _, light, _ in found]), np.concatenate([codes for _, _, codes in found])
    if len(ids) != len(fine):
        raise ValueError(f"{corpus.uri}: group {index} has {len(ids)} rows, its labels are {len(fine)}; run with --rebuild partition")
    kept, names = split <= schema.SPLITS.index("validation"), np.array(schema.SPLITS, object)
    name = schema.part_name(index)
    wanted = {int(k): np.flatnonzero(kept & (expert == k)) for k in np.unique(expert[kept])}
    missing = {k: rows for k, rows in wanted.items() if not (shards / f"expert={k}").exists(name)}
    if missing:
        text = "text" if "text" in schema.arrow_schema(corpus, parts[0]).names else "token_ids"
        heavy = pa.concat_tables(table for _, table, _ in schema.read_each(corpus, ["id", text, "text_len", "latent"], parts))
        for k, rows in missing.items():
            order = rows[np.argsort(ids[rows].astype(str), kind="stable")]
            chosen = heavy.take(pa.array(order)).combine_chunks()
            content = chosen.append_column(pa.field("fine", pa.int32()), pa.array(fine[order], pa.int32()))
            content = content.append_column(pa.field("split", pa.string()), pa.array(names[split[order]], pa.string()))
            schema.write_table(shards / f"expert={k}", name, content.replace_schema_metadata(None))
    return len(ids)


def cut_batch(batch: dict[str, NDArray[Any]], corpus: str, shards: str) -> dict[str, NDArray[Any]]:
    """:func:`cut` for Ray Data's ``map_batches``: one row of a batch is one group."""
    done = []
    for parts, index, fine, expert in zip(batch["parts"], batch["index"], batch["fine"], batch["expert"], strict=True):
        labels = np.frombuffer(fine, np.int32), np.frombuffer(expert, np.int32)
        with attempt(Folder(shards), _work(int(index), parts.split("\n"))):
            done.append(cut(Folder(corpus), parts.split("\n"), int(index), *labels, Folder(shards)))
    return {"rows": np.array(done)}


def _work(index: int, parts: list[str]) -> Work:
    remedy = f"most likely of memory: cutting takes {3 * GROUP_BYTES / 2**30:.1f} GiB beside the process. Give nodes more; the same command goes on"
    return Work(index, f"partition: corpus/{parts[0]} to {parts[-1]}", remedy)


def cut_all(
    corpus: Folder, grouped: list[list[str]], fine: NDArray[np.int32], expert: NDArray[np.int32], shards: Folder, first: int
) -> Iterator[int]:
    """Cut groups; yields the rows of each as it is done. One group is cut here, several by Ray Data, as many at once as the cluster can.

    Args:
        corpus: ``RUN/corpus``.
        grouped: the groups' files.
        fine: fine cluster of each of their rows, in the files' order.
        expert: expert of each.
        shards: ``RUN/shards``.
        first: number of the first group.

    Raises:
        WorkError: workers keep dying on a group.
    """
    jobs: list[dict[str, Any]] = []
    start = 0
    sizes = iter(schema.count_rows(corpus, [name for parts in grouped for name in parts]))
    for index, parts in enumerate(grouped, first):
        rows = sum(next(sizes) for _ in parts)
        here = slice(start, start + rows)
        jobs.append({"parts": "\n".join(parts), "index": index, "fine": fine[here].tobytes(), "expert": expert[here].tobytes()})
        start += rows
    if len(jobs) == 1:
        yield cut(corpus, grouped[0], first, fine, expert, shards)
        return
    import ray.data

    quiet()
    data = ray.data.from_items(jobs, override_num_blocks=len(jobs))
    needs = memory(3 * GROUP_BYTES)  # a group, an expert's rows of it, and these as they are written
    cutting = data.map_batches(cut_batch, fn_kwargs={"corpus": corpus.uri, "shards": shards.uri}, batch_size=1, num_cpus=1, memory=needs)
    with counted(shards, [_work(index, parts) for index, parts in enumerate(grouped, first)]):
        for batch in cutting.iter_batches(batch_size=1):
            yield int(batch["rows"][0])
