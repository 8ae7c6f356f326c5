"""``init_from`` of an expert's config: used at the first start only, part of what the stage depends on."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from paris_ray.models import DiT
from paris_ray.stages import config_part
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

    assert config_part(config, "expert-0")["init_from"] == str(weights)
    assert config_part(config, "expert-0") != config_part(plain, "expert-0")
    assert config_part(config, "expert-1") == config_part(plain, "expert-1")

    checkpoint.save(task.folder, 16, {"model": dict(task.model.named_parameters()), "ema": {}, "optimizer": {}}, {"seconds": 0.0, "line": {}}, [])
    weights.unlink()
    ExpertTask(config, 0, CPU)  # resumes without the source
    with pytest.raises(FileNotFoundError, match=r"init_from: .*does not exist"):
        ExpertTask(fake.make_config(tmp_path / "run", experts__2__init_from=weights), 2, CPU)
