"""Blocks compile as whole graphs, once for all layers, and compute the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from paris_ray.models import DiT


@pytest.mark.parametrize("precision", ["fp32", "autocast", "weights"])
def test_blocks_are_captured_whole_and_once(precision: str) -> None:
    """With the backend that runs the captured graph as it is: generating code would take a minute here, and is the benchmark's to show."""
    torch.manual_seed(0)
    model = DiT(image_size=8, hidden_size=32, num_layers=3, num_heads=4, text_embed_dim=12)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
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
