"""What a picture costs a server by its routing: seconds a picture at so many concurrent clients, as multiples of top-1.

    python benchmarks/serving_routing.py --model runs/demo/model --out benchmarks/results/serving_routing_cpu.md

The application as in benchmarks/serving_load.py, asked over HTTP; everything is in: text, router, experts, decoding, PNG, the way. The arithmetic
beside it is that of the experts' passes alone: one expert a step for ``caption`` and top-1, two for top-2, all for full.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation

import torch

from benchmarks import timing
from benchmarks.alternating import alternate, interval
from benchmarks.output import command, write
from benchmarks.serving_load import Work, deploy, over_http
from paris_ray.inference.weights import read_facts


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--images", type=int, default=48, help="of a block")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {timing.LEAST_PAIRS}")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if args.rounds < timing.LEAST_PAIRS:
        parser.error(f"--rounds: at least {timing.LEAST_PAIRS}")
    torch.set_num_threads(args.threads)
    model = str(Path(args.model).resolve())
    facts = read_facts(model)
    asked = {"top-1": 1, "top-2": 2, "full": facts.num_experts}
    if facts.router_reads_text:
        asked = {"caption": 1, **asked}
    head = [
        "# What a picture costs a server, by routing",
        "",
        f"{timing.hardware()} · torch {torch.__version__}",
        f"{facts.num_experts} experts, {args.clients} clients, {args.images} pictures a block, {args.steps} Euler steps.",
        command(),
        "",
        "| routing | s a picture | pictures/s | over top-1 | interval | passes of experts over top-1 | rounds |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    url, work = deploy(model, args.threads, [])["ours"], Work([args.steps])
    blocks = {name: over_http(url, work, args.images, args.clients, routing=name, solver="euler") for name in asked}
    for block in blocks.values():  # caches, connections, first batches
        block()
    times = alternate([blocks] * args.rounds)
    lines = []
    for name, experts in asked.items():
        ratios = [mine / one for mine, one in zip(times[name], times["top-1"], strict=True)]
        low, high = interval(ratios)
        seconds = statistics.median(times[name]) / args.images
        ratio = f"{statistics.median(ratios):.2f} | {low:.2f} – {high:.2f}"
        lines.append(f"| {name} | {seconds:.4f} | {1 / seconds:.2f} | {ratio} | {experts} | {len(ratios)} |")
        print(lines[-1], flush=True)
    write(args.out, [*head, *lines])


if __name__ == "__main__":
    main()
