"""The layer around a base."""

from __future__ import annotations

import pytest
import torch
from moe_lora import MoELoRAConfig, MoELoRALayer, mixture, reference
from torch import nn


def config(**changes: object) -> MoELoRAConfig:
    return MoELoRAConfig(**{"rank": 4, "alpha": 8.0, "num_experts": 4, "top_k": 1, **changes})  # type: ignore[arg-type]


def awake(layer: MoELoRALayer) -> MoELoRALayer:
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in (layer.router.weight, layer.lora_a, layer.lora_b):
            p.normal_(0, 0.5, generator=g)
    return layer


def bits(t: torch.Tensor) -> torch.Tensor:
    return t.view(torch.int32 if t.dtype == torch.float32 else torch.int16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dispatch", ["grouped", "loop", "dense"])
@pytest.mark.parametrize("autocast", [False, True])
def test_wrapping_changes_no_bit(dtype: torch.dtype, dispatch: str, autocast: bool) -> None:
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8)).to(dtype)
    x = torch.randn(2, 5, 8, dtype=dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        plain = base(x)
        assert torch.equal(bits(MoELoRALayer(base, config(dispatch=dispatch, top_k=2))(x)), bits(plain))


def test_equation_by_the_slow_twin() -> None:
    layer, x = awake(MoELoRALayer(nn.Linear(8, 6), config(top_k=2))), torch.randn(2, 7, 8)
    p = (x.view(-1, 8) @ layer.router.weight.T).softmax(-1)
    weights, index = p.topk(2)
    want = layer.base(x).view(-1, 6) + 2.0 * reference.experts(
        x.view(-1, 8), layer.lora_a, layer.lora_b, weights, index
    )
    torch.testing.assert_close(layer(x), want.view(2, 7, 6))
    torch.testing.assert_close(layer.delta(x), layer(x) - layer.base(x), atol=1e-5, rtol=1e-4)
    again = mixture(x, layer.router.weight, layer.lora_a, layer.lora_b, layer.state, scaling=2.0)
    torch.testing.assert_close(again, layer.delta(x).view(-1, 6))


def test_one_expert_is_an_ordinary_lora() -> None:
    for gating in ("softmax_then_topk", "topk_then_softmax"):
        layer, x = awake(MoELoRALayer(nn.Linear(8, 6), config(num_experts=1, gating=gating))), torch.randn(7, 8)
        torch.testing.assert_close(layer(x), layer.base(x) + 2.0 * x @ layer.lora_a[0].T @ layer.lora_b[0].T)


def test_top_1_router_learns_by_default_and_not_by_the_papers_letter() -> None:
    for gating, learns in (("softmax_then_topk", True), ("topk_then_softmax", False)):
        layer = awake(MoELoRALayer(nn.Linear(8, 8), config(gating=gating)))
        layer(torch.randn(16, 8)).square().sum().backward()
        assert layer.router.weight.grad is not None
        assert bool(layer.router.weight.grad.abs().max() > 0) is learns
    layer = awake(MoELoRALayer(nn.Linear(8, 8), config(gating="topk_then_softmax", top_k=2)))
    layer(torch.randn(16, 8)).square().sum().backward()
    assert bool(layer.router.weight.grad.abs().max() > 0)


@pytest.mark.parametrize("dispatch", ["grouped", "loop", "dense"])
def test_gradients_of_a_whole_layer_agree_between_dispatches(dispatch: str) -> None:
    x = torch.randn(20, 8, requires_grad=True)
    grads = []
    for kind in (dispatch, "dense"):
        torch.manual_seed(0)
        layer = awake(MoELoRALayer(nn.Linear(8, 8), config(dispatch=kind, top_k=2)))
        loss = layer(x).square().sum() + sum(layer.aux_loss())
        grads.append(torch.autograd.grad(loss, [x, layer.router.weight, layer.lora_a, layer.lora_b]))
    for got, want in zip(*grads, strict=True):
        torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dispatch", ["grouped", "loop", "dense"])
def test_padding_is_neither_routed_nor_counted_whatever_it_holds(dispatch: str) -> None:
    layer = awake(MoELoRALayer(nn.Linear(8, 8), config(dispatch=dispatch)))
    x = torch.randn(2, 5, 8)
    mask = torch.tensor([[True] * 5, [True] * 2 + [False] * 3])
    alone = layer(x[mask])
    losses = layer.aux_loss()
    for rubbish in (0.0, 1e30, float("nan")):
        padded = x.clone()
        padded[~mask] = rubbish
        padded.requires_grad_()
        layer.state.token_mask = mask
        delta = layer.delta(padded)
        layer.zero_grad()
        (delta.square().sum() + sum(layer.aux_loss())).backward()
        torch.testing.assert_close(layer.base(x[mask]) + delta[mask], alone, atol=1e-5, rtol=1e-4)
        assert bool((delta[~mask] == 0).all()) and bool((padded.grad[~mask] == 0).all())
        assert all(bool(p.grad.isfinite().all()) for p in (layer.router.weight, layer.lora_a, layer.lora_b))
        for got, want in zip(layer.aux_loss(), losses, strict=True):
            torch.testing.assert_close(got, want)
    layer.state.token_mask = torch.tensor([True, True, False, False, False])
    assert bool((layer.delta(x)[:, 2:] == 0).all()) and bool((layer.delta(x)[:, :2] != 0).any())
    layer.state.token_mask = torch.ones(3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"token_mask must be boolean of shape \(2, 5\)"):
        layer(x)


def test_jitter_is_in_training_only_and_follows_its_seed() -> None:
    layer, x = awake(MoELoRALayer(nn.Linear(8, 8), config(jitter=0.5))), torch.randn(64, 8)
    layer.state.jitter_seed = 1
    first = (layer(x), layer.last.gate_logits)[1]
    assert torch.equal(first, (layer(x), layer.last.gate_logits)[1])
    layer.state.jitter_seed = 2
    assert not torch.equal(first, (layer(x), layer.last.gate_logits)[1])
    exact = x @ layer.router.weight.T
    layer.eval()
    torch.testing.assert_close((layer(x), layer.last.gate_logits)[1], exact)
    # u in [1 - jitter, 1 + jitter]: recover it where one input and one expert make the logit
    one = MoELoRALayer(nn.Linear(1, 1), config(num_experts=1, rank=1, jitter=0.25))
    nn.init.ones_(one.router.weight)
    one(torch.ones(4000, 1))
    u = one.last.gate_logits.detach()
    assert 0.75 <= float(u.min()) < 0.76 and 1.24 < float(u.max()) <= 1.25 and abs(float(u.mean()) - 1) < 0.01


def test_autocast_and_low_precision_parameters() -> None:
    layer, x = awake(MoELoRALayer(nn.Linear(8, 8), config(rank=8))), torch.randn(16, 8, requires_grad=True)
    exact = layer(x).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = layer(x)
        assert out.dtype == torch.bfloat16 and layer.last.gate_logits.dtype == torch.float32
        out.float().square().sum().backward()
    assert layer.lora_a.grad.dtype == torch.float32 and layer.router.weight.grad.dtype == torch.float32
    same = layer.last.expert_index == (x.bfloat16().float() @ layer.router.weight.T).argmax(-1, keepdim=True)
    assert bool(same.all())
    assert float((out.detach().float() - exact).norm() / exact.norm()) < 0.05
    layer.to(torch.bfloat16)
    assert layer.lora_a.dtype == torch.bfloat16 and layer.router.weight.dtype == torch.float32
    assert layer(x.detach().bfloat16()).dtype == torch.bfloat16
    # a base in bf16 beside experts in fp32
    mixed = MoELoRALayer(nn.Linear(8, 8, dtype=torch.bfloat16), config())
    assert mixed.lora_a.dtype == torch.float32 and mixed(x.detach().bfloat16()).dtype == torch.bfloat16


def test_backward_inside_autocast() -> None:
    layer, x = awake(MoELoRALayer(nn.Linear(8, 8), config())), torch.randn(16, 8)
    (want,) = torch.autograd.grad(layer(x).square().sum(), layer.lora_a)
    out = layer(x).square().sum()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        (got,) = torch.autograd.grad(out, layer.lora_a)
    torch.testing.assert_close(got, want)


def test_nan_in_the_gate_names_it() -> None:
    layer = MoELoRALayer(nn.Linear(8, 8), config())
    x = torch.randn(3, 8)
    x[2, 0] = float("nan")
    with pytest.raises(ValueError, match="1 of 3 tokens"):
        layer(x)


def test_initialisation_is_loras_and_follows_the_generator() -> None:
    state = torch.random.get_rng_state()
    a, b = (MoELoRALayer(nn.Identity(), config(), 64, 32, generator=torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), "a given generator leaves the default one alone"
    assert torch.equal(a.lora_a, b.lora_a) and torch.equal(a.router.weight, b.router.weight)
    assert bool((a.lora_b == 0).all()) and float(a.lora_a.abs().max()) <= 1 / 8
    assert float(a.lora_a.detach().std()) == pytest.approx(1 / 8 / 3**0.5, rel=0.1)
    assert not torch.equal(a.lora_a[0], a.lora_a[1])


def test_widths_are_inferred_or_asked_for() -> None:
    ffn = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 6))
    assert MoELoRALayer(ffn, config()).lora_b.shape == (4, 6, 4)
    with pytest.raises(ValueError, match="give in_features and out_features"):
        MoELoRALayer(nn.GELU(), config())
    with pytest.raises(ValueError, match="out_features"):
        MoELoRALayer(nn.GELU(), config(), 8, -1)
    assert MoELoRALayer(nn.Linear(4, 4).eval(), config()).training is False


def test_extra_arguments_reach_the_base() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
            return super().forward(x) * scale

    layer, x = MoELoRALayer(Scaled(4, 4), config()), torch.randn(2, 4)
    torch.testing.assert_close(layer(x, scale=3.0), layer.base(x) * 3)


@pytest.mark.parametrize(
    "changes",
    [
        {"rank": 0}, {"rank": 2.5}, {"num_experts": 0}, {"top_k": 0}, {"top_k": 5}, {"alpha": 0}, {"alpha": float("nan")}, {"jitter": 1.0},
        {"gating": "x"}, {"dispatch": "x"}, {"balance_coef": -1.0}, {"z_coef": float("inf")}, {"alpha": "8"}, {"jitter": None},
        {"alpha": True}, {"z_coef": [1]}, {"gating": ["x"]}, {"check_gate": "no"}, {"rank": "4"}, {"top_k": True},
    ],
)  # fmt: skip
def test_bad_config_is_named(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(changes))} must be.*got"):
        config(**changes)
