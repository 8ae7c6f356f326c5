"""Serving a model to many clients at once, against other ways to serve it: ratios of pictures a second, in one run.

    python benchmarks/serving_load.py --model runs/demo/model --out benchmarks/results/serving_load_cpu.md

So many clients ask over HTTP without a pause, each request with a prompt and a seed of its own, for one picture by two experts a step. ``ours`` is
the application, experts together with the sampler. ``loop`` and ``batch`` are benchmarks/serving_peers.py: a plain loop, one request at a time and
unpadded, as public ports of Paris are; and a diffusers pipeline behind ``@serve.batch``. ``engine`` is our engine alone, in this process, with as
many pictures in flight. All are loaded at once, on one Ray of this machine, with the same number of threads each; only one is asked at a time, in
blocks that alternate. The workload ``alike`` has one number of steps, ``mixed`` a third of its requests each with half of it, with it, and
with twice as many. That the loop draws our pictures is checked first.

A ratio is the other's seconds over ours, median of the rounds, with its 95 % interval; that of ``engine`` is the share of the engine's speed that is
left over HTTP.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import os
import secrets
import socket
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))  # of Ray's workers
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import httpx
import numpy as np
import torch
from PIL import Image

from benchmarks import timing
from benchmarks.alternating import alternate, interval
from benchmarks.output import command, write

NAMES = {"loop": "plain loop, one request at a time", "batch": "diffusers pipeline behind @serve.batch", "engine": "our engine alone, without HTTP"}
PATH = "/v1/images/generations"


def deploy(model: str, threads: int, names: list[str]) -> dict[str, str]:
    """Start the applications; their URLs. Ours is always among them."""
    import ray
    from ray import serve

    from benchmarks.serving_peers import BatchedPipeline, PlainLoop
    from serve_app.app import Args, build

    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    ray.init("local", num_cpus=8, include_dashboard=False, log_to_driver=False)  # of bookkeeping; they work one at a time
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    peers = {"loop": PlainLoop, "batch": BatchedPipeline}
    applications = {"ours": build(Args(model=model, threads=threads))}
    applications |= {name: peers[name].bind(model, threads) for name in names if name in peers}
    for name, application in applications.items():
        serve.run(application, name=name, route_prefix=f"/{name}")
    return {name: f"http://127.0.0.1:{port}/{name}{PATH}" for name in applications}


class Work:
    """Requests, each new."""

    def __init__(self, steps: list[int]):
        self.steps, self.number = steps, itertools.count()

    def next(self) -> dict[str, Any]:
        """A request's fields."""
        n = next(self.number)
        return {"prompt": f"thing {n} on a blue background", "seed": n, "num_inference_steps": self.steps[n % len(self.steps)]}


def over_http(url: str, work: Work, images: int, clients: int, **fields: Any) -> Callable[[], float]:
    """A block: seconds for so many pictures, by clients who ask one after another."""

    async def block() -> float:
        left = iter([work.next() for _ in range(images)])
        async with httpx.AsyncClient(timeout=600, limits=httpx.Limits(max_connections=clients)) as http:

            async def client() -> None:
                for asked in left:
                    (await http.post(url, json={**asked, **fields})).raise_for_status()

            began = time.perf_counter()
            await asyncio.gather(*(client() for _ in range(clients)))
            return time.perf_counter() - began

    return lambda: asyncio.run(block())


def engine_alone(model: str, work: Work, images: int, clients: int) -> Callable[[], float]:
    """The same block without HTTP: as many pictures in flight."""
    from paris_ray.inference.engine import Engine, ImageRequest
    from paris_ray.inference.experts import LocalExperts
    from paris_ray.inference.weights import load_model

    loaded = load_model(model)
    engine = Engine(loaded, LocalExperts(loaded), max_rows=clients, max_queue=images)

    def block() -> float:
        requests = [work.next() for _ in range(images)]
        began = time.perf_counter()
        futures = [engine.submit(ImageRequest(one["prompt"], seed=one["seed"], steps=one["num_inference_steps"], routing="top-2", solver="euler"))
                   for one in requests]  # fmt: skip
        engine.run_until_idle()
        for future in futures:
            future.result()
        return time.perf_counter() - began

    return block


def check(urls: dict[str, str], steps: int) -> str:
    """Compare the loop's picture with ours. Raises RuntimeError if it is another one."""
    asked = {"prompt": "lion face on a blue background", "seed": 7, "num_inference_steps": steps}
    pictures = {}
    for name in ("ours", "loop"):
        more = {"routing": "top-2", "solver": "euler"} if name == "ours" else {}
        body = httpx.post(urls[name], json={**asked, **more}, timeout=600).raise_for_status().json()
        pictures[name] = np.asarray(Image.open(io.BytesIO(base64.b64decode(body["data"][0]["b64_json"])))).astype(int)
    off = np.abs(pictures["ours"] - pictures["loop"])
    if off.mean() > 1:
        raise RuntimeError(f"the loop draws another picture: its pixels are off by {off.mean():.1f} on average")
    return f"The loop's picture and ours differ by {off.max()} of 255 at most, {off.mean():.3f} on average."


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="runs/demo/model")
    parser.add_argument("--against", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--images", type=int, default=48, help="of a block")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--workloads", nargs="+", choices=["alike", "mixed"], default=["alike", "mixed"])
    parser.add_argument("--threads", type=int, default=1, help="of each process")
    parser.add_argument("--rounds", type=int, default=9, help=f"at least {timing.LEAST_PAIRS}")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if args.rounds < timing.LEAST_PAIRS:
        parser.error(f"--rounds: at least {timing.LEAST_PAIRS}")
    torch.set_num_threads(args.threads)
    head = [
        "# Serving under load",
        "",
        f"{timing.hardware()} · torch {torch.__version__}",
        f"{args.clients} clients, {args.images} pictures a block, {args.steps} Euler steps (mixed: {args.steps // 2}, {args.steps} and "
        f"{2 * args.steps}), two experts a step.",
        command(),
    ]
    model = str(Path(args.model).resolve())
    urls = deploy(model, args.threads, args.against)
    if "loop" in urls:
        head.append(check(urls, args.steps))
    head += ["", "| workload | against | ours, pictures/s | theirs, pictures/s | ratio | interval | rounds |", "|---|---|---|---|---|---|---|"]
    print("\n".join(head), flush=True)
    lines = []
    for workload in args.workloads:
        work = Work([args.steps] if workload == "alike" else [args.steps // 2, args.steps, 2 * args.steps])
        routed = {"ours": {"routing": "top-2", "solver": "euler"}}
        blocks = {name: over_http(url, work, args.images, args.clients, **routed.get(name, {})) for name, url in urls.items()}
        if "engine" in args.against:
            blocks["engine"] = engine_alone(model, work, args.images, args.clients)
        for block in blocks.values():  # caches, connections, first batches
            block()
        times = alternate([blocks] * args.rounds)
        for name in args.against:
            ratios = [theirs / ours for ours, theirs in zip(times["ours"], times[name], strict=True)]
            low, high = interval(ratios)
            mine, theirs = (args.images / statistics.median(times[which]) for which in ("ours", name))
            ratio = f"{statistics.median(ratios):.2f} | {low:.2f} – {high:.2f} | {len(ratios)}"
            lines.append(f"| {workload} | {NAMES[name]} | {mine:.2f} | {theirs:.2f} | {ratio} |")
            print(lines[-1], flush=True)
    write(args.out, [*head, *lines])


if __name__ == "__main__":
    main()
