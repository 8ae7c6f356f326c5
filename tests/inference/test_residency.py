"""Where experts are: room on the device, host memory, file. A GPU's part is played by copies in CPU memory and a count of free bytes."""

from __future__ import annotations

import copy
import dataclasses
from types import SimpleNamespace

import pytest
import tiny_model
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall
from paris_ray.diffusion.path import Flow
from paris_ray.inference import residency
from paris_ray.inference.experts import ExpertError, LocalExperts
from paris_ray.inference.precision import set_precision
from paris_ray.inference.residency import Residents, moved, size

CPU, CUDA, META = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
HUGE = 1 << 50


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    return tiny_model.open_model(path, tiny_model.write_model(path))


@pytest.fixture
def machine(monkeypatch):
    """A device of so many bytes: what comes there is a copy, and what it holds is counted. ``short`` attempts to come fail for want of memory."""
    state = SimpleNamespace(device=HUGE, host=HUGE, residents=None, short=0)

    def move(module, how):
        if state.short:
            state.short -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return copy.deepcopy(module)

    def free(device):
        held = sum(size(module) for module, _ in state.residents._experts.values())
        return state.device - held if device.type == "cuda" else state.host

    def residents(load, limit=None):
        state.residents = Residents(load, CUDA, limit, free)
        return state.residents

    monkeypatch.setattr(residency, "moved", move)
    state.make = residents
    return state


