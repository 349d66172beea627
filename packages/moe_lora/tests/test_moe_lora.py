from __future__ import annotations

import json
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from moe_lora import (
    MoELoRAConfig,
    MoELoRALayer,
    inject,
    load_balance_loss,
    load_by_kind,
    mutual_information,
    reference,
    route,
    route_replay,
    router_z_loss,
)
from moe_lora.dispatch import experts
from torch import nn


def config(**changes: object) -> MoELoRAConfig:
    return MoELoRAConfig(**{"rank": 4, "alpha": 8.0, "num_experts": 4, "top_k": 1, **changes})  # type: ignore[arg-type]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))


def awake(handle) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.5, generator=g)


@pytest.mark.parametrize("dispatch", ["grouped", "loop", "dense"])
@given(
    n=st.integers(1, 9),
    e=st.integers(1, 5),
    k=st.integers(1, 5),
    r=st.sampled_from([1, 3, 4, 8]),
    d=st.sampled_from([4, 6, 8]),
    seed=st.integers(0, 99),
)
@settings(max_examples=30, deadline=None)
def test_dispatch_equals_reference_in_value_and_gradient(
    dispatch: str, n: int, e: int, k: int, r: int, d: int, seed: int
) -> None:
    k = min(k, e)
    g = torch.Generator().manual_seed(seed)
    h, a, b = (torch.randn(*s, generator=g, requires_grad=True) for s in ((n, d), (e, r, d), (e, 4, r)))
    w = torch.rand(n, k, generator=g, requires_grad=True)
    index = torch.rand(n, e, generator=g).argsort(1)[:, :k]
    weight = torch.randn(n, 4, generator=g)
    fast, slow = experts(h, a, b, w, index, dispatch), reference.experts(h, a, b, w, index)  # type: ignore[arg-type]
    torch.testing.assert_close(fast, slow, atol=1e-5, rtol=1e-4)
    got, want = (torch.autograd.grad((out * weight).sum(), (h, a, b, w)) for out in (fast, slow))
    for x, y in zip(got, want, strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_injection_changes_no_bit_and_removal_restores() -> None:
    net, x = model(), torch.randn(5, 8)
    plain, modules = net(x), list(net)
    handle = inject(net, config(), ["0", "2"])
    assert torch.equal(net(x), plain)
    awake(handle)
    assert not torch.allclose(net(x), plain)
    with handle.disable():
        assert torch.equal(net(x), plain)
    handle.remove()
    assert torch.equal(net(x), plain) and all(a is b for a, b in zip(net, modules, strict=True))


def test_top_1_router_learns_by_default_and_not_by_the_papers_letter() -> None:
    for gating, learns in (("softmax_then_topk", True), ("topk_then_softmax", False)):
        layer = MoELoRALayer(nn.Linear(8, 8), config(gating=gating))
        nn.init.normal_(layer.lora_b)
        layer(torch.randn(16, 8)).square().sum().backward()
        assert layer.router.weight.grad is not None
        assert bool(layer.router.weight.grad.abs().max() > 0) is learns


def test_one_expert_is_an_ordinary_lora() -> None:
    layer = MoELoRALayer(nn.Linear(8, 6), config(num_experts=1))
    nn.init.normal_(layer.lora_b)
    x = torch.randn(7, 8)
    torch.testing.assert_close(layer(x), layer.base(x) + 2.0 * x @ layer.lora_a[0].T @ layer.lora_b[0].T)


def test_balance_and_z_by_hand() -> None:
    logits = torch.zeros(8, 4)
    index = torch.arange(8)[:, None] % 4
    torch.testing.assert_close(load_balance_loss(logits, index), torch.tensor(1.0))
    skewed = torch.full((8, 4), -20.0)
    skewed[:, 0] = 20
    torch.testing.assert_close(load_balance_loss(skewed, torch.zeros_like(index)), torch.tensor(4.0))
    torch.testing.assert_close(router_z_loss(logits), torch.tensor(4.0).log().square())
    mask = torch.arange(8) < 4
    torch.testing.assert_close(
        load_balance_loss(torch.cat([logits[:4], skewed[:4]]), torch.cat([index[:4], index[:4] * 0]), mask),
        torch.tensor(1.0),
    )


def test_masked_tokens_are_not_routed() -> None:
    layer = MoELoRALayer(nn.Linear(8, 8), config())
    nn.init.normal_(layer.lora_b)
    x, layer.state.token_mask = torch.randn(4, 8), torch.tensor([True, False, True, False])
    delta = layer(x) - layer.base(x)
    assert bool((delta[1::2] == 0).all()) and bool((delta[::2] != 0).any())


def test_aux_loss_has_a_gradient_and_is_forgotten() -> None:
    net = model()
    handle = inject(net, config(), ["0", "2"])
    net(torch.randn(16, 8))
    assert set(handle.stats()) == {"0", "2"}
    handle.aux_loss().backward()
    assert handle.layers["0"].router.weight.grad is not None
    assert handle.aux_loss() == 0


def test_files_round_trip_and_errors_name_what_is_wrong(tmp_path: Path) -> None:
    first, second, x = model(), model(), torch.randn(5, 8)
    handle = inject(first, config(), ["0", "2"])
    awake(handle)
    handle.save(tmp_path)
    again = inject(second, config(), ["0", "2"])
    again.load(tmp_path)
    assert torch.equal(first(x), second(x))
    with pytest.raises(ValueError, match="rank"):
        inject(model(), config(rank=2), ["0", "2"]).load(tmp_path)
    with pytest.raises(ValueError, match="targets"):
        inject(model(), config(), ["0"]).load(tmp_path)
    (tmp_path / "moe_lora.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="safetensors"):
        again.load(tmp_path)
    (tmp_path / "moe_lora.json").write_text(json.dumps({"format": 9}))
    with pytest.raises(ValueError, match="format"):
        again.load(tmp_path)


def test_replay_is_exact_and_changes_the_choice() -> None:
    net, x = model(), torch.randn(32, 8)
    handle = inject(net, config(), ["0", "2"])
    awake(handle)
    with route_replay.record(handle) as kept:
        first = net(x)
    with route_replay.replay(handle, kept):
        assert torch.equal(net(x), first)
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.router.weight.neg_()
    free = [layer.last.expert_index.clone() for layer in handle.layers.values() if net(x) is not None and layer.last]
    with route_replay.replay(handle, kept):
        net(x)
        used = [layer.last.expert_index for layer in handle.layers.values() if layer.last]
    assert all(torch.equal(u, c[0].long()) for u, c in zip(used, kept.choices.values(), strict=True))
    assert any(not torch.equal(u, f) for u, f in zip(used, free, strict=True))
    twice = torch.nn.Sequential(net, torch.nn.Identity())
    with route_replay.replay(handle, kept):
        twice(x)
        with pytest.raises(ValueError, match="passes"):
            net(x)


def test_statistics() -> None:
    kinds = torch.tensor([0, 0, 1, 1])
    assert mutual_information(load_by_kind(torch.tensor([[0], [1], [0], [1]]), kinds, 2)) == pytest.approx(0, abs=1e-9)
    assert mutual_information(load_by_kind(torch.tensor([[0], [0], [1], [1]]), kinds, 2)) == pytest.approx(
        0.6931, abs=1e-3
    )


@pytest.mark.parametrize(
    "changes",
    [{"rank": 0}, {"num_experts": 0}, {"top_k": 5}, {"alpha": 0}, {"jitter": 1.0}, {"gating": "x"}, {"dispatch": "x"}],
)
def test_bad_config_is_named(changes: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=next(iter(changes))):
        config(**changes)


def test_targets_that_match_nothing_list_near_names() -> None:
    with pytest.raises(ValueError, match="nearest"):
        inject(model(), config(), ["ff"])


def test_top_k_weights_of_both_gatings() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    p = logits.softmax(-1)
    torch.testing.assert_close(route(logits, 2, "softmax_then_topk").gate_weights, p[:, :2])
    torch.testing.assert_close(route(logits, 2, "topk_then_softmax").gate_weights, p[:, :2] / p[:, :2].sum())


def test_bfloat16_autocast() -> None:
    net, x = model(), torch.randn(16, 8)
    handle = inject(net, config(rank=8), ["0", "2"])
    awake(handle)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = net(x)
    torch.testing.assert_close(out.float(), net(x), atol=0.3, rtol=0.1)
    assert all(
        layer.last is not None and layer.last.gate_logits.dtype == torch.float32 for layer in handle.layers.values()
    )
