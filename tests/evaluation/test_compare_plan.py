"""Choices, verdicts and the order of work, from figures that are planted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from paris_ray.evaluation import alignment_figures, compare, compare_config
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_claims import CLAIMS, answer, verdict
from paris_ray.evaluation.compare_plan import FAILED, Plan, choose_guidance, choose_rate
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import ROWS, Run
from paris_ray.evaluation.intervals import Interval
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import MANIFEST, StaleError
from paris_ray.storage import Folder


def config(folder, *sets):
    small = ["validation_captions=4", "held_out_captions=40", "routing_captions=20", "seeds=[0, 1]", "guidance_scales=[1.0, 2.0, 3.0]"]
    return compare_config.load("compare_tiny", [f"folder={folder}", "learning_rates=[0.001, 0.002, 0.004]", *small, *sets])


def publish(folder: Folder, **arrays):
    for name, array in arrays.items():
        save(folder, name, np.asarray(array))
    folder.write_json(MANIFEST, {"fingerprint": "x", "counts": {"asked": 2.0, "visited": 3.0, "independent": False, "rows": 9}, "seconds": 2.0})


def finish(compare_, keep=lambda unit: True):
    """Mark what can be done as done, until nothing changes; losses and scores that later choices read are planted first."""
    plan, order = Plan(compare_), []
    while ready := [unit for unit in compare.possible(plan, plan.units(), set()) if keep(unit)]:
        unit = ready[0]
        order.append(unit)
        folder = plan.folder / unit.key
        arrays = {}
        if unit.kind == "losses":
            arrays = {"routed": np.full((2, 3), abs(unit.arguments[0].rate - 0.002))}
        if unit.kind == "draw":
            drawing = unit.arguments[1]
            scores = np.zeros((drawing.count, len(SCORES)))
            scores[:, SCORES.index("objects")] = {1.0: 0.3, 2.0: 0.2, 3.0: 0.5}[drawing.guidance]
            arrays = {"scores": scores}
        publish(folder, **arrays)
    return plan, order


def test_the_rate_with_the_least_loss_is_chosen():
    assert choose_rate({1e-3: 0.4, 2e-3: 0.3, 4e-3: 0.35}) == 2e-3
    assert choose_rate({1e-3: 0.3, 2e-3: 0.3}) == 1e-3
    assert choose_rate({1e-3: 0.4, 2e-3: float("inf"), 4e-3: float("nan")}) == 1e-3
    with pytest.raises(ValueError, match="diverged at all of"):
        choose_rate({1e-3: float("inf")})


def test_the_guidance_with_the_best_quality_is_chosen():
    assert choose_guidance({1.0: 0.1, 2.0: 0.4, 4.0: 0.3}) == 2.0
    assert choose_guidance({1.0: -5.0, 2.0: -2.0, 4.0: -2.0}) == 2.0


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.2, "reproduced"),
        (-0.2, -0.01, "not reproduced"),
        (-0.01, 0.2, "cannot be told here"),
        (0.0, 0.2, "cannot be told here"),
        (-0.2, 0.0, "cannot be told here"),
    ],
)
def test_the_interval_decides(low, high, said):
    assert verdict(Interval((low + high) / 2, low, high)) == said


def test_what_is_not_measured_cannot_be_told():
    assert verdict(None) == answer(None) == "cannot be told here"
    assert answer(Interval(1, 0.5, 2)) == "yes"
    known = {*ROWS, "distilled"}
    assert all(side.partition("/")[0] in known for claim in CLAIMS for side in (claim.better, claim.worse))


def test_work_is_ordered_and_chosen_on_validation_alone(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith, blind, fault-swapped]")
    plan, order = finish(mine)
    assert all(plan.done(unit.key) for unit in plan.units())
    assert plan.rate("monolith") == 0.002
    assert plan.guidance("experts") == plan.guidance("fault-swapped") == 3.0
    keys = [unit.key for unit in order]
    assert len(keys) == len(set(keys))
    # Nothing held out is touched before its row's rate and guidance are chosen.
    for row in ("experts", "monolith"):
        chosen = max(i for i, key in enumerate(keys) if key.startswith(f"runs/{row}/") and "validation" in key)
        drawn = min(i for i, key in enumerate(keys) if key.startswith(f"runs/{row}/") and "drawings/held_out" in key)
        assert chosen < drawn
    # Other seeds are trained at the chosen rate only.
    assert {key.split("/")[2] for key in keys if "seed-1" in key} == {"seed-1-rate-0.002"}
    # Equal trainings once: the router at three rates, and the blind row's experts; a fault has no trainings of its own.
    made = [unit for unit in order if unit.kind == "train" and unit.flops]
    assert (
        len(made) == (4 * 8 + 2) + (4 + 2) + 2
    )  # experts and routers, of three rates and two seeds; monoliths and their routers of nothing; blind routers
    assert not [unit for unit in made if unit.arguments[0].row == "fault-swapped"]


def test_a_rate_that_diverged_is_left_out(tmp_path):
    mine = config(tmp_path, "rows=[experts]")
    Folder(Run("experts", 0, 0.002).folder(mine)).write_json(FAILED, {"why": "not a number"})
    plan, order = finish(mine)
    assert plan.rate("experts") in (0.001, 0.004)
    assert not any("rate-0.002" in unit.key for unit in order)


def test_a_pair_that_differs_is_told_and_one_that_does_not_is_not(tmp_path):
    """Planted pictures: 0.2 better on each caption and seed but for noise; and the same but for noise."""
    mine = config(tmp_path, "rows=[experts, monolith, random]")
    plan, _ = finish(mine)
    g = np.random.default_rng(0)
    for row, gain in (("experts", 0.0), ("monolith", -0.2), ("random", 0.0)):
        for seed in mine.seeds:
            folder = Folder(Run(row, seed, 0.002).folder(mine)) / plan.drawing(row, 3.0).folder
            scores = np.zeros((40, len(SCORES)))
            scores[:, SCORES.index("objects")] = 0.5 + gain + g.normal(size=40) * 0.1
            save(folder, "scores", scores)
    results = Results(mine)
    assert results.difference("experts/top-2", "monolith").low > 0.1
    assert verdict(results.difference("monolith", "experts/top-2")) == "not reproduced"
    assert verdict(results.difference("experts/top-2", "random")) == "cannot be told here"
    assert results.difference("experts/top-2", "experts-4") is None


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    compare.settle(config(tmp_path))
    compare.settle(config(tmp_path, "rows=[experts, blind]", "workers=7"))
    with pytest.raises(StaleError, match=r"images: 81920 → 50000\nPut back what changed, or choose another folder"):
        compare.settle(config(tmp_path, "images=50000"))


def test_the_matrix_and_who_fails():
    """Three experts, each row's loss the distance of expert and cluster, but expert 0 knows cluster 1 better than 1 itself."""
    clusters = np.array([0, 0, 1, 1, 2])
    losses = np.abs(np.arange(3)[:, None, None] - clusters[None, None]).repeat(2, 1) + 1.0
    losses[0, :, clusters == 1] = 0.9
    matrix = alignment_figures.own_cluster(losses, clusters)
    assert matrix.tolist() == [[1.0, 0.9, 3.0], [2.0, 1.0, 2.0], [3.0, 2.0, 1.0]]
    assert alignment_figures.failing(matrix) == [(1, 0, pytest.approx(0.1))]
    router = np.zeros((2, 5, 3))
    router[..., 2], router[..., 1] = 0.6, 0.3  # asks 2, then 1
    asked, others = alignment_figures.asked_and_not(losses, router)
    assert asked[0].tolist() == [2.5, 2.5, 1.5, 1.5, 1.5]
    assert others[0].tolist() == [1.0, 1.0, 0.9, 0.9, 3.0]
    assert alignment_figures.rank_correlation(np.array([1.0, 5.0, 3.0]), np.array([10.0, 90.0, 40.0])) == pytest.approx(1.0)


def test_the_config_is_json_for_other_processes():
    tree = json.loads(json.dumps(compare_config.load("compare_tiny").model_dump(mode="json")))
    assert compare_config.build(tree) == compare_config.load("compare_tiny")
