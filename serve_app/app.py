"""The Serve application: ``serve run serve_app.app:build model=runs/demo/model``.

Serve listens on the loopback address unless told otherwise. API keys come from the environment of whoever builds the application:
``PARIS_API_KEYS_FILE`` (one key a line) or ``PARIS_API_KEYS``; only their digests travel further.
"""

# No `from __future__ import annotations` here: Serve reads the annotation of build's argument as a class, not as text.
import json
import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field
from ray import serve
from ray.serve import Application
from ray.serve.config import AutoscalingConfig, BackpressureConfig

from paris_ray.hub import address, open_model
from paris_ray.placement import Placement, ServeGroup, serve_groups
from paris_ray.storage import Folder
from serve_app.deployments import ExpertGroup, Sampler
from serve_app.ingress import Api
from serve_app.keys import key_digests
from serve_app.limits import Limits, divided


def _from_command_line(value: Any) -> Any:
    """On the command line groups are JSON text: ``placement=[[0,1],[2]]``."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"placement {value!r} is not valid JSON: {error}") from None
    return value


class Args(Limits):
    """Arguments of :func:`build`; unknown ones are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    # Folder, URI or repository of the hub: what jobs.assemble made, or a released Paris checkpoint.
    model: str
    # together: all experts in the sampler's process. apart: one process per expert. Or groups: [[0, 1], {experts: [2], replicas: [1, 4], gpus: 1}].
    placement: Annotated[Placement, BeforeValidator(_from_command_line)] = "together"
    # Of each process that holds experts; the sampler's, too, when they are together with it.
    cpus: Annotated[float, Field(ge=0)] = 1.0
    gpus: Annotated[float, Field(ge=0)] = 0.0
    # Of the sampler when the experts are elsewhere.
    sampler_cpus: Annotated[float, Field(ge=0)] = 1.0
    sampler_gpus: Annotated[float, Field(ge=0)] = 0.0
    # Replicas of the sampler, each with an engine and a queue of its own, and of the HTTP ingress, among which what one key may have is divided.
    samplers: Annotated[int, Field(ge=1)] = 1
    ingresses: Annotated[int, Field(ge=1)] = 1
    # Threads of each process; part of what "the same bytes" means.
    threads: Annotated[int, Field(ge=1)] = 1
    # Of the experts' weights; int8 has one scale per output channel.
    precision: Literal["fp32", "bf16", "int8"] = "fp32"
    # Compile the networks' blocks at the start: a minute, then faster on a GPU.
    compile: bool = False
    # Pictures that the sampler steps at once, and pictures that may wait; past it 429.
    max_rows: Annotated[int, Field(ge=1)] = 64
    max_queue: Annotated[int, Field(ge=1)] = 256
    # What is refused with 503 rather than served by the experts that are left: everything with fewer of them than so many, and a picture of which the
    # router gives the missing ones more than so much.
    min_experts: Annotated[int, Field(ge=1)] = 1
    max_masked_probability: Annotated[float, Field(ge=0, le=1)] = 1.0
    # Folder or URI of the run's clusters, whose contact sheets the page shows beside their experts; training pictures, so only if it is told.
    clusters: str | None = None
    # Any text. Deployed again with another one, the model is loaded anew: for files that changed in place.
    revision: str = ""


DRAIN_SECONDS = 120.0
"""For how long a process that is to go finishes what it has begun."""


def build(args: Args) -> Application:
    """The application.

    Raises:
        ValueError: an argument cannot be used.
        FileNotFoundError: there is no model.
    """
    folder = open_model(args.model, configs_only=True)
    try:
        info = folder.read_json("paris.json" if folder.exists("paris.json") else "config.json")
    except FileNotFoundError:
        raise FileNotFoundError(f"model: {folder.uri} has neither paris.json nor config.json; give the folder that jobs.assemble made") from None
    count = int(info["num_experts"])
    groups = serve_groups(args.placement, count)
    if args.min_experts > count:
        raise ValueError(f"min_experts: {args.min_experts} are more than the model's {count}, so nothing would ever be served; lower it")
    limits = divided(Limits(**{name: getattr(args, name) for name in Limits.model_fields}), args.ingresses)
    # A repository of the hub stays one, at the commit of now: each node fetches of it what it needs.
    common = {"model": address(folder), "threads": args.threads, "precision": args.precision, "compile": args.compile}

    # Serve says nothing of a user_config that is taken away: then this one applies.
    changed: dict[str, Any] = {"user_config": {}}
    lasting = {"health_check_period_s": 3.0, "graceful_shutdown_wait_loop_s": 0.5, "graceful_shutdown_timeout_s": DRAIN_SECONDS}

    def deploy(name: str, group: ServeGroup) -> Application:
        gpus = args.gpus if group.gpus is None else group.gpus
        options = {"num_cpus": args.cpus if group.cpus is None else group.cpus, "num_gpus": gpus, "resources": group.resources}
        if group.labels:
            options["label_selector"] = group.labels
        # All that the samplers can have on its way at once, each a piece for every expert and replica, and questions: a call never waits for a place.
        scale: dict[str, Any] = {"num_replicas": group.replicas}
        if isinstance(group.replicas, tuple):
            least, most = group.replicas
            scale = {"autoscaling_config": AutoscalingConfig(min_replicas=least, max_replicas=most, target_ongoing_requests=1)}
        places = args.samplers * (len(group.experts) * group.most_replicas + 8)
        made = serve.deployment(name=name, ray_actor_options=options, max_ongoing_requests=places, **scale, **lasting, **changed)
        return made(ExpertGroup).bind(indices=group.experts, gpus=gpus, **common)

    cpus, gpus = (args.sampler_cpus, args.sampler_gpus) if groups else (args.cpus, args.gpus)
    # The engine's own queue must be what fills up first, because it knows what to answer; past all that Serve itself says 429.
    room = args.max_rows + args.max_queue + 64
    options = {"num_cpus": cpus, "num_gpus": gpus}
    made = serve.deployment(
        name="Sampler", ray_actor_options=options, num_replicas=args.samplers, max_ongoing_requests=2 * room, **lasting, **changed
    )
    bound = made(Sampler).bind(
        groups=[(group.experts, deploy(f"ExpertGroup-{number}", group), group.most_replicas) for number, group in enumerate(groups)],
        gpus=gpus,
        max_rows=args.max_rows,
        max_queue=args.max_queue,
        min_experts=args.min_experts,
        max_masked_probability=args.max_masked_probability,
        **common,
    )
    api = serve.deployment(
        name="Api",
        ray_actor_options={"num_cpus": 0.1},
        num_replicas=args.ingresses,
        max_ongoing_requests=room,
        max_queued_requests=room,
        **lasting,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=5),
    )(serve.ingress()(Api))
    return api.bind(bound, limits, _keys(), args.clusters)


def _keys() -> frozenset[bytes]:
    if path := os.environ.get("PARIS_API_KEYS_FILE"):
        parent, name = os.path.split(path)
        return key_digests(Folder(parent or ".").read_bytes(name).decode())
    if (text := os.environ.get("PARIS_API_KEYS")) is not None:
        return key_digests(text)
    return frozenset()
