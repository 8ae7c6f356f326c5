"""A comparison of which everything is done, without a training: losses, scores and manifests are planted."""

from __future__ import annotations

import numpy as np

from paris_ray.evaluation import compare, compare_config
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_plan import Plan
from paris_ray.evaluation.compare_protocol import protocol
from paris_ray.evaluation.compare_rows import Run
from paris_ray.evaluation.compare_verdicts import find_all
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import MANIFEST
from paris_ray.storage import Folder

SMALL = (
    "validation_captions=4", "seen_captions=40", "held_out_captions=20", "loss_rows=3", "seeds=[0, 1, 2]", "guidance_scales=[1.0, 2.0, 3.0]",
    "learning_rates=[0.001, 0.002, 0.004]", "rows=[experts, monolith, monolith-steps, blind]", "routings=[top-1, full, caption, oracle]",
)  # fmt: skip
CHOSEN = {1.0: 0.3, 2.0: 0.2, 3.0: 0.5}
"""Planted quality on validation captions by guidance; on all others the other way round."""
ASKED = {"top-2": 2.0, "full": 4.0}


def config(folder, *sets):
    return compare_config.load("compare_tiny", [f"folder={folder}", *SMALL, *sets])


def publish(folder: Folder, inputs=None, asked=2.0, **arrays):
    for name, array in arrays.items():
        save(folder, name, np.asarray(array))
    counts = {"asked": asked, "visited": asked, "independent": False, "rows": 9, "chance": dict.fromkeys(SCORES, 0.05)}
    inputs = {"config": {"judge": "planted", **(inputs or {})}, "parents": {"corpus": "corpus-print"}}
    folder.write_json(MANIFEST, {"inputs": inputs, "fingerprint": "x", "counts": counts, "seconds": 2.0, "software": {"cpu": "planted"}})


def finish(compare_, keep=lambda unit: True, quality=lambda unit: CHOSEN, loss=lambda run: abs(run.rate - 0.002)):
    """Mark what can be done as done, until nothing changes; losses and scores that later choices read are planted first."""
    plan, order = Plan(compare_), []
    while ready := [unit for unit in compare.possible(plan, plan.units(), set()) if keep(unit)]:
        unit = ready[0]
        order.append(unit)
        folder = plan.folder / unit.key
        arrays, inputs, asked = {}, None, 1.0
        if unit.kind == "losses":
            arrays = {"routed": np.full((2, 3), loss(unit.arguments[0]))}
        if unit.kind == "draw":
            drawing = unit.arguments[1]
            inputs, planted, asked = drawing.as_json(), quality(unit)[drawing.guidance], ASKED.get(drawing.routing, 1.0)
            arrays = {"scores": np.full((drawing.count, len(SCORES)), planted if drawing.part == "validation" else 1 - planted)}
        publish(folder, inputs, asked, **arrays)
        plan.forget()
    return plan, order


def plant(compare_, plan, row, values, name="all", part="seen"):
    """Scores (N, R) of a way, the row's own or another."""
    drawing = plan.drawing(row, plan.guidance(row), part)
    for r, seed in enumerate(compare_.seeds[: values.shape[1]]):
        whose = row.partition("/")[0]
        folder = plan.runs_folder(plan.run(whose, seed, plan.rate(whose))) / drawing.folder
        scores = np.load(f"{folder.path}/scores.npy")
        scores[:, SCORES.index(name)] = values[:, r]
        save(folder, "scores", scores)


def words(results):
    """Of the protocol."""
    return " ".join(f"{head}: {said}" for head, said in protocol(results, find_all(results)))


def drawn(mine, plan, row, seed, part="seen"):
    """Where a row's own pictures are."""
    return Folder(Run(row, seed, plan.rate(row)).folder(mine)) / plan.drawing(row, plan.guidance(row), part).folder
