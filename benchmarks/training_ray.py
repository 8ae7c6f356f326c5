"""An expert trained as a Ray Train job against a bare torch loop of the same network: the ratio of rate in steady state, in one run.

    python benchmarks/training_ray.py --out benchmarks/results/training_ray.md

``ours`` is :func:`paris_ray.training.launch.train_stage`, as ``jobs.train_expert`` calls it: a controller and a worker in processes of their own, a
shard read, draws, clipping, averages, checks, events. Its time of a step is that of its metrics lines but the first; the making of a line is not in
it. ``bare torch loop`` is forward, backward and fused AdamW on one batch that is at hand, in this process, with Ray idle beside it; its first steps
do not count either. Norm, averages and draws take a time for each weight, a step one for each weight and token: these have 16 tokens a picture, of
which training at 256 pixels has 256. Rounds alternate, each with a start of its own. A ratio is the bare loop's seconds over ours (below 1: the bare
one is faster), the median of the rounds with its 95 % interval. Starting and ending a job is reported beside it: it is paid once.
"""

from __future__ import annotations

import argparse
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation
sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "training"))

import fake_training_run as fake
import torch

from benchmarks import timing
from benchmarks.alternating import HEAD, alternate, ratios
from benchmarks.output import command, write
from paris_ray.config import SIZES
from paris_ray.storage import Folder
from paris_ray.training import checkpoint
from paris_ray.training.expert_task import ExpertTask
from paris_ray.training.launch import train_stage
from paris_ray.training.loop import Loop, Place
from paris_ray.training.worker import _prepare_process

WARM = 4
"""Steps before the clock starts: those of the first metrics line."""


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, help="of the expert; default: 256 wide, 6 deep")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=48, help="of a round, after the first four; a multiple of four")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {timing.LEAST_PAIRS}")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if args.rounds < timing.LEAST_PAIRS or args.steps % WARM:
        parser.error(f"--rounds: at least {timing.LEAST_PAIRS}; --steps: a multiple of {WARM}")
    place = Place(torch.device("cpu"))
    _prepare_process(1, place)
    shape = SIZES[args.size] if args.size else {"hidden_size": 256, "num_layers": 6, "num_heads": 4}
    os.environ["RAY_AUTH_MODE"], os.environ["RAY_AUTH_TOKEN"] = "token", secrets.token_hex(32)
    import ray  # reads the two when imported

    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, configure_logging=False)
    beside: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        sets = {f"experts__0__model__{key}": value for key, value in shape.items()}
        train = {"images": (WARM + args.steps) * args.batch, "batch_size": args.batch, "micro_batch": "null", "log_images": WARM * args.batch}
        train |= {"precision": "fp32", "sample_images": "null", "checkpoint_images": "null", "warmup_images": 0}
        config = fake.make_run(folder, experts=[0], **sets, **{f"experts__0__train__{key}": value for key, value in train.items()})
        stage = Folder(config.run_dir) / "experts" / "0"

        def under_ray() -> float:
            shutil.rmtree(stage.path, ignore_errors=True)
            began = time.perf_counter()
            train_stage(config, "expert-0")
            wall = time.perf_counter() - began
            lines = checkpoint.read_metrics(stage)
            beside.append(wall - lines[-1]["seconds"])
            return (lines[-1]["seconds"] - lines[0]["seconds"]) / args.steps

        def bare() -> float:
            task = ExpertTask(config, 0, place.device)
            model = task.model.train()
            batch = Loop(task, task.spec.train, 0, Folder(folder) / "bare", place)._prepare(0)
            optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
            began = 0.0
            for step in range(WARM + args.steps):
                if step == WARM:
                    began = time.perf_counter()
                losses, _ = task.losses(model, batch)
                losses.mean().backward()
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            return (time.perf_counter() - began) / args.steps

        times = alternate([{"bare torch loop": bare, "ours": under_ray}] * args.rounds)
    ray.shutdown()
    lines = [
        "# An expert under Ray Train",
        "",
        f"{timing.hardware()} · torch {torch.__version__}, ray {ray.__version__}",
        f"{args.size or '256 wide, 6 deep'}, batch {args.batch}, {args.steps} steps a round; seconds are of one step.",
        command(),
        "",
        *HEAD,
        *ratios("expert under Ray Train", times),
        "",
        f"Start to first step, last checkpoint, export and end of the job: {statistics.median(beside):.1f} s (median), paid once.",
    ]
    print("\n".join(lines))
    write(args.out, lines)


if __name__ == "__main__":
    main()
