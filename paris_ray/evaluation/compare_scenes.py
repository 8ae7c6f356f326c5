"""What scenes are asked and what clusters divide of them. No torch, no Ray."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from sklearn.metrics import normalized_mutual_info_score

from paris_ray import rng
from paris_ray.config import ScenesSource
from paris_ray.data.scenes import UNSEEN, HoldOut, Scene
from paris_ray.evaluation.compare_captions import Caption, choose
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.storage import Folder


def unseen_groups(hold_out: HoldOut, asked: Sequence[Caption]) -> np.ndarray:
    """Numbers of the unseen combination of each caption, and of its kind, an index in :data:`paris_ray.data.scenes.UNSEEN`: (N, 2); -1 for none."""
    scenes = [Scene.parse(one.caption) for one in asked]
    words, kinds = [hold_out.asked(scene) for scene in scenes], [hold_out.unseen(scene) for scene in scenes]
    numbers = {word: i for i, word in enumerate(sorted({*words} - {""}))}
    return np.array([[numbers.get(word, -1), UNSEEN.index(kind[0]) if kind else -1] for word, kind in zip(words, kinds, strict=True)])


def shared_information(scenes: Sequence[Scene], clusters: Sequence[int]) -> dict[str, list[float]]:
    """Normalised mutual information of clusters with what scenes show, and of the same clusters shuffled: what experts have to divide."""
    shown = {
        "first thing": [scene.things[0].name for scene in scenes],
        "its place": [scene.things[0].place for scene in scenes],
        "number of things": [str(len(scene.things)) for scene in scenes],
        "colour": [scene.colour for scene in scenes],
        "texture": [scene.texture for scene in scenes],
    }
    shuffled = np.asarray(clusters)[rng.permutation(0, "shared-information", 0, len(clusters))]
    found = {name: [normalized_mutual_info_score(words, one) for one in (clusters, shuffled)] for name, words in shown.items()}
    return {name: [float(own), float(none)] for name, (own, none) in found.items()}


NEXT_TO_NOTHING = 0.05
"""Clusters that share less than this with what scenes show, beyond what shuffled ones do, divide nothing of it."""


def undivided(compare: CompareConfig, run: Folder) -> str | None:
    """What to tell before anything is trained: that the clusters do not divide the things, so that no expert has less to learn than a monolith.

    Args:
        compare: the comparison.
        run: with ``corpus/`` and ``clusters/`` of the main row.

    Returns:
        a warning; ``None``: they do, or the corpus is not of scenes.
    """
    if not isinstance(compare.base.data.source, ScenesSource):
        return None
    rows = choose(compare, run, "validation", None)
    own, shuffled = shared_information([Scene.parse(row.caption) for row in rows], [row.cluster for row in rows])["first thing"]
    if own - shuffled >= NEXT_TO_NOTHING:
        return None
    return (
        f"clusters share {own:.3f} of their information with the first thing of a scene, shuffled ones {shuffled:.3f}: every expert has to learn "
        "what the monolith does, from fewer rows. Take fewer base.data.source.textures, colours or objects, or another base.data.embedding"
    )
