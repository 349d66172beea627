"""The rollout's routing in the update."""

from __future__ import annotations

import pytest
import torch
from moe_lora import MoELoRA, MoELoRAConfig, RouteRecord, inject, route_replay
from torch import nn


def build(gating: str = "softmax_then_topk", top_k: int = 1) -> tuple[nn.Sequential, MoELoRA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    handle = inject(net, MoELoRAConfig(rank=4, alpha=8.0, top_k=top_k, gating=gating), ["0", "2"])  # type: ignore[arg-type]
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.5)
    return net, handle


X = torch.randn(3, 10, 8)


@pytest.mark.parametrize("gating", ["softmax_then_topk", "topk_then_softmax"])
@pytest.mark.parametrize("top_k", [1, 2])
def test_replay_with_unchanged_weights_is_equal_to_the_bit(gating: str, top_k: int) -> None:
    net, handle = build(gating, top_k)
    with route_replay.record(handle) as kept:
        first = net(X)
    free = torch.autograd.grad(first.square().sum(), list(handle.parameters()))
    with route_replay.replay(handle, kept):
        again = net(X)
    assert torch.equal(again, first)
    replayed = torch.autograd.grad(again.square().sum(), list(handle.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(free, replayed, strict=True))
    assert all(layer.state.override is None and not layer.state.observers for layer in handle.layers.values())


def test_replay_keeps_the_choice_when_the_router_moved_and_still_trains_it() -> None:
    net, handle = build()
    with route_replay.record(handle) as kept:
        net(X)
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.router.weight.neg_()
    net(X)
    free = [layer.last.expert_index for layer in handle.layers.values()]
    with route_replay.replay(handle, kept):
        out = net(X)
    used = [layer.last for layer in handle.layers.values()]
    for routing, passes, other in zip(used, kept.choices.values(), free, strict=True):
        assert torch.equal(routing.expert_index, passes[0].view(-1, 1).long())
        assert not torch.equal(routing.expert_index, other)
        p = routing.gate_logits.softmax(-1).gather(-1, routing.expert_index)
        torch.testing.assert_close(routing.gate_weights, p)
    (grad,) = torch.autograd.grad(out.square().sum(), handle.layers["2"].router.weight)
    assert float(grad.abs().sum()) > 0


def test_rows_and_passes_of_a_rollout_in_smaller_updates() -> None:
    net, handle = build()
    steps = [X, 2 * X, -X]
    with route_replay.record(handle) as kept:
        outs = [net(x) for x in steps]
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.router.weight.neg_()
    part = kept.rows([2, 0]).passes([1, 2])
    with route_replay.replay(handle, part):
        for x, out in zip(steps[1:], outs[1:], strict=True):
            net(x[[2, 0]])
            want = kept.choices["0"][1 if x is steps[1] else 2][[2, 0]]
            assert torch.equal(handle.layers["0"].last.expert_index.view(2, 10, 1).short(), want)
            assert out.shape == (3, 10, 8)
    with route_replay.replay(handle, kept, start=2):
        net(-X)
        assert torch.equal(handle.layers["0"].last.expert_index.view(3, 10, 1).short(), kept.choices["0"][2])


def test_parts_of_a_batch_join_to_the_whole() -> None:
    net, handle = build()
    with route_replay.record(handle) as kept:
        net(X)
        net(-X)
    joined = route_replay.RouteRecord.joined([kept.rows([0]), kept.rows([1, 2])])
    assert list(joined.choices) == list(kept.choices)
    for name, passes in kept.choices.items():
        assert all(torch.equal(a, b) for a, b in zip(joined.choices[name], passes, strict=True))
    for parts in ([], [kept, kept.passes([0])], [kept, route_replay.RouteRecord()]):
        with pytest.raises(ValueError, match="parts must be records of the same layers and passes"):
            route_replay.RouteRecord.joined(parts)


def test_the_mask_is_part_of_the_record() -> None:
    net, handle = build()
    with handle.token_mask(torch.arange(10) < 6), route_replay.record(handle) as kept:
        first = net(X)
    assert bool((kept.choices["0"][0][:, 6:] == -1).all())
    with route_replay.replay(handle, kept):
        torch.testing.assert_close(net(X), first)


def test_bad_records_are_named() -> None:
    net, handle = build()
    with route_replay.record(handle) as kept:
        net(X)
    with route_replay.replay(handle, kept):
        net(X)
        with pytest.raises(ValueError, match="pass 1 of '0', got 1 passes"):
            net(X)
    with route_replay.replay(handle, kept), pytest.raises(ValueError, match=r"shape \(2, 10, 1\), got \(3, 10, 1\)"):
        net(X[:2])
    with (
        pytest.raises(ValueError, match=r"none for \['2'\]"),
        route_replay.replay(handle, RouteRecord({"0": kept.choices["0"]})),
    ):
        pass
    with pytest.raises(ValueError, match="start"), route_replay.replay(handle, kept, start=-1):
        pass
    wild = RouteRecord({n: [p + 9 for p in passes] for n, passes in kept.choices.items()})
    with route_replay.replay(handle, wild), pytest.raises(ValueError, match="experts below 4"):
        net(X)
