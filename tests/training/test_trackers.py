"""The metrics lines elsewhere: the same figures as in the files, and no harm to the training."""

from __future__ import annotations

import importlib.util
import json
import struct
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import fake_training_run as fake
import pytest
import torch

from paris_ray.config import ConfigError
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, launch, trackers, worker
from paris_ray.training.loop import Place

CPU = Place(torch.device("cpu"))
SHORT = {"router__train__images": 48, "router__train__log_images": 16, "router__train__checkpoint_images": 16, "router__train__sample_images": "null"}


def numbers(line: dict, above: str = "") -> dict[str, float]:
    """All numbers of a metrics line, found by their JSON."""
    found = {}
    for key, value in json.loads(json.dumps(line)).items():
        children = dict(enumerate(value)) if isinstance(value, list) else value
        if isinstance(children, dict):
            found |= numbers({str(k): v for k, v in children.items()}, f"{above}{key}/")
        elif value is not None:
            found[above + key] = value
    return found


def scalars(folder: Path) -> dict[tuple[int, str], float]:
    """What TensorBoard would show, by step and name, from the records of the event files in their order."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[tuple[int, str], float] = {}
    for path in sorted(folder.iterdir(), key=lambda p: p.stat().st_mtime_ns):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            event = Event.FromString(content[at + 12 : at + 12 + length])
            at += 12 + length + 4
            if event.HasField("session_log"):  # what is past it is hidden
                found = {key: value for key, value in found.items() if key[0] < event.step}
            for value in event.summary.value:
                assert (event.step, value.tag) not in found  # would be drawn twice
                found[event.step, value.tag] = value.simple_value
    return found


def expected(run: Path) -> dict[tuple[int, str], float]:
    lines = checkpoint.read_metrics(Folder(run) / "router")
    assert [line["images"] for line in lines] == [16, 32, 48]
    return {(line["images"], name): value for line in lines for name, value in numbers(line).items() if name != "images"}


def test_tensorboard_shows_what_the_files_hold_after_a_restart_too(tmp_path):
    config = fake.make_run(tmp_path, tracking="[tensorboard]", **SHORT)
    worker.run(config, "router", CPU)
    lines = expected(tmp_path)
    assert "without_text/ece_by_time/3" in {name for _, name in lines}
    shown = scalars(tmp_path / "tensorboard" / "router")
    assert shown.keys() == lines.keys()
    assert all(shown[key] == pytest.approx(value, rel=1e-6) for key, value in lines.items())
    for images in (32, 48):  # as if it had died before the checkpoint at 32
        (Folder(tmp_path) / "router" / "checkpoints" / f"images-{images:09d}").delete_all()
    worker.run(config, "router", CPU)
    lines, shown = expected(tmp_path), scalars(tmp_path / "tensorboard" / "router")
    assert shown.keys() == lines.keys()
    assert all(shown[key] == pytest.approx(value, rel=1e-6) for key, value in lines.items())


def test_others_are_told_what_is_trained_and_not_where(tmp_path, monkeypatch):
    told = []
    run = SimpleNamespace(define_metric=lambda *_, **__: None)
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda config, **_: told.append(config) or run))
    secrets = {
        "clusters": "{eu: {address: 'https://ray.corp.example', token_file: /home/me/token, storage: 's3://ours/run'}}",
        "data__source": "{kind: folder, uri: 's3://customer/pictures'}",
        "experts__1__cluster": "eu",
        "experts__1__init_from": "/home/me/weights.safetensors",
    }
    config = fake.make_config(tmp_path, **secrets)
    for stage in ("expert-1", "router"):
        trackers.WandB(config, stage, 0)
    expert, router = told
    assert (expert["objective"], expert["train"]["batch_size"], expert["model"]["hidden_size"]) == ("ddpm", 8, 32)
    assert router["train"]["learning_rate"] == config.router.train.learning_rate
    said = json.dumps(told)
    assert not [word for word in ("corp", "/home", "s3:", "customer", "eu", str(tmp_path)) if word in said]


class Broken:
    def __init__(self, config, stage, images):
        self.lines = 0

    def log(self, images, figures):
        self.lines += 1
        raise ConnectionError(f"lost {self.lines}")

    def close(self):
        raise ConnectionError("lost at the end")


def test_one_that_fails_is_said_once_and_the_others_and_training_go_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", ("json", Broken))
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("json", lambda *_: 1 / 0))
    config = fake.make_run(tmp_path, tracking="[mlflow, wandb, tensorboard]", **SHORT)
    trackers.check(config)
    assert worker.run(config, "router", CPU)["images"] == 48
    out = capsys.readouterr().out
    assert [line for line in out.splitlines() if "takes no metrics" in line] == [
        "router: wandb takes no metrics: ZeroDivisionError: division by zero; training goes on without it",
        "router: mlflow takes no metrics: ConnectionError: lost 1; training goes on without it",
    ]
    assert scalars(tmp_path / "tensorboard" / "router").keys() == expected(tmp_path).keys()


def test_one_that_hangs_holds_nothing_up(tmp_path, monkeypatch):
    release = threading.Event()
    monkeypatch.setattr(trackers, "CLOSE_S", 0.2)
    silent = SimpleNamespace(log=lambda *_: None, close=lambda: None)
    monkeypatch.setitem(trackers.TRACKERS, "wandb", ("json", lambda *_: release.wait(60) and silent))
    assert worker.run(fake.make_run(tmp_path, tracking="[wandb]", **SHORT), "router", CPU)["images"] == 48
    assert not release.is_set()
    release.set()


def test_what_cannot_be_used_is_an_error_before_anything_starts(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    config = fake.make_run(tmp_path, tracking="[mlflow]")
    with pytest.raises(ConfigError, match=r"tracking: mlflow needs the package mlflow, .* pip install 'paris_ray\[mlflow\]', or leave mlflow out"):
        launch.train_stage(config, "router")
    assert not (tmp_path / "router").exists()
    monkeypatch.undo()
    away = config.model_copy(update={"run_dir": "memory://run", "tracking": ("tensorboard",)})
    with pytest.raises(ConfigError, match="tensorboard writes files that grow, which memory://run cannot hold"):
        trackers.check(away)


def test_mlflow_has_what_the_files_hold(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file://{tmp_path}/mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    config = fake.make_run(tmp_path / "run", tracking="[mlflow]", **SHORT)
    worker.run(config, "router", CPU)
    worker.run(config, "router", CPU)  # nothing left to train, and no second run
    client = MlflowClient()
    (one,) = client.search_runs([client.get_experiment_by_name("tiny").experiment_id])
    assert (one.info.run_name, one.info.status) == ("router", "FINISHED")
    for (images, name), value in expected(tmp_path / "run").items():
        assert {metric.step: metric.value for metric in client.get_metric_history(one.info.run_id, name)}[images] == value


def test_wandb_takes_them(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    config = fake.make_run(tmp_path / "run", tracking="[wandb]", **SHORT)
    worker.run(config, "router", CPU)
    assert "takes no metrics" not in capsys.readouterr().out
    (written,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert written.stat().st_size > 1000
