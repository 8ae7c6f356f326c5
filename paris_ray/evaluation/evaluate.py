"""The table: what a served model draws, beside what it should be compared with. Imports torch only where a row needs it, never Ray.

========== ======== =================================================================================================================
row        measured what
========== ======== =================================================================================================================
top-2      HTTP     the deployed model, as a client meets it: the headline
oracle     HTTP     one expert, the caption's own cluster's
top-1      HTTP     one expert a step, by the router
full       HTTP     all experts at every step
caption    HTTP     one expert per picture, drawn from the caption (where the router reads it)
held_out   HTTP     top-2 on captions of held-out rows, of things that training saw in other rows
blind      engine   top-2 with the paper's router, which does not read the caption
swapped    engine   top-2 with the experts exchanged: must collapse
round_trip codec    the originals through the codec and back: the ceiling
shuffled   –        the headline's pictures under shuffled captions, exactly: chance
========== ======== =================================================================================================================

All rows but ``held_out`` use the same captions and seeds. Pictures already there are not made again.
"""

from __future__ import annotations

import io
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng, stages
from paris_ray.config import RunConfig
from paris_ray.evaluation import protocol
from paris_ray.evaluation.asking import Ask, Endpoint, ask_all
from paris_ray.evaluation.classifiers import prior
from paris_ray.evaluation.metrics import Share, chance, share
from paris_ray.evaluation.protocol import Corpus, Question, Record, judge
from paris_ray.progress import Progress
from paris_ray.software import software
from paris_ray.storage import Folder

if TYPE_CHECKING:
    from paris_ray.inference.weights import ParisModel

HEADLINE = "top-2"
ROUTER_ROWS = 256
"""Rows on which the routers' accuracy is measured, at most."""


@dataclass(frozen=True)
class Row:
    """One row of the table before it is measured; ``routing`` gives what a question asks for."""

    key: str
    title: str
    where: str
    held_out: bool = False
    routing: Callable[[Question], str] = lambda _: "top-2"


def plan(config: RunConfig) -> list[Row]:
    """The rows that this run can have, in the table's order."""
    reads = config.router.text == "pooled"
    rows = [
        Row(HEADLINE, "top-2: the deployed model", "HTTP"),
        Row("oracle", "oracle: the caption's cluster", "HTTP", routing=lambda one: f"expert-{one.cluster}"),
        Row("top-1", "top-1", "HTTP", routing=lambda _: "top-1"),
        Row("full", "full: all experts", "HTTP", routing=lambda _: "full"),
    ]
    if reads:
        rows.append(Row("caption", "one expert by caption", "HTTP", routing=lambda _: "caption"))
    if config.evaluation.held_out_captions:
        rows.append(Row("held_out", "top-2, held-out captions", "HTTP", held_out=True))
    if reads and config.evaluation.control_router:
        rows.append(Row("blind", "top-2, text-blind router", "engine"))
    return [*rows, Row("swapped", "top-2, experts exchanged", "engine"), Row("round_trip", "originals through the codec", "codec")]


def evaluate(config: RunConfig, endpoint: str | Endpoint | None) -> dict[str, Any]:
    """Measure the table of a run and publish it as the stage ``evaluate``.

    Args:
        config: of the run.
        endpoint: where its model is served, ``http://host:port``.

    Returns:
        the table, as in ``RUN/eval/table.json``.

    Raises:
        EndpointError: no endpoint, nobody there, another model, or an answer that is no measurement.
        FileNotFoundError: a parent stage has not run.
        StaleError: the folder holds another model's table.
    """
    started = time.monotonic()
    stage = stages.stage(config, "evaluate")
    if stage.begin().state == "valid":
        table: dict[str, Any] = stage.folder.read_json("table.json")
        return table
    with endpoint if isinstance(endpoint, Endpoint) else Endpoint(endpoint) as server:
        info = (Folder(config.run_dir) / "model").read_json("paris.json")
        server.check(info["model_fingerprint"])
        table = _Evaluation(config, stage.folder, info).run(server)
    stage.folder.write_json("table.json", table)
    stage.folder.write_bytes("table.md", markdown(table).encode())
    pictures = sum(row["right"]["of"] for row in table["rows"] if row["where"] in ("HTTP", "engine"))
    shares = {f"retrieval_{row['key'].replace('-', '')}": row["right"]["share"] for row in table["rows"]}
    stage.publish({"pictures": pictures, **shares}, time.monotonic() - started)
    return table


