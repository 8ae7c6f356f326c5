r"""What routing costs: seconds for an image by routing, as multiples of one expert alone, beside what the arithmetic says.

    python benchmarks/model_routing.py --threads 1 --out benchmarks/results/model_routing_cpu.md
    python benchmarks/model_routing.py --device cuda --size XL/2 --router B/2 --latent 32 --steps 50 --images 1 32 --compile --whole \
        --out benchmarks/results/model_routing_gpu.md

The peer is one expert of the same size that draws everything (routing ``expert-0``), which is what a monolith costs. Each row times pictures that are
submitted together and drawn by the engine, with guidance (two passes, one call of twice the rows), in blocks that alternate with the peer's. The
arithmetic is the matrix products and attention of all calls (benchmarks/flops.py), router included, over the peer's; time is more where an expert
gets few rows at once. Weights are random, and such that the pictures of a batch differ in their experts, which is checked. Text and pictures are left
out by stand-ins that cost nothing, or with --whole they are in: a text tower of the size of CLIP ViT-L/14, which reads new prompts each time, and a
decoder of the size of sd-vae-ft-mse, on both sides of a ratio.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation

import numpy as np
import torch
from torch import Tensor

from benchmarks import flops, timing
from benchmarks.alternating import alternate, interval
from benchmarks.output import command, write
from paris_ray.config import SIZES
from paris_ray.data.clip import VOCABULARY, Clip, clip_shapes
from paris_ray.data.codec import VaeCodec
from paris_ray.diffusion.path import Flow, Objective
from paris_ray.inference.engine import Engine, ImageRequest, generate
from paris_ray.inference.experts import LocalExperts
from paris_ray.inference.precision import set_precision
from paris_ray.inference.weights import ParisModel
from paris_ray.models import DiT, Router
from paris_ray.storage import Folder

EXPERTS, TEXT_TOKENS, TEXT_WIDTH = 8, 77, 768
ROUTINGS = {"caption": 1, "top-1": 1, "top-2": 2, "top-3": 3, "full": EXPERTS}
"""Experts that a picture asks in a step."""


class Text:
    """States that cost nothing."""

    kind, width, max_length, pooling, fingerprint = "stand-in", TEXT_WIDTH, TEXT_TOKENS, "mean", "stand-in"

    def tokenize(self, captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
        """The caption's number, repeated."""
        ids = np.array([[sum(caption.encode()) % 1000] * TEXT_TOKENS for caption in captions], np.int32).reshape(-1, TEXT_TOKENS)
        return ids, np.full(len(captions), TEXT_TOKENS, np.int32)

    def count(self, captions: list[str]) -> list[int]:
        """As many as there are."""
        return [TEXT_TOKENS] * len(captions)

    def encode(self, ids: Any, lengths: Any) -> Tensor:
        """(N, 77, 768), random by the ids."""
        rows = [torch.randn(TEXT_TOKENS, TEXT_WIDTH, generator=torch.Generator().manual_seed(int(row[0]))) for row in torch.as_tensor(ids)]
        return torch.stack(rows)

    def pool(self, states: Tensor, lengths: Any) -> Tensor:
        """(N, 768)."""
        return states.mean(1)


class Codec:
    """Pictures that cost nothing."""

    kind, channels, downsampling, fingerprint = "stand-in", 4, 8, "stand-in"

    def decode(self, latents: Tensor) -> np.ndarray:
        """(N, 8, 8, 3), grey."""
        return np.full((len(latents), 8, 8, 3), 128, np.uint8)


def random_clip(device: str) -> Clip:
    """Of the size of CLIP ViT-L/14's text tower."""
    config = {"hidden_size": TEXT_WIDTH, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12, "hidden_act": "quick_gelu",
              "max_position_embeddings": TEXT_TOKENS, "vocab_size": VOCABULARY}  # fmt: skip
    weights = {name: 0.1 * torch.randn(shape) for name, shape in clip_shapes(config).items()}  # large enough that prompts' states differ
    return Clip(config, weights, TEXT_TOKENS, device)


def random_vae(device: str) -> VaeCodec:
    """Of the size of sd-vae-ft-mse."""
    from diffusers import AutoencoderKL

    four = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return VaeCodec(AutoencoderKL(block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4, **four), device=device)


class RandomModel(ParisModel):
    """Experts that are made instead of read."""

    def __init__(self, size: str, router: str, latent: int, device: str, precision: str, compiled: bool, whole: bool):
        torch.manual_seed(0)
        network = Router.named(router, num_clusters=EXPERTS, image_size=latent, text_embed_dim=TEXT_WIDTH)
        for name, parameter in network.named_parameters():  # as made, its blocks are the identity, and all pictures get one answer
            if name not in ("head.2.weight", "pos_embed"):
                torch.nn.init.normal_(parameter, std=0.5 if name == "head.4.weight" else 0.1)
        info = {
            "num_experts": EXPERTS, "image_size": 8 * latent, "latent": {"channels": 4, "size": latent}, "router": {"text": "pooled"},
            "experts": [{"objective": "flow"}] * EXPERTS, "sampling": {"steps": 50, "guidance_scale": 7.5, "routing": "top-2", "solver": "euler"},
        }  # fmt: skip
        text, codec = (random_clip(device), random_vae(device)) if whole else (Text(), Codec())
        null = text.encode(*map(torch.as_tensor, text.tokenize([""])))[0].to(device)
        super().__init__(Folder("/nowhere"), info, network.eval().to(device), codec, text, null, TEXT_TOKENS, [True] * EXPERTS,  # type: ignore[arg-type]
                         torch.device(device), precision)  # fmt: skip
        self.size, self.latent, self.compile = size, latent, compiled

    def load_expert(self, k: int, on_host: bool = False) -> tuple[DiT, Objective]:
        """Made, not read."""
        torch.manual_seed(k)
        module = DiT.named(self.size, image_size=self.latent, text_embed_dim=TEXT_WIDTH).eval()
        module = set_precision(module, Flow(), self.precision, self.device)
        return module if on_host else module.to(self.device), Flow()


