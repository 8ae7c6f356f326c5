"""What a comparison's processes do, unit by unit: train a stage, assemble and measure losses, draw and judge pictures. Imports torch, not Ray.

Every unit is a folder with a manifest: done, it is skipped; cut off, it is made anew, or, of a training, goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from paris_ray import stages
from paris_ray.config import OpenClipEmbedding, RunConfig, ScenesSource
from paris_ray.data.scenes import HoldOut, Scene, Scenes
from paris_ray.evaluation import compare_rows, losses
from paris_ray.evaluation.alignment import cluster_ranks, look
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_captions import PARTS, Caption, choose
from paris_ray.evaluation.compare_config import CompareConfig, InceptionJudge
from paris_ray.evaluation.compare_plan import FAILED
from paris_ray.evaluation.compare_rows import MAIN, ROWS, Run
from paris_ray.evaluation.compare_scenes import shared_information, unseen_groups
from paris_ray.evaluation.protocol import read_latents
from paris_ray.evaluation.scene_scorer import SCORES, SceneScorer, chance, score
from paris_ray.evaluation.times import TIMES
from paris_ray.inference.engine import Engine
from paris_ray.inference.experts import LocalExperts
from paris_ray.inference.request import ImageRequest
from paris_ray.inference.weights import ParisModel, load_model
from paris_ray.layout import EXPERT_FILE
from paris_ray.manifest import MANIFEST, Stage, require
from paris_ray.storage import Folder, link_all, link_file
from paris_ray.training import checkpoint, worker
from paris_ray.training.loop import BrokenRowsError, NonFiniteError, Place
from paris_ray.training.student_task import student_stage

SWAPPED = {0: 1, 1: 0}
"""Who answers for whom under the planted fault ``swapped``."""

REFERENCE = 50_000
"""Originals that distances are measured to, at most, the first by hash: as many as FID is published of."""

SHOWN = 16
"""Originals that are kept to be looked at."""

_DECODED = 512
"""Originals decoded at once."""

_AT_ONCE = 256
"""Rows whose captions are kept encoded."""


def device() -> torch.device:
    """Where this process computes."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


# -- training -----------------------------------------------------------------------------------------------------------


def partition_folder(compare: CompareConfig, name: str) -> Folder:
    """The run in which a row's corpus is cut."""
    return Folder(compare_rows.partition_config(compare, name).run_dir)


@functools.lru_cache(maxsize=64)
def sizes_of(partition: Folder) -> tuple[int, ...]:
    """Training rows of each expert."""
    return tuple(require(partition / "clusters", "partition")["counts"]["sizes"])


def run_config(compare: CompareConfig, run: Run) -> RunConfig:
    """The config of a training, once its corpus is cut."""
    return compare_rows.run_config(compare, run, sizes_of(partition_folder(compare, run.row)))


def prepare(compare: CompareConfig, run: Run, config: RunConfig) -> None:
    """Have encoders, clusters and shards in the run's folder: the very files of the partition, which all seeds share."""
    _link_parents(partition_folder(compare, run.row), Folder(config.run_dir), config.num_experts)
    if ROWS[run.row].shared_init:
        _initial_weights(compare, run, config)


def _link_parents(source: Folder, target: Folder, experts: int) -> None:
    for name in ("encoders", *(f"shards/expert={k}" for k in range(experts)), "clusters"):
        link_all(source / name, target / name, MANIFEST)


def _initial_weights(compare: CompareConfig, run: Run, config: RunConfig) -> None:
    """What expert 0 would have started from, for all."""
    from paris_ray.training.checkpoint import tensor_bytes
    from paris_ray.training.expert_task import ExpertTask

    folder = Folder(str(config.experts[0].init_from))
    if not folder.exists(EXPERT_FILE):
        own = config.experts[0].model_copy(update={"init_from": None})
        task = ExpertTask(config.model_copy(update={"experts": (own, *config.experts[1:])}), 0, torch.device("cpu"))
        folder.write_json("config.json", task.export_config())
        folder.write_bytes(EXPERT_FILE, tensor_bytes(task.model.state_dict()))


