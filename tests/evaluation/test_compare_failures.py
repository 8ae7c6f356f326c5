"""What a comparison does with trainings that come to no end, and where its processes compute."""

from __future__ import annotations

import pytest
from planted import config, finish

from paris_ray.evaluation import compare_work
from paris_ray.evaluation.compare_plan import FAILED
from paris_ray.evaluation.compare_report import write_report
from paris_ray.evaluation.compare_results import Results
from paris_ray.evaluation.compare_rows import Run
from paris_ray.evaluation.compare_workers import place
from paris_ray.storage import Folder
from paris_ray.training.loop import BrokenRowsError, NonFiniteError


def fail_at_all_rates(mine, row):
    for rate in mine.learning_rates:
        Folder(Run(row, 0, rate).folder(mine)).write_json(FAILED, {"why": "not a number"})


def test_a_row_without_a_finite_rate_is_named_and_left_out(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith, blind]")
    fail_at_all_rates(mine, "monolith")
    plan, order = finish(mine)
    assert all(plan.done(unit.key) for unit in plan.units())
    assert {unit.key.split("/")[1] for unit in order if "/" in unit.key} == {"experts", "blind"}
    assert plan.rates("monolith") == [0.001, 0.002, 0.004]
    assert set(Results(mine).ways) == {
        "experts",
        "experts/top-1",
        "experts/full",
        "experts/caption",
        "experts/oracle",
        *("blind", "blind/top-1", "blind/full"),
    }
    text = write_report(mine)
    assert "Left out: monolith came to no end at any of learning_rates, 0.001, 0.002, 0.004: add a lower one." in text
    assert "no row monolith" in text


def test_without_the_main_row_the_others_go_on(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith, blind, distilled, fault-raw]")
    fail_at_all_rates(mine, "experts")
    plan, order = finish(mine)
    assert all(plan.done(unit.key) for unit in plan.units())
    assert {unit.key.split("/")[1] for unit in order if "/" in unit.key} == {"monolith"}
    text = write_report(mine)
    for row in ("blind", "distilled", "fault-raw"):
        assert f"{row} needs the experts of experts, which came to no end" in text


def test_a_lower_rate_brings_a_row_back(tmp_path):
    mine = config(tmp_path, "rows=[experts, monolith]")
    fail_at_all_rates(mine, "monolith")
    more = config(tmp_path, "rows=[experts, monolith]", "learning_rates=[0.0005, 0.001, 0.002, 0.004]")
    plan, order = finish(more)
    assert any(unit.key.startswith("runs/monolith/seed-0-rate-0.0005/") for unit in order)
    assert plan.rate("monolith") in (0.00025, 0.0005)


@pytest.fixture
def training(tmp_path, monkeypatch):
    """A training that ends with an error: (stage, error) → the run's folder."""

    class Unfinished:
        def begin(self):
            return type("Status", (), {"state": "absent"})

    def end_with(name, error):
        mine = config(tmp_path)
        run = mine.base.model_copy(update={"run_dir": str(tmp_path / "run")})
        monkeypatch.setattr(compare_work.stages, "stage", lambda *_: Unfinished())
        monkeypatch.setattr(compare_work.worker, "run", lambda *_, **__: (_ for _ in ()).throw(error))
        compare_work._train(run, name)
        return Folder(run.run_dir)

    return end_with


def test_a_rate_at_which_an_expert_diverges_is_recorded(training):
    assert training("expert-0", NonFiniteError("at image 8")).read_json(FAILED) == {"stage": "expert-0", "why": "at image 8"}


def test_a_router_that_diverges_is_no_fault_of_the_experts_rate(training, tmp_path):
    with pytest.raises(compare_work.RouterError, match=r"base\.router\.train\.learning_rate is 0\.002, .* give a lower one, .* at image 8"):
        training("router", NonFiniteError("at image 8"))
    assert not Folder(str(tmp_path / "run")).exists(FAILED)


@pytest.mark.parametrize("stage", ["expert-0", "router"])
def test_broken_rows_are_no_fault_of_any_rate(training, tmp_path, stage):
    with pytest.raises(BrokenRowsError, match="row 3"):
        training(stage, BrokenRowsError("row 3: copy its shard anew"))
    assert not Folder(str(tmp_path / "run")).exists(FAILED)


def test_a_process_without_a_gpu_sees_none_and_others_see_their_own():
    assert place(None, None) == place(None, "0,1") == {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert place(1, None) == {"CUDA_VISIBLE_DEVICES": "1"}
    assert place(1, "5,7") == {"CUDA_VISIBLE_DEVICES": "7"}