class _Evaluation:
    def __init__(self, config: RunConfig, folder: Folder, info: dict[str, Any]):
        import torch

        from paris_ray.data.embedding import build_embedder
        from paris_ray.inference.weights import load_model

        device = "cuda" if torch.cuda.is_available() else "cpu"

        self.config, self.folder, self.info = config, folder, info
        self.corpus: Corpus = protocol.read_corpus(config)
        self.questions = {False: protocol.trained_captions(config, self.corpus), True: protocol.held_out_captions(config, self.corpus)}
        if not self.questions[False]:
            raise ValueError("evaluate: the corpus has no training rows to take captions from")
        self.embedder = build_embedder(config.data.embedding, device)
        expected = (Folder(config.run_dir) / "encoders").read_json("encoders.json")["embedding"]["fingerprint"]
        if self.embedder.fingerprint != expected:
            raise ValueError(
                f"evaluate: the embedder here has fingerprint {self.embedder.fingerprint}, the corpus was embedded with {expected}; "
                "install the same weights, or embed again"
            )
        self.model: ParisModel = load_model((Folder(config.run_dir) / "model").uri, device)
        self.codec = self.model.codec

    def run(self, server: Endpoint) -> dict[str, Any]:
        rows = [row for row in plan(self.config) if self.questions[row.held_out]]
        total = sum(len(self.questions[row.held_out]) for row in rows)
        progress = Progress(Folder(self.config.run_dir) / "events", "evaluate", total)
        done = 0

        def one_more() -> None:
            nonlocal done
            done += 1
            progress.update(done)

        measured = []
        judged: dict[str, list[Record]] = {}
        try:
            for row in rows:
                progress.message = row.title
                begun = time.monotonic()
                if row.where == "HTTP":
                    ask_all(server, self._asks(row), self.folder, one_more)
                else:
                    self._make(row)
                    for _ in self.questions[row.held_out]:
                        one_more()
                seconds = time.monotonic() - begun
                judged[row.key] = self._judge(row)
                measured.append(summary(row, judged[row.key], seconds))
            measured.append(_shuffled(judged[HEADLINE]))
            router = self._routers()
        except BaseException as error:
            progress.fail(f"{type(error).__name__}: {error}"[:300])
            raise
        progress.finish(f"{judged_share(judged[HEADLINE]).value:.0%} right")
        return self._table(measured, judged[HEADLINE], router)

    def _files(self, row: Row) -> list[str]:
        return [f"pictures/{row.key}/{one.file}" for one in self.questions[row.held_out]]

    def _asks(self, row: Row) -> list[Ask]:
        questions, ours = self.questions[row.held_out], self.model.defaults
        # Said, not left to the server: its defaults may be those of an earlier assembly of the same weights.
        sampling = {"num_inference_steps": ours["steps"], "guidance_scale": ours["guidance_scale"], "solver": ours["solver"]}
        bodies = [{"prompt": one.caption, "seed": one.seed, "routing": row.routing(one), **sampling} for one in questions]
        return [Ask(file, body) for file, body in zip(self._files(row), bodies, strict=True)]

    def _make(self, row: Row) -> None:
        """Make a row's missing pictures in this process."""
        there = {entry.name for entry in self.folder.files(recursive=True)}
        wanted = [(file, one) for file, one in zip(self._files(row), self.questions[row.held_out], strict=True) if f"{file}.png" not in there]
        if not wanted:
            return
        if row.key == "round_trip":
            images = self._decode(self.corpus.latents([one.row for _, one in wanted]))
            made: list[tuple[NDArray[np.uint8], Any]] = [(image, None) for image in images]
        else:
            from paris_ray.evaluation import in_process
            from paris_ray.inference.experts import LocalExperts

            experts = LocalExperts(self.model, threads=1)
            questions = [one for _, one in wanted]
            if row.key == "blind":
                results = in_process.draw(in_process.with_router(self.model, self._control_router()), experts, questions, row.routing(questions[0]))
            else:
                results = in_process.draw(self.model, in_process.Exchanged(experts), questions, row.routing(questions[0]))
            made = [(result.image, result.routing) for result in results]
        for (file, _), (image, routing) in zip(wanted, made, strict=True):
            self.folder.write_json(f"{file}.json", {"picture": {"routing": routing}})
            self.folder.write_bytes(f"{file}.png", _png(image))

    def _control_router(self) -> Folder:
        return stages.folder(self.config, stages.CONTROL_ROUTER) / "export"

    def _judge(self, row: Row) -> list[Record]:
        questions = self.questions[row.held_out]
        files = self._files(row)
        pictures = np.stack([_pixels(self.folder.read_bytes(f"{file}.png")) for file in files])
        steps = [self.folder.read_json(f"{file}.json")["picture"].get("routing") for file in files]
        routing = [None if one is None else [step["weights"] for step in one] for one in steps]
        records = judge(self.corpus, questions, pictures, [f"{file}.png" for file in files], routing, self._decode, self.embedder)
        self.folder.write_json(f"rows/{row.key}.json", [record.as_json() for record in records])
        return records

    def _decode(self, latents: NDArray[np.floating]) -> NDArray[np.uint8]:
        import torch

        return np.asarray(self.codec.decode(torch.from_numpy(np.asarray(latents, np.float32)).to(self.model.device)))

    def _routers(self) -> dict[str, Any] | None:
        """The deployed router, the control, and the prior, on rows that training did not see."""
        from paris_ray.evaluation import in_process, routers

        rows = np.flatnonzero(self.corpus.splits != "train").tolist()
        rows = sorted(rows, key=lambda row: rng.key(self.config.seed, "router-accuracy", str(self.corpus.ids[row])))[:ROUTER_ROWS]
        if not rows:
            return None
        asked = {self.config.router.text: self.model.router}
        if self.config.evaluation.control_router and self.config.router.text == "pooled":
            asked["none"] = in_process.with_router(self.model, self._control_router()).router
        latents = self.corpus.latents(rows)
        captions = [str(self.corpus.captions[row]) for row in rows]
        clusters = [int(self.corpus.clusters[row]) for row in rows]
        seeds = [rng.key(self.config.seed, "router-noise", str(self.corpus.ids[row])) for row in rows]
        found = {kind: routers.router_by_time(self.model, router, latents, captions, clusters, seeds) for kind, router in asked.items()}
        trained = self.corpus.clusters[self.corpus.splits == "train"].tolist()
        return {
            "t": list(routers.TIMES),
            "rows": len(rows),
            "prior": prior(trained, clusters, self.config.num_experts).as_json(),
            "accuracy": {kind: [one.as_json() for one in by_time] for kind, by_time in found.items()},
        }

    def _table(self, rows: list[dict[str, Any]], headline: Sequence[Record], router: dict[str, Any] | None) -> dict[str, Any]:
        clusters = range(self.config.num_experts)
        by_cluster = [{"cluster": k, "right": share([one.right for one in headline if one.cluster == k]).as_json()} for k in clusters]
        return {
            "format": 1,
            "model": {"name": self.info["name"], "fingerprint": self.info["model_fingerprint"]},
            "sampling": self.model.defaults,
            "embedder": self.config.data.embedding.kind,
            "originals": len(self.corpus),
            "copy_bound": self.corpus.copy_bound,
            "captions": {"trained": len(self.questions[False]), "held_out": len(self.questions[True])},
            "rows": rows,
            "by_cluster": by_cluster,
            "router": router,
            "hardware": hardware(),
            "software": software(),
        }


