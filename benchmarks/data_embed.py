"""The embed pipeline on this machine: its rate against the bare encoders, and its memory at N and ten times N rows.

    python benchmarks/data_embed.py --out benchmarks/results/data_embed.md
    python benchmarks/data_embed.py --memory 100000 --out benchmarks/results/data_embed_memory.md

Rate: ``ours`` is the pipeline over Parquet files of JPEGs: read, decode, check, hash, encode, write, with one encoder actor a processor. The
other is a loop over the same encoders and the same pictures, decoded in memory beforehand, in one process a processor. Both run in turn; starting
and loading is not counted: the pipeline's time begins when as many parts are written as there are actors. Weights are random: time does not depend on
them.

Memory: tiny pictures, encoders that cost nothing, so that rows are what fills memory. Peak resident memory (VmHWM) of the driver, which lists
units and finds duplicates, and of the encoders; each number of rows in a process of its own. The slope is what a row more takes at the peak.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import secrets
import statistics
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from benchmarks.alternating import HEAD, alternate, hardware, ratios
from benchmarks.output import command, write
from paris_ray import config as configs
from paris_ray.config import RunConfig
from paris_ray.data import embed, part
from paris_ray.data.sources import open_source
from paris_ray.storage import Folder

EMBEDDERS = {"DINOv2 ViT-S/14 at 224": "vit_small_patch14_dinov2.lvd142m", "EfficientNet-Lite0 at 128": None}


def photograph(seed: int) -> bytes:
    """A JPEG of 384 × 320 with structure at all scales, about 40 kB."""
    g = np.random.default_rng(seed)
    total = np.zeros((320, 384, 3))
    for cells in (4, 16, 64, 160):
        small = Image.fromarray(g.integers(0, 256, (cells, cells, 3), dtype=np.uint8))
        total += np.asarray(small.resize((384, 320), Image.Resampling.BICUBIC)) / cells**0.7
    sink = io.BytesIO()
    Image.fromarray((255 * total / total.max()).astype(np.uint8)).save(sink, "JPEG", quality=90)
    return sink.getvalue()


def tiny_png(g: np.random.Generator) -> bytes:
    """A picture of 8 × 8."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    lines = b"".join(b"\0" + g.bytes(24) for _ in range(8))
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(lines, 0)) + chunk(b"IEND", b"")


def start_ray() -> None:
    """A cluster of this machine alone."""
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    ray.init(address="local", num_cpus=os.cpu_count(), include_dashboard=False, log_to_driver=False)


# -- rate ---------------------------------------------------------------------------------------------------------------


def rate_config(folder: Path, name: str, rows: int) -> RunConfig:
    """A run over pictures of 256 pixels, whose encoders are made."""
    model, sets = EMBEDDERS[name], []
    if model is None:
        sets = ["data.embedding={kind: efficientnet_lite0, image_size: 128}"]
    else:
        import timm
        from safetensors.torch import save_file

        weights = folder / "dino.safetensors"
        save_file(timm.create_model(model, num_classes=0).state_dict(), weights)
        sets = [f"data.embedding={{kind: timm, model: {model}, weights: {weights}, image_size: 224}}"]
    source = folder / "pictures"
    if not source.exists():
        source.mkdir()
        table = pa.table({"image": [photograph(i) for i in range(rows)], "caption": [f"photograph number {i}" for i in range(rows)]})
        pq.write_table(table, source / "a.parquet", row_group_size=16)
    sizes = ["data.image_size=256", "data.codec={kind: patch_pca, downsampling: 8, channels: 4}", "data.store_text=token_ids"]
    work = ["data.rows_per_part=16", "data.encoder_batch=16", f"data.min_encoders={os.cpu_count()}", f"data.max_encoders={os.cpu_count()}"]
    run = folder / name.split(maxsplit=1)[0]
    return configs.load("tiny", [f"run_dir={run}", f"data.source={{kind: parquet, uri: {source}}}", *sets, *sizes, *work])


class Silent:
    """Stands for the stage's progress."""

    total = 0

    def update(self, done: int, **_: Any) -> None:
        """Nobody asks."""


def pipeline(config: RunConfig) -> float:
    """Seconds a picture, from when every actor has done a part, by the times at which parts were written.

    The driver hears of parts later, and of several at once. At the first of these times one actor is already at its next part, which is half a part
    too many of all that are counted.
    """
    run = Folder(config.run_dir)
    (run / "corpus").delete_all()
    embed.encode(config, run, open_source(config.data).units(config.data.rows_per_part), Silent())  # type: ignore[arg-type]
    parts = sorted(Path(run.path, "corpus").glob("part-*.parquet"), key=lambda path: path.stat().st_mtime_ns)
    first, counted = parts[config.data.max_encoders - 1], parts[config.data.max_encoders :]
    rows = sum(pq.read_metadata(path).num_rows for path in counted)
    return (counted[-1].stat().st_mtime_ns - first.stat().st_mtime_ns) / 1e9 / rows


def bare(pipe: Connection, data: dict[str, Any], run: str, share: tuple[int, int]) -> None:
    """A process that encodes its share of the pictures whenever it is told to, and says how many seconds it took."""
    worker = part.EncodePart(data, 0, run)
    rows = []
    for unit in worker.source.units(worker.data.rows_per_part)[share[0] :: share[1]]:
        rows += [row for _, row in part.read_rows(worker.source, unit, worker.data, 0, 1) if isinstance(row, part.Row)]
    pixels, captions = np.stack([row.pixels for row in rows]), [row.caption for row in rows]
    size = worker.data.encoder_batch

    def encode(start: int) -> None:
        worker.codec.encode(pixels[start : start + size])
        worker.embedder(pixels[start : start + size])
        worker.text.tokenize(captions[start : start + size])

    encode(0)
    pipe.send(len(rows))
    while pipe.recv():
        begun = time.perf_counter()
        for start in range(0, len(rows), size):
            encode(start)
        pipe.send(time.perf_counter() - begun)


