"""Cutting shards against ``pyarrow.dataset.write_dataset``, and the memory of the driver and of k-means over the number of rows.

    python benchmarks/data_partition.py --out benchmarks/results/data_partition.md
    python benchmarks/data_partition.py --memory 100000 --out benchmarks/results/data_partition_memory.md

Writing: a generated corpus with latents of 4 × 32 × 32, cut into eight shards by ``paris_ray.data.cut``, against what one would write with pyarrow:
read the same columns, add the expert, ``write_dataset`` with Hive folders, with its own encodings of columns (a dictionary for each) and with
ours (``schema.layout``). All write zstd with the same number of threads; ours also sorts by id.
Rounds alternate; a ratio is theirs over ours (above 1: ours is faster), the median with its 95 % interval.

Memory, at N and ten times N rows: the whole stage (k-means in actors, cutting by Ray Data) on generated corpora with thin latents, each in a process
of its own, and k-means in one process. The peak resident set of that process, and of the stage also that of all its processes and Ray's together
(their proportional sets, looked at ten times a second), without what the rows in actors take; and the slope in bytes a row.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.dataset as pads
import pyarrow.parquet as pq

from benchmarks.alternating import HEAD, alternate, hardware, ratios
from benchmarks.output import command, write
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import RunConfig
from paris_ray.data import cut, fit, kmeans, nearest, partition, schema
from paris_ray.storage import Folder

EXPERTS, TOKENS, PER_PART = 8, 16, 2048


def generate(path: str, rows: int, width: int, side: int, fine: int) -> RunConfig:
    """A run with a corpus of random rows: token ids, latents (4, side, side), embeddings of four blobs for each fine cluster."""
    sets = [f"run_dir={path}", f"partition.fine={fine}", "partition.max_iterations=5", f"experts={EXPERTS}", "data.store_text=token_ids"]
    config, run, g = configs.load("tiny", [*sets, "partition.max_share=null"]), Folder(path), np.random.default_rng(0)
    meta: dict[str, Any] = {
        "text": {"max_length": TOKENS, "width": 8},
        "codec": {"channels": 4, "latent_size": side},
        "embedding": {"width": width},
    }
    one = stages.stage(config, "encoders")
    one.begin()
    run.write_json("encoders/encoders.json", meta)
    one.publish()
    two, kind = stages.stage(config, "embed"), schema.corpus_schema(meta, "token_ids")
    two.begin()
    centres = g.standard_normal((4 * fine, width))
    for number, low in enumerate(range(0, rows, PER_PART)):
        n = min(PER_PART, rows - low)
        ids = [value.tobytes().hex() for value in g.integers(0, 2**63, (n, 2))]
        columns: dict[str, Any] = {
            "id": ids, "caption": ["a caption"] * n, "token_ids": g.integers(0, 9, (n, TOKENS)), "text_len": np.full(n, 8),
            "latent": g.standard_normal((n, 4, side, side)).astype(np.float16),
            "embedding": (centres[g.integers(0, 4 * fine, n)] + g.standard_normal((n, width))).astype(np.float16),
            "split": g.choice(schema.SPLITS[:3], n, p=[0.9, 0.05, 0.05]).tolist(), "group": ids, "phash": np.arange(n),
            "caption_cut": np.zeros(n, bool),
            "source": ["s"] * n, "width": np.full(n, 256), "height": np.full(n, 256),
        }  # fmt: skip
        schema.write_table(run / "corpus", schema.part_name(number), schema.table(kind, columns))
    two.publish()
    return config


# -- writing ------------------------------------------------------------------------------------------------------------


def writing(rows: int, rounds: int, threads: int, folder: Path) -> list[str]:
    """The rows of the table."""
    pa.set_cpu_count(threads)
    generate(str(folder / "run"), rows, 8, 32, 64)
    corpus, g = Folder(folder / "run/corpus"), np.random.default_rng(1)
    labels = g.integers(0, 64, rows, np.int32)
    expert, parts = labels % np.int32(EXPERTS), schema.parts(corpus)

    def ours() -> None:
        for _ in cut.cut_all(corpus, [parts], labels, expert, Folder(folder / "out"), 0):
            pass

    def theirs(**encodings: Any) -> None:
        names = ["id", "token_ids", "text_len", "latent", "split"]
        table = pq.read_table([f"{corpus.path}/{name}" for name in parts], columns=names)
        table = table.append_column("fine", pa.array(labels)).append_column("expert", pa.array(expert))
        table = table.filter(pa.compute.not_equal(table["split"], "held_out"))
        options = pads.ParquetFileFormat().make_write_options(compression="zstd", **encodings)
        pads.write_dataset(table, folder / "out", format="parquet", partitioning=["expert"], partitioning_flavor="hive", file_options=options)

    def alike() -> None:
        found = schema.layout(pq.read_schema(f"{corpus.path}/{parts[0]}"))
        theirs(**{name: found[name] for name in ("use_dictionary", "use_byte_stream_split")})

    def timed(function: Callable[[], None]) -> float:
        shutil.rmtree(folder / "out", ignore_errors=True)
        begun = time.perf_counter()
        function()
        return time.perf_counter() - begun

    def round_(_: int) -> dict[str, Callable[[], float]]:
        return {"ours": lambda: timed(ours), "write_dataset": lambda: timed(theirs), "write_dataset with our encodings": lambda: timed(alike)}

    timed(theirs)
    times = alternate(map(round_, range(rounds)))
    timed(ours)
    size = sum(path.stat().st_size for path in (folder / "out").rglob("*.parquet"))
    seconds = float(np.median(times["ours"]))
    return [
        *HEAD, *ratios("reading, cutting and writing", times), "",
        f"{rows} rows of {size / rows / 1000:.1f} kB. Ours: {rows / seconds:,.0f} rows/s, {size / seconds / 1e6:.0f} MB/s on {threads} thread(s).",
    ]  # fmt: skip


# -- memory -------------------------------------------------------------------------------------------------------------


def _measured(what: str, *arguments: str) -> tuple[float, float]:
    """Peak resident set of a child process, and the peak of the memory of it and all that it started, in bytes; what they share counts once."""
    child, most = subprocess.Popen([sys.executable, __file__, "--child", what, *arguments], stdout=subprocess.PIPE, text=True), 0
    while child.poll() is None:
        total = 0
        for process in [psutil.Process(child.pid), *psutil.Process(child.pid).children(recursive=True)]:
            with contextlib.suppress(psutil.Error, OSError):
                total += process.memory_full_info().pss
        most = max(most, total)
        time.sleep(0.1)
    assert child.stdout is not None
    if child.returncode:
        raise SystemExit(child.returncode)
    return float(json.loads(child.stdout.read().splitlines()[-1])), float(most)


def child(what: str, arguments: list[str]) -> None:
    """In a process of its own: print its peak resident set."""
    if what == "stage":
        os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
        fit.DRIVER_BYTES, cut.GROUP_BYTES = int(arguments[1]), 8_000_000
        partition.draw_sheets = lambda config: None  # type: ignore[assignment]
        partition.write_report = lambda config, sheets: (Folder(config.run_dir) / "clusters").write_bytes("report.html", b"")  # type: ignore[assignment]
        partition.partition(configs.load(f"{arguments[0]}/config.yaml"))
    else:
        n, width = int(arguments[0]), int(arguments[1])
        g, stored = np.random.default_rng(0), np.empty((n, width), np.float16)
        for low in range(0, n, PER_PART):
            stored[low : low + PER_PART] = g.standard_normal((min(PER_PART, n - low), width))
        rows = kmeans.Rows(stored, nearest.scales(stored, "cosine", n))
        kmeans.lloyd(rows, kmeans.start(rows, 256, 0), 3)
    status = Path("/proc/self/status").read_text()  # not getrusage, which knows of the parent's peak too
    print(1024 * int(status.split("VmHWM:")[1].split()[0]))


def memory(few: int, folder: Path) -> Iterator[str]:
    """Lines of Markdown."""
    many = 10 * few
    yield from ["| what | peak at few rows, MB | at many, MB | ratio | bytes a row |", "|---|---|---|---|---|"]

    def line(what: str, peaks: list[float]) -> str:
        return f"| {what} | {peaks[0] / 1e6:.0f} | {peaks[1] / 1e6:.0f} | {peaks[1] / peaks[0]:.3f} | {(peaks[1] - peaks[0]) / (many - few):.0f} |"

    driver, all_, width = [], [], 64
    for rows in (few, many):
        path = folder / f"run-{rows}"
        config = generate(str(path), rows, width, 2, 64)
        (path / "config.yaml").write_text(configs.dump(config))
        mine, everybodys = _measured("stage", str(path), str(int(0.6 * 2 * width * rows)))  # two actors, whatever they hold
        driver.append(mine)
        all_.append(everybodys - 2 * width * rows)
        shutil.rmtree(path)
    yield line("partition: all its processes and Ray's, but for the rows (float16) in actors", all_)
    yield line("its driver", driver)
    for width in (64, 256):
        peaks = [_measured("rows", str(n), str(width))[0] for n in (few, many)]
        yield line(f"k-means in one process, width {width}: 2 × {width} of them are the row", peaks)


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=40_000, help="of the corpus that is cut")
    parser.add_argument("--rounds", type=int, default=9, help="at least 6, for an interval")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--memory", type=int, metavar="N", help="instead: memory at N and 10 N rows")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(args.child[0], args.child[1:])
    lines = [
        f"# Partition: {'memory' if args.memory else 'rate'}",
        "",
        f"{hardware(args.threads)}, pyarrow {pa.__version__}",
        command(),
        "",
    ]
    print("\n".join(lines), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for text in memory(args.memory, Path(folder)) if args.memory else writing(args.rows, args.rounds, args.threads, Path(folder)):
            print(text, flush=True)
            lines.append(text)
    write(args.out, lines)
    return None


if __name__ == "__main__":
    main()
