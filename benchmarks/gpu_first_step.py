"""From the start of Python to the end of an expert's first training steps on a GPU: seconds, eager against compiled blocks.

    python benchmarks/gpu_first_step.py --size XL/2 --batch 64 --out benchmarks/results/gpu_first_step.md

Each row is a new process with an empty cache of compiled code, so what a worker on a new machine waits for; Ray's own start and the copy of the shard
are not in it. ``ready`` is imports, initial weights and their way to the GPU; ``first step`` what is between that and the first step's end, so with
compilation; ``steady`` the median of later steps of the training loop, of which images/s and MFU are; ``pays after`` the images after which compiling
has paid for itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation

from benchmarks.output import command, write

STEPS = 30


def child(size: str, batch: int, compiled: bool, began: float) -> None:
    """Train some steps; print what they took as JSON."""
    import torch

    from benchmarks import flops
    from benchmarks.model_pixart import TEXT_TOKENS, TEXT_WIDTH, loop_step
    from paris_ray.config import SIZES
    from paris_ray.models import DiT
    from paris_ray.training.budget import peak_flops

    torch.manual_seed(0)
    model = DiT(image_size=32, text_embed_dim=TEXT_WIDTH, **SIZES[size]).to("cuda")  # as a training does
    with torch.device("cuda"):
        x, t = torch.randn(batch, 4, 32, 32), torch.rand(batch)
        given = {"x": x, "t": t, "text": torch.randn(batch, TEXT_TOKENS, TEXT_WIDTH), "target": torch.randn(batch, 4, 32, 32)}
    if compiled:
        model.compile_blocks()
    with tempfile.TemporaryDirectory() as folder:
        step = loop_step(model, given, "bf16", "cuda", folder)
        torch.cuda.synchronize()
        ready, ends = time.time() - began, []
        for _ in range(STEPS):
            step()
            torch.cuda.synchronize()
            ends.append(time.time() - began)
    steady = statistics.median(b - a for a, b in itertools.pairwise(ends[5:]))
    peak, operations = peak_flops(torch.cuda.get_device_name()), flops.count(model, TEXT_TOKENS)["training step"]
    found = {"ready": ready, "first": ends[0] - ready, "steady": steady, "mfu": None if peak is None else operations * batch / steady / peak}
    print(json.dumps({**found, "device": torch.cuda.get_device_name(), "torch": torch.__version__}))


def measure(size: str, batch: int, compiled: bool) -> dict[str, float]:
    """In a process of its own."""
    with tempfile.TemporaryDirectory() as cache:
        here = [sys.executable, __file__, "--size", size, "--batch", str(batch), "--child", "compiled" if compiled else "eager"]
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache, "TRITON_CACHE_DIR": f"{cache}/triton"}
        done = subprocess.run([*here, "--began", repr(time.time())], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="XL/2")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument("--child", choices=["eager", "compiled"], help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child(args.size, args.batch, args.child == "compiled", args.began)
        return
    rounds = [{how: measure(args.size, args.batch, how == "compiled") for how in ("eager", "compiled")} for _ in range(args.repeats)]
    of = {how: {key: statistics.median(one[how][key] for one in rounds) for key in ("ready", "first", "steady", "mfu")} for how in rounds[0]}
    gained = of["eager"]["steady"] - of["compiled"]["steady"]
    pays = "never" if gained <= 0 else f"{(of['compiled']['first'] - of['eager']['first']) / gained * args.batch:,.0f} images"
    lines = [
        f"# To the first step: DiT {args.size}",
        "",
        f"{time.strftime('%Y-%m-%d')} · {rounds[0]['eager']['device']} · torch {rounds[0]['eager']['torch']} · bf16",
        f"256 image tokens, 77 text tokens, batch {args.batch}; medians of {args.repeats} processes each, in turn.",
        command(),
        "",
        "| blocks | ready, s | first step, s | both, s | steady, ms a step | images/s | MFU |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {how} | {one['ready']:.1f} | {one['first']:.1f} | {one['ready'] + one['first']:.1f} | {1000 * one['steady']:.1f} | "
            f"{args.batch / one['steady']:,.0f} | {one['mfu']:.1%} |"
            for how, one in of.items()
        ),
        "",
        f"Compiled against eager: {of['eager']['steady'] / of['compiled']['steady']:.3f} of its rate; compiling pays after {pays}.",
    ]
    print("\n".join(lines))
    write(args.out, lines)


if __name__ == "__main__":
    main()
