"""How far a run is, from its directory alone, wherever its jobs run.

python -m jobs.status --config RUN/config.yaml

One line a stage: what is found, in which cluster and on what kind of node it trains, how far it is, how fast, its loss, how long it will take, how
often its training began anew, which share of the time went into steps that counted, what its machines have cost, and when it was last heard of.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from typing import Any

from jobs import cli
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.opening import heard
from paris_ray.progress import clock, counted
from paris_ray.storage import Folder
from paris_ray.training import machines
from paris_ray.training.machines import QUEUED, bill
from paris_ray.training.worker import ATTEMPTS

SILENT_S = 60.0
"""Running stages give a sign of life every few seconds; after so long without one nobody may be at it."""

COLUMNS = {
    "stage": 16, "state": 10, "cluster": 12, "node": 16, "done": 26, "rate": 10, "loss": 9, "to go": 14, "restarts": 9, "in steps": 9, "cost": 9,
    "last seen": 0,
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, works=False)
    parser.add_argument("--json", action="store_true", help="one object a line, for programs")
    args = parser.parse_args(argv)
    try:
        config, now = cli.load(args), time.time()
        with heard("run_dir", config.run_dir):
            found = [look(config, name, now) for name in [*stages.names(config), "evaluate"]]
    except ConfigError as error:
        return cli.complain(parser, error)
    if args.json:
        print("\n".join(json.dumps(one) for one in found))
    else:
        shown = [cells(one) for one in found]
        widths = {name: max(width, *(len(one[name]) + 1 for one in shown)) for name, width in COLUMNS.items() if any(one[name] for one in shown)}
        print("".join(f"{name:<{width}}" for name, width in widths.items()))
        for one, texts in zip(found, shown, strict=True):
            print("".join(f"{texts[name]:<{width}}" for name, width in widths.items()).rstrip())
            if one["state"] in ("failed", "stopped", "silent", "starting", QUEUED) and one["message"]:
                print(f"    {one['message']}")
            print("".join(f"    {note}\n" for note in one["notes"]), end="")
    return 0


def look(config: RunConfig, name: str, now: float) -> dict[str, Any]:
    """What is known of a stage: its state, the last event, and figures of its manifest.

    Args:
        config: the run's.
        name: the stage.
        now: unix time.

    Returns:
        ``stage, state, cluster, node, done, total, unit, rate, loss, eta, restarts, goodput, cost, seen`` (seconds ago), ``message, notes`` (what is
        wrong with its files; its version if rows were appended); ``None`` for what is not known. The state is that of its files (``valid``,
        ``stale``, ``damaged``, ``absent``, ``waiting``, ``partial``); of one that is not whole, ``running``, ``starting`` (also while it waits for
        machines), ``queued`` (no room for its workers for as long as they may wait), ``failed``, ``stopped``, or ``silent`` by its last event.
    """
    status = cli.status(config, name)
    state = status.state
    try:
        event = machines.event(Folder(config.run_dir) / "events", name)
    except (OSError, ValueError):
        event = {}
    seen = now - event["updated"] if "updated" in event else None
    if state in ("absent", "partial") and seen is not None and event["state"] != "done":
        state = event["state"] if event["state"] in ("failed", "stopped") or seen < SILENT_S else "silent"
    taken = bill(Folder(config.run_dir) / "events", name)
    counts = status.manifest["counts"] if state == "valid" and status.manifest else {}
    version = status.manifest.get("version", 1) if state == "valid" and status.manifest else 1
    appended = [f"version {version}, with the rows of {counted(version - 1, 'append')}"] if version > 1 else []
    # Of appended rows its events know nothing.
    rows = counts.get("listed", counts.get("rows")) if appended else None
    return {
        "stage": name,
        "state": state,
        "cluster": config.cluster_of(name) if config.clusters else None,
        "node": taken["node"],
        **{key: event.get(key) for key in ("done", "total", "unit", "message")},
        **({"done": rows, "total": rows, "unit": "rows"} if rows is not None else {}),
        "notes": [*status.reasons[:3], *appended, *status.notes] if state in ("stale", "damaged", "valid") else [],
        "rate": counts.get("images_per_second") or (event.get("rate") if state == "running" else None),
        "loss": counts.get("loss", event.get("loss")),
        "eta": event.get("eta") if state == "running" else None,
        "restarts": counts.get("restarts", restarts(config, name) if stages.trains(name) else None),
        "goodput": counts.get("goodput"),
        "cost": taken["cost"],
        "seen": seen,
    }


def restarts(config: RunConfig, name: str) -> int | None:
    """How often the workers of a training that is not done began anew, ``None`` if they never began."""
    try:
        return int(stages.folder(config, name).read_json(ATTEMPTS)["attempts"]) - 1
    except (OSError, ValueError):
        return None


def cells(found: dict[str, Any]) -> dict[str, str]:
    """A stage for people, by column."""
    of = f" / {found['total']}" if found["total"] else ""
    return {
        "stage": found["stage"],
        "state": found["state"],
        "cluster": found["cluster"] or "",
        "node": found["node"] or "",
        "done": f"{found['done']}{of} {found['unit']}" if found["done"] is not None else "",
        "rate": f"{found['rate']:.1f}/s" if found["rate"] else "",
        "loss": f"{found['loss']:.4f}" if found["loss"] is not None else "",
        "to go": clock(found["eta"]) if found["eta"] is not None else "",
        "restarts": "" if found["restarts"] is None else str(found["restarts"]),
        "in steps": "" if found["goodput"] is None else f"{found['goodput']:.0%}",
        "cost": "" if found["cost"] is None else f"{found['cost']:.2f}",
        "last seen": f"{clock(max(0.0, found['seen']))} ago" if found["seen"] is not None else "",
    }


if __name__ == "__main__":
    sys.exit(main())
