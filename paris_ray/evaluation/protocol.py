"""What is asked and how an answer is judged: the captions, their seeds, the corpus they are compared with. No Ray, no torch.

The captions are a function of the corpus and the run's seed: in each cluster, training rows in the order of a hash of their id; then held-out rows
whose group also occurs in training (combinations that were never seen of things that were). Each picture's seed is a hash of its caption's id, so all
rows of the table start from the same noise.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from paris_ray import rng
from paris_ray.config import RunConfig
from paris_ray.data.schema import SPLITS, parts, read_columns, read_labels, read_table, to_numpy
from paris_ray.data.splits import read_copies, read_splits
from paris_ray.evaluation import metrics
from paris_ray.storage import Folder

Decode = Callable[[NDArray[np.floating]], NDArray[np.uint8]]
"""Latents (N, C, h, w) → pictures (N, H, W, 3)."""

Embed = Callable[[NDArray[np.uint8]], NDArray[np.floating]]
"""Pictures (N, H, W, 3) → embeddings (N, D)."""


@dataclass(frozen=True)
class Corpus:
    """All rows of the corpus, in the order of its files.

    Attributes:
        folder: the corpus folder; latents are read from it when needed, and only those needed.
        ids: (M,) str.
        captions: (M,) str.
        groups: (M,) str.
        splits: (M,) of :data:`paris_ray.data.schema.SPLITS`.
        duplicates: (M,) bool, true for near-duplicates of another row.
        embeddings: (M, D) float16.
        clusters: (M,) the expert whose cluster the row is in.
    """

    folder: Folder
    ids: NDArray[Any]
    captions: NDArray[Any]
    groups: NDArray[Any]
    splits: NDArray[Any]
    duplicates: NDArray[np.bool_]
    embeddings: NDArray[np.float16]
    clusters: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    @functools.cached_property
    def row_of(self) -> dict[str, int]:
        return {str(name): row for row, name in enumerate(self.ids)}

    @functools.cached_property
    def copy_bound(self) -> float:
        return metrics.copy_bound(self.embeddings, self.groups.tolist())

    def rows_of_group(self, group: str) -> NDArray[np.int64]:
        return np.flatnonzero(self.groups == group)

    def latents(self, rows: Sequence[int]) -> NDArray[np.float32]:
        """Latents of some rows, (N, C, h, w); one file in memory at a time."""
        return read_latents(self.folder, [str(self.ids[row]) for row in rows])

    def originals(self, rows: Sequence[int], decode: Decode) -> dict[int, NDArray[np.uint8]]:
        """Originals as the codec gives them back, by row; each is read and decoded once."""
        unique = sorted(set(rows))
        return dict(zip(unique, decode(self.latents(unique)), strict=True)) if unique else {}


def read_corpus(config: RunConfig) -> Corpus:
    """Read what retrieval needs of a run's corpus and cluster labels.

    Raises:
        FileNotFoundError: the corpus or the labels are not there.
        ValueError: a corpus row has no cluster label.
    """
    run = Folder(config.run_dir)
    columns = read_columns(run / "corpus", ["id", "caption", "group", "embedding"])
    splits, copies = np.concatenate(list(read_splits(run / "corpus").values())), read_copies(run / "corpus")
    labels = read_labels(run / "clusters", ["id", "expert"])
    expert = dict(zip(labels["id"].to_pylist(), labels["expert"].to_pylist(), strict=True))
    unlabelled = [name for name in columns["id"].tolist() if name not in expert]
    if unlabelled:
        raise ValueError(
            f"{run.uri}/clusters has no label for {len(unlabelled)} rows of the corpus, such as {unlabelled[0]!r}; "
            "if they were appended, run python -m jobs.append, else partition again"
        )
    return Corpus(
        run / "corpus",
        columns["id"],
        columns["caption"],
        columns["group"],
        np.array(SPLITS, object)[splits],
        np.array([name in copies for name in columns["id"].tolist()], bool),
        columns["embedding"],
        np.array([expert[name] for name in columns["id"].tolist()], np.int64),
    )


def read_latents(folder: Folder, ids: Sequence[str]) -> NDArray[np.float32]:
    """Latents of some rows of a corpus, in the order of ``ids``. Raises KeyError for an unknown id."""
    wanted = set(ids)
    found: dict[str, NDArray[np.float32]] = {}
    for part in parts(folder):
        if not wanted - found.keys():
            break
        content = read_table(folder, part, ["id", "latent"])
        latents = to_numpy(content["latent"])
        for row, name in enumerate(content["id"].to_pylist()):
            if name in wanted:
                found[name] = latents[row].astype(np.float32)
    return np.stack([found[name] for name in ids])


@dataclass(frozen=True)
class Question:
    """One caption to make a picture of."""

    row: int
    id: str
    caption: str
    group: str
    cluster: int
    seed: int

    @property
    def file(self) -> str:
        """A file name of the question: ids may hold anything."""
        return hashlib.sha256(self.id.encode()).hexdigest()[:20]


def trained_captions(config: RunConfig, corpus: Corpus) -> list[Question]:
    """``captions_per_cluster`` training rows of each cluster, by hash of id; a smaller cluster gives all it has."""
    rows = np.flatnonzero((corpus.splits == "train") & ~corpus.duplicates)
    order = sorted(rows.tolist(), key=lambda row: _order(config, corpus, row))
    chosen = []
    for cluster in range(config.num_experts):
        chosen += [row for row in order if corpus.clusters[row] == cluster][: config.evaluation.captions_per_cluster]
    return [_question(config, corpus, row) for row in chosen]


def held_out_captions(config: RunConfig, corpus: Corpus) -> list[Question]:
    """Up to ``held_out_captions`` held-out rows whose group training has seen in another row, by hash of id."""
    seen = set(corpus.groups[corpus.splits == "train"].tolist())
    rows = [row for row in np.flatnonzero((corpus.splits == "held_out") & ~corpus.duplicates).tolist() if corpus.groups[row] in seen]
    order = sorted(rows, key=lambda row: _order(config, corpus, row))
    return [_question(config, corpus, row) for row in order[: config.evaluation.held_out_captions]]


def _order(config: RunConfig, corpus: Corpus, row: int) -> tuple[int, str]:
    name = str(corpus.ids[row])
    return rng.key(config.seed, "evaluate", name), name


def _question(config: RunConfig, corpus: Corpus, row: int) -> Question:
    name = str(corpus.ids[row])
    # 31 bits: every client and file format carries them.
    seed = rng.key(config.seed, "picture", name) % 2**31
    return Question(row, name, str(corpus.captions[row]), str(corpus.groups[row]), int(corpus.clusters[row]), seed)


@dataclass(frozen=True)
class Record:
    """How one picture was judged.

    Attributes:
        id: of the caption's row; ``caption``, ``group``, ``cluster`` and ``seed`` go with it.
        picture: file of the picture below ``eval/``.
        nearest: id of the nearest original, ``nearest_caption``, ``nearest_group`` and ``nearest_split`` go with it.
        distance: cosine distance to it.
        copy_distance: cosine distance to it as the codec gives it back, which is as near as a picture of this model can come.
        right: the nearest original is of the caption's group.
        exact: it is the caption's own row, or one with the same caption.
        copy: it is a training row, and as the codec gives it back it is within the copy bound.
        pixel_copy: it is a training row and equal to the eye.
        ground: the picture has its own original's ground; ``None`` where the group does not tell.
        routing: weights of the experts at each step, (S, K).
    """

    id: str
    caption: str
    group: str
    cluster: int
    seed: int
    picture: str
    nearest: str
    nearest_caption: str
    nearest_group: str
    nearest_split: str
    distance: float
    copy_distance: float
    right: bool
    exact: bool
    copy: bool
    pixel_copy: bool
    ground: bool | None
    routing: list[list[float]] | None

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def judge(
    corpus: Corpus,
    questions: Sequence[Question],
    pictures: NDArray[np.uint8],
    files: Sequence[str],
    routing: Sequence[list[list[float]] | None],
    decode: Decode,
    embed: Embed,
) -> list[Record]:
    """Judge pictures.

    Args:
        corpus: what they are compared with.
        questions: N captions.
        pictures: (N, H, W, 3).
        files: where the pictures are, below ``eval/``.
        routing: weights per step, or ``None``, for each.
        decode: makes originals out of latents.
        embed: the embedder that made the corpus's embeddings.
    """
    embeddings = embed(pictures)
    index, distance = metrics.nearest(embeddings, corpus.embeddings)
    families = [corpus.rows_of_group(question.group).tolist() for question in questions]
    shown = corpus.originals([*index.tolist(), *(row for family in families for row in family)], decode)
    beside = np.stack([shown[row] for row in index.tolist()])
    difference = metrics.pixel_difference(pictures, beside)
    copy_distance = 1.0 - (metrics.unit(embeddings) * metrics.unit(embed(beside))).sum(1)
    records = []
    for i, question in enumerate(questions):
        row = int(index[i])
        trained = corpus.splits[row] == "train"
        family = families[i]
        ground = metrics.right_ground(pictures[i], np.stack([shown[other] for other in family]), family.index(question.row))
        records.append(
            Record(
                question.id,
                question.caption,
                question.group,
                question.cluster,
                question.seed,
                files[i],
                str(corpus.ids[row]),
                str(corpus.captions[row]),
                str(corpus.groups[row]),
                str(corpus.splits[row]),
                float(distance[i]),
                float(copy_distance[i]),
                bool(corpus.groups[row] == question.group),
                bool(row == question.row or corpus.captions[row] == question.caption),
                bool(trained and copy_distance[i] < corpus.copy_bound),
                bool(trained and difference[i] < metrics.PIXEL_COPY),
                ground,
                routing[i],
            )
        )
    return records
