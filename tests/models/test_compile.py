"""Blocks compile as whole graphs, once for all layers, and compute the same."""

from __future__ import annotations

import copy
import itertools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paris_ray.models import DiT, Router
from paris_ray.models.dit import DiTBlock


def random_weights(model: nn.Module) -> nn.Module:
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


@pytest.mark.parametrize("precision", ["fp32", "autocast", "weights"])
def test_blocks_are_captured_whole_and_once(precision: str) -> None:
    """With the backend that runs the captured graph as it is: generating code would take a minute here, and is the benchmark's to show."""
    torch.manual_seed(0)
    model = random_weights(DiT(image_size=8, hidden_size=32, num_layers=3, num_heads=4, text_embed_dim=12))
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), torch.randn(2, 5, 12)
    if precision == "weights":
        model, x, text = model.bfloat16(), x.bfloat16(), text.bfloat16()
    compiled = copy.deepcopy(model)
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled.compile_blocks(backend=keep)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        expected, found = model(x, t, text), compiled(x, t, text)
    assert len(graphs) == 1  # fullgraph=True would have raised at a break
    assert sum("scaled_dot_product" in str(node.target) for node in graphs[0].graph.nodes) == 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert compiled.state_dict().keys() == model.state_dict().keys()
    expected.square().mean().backward()
    found.square().mean().backward()
    for one, other in zip(model.parameters(), compiled.parameters(), strict=True):
        if one.requires_grad:
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-4, atol=1e-5)


SMALL = {"image_size": 8, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "text_embed_dim": 12}
CASES = [(DiT, (torch.randn(2, 5, 12),)), (Router, (torch.randn(2, 12),))]


def backward(model: nn.Module, *inputs: Any) -> tuple[Tensor, list[Tensor]]:
    """Output, and gradients of all that is trained."""
    model.zero_grad()
    output = model(*inputs)
    output.square().mean().backward()
    return output.detach(), [parameter.grad for parameter in model.parameters() if parameter.requires_grad]


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_a_whole_forward_is_one_graph(kind: type[nn.Module], text: tuple[Tensor, ...]) -> None:
    """The checks of shapes included."""
    torch.manual_seed(0)
    model = random_weights(kind(**SMALL))
    x, t = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9])
    torch._dynamo.reset()
    whole = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(whole(x, t, *text), model(x, t, *text), rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="latents are of shape"):
        model(x[..., :6], t, *text)


def test_experts_of_many_widths_and_numbers_of_rows_compile_in_one_process() -> None:
    torch._dynamo.reset()
    limit, graphs = 8, 0  # torch's limit, at which it refuses

    def count(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nonlocal graphs
        graphs += 1
        return graph

    models = [DiT(**{**SMALL, "hidden_size": width}).eval() for width in (8, 16, 24, 32, 40)]
    for model in models:
        model.compile_blocks(backend=count)

    @torch.no_grad()
    def sample() -> None:
        for model, rows in itertools.product(models, (1, 2, 3, 8)):
            model(torch.randn(rows, 4, 8, 8), torch.rand(rows), torch.randn(rows, 5, 12))

    # Settings of torch's compiler are those of a thread, and who samples is seldom the one who loaded.
    with ThreadPoolExecutor(1) as pool:
        pool.submit(sample).result()
    assert limit < graphs <= 3 * len(models)


@pytest.mark.parametrize(("kind", "text"), CASES)
def test_compiled_blocks_may_be_checkpointed(kind: type[nn.Module], text: tuple[Tensor, ...]) -> None:
    torch.manual_seed(0)
    model = random_weights(kind(**SMALL))
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([0.1, 0.9]), *text
    expected = backward(model, *inputs)
    torch._dynamo.reset()
    model.compile_blocks(backend="aot_eager")
    model.gradient_checkpointing = True
    torch.testing.assert_close(backward(model, *inputs), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="no C++ compiler to build generated code with")
def test_generated_code_computes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code that inductor writes and a C++ compiler builds, of one block, forward and backward."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.manual_seed(0)
    block = random_weights(DiTBlock(32, 4))
    keys_values = torch.randn(2, 4, 5, 8), torch.randn(2, 4, 5, 8)
    inputs = torch.randn(2, 16, 32), torch.randn(2, 6, 32), keys_values
    expected = backward(block, *inputs)
    torch._dynamo.reset()
    block.compile(fullgraph=True)
    with torch._inductor.config.patch(compile_threads=1):  # without processes that would first have to import torch
        torch.testing.assert_close(backward(block, *inputs), expected, rtol=1e-5, atol=1e-5)
    assert list(tmp_path.rglob("*.cpp"))  # it was not eager after all
