"""The row that is distilled from the main row: its place in the plan, its cost, its claim; and its training from files that the test writes."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import numpy as np
import pytest
from test_compare_plan import config, finish, plant

from paris_ray import stages
from paris_ray.evaluation import compare_cost, compare_rows, compare_work, matching
from paris_ray.evaluation.compare_claims import SAID
from paris_ray.evaluation.compare_plan import FAILED, Plan
from paris_ray.evaluation.compare_protocol import protocol
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import Run
from paris_ray.evaluation.compare_verdicts import find, find_all
from paris_ray.inference.assemble import assemble
from paris_ray.manifest import MANIFEST, Stage, StaleError, published
from paris_ray.storage import Folder, link_all

_spec = importlib.util.spec_from_file_location("fake_training_run", Path(__file__).parents[1] / "training" / "fake_training_run.py")
fake = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fake)


def test_a_student_waits_for_the_rate_and_the_model_of_its_teacher(tmp_path):
    mine = config(tmp_path, "rows=[distilled, experts, monolith]")
    first = [unit for unit in Plan(mine).units() if "distilled" in unit.key]
    assert first
    assert not any(unit.arguments for unit in first)
    plan, order = finish(mine)
    assert all(plan.done(unit.key) for unit in plan.units())
    keys = [unit.key for unit in order]
    chosen = max(keys.index(f"runs/experts/seed-0-rate-{rate:g}/losses/validation") for rate in (0.001, 0.002, 0.004))
    students = [i for i, key in enumerate(keys) if re.match(r"runs/distilled/.*/experts/0$", key)]
    assert {keys[i].split("/")[2] for i in students} == {
        *(f"seed-0-rate-{rate:g}-teacher-0.002" for rate in (0.001, 0.002, 0.004)),
        *(f"seed-{seed}-rate-0.002-teacher-0.002" for seed in (1, 2)),
    }
    assert all(i > chosen for i in students)
    for seed in (1, 2):  # the unit that puts the teacher together
        assembled = keys.index(f"runs/experts/seed-{seed}-rate-0.002/losses/seen")
        assert assembled < keys.index(f"runs/distilled/seed-{seed}-rate-0.002-teacher-0.002/experts/0")
    # Its router, which has nothing to learn, is made once for it and for the monolith.
    assert sum(unit.kind == "train" and unit.key.endswith("/router") and unit.flops > 0 and "experts" not in unit.key for unit in order) == 3


def test_a_teacher_of_another_rate_has_students_of_its_own(tmp_path):
    mine = config(tmp_path, "rows=[experts, distilled]")
    _, before = finish(mine)
    more = config(tmp_path, "rows=[experts, distilled]", "learning_rates=[0.001, 0.0015, 0.002, 0.004]")
    unknown = Plan(more)
    assert unknown.rate("experts") is None
    assert not any(unknown.done(unit.key) for unit in unknown.units() if unit.key.startswith("runs/distilled"))
    plan, after = finish(more, loss=lambda run: -1.0 if run.rate == 0.0015 else 0.5)
    assert (plan.rate("experts"), plan.rate("distilled")) == (0.0015, 0.0015)
    assert {re.search(r"-teacher-([^/]*)/", unit.key)[1] for unit in before if "distilled" in unit.key} == {"0.002"}
    assert {re.search(r"-teacher-([^/]*)/", unit.key)[1] for unit in after if "distilled" in unit.key} == {"0.0015"}


def test_where_the_teacher_came_to_no_end_there_is_no_student(tmp_path):
    mine = config(tmp_path, "rows=[experts, distilled]")
    Folder(Run("experts", 1, 0.002).folder(mine)).write_json(FAILED, {"why": "not a number"})
    plan, order = finish(mine)
    assert all(plan.done(unit.key) for unit in plan.units())
    assert not any(unit.key.startswith("runs/distilled/seed-1") for unit in order)
    results = Results(mine)
    assert set(results.ways["distilled"].folders) == {0, 2}
    assert "distilled seed 1 rate 0.002" in results.lost()


def test_a_student_costs_what_the_main_row_does_with_its_teachers_passes(tmp_path):
    """Of an image five passes of an expert's shape, three of them its own, and one of the router; test_matching has torch count these."""
    mine = config(tmp_path, "rows=[experts, monolith, distilled]")
    inputs, base = matching.inputs_of(mine.base), mine.base
    forward = matching.expert_training_flops(base.expert.model, inputs) / 3
    routed = matching.router_training_flops(base, inputs) / 3 / 16_000
    spent = 3 * (122_880 * forward + 16_000 * routed)
    plan = Plan(mine)
    run = plan.config(plan.run("distilled", 0, 0.001))
    assert run.num_experts == 1
    assert run.expert.model == base.expert.model
    (images,) = (spec.train.images for spec in run.experts)
    each = 3 * forward + 2 * forward + routed
    assert images == pytest.approx(spent / each, abs=64)
    assert images < 0.63 * plan.config(Run("monolith", 0, 0.001)).experts[0].train.images
    (unit,) = [unit for unit in plan.units() if unit.key.endswith("distilled/seed-0-rate-0.001/experts/0")]
    assert unit.flops == pytest.approx(images * each)
    rows = {cells[0]: dict(zip(compare_cost.COLUMNS, cells, strict=True)) for cells in compare_cost.matched_table(mine)}
    assert rows["distilled"]["training PFLOP"].endswith(" and its teacher's")
    assert float(rows["distilled"]["training PFLOP"].split()[0]) == pytest.approx(spent / 1e15, rel=0.005)
    same = (compare_cost.COLUMNS[-1], "batch", "experts × width × depth")
    assert [rows["distilled"][name] for name in same] == [rows["monolith"][name] for name in same]
    assert "its teacher's own, which is the main row's, comes on top" in compare_cost.text(mine)


