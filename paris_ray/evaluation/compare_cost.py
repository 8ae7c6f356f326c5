"""What of a comparison's rows is matched, and what all of it would cost, before anything is done. Imports nothing heavy."""

from __future__ import annotations

import os
from collections import defaultdict

from paris_ray.data.report.cost import DEVICES, time_text
from paris_ray.evaluation import compare_rows, matching
from paris_ray.evaluation.compare import Line
from paris_ray.evaluation.compare_config import CompareConfig
from paris_ray.evaluation.compare_plan import EXTRA_RATES, Plan
from paris_ray.evaluation.compare_rows import ROWS
from paris_ray.progress import clock
from paris_ray.training.budget import MFU, gpu_hours

COLUMNS = (
    "row", "experts × width × depth", "images", "training PFLOP", "of it router", "batch", "steps", "warm-up", "average's half-life",
    "GFLOP a picture at the base's guidance",
)  # fmt: skip

MEANING = (
    "Matched: training FLOPs with the router's, the corpus (every row of it is seen as often as every other), the batch of all experts together (but "
    "for monolith-steps, which has an expert's), and warm-up and the half-life of the averaged weights as shares of the training of a row's mean "
    "expert. Not matched from expert to expert: each has images in proportion to the rows of its cluster, and all have a warm-up and a "
    "half-life of equally many images. So of steps and of these shares there are two numbers, the least and the most of a row's experts; the "
    "half-life is the one in force at the end of a training. "
    "For monolith-inference also FLOPs a picture, at the base's guidance for both, and for the monolith with more steps, at the guidance that each "
    "has. What a picture costs with the guidance that was chosen stands with each way to draw. Images are what the FLOPs allow, so a wider model "
    "sees fewer, "
    "and so does a student (distilled), whose training is its own three passes an image and its teacher's forward passes, of the router and of each "
    "expert that it asks: it costs what the main row's does, and its teacher's own, which is the main row's, comes on top. "
    "A FLOP is a multiplication or an addition of a matrix product, convolution or attention; training is three forward passes an image."
)


def matched_row(plan: Plan, name: str) -> matching.Matched:
    """Of a row at its learning rate; before that is chosen, at the first."""
    compare = plan.compare
    run = plan.run(name, compare.seeds[0], plan.rate(name) or compare.learning_rates[0])
    return matching.matched(plan.config(run), compare_rows.routing(compare, name), compare_rows.teacher_flops(compare, name, plan.inputs))


def matched_table(compare: CompareConfig, plan: Plan | None = None) -> list[list[str]]:
    """Cells of each row, under :data:`COLUMNS`."""
    plan, found = plan or Plan(compare), []
    for name in compare.rows:
        one, teacher = matched_row(plan, name), ROWS[name].student
        found.append(
            [
                name,
                one.shape,
                f"{one.images:,}".replace(",", " "),
                f"{one.training_flops / 1e15:.4g}" + (" and its teacher's" if teacher else ""),
                f"{one.router_flops / one.training_flops:.1%}",
                str(one.batch),
                _ends(one.steps, "d"),
                _ends(one.warmup_share, ".1%"),
                _ends(one.ema_share, ".1%"),
                f"{one.picture_flops / 1e9:.4g}",
            ]
        )
    return found


def _ends(of: tuple[float, float], form: str) -> str:
    """Least and most of a row's experts; one number where they are written alike."""
    return " … ".join(dict.fromkeys(f"{value:{form}}" for value in of))


def text(compare: CompareConfig) -> str:
    """The plan for people: what is matched, what is done, what it costs."""
    plan = Plan(compare)
    cells = [list(COLUMNS), *matched_table(compare, plan)]
    widths = [max(len(row[i]) for row in cells) + 2 for i in range(len(COLUMNS))]
    lines = ["".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]
    lines += ["", MEANING, ""]
    flops: dict[str, float] = defaultdict(float)
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for unit in plan.units():
        flops[unit.kind] += unit.flops
        counts[unit.kind][0] += plan.done(unit.key)
        counts[unit.kind][1] += 1
    names = {"train": "training", "losses": "losses", "draw": "pictures", "reference": "originals", "captions": "captions"}
    price = compare.base.expert.resources.price_per_hour
    lines.append(f"{'':<12}{'units done':>14}{'PFLOP':>12}" + "".join(f"{'one ' + device:>14}" for device in DEVICES))
    for kind, name in names.items():
        if not counts[kind][1]:
            continue
        hours = "".join(f"{time_text(gpu_hours(flops[kind], peak)):>14}" for peak in DEVICES.values())
        lines.append(f"{name:<12}{f'{counts[kind][0]} of {counts[kind][1]}':>14}{flops[kind] / 1e15:>12.4g}{hours}")
    total = sum(flops.values())
    hours = "".join(f"{time_text(gpu_hours(total, peak)):>14}" for peak in DEVICES.values())
    lines.append(f"{'all':<12}{'':>14}{total / 1e15:>12.4g}{hours}")
    lines.append(f"Times are estimates, at {MFU:.0%} of a device's bfloat16 peak; small models reach far less. Embedding is not in them.")
    if price is not None:
        costs = ", ".join(f"{price * gpu_hours(total, peak):,.0f} on {device}" for device, peak in DEVICES.items())
        lines.append(f"At base.expert.resources.price_per_hour {price:g}: {costs}.")
    if not compare.base.expert.resources.gpus:
        workers = compare.workers or len(os.sched_getaffinity(0))
        left = Line(plan, workers).seconds(plan.units())[1]
        lines.append(f"Left to do with {workers} processes on this machine's cores: about {clock(left / workers)}.")
    tries, seeds = len(compare.learning_rates), len(compare.seeds)
    borrow = sum(ROWS[name].borrows for name in compare.rows)
    rows = f"{len(compare.rows) - borrow} rows × ({tries} learning rates + {seeds - 1} more seeds)"
    lines.append(f"{rows}, {borrow} with the main row's experts; equal trainings are made once.")
    lines.append(f"While the best rate is at an end, the next one is tried, up to {EXTRA_RATES} times; not in these figures.")
    return "\n".join(lines)