def train(compare: CompareConfig, run: Run, stage: str, source: Run | None = None) -> None:
    """Train a stage of a run, or take it from another run that made it from the same inputs.

    Args:
        compare: the comparison.
        run: of which run.
        stage: ``expert-K`` or ``router``.
        source: the other run.
    """
    config, fault = run_config(compare, run), ROWS[run.row].fault
    prepare(compare, run, config)
    if fault == "router" and stage == "router":
        _train_on_shuffled_labels(compare, config)
    elif source is not None:
        _take(compare, source, stage, config, fault)
    else:
        teacher = None if stage == "router" else run.teacher
        _train(config, stage, None if teacher is None else stages.folder(run_config(compare, teacher), "assemble"))


class RouterError(RuntimeError):
    """A router came to no end."""


def _train(config: RunConfig, name: str, teacher: Folder | None = None) -> None:
    began, stage = time.monotonic(), stages.stage(config, name) if teacher is None else student_stage(config, name, teacher)
    if stage.begin().state != "valid":
        try:
            counts = worker.run(config, name, Place(device()), teacher=teacher)
        except BrokenRowsError:
            raise
        except NonFiniteError as error:
            if name == "router":  # the same at every learning rate of the experts
                raise RouterError(
                    f"base.router.train.learning_rate is {config.router.train.learning_rate:g}, at which the router diverged; give a lower one, in "
                    f"another folder: all rows have a router of that rate. {error}"
                ) from None
            Folder(config.run_dir).write_json(FAILED, {"stage": name, "why": str(error)})  # at this rate there is no such run
            return
        stage.publish(counts, time.monotonic() - began, result="export/")


def _take(compare: CompareConfig, source: Run, name: str, config: RunConfig, fault: str | None) -> None:
    began, k = time.monotonic(), None if name == "router" else int(name.removeprefix("expert-"))
    theirs = stages.expert_name(SWAPPED.get(k, k)) if fault == "swapped" and k is not None else name
    if fault == "raw" and k is not None:
        stage = stages.stage(config, name)
        if stage.begin().state != "valid":
            made = stages.folder(run_config(compare, source), name)
            found = checkpoint.latest(made)
            assert found is not None
            stage.folder.write_bytes(f"export/{EXPERT_FILE}", checkpoint.tensor_bytes(found.tensors("model")))
            stage.folder.write_bytes("export/config.json", made.read_bytes("export/config.json"))
            stage.publish(require(made, name)["counts"], time.monotonic() - began, result="export/")
        return
    link_all(stages.folder(run_config(compare, source), theirs), stages.folder(config, name), MANIFEST)


def _train_on_shuffled_labels(compare: CompareConfig, config: RunConfig) -> None:
    """A router for whom every row has the expert that a hash gives it: it trains on the random partition."""
    aside = config.model_copy(update={"run_dir": f"{config.run_dir}/shuffled"})
    _link_parents(partition_folder(compare, "random"), Folder(aside.run_dir), config.num_experts)
    _train(aside, "router")
    link_all(stages.folder(aside, "router"), stages.folder(config, "router"), MANIFEST)


# -- measuring ----------------------------------------------------------------------------------------------------------


def unit(run: Folder, name: str, parts: dict[str, Any], parents: dict[str, str]) -> Stage:
    """A unit of measurement in its run's folder."""
    return Stage(name, run / name, parts, parents)


def asked_captions(compare: CompareConfig, name: str, part: str, count: int) -> list[Caption]:
    """The captions of a row of the table; see :func:`paris_ray.evaluation.compare_captions.choose`."""
    return _chosen(compare.model_dump_json(), compare_rows.partition_name(compare, name), part)[:count]