def test_the_claim_is_of_the_student_and_the_better_monolith(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith, distilled]")
    plan, _ = finish(mine)
    g = np.random.default_rng(0)
    for row, mean in (("distilled", 0.6), ("monolith", 0.4)):
        for name in ("all", "objects"):
            plant(mine, plan, row, mean + 0.01 * g.normal(size=(40, 3)), name)
    (pair,) = [pair for pair in SAID if pair.first == "distilled"]
    (says,) = pair.says
    assert (says.better, says.published) == (True, "7.76 against 7.82, at a third of the compute")
    found = find(Results(mine), pair)
    assert (found.interval.agree, found.words(4)) == (3, "better: holds with 4 experts")
    assert "main row's mixture of the same seed" in dict(protocol(Results(mine), find_all(Results(mine))))["A student's teacher"]


# -- training -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def cut(tmp_path):
    """A comparison of two experts whose corpus is cut, in rows that the test writes: into two clusters, and as one part."""
    shape = "{hidden_size: 16, num_layers: 1, num_heads: 2}"
    train = "{batch_size: 4, warmup_images: 8, ema_half_life_images: 16, checkpoint_images: 16, log_images: 8, micro_batch: null}"
    mine = config(
        tmp_path / "comparison", "rows=[experts, distilled]", "images=64", "seeds=[0]", "base.experts=2", "routings=[top-1]",
        f"base.expert={{model: {shape}, train: {train}}}", f"base.router.model={shape}", "base.router.train={images: 32, batch_size: 8}",
        "base.data.store_text=states", f"base.data.codec={{kind: patch_pca, channels: {fake.CHANNELS}}}",
    )  # fmt: skip
    rows = [fake.rows_of(k) for k in range(2)]
    whole = {name: np.concatenate([one[name] for one in rows]) for name in rows[0]}
    for row, shards in (("experts", rows), ("distilled", [whole])):
        partition = Folder(compare_rows.partition_config(mine, row).run_dir)
        if row == "experts":
            fake.make_run(partition.path, ())
        link_all(Folder(compare_rows.partition_config(mine, "experts").run_dir) / "encoders", partition / "encoders", MANIFEST)
        for k, shard in enumerate(shards):
            fake.write_shard(partition, k, shard)
        (partition / "clusters").write_json("clusters.json", {"sizes": [len(shard["id"]) for shard in shards]})
        Stage("partition", partition / "clusters", {}, {}).publish({"sizes": [len(shard["id"]) for shard in shards]})
    return mine


def test_it_is_trained_from_the_assembled_main_row_and_names_it(cut):
    teacher = Run("experts", 0, 0.002)
    student = Run("distilled", 0, 0.001, teacher.rate)
    with pytest.raises(FileNotFoundError, match="run the stage 'assemble' first"):
        compare_work.train(cut, student, "expert-0")
    for stage in ("expert-0", "expert-1", "router"):
        compare_work.train(cut, teacher, stage)
    model = assemble(compare_work.run_config(cut, teacher))
    for stage in ("expert-0", "router"):
        compare_work.train(cut, student, stage)
    made = published(Folder(student.folder(cut)) / "experts/0")
    assert made["inputs"]["parents"]["teacher"] == model["fingerprint"]
    assert "teacher" not in published(Folder(student.folder(cut)) / "router")["inputs"]["parents"]
    assert made["counts"]["images"] == compare_work.run_config(cut, student).experts[0].train.images
    compare_work.train(cut, student, "expert-0")  # done already
    assert published(Folder(student.folder(cut)) / "experts/0") == made
    assemble(compare_work.run_config(cut, student))
    # Another teacher in the same place: what is there is not taken for its student.
    Stage("assemble", stages.folder(compare_work.run_config(cut, teacher), "assemble"), {"another": 1}, {}).publish()
    with pytest.raises(StaleError, match=r"parents\.teacher"):
        compare_work.train(cut, student, "expert-0")
