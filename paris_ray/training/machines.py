"""The machines of a training: waited for, held, paid. Imports no Ray until it looks.

The driver looks at the placement group of its workers every few seconds. While that has no room, it says so, with what is asked for, what the
cluster has and what its autoscaler is about, and after ``resources.wait_minutes`` that there is none; while it is there, hours and money are counted.
When it waited and when it held which nodes is kept, too. All of this stands in ``RUN/events/machines/``, which the driver alone writes, as the
stage's event is its worker's; :func:`event` reads both.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Mapping
from typing import Any

from paris_ray import stages
from paris_ray.progress import clock, counted
from paris_ray.resources import Resources, in_words
from paris_ray.storage import Folder

EVERY_S, EVERY_S_REMOTE = 3.0, 15.0
WAIT_S = 10.0
"""A training that has waited for so long says what for."""
QUEUED = "queued"
"""State of a training that has waited for machines for as long as it may; before that it is starting."""
_KIND_LABELS = ("ray.io/node-group", "ray.io/accelerator-type")
"""Labels that name a kind of node: the group that an autoscaler or KubeRay starts it in, or its GPU."""
_REQUEST = re.compile(r"^launch failed with |Failed to launch \d+ nodes of type \S+ with request id \S*:")
"""What Ray says of each launch that fails; what the cloud answered it says of some clouds only."""
_NOTHING: dict[str, Any] = {"hours": 0.0, "cost": None, "node": None, "spans": []}


def bill(events: Folder, stage: str) -> dict[str, Any]:
    """What a training has taken so far, over all its starts.

    Args:
        events: ``RUN/events``.
        stage: which training.

    Returns:
        ``hours`` (of workers), ``cost`` (``None`` when no price was known in any of them), ``node`` (the kind of node of the last start) and
        ``spans``: when it waited and when it held what, ``{"from", "until", "node", "ids"}`` in unix time, node ``None`` and no ids while it waited;
        ``wait``: what :func:`event` takes of it.
    """
    try:
        return read_bill(events, stage)
    except (OSError, ValueError):
        return dict(_NOTHING)


def read_bill(events: Folder, stage: str) -> dict[str, Any]:
    """As :func:`bill`. Raises OSError or ValueError when the store does not say, where that takes it for nothing."""
    try:
        return dict(events.read_json(f"machines/{stage}.json"))
    except FileNotFoundError:
        return dict(_NOTHING)


def event(events: Folder, stage: str) -> dict[str, Any]:
    """The last that is known of a stage: its event, or what its driver has said since of the machines that it waits for.

    Raises OSError or ValueError when the store does not tell the event, FileNotFoundError when there is none.
    """
    said = dict(events.read_json(f"{stage}.json"))
    wait = bill(events, stage).get("wait") if stages.trains(stage) else None
    return {**said, **wait} if wait and wait["updated"] > said["updated"] else said


class Machines:
    """Watches the machines of one training from its driver, in a thread, as a context manager.

    Args:
        events: ``RUN/events``.
        stage: which training.
        asked: what its workers ask for.
    """

    def __init__(self, events: Folder, stage: str, asked: Resources):
        self._events, self._stage, self._asked = events, stage, asked
        self._every = EVERY_S if events.is_local else EVERY_S_REMOTE
        self._before: dict[str, Any] | None = None  # what earlier starts took, once it is known
        self._held = 0.0  # seconds of this start
        self._node: str | None = None
        self._spans: list[dict[str, Any]] = []  # of this start
        self._waits_since: float | None = None
        self._wait: dict[str, Any] | None = None  # what the event would say of it
        self._failing = False
        self._looked = time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="machines")

    def __enter__(self) -> Machines:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join(self._every)

    def _run(self) -> None:
        while not self._end.wait(self._every):
            try:
                self.look(*_see())
                self._failing = False
            except Exception as error:  # nothing about these figures may end a training
                if not self._failing:
                    print(f"{self._stage}: what it waits for and costs is not written down for now ({type(error).__name__}: {error})", flush=True)
                self._failing = True

    def look(self, groups: Mapping[str, tuple[str, list[str]]], nodes: list[dict[str, Any]], free: Mapping[str, float], scaling: Any = None) -> None:
        """Account for the time since the last look.

        Args:
            groups: state and nodes of each placement group of this job.
            nodes: the cluster's, as ``ray.nodes()`` gives them.
            free: what nobody uses, as ``ray.available_resources()`` gives it.
            scaling: the autoscaler's state, Ray's ``AutoscalingState``; ``None`` where there is none.
        """
        now = time.monotonic()
        passed, self._looked = now - self._looked, now
        alive = [node for node in nodes if node["Alive"]]
        states = {state for state, _ in groups.values()}
        if "CREATED" in states:
            self._waits_since = None
            held = {one for state, ids in groups.values() if state == "CREATED" for one in ids}
            self._node = ", ".join(sorted({kind(node) for node in alive if node["NodeID"] in held})) or self._node
            self._held += passed
            self._span(passed, self._node, sorted(held))
            if self._wait and self._wait["message"]:  # no longer, be the worker's first word still to come
                self._wait = _said("starting", "")
            self._write()
        elif states & {"PENDING", "PREPARED", "RESCHEDULING"}:
            self._waits_since = self._waits_since or now
            waited, late = now - self._waits_since, now - self._waits_since >= 60 * self._asked.wait_minutes
            new = self._span(passed, None, [])
            if late or waited >= WAIT_S:
                report = scaler(scaling, [one for one, (state, _) in groups.items() if state != "CREATED"], time.time() - waited)
                what = "; ".join([wants(self._asked), has(alive, free, self._asked), *([report] if report else [])])
                self._say(QUEUED if late else "starting", f"{'no room' if late else 'waits for machines'} for {clock(waited)}: {what}")
            elif new:
                self._write()

    def _span(self, passed: float, node: str | None, ids: list[str]) -> bool:
        """Whether it is a new one."""
        now = time.time()
        if self._spans and (last := self._spans[-1])["ids"] == ids:
            last.update({"until": now, "node": node})
            return False
        self._spans.append({"from": now - passed, "until": now, "node": node, "ids": ids})
        return True

    def _write(self) -> None:
        if self._before is None:  # never taken for nothing because a store was away: what is written here replaces it
            self._before = read_bill(self._events, self._stage)
        hours, price = self._asked.num_workers * self._held / 3600, self._asked.price_per_hour
        spent = self._before["cost"] if price is None or not hours else (self._before["cost"] or 0.0) + hours * price
        found = {"hours": self._before["hours"] + hours, "cost": spent, "node": self._node or self._before["node"]}
        spans = [*self._before.get("spans", []), *self._spans]
        self._events.write_json(f"machines/{self._stage}.json", {**found, "spans": spans, "wait": self._wait})

    def _say(self, state: str, message: str) -> None:
        told, self._wait = self._wait, _said(state, message)
        self._write()
        if told is None or told["state"] != state or not told["message"]:  # once; followers have the rest
            print(f"{self._stage}: {message}", flush=True)


def _said(state: str, message: str) -> dict[str, Any]:
    """In a stage's event, whose other figures are its worker's."""
    return {"state": state, "rate": 0.0, "eta": None, "message": message, "updated": time.time()}


def _see() -> tuple[dict[str, tuple[str, list[str]]], list[dict[str, Any]], dict[str, float], Any]:
    import ray
    from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply

    # The last bytes of a placement group's id are its job's.
    context, groups = ray.get_runtime_context(), ray.util.placement_group_table()
    job = context.get_job_id()
    own = {one: (group["state"], list(group["bundles_to_node_id"].values())) for one, group in groups.items() if one.endswith(job)}
    reply = GetClusterStatusReply()
    if any(state != "CREATED" for state, _ in own.values()):
        reply.ParseFromString(ray._raylet.GcsClient(address=context.gcs_address).get_cluster_status(timeout_s=10))
    return own, ray.nodes(), ray.available_resources(), reply.autoscaling_state


def kind(node: Mapping[str, Any]) -> str:
    """What people call such a node: its group, else its GPUs, else its CPUs."""
    labels, resources = node.get("Labels", {}), node["Resources"]
    for label in _KIND_LABELS:
        if labels.get(label):
            return str(labels[label])
    gpus = [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
    return gpus[0] if gpus else f"{resources.get('CPU', 0):g} CPU"


def wants(asked: Resources) -> str:
    """What the workers ask for, in words."""
    workers = "a worker asks" if asked.num_workers == 1 else f"each of {asked.num_workers} workers asks"
    return f"{workers} for {in_words({'CPU': asked.cpus, 'GPU': asked.gpus, **asked.custom}, asked.accelerator_type, asked.labels)}"


def scaler(state: Any, groups: list[str], since: float) -> str:
    """What an autoscaler is about, in words; empty when it says nothing.

    Args:
        state: its state, Ray's ``AutoscalingState``.
        groups: ids of the placement groups that wait.
        since: unix time from which on failures count.
    """
    if state is None:
        return ""
    said, asked, failed, reasons = [], Counter[str](), Counter[str](), {}
    for request in state.pending_instance_requests:
        asked[request.ray_node_type_name] += request.count
    for request in sorted(state.failed_instance_requests, key=lambda one: one.failed_ts):
        if request.failed_ts >= since:
            failed[request.ray_node_type_name] += request.count
            reasons[request.ray_node_type_name] = request.reason
    starting = Counter(one.ray_node_type_name for one in state.pending_instances)
    for verb, counts in (("has asked for", asked), ("is starting", starting)):
        if counts:
            said.append(f"{verb} " + ", ".join(f"{count} × {name}" for name, count in sorted(counts.items())))
    for name, count in sorted(failed.items()):
        why = _REQUEST.sub("", reasons[name]).strip() or "the head's monitor.log has the cloud's answer"
        said.append(f"could not start {name}, {counted(count, 'time')} so far ({why})")
    if any(group in request.details for request in state.infeasible_gang_resource_requests for group in groups):
        said.append("knows no kind of node that would do, or may start no more of it")
    return "the autoscaler " + "; it ".join(said) if said else ""


def has(alive: list[dict[str, Any]], free: Mapping[str, float], asked: Resources) -> str:
    """What nodes there are, by what is asked for, and what of it nobody uses, in words."""
    names = ("CPU", "GPU", *asked.custom)

    def describe(node: Mapping[str, Any]) -> str:
        labels, resources = node.get("Labels", {}), node["Resources"]
        parts = [f"{resources[name]:g} {name}" for name in names if resources.get(name)]
        parts += [name.removeprefix("accelerator_type:") for name in resources if name.startswith("accelerator_type:")]
        parts += [f"{key}={labels[key]}" for key in asked.labels if key in labels]
        return ", ".join(parts) or "nothing to hand out"

    counted = Counter(map(describe, alive))
    nodes = ", ".join(f"{number} × ({what})" for what, number in sorted(counted.items())) or "no node"
    total = {name: sum(node["Resources"].get(name, 0) for node in alive) for name in names}
    return (
        f"the cluster has {nodes}, free {', '.join(f'{free.get(name, 0):g} of {total[name]:g} {name}' for name in names if total[name]) or 'nothing'}"
    )
