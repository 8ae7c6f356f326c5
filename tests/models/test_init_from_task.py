"""``init_from`` of an expert's config: used at the first start only; its content is part of what the stage depends on, its place is not."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paris_ray import stages
from paris_ray.config import ConfigError
from paris_ray.models import DiT
from paris_ray.training import checkpoint
from paris_ray.training.expert_task import ExpertTask

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
import fake_training_run as fake

CPU = torch.device("cpu")


def test_an_expert_starts_from_given_weights_and_only_starts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = fake.make_run(tmp_path / "run")
    source = ExpertTask(plain, 1, CPU).model
    assert isinstance(source, DiT)
    with torch.no_grad():
        source.layers[0].attn.in_proj_weight.fill_(0.25)
    weights = tmp_path / "start.safetensors"
    save_file(source.state_dict(), weights)
    config = fake.make_config(tmp_path / "run", experts__0__init_from=weights)

    task = ExpertTask(config, 0, CPU)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in task.model.state_dict().items())
    report = json.loads((tmp_path / "run/experts/0/init.json").read_text())
    assert report["layout"] == "paris"
    assert set(report["kept"]) == set(source.state_dict())
    assert "expert-0: initialised from layout paris" in capsys.readouterr().out
    assert not (tmp_path / "run/experts/1/init.json").exists()

    # Of several workers each takes the weights, and the first reports.
    (tmp_path / "run/experts/0/init.json").unlink()
    second = ExpertTask(config, 0, CPU, rank=1)
    assert all(torch.equal(value, source.state_dict()[name]) for name, value in second.model.state_dict().items())
    assert not (tmp_path / "run/experts/0/init.json").exists()
    assert capsys.readouterr().out == ""

    checkpoint.save(task.folder, 16, {"model": dict(task.model.named_parameters()), "ema": {}, "optimizer": {}}, {"seconds": 0.0, "line": {}}, [])
    weights.unlink()
    ExpertTask(config, 0, CPU)  # resumes without the source
    with pytest.raises(ConfigError, match=r"experts\.2\.init_from: .*does not exist"):
        ExpertTask(fake.make_config(tmp_path / "run", experts__2__init_from=weights), 2, CPU)


def test_a_stage_depends_on_the_content_of_its_source_not_on_its_place(tmp_path: Path) -> None:
    source = tmp_path / "a" / "start.safetensors"
    source.parent.mkdir()
    save_file({"x": torch.arange(1 << 19).float()}, source)  # 2 MiB: more than is read of it
    plain = fake.make_run(tmp_path / "run")
    config = fake.make_config(tmp_path / "run", experts__0__init_from=source)
    stage = stages.stage(config, "expert-0")
    assert stage.begin().state == "absent"
    assert stages.status(config, "expert-0").state == "partial"
    assert stages.status(config, "expert-1").state == "absent"
    (without,) = stages.status(plain, "expert-0").reasons
    assert without.startswith("parents.init_from:")
    assert without.endswith("→ null")

    # Elsewhere, as a folder: the same weights.
    moved = source.parent.rename(tmp_path / "b") / "start.safetensors"
    assert stages.status(fake.make_config(tmp_path / "run", experts__0__init_from=moved.parent), "expert-0").state == "partial"
    # Other weights of the same size, there where it was.
    source.parent.mkdir()
    save_file({"x": torch.arange(1 << 19).float() + 1}, source)
    assert stages.status(config, "expert-0").state == "stale"
    # Gone: whoever has started goes on, whoever has not is told.
    source.unlink()
    assert stages.status(config, "expert-0").state == "partial"
    with pytest.raises(FileNotFoundError, match=r"init_from: .*start\.safetensors holds no safetensors"):
        stages.stage(fake.make_config(tmp_path / "run", experts__1__init_from=source), "expert-1")
