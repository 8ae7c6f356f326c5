"""Whether presets can learn, and how long they take by arithmetic."""

from __future__ import annotations

from collections import Counter

from paris_ray.evaluation import compare_config
from paris_ray.evaluation.compare_plan import Plan
from paris_ray.evaluation.compare_rows import Run

SMALL_STEP, LARGE_STEP = 2.4e-3, 12e-3
"""Seconds that a GPU is busy with 600 kernels of a batch of 64, 4 µs each, and of 512, 20 µs each: assumed, as the notebook says, not measured."""


def test_compare_tiny_plants_faults_and_draws_in_every_way_without_a_training_more(tmp_path):
    """What it had before was trained for: every one of these trainings is still asked for, from the same inputs, and no other that costs anything."""
    before = ("rows=[experts, monolith, monolith-steps, blind]", "routings=[top-1, full, caption, oracle]", "guidance_scales=[1.0, 1.5, 2.5, 4.0]")
    bare, whole = (Plan(compare_config.load("compare_tiny", [f"folder={tmp_path}", *sets])) for sets in (before, ()))

    def trainings(plan):
        return {unit.key: (unit.arguments, unit.flops) for unit in plan.units() if unit.kind == "train" and unit.flops}

    assert trainings(bare) == trainings(whole) != {}
    assert len(whole.compare.guidance_scales) == 6
    assert {row for row in whole.compare.rows if row.startswith("fault")} == {"fault-swapped", "fault-raw"}
    ways = whole.ways("experts", 0)
    assert {"experts/top-3", "experts/threshold", *(f"experts/expert-{k}" for k in range(4))} < {*ways}


def test_compare_gpu_is_set_up_as_the_notebook_says_that_experts_learn(tmp_path):
    compare = compare_config.load("compare_gpu", [f"folder={tmp_path}"])
    source, train = compare.base.data.source, compare.base.expert.train
    assert compare.images / compare.base.num_experts / train.batch_size >= 1.5 * 1200  # below some 1200 steps experts are noise
    assert source.textures == ("plain",)  # of others, clusters are of textures
    assert (source.things, source.objects) == (2, 16)
    assert compare.seeds == (0, 1, 2, 3, 4)
    assert {"fault-router", "fault-swapped", "fault-raw"} < {*compare.rows}


def test_compare_gpu_trains_in_less_than_seventeen_of_its_twenty_five_minutes(tmp_path):
    """With the third learning rate that is tried where the best of two is at an end, which it is."""
    compare = compare_config.load("compare_gpu", [f"folder={tmp_path}"])
    plan, steps = Plan(compare), Counter()
    for unit in plan.units():
        if unit.kind == "train" and unit.flops:
            row = unit.key.removeprefix("later: ").removeprefix("runs/").split("/")[0].split(" ")[0]
            config = plan.config(Run(row, 0, compare.learning_rates[0]))
            train = config.router.train if unit.key.endswith("router") else config.experts[0].train
            steps[train.batch_size] += train.images // train.batch_size
    assert set(steps) == {64, 256, 512}
    seconds = (steps[64] + steps[256]) * SMALL_STEP + steps[512] * LARGE_STEP
    assert 600 < seconds * 7 / 6 < 17 * 60
