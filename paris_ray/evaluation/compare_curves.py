"""Loss against what training cost, of the rows of a comparison. No torch."""

from __future__ import annotations

import numpy as np

from paris_ray import stages
from paris_ray.evaluation import matching
from paris_ray.evaluation.compare_plan import Plan
from paris_ray.evaluation.compare_rows import ROWS, Run
from paris_ray.training.checkpoint import read_metrics

POINTS = 40


def training_curves(plan: Plan) -> list[tuple[str, list[float], list[float]]]:
    """Of each row at its learning rate, under the first seed: PFLOP of its experts' training so far, and their loss, weighted by their budgets.

    Losses of DDPM experts, and of students to their teachers, are of other kinds: rows with them are left out.
    """
    found = []
    for row in plan.compare.rows:
        rate = plan.rate(row)
        if rate is None or ROWS[row].fault or ROWS[row].ddpm or ROWS[row].student:
            continue
        config = plan.config(Run(row, plan.compare.seeds[0], rate))
        shares, cost, curves = np.linspace(0.05, 1, POINTS), 0.0, []
        for k, spec in enumerate(config.experts):
            lines = read_metrics(stages.folder(config, stages.expert_name(k)))
            if not lines or spec.train.images is None:
                break
            x = [line["images"] / spec.train.images for line in lines]
            curves.append(spec.train.images * np.interp(shares, x, [line["loss"] for line in lines]))
            cost += spec.train.images * matching.expert_training_flops(spec.model, plan.inputs)
        else:
            total = sum(spec.train.images or 0 for spec in config.experts)
            found.append((row, (shares * cost / 1e15).tolist(), (np.sum(curves, 0) / total).tolist()))
    return found
