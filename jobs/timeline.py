"""What ran where and when, from a run's directory alone: the nodes that its clusters had, the stages on them, waits, deaths, restarts.

python -m jobs.timeline --config RUN/config.yaml --svg timeline.svg

The nodes are those that `jobs.run_all` saw. Of stages that do not train only the last finished start is known.
"""

from __future__ import annotations

import argparse
import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs import cli, nodes
from paris_ray import config as configs
from paris_ray import stages
from paris_ray.config import ConfigError, RunConfig
from paris_ray.pages.timeline import Bar, Rows, picture
from paris_ray.progress import clock, counted
from paris_ray.resources import HERE
from paris_ray.storage import Folder
from paris_ray.training.machines import bill

EXPECTED = ("Expected termination", "due to idle", "the pod ends", "AWS will ", "Google Cloud ", "Azure: ")
"""How Ray's state API speaks of nodes that were ended in order; of drained ones it repeats what it was told (drain, Notice)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the job; returns its exit code."""
    parser = argparse.ArgumentParser(prog="python -m jobs.timeline", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs.add_arguments(parser, works=False)
    parser.add_argument("--svg", metavar="FILE", type=Path, help="draw it, too")
    args = parser.parse_args(argv)
    try:
        config = cli.load(args)
        found = read(config)
        if args.svg:
            args.svg.write_text(draw(config, found))
    except (ConfigError, FileNotFoundError) as error:
        return cli.complain(parser, error)
    print(text(found))
    return 0


@dataclass(frozen=True)
class Timeline:
    """A run over time, in seconds since ``began``.

    Attributes:
        began: unix time of the first that is known.
        stages: by name, when it waited and when it ran on what.
        nodes: by cluster and kind, when each was there.
        notes: by stage, restarts and goodput.
    """

    began: float
    stages: dict[str, list[Bar]]
    nodes: dict[str, list[Bar]]
    notes: dict[str, str]


def read(config: RunConfig) -> Timeline:
    """The timeline of a run. Raises FileNotFoundError when nothing of it is known yet."""
    run = Folder(config.run_dir)
    spans = {name: _spans(config, name) for name in [*stages.names(config), "evaluate"]}
    known = [one for found in spans.values() for one in found]
    if not known:
        raise FileNotFoundError(f"{run.uri}: nothing has run there yet; jobs.run_all runs its stages")
    began, ended = min(one["from"] for one in known), max(one["until"] for one in known)
    there: dict[str, list[dict[str, Any]]] = {}
    for cluster in (HERE, *config.clusters):
        for one in nodes.read(run / "events" / "nodes", cluster).values():
            # Those of a cluster that is older than the run, or lives on, as far as they belong to it.
            if not one["head"] and (one["until"] or ended) > began:
                there.setdefault(one["kind"] if cluster == HERE else f"{one['kind']} ({cluster})", []).append(one)
    ended = max([ended, *(one["until"] for found in there.values() for one in found if one["until"])])

    def bar(one: dict[str, Any], kind: str | None, note: str, broken: bool = False) -> Bar:
        return Bar(max(0.0, one["from"] - began), (one["until"] or ended) - began, kind, note, broken)

    def node(one: dict[str, Any]) -> Bar:
        return bar(one, one["kind"], one["why"], one["until"] is not None and died(one["why"]))

    return Timeline(
        began,
        {name: [bar(one, one["node"], one["node"] or "waits for machines") for one in found] for name, found in spans.items() if found},
        {label: [node(one) for one in sorted(there[label], key=lambda one: one["from"])] for label in sorted(there)},
        {name: _note(config, name, found) for name, found in spans.items() if found},
    )


def died(why: str) -> bool:
    """Whether a node ended otherwise than in order, by what its cluster says."""
    return not any(word in why for word in EXPECTED)


def _spans(config: RunConfig, name: str) -> list[dict[str, Any]]:
    """When a stage waited and ran; of one that does not train, by its manifests, from the first to the last that it wrote."""
    if stages.trains(name):
        return list(bill(Folder(config.run_dir) / "events", name).get("spans", []))
    found = [
        manifest for part in cli.parts(config, name) if (manifest := stages.status(config, part).manifest) and manifest.get("seconds") is not None
    ]
    ends = [datetime.datetime.fromisoformat(one["created"]).timestamp() for one in found]
    begins = [end - one["seconds"] for end, one in zip(ends, found, strict=True)]
    return [{"from": min(begins), "until": max(ends), "node": "data and model", "ids": []}] if found else []


def _note(config: RunConfig, name: str, spans: list[dict[str, Any]]) -> str:
    if not stages.trains(name):
        return ""
    counts = (stages.status(config, name).manifest or {}).get("counts", {})
    starts = sum(one["node"] is not None for one in spans)
    parts = [counted(counts.get("restarts", max(0, starts - 1)), "restart")]
    return ", ".join([*parts, *([f"{counts['goodput']:.0%} of the time in steps"] if counts.get("goodput") else [])])


def text(found: Timeline) -> str:
    """A timeline for people."""
    lines = [f"began {datetime.datetime.fromtimestamp(found.began).astimezone():%Y-%m-%d %H:%M:%S %Z}; times are since then", ""]
    for label, bars in found.nodes.items():
        for bar in bars:
            end = f"died: {bar.note or 'nobody knows why'}" if bar.broken else ""
            lines.append(f"node  {label:<16} {_from_to(bar)}  {end}".rstrip())
    for name, bars in found.stages.items():
        lines += ["", f"{name}{f': {found.notes[name]}' if found.notes[name] else ''}"]
        lines += [f"      {'waits' if bar.kind is None else bar.kind:<16} {_from_to(bar)}" for bar in bars]
    return "\n".join(lines)


def _from_to(bar: Bar) -> str:
    return f"{clock(bar.start):>12} … {clock(bar.end):<12} ({clock(bar.end - bar.start)})"


def draw(config: RunConfig, found: Timeline) -> str:
    """A timeline as an SVG file."""
    rows: Rows = [(label if n == 0 else "", [bar]) for label, bars in found.nodes.items() for n, bar in enumerate(bars)]
    return picture([("nodes", rows), ("stages", [*found.stages.items()])], f"{config.name}: nodes and stages over time")


if __name__ == "__main__":
    sys.exit(main())
