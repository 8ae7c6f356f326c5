"""Pictures of all prompts in a file: PNGs that say how they were made, a contact sheet, and the routing as JSON lines.

python -m jobs.generate --model RUN/model --prompts prompts.txt --out pictures

One prompt a line; or, in a file named *.jsonl, one object a line with "prompt" and any of negative_prompt, seed, n, steps, guidance_scale,
guidance_interval, routing, solver. The same command again draws only what is missing. --actors N spreads the work over Ray; the pictures are the
same.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jobs import cli
from paris_ray.storage import Folder


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code: 1 if a picture failed, 2 if nothing could be begun."""
    parser = argparse.ArgumentParser(prog="python -m jobs.generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, metavar="PATH", help="folder, URI or repository of the hub; with --actors, as every node sees it")
    parser.add_argument("--prompts", required=True, metavar="FILE", help="one prompt a line, or JSON lines")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder or URI for the pictures")
    parser.add_argument("--routing", help="top-K, threshold, full, caption or expert-K (the model's)")
    parser.add_argument("--steps", type=int, help="solver steps (the model's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 is off (the model's)")
    parser.add_argument("--guidance-interval", type=_interval, default=(0.0, 1.0), metavar="LOW,HIGH", help="times with guidance, 0 is data (0,1)")
    parser.add_argument("--solver", help="name of the solver (the model's)")
    parser.add_argument("--negative-prompt", default="", help="what guidance leads away from")
    parser.add_argument("--seed", type=int, default=0, help="of every prompt that names none (0)")
    parser.add_argument("--n", type=int, default=1, help="pictures of each prompt (1)")
    parser.add_argument("--actors", type=int, default=0, metavar="N", help="spread over N Ray actors, each with the model (none: this process)")
    parser.add_argument("--device", default="cpu", help="torch device, here or of each actor (cpu)")
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16", "int8"), help="of the experts (fp32)")
    parser.add_argument("--compile", action="store_true", help="compile the networks' blocks: a minute at the start, then faster on a GPU")
    parser.add_argument("--max-resident", type=int, metavar="N", help="experts in memory at once (as many as fit)")
    parser.add_argument("--max-rows", type=int, default=64, metavar="N", help="pictures stepped at once (64)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a process (1); part of what the same bytes means")
    args = parser.parse_args(argv)

    from paris_ray import hub
    from paris_ray.inference import batch, prompt_file
    from paris_ray.inference.request import ImageRequest
    from paris_ray.inference.weights import read_facts

    defaults = ImageRequest("", args.negative_prompt, args.seed, 0, args.steps, args.guidance, args.routing, args.solver,
                            guidance_interval=args.guidance_interval)  # fmt: skip
    try:
        _check(args)
        facts = read_facts(args.model)  # of the weights nothing: with actors, this process needs none
        orders = prompt_file.read_prompts(args.prompts, facts, defaults, args.n)
        settings = {name: getattr(args, name) for name in ("device", "precision", "compile", "max_resident", "threads", "max_rows")}
        settings["model"] = hub.address(facts.folder)
        draw = (lambda requests: _over_actors(args.actors, settings, requests)) if args.actors else batch.Artist(**settings).draw
    except (ValueError, OSError) as error:
        return cli.complain(parser, error)
    model = batch.identity(facts, f"{args.precision}{' compiled' * args.compile}")
    names = [batch.name_of(order.request, model) for order in orders]
    summary = batch.generate_files(orders, names, args.out, draw, _png(facts))
    for name, reason in summary.failed.items():
        print(f"generate: {name}: {reason}", file=sys.stderr)
    print(f"generate: {args.out}: {summary.drawn} pictures drawn, {summary.kept} kept, {len(summary.failed)} failed; {', '.join(summary.sheets)}")
    return 1 if summary.failed else 0


def _interval(text: str) -> tuple[float, float]:
    try:
        low, high = (float(end) for end in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} must be two times, LOW,HIGH, such as 0.2,0.8") from None
    return low, high


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for what the machinery would only trip over, in an actor perhaps."""
    for name, least in (("actors", 0), ("max_resident", 1), ("max_rows", 1), ("threads", 1)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise ValueError(f"{name}: {value} must be at least {least}")
    if args.actors and args.device.startswith("cuda:"):
        raise ValueError(f"device: {args.device!r} names a GPU by its number, but Ray gives each actor one of its own; with --actors give cuda")
    Folder(args.out).check_not_a_file("out")


def _over_actors(count: int, settings: dict[str, Any], requests: Sequence[Any]) -> Iterator[Any]:
    """Pictures from actors that each hold the model; an actor that dies is started again and asked again."""
    from paris_ray.inference.batch import Artist

    if not requests:
        return
    cli.connect()
    import ray
    from ray.util import ActorPool

    options = {"num_cpus": settings["threads"], "num_gpus": float(settings["device"] == "cuda"), "max_restarts": 3, "max_task_retries": 3}
    create = ray.remote(**options)(Artist).remote
    actors = [create(**settings) for _ in range(count)]
    size = max(1, min(settings["max_rows"], len(requests) // (4 * count)))
    chunks = [range(i, min(i + size, len(requests))) for i in range(0, len(requests), size)]
    pool = ActorPool(actors)
    for part in pool.map_unordered(lambda actor, chunk: actor.draw_all.remote(list(chunk), [requests[i] for i in chunk]), chunks):
        yield from part


def _png(model: Any) -> Callable[[Any, Any], bytes]:
    """Pictures as PNGs with the provenance that serving writes."""
    import numpy as np

    from serve_app.pictures import encode
    from serve_app.work import Job, Picture

    card = _card(model)

    def png(request: Any, result: Any) -> bytes:
        job = Job(request.prompt, request.negative_prompt, 1, request.seed, request.index, request.steps, float(request.guidance_scale),
                  request.routing, request.solver, guidance_interval=tuple(request.guidance_interval))  # fmt: skip
        weights = np.array([step["weights"] for step in result.routing], np.float32)
        picture = Picture(result.image, result.index, tuple(float(step["t"]) for step in result.routing), weights)
        return encode(picture, "png", job, card, tuple(result.degraded))

    return png


def _card(model: Any) -> Any:
    """The model as serving describes it."""
    from serve_app.cards import ExpertCard, ModelCard

    info = model.info
    experts = [
        ExpertCard(
            index=k, objective=spec["objective"], cluster_size=spec.get("cluster_size"), fingerprint=spec.get("fingerprint"),
            state="ready" if here else "missing",
        )
        for k, (spec, here) in enumerate(zip(info["experts"], model.present, strict=True))
    ]  # fmt: skip
    return ModelCard(
        id=info["name"], created=0, fingerprint=info.get("model_fingerprint"), image_size=model.image_size, experts=experts, sampling=model.defaults,
        router_reads_text=model.router_reads_text, attribution=info.get("attribution"), warm=True,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