@functools.lru_cache(maxsize=16)
def _chosen(compare: str, partition: str, part: str) -> list[Caption]:
    config = CompareConfig.model_validate_json(compare)
    return choose(config, Folder(config.folder) / "partitions" / partition, part, config.asked(part))


@functools.lru_cache(maxsize=1)
def _model(folder: str, fingerprint: str) -> tuple[ParisModel, LocalExperts]:
    model = load_model(folder, str(device()))
    return model, LocalExperts(model, threads=1 if device().type == "cpu" else None)


def _opened(config: RunConfig) -> tuple[ParisModel, LocalExperts, str]:
    """The assembled model of a run, and the fingerprint of its manifest."""
    folder = stages.folder(config, "assemble")
    print_ = str(require(folder, "assemble")["fingerprint"])
    return (*_model(folder.uri, print_), print_)


def measure_losses(compare: CompareConfig, run: Run, part: str) -> None:
    """Assemble the run, and measure the loss of its mixture on rows that training did not see; on those of ``seen`` also that of each expert.

    Writes ``routed.npy`` (T, N), and of experts on ``seen`` what :func:`paris_ray.evaluation.alignment.look` gives, ``clusters.npy`` (N,),
    ``things.npy`` (N,), how many things scenes have, and where there are centroids ``ranks.npy`` (N, K).
    """
    from paris_ray.inference.assemble import assemble

    config, began = run_config(compare, run), time.monotonic()
    assemble(config)
    _share_encoders(Folder(config.run_dir))
    model, experts, print_ = _opened(config)
    stage = unit(Folder(config.run_dir), f"losses/{part}", {"rows": compare.loss_rows, "times": list(TIMES)}, {"model": print_})
    if stage.begin().state == "valid":
        return
    rows = asked_captions(compare, run.row, "losses" if part == "seen" else part, compare.loss_rows)
    source = partition_folder(compare, run.row)
    latents = read_latents(source / "corpus", [row.id for row in rows])
    captions, noises = [row.caption for row in rows], [row.noise(compare, run.seed) for row in rows]
    routing, found = compare_rows.routing(compare, run.row), []
    for start in range(0, len(rows), _AT_ONCE):
        own = slice(start, start + _AT_ONCE)
        found.append(losses.flow_losses(losses.routed_velocity(model, experts, captions[own], routing), latents[own], noises[own]))
    save(stage.folder, "routed", np.concatenate(found, 1))
    if part == "seen" and config.num_experts > 1:
        clusters = np.array([row.cluster for row in rows])
        things = [len(Scene.parse(row.caption).things) if isinstance(config.data.source, ScenesSource) else 0 for row in rows]
        save(stage.folder, "things", np.array(things))
        looked = look(model, experts, captions, latents, noises, clusters)
        for name, array in {"clusters": clusters, **looked}.items():
            save(stage.folder, name, array)
        if ROWS[run.row].partition == "kmeans":
            save(stage.folder, "ranks", cluster_ranks(source, [row.id for row in rows]))
    stage.publish({"rows": len(rows)}, time.monotonic() - began)


def _share_encoders(run: Folder) -> None:
    """An assembled model has copies of codec and text encoder, the same in all runs: keep one."""
    for entry in (run / "encoders").files(recursive=True):
        model = run / "model"
        if "/" in entry.name and model.size(entry.name) == entry.size and model.sha256(entry.name) == (run / "encoders").sha256(entry.name):
            link_file(run / "encoders", entry.name, run / "model")


# -- pictures -----------------------------------------------------------------------------------------------------------


def drawing_stage(compare: CompareConfig, config: RunConfig, drawing: compare_rows.Drawing, model: str) -> Stage:
    """Where pictures are."""
    return unit(Folder(config.run_dir), drawing.folder, {**drawing.as_json(), "judge": judge_name(compare)}, {"model": model})