@contextlib.contextmanager
def bare_processes(config: RunConfig) -> Iterator[list[Connection]]:
    """One a processor."""
    context, count = multiprocessing.get_context("spawn"), os.cpu_count() or 1
    pipes, processes = [], []
    for i in range(count):
        mine, theirs = context.Pipe()
        process = context.Process(target=bare, args=(theirs, config.data.model_dump(mode="json"), config.run_dir, (i, count)), daemon=True)
        process.start()
        pipes.append(mine)
        processes.append(process)
    try:
        yield pipes
    finally:
        for pipe in pipes:
            pipe.send(False)
        for process in processes:
            process.join()


def decoding(config: RunConfig) -> str:
    """How fast one processor reads, decodes, checks and hashes, without encoders."""
    source, rates = open_source(config.data), []
    for unit in source.units(config.data.rows_per_part):
        begun = time.perf_counter()
        count = sum(1 for _ in part.read_rows(source, unit, config.data, 0, 1))
        rates.append(count / (time.perf_counter() - begun))
    return (
        f"Reading, decoding, checking and hashing alone: {statistics.median(rates):,.0f} pictures/s a processor (JPEGs of 384 × 320, to 256 × 256)."
    )


def measure_rates(rows: int, rounds: int) -> list[str]:
    """The table."""
    start_ray()
    table = []
    with tempfile.TemporaryDirectory() as folder:
        for name in EMBEDDERS:
            config = rate_config(Path(folder), name, rows)
            embed.embed(config)
            with bare_processes(config) as pipes:
                each = sum(pipe.recv() for pipe in pipes)

                def loop(pipes: list[Connection] = pipes, each: int = each) -> float:
                    for pipe in pipes:
                        pipe.send(True)
                    return max(pipe.recv() for pipe in pipes) / each

                def ours(config: RunConfig = config) -> float:
                    return pipeline(config)

                times = alternate({"ours": ours, "bare encoders": loop} for _ in range(rounds))
            table += ratios(f"{name}, {rows} pictures, seconds a picture", times)
            print(table[-1], flush=True)
        alone = decoding(config)
    return [*HEAD, *table, "", alone]


# -- memory -------------------------------------------------------------------------------------------------------------


def peak() -> float:
    """Peak resident memory of this process so far, in MB."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines["VmHWM"].split()[0]) / 1024


def one_memory(rows: int, folder: Path) -> dict[str, Any]:
    """Embed so many rows; the peaks of this process and of its encoders."""
    from data import light

    source, g = folder / f"rows-{rows}", np.random.default_rng(0)
    source.mkdir()
    for file in range(0, rows, 10_000):
        names = range(file, min(file + 10_000, rows))
        table = pa.table({"image": [tiny_png(g) for _ in names], "caption": [f"number {i}" for i in names]})
        pq.write_table(table, source / f"{file:09d}.parquet", row_group_size=1000)
    light.lighten(light.PeakEncode)
    start_ray()
    sets = ["data.image_size=8", "data.encoder_batch=64", "data.rows_per_part=2048", "data.max_encoders=1"]
    config = light.light_config(folder / f"run-{rows}", f"{{kind: parquet, uri: {source}}}", *sets)
    before, begun = peak(), time.perf_counter()
    counts = embed.embed(config)["counts"]
    run = Folder(config.run_dir)
    workers = [run.read_json(f"peaks/{entry.name}") for entry in (run / "peaks").files()]
    return {
        "rows": counts["rows"],
        "before": before,
        "driver": peak(),
        "workers": max(one["VmHWM"] for one in workers),
        "seconds": time.perf_counter() - begun,
        "near_duplicates": counts["near_duplicates"],
    }


def measure_memory(rows: int) -> list[str]:
    """The table."""
    found = []
    with tempfile.TemporaryDirectory() as folder:
        for n in (rows, 10 * rows):
            command = [sys.executable, __file__, "--one-memory", str(n), folder]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(found[-1], flush=True)
    table = ["| rows | driver before, MB | driver, MB | encoder, MB | seconds |", "|---|---|---|---|---|"]
    table += [f"| {one['rows']} | {one['before']:.0f} | {one['driver']:.0f} | {one['workers']:.0f} | {one['seconds']:.0f} |" for one in found]
    few, many = found
    ratio = f"| ten times the rows | | × {many['driver'] / few['driver']:.3f} | × {many['workers'] / few['workers']:.3f} | |"
    slopes = [(many[who] - few[who]) * 2**20 / (many["rows"] - few["rows"]) for who in ("driver", "workers")]
    return [*table, ratio, f"| bytes a row | | {slopes[0]:.0f} | {slopes[1]:.0f} | |"]


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=512, help="pictures of the comparison of rates")
    parser.add_argument("--rounds", type=int, default=7, help="of pipeline and loop in turn; at least 6")
    parser.add_argument("--memory", type=int, metavar="N", help="instead: memory at N and 10 N rows")
    parser.add_argument("--one-memory", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    root = Path(__file__).parents[1]
    paths = [str(root), str(root / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ.update(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
    if args.one_memory:
        print(json.dumps(one_memory(int(args.one_memory[0]), Path(args.one_memory[1]))))
        return
    head = [f"# Embed: {'memory' if args.memory else 'rate'}", "", hardware(1), command(), ""]
    print("\n".join(head), flush=True)
    table = measure_memory(args.memory) if args.memory else measure_rates(args.rows, args.rounds)
    print("\n".join(table), flush=True)
    write(args.out, [*head, *table])


if __name__ == "__main__":
    main()
