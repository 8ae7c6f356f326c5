"""What a GPU would have to be waited for, shown without one: on torch's meta device, which has no numbers, every such question raises."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import tiny_model
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall
from paris_ray.diffusion.path import Ddpm, Flow
from paris_ray.inference.engine import Engine, ImageRequest
from paris_ray.inference.experts import LocalExperts, padded
from paris_ray.inference.prompts import Prompts
from paris_ray.models import DiT

META = torch.device("meta")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return tiny_model.open_model(path, tiny_model.write_model(path))


class Uploads(TorchDispatchMode):
    """Counts what moves from CPU memory to the device, and how many numbers."""

    def __init__(self):
        super().__init__()
        self.sizes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        moved = isinstance(out, torch.Tensor) and out.device == META and args and isinstance(args[0], torch.Tensor) and args[0].device.type == "cpu"
        if moved and args[0].dim() > 0:
            self.sizes.append(out.numel())
        return out


def shape(rows):
    return rows, tiny_model.CHANNELS, tiny_model.SIZE, tiny_model.SIZE


def call(k, guidance):
    n = len(guidance)
    text = [torch.empty(tiny_model.TOKENS, tiny_model.WIDTH, device=META) for _ in range(n)]
    cond = Conditioning(text, text, text, torch.tensor(guidance), tuple(f"t{i}" for i in range(n)), ("null",) * n)
    return ExpertCall(k, torch.empty(shape(n), device=META), torch.empty(n, device=META), cond)


def test_experts_wait_for_nothing_and_upload_one_tensor_a_guided_call(monkeypatch):
    rows, forward = [], DiT.forward

    def counting(self, x, *arguments, **keywords):
        rows.append(len(x))
        return forward(self, x, *arguments, **keywords)

    monkeypatch.setattr(DiT, "forward", counting)
    objectives = [Flow(), Ddpm("cosine"), Ddpm("linear")]
    load = lambda k, on_host: (tiny_model.dit(tiny_model.SHAPES[0], k), objectives[k])  # noqa: E731
    experts = LocalExperts(SimpleNamespace(num_experts=3, device=META, present=[True] * 3, compile=False, load_expert=load))
    calls = [call(0, [1.0, 3.0, 2.0]), call(1, [1.0, 1.0]), call(2, [7.5])]
    experts.velocities(calls)
    rows.clear()
    with Uploads() as uploads:
        found = experts.velocities(calls)
    assert [(v.shape, v.device) for v in found] == [(call.x.shape, META) for call in calls]
    assert uploads.sizes == [4, 2]  # index and scale of two rows, and of one
    # 3 + 2 rows are run as eight, so that compiled blocks see few shapes; 2 and 1 + 1 as they are.
    assert rows == [8, 2, 2]


def test_shapes_of_batches():
    buckets = [1, 2, 4, *range(8, 137, 8)]
    for n in range(1, 130):
        assert padded(n, torch.device("cuda")) == min(bucket for bucket in buckets if bucket >= n)
        assert padded(n, torch.device("cpu")) == n


class AnswersOnTheCpu:
    """A router whose logits are there already: the one answer that a tick does wait for."""

    text_embed_dim = tiny_model.WIDTH
    patch_embed = SimpleNamespace(weight=torch.zeros(1))
    calls = 0

    def __call__(self, x, t, pooled):
        assert {x.device, t.device, pooled.device} == {META}
        AnswersOnTheCpu.calls += 1
        return torch.arange(4.0).expand(len(x), 4)


def test_a_tick_of_the_engine_waits_for_the_router_alone(model):
    there = dataclasses.replace(model, device=META)
    there.router = AnswersOnTheCpu()
    objectives = [Flow(), Ddpm(), Flow(), Ddpm("linear")]
    load = lambda k, on_host: (tiny_model.dit(tiny_model.SHAPES[0], k), objectives[k])  # noqa: E731
    experts = LocalExperts(SimpleNamespace(num_experts=4, device=META, present=[True] * 4, compile=False, load_expert=load))
    engine = Engine(there, experts)
    futures = [
        engine.submit(ImageRequest(f"prompt {i}", seed=i, steps=9, guidance_scale=1.0 + i % 2, solver=solver, routing=routing))
        for i, (solver, routing) in enumerate([("euler", "top-2"), ("heun", "full"), ("dpmpp_2m", "expert-0"), ("midpoint", "caption")])
    ]
    tiny_model.Text.calls = 0
    for _ in range(3):
        engine.tick()
    assert tiny_model.Text.calls == 4
    with Uploads() as uploads:
        engine.tick()
    assert not any(future.done() for future in futures)
    assert engine.metrics["evaluations"] == 16
    # Times; rows and weights of all visits; and of each of the experts 0 … 3 the rows with guidance.
    assert len(uploads.sizes) <= 2 + 4
    assert sum(uploads.sizes) < 64


class Counting:
    """A text encoder that notes what it is given at once; states are the prompt's length."""

    fingerprint, max_length = "counting", 99

    def __init__(self):
        self.batches = []

    def tokenize(self, captions):
        if "poison" in captions:
            raise ValueError("cannot read poison")
        return torch.tensor([[len(caption)] for caption in captions]), torch.ones(len(captions), dtype=torch.long)

    def count(self, captions):
        return [len(caption) for caption in captions]

    def encode(self, ids, lengths):
        self.batches.append(len(ids))
        return ids.float().unsqueeze(-1).expand(-1, 3, 2)

    def pool(self, states, lengths):
        return states[:, 0]


def prompts_on(device):
    encoder = Counting()
    return encoder, Prompts(SimpleNamespace(device=torch.device(device), text_encoder=encoder, null_text=torch.zeros(3, 2), null_length=1))


def test_new_prompts_of_a_tick_are_encoded_together_beside_a_gpu():
    encoder, prompts = prompts_on("meta")
    prompts.prepare(["one", "three", "one", "", "seven"])
    assert encoder.batches == [3]
    made = [prompts(one) for one in ("one", "three", "seven", "")]
    assert encoder.batches == [3]
    assert len({one.digest for one in made}) == 4
    assert all((one.states.shape, one.pooled.shape, one.states.device) == ((3, 2), (2,), META) for one in made)
    prompts.prepare(["eleven", "poison", "one", "thirteen"])  # says nothing of it yet
    assert prompts("eleven").states.shape == (3, 2)
    with pytest.raises(ValueError, match="cannot read poison"):
        prompts("poison")
    assert encoder.batches == [3, 1]


def test_on_a_cpu_each_prompt_goes_alone():
    encoder, prompts = prompts_on("cpu")
    prompts.prepare(["one", "three"])
    assert encoder.batches == []
    assert prompts("three").states.tolist() == [[5.0, 5.0]] * 3
    assert prompts("one").pooled.tolist() == [3.0, 3.0]
    assert prompts("").states.tolist() == [[0.0, 0.0]] * 3
    assert encoder.batches == [1, 1]
