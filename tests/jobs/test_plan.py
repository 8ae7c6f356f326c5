"""The plan as a user meets it."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from fabricated_cluster import publish, tiny

from jobs import plan
from paris_ray import config as configs
from paris_ray.storage import Folder

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import fake_training_run as fake

MACHINES = """
machines:
  - {name: fast, count: 2, memory_gib: 16, images_per_second: {32x2: 2, 48x1: 4, router: 8}, storage_mb_per_s: 1.0e+6, start_seconds: 0,
     price_per_hour: 3, hours_between_preemptions: 1, preemption: aws, cluster: west}
  - {name: slow, memory_gib: 16, images_per_second: {32x2: 1, 48x1: 2, router: 4}, storage_mb_per_s: 1.0e+6, start_seconds: 0}
"""


@pytest.fixture
def run(tmp_path):
    budgets = ("expert.train.images=7200", "experts.1.train.images=7240", "router.train.images=7200")
    config = tiny(tmp_path / "run", "evaluation.control_router=false", *budgets)
    for name in ("embed", "partition"):
        publish(config, name)
    encoders = {"codec": {"channels": 12, "latent_size": 8}, "text": {"max_length": 16, "width": 384}}
    (Folder(config.run_dir) / "encoders").write_json("encoders.json", encoders)
    (tmp_path / "machines.yaml").write_text(MACHINES)
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    return tmp_path


def arguments(run, *more):
    return ["--config", str(run / "config.yaml"), *more]


def test_hours_price_and_the_last_expert(run, capsys):
    """Experts 0 and 1 at 2/s take an hour each on the fast ones, as expert 2 on the slow one; the router at 8/s a quarter after that."""
    assert plan.main(arguments(run, "--machines", str(run / "machines.yaml"), "--set", "expert.train.checkpoint_images=null")) == 0
    out = capsys.readouterr().out
    rows = {line.split()[0]: " ".join(line.split()) for line in out.splitlines() if line.startswith(("expert-", "router")) and ": " not in line}
    assert rows["expert-0"] == "expert-0 fast 1 (west) at once 1 h 00 min 2 0.0 s 100.0% 3.00"
    assert rows["expert-1"] == "expert-1 fast 0 (west) at once 1 h 00 min 2 0.0 s 100.0% 3.02"
    assert rows["expert-2"] == "expert-2 slow 0 at once 1 h 00 min 2 0.0 s 100.0% 0.00"
    assert rows["router"] == "router fast 1 (west) 1 h 00 min 1 h 15 min 8 0.0 s 100.0% 0.75"
    # Expert 1 trains 20 seconds longer than the others: 1.25 h and 1 h 20 s, at 3 an hour.
    assert "All have ended after 1 h 15 min, for 6.77; of the experts expert-1 ends last." in out
    # Taken away each hour on average, but announced.
    assert "expert-0, expert-1, router: counted with preemptions that lose no step, for which their notice must be heeded: " in out
    assert "resources.preemption=aws" in out
    assert list(Path(run / "run").rglob("_probe*")) == []


def test_checkpoints_are_proposed_where_too_much_is_lost(run, capsys):
    table = run / "machines.yaml"
    table.write_text(MACHINES.replace(", preemption: aws", ""))
    assert plan.main(arguments(run, "--machines", str(table), "--set", "expert.train.checkpoint_images=null")) == 0
    out = capsys.readouterr().out
    assert "expert-0, expert-1: 58% of the time in steps, with checkpoints at the end only" in out  # 1 / (e − 1)
    assert "train.checkpoint_images=" in out


def test_equal_hours_are_settings(run, capsys):
    table = run / "machines.yaml"
    table.write_text(MACHINES.replace("count: 2", "count: 3").replace("hours_between_preemptions: 1, preemption: aws, ", ""))
    assert plan.main(arguments(run, "--machines", str(table), "--equal-hours")) == 0
    budgets = dict(line.split("--set ")[1].split("=") for line in capsys.readouterr().out.splitlines() if "--set experts" in line)
    found = [int(images) for images in budgets.values()]
    assert list(budgets) == [f"experts.{k}.train.images" for k in range(3)]
    assert sum(found) == pytest.approx(3 * 7200 + 40, abs=12)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--machines", "none.yaml"], "none.yaml"),
        (["--machines", "machines.yaml", "--set", "expert.resources.num_workers=4"], "expert-0: takes 4 × "),
        (["--set", "expert.resources.gpus=1"], "resources.gpus is 1, and this machine has no GPU to measure; describe the machines"),
        (["--machines", "machines.yaml", "--set", "experts=4"], "the clusters are of 3 experts, the config has 4"),
    ],
)
def test_what_cannot_be_planned(run, capsys, monkeypatch, more, said):
    monkeypatch.chdir(run)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert plan.main(arguments(run, *more)) == 2
    assert said in capsys.readouterr().err


def trained(out):
    return {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("expert-", "router")) and ": " not in line}


def test_before_anything_is_paid_for_the_clusters_are_taken_as_equal(tmp_path, capsys):
    """Of 96 rows (48 emoji on two grounds) 4 % of the emoji, and of the rest 6 and 4 % of the rows, are not for training: 83 are, 27 an expert."""
    (tmp_path / "machines.yaml").write_text(MACHINES)
    sets = ["evaluation.control_router=false", "expert.train.images=null", "expert.train.passes=800", "router.train.images=7200"]
    command = ["--config", "tiny", *(word for one in (f"run_dir={tmp_path}/run", *sets) for word in ("--set", one))]
    assert plan.main([*command, "--machines", str(tmp_path / "machines.yaml")]) == 0
    out = capsys.readouterr().out
    assert "There are no clusters yet; counted with equal ones of the 83 rows for training that the source lists, as far as none is refused." in out
    hours = 800 * 27 / 2 / 3600  # 21,600 images at 2 a second
    assert {name: row[-1] for name, row in trained(out).items()}["expert-0"] == f"{3 * hours:.2f}"
    # Where budgets are images, nobody asks for the pictures.
    assert plan.main([*command, "--set", "expert.train.images=7200", "--set", "data.source={kind: folder, uri: /none}", "--machines",
                      str(tmp_path / "machines.yaml")]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "There are no clusters yet; counted with equal ones.\n" in out
    assert trained(out)["expert-0"][-1] == "3.00"
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


def test_an_embedded_corpus_knows_its_rows(tmp_path, capsys):
    config = tiny(tmp_path / "run", "expert.train.images=null", "expert.train.passes=80")
    publish(config, "embed", counts={"rows": 330, "splits": {"train": 300}})
    (tmp_path / "machines.yaml").write_text(MACHINES)
    (tmp_path / "config.yaml").write_text(configs.dump(config))
    assert plan.main(["--config", str(tmp_path / "config.yaml"), "--machines", str(tmp_path / "machines.yaml")]) == 0
    out = capsys.readouterr().out
    assert "counted with equal ones of the 300 rows for training that the corpus has." in out
    assert trained(out)["expert-0"][-1] == f"{3 * 80 * 100 / 2 / 3600:.2f}"


@pytest.mark.parametrize(
    ("sets", "said"),
    [
        (["--machines", "x.yaml"], "--machines: 'x.yaml' is not a readable file"),
        ([], "run the stage 'partition' first"),
        (["--set", "data.source={kind: folder, uri: /none}"], "/none does not exist; "),
        (
            ["--set", "data.source={kind: folder, uri: /none}"],
            "passes over rows are counted by router; say how many images instead, --set router.train.images=",
        ),
    ],
)
def test_what_cannot_be_planned_before_the_clusters(tmp_path, capsys, sets, said):
    (tmp_path / "machines.yaml").write_text(MACHINES)
    machines = ["--machines", str(tmp_path / "machines.yaml")] if sets and "x.yaml" not in sets else []
    command = ["--config", "tiny", "--set", f"run_dir={tmp_path}/run", "--set", "router.train.images=null", *machines, *sets]
    assert plan.main(command) == 2
    assert said in capsys.readouterr().err


def test_what_shares_a_gpu_shares_its_speed_and_a_worker_takes_its_share_of_a_batch(tmp_path, monkeypatch):
    from paris_ray.training import measure
    from paris_ray.training.loop import Loop

    about = SimpleNamespace(total_memory=2**34)
    cuda = {
        "is_available": lambda: True,
        "device_count": lambda: 4,
        "get_device_name": lambda index: "GPU",
        "get_device_properties": lambda index: about,
    }
    monkeypatch.setattr(measure, "torch", SimpleNamespace(device=lambda *_: torch.device("cpu"), cuda=SimpleNamespace(**cuda)))
    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=itertools.count().__next__))
    monkeypatch.setattr(measure, "SECONDS", 0.0)
    monkeypatch.setattr(measure, "Loop", lambda task, train, *rest, **named: sizes.append(train.micro_batch) or Loop(task, train, *rest, **named))
    sizes: list[int] = []
    rates = {}
    for gpus in (0.5, 1, 2):
        config = fake.make_run(tmp_path / str(gpus), expert__resources__gpus=gpus, expert__resources__num_workers=4)
        rates[gpus] = measure.measure(config, "expert-0").images_per_second
    assert sizes == [2, 2, 2]  # of eight
    assert rates[0.5] == rates[1] / 2 > 0
    assert rates[2] == rates[1]
    monkeypatch.setattr(measure, "measure", lambda config, stage: measure.Measured(1.0, 1.0, 1.0))
    counts = [measure.this_machine(fake.make_config(tmp_path, max_parallel=9, expert__resources__gpus=gpus)).count for gpus in (0.5, 1, 2)]
    assert counts == [8, 4, 2]


def test_this_machine_is_measured_by_its_own_loop_and_left_as_it_was(tmp_path, capsys, monkeypatch):
    from paris_ray.training import measure

    monkeypatch.setattr(measure, "SECONDS", 0.05)
    config = fake.make_run(tmp_path / "run")
    before = sorted(str(path) for path in (tmp_path / "run").rglob("*"))
    machine = measure.this_machine(config)
    capsys.readouterr()
    assert sorted(str(path) for path in (tmp_path / "run").rglob("*")) == before
    assert set(machine.images_per_second) == {"32x2", "48x1", "router"}
    # A step of eight takes milliseconds, not microseconds or seconds.
    assert all(5 < rate < 50_000 for rate in machine.images_per_second.values())
    assert 0.01 < machine.storage_mb_per_s < 10_000
