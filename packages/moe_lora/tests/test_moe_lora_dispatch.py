"""The three dispatches against the slow twin."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from moe_lora import experts, grouped, reference
from torch import Tensor

DISPATCHES = ["grouped", "loop", "dense"]


def draw(n: int, e: int, k: int, r: int, d: int, o: int, seed: int, masked: float = 0.0) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    h, a, b = (torch.randn(*s, generator=g, requires_grad=True) for s in ((n, d), (e, r, d), (e, o, r)))
    w = torch.rand(n, k, generator=g, requires_grad=True)
    index = torch.rand(n, e, generator=g).argsort(1)[:, :k]
    index = index.masked_fill(torch.rand(n, k, generator=g) < masked, -1)  # some of a token's experts, or all
    return h, a, b, w, index, torch.randn(n, o, generator=g)


def values_and_gradients(inputs: tuple[Tensor, ...], dispatch: str | None) -> list[Tensor]:
    *leaves, index, weight = inputs
    out = experts(*leaves, index, dispatch) if dispatch else reference.experts(*leaves, index)  # type: ignore[arg-type]
    anchor = sum(t.sum() * 0 for t in leaves)  # nothing routed, no graph
    return [out, *torch.autograd.grad((out * weight).sum() + anchor, leaves)]


@pytest.fixture(params=["slices", "grouped_mm"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways of "grouped": the CPU's, and the accelerator's, which the CPU can compute too."""
    if request.param == "grouped_mm":
        if not hasattr(torch.nn.functional, "grouped_mm"):
            pytest.skip(f"torch {torch.__version__} has no grouped_mm")
        monkeypatch.setattr(grouped, "use_grouped_mm", lambda *t: True)
    return str(request.param)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@given(
    n=st.integers(0, 9),
    e=st.integers(1, 5),
    k=st.integers(1, 5),
    r=st.sampled_from([1, 3, 4, 8]),
    d=st.sampled_from([1, 5, 6, 8]),
    o=st.sampled_from([1, 4, 7]),
    masked=st.sampled_from([0.0, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
@settings(max_examples=40, deadline=None)
def test_equals_reference_in_value_and_gradient(
    dispatch: str, n: int, e: int, k: int, r: int, d: int, o: int, masked: float, seed: int
) -> None:
    inputs = draw(n, e, min(k, e), r, d, o, seed, masked)
    for got, want in zip(values_and_gradients(inputs, dispatch), values_and_gradients(inputs, None), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("k", "masked"), [(1, 0.0), (1, 0.4), (3, 0.0), (3, 0.4)])
def test_both_ways_of_grouped_equal_reference(path: str, k: int, masked: float) -> None:
    inputs = draw(33, 4, k, 8, 16, 12, seed=3, masked=masked)
    for got, want in zip(values_and_gradients(inputs, "grouped"), values_and_gradients(inputs, None), strict=True):
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dispatch", DISPATCHES)
@pytest.mark.parametrize("k", [1, 2])
def test_bfloat16_equals_reference_in_float32_to_rounding(dispatch: str, k: int) -> None:
    *leaves, index, weight = draw(40, 4, k, 8, 24, 16, seed=1)
    half = [t.detach().bfloat16().requires_grad_() for t in leaves[:3]]
    exact = [t.detach().float().requires_grad_() for t in half]
    out = experts(*half, leaves[3], index, dispatch)  # type: ignore[arg-type]
    want = reference.experts(*exact, leaves[3], index)
    assert out.dtype == torch.bfloat16
    got_grads = torch.autograd.grad((out * weight.bfloat16()).sum(), [*half, leaves[3]])
    want_grads = torch.autograd.grad((want * weight).sum(), [*exact, leaves[3]])
    for got, true in zip([out, *got_grads], [want, *want_grads], strict=True):
        # 2^-8 per rounding, a handful of roundings
        assert float((got.float() - true).detach().norm() / true.detach().norm()) < 0.02


def test_bfloat16_of_grouped_mm(path: str) -> None:
    *leaves, index, _ = draw(40, 4, 2, 8, 24, 16, seed=1)
    half = [t.detach().bfloat16() for t in leaves[:3]]
    got, want = (
        experts(*half, leaves[3].detach(), index),
        reference.experts(*[t.float() for t in half], leaves[3], index),
    )
    assert float((got.float() - want).detach().norm() / want.detach().norm()) < 0.02


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_gradient_check_in_float64(dispatch: str) -> None:
    *leaves, index, _ = draw(5, 3, 2, 2, 3, 4, seed=0, masked=0.2)
    double = [t.detach().double().requires_grad_() for t in leaves]
    # gate weights reach the experts in their type: fp64 here
    assert torch.autograd.gradcheck(lambda *x: experts(*x, index, dispatch), double)  # type: ignore[arg-type]


@pytest.mark.parametrize("dispatch", ["loop", "dense"])
def test_plain_autograd_dispatches_are_twice_differentiable(dispatch: str) -> None:
    *leaves, index, _ = draw(4, 2, 1, 2, 3, 3, seed=0)
    double = [t.detach().double().requires_grad_() for t in leaves]
    assert torch.autograd.gradgradcheck(lambda *x: experts(*x, index, dispatch), double)  # type: ignore[arg-type]


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_an_expert_without_tokens_gets_a_zero_gradient(dispatch: str) -> None:
    h, a, b, w, index, weight = draw(6, 4, 1, 3, 4, 4, seed=0)
    index = torch.where(index == 2, 0, index)
    out = experts(h, a, b, w, index, dispatch)  # type: ignore[arg-type]
    (out * weight).sum().backward()
    assert bool((a.grad[2] == 0).all()) and bool((b.grad[2] == 0).all())
    assert bool((a.grad[0] != 0).any())


def test_only_wanted_gradients_are_made(path: str) -> None:
    *leaves, index, weight = draw(12, 3, 2, 4, 8, 8, seed=2)
    full = values_and_gradients((*leaves, index, weight), "grouped")[1:]
    for wanted in range(4):
        inputs = [t if i == wanted else t.detach() for i, t in enumerate(leaves)]
        out = experts(*inputs, index)
        (grad,) = torch.autograd.grad((out * weight).sum(), [inputs[wanted]])
        torch.testing.assert_close(grad, full[wanted])


def test_repeats_to_the_bit(path: str) -> None:
    inputs = draw(200, 5, 3, 8, 16, 16, seed=4)
    first, second = values_and_gradients(inputs, "grouped"), values_and_gradients(inputs, "grouped")
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))
    torch.use_deterministic_algorithms(True)
    try:
        assert all(torch.equal(x, y) for x, y in zip(first, values_and_gradients(inputs, "grouped"), strict=True))
    finally:
        torch.use_deterministic_algorithms(False)


def test_tokens_in_any_memory_order() -> None:
    h, a, b, w, index, weight = draw(8, 3, 1, 4, 8, 8, seed=5)
    turned = h.detach().T.contiguous().T.requires_grad_()
    assert not turned.is_contiguous()
    got, want = (
        values_and_gradients((turned, a, b, w, index, weight), "grouped"),
        values_and_gradients((h, a, b, w, index, weight), None),
    )
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)
    # a gradient that arrives expanded
    (grad,) = torch.autograd.grad(experts(h, a, b, w, index).sum(), [h])
    (true,) = torch.autograd.grad(reference.experts(h, a, b, w, index).sum(), [h])
    torch.testing.assert_close(grad, true, atol=1e-5, rtol=1e-4)


