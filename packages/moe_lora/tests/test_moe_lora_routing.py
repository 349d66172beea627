"""Gates, their gradients, their losses."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from moe_lora import gate_logits, load_balance_loss, reference, route, router_z_loss
from moe_lora.routing import Router


@pytest.mark.parametrize("gating", ["softmax_then_topk", "topk_then_softmax"])
@given(n=st.integers(1, 6), e=st.integers(1, 5), k=st.integers(1, 5), seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_route_equals_reference(gating: str, n: int, e: int, k: int, seed: int) -> None:
    logits = torch.randn(n, e, generator=torch.Generator().manual_seed(seed), requires_grad=True)
    got, want = route(logits, min(k, e), gating), reference.gate_weights(logits, min(k, e), gating)  # type: ignore[arg-type]
    for token, row in enumerate(want):
        assert set(row) == set(got.expert_index[token].tolist())
        for slot, i in enumerate(got.expert_index[token].tolist()):
            torch.testing.assert_close(got.gate_weights[token, slot], row[i])
    scale = torch.randn(n, min(k, e))
    (grad,) = torch.autograd.grad((got.gate_weights * scale).sum(), logits, retain_graph=True)
    slow = sum(scale[t, s] * want[t][i] for t in range(n) for s, i in enumerate(got.expert_index[t].tolist()))
    (true,) = torch.autograd.grad(slow, logits)
    torch.testing.assert_close(grad, true, atol=1e-6, rtol=1e-4)


def test_weights_by_hand() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(route(logits, 2, "softmax_then_topk").gate_weights, p[:, :2])
    torch.testing.assert_close(route(logits, 2, "topk_then_softmax").gate_weights, p[:, :2] / p[:, :2].sum())
    given_experts = route(logits, 1, "softmax_then_topk", expert_index=torch.tensor([[2]]))
    torch.testing.assert_close(given_experts.gate_weights, p[:, 2:])
    none = route(logits, 2, "softmax_then_topk", expert_index=torch.tensor([[1, -1]]))
    torch.testing.assert_close(none.gate_weights, torch.tensor([[float(p[0, 1]), 0.0]]))


def test_masked_tokens_go_nowhere() -> None:
    logits = torch.randn(4, 3)
    logits[1] = float("nan")
    mask = torch.tensor([True, False, True, True])
    routing = route(logits, 2, "softmax_then_topk", token_mask=mask)
    assert routing.expert_index[1].tolist() == [-1, -1] and routing.gate_weights[1].tolist() == [0, 0]
    free = route(logits[mask], 2, "softmax_then_topk")
    assert torch.equal(routing.expert_index[mask], free.expert_index)
    assert torch.equal(routing.gate_weights[mask], free.gate_weights)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("gating", ["softmax_then_topk", "topk_then_softmax"])
def test_nan_in_the_gate_is_an_error(value: float, gating: str) -> None:
    logits = torch.zeros(3, 2)
    logits[1, 0] = value
    with pytest.raises(ValueError, match=r"gate_logits.*1 of 3 tokens"):
        route(logits, 1, gating)  # type: ignore[arg-type]
    route(logits, 1, gating, check_gate=False)  # type: ignore[arg-type]


def test_an_expert_can_be_switched_off_by_minus_infinity() -> None:
    logits = torch.zeros(2, 3)
    logits[:, 1] = -float("inf")
    assert 1 not in route(logits, 2, "softmax_then_topk").expert_index


def test_gate_logits_are_float32_and_their_gradient_joins_the_rest() -> None:
    w = torch.randn(3, 5, requires_grad=True)
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 2e-2)):
        h = torch.randn(4, 5).to(dtype).requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            passed, logits = gate_logits(h, w)
        assert logits.dtype == torch.float32 and passed.dtype == dtype
        torch.testing.assert_close(logits, h.float() @ w.T)
        x, y = torch.randn(4, 5), torch.randn(4, 3)
        got = torch.autograd.grad((passed * x.to(dtype)).sum() + (logits * y).sum(), [h, w])
        torch.testing.assert_close(got[0].float(), x.to(dtype).float() + y @ w, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(got[1], y.T @ h.float())
        (alone,) = torch.autograd.grad((gate_logits(h, w)[1] * y).sum(), h)
        torch.testing.assert_close(alone.float(), y @ w, atol=tolerance, rtol=tolerance)


def test_gate_logits_leave_the_gradients_of_others_alone() -> None:
    """An addition hands one gradient to both summands: adding the router's part in place would change the other's too."""
    h, w, y = (torch.randn(n, 5, requires_grad=True) for n in (4, 3, 4))
    scale, other = torch.randn(4, 5), y.tanh()  # made before, so its backward runs after the router's
    passed, logits = gate_logits(h, w)
    got = torch.autograd.grad(((passed + other) * scale).sum() + logits.square().sum(), [y, h])
    torch.testing.assert_close(got[0], (scale * (1 - y.tanh() ** 2)).detach())
    torch.testing.assert_close(got[1], (scale + 2 * (h @ w.T) @ w).detach(), atol=1e-4, rtol=1e-4)


def test_gate_logits_are_twice_differentiable() -> None:
    h, w = (torch.randn(3, 4, dtype=torch.float64).requires_grad_() for _ in range(2))

    def through(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        passed, logits = gate_logits(h, w)
        return passed.square().sum() + logits.square().sum()

    def float32_is_coarse(h: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return through(h.float(), w.float())

    (g,) = torch.autograd.grad(float32_is_coarse(h, w), h, create_graph=True)
    (second,) = torch.autograd.grad(g.sum(), h)
    want = 2 * torch.ones_like(h) + 2 * (torch.ones(3, 4, dtype=torch.float64) @ w.T @ w).detach()
    torch.testing.assert_close(second, want, atol=1e-4, rtol=1e-4)


def test_router_stays_float32() -> None:
    router = Router(4, 2)
    torch.nn.init.normal_(router.weight)
    before = router.weight.detach().clone()
    torch.nn.Sequential(router, torch.nn.Linear(2, 2)).to(torch.bfloat16)
    assert router.weight.dtype == torch.float32 and torch.equal(router.weight, before)
    assert Router(4, 2).to("meta").weight.device.type == "meta"


def test_balance_by_hand() -> None:
    logits, index = torch.zeros(8, 4), torch.arange(8)[:, None] % 4
    torch.testing.assert_close(load_balance_loss(logits, index), torch.tensor(1.0))
    skewed = torch.full((8, 4), -20.0)
    skewed[:, 0] = 20
    torch.testing.assert_close(load_balance_loss(skewed, torch.zeros_like(index)), torch.tensor(4.0))


@given(n=st.integers(1, 8), e=st.integers(1, 4), k=st.integers(1, 4), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_losses_equal_reference_and_do_not_count_padding(n: int, e: int, k: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, e, generator=g, requires_grad=True)
    index = torch.rand(n, e, generator=g).argsort(1)[:, : min(k, e)]
    mask = torch.rand(n, generator=g) < 0.6
    mask[0] = True
    want = reference.load_balance_loss(logits, index, mask)
    padded = index.masked_fill(~mask[:, None], -1)
    for got in (load_balance_loss(logits, index, mask), load_balance_loss(logits, padded)):
        torch.testing.assert_close(got, want)
        (grad,) = torch.autograd.grad(got, logits)
        (true,) = torch.autograd.grad(want, logits, retain_graph=True)
        torch.testing.assert_close(grad, true, atol=1e-6, rtol=1e-4)
    z = sum(row.exp().sum().log() ** 2 for row in logits[mask]) / mask.sum()
    torch.testing.assert_close(router_z_loss(logits, mask), z, atol=1e-6, rtol=1e-5)


def test_losses_without_a_token_are_zero_and_still_have_a_gradient() -> None:
    logits, index = torch.randn(3, 2, requires_grad=True), torch.full((3, 1), -1)
    loss = load_balance_loss(logits, index) + router_z_loss(logits, torch.zeros(3, dtype=torch.bool))
    loss.backward()
    assert loss == 0 and bool((logits.grad == 0).all())
    assert router_z_loss(torch.zeros(0, 2)) == 0


def test_losses_pull_the_right_way() -> None:
    """A step down the balance loss takes from the busy expert, one down the z-loss shrinks the logits."""
    logits = torch.tensor([[1.0, 0.0], [2.0, 0.0], [1.5, 0.0]], requires_grad=True)
    index = torch.zeros(3, 1, dtype=torch.int64)
    (grad,) = torch.autograd.grad(load_balance_loss(logits, index), logits)
    assert bool((grad[:, 0] > 0).all() and (grad[:, 1] < 0).all())
    (grad,) = torch.autograd.grad(router_z_loss(logits), logits)
    assert bool((grad > 0).all())
