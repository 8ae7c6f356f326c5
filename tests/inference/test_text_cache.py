"""Text keys and values: what is kept, what goes, and what a step copies."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paris_ray.diffusion.ensemble import Conditioning, ExpertCall
from paris_ray.diffusion.path import Flow
from paris_ray.inference import text_cache
from paris_ray.inference.experts import LocalExperts
from paris_ray.inference.text_cache import TextCache
from paris_ray.models import DiT

CPU = torch.device("cpu")
ENTRY = 3 * 2 * 1 * 4 * 2 * 4  # bytes of a text's keys and values in the stand-in


class Expert:
    """Three layers, one head of width 2: keys are twice the states, values thrice."""

    text_proj = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self):
        self.batches = []

    def text_keys_values(self, text):
        self.batches.append(len(text))
        heads = text.unsqueeze(1)
        return [(2 * heads + layer, 3 * heads + layer) for layer in range(3)]


def texts(*names):
    return {name: torch.full((4, 2), float(ord(name))) for name in names}


def step(cache, module, expert, names):
    cache.use((expert, name) for name in names)
    return cache.get(expert, texts(*names), module)


def test_more_than_fits_in_the_same_order_again_and_again_is_found():
    """A least-recently-used cache smaller than that is never hit."""
    cache, module = TextCache(CPU, spare=2 * ENTRY), Expert()
    for _ in range(4):
        step(cache, module, 0, "abcdefgh")
    assert (cache.hits, cache.misses) == (3 * 8, 8)
    assert cache.bytes == 8 * ENTRY


def test_those_not_in_use_go_oldest_first():
    cache, module = TextCache(CPU, spare=2 * ENTRY), Expert()
    for name in "abcd":
        step(cache, module, 0, name)
    assert [name for _, name in cache.entries] == ["b", "c", "d"]  # d is in use, beside it two
    step(cache, module, 0, "b")  # touched again
    step(cache, module, 0, "ef")
    assert [name for _, name in cache.entries] == ["d", "b", "e", "f"]
    assert cache.bytes == 4 * ENTRY
    cache.forget(0)
    assert (cache.bytes, len(cache.entries)) == (0, 0)


def test_what_another_expert_of_the_same_call_will_use_stays():
    """Older than all that goes, but in use."""
    cache, module = TextCache(CPU, spare=0), Expert()
    cache.use([(1, "a"), (1, "b"), (0, "c"), (0, "d")])
    cache.get(1, texts("a", "b"), module)
    cache.get(0, texts("c", "d"), module)
    cache.use([(1, "a"), (1, "b"), (0, "e"), (0, "f")])
    cache.get(0, texts("e", "f"), module)
    cache.get(1, texts("a", "b"), module)
    assert (cache.hits, cache.misses) == (2, 6)
    assert set(cache.entries) == {(1, "a"), (1, "b"), (0, "e"), (0, "f")}


def test_free_memory_is_a_limit_too(monkeypatch):
    monkeypatch.setattr(text_cache, "free_memory", lambda device: 4 * ENTRY)
    cache, module = TextCache(CPU, spare=1 << 30), Expert()
    for name in "abcdef":
        step(cache, module, 0, name)
    assert [name for _, name in cache.entries] == ["e", "f"]  # the one in use, and a quarter of what is free
    monkeypatch.setattr(text_cache, "free_memory", lambda device: 0)
    assert set(step(cache, module, 1, "uvwxyz")) == set("uvwxyz")  # in use all the same
    assert len(cache.entries) == 6


@pytest.mark.parametrize(("device", "batches"), [("cpu", [1, 1, 1, 1]), ("meta", [3, 1])])
def test_new_texts_go_together_but_on_a_cpu(device, batches):
    cache, module = TextCache(torch.device(device)), Expert()
    found = step(cache, module, 2, "abc")
    step(cache, module, 2, "abcd")
    assert module.batches == batches
    for name, layers in found.items():
        assert len(layers) == 3
        for layer, pair in enumerate(layers):
            expected = torch.full((2, 1, 4, 2), float(ord(name))) * torch.tensor([2.0, 3.0]).view(2, 1, 1, 1) + layer
            assert torch.equal(pair, expected)
            assert pair.untyped_storage().nbytes() == pair.nbytes  # its own memory, which goes when it goes


class Largest(TorchDispatchMode):
    """The most numbers that one operation made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else (out,):
            if isinstance(one, torch.Tensor) and not one._is_view():
                self.numbers = max(self.numbers, one.numel())
        return out


def test_a_step_gathers_one_layer_at_a_time():
    """28 layers, texts far longer than the latent: no operation of a step makes more than one layer's keys and values of its rows."""
    torch.manual_seed(0)
    module = (
        DiT(image_size=4, in_channels=2, out_channels=2, hidden_size=16, num_layers=28, num_heads=2, text_embed_dim=8).eval().requires_grad_(False)
    )
    files = SimpleNamespace(num_experts=1, device=CPU, present=[True], compile=False, load_expert=lambda k, on_host: (module.eval(), Flow()))
    experts = LocalExperts(files)
    names = tuple("abcdef")
    states = torch.randn(6, 100, 8)
    cond = Conditioning(states, states[:, 0], states.flip(0), torch.full((6,), 2.0), names, names[::-1])
    call = ExpertCall(0, torch.randn(6, 2, 4, 4), torch.rand(6), cond)
    first = experts.velocities([call])[0]
    with Largest() as largest:
        again = experts.velocities([call])[0]
    assert torch.equal(first, again)
    one_layer = 12 * 2 * 100 * 16  # rows with both branches, keys and values
    assert one_layer <= largest.numbers <= 1.5 * one_layer