def linear(numbers):
    """Something with so many bytes of weights."""
    return torch.nn.Linear(numbers // 4, 1, bias=False)


def loader(sizes):
    read = []

    def load(k):
        read.append(k)
        return linear(sizes[k]), Flow()

    load.read = read
    return load


def test_a_larger_expert_makes_the_room_that_it_needs(machine):
    """One that stays in float32 beside int8 ones: what came before says nothing of its size."""
    machine.device = 6500
    residents = machine.make(loader([1000, 1000, 4000]))
    residents.get(0)
    residents.get(1)
    assert len(residents) == 2
    residents.get(2)  # wants 6000, so that both go
    assert [k in residents for k in range(3)] == [False, False, True]
    assert residents._free(CUDA) == 2500


def test_an_expert_that_was_replaced_makes_room_too(machine):
    machine.device = 6500
    residents = machine.make(loader([1000, 1000]))
    residents.get(0)
    residents.get(1)
    residents.put(1, (linear(4000), Flow()))
    assert [k in residents for k in range(2)] == [False, True]
    assert size(residents.get(1)[0]) == 4000


def test_when_memory_is_short_after_all_the_oldest_goes_and_it_is_tried_once_more(machine):
    residents = machine.make(loader([1000] * 4))
    residents.get(0)
    residents.get(1)
    machine.short = 1
    residents.get(2)
    assert [k in residents for k in range(4)] == [False, True, True, False]
    assert residents.loads == 3  # its file was read once
    machine.short = 3
    with pytest.raises(torch.OutOfMemoryError):
        residents.get(3)
    machine.short = 1
    alone = machine.make(loader([1000]))
    with pytest.raises(torch.OutOfMemoryError):
        alone.get(0)  # nobody is there to make room


def test_a_loader_that_is_short_of_memory_once(model):
    failures = [torch.OutOfMemoryError("no")]

    def load(k):
        if k == 2 and failures:
            raise failures.pop()
        return model.load_expert(k)

    residents = Residents(load, CPU, free=lambda device: HUGE)
    for k in range(3):
        assert torch.equal(residents.get(k)[0].pos_embed, model.load_expert(k)[0].pos_embed)
    assert [k in residents for k in range(4)] == [False, True, True, False]


def request(k):
    g = torch.Generator().manual_seed(k)
    text = torch.randn(2, tiny_model.TOKENS, tiny_model.WIDTH, generator=g)
    cond = Conditioning(text, text[:, 0], text.flip(0), torch.tensor([2.0, 1.0]), ("a", "b"), ("null", "null"))
    return ExpertCall(k, torch.randn(2, tiny_model.CHANNELS, tiny_model.SIZE, tiny_model.SIZE, generator=g), torch.rand(2, generator=g), cond)


def test_a_forward_pass_that_is_short_of_memory_goes_on_without_the_oldest_expert(model):
    experts = LocalExperts(model, lazy=True)
    expected = [experts.velocities([request(k)])[0] for k in range(3)]
    module, _ = experts._residents.get(0)
    forward, failures = module.forward, [torch.OutOfMemoryError("no")]

    def short(*arguments, **keywords):
        if failures:
            raise failures.pop()
        return forward(*arguments, **keywords)

    module.forward = short
    assert torch.equal(experts.velocities([request(0)])[0], expected[0])
    assert experts.resident == [True, False, True, False]  # 1 was the oldest of the others
    failures.extend([torch.OutOfMemoryError("still no")] * 2)
    with pytest.raises(ExpertError, match="expert 0: OutOfMemoryError"):
        experts.velocities([request(0)])


class Arriving(TorchDispatchMode):
    """Bytes that come to the meta device from CPU memory."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and out.device == META and args and isinstance(args[0], torch.Tensor) and args[0].device == CPU:
            self.bytes += out.nbytes
        return out


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_nothing_comes_to_the_device_but_the_final_weights(model, precision):
    """Loading takes the expert's size there, and not its file's."""
    there = dataclasses.replace(model, device=META, precision=precision)
    with Arriving() as arriving:
        module, _ = there.load_expert(0)
    assert module.patch_embed.weight.device == META
    assert size(module) <= arriving.bytes <= size(module) + 512  # the 128 frequencies of the time come twice
    waiting, _ = there.load_expert(0, on_host=True)
    assert {tensor.device for tensor in waiting.state_dict().values()} == {CPU}
    assert size(waiting) == size(module)
    assert size(module) / size(model.load_expert(0)[0]) < {"fp32": 1.01, "bf16": 0.75, "int8": 0.6}[precision]  # small ones: much is time and tables


# -- three places -------------------------------------------------------------------------------------------------------


def test_beside_a_gpu_experts_wait_in_host_memory(machine):
    load = loader([1000] * 3)
    residents = machine.make(load, limit=1)
    first = [residents.get(k)[0].weight.clone() for k in range(3)]
    for _ in range(4):
        for k in range(3):
            assert torch.equal(residents.get(k)[0].weight, first[k])
            assert len(residents) == 1
    assert load.read == [0, 1, 2]
    # One that is loaded anew is not mistaken for what waits.
    new = linear(1000)
    residents.put(0, (new, Flow()))
    residents.get(1)
    assert torch.equal(residents.get(0)[0].weight, new.weight)
    residents.get(1)
    residents.drop(0)
    assert not torch.equal(residents.get(0)[0].weight, new.weight)
    assert load.read == [0, 1, 2, 0]


def test_the_file_is_the_last_place(machine):
    load = loader([1000] * 3)
    residents = machine.make(load, limit=1)
    machine.host = 2000  # half of it would not be left
    for _ in range(2):
        for k in range(3):
            residents.get(k)
    assert load.read == [0, 1, 2] * 2
    machine.host = 2001
    for _ in range(3):
        for k in range(3):
            residents.get(k)
    assert load.read == [0, 1, 2, 0, 1, 2, 0, 1]  # the last of them was still on the device, and waited when it had to go


def test_on_a_cpu_an_expert_that_goes_is_gone(model):
    """Host and device are one memory there: a limit that kept it would bound nothing."""
    residents = Residents(model.load_expert, CPU, limit=1)
    for k in (0, 1, 0, 1):
        residents.get(k)
    assert residents.loads == 4
    assert not residents._waiting


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
def test_a_moved_expert_computes_the_same_and_shares_nothing(precision):
    module = set_precision(tiny_model.dit(tiny_model.SHAPES[0], 3).eval().requires_grad_(False), Flow(), precision)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    other = moved(module, torch.clone)
    dtype = module.patch_embed.weight.dtype
    x, t = torch.randn(2, tiny_model.CHANNELS, tiny_model.SIZE, tiny_model.SIZE).to(dtype), torch.rand(2)
    text = torch.randn(2, tiny_model.TOKENS, tiny_model.WIDTH).to(dtype)
    assert torch.equal(other(x, t, text), module(x, t, text))
    assert not other.training
    for tensor in (*other.parameters(), *other.buffers()):
        assert not tensor.requires_grad
        tensor.data.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert moved(module, lambda tensor: tensor.to(META)).patch_embed.weight.device == META
