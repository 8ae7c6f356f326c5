"""The loader alone, with a network that does nothing: rates against torch's DataLoader, and for how much of a step training waits for it.

    python benchmarks/training_loader.py --out benchmarks/results/training_loader.md

Rows have the paper's size: latents (4, 32, 32) in float16 and 77 token ids. ``ours`` draws rows, times, drops and noises by the number of the sample
and takes the rows; ``DataLoader`` is torch's over a TensorDataset of the same tensors in the training process, shuffled, ``whole batches`` the same
with one index a batch, and both draw noise and times with one call a batch. Then the loop's feed before a step of so many milliseconds in which the
processor is idle, as it is beside a GPU: in the same thread (what the loop does on a CPU), and two batches ahead in a thread (what it does on a GPU).
A ratio is the other's seconds over ours (above 1: ours is faster), the median of alternating rounds with its 95 % interval.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))

import fake_training_run as fake
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler, TensorDataset

from benchmarks import timing
from benchmarks.alternating import HEAD, alternate, ratios
from benchmarks.output import command, write
from paris_ray.storage import Folder
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.feed import Clock, feed
from paris_ray.training.loop import Loop
from paris_ray.training.shard import Rows

SHAPE, TOKENS = (4, 32, 32), 77


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=20, help="of a round")
    parser.add_argument("--step", type=float, default=0.2, help="seconds of a step that the loader feeds")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {timing.LEAST_PAIRS}")
    parser.add_argument("--out", type=Path, help="Markdown file for the tables")
    args = parser.parse_args()
    if args.rounds < timing.LEAST_PAIRS:
        parser.error(f"--rounds: at least {timing.LEAST_PAIRS}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        train = {"images": 1000 * args.batch, "batch_size": args.batch, "micro_batch": "null"}
        config = fake.make_run(folder, experts=[0], **{f"experts__0__train__{key}": value for key, value in train.items()})
        task = ExpertTask(config, 0, torch.device("cpu"))
        n, g = args.rows, torch.Generator().manual_seed(0)
        latents, ids = torch.randn(n, *SHAPE, generator=g).half(), torch.randint(0, 49408, (n, TOKENS), generator=g, dtype=torch.int32)
        lengths = torch.randint(2, TOKENS + 1, (n,), generator=g)
        task.train, task.rows, task.shape = Rows([str(i) for i in range(n)], latents, None, ids, lengths, torch.zeros(n, dtype=torch.int64)), n, SHAPE
        loop = Loop(task, task.spec.train, 0, Folder(folder) / "stage")
        data = TensorDataset(latents, ids, lengths)
        start = 0

        def starts() -> range:
            nonlocal start
            start += args.batches * args.batch
            return range(start - args.batches * args.batch, start, args.batch)

        def theirs(whole: bool) -> Iterator[object]:
            if whole:
                loader = DataLoader(data, batch_size=None, sampler=BatchSampler(RandomSampler(data), args.batch, True))
            else:
                loader = DataLoader(data, batch_size=args.batch, shuffle=True, drop_last=True)
            for _, batch in zip(range(args.batches), loader, strict=False):
                yield batch, torch.randn(args.batch, *SHAPE), torch.rand(args.batch)

        def timed(batches: Callable[[], Iterator[object]]) -> Callable[[], float]:
            def run() -> float:
                began = time.perf_counter()
                for _ in batches():
                    pass
                return time.perf_counter() - began

            return run

        loaders = {
            "ours": timed(lambda: feed(loop._prepare, starts(), 0)),
            "DataLoader": timed(lambda: theirs(False)),
            "DataLoader, whole batches": timed(lambda: theirs(True)),
        }
        for loader in loaders.values():
            loader()
        times = alternate([loaders] * args.rounds)
        waits: dict[int, list[float]] = {0: [], 2: []}
        for _ in range(args.rounds):
            for ahead, shares in waits.items():
                clock = Clock()
                for _ in clock.timed(feed(loop._prepare, starts(), ahead)):
                    time.sleep(args.step)
                shares.append(clock.waited / clock.seconds())
    lines = [
        "# The training loader",
        "",
        f"{timing.hardware()} · torch {torch.__version__}",
        f"{args.rows} rows of {SHAPE} float16 and {TOKENS} token ids, batch {args.batch}, {args.batches} batches a round.",
        command(),
        "",
        *HEAD,
        *ratios("a round", times),
        "",
        f"Ours: {args.batch * args.batches / statistics.median(times['ours']):,.0f} images/s on one thread.",
        "",
        f"| feed before steps of {1000 * args.step:.0f} ms | waiting, median | at most |",
        "|---|---|---|",
        *(
            f"| {'two ahead in a thread' if ahead else 'in the same thread'} | {statistics.median(shares):.2%} | {max(shares):.2%} |"
            for ahead, shares in waits.items()
        ),
    ]
    print("\n".join(lines))
    write(args.out, lines)


if __name__ == "__main__":
    main()
