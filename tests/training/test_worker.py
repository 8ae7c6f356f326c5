"""What of a config reaches the network that a worker trains."""

from __future__ import annotations

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
