"""The training loop against a bare torch loop of the same network, and with checkpoints against without: ratios of rate, in one run.

    python benchmarks/training_loop.py --out benchmarks/results/training_loop_cpu.md
    python benchmarks/training_loop.py --device cuda --size B/2 --batch 256 --out benchmarks/results/training_loop_gpu.md

``loop`` is the whole of it: rows drawn and read from a shard, caption dropout, noise and times, forward, backward, clipping, fused AdamW, averages,
checks, metrics lines. ``bare`` is forward, backward and fused AdamW on one batch that is at hand. ``checkpoints`` is the loop with one every twenty
steps, in a thread beside it, ``none`` the loop without. Rounds alternate, each of so many steps from a fresh start; the clock starts after the first
three. A ratio is the other's seconds over those of the row's own (above 1: the row is faster), the median of the rounds with its 95 % interval.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))

import fake_training_run as fake
import torch

from benchmarks import timing
from benchmarks.alternating import alternate, interval
from benchmarks.output import command, write
from paris_ray.config import SIZES
from paris_ray.storage import Folder
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.loop import Loop, Place
from paris_ray.training.worker import _prepare_process

WARM = 3
"""Steps before the clock starts."""


class Watch:
    """Notes when the steps after the warm ones begin and end, and what the metrics say of waiting for data."""

    def __init__(self, device: str):
        self.device, self.count, self.began, self.ended, self.waits = device, 0, 0.0, 0.0, []

    def __call__(self, images: int, line: dict | None) -> None:
        self.count += 1
        if line is not None:
            self.waits.append(line["data_wait"])
        if self.count == WARM:
            timing.wait(self.device)
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="of the expert; default: 256 wide, 6 deep")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20, help="of a round, after the first three")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {timing.LEAST_PAIRS}")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if args.rounds < timing.LEAST_PAIRS:
        parser.error(f"--rounds: at least {timing.LEAST_PAIRS}")
    place = Place(torch.device(args.device))
    _prepare_process(args.threads, place)
    shape = SIZES[args.size] if args.size else {"hidden_size": 256, "num_layers": 6, "num_heads": 4}
    steps = WARM + args.steps
    with tempfile.TemporaryDirectory() as folder:
        sets = {f"experts__0__model__{key}": value for key, value in shape.items()}
        train = {"images": steps * args.batch, "batch_size": args.batch, "log_images": 5 * args.batch, "sample_images": "null", "warmup_images": 0}
        train |= {"precision": "fp32" if args.device == "cpu" else "bf16", "checkpoint_images": 20 * args.batch}
        config = fake.make_run(folder, experts=[0], **sets, **{f"experts__0__train__{key}": value for key, value in train.items()})
        waits: list[float] = []

        def loop(checkpoints: bool) -> Callable[[], float]:
            def run() -> float:
                task, watch = ExpertTask(config, 0, place.device), Watch(args.device)
                spec = task.spec.train if checkpoints else task.spec.train.model_copy(update={"checkpoint_images": None})
                stage = Folder(folder) / "stage"
                shutil.rmtree(stage.path, ignore_errors=True)
                one = Loop(task, spec, 0, stage, place, on_step=watch)
                one.saver.ready = lambda: one.saver.wait() is None  # type: ignore[method-assign] # none is left out, as a slow disk would have it
                task.evaluate = lambda images: {}  # type: ignore[method-assign] # once at the end; not of the loop
                one.run()
                waits.extend(watch.waits)
                return (watch.ended - watch.began) / (steps - WARM)

            return run

        def bare() -> float:
            task = ExpertTask(config, 0, place.device)
            model = task.model.train()
            source = Loop(task, task.spec.train, 0, Folder(folder) / "bare", place)
            batch = {name: tensor.to(place.device) for name, tensor in source._prepare(0).items()}
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
            began = 0.0
            for step in range(steps):
                if step == WARM:
                    timing.wait(args.device)
                    began = time.perf_counter()
                with source._precision():
                    losses, _ = task.losses(model, batch)
                losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            timing.wait(args.device)
            return (time.perf_counter() - began) / (steps - WARM)

        times = alternate([{"bare": bare, "none": loop(False), "checkpoints": loop(True)}] * args.rounds)
    lines = [
        "# The training loop",
        "",
        f"{timing.hardware(args.device)} · torch {torch.__version__}",
        f"{args.size or '256 wide, 6 deep'}, batch {args.batch}, {args.steps} steps a round, {args.rounds} rounds.",
        command(),
        "",
        "| row | against | row, ms a step | other, ms a step | ratio | interval |",
        "|---|---|---|---|---|---|",
    ]
    for row, other in (("none", "bare"), ("checkpoints", "none")):
        ratios = [theirs / ours for ours, theirs in zip(times[row], times[other], strict=True)]
        low, high = interval(ratios)
        names = {"none": "loop, no checkpoints", "bare": "bare torch loop", "checkpoints": "loop, a checkpoint every 20 steps"}
        mine, theirs = (1000 * statistics.median(times[name]) for name in (row, other))
        lines.append(f"| {names[row]} | {names[other]} | {mine:.1f} | {theirs:.1f} | {statistics.median(ratios):.3f} | {low:.3f} – {high:.3f} |")
    lines += ["", f"Waiting for data: {statistics.median(waits):.2%} of a step (median of the metrics lines), {max(waits):.2%} at most."]
    print("\n".join(lines))
    write(args.out, lines)


if __name__ == "__main__":
    main()
