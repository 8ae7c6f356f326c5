"""What each expert of a comparison was trained on, and how good pictures of its cluster's captions are. No torch, no Ray."""

from __future__ import annotations

import numpy as np

from paris_ray.evaluation import compare_rows
from paris_ray.evaluation.compare_captions import choose
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import BLIND, MAIN
from paris_ray.evaluation.compare_verdicts import WHOLLY
from paris_ray.evaluation.intervals import paired_interval, signed
from paris_ray.manifest import published
from paris_ray.storage import Folder

HEADER = (
    "expert", "training rows", "images", "passes", "steps", "captions of its cluster", f"{WHOLLY}, {MAIN}", f"{WHOLLY}, monolith",
    f"{MAIN} minus monolith (95 %)", f"{BLIND} minus monolith (95 %)",
)  # fmt: skip

MEANING = (
    "Images are shared out as training rows are, so the expert of the smallest cluster takes the fewest steps. Pictures of the captions of each "
    "cluster, drawn as the row is: what too few steps cost shows where theirs are worse beside the monolith's than others are."
)


def rows(results: Results) -> list[list[str]]:
    """Cells under :data:`HEADER`, a row for each expert of the main row; none before its corpus is cut and its learning rate chosen."""
    compare, rate = results.compare, results.plan.rate(MAIN)
    run = Folder(compare_rows.partition_config(compare, MAIN).run_dir)
    made = published(run / "clusters")
    if made is None or rate is None or published(run / "corpus") is None:
        return []
    clusters = np.array([one.cluster for one in choose(compare, run, "seen", compare.seen_captions)])
    experts, found = results.plan.config(results.plan.run(MAIN, compare.seeds[0], rate)).experts, []
    for k, (spec, size) in enumerate(zip(experts, made["counts"]["sizes"], strict=True)):
        images, own = spec.train.images or 0, clusters == k
        found.append(
            [
                str(k),
                str(size),
                str(images),
                f"{images / size:.1f}",
                str(images // spec.train.batch_size),
                str(own.sum()),
                *(_score(results, row, own) for row in (MAIN, "monolith")),
                *(_difference(results, row, own) for row in (MAIN, BLIND)),
            ]
        )
    return found


def _score(results: Results, row: str, own: np.ndarray) -> str:
    way = results.way(row)
    found = None if way is None else results.scores(way, sorted(way.folders))
    return "–" if found is None or not own.any() else f"{found[own].mean():.3f}"


def _difference(results: Results, row: str, own: np.ndarray) -> str:
    a, b = results.way(row), results.way("monolith")
    seeds = [] if a is None or b is None else sorted(a.folders.keys() & b.folders.keys())
    if a is None or b is None or not seeds or not own.any():
        return "–"
    one, other = results.scores(a, seeds), results.scores(b, seeds)
    return "–" if one is None or other is None else signed(paired_interval(one[own], other[own]))
