"""torch.compile: one graph, the same numbers."""

from __future__ import annotations

import shutil

import pytest
import torch
from moe_lora import MoELoRAConfig, MoELoRALayer, experts
from torch import nn


@pytest.mark.parametrize("top_k", [1, 2])
def test_compiled_layer_is_one_graph_and_equal(top_k: int) -> None:
    """aot_eager traces forward and backward as every backend's front end does, without a C++ compiler."""
    torch.manual_seed(0)
    layer = MoELoRALayer(nn.Linear(8, 8), MoELoRAConfig(rank=4, alpha=8.0, top_k=top_k))
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 0.5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for n in (6, 9):
        x = torch.randn(2, n, 8, requires_grad=True)
        inputs = [x, layer.router.weight, layer.lora_a, layer.lora_b]
        out = compiled(x)
        assert layer.last is not None
        got = torch.autograd.grad(out.square().sum() + sum(layer.aux_loss()), inputs)
        eager = layer(x)
        want = torch.autograd.grad(eager.square().sum() + sum(layer.aux_loss()), inputs)
        torch.testing.assert_close(out, eager)
        for g, w in zip(got, want, strict=True):
            torch.testing.assert_close(g, w, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="inductor needs a C++ compiler")
def test_inductor() -> None:
    torch.manual_seed(0)
    h, a, b = (torch.randn(*s, requires_grad=True) for s in ((12, 8), (3, 4, 8), (3, 8, 4)))
    w, index = torch.rand(12, 1, requires_grad=True), torch.randint(3, (12, 1))
    compiled = torch.compile(lambda *t: experts(*t, index).square().sum(), fullgraph=True)
    got = torch.autograd.grad(compiled(h, a, b, w), [h, a, b, w])
    want = torch.autograd.grad(experts(h, a, b, w, index).square().sum(), [h, a, b, w])
    for g, true in zip(got, want, strict=True):
        torch.testing.assert_close(g, true, atol=1e-5, rtol=1e-4)