def judged_share(records: Sequence[Record]) -> Share:
    """The share that is right."""
    return share([record.right for record in records])


def summary(row: Row, records: Sequence[Record], seconds: float) -> dict[str, Any]:
    """A row of the table from its records."""
    asked = [float(np.count_nonzero(np.asarray(record.routing), axis=1).mean()) for record in records if record.routing]
    return {
        "key": row.key,
        "title": row.title,
        "where": row.where,
        "right": judged_share(records).as_json(),
        "exact": share([record.exact for record in records]).as_json(),
        "copies": share([record.copy for record in records]).as_json(),
        "pixel_copies": share([record.pixel_copy for record in records]).as_json(),
        "ground": share([record.ground for record in records]).as_json(),
        "experts_per_step": float(np.mean(asked)) if asked else None,
        "seconds": seconds,
    }


def _shuffled(records: Sequence[Record]) -> dict[str, Any]:
    """Chance: an exact mean, not a count, so without an interval."""
    value = chance([record.group for record in records], [record.nearest_group for record in records])
    right = {"hits": value * len(records), "of": len(records), "share": value, "low": value, "high": value}
    return {"key": "shuffled", "title": "shuffled captions: chance", "where": "–", "right": right}


def markdown(table: dict[str, Any]) -> str:
    """The table as Markdown."""
    lines = ["| row | measured | right | 95 % |", "|---|---|---|---|"]
    for row in table["rows"]:
        right = row["right"]
        interval = "exact" if row["key"] == "shuffled" else f"{right['low']:.0%} … {right['high']:.0%}"
        count = "" if row["key"] == "shuffled" else f" ({right['hits']} of {right['of']})"
        lines.append(f"| {row['title']} | {row['where']} | {right['share']:.0%}{count} | {interval} |")
    return "\n".join(lines) + "\n"


def hardware() -> dict[str, str]:
    """What this process computes on."""
    import torch

    name = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as file:
            name = next((line.partition(":")[2].strip() for line in file if line.startswith("model name")), name)
    found = {"processor": name, "cores": str(os.cpu_count())}
    if torch.cuda.is_available():
        found["accelerator"] = f"{torch.cuda.device_count()} × {torch.cuda.get_device_name(0)}"
    return found


def _png(image: NDArray[np.uint8]) -> bytes:
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "PNG")
    return sink.getvalue()


def _pixels(png: bytes) -> NDArray[np.uint8]:
    from PIL import Image

    with Image.open(io.BytesIO(png), formats=["PNG"]) as opened:
        return np.asarray(opened.convert("RGB"))
