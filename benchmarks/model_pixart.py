"""Our DiT against diffusers' PixArtTransformer2DModel of the same width, depth, heads and tokens: ratios of time, in one run.

    python benchmarks/model_pixart.py --threads 1 --compile --out benchmarks/results/model_pixart_cpu.md
    python benchmarks/model_pixart.py --device cuda --size XL/2 --batch 32 --compile --loop --out benchmarks/results/model_pixart_gpu.md      # bf16

Each row times two functions in alternating blocks (benchmarks/timing.py); a ratio is theirs over ours (above 1: ours is faster), shown as the
median of the pairs, with the interval of order statistics that covers the median with at least 95 % probability.
The rows: ``forward`` with text states; ``sampling step`` with the text's keys and values at hand, which PixArt computes anew; ``training step``
(forward, loss, backward, fused AdamW). With --loop, ours is the step of the training loop, which also moves the average, clips the gradient, looks
for non-finite values and sums up its metrics, against the same bare step of theirs. Both networks get the same latents, times and text (77 × 768);
PixArt has 8 output channels as published, which are 16 rows of the last matrix more, and a second layer over the text. In bf16 both sample with
weights in bfloat16, and both train under autocast. Random weights: time does not depend on them. On a GPU of known peak, MFU is the share of it that
the operations counted (benchmarks/flops.py) make up.
"""

from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # from any folder, without installation

import diffusers
import torch
from diffusers import PixArtTransformer2DModel
from torch import Tensor, nn

from benchmarks import flops, timing
from benchmarks.output import command, write
from paris_ray.config import SIZES, TrainConfig
from paris_ray.diffusion.path import Flow
from paris_ray.inference.precision import set_precision
from paris_ray.models import DiT
from paris_ray.storage import Folder
from paris_ray.training.budget import peak_flops
from paris_ray.training.loop import Batch, Loop, Place

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


