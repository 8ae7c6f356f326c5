"""Our DiT against diffusers' PixArtTransformer2DModel of the same width, depth, heads and tokens: ratios of time, in one run.

    python benchmarks/model_cpu.py --threads 1 --out benchmarks/results/model_cpu.md
    python benchmarks/model_cpu.py --compile --out benchmarks/results/model_cpu_compiled.md
    python benchmarks/model_cpu.py --device cuda --size XL/2 --batch 32 --compile --out benchmarks/results/model_gpu.md      # bf16

Each row times two functions in alternating blocks, A B B A A B …, so that both see the same machine; a pair's ratio is theirs over ours (above 1:
ours is faster). Shown is the median of the pairs, with the interval of order statistics that covers the median with at least 95 % probability.
The rows: ``forward`` with text states; ``sampling step`` with the text's keys and values at hand, which PixArt computes anew; ``training step``
(forward, loss, backward, fused AdamW). Both networks get the same latents, times and text (77 × 768); PixArt has 8 output channels as published,
which are 16 rows of 768 more, and a second layer over the text. Random weights: time does not depend on them.
"""

from __future__ import annotations

import argparse
import datetime
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation

import diffusers
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from paris_ray.config import SIZES
from paris_ray.models import DiT

TEXT_TOKENS, TEXT_WIDTH = 77, 768


def networks(shape: dict[str, int], latent: int, device: str) -> tuple[DiT, PixArtTransformer2DModel]:
    """The two, at random."""
    torch.manual_seed(0)
    d, heads = shape["hidden_size"], shape["num_heads"]
    ours = DiT(image_size=latent, text_embed_dim=TEXT_WIDTH, **shape)
    theirs = PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=d // heads, num_layers=shape["num_layers"], cross_attention_dim=d, sample_size=latent,
        patch_size=shape["patch_size"], caption_channels=TEXT_WIDTH, use_additional_conditions=False,
    )  # fmt: skip
    return ours.to(device), theirs.to(device)


def training_step(model: nn.Module, predict: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
    """One step with the optimiser of the training loop."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)

    def step() -> None:
        loss = (predict().float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(function: Callable[[], object], calls: int, device: str) -> float:
    """Seconds of a block of calls."""
    if device != "cpu":
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(calls):
        function()
    if device != "cpu":
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls


def interval(values: list[float]) -> tuple[float, float]:
    """The narrowest pair of order statistics, alike from both ends, that covers the median with at least 95 % probability (binomial)."""
    n, ordered = len(values), sorted(values)
    rank = 0
    while 1 - 2 * sum(math.comb(n, j) for j in range(rank + 2)) / 2**n >= 0.95:
        rank += 1
    return ordered[rank], ordered[n - 1 - rank]


def compare(name: str, ours: Callable[[], object], theirs: Callable[[], object], args: argparse.Namespace) -> str:
    """One row of the table."""
    for function in (ours, theirs):  # compilation, allocations, caches
        seconds(function, 2, args.device)
    calls = max(1, math.ceil(args.block_seconds / seconds(theirs, 1, args.device)))
    mine, other = [], []
    for pair in range(args.pairs):
        order = [(ours, mine), (theirs, other)]
        for function, times in order if pair % 2 == 0 else reversed(order):
            times.append(seconds(function, calls, args.device))
    ratios = [b / a for a, b in zip(mine, other, strict=True)]
    low, high = interval(ratios)
    milliseconds = [1000 * statistics.median(times) for times in (mine, other)]
    ratio = f"{statistics.median(ratios):.3f} | {low:.3f} – {high:.3f}"
    row = f"| {name} | {milliseconds[0]:.2f} | {milliseconds[1]:.2f} | {ratio} | {args.pairs} × {calls} |"
    print(row, flush=True)
    return row


def rows(args: argparse.Namespace) -> list[str]:
    """All rows."""
    device, bf16 = args.device, args.precision == "bf16"
    shape = {**SIZES[args.size], **({"num_layers": args.layers} if args.layers else {})}
    ours, theirs = networks(shape, args.latent, device)
    g = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch, 4, args.latent, args.latent, generator=g).to(device)
    text = torch.randn(args.batch, TEXT_TOKENS, TEXT_WIDTH, generator=g).to(device)
    t = torch.rand(args.batch, generator=g).to(device)
    target = torch.randn(args.batch, 4, args.latent, args.latent, generator=g).to(device)

    def predict_ours() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return ours(x, t, text)

    def predict_theirs() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return theirs(x, encoder_hidden_states=text, timestep=1000 * t, return_dict=False)[0][:, :4]

    def measure(how: str) -> list[str]:
        found = []
        ours.eval()
        theirs.eval()
        with torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=bf16):
            keys_values = ours.text_keys_values(text)

        def step_ours() -> Tensor:
            with torch.autocast(device, torch.bfloat16, enabled=bf16):
                return ours(x, t, keys_values=keys_values)

        with torch.no_grad():
            found.append(compare(f"forward, {how}", predict_ours, predict_theirs, args))
            found.append(compare(f"sampling step, {how}", step_ours, predict_theirs, args))
        steps = training_step(ours, predict_ours, target), training_step(theirs, predict_theirs, target)
        found.append(compare(f"training step, {how}", *steps, args))
        return found

    table = measure("eager")
    if args.compile:
        ours.compile_blocks()
        table += measure("ours compiled, theirs eager")
        for block in theirs.transformer_blocks:
            block.compile(fullgraph=True)
        table += measure("both compiled")
    return table


def hardware(device: str) -> str:
    """The machine, in words."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    names = [line.split(":", 1)[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    load = os.getloadavg()[0]
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s), load {load:.1f} at the start"


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B/2", choices=SIZES)
    parser.add_argument("--layers", type=int, help="fewer layers than the size has, for a quick look")
    parser.add_argument("--latent", type=int, default=32, help="side of the latent: 32 is 256 tokens")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: fp32 on a CPU, bf16 (autocast) on a GPU")
    parser.add_argument("--compile", action="store_true", help="also with compiled blocks")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=11, help="alternating blocks of each; at least 9")
    parser.add_argument("--block-seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if args.pairs < 9:
        parser.error("--pairs: at least 9")
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    torch.set_num_threads(args.threads)
    tokens = (args.latent // SIZES[args.size]["patch_size"]) ** 2
    layers = args.layers or SIZES[args.size]["num_layers"]
    head = [
        f"# DiT {args.size} against diffusers' PixArtTransformer2DModel",
        "",
        f"{datetime.date.today()} · {hardware(args.device)} · {args.precision} · torch {torch.__version__}, diffusers {diffusers.__version__}, "
        f"Python {platform.python_version()}",
        f"{layers} layers, {tokens} image tokens, {TEXT_TOKENS} text tokens, batch {args.batch}. "
        "Milliseconds are medians; the ratio is theirs over ours, median of the pairs, with its 95 % interval.",
        f"`python benchmarks/model_cpu.py {' '.join(sys.argv[1:])}`",
        "",
        "| what | ours, ms | diffusers, ms | ratio | interval | pairs × calls |",
        "|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    table = rows(args)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text("\n".join([*head, *table, ""]))


if __name__ == "__main__":
    main()