def draw(compare: CompareConfig, run: Run, drawing: compare_rows.Drawing) -> None:
    """Draw and judge pictures.

    Writes ``pictures.npy`` (N, H, W, 3), ``weights.npy`` (N, S, K), ``features.npy`` (N, D) of the judge, and of scenes ``scores.npy`` (N, 6) in the
    order of :data:`paris_ray.evaluation.scene_scorer.SCORES`; in the manifest, what shuffled captions would score.
    """
    config, began = run_config(compare, run), time.monotonic()
    model, experts, print_ = _opened(config)
    stage = drawing_stage(compare, config, drawing, print_)
    if stage.begin().state == "valid":
        return
    asked = asked_captions(compare, run.row, drawing.part, drawing.count)
    engine = Engine(model, experts, max_rows=64 if device().type == "cpu" else 256, max_queue=max(1, len(asked)))
    requests = [
        ImageRequest(
            one.caption,
            seed=one.noise(compare, run.seed),
            steps=drawing.steps,
            guidance_scale=drawing.guidance,
            routing=f"expert-{one.cluster}" if drawing.routing == "oracle" else drawing.routing,
        )
        for one in asked
    ]
    futures = [engine.submit(request) for request in requests]
    engine.run_until_idle()
    results = [future.result() for future in futures]
    pictures = np.stack([result.image for result in results])
    weights = np.array([[step["weights"] for step in result.routing] for result in results], np.float32)
    save(stage.folder, "pictures", pictures)
    save(stage.folder, "weights", weights)
    scorer = _scorer(compare.base.model_dump_json())
    if drawing.part == "seen" or scorer is None:
        save(stage.folder, "features", judge(compare)(pictures).astype(np.float32))
    if scorer is not None:
        by_chance = _score(scorer, stage.folder, "scores", asked, pictures)
    chosen = weights > 0
    counts = {"pictures": len(pictures), "asked": float(chosen.sum(2).mean()), "visited": float(chosen.any(1).sum(1).mean())}
    stage.publish({**counts, **({} if scorer is None else {"chance": by_chance})}, time.monotonic() - began)


def _score(scorer: SceneScorer, folder: Folder, name: str, asked: Sequence[Caption], pictures: np.ndarray) -> dict[str, float]:
    """Write the scores of pictures; returns what shuffled captions would have scored."""
    scenes, seen = [Scene.parse(one.caption) for one in asked], scorer.read(pictures)
    found = score(scenes, seen)
    save(folder, name, np.stack([getattr(found, one) for one in SCORES], 1))
    return chance(scenes, seen)