def bare_step(model: nn.Module, predict: Callable[[], Tensor], target: Tensor) -> Callable[[], None]:
    """One step with the optimiser of the training loop."""
    model.train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-5, fused=True)

    def step() -> None:
        loss = (predict().float() - target).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class Given:
    """A task of the training loop whose batch is always the same."""

    stage, rows, dropout, flops = "expert-0", 1, 0.0, 0

    def __init__(self, model: nn.Module, shape: tuple[int, ...]):
        self.model, self.shape = model, shape

    def losses(self, model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        """Mean squared error of each sample, and its time."""
        output = model(batch["x"], batch["t"], batch["text"])
        return (output.float() - batch["target"]).square().flatten(1).mean(1), batch["t"]


def loop_step(model: nn.Module, batch: Batch, precision: str, device: str, folder: str) -> Callable[[], None]:
    """One step of the training loop."""
    model.train()
    rows = len(batch["x"])
    config = TrainConfig(images=1_000_000_000 // rows * rows, batch_size=rows, learning_rate=1e-5, precision=precision)
    loop = Loop(Given(model, tuple(batch["x"].shape[1:])), config, 0, Folder(folder), Place(torch.device(device)))  # type: ignore[arg-type]
    return lambda: loop._step(batch)


class Table:
    """Rows, printed as they are found."""

    def __init__(self, args: argparse.Namespace, operations: dict[str, int]):
        self.args, self.operations, self.lines = args, operations, []
        self.peak = peak_flops(torch.cuda.get_device_name()) if args.device != "cpu" and args.precision == "bf16" else None

    def add(self, what: str, how: str, ours: Callable[[], object], theirs: Callable[[], object]) -> None:
        """Time one row."""
        args = self.args
        found = timing.compare(ours, theirs, args.pairs, args.block_seconds, args.device)
        mfu = "" if self.peak is None else f"{self.operations[what] * args.batch / found.ours / self.peak:.1%}"
        times = f"{1000 * found.ours:.2f} | {1000 * found.theirs:.2f}"
        line = f"| {what}, {how} | {times} | {found.ratio:.3f} | {found.low:.3f} – {found.high:.3f} | {found.pairs} × {found.calls} | {mfu} |"
        print(line, flush=True)
        self.lines.append(line)


def measure(args: argparse.Namespace, folder: str) -> list[str]:
    """All rows."""
    device, bf16 = args.device, args.precision == "bf16"
    shape = {**SIZES[args.size], **({"num_layers": args.layers} if args.layers else {})}
    ours, theirs = networks(shape, args.latent, device)
    # As one samples: with weights in bfloat16, ours as the engine loads an expert, theirs as from_pretrained(torch_dtype=torch.bfloat16).
    sampled = (set_precision(copy.deepcopy(ours), Flow(), "bf16"), copy.deepcopy(theirs).bfloat16()) if bf16 else (ours, theirs)
    table = Table(args, flops.count(ours, TEXT_TOKENS))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(args.batch, 4, args.latent, args.latent, generator=g).to(device)
    text = torch.randn(args.batch, TEXT_TOKENS, TEXT_WIDTH, generator=g).to(device)
    t = torch.rand(args.batch, generator=g).to(device)
    target = torch.randn(args.batch, 4, args.latent, args.latent, generator=g).to(device)

    def their_output(model: nn.Module, x: Tensor, text: Tensor) -> Tensor:
        found: Tensor = model(x, encoder_hidden_states=text, timestep=1000 * t, return_dict=False)[0][:, :4]
        return found

    def predict_ours() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return ours(x, t, text)

    def predict_theirs() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            return their_output(theirs, x, text)

    def sampling(how: str) -> None:
        mine, other = (model.eval() for model in sampled)
        dtype = torch.bfloat16 if bf16 else torch.float32
        some_x, some_text = x.to(dtype), text.to(dtype)
        with torch.inference_mode():
            keys_values = mine.text_keys_values(some_text)
            table.add("forward", how, lambda: mine(some_x, t, some_text), lambda: their_output(other, some_x, some_text))
            table.add("sampling step", how, lambda: mine(some_x, t, keys_values=keys_values), lambda: their_output(other, some_x, some_text))

    def training(how: str) -> None:
        if args.loop:
            mine = loop_step(ours, {"x": x, "t": t, "text": text, "target": target}, args.precision, device, folder)
        else:
            mine = bare_step(ours, predict_ours, target)
        table.add("training step", how, mine, bare_step(theirs, predict_theirs, target))

    def rows(how: str) -> None:
        sampling(how)
        training(how)

    rows("eager")
    if args.compile:
        for model in {ours, sampled[0]}:
            model.compile_blocks()
        rows("ours compiled, theirs eager")
        for other in {theirs, sampled[1]}:
            for block in other.transformer_blocks:
                block.compile(fullgraph=True)
        rows("both compiled")
    return table.lines


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
    parser.add_argument("--loop", action="store_true", help="our training step is the whole one of the training loop")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=11, help=f"alternating blocks of each; at least {timing.LEAST_PAIRS}")
    parser.add_argument("--block-seconds", type=float, default=1.0)
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    args = parser.parse_args()
    if args.pairs < timing.LEAST_PAIRS:
        parser.error(f"--pairs: at least {timing.LEAST_PAIRS}")
    args.precision = args.precision or ("fp32" if args.device == "cpu" else "bf16")
    torch.set_num_threads(args.threads)
    tokens = (args.latent // SIZES[args.size]["patch_size"]) ** 2
    layers = args.layers or SIZES[args.size]["num_layers"]
    step = "our training step is the training loop's" if args.loop else "training steps are bare"
    head = [
        f"# DiT {args.size} against diffusers' PixArtTransformer2DModel",
        "",
        f"{timing.hardware(args.device)} · {args.precision} · torch {torch.__version__}, diffusers {diffusers.__version__}",
        f"{layers} layers, {tokens} image tokens, {TEXT_TOKENS} text tokens, batch {args.batch}; {step}. "
        "Milliseconds are medians; the ratio is theirs over ours, median of the pairs, with its 95 % interval; MFU is ours.",
        command(),
        "",
        "| what | ours, ms | diffusers, ms | ratio | interval | pairs × calls | MFU |",
        "|---|---|---|---|---|---|---|",
    ]
    print("\n".join(head), flush=True)
    with tempfile.TemporaryDirectory() as folder:
        table = measure(args, folder)
    write(args.out, [*head, *table])


if __name__ == "__main__":
    main()
