"""Choices, verdicts and the order of work, from figures that are planted."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from planted import CHOSEN, config, finish, plant
from scipy.stats import spearmanr

from paris_ray.config import ConfigError, ScenesSource
from paris_ray.data.scenes import TEXTURES, Scene, Scenes
from paris_ray.evaluation import alignment_figures, compare, compare_config, compare_plan, compare_scenes, matching
from paris_ray.evaluation.arrays import save
from paris_ray.evaluation.compare_captions import Caption
from paris_ray.evaluation.compare_claims import ASKED, PRIMARY, SAID
from paris_ray.evaluation.compare_plan import FAILED, Plan, choose_guidance, choose_rate
from paris_ray.evaluation.compare_report import write_report
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import ROWS, Run
from paris_ray.evaluation.compare_tables import way_header, way_rows
from paris_ray.evaluation.compare_verdicts import BETTER, UNTOLD, WORSE, find, told
from paris_ray.evaluation.intervals import Interval
from paris_ray.evaluation.scene_scorer import SCORES
from paris_ray.manifest import MANIFEST, StaleError
from paris_ray.pages import charts
from paris_ray.storage import Folder


def test_the_rate_with_the_least_loss_is_chosen():
    assert choose_rate({1e-3: 0.4, 2e-3: 0.3, 4e-3: 0.35}) == 2e-3
    assert choose_rate({1e-3: 0.3, 2e-3: 0.3}) == 1e-3
    assert choose_rate({1e-3: 0.4, 2e-3: float("inf"), 4e-3: float("nan")}) == 1e-3
    assert choose_rate({1e-3: float("inf")}) is None


def test_the_least_guidance_within_a_standard_error_of_the_best_is_chosen():
    assert choose_guidance({1.0: np.array([-5.0]), 2.0: np.array([-2.0]), 4.0: np.array([-2.0])}) == 2.0
    hard = np.random.default_rng(0).normal(size=100)  # the same captions: how hard they are is no error of the difference
    gained = np.tile([0.0, 0.2], 50)
    assert choose_guidance({1.0: hard, 2.0: hard + gained, 4.0: hard + gained + np.tile([0.5, -0.48], 50)}) == 2.0


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.01, 0.2, "better"),
        (-0.2, -0.01, "worse"),
        (-0.01, 0.2, "cannot be told"),
        (0.0, 0.2, "cannot be told"),
        (-0.2, 0.0, "cannot be told"),
    ],
)
def test_the_interval_decides(low, high, said):
    assert told(Interval((low + high) / 2, low, high, seeds=3)) == said


def test_fewer_than_three_trainings_decide_nothing():
    for seeds in (1, 2):
        assert told(Interval(0.9, 0.8, 1.0, seeds)) == told(Interval(-0.9, -1.0, -0.8, seeds)) == UNTOLD


def test_a_measure_that_says_the_contrary_leaves_nothing_told():
    good, bad, open_ = Interval(1, 0.5, 2, 3), Interval(-1, -2, -0.5, 3), Interval(0, -1, 1, 3)
    assert told(good, (open_, None, good)) == BETTER
    assert told(good, (open_, bad)) == told(bad, (good,)) == UNTOLD


def test_what_is_not_measured_cannot_be_told():
    assert told(None) == UNTOLD
    assert all(side.partition("/")[0] in ROWS for pair in (*SAID, *ASKED) for side in (pair.first, pair.second))


def test_what_papers_say_is_asked_of_their_router():
    """Both sides blind, or the oracle and the monolith, which ask no router; a row that reads the caption has no blind form."""
    found = {pair.text: pair.blind() for pair in SAID}
    assert found["top-2 against a monolith"] == ("blind/top-2", "monolith")
    assert found["all experts against a monolith"] == ("blind/full", "monolith")
    assert found["top-1 against the oracle"] == ("blind/top-1", "experts/oracle")
    assert found["semantic clusters against random parts"] is None
    assert sum(blind is not None for blind in found.values()) == 6


def test_work_is_ordered_and_chosen_on_validation_alone(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith, blind, fault-swapped]")
    plan, order = finish(mine)
    assert all(plan.done(unit.key) for unit in plan.units())
    assert plan.rate("monolith") == 0.002
    assert plan.guidance("experts") == plan.guidance("fault-swapped") == 3.0
    keys = [unit.key for unit in order]
    assert len(keys) == len(set(keys))
    # Nothing that is judged is drawn before its row's rate and guidance are chosen.
    for row in ("experts", "monolith"):
        chosen = max(i for i, key in enumerate(keys) if key.startswith(f"runs/{row}/") and "losses/validation" in key)
        drawn = min(i for i, key in enumerate(keys) if key.startswith(f"runs/{row}/") and ("drawings/seen" in key or "drawings/held_out" in key))
        assert chosen < drawn
    # Other seeds are trained at the chosen rate only.
    assert {key.split("/")[2] for key in keys if "seed-1" in key} == {"seed-1-rate-0.002"}
    # Equal trainings once: the router at three rates, and the blind row's experts; a fault has no trainings of its own.
    made = [unit for unit in order if unit.kind == "train" and unit.flops]
    assert len(made) == (5 * 4 + 3) + (5 + 3) + 3  # experts and routers, of three rates and three seeds; monoliths and theirs; blind routers
    assert not [unit for unit in made if unit.arguments[0].row == "fault-swapped"]


def test_each_way_to_draw_has_a_guidance_of_its_own(tmp_path):
    mine = config(tmp_path, "rows=[experts, blind]")
    other = {1.0: 0.1, 2.0: 0.6, 3.0: 0.2}
    plan, order = finish(mine, quality=lambda unit: other if unit.arguments[1].routing == "full" else CHOSEN)
    assert [plan.guidance(way) for way in ("experts", "experts/top-1", "experts/full", "blind/full")] == [3.0, 3.0, 2.0, 2.0]
    judged = {unit.arguments[1].guidance for unit in order if unit.kind == "draw" and unit.arguments[1].part == "seen" and "/full" in unit.key}
    assert judged == {2.0}


def test_more_steps_cost_what_a_picture_of_the_main_row_does_at_the_guidance_of_each(tmp_path):
    """Without guidance a step is one pass, not two."""
    mine = config(tmp_path, "rows=[experts, monolith]")
    alone = {1.0: 0.9, 2.0: 0.2, 3.0: 0.1}
    plan, _ = finish(mine, quality=lambda unit: alone if unit.arguments[0].row == "experts" else CHOSEN)
    assert (plan.guidance("experts"), plan.guidance("monolith/more-steps")) == (1.0, 3.0)
    drawing = plan.drawing("monolith/more-steps", 3.0, "seen")
    run = plan.config(Run("monolith", 0, 0.002))
    own = matching.picture_flops(run, plan.inputs, "expert-0", steps=drawing.steps, guidance=3.0)
    theirs = matching.picture_flops(mine.base, plan.inputs, "top-2", guidance=1.0)
    step = matching.picture_flops(run, plan.inputs, "expert-0", steps=2, guidance=3.0) - matching.picture_flops(
        run, plan.inputs, "expert-0", steps=1, guidance=3.0
    )
    assert abs(own - theirs) <= 0.51 * step
    assert plan.drawing("monolith/more-steps", 1.0, "seen").steps == pytest.approx(2 * drawing.steps, abs=1)


def test_a_folder_is_asked_for_a_unit_once_until_something_has_ended(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(compare_plan, "published", lambda folder: asked.append(folder.path))
    plan = Plan(config(tmp_path, "rows=[experts]"))
    for _ in range(3):
        assert not any(plan.done(unit.key) for unit in plan.units())
    keys = [path for path in asked if not path.endswith("/clusters")]
    assert len(keys) == len(set(keys)) > 50
    plan.forget()
    plan.done(plan.units()[0].key)
    assert len([path for path in asked if not path.endswith("/clusters")]) > len(keys)


def test_what_clusters_share_with_scenes_and_which_combination_is_asked():
    source = Scenes(ScenesSource(objects=8), 32)
    scenes = [source.scene("seen", i) for i in range(400)]
    shared = compare_scenes.shared_information(scenes, [TEXTURES.index(scene.texture) for scene in scenes])
    assert shared["texture"][0] == pytest.approx(1)
    assert all(one < 0.1 for name, pair in shared.items() for one in (pair if name != "texture" else pair[1:]))
    asked = [Caption(str(i), source.scene("unseen", i).caption, 0) for i in range(60)]
    groups = compare_scenes.unseen_groups(source.hold_out, asked)
    assert groups[:, 1].tolist() == [i % 3 for i in range(60)]
    words = [source.hold_out.asked(Scene.parse(one.caption)) for one in asked]
    assert all((a == b) == (x == y) for a, x in zip(words, groups[:, 0], strict=True) for b, y in zip(words, groups[:, 0], strict=True))


def test_while_the_best_rate_is_at_an_end_the_next_is_tried(tmp_path):
    mine = config(tmp_path, "rows=[experts]")
    plan, _ = finish(mine, loss=lambda run: abs(run.rate - 0.032))
    assert plan.rates("experts") == [0.001, 0.002, 0.004, 0.008, 0.016]
    assert plan.rate("experts") == 0.016


def test_a_rate_that_diverged_is_left_out(tmp_path):
    mine = config(tmp_path, "rows=[experts]")
    Folder(Run("experts", 0, 0.002).folder(mine)).write_json(FAILED, {"why": "not a number"})
    plan, order = finish(mine)
    assert plan.rate("experts") in (0.001, 0.004)
    assert not any("rate-0.002" in unit.key for unit in order)


def test_a_seed_that_diverged_blocks_nobody_and_is_named(tmp_path):
    mine = config(tmp_path, "rows=[experts, blind, fault-raw]")
    Folder(Run("experts", 1, 0.002).folder(mine)).write_json(FAILED, {"why": "not a number"})
    plan, _ = finish(mine)
    assert all(plan.done(unit.key) for unit in plan.units())
    results = Results(mine)
    assert set(results.ways["experts"].folders) == set(results.ways["fault-raw"].folders) == {0, 2}
    assert "experts seed 1 rate 0.002" in results.lost()


def test_a_pair_that_differs_is_told_and_one_that_does_not_is_not(tmp_path):
    """Planted pictures: 0.2 better on each caption and seed but for noise; the same but for noise; and trainings that vary, of one sign by chance."""
    mine = config(tmp_path, "rows=[experts, monolith, random, shared-init]")
    plan, _ = finish(mine)
    g = np.random.default_rng(0)
    vary = np.array([0.02, 0.2, 0.1])
    for row, gain in (("experts", 0.0), ("monolith", -0.2), ("random", 0.0), ("shared-init", -vary)):
        for name in ("all", "objects"):
            plant(mine, plan, row, 0.5 + gain + g.normal(size=(40, 3)) * 0.02, name)
    results = Results(mine)
    assert results.difference("experts/top-2", "monolith").low > 0.1
    assert told(results.difference("monolith", "experts/top-2")) == WORSE
    assert told(results.difference("experts/top-2", "random")) == UNTOLD
    shared = results.difference("experts/top-2", "shared-init")
    assert (shared.agree, told(shared)) == (3, UNTOLD)
    assert results.difference("experts/top-2", "experts-4") is None


def test_claims_at_chance_tell_nothing(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith, blind]")
    plan, _ = finish(mine)
    g = np.random.default_rng(0)
    for row, mean in (("experts", 0.04), ("monolith", 0.01)):
        plant(mine, plan, row, mean + 0.001 * g.normal(size=(40, 3)))
    results = Results(mine)
    found = find(results, PRIMARY)
    assert told(found.interval) == BETTER  # chance is 0.05
    assert (found.state, found.why) == (UNTOLD, ("both at chance",))
    assert find(results, PRIMARY, blind=True).state == BETTER


def test_the_report_says_all_of_it_of_planted_figures(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith, monolith-steps, blind, random]", "routings=[top-1, full, experts]")
    plan, _ = finish(mine)
    g, k = np.random.default_rng(0), mine.base.num_experts
    reference = Folder(mine.folder) / "reference"
    save(reference, "scores-seen", np.full((40, len(SCORES)), 0.97))
    save(reference, "groups-held_out", np.stack([np.arange(20) // 2, np.arange(20) // 2 % 3], 1))
    made = reference.read_json(MANIFEST)
    made["counts"] = {"rows": 99, "independent": False, "shared": {"first thing": [0.4321, 0.01]}}
    reference.write_json(MANIFEST, made)
    for row in ("experts", "random"):
        for seed in mine.seeds:
            folder = Folder(Run(row, seed, plan.rate(row)).folder(mine))
            arrays = {"experts": g.random((k, 2, 30)), "router": g.dirichlet(np.ones(k), (2, 30)), "disagreement": g.random((2, 30))}
            arrays |= {"routed": g.random((2, 30)), "clusters": np.arange(30) % k, "things": np.arange(30) % 2}
            arrays |= {"ranks": g.permuted(np.tile(np.arange(k), (30, 1)), axis=1)} if row == "experts" else {}
            for name, array in arrays.items():
                save(folder / "losses/seen", name, array)
            save(folder / plan.drawing(row, plan.guidance(row), "seen").folder, "weights", g.dirichlet(np.ones(k), (40, 5)))
    text = write_report(mine)
    html = Folder(mine.folder).read_bytes("report.html").decode()
    assert text.count("| originals |") == 1  # of the unseen ones none are planted
    for words in (
        "0.432",
        "of 8 experts, and the main row has 4",
        "holds with 4 experts",
        "0.970",
        "0.050",
        "of kind pair",
        "accuracy in other words",
        "3 of 3",
    ):
        assert words in html, words


def test_losses_are_paired_by_seed(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith]")
    finish(mine)
    g = np.random.default_rng(0)
    each = g.normal(size=(3, 3)) * 10
    for row, gain in (("experts", 0.0), ("monolith", 0.1)):
        for seed in mine.seeds:
            save(Folder(Run(row, seed, 0.002).folder(mine)) / "losses/seen", "routed", np.tile(each[seed] + gain, (2, 1)))
    (Folder(Run("experts", 0, 0.002).folder(mine)) / "losses/seen").delete_all()
    found = Results(mine).loss_difference("experts", "monolith")
    assert (found.value, found.low, found.high, found.seeds) == (pytest.approx(0.1), pytest.approx(0.1), pytest.approx(0.1), 2)


def test_a_comparison_judged_by_inception_gives_fid_and_kid(tmp_path, monkeypatch):
    """The cells are torch-fidelity's numbers of the same features: its one subset of KID is all rows, of which there are equally many."""
    from torch_fidelity.metric_fid import KEY_METRIC_FID, fid_features_to_statistics, fid_statistics_to_metric
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, kid_features_to_metric

    monkeypatch.setattr(compare_config, "FID_PICTURES", 24)
    mine = config(tmp_path, "rows=[experts]", "seeds=[0]", "judge={kind: inception}")
    plan, _ = finish(mine)
    g = np.random.default_rng(0)
    reference, made = g.normal(size=(40, 24)).astype(np.float32), (0.3 + g.normal(size=(40, 24)) ** 3).astype(np.float32)
    save(Folder(mine.folder) / "reference", "validation", reference)
    save(Folder(Run("experts", 0, 0.002).folder(mine)) / plan.drawing("experts", 3.0, "seen").folder, "features", made)
    results = Results(mine)
    header, row = way_header(results), way_rows(results)[0]
    fid = fid_statistics_to_metric(*(fid_features_to_statistics(torch.from_numpy(one)) for one in (reference, made)), verbose=False)
    assert results.distance(results.ways["experts"]) == pytest.approx(fid[KEY_METRIC_FID], rel=1e-4)
    assert row[header.index("FID-40")] == charts.number(results.distance(results.ways["experts"]))
    kid = kid_features_to_metric(*map(torch.from_numpy, (reference, made)), kid_subsets=1, kid_subset_size=40, rng_seed=0, verbose=False)
    assert results.kernel(results.ways["experts"]) == pytest.approx(kid[KEY_METRIC_KID_MEAN], rel=1e-4)
    assert row[header.index("KID-40")] == f"{results.kernel(results.ways['experts']):.3g}"
    with pytest.raises(ConfigError, match="seen_captions is 20; FID needs more pictures than there are features, 24"):
        config(tmp_path, "seen_captions=20", "judge={kind: inception}")


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    compare.settle(config(tmp_path))
    compare.settle(config(tmp_path, "rows=[experts, blind]", "workers=7"))
    with pytest.raises(StaleError, match=r"images: 122880 → 50000\nPut back what changed, or choose another folder"):
        compare.settle(config(tmp_path, "images=50000"))