def router_operations(router: Router, latent: int) -> int:
    """Of one image."""
    with torch.device(router.pos_embed.device):
        x, t, text = torch.zeros(1, 4, latent, latent), torch.zeros(1), torch.zeros(1, TEXT_WIDTH)
    return flops.operations(lambda: router(x, t, text))


def check_spread(engine: Engine) -> None:
    """Raise RuntimeError if many pictures with two experts each share the same two."""
    requests = [
        ImageRequest(f"prompt {n}", seed=n, steps=1, guidance_scale=1.0, routing="top-2") for n in range(engine.max_rows, engine.max_rows + 8)
    ]
    asked = {k for n in range(0, 8, engine.max_rows) for result in generate(engine, requests[n : n + engine.max_rows])
             for k, weight in enumerate(result.routing[0]["weights"]) if weight}  # fmt: skip
    if len(asked) < 4:
        raise RuntimeError(f"8 pictures asked experts {sorted(asked)} only: the router's weights are no test of routing")


def measure(args: argparse.Namespace) -> list[str]:
    """All rows."""
    model = RandomModel(args.size, args.router, args.latent, args.device, args.precision, args.compile, args.whole)
    engine = Engine(model, LocalExperts(model), max_rows=max(args.images), max_queue=max(args.images))
    expert = flops.count(model.load_expert(0)[0], TEXT_TOKENS)["sampling step"]
    router = router_operations(model.router, args.latent)
    print(f"expert {expert / 1e9:.1f} GFLOP, router {router / 1e9:.1f} GFLOP for an image", flush=True)

    numbers = itertools.count()

    def draw(routing: str, images: int) -> Callable[[], float]:
        def run() -> float:
            # With --whole new prompts each time; else the same ones, as the stand-ins cost nothing.
            prompts = [f"prompt {next(numbers) if args.whole else n}" for n in range(images)]
            requests = [ImageRequest(prompt, seed=n, steps=args.steps, guidance_scale=7.5, routing=routing) for n, prompt in enumerate(prompts)]
            timing.wait(args.device)
            start = time.perf_counter()
            generate(engine, requests)
            timing.wait(args.device)
            return (time.perf_counter() - start) / images

        return run

    lines = []
    check_spread(engine)
    for images in args.images:
        functions = {name: draw(name, images) for name in ["expert-0", *ROUTINGS]}
        for function in functions.values():  # allocations, caches, compilation
            function()
        times = alternate([functions] * args.pairs)
        for name, asked in ROUTINGS.items():
            ratios = [mine / alone for mine, alone in zip(times[name], times["expert-0"], strict=True)]
            low, high = interval(ratios)
            # A caption's expert is chosen once, at the first step.
            routed = (1 if name == "caption" else args.steps) / args.steps
            arithmetic = asked + routed * router / (2 * expert)
            mine = statistics.median(times[name])
            seconds = f"{mine:.3f} | {1 / mine:.3f} | {statistics.median(times['expert-0']):.3f}"
            lines.append(
                f"| {name} | {images} | {seconds} | {statistics.median(ratios):.2f} | {low:.2f} – {high:.2f} | {arithmetic:.2f} | {len(ratios)} |"
            )
            print(lines[-1], flush=True)
    return lines


def main() -> None:
    """Parse, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="B/2", choices=SIZES, help="of an expert")
    parser.add_argument("--router", default="S/2", choices=SIZES, help="size of the router; paper: B/2 beside XL/2")
    parser.add_argument("--latent", type=int, default=16, help="side of the latent: 32 is 256 tokens")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--images", type=int, nargs="+", default=[1, 4], help="drawn together")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--precision", choices=["fp32", "bf16", "int8"], help="default: fp32 on a CPU, bf16 on a GPU")
    parser.add_argument("--compile", action="store_true", help="compiled blocks")
    parser.add_argument("--whole", action="store_true", help="text encoding and decoding, too, at the paper's sizes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=9, help=f"rounds; at least {timing.LEAST_PAIRS}")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if args.pairs < timing.LEAST_PAIRS:
        parser.error(f"--pairs: at least {timing.LEAST_PAIRS}")
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    torch.set_num_threads(args.threads)
    tokens = (args.latent // SIZES[args.size]["patch_size"]) ** 2
    head = [
        f"# What routing costs: {EXPERTS} experts {args.size}, router {args.router}",
        "",
        f"{timing.hardware(args.device)} · {args.precision}{', compiled' if args.compile else ''} · torch {torch.__version__}",
        f"{tokens} image tokens, {TEXT_TOKENS} text tokens, {args.steps} Euler steps, guidance 7.5; the "
        f"engine is included, text encoding and decoding are {'too' if args.whole else 'left out'}. The ratio is the routing's seconds over those of "
        "one expert alone, median of the rounds, with its 95 % interval; the arithmetic is the same of the operations counted, router included.",
        command(),
        "",
        "| routing | images at once | s an image | images/s | one expert alone, s | ratio | interval | arithmetic | rounds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    lines = measure(args)
    write(args.out, [*head, *lines])


if __name__ == "__main__":
    main()