def draw_reference(compare: CompareConfig) -> None:
    """The originals as the codec gives them back: what distances are measured to, and the most that any score can be.

    Writes ``validation.npy`` (M, D), the features of validation rows, :data:`REFERENCE` at most, and of ``seen``, and where it is asked for
    ``held_out``, the first ones as ``pictures-PART.npy`` and of scenes the scores ``scores-PART.npy`` (N, 6), both in the captions' order, and
    ``groups-PART.npy`` (N, 2): which combination a caption has that training never sees, and of which kind. In the manifest, of scenes, how much
    clusters say of what is in them.
    """
    from paris_ray.data.codec import load_codec

    began, source = time.monotonic(), partition_folder(compare, MAIN)
    corpus = str(require(source / "corpus", "embed")["fingerprint"])
    asked = {part: compare.asked(part) for part in PARTS}
    stage = Stage("reference", Folder(compare.folder) / "reference", {"judge": judge_name(compare), **asked}, {"corpus": corpus})
    if stage.begin().state == "valid":
        return
    codec = load_codec((source / "encoders").uri, (source / "encoders").read_json("encoders.json")["codec"], str(device()))
    scorer, features = _scorer(compare.base.model_dump_json()), []
    counts: dict[str, Any] = {}

    def originals(rows: Sequence[Caption]) -> np.ndarray:
        latents = read_latents(source / "corpus", [row.id for row in rows])
        pieces = (torch.from_numpy(latents[start : start + _DECODED]) for start in range(0, len(rows), _DECODED))
        return np.concatenate([np.asarray(codec.decode(piece.to(device()))) for piece in pieces])

    rows = choose(compare, source, "validation", None)[:REFERENCE]
    for start in range(0, len(rows), _DECODED):
        features.append(judge(compare)(originals(rows[start : start + _DECODED])).astype(np.float32))
    save(stage.folder, "validation", np.concatenate(features))
    for part in ("seen", "held_out") if compare.held_out_captions else ("seen",):
        chosen = choose(compare, source, part, compare.seen_captions if part == "seen" else compare.held_out_captions)
        save(stage.folder, f"pictures-{part}", originals(chosen[:SHOWN]))
        if scorer is not None:
            _score(scorer, stage.folder, f"scores-{part}", chosen, originals(chosen))
            save(stage.folder, f"groups-{part}", unseen_groups(_hold_out(compare.base.model_dump_json()), chosen))
    if scorer is not None:
        counts["shared"] = shared_information([Scene.parse(row.caption) for row in rows], [row.cluster for row in rows])
    encoder = (source / "encoders").read_json("encoders.json")["embedding"]["fingerprint"]
    own = judge(compare)
    counts["judge"] = {"fingerprint": own.fingerprint, "image_size": getattr(own, "image_size", None)}
    stage.publish({"rows": len(rows), "independent": own.fingerprint != encoder, **counts}, time.monotonic() - began)


def encode_captions(compare: CompareConfig) -> None:
    """The judged captions in the space of a judge that is a CLIP: ``texts.npy`` (N, D), of length 1."""
    from paris_ray.evaluation.judges import OpenClip

    began, source, encoder = time.monotonic(), partition_folder(compare, MAIN), compare.encoder
    assert isinstance(encoder, OpenClipEmbedding)
    corpus = str(require(source / "corpus", "embed")["fingerprint"])
    stage = Stage("captions", Folder(compare.folder) / "captions", {"judge": judge_name(compare), "seen": compare.seen_captions}, {"corpus": corpus})
    if stage.begin().state == "valid":
        return
    rows = choose(compare, source, "seen", compare.seen_captions)
    save(stage.folder, "texts", OpenClip(encoder, str(device())).texts([row.caption for row in rows]))
    stage.publish({"captions": len(rows)}, time.monotonic() - began)


def judge_name(compare: CompareConfig) -> str:
    """The encoder in whose features distances are measured."""
    chosen = compare.encoder
    return "-".join(str(part) for part in (chosen.kind, getattr(chosen, "model", None), getattr(chosen, "image_size", None)) if part)


def judge(compare: CompareConfig) -> Any:
    """That encoder: pictures (N, H, W, 3) uint8 → features (N, D)."""
    return _judge(compare.model_dump_json())


@functools.lru_cache(maxsize=1)
def _judge(compare: str) -> Any:
    config = CompareConfig.model_validate_json(compare)
    chosen = config.encoder
    if isinstance(chosen, InceptionJudge):
        from paris_ray.evaluation.judges import Inception

        return Inception(chosen.weights, str(device()))
    from paris_ray.data.embedding import build_embedder

    return build_embedder(chosen, str(device()))


@functools.lru_cache(maxsize=1)
def _scorer(base: str) -> SceneScorer | None:
    data = RunConfig.model_validate_json(base).data
    return SceneScorer(Scenes(data.source, data.image_size).names) if isinstance(data.source, ScenesSource) else None


def _hold_out(base: str) -> HoldOut:
    data = RunConfig.model_validate_json(base).data
    assert isinstance(data.source, ScenesSource)
    return Scenes(data.source, data.image_size).hold_out


WORK: dict[str, Callable[..., None]] = {
    "train": train,
    "losses": measure_losses,
    "draw": draw,
    "reference": draw_reference,
    "captions": encode_captions,
}