def test_rates_scales_and_seeds_may_grow_and_not_shrink(tmp_path):
    compare.settle(config(tmp_path))
    more = ("learning_rates=[0.001, 0.002, 0.004, 0.008]", "guidance_scales=[1.0, 2.0, 3.0, 5.0]", "seeds=[0, 1, 2, 3, 4]")
    compare.settle(config(tmp_path, *more))
    for fewer in ("learning_rates=[0.001]", "seeds=[0, 1]", "seeds=[4, 3, 2, 1, 0]"):
        with pytest.raises(StaleError):
            compare.settle(config(tmp_path, *more, fewer))


def test_the_matrix_and_who_fails():
    """Three experts, each row's loss the distance of expert and cluster, but expert 0 knows cluster 1 better; cluster 0 is lost by chance alone."""
    clusters = np.array([0, 0, 1, 1, 2])
    losses = np.abs(np.arange(3)[:, None, None] - clusters[None, None]).repeat(2, 1) + 1.0
    losses[0, :, clusters == 1] = 0.9
    matrix = alignment_figures.own_cluster(losses, clusters)
    assert matrix.tolist() == [[1.0, 0.9, 3.0], [2.0, 1.0, 2.0], [3.0, 2.0, 1.0]]
    trainings = np.repeat(losses.mean(1)[:, :, None], 3, 2)
    trainings[2, clusters == 0] = np.array([[-1.0, 1.9, 1.9], [1.9, -1.0, 1.9]])  # better on the mean, by chance
    found = alignment_figures.own_experts(trainings, clusters)
    assert [(one.cluster, one.rows, one.rival, one.lead.seeds) for one in found] == [(0, 2, 2, 3), (1, 2, 0, 3), (2, 1, 1, 3)]
    assert [one.lead.value for one in found] == pytest.approx([5.6 / 6 - 1, -0.1, 1.0])
    assert [one.lead.high < 0 for one in found] == [False, True, False]
    assert [one.best for one in found] == [1, 0, 3]  # expert 2 has 0.45 on the first cluster in two trainings, and 1.9 in the third
    router = np.zeros((2, 5, 3))
    router[..., 2], router[..., 1] = 0.6, 0.3  # asks 2, then 1
    asked, others = alignment_figures.asked_and_not(losses, router)
    assert asked[0].tolist() == [2.5, 2.5, 1.5, 1.5, 1.5]
    assert others[0].tolist() == [1.0, 1.0, 0.9, 0.9, 3.0]


def test_disagreement_is_correlated_within_scenes_of_equally_many_things():
    """More things make more of both; within equal numbers there is nothing. Spearman's against SciPy's own."""
    g = np.random.default_rng(0)
    things = np.repeat([1.0, 2.0, 3.0], 200)
    a, b = (things * 10 + g.normal(size=600) for _ in range(2))
    assert spearmanr(a, b).statistic > 0.8
    assert abs(alignment_figures.rank_correlation(a, b, things)) < 0.1
    b = a + g.normal(size=a.shape)
    expected = np.mean([spearmanr(a[things == k], b[things == k]).statistic for k in (1, 2, 3)])
    assert alignment_figures.rank_correlation(a, b, things) == pytest.approx(expected)


def test_the_config_is_json_for_other_processes():
    tree = json.loads(json.dumps(compare_config.load("compare_tiny").model_dump(mode="json")))
    assert compare_config.build(tree) == compare_config.load("compare_tiny")
