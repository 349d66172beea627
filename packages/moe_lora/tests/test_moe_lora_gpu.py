"""On a card: experts by one grouped matrix product are those of the slow twin. Each test's body runs on the CPU as well."""

from __future__ import annotations

import pytest
import torch
from moe_lora import MoELoRAConfig, MoELoRALayer, experts, grouped, reference
from torch import Tensor

NO_CARD = "needs a CUDA device, and there is none here"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CARD)]
DTYPES = {torch.float32: 2e-3, torch.bfloat16: 4e-2}  # float32 products may be TF32 on a card


def drawn(device: str, dtype: torch.dtype, k: int, masked: float) -> tuple[Tensor, ...]:
    """Tokens, two stacks of expert matrices, weights of the chosen experts, which they are, and the gradient of the output."""
    g = torch.Generator().manual_seed(0)
    n, e, r, d = 96, 4, 16, 64
    made = [
        torch.randn(n, d, generator=g),
        torch.randn(e, r, d, generator=g) / d**0.5,
        torch.randn(e, d, r, generator=g) / r**0.5,
    ]
    made.append(torch.rand(n, k, generator=g))
    leaves = [t.to(device, dtype).requires_grad_() for t in made]
    index = torch.rand(n, e, generator=g).argsort(1)[:, :k]
    index = index.masked_fill(torch.rand(n, k, generator=g) < masked, -1)
    return (*leaves, index.to(device), torch.randn(n, d, generator=g).to(device, dtype))


def values_and_gradients(inputs: tuple[Tensor, ...], dispatch: str) -> list[Tensor]:
    *leaves, index, weight = inputs
    out = reference.experts(*leaves, index) if dispatch == "slow" else experts(*leaves, index, dispatch)  # type: ignore[arg-type]
    return [out, *torch.autograd.grad((out * weight).sum(), leaves)]


def grouped_equals_loops(device: str, dtype: torch.dtype, k: int, masked: float) -> None:
    """Values and gradients, relative to their size; the truth is computed in float64 on the CPU."""
    inputs = drawn(device, dtype, k, masked)
    assert grouped.use_grouped_mm(*inputs[:3]) == (device != "cpu")
    index = inputs[4].cpu()
    exact = tuple(t.detach().cpu().double().requires_grad_() for t in inputs[:4])
    want = values_and_gradients((*exact, index, inputs[5].cpu().double()), "slow")
    for dispatch in ("grouped", "loop"):
        for got, true in zip(values_and_gradients(inputs, dispatch), want, strict=True):
            error = (got.detach().cpu().double() - true).norm() / true.norm().clamp_min(1e-12)
            assert error < DTYPES[dtype], (dispatch, float(error))


CASES = [(dtype, k, masked) for dtype in DTYPES for k in (1, 2) for masked in (0.0, 0.3)]


@pytest.mark.parametrize(("dtype", "k", "masked"), CASES)
@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_grouped_products_equal_loops(device: str, dtype: torch.dtype, k: int, masked: float) -> None:
    grouped_equals_loops(device, dtype, k, masked)


def layer_follows_its_twin(device: str) -> None:
    """A whole layer under autocast to bf16: the routing of float32, its output and router gradient to bf16's resolution."""
    torch.manual_seed(0)
    config = MoELoRAConfig(rank=16, alpha=16.0, num_experts=4, top_k=1)
    layer = MoELoRALayer(torch.nn.Linear(64, 64), config)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 8)
    x, found = torch.randn(2, 48, 64), []
    for where, half in (("cpu", False), (device, True)):
        layer.to(where).zero_grad()
        with torch.autocast(where, torch.bfloat16, enabled=half):
            out = layer(x.to(where))
        out.float().square().mean().backward()
        gradients = [p.grad.float().cpu().clone() for p in layer.parameters() if p.grad is not None]
        assert layer.last is not None
        found.append((layer.last.expert_index.cpu(), out.detach().float().cpu(), gradients))
    (index, out, gradients), (index_half, out_half, gradients_half) = found
    assert (index != index_half).float().mean() < 0.03, "a token at the border may go elsewhere in bf16"
    same = (index == index_half).all(-1).reshape(out.shape[:-1])
    torch.testing.assert_close(out_half[same], out[same], atol=0.05, rtol=0.05)
    assert len(gradients) == len(gradients_half) > 0
    assert all(bool(torch.isfinite(g).all()) for g in gradients_half)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_a_layer_in_bf16_follows_its_float32_twin(device: str) -> None:
    layer_follows_its_twin(device)