def test_the_operator_obeys_torchs_rules() -> None:
    h, a, b, w, index, _ = draw(6, 3, 2, 4, 8, 8, seed=6)
    torch.library.opcheck(torch.ops.moe_lora.experts.default, (h, a, b, w, index))


def test_grouped_mm_is_for_accelerators_and_aligned_widths(monkeypatch: pytest.MonkeyPatch) -> None:
    fits, does_not = torch.empty(2, 8, device="meta"), torch.empty(2, 6, device="meta")
    monkeypatch.setattr(torch.nn.functional, "grouped_mm", lambda *t: None, raising=False)
    assert grouped.use_grouped_mm(fits) and not grouped.use_grouped_mm(fits, does_not)
    assert not grouped.use_grouped_mm(torch.empty(2, 8))
    # an older torch has none: the slices serve there
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    assert not grouped.use_grouped_mm(fits)


def test_the_graph_keeps_what_a_plain_lora_keeps() -> None:
    """Beside the tokens and the parameters, which exist anyway: A h and a few numbers per token."""
    n, d, r = 256, 128, 32
    h, a, b, w, index, _ = draw(n, 4, 1, r, d, d, seed=7)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        experts(h, a, b, w, index)
    own = {t.data_ptr(): t.numel() * t.element_size() for t in kept}
    for before in (h, a, b):
        own.pop(before.data_ptr())
    assert sum(own.values()) <= n * r * 4 + n * 24 + 64
