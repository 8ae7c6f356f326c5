"""What of a config reaches the network that a worker trains."""

from __future__ import annotations

import re
from pathlib import Path

import fake_training_run as fake
import pytest
import torch
from torch import Tensor

from paris_ray.models import network
from paris_ray.storage import Folder
from paris_ray.training import checkpoint, worker
from paris_ray.training.loop import Place

STAGES = {"expert-0": ("expert", "experts/0"), "router": ("router", "router")}


def trained(path: Path, stage: str, **train: object) -> dict[str, Tensor]:
    """Weights after three steps, of which one follows an evaluation."""
    section, folder = STAGES[stage]
    sets = {f"{section}__train__{key}": value for key, value in {"images": 24, "sample_images": 16, "checkpoint_images": 24, **train}.items()}
    worker.run(fake.make_run(path, **sets), stage, Place(torch.device("cpu")))
    found = checkpoint.latest(Folder(path) / folder)
    assert found is not None
    assert found.images == 24
    return found.tensors("model")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("stage", STAGES)
def test_gradient_checkpointing_is_switched_on_and_changes_no_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str, precision: str
) -> None:
    """Which is why it is no part of what a stage depends on."""
    calls: list[object] = []
    original = network.checkpoint
    monkeypatch.setattr(network, "checkpoint", lambda *args, **options: calls.append(args[0]) or original(*args, **options))
    plain = trained(tmp_path / "plain", stage, precision=precision)
    assert not calls
    saving = trained(tmp_path / "saving", stage, precision=precision, gradient_checkpointing="true")
    blocks = 2 if stage == "expert-0" else 1
    assert len(calls) == 3 * blocks  # of the steps, not of the evaluation
    assert all(torch.equal(value, saving[name]) for name, value in plain.items())


@pytest.mark.parametrize("stage", STAGES)
def test_compilation_is_switched_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stage: str) -> None:
    """Through a backend that runs the graphs as they are, twice over training and evaluation: generated code is tests/models/test_compile.py's."""
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    original = network.Network.compile_blocks
    monkeypatch.setattr(network.Network, "compile_blocks", lambda self: original(self, backend=keep))
    plain = trained(tmp_path / "plain", stage)
    assert not graphs
    torch._dynamo.reset()
    compiled = trained(tmp_path / "compiled", stage, compile="true", micro_batch=4)
    assert 1 <= len(graphs) <= 4  # not one for each of the steps and sizes
    torch.testing.assert_close(compiled, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("cloud", "seconds", "workers", "said"),
    [
        # Asked every 5 s, in two questions of at most 3; two steps of 2.5 s; and after one that is being written.
        ("aws", 52.0, 1, "a checkpoint takes 52.0 s, aws gives 120 s: outside validation a preemption loses nothing"),
        ("aws", 52.1, 1, "aws gives 120 s: what a preemption loses is bounded by the interval of 16 images"),
        ("gcp", 7.0, 1, "gcp gives 30 s: outside validation a preemption loses nothing"),
        ("azure", 7.1, 1, "azure gives 30 s: what a preemption loses is bounded by the interval of 16 images"),
        ("aws", 1.0, 2, "aws gives 120 s and several workers must agree to go: what a preemption loses is bounded by the interval of 16 images"),
    ],
)
def test_it_says_at_the_start_what_a_preemption_costs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cloud: str, seconds: float, workers: int, said: str
) -> None:
    monkeypatch.setattr(checkpoint, "write_seconds", lambda folder, weights: seconds)
    resources = {"expert__resources__preemption": cloud, "expert__resources__num_workers": workers, "expert__train__checkpoint_images": 16}
    spec = fake.make_config(tmp_path, **resources).experts[0]
    assert worker._what_preemption_costs(spec.resources, spec.train, Folder(tmp_path), {}).endswith(said)


def test_the_time_of_a_checkpoint_is_measured_where_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, write = [], Folder.write_bytes
    monkeypatch.setattr(Folder, "write_bytes", lambda self, name, data: store.append((self.uri, len(data))) or write(self, name, data))
    config = fake.make_run(tmp_path, expert__resources__preemption="aws", expert__train__images=8, expert__train__checkpoint_images="null")
    worker.run(config, "expert-0", Place(torch.device("cpu")))
    said = r"expert-0: a checkpoint takes \d+\.\d s, aws gives 120 s: outside validation a preemption loses nothing"
    assert re.search(said, capsys.readouterr().out)
    folder = Folder(tmp_path) / "experts" / "0"
    assert not folder.exists(checkpoint.PROBE)
    (real,) = [size for uri, size in store if uri.startswith(f"{folder.uri}/checkpoints") and size > 10_000][:1]
    assert (folder.uri, real) in store  # the probe was of a network's weights

    def full(self: Folder, name: str, data: bytes) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Folder, "write_bytes", full)
    spec = config.experts[0]
    said = worker._what_preemption_costs(spec.resources, spec.train, folder, {"a": torch.zeros(1)})
    assert said == (
        "how long a checkpoint takes could not be measured (No space left on device); what a preemption loses is bounded by nothing: "
        "set train.checkpoint_images"
    )
