"""Gradient checkpointing runs a block twice: nothing may double, get lost or be drawn anew."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from moe_lora import MoELoRA, MoELoRAConfig, collect, inject, route_replay
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Net(nn.Module):
    """Two residual blocks, checkpointed or not."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            y = block(x) if self.how == "plain" else checkpoint(block, x, use_reentrant=self.how == "reentrant")
            x = x + y
        return x


def build(how: str, **changes: object) -> tuple[Net, MoELoRA]:
    torch.manual_seed(0)
    net = Net(how)
    handle = inject(net, MoELoRAConfig(rank=4, alpha=8.0, **changes), r"blocks\.\d")  # type: ignore[arg-type]
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.5)
    return net, handle


def gradients(how: str, run: Callable[[Net, MoELoRA], Tensor], **changes: object) -> list[Tensor]:
    net, handle = build(how, **changes)
    loss = run(net, handle)
    if loss.requires_grad:
        loss.backward()
    return [p.grad for p in handle.parameters()]


X = torch.randn(3, 7, 8, generator=torch.Generator().manual_seed(1))


def compare(run: Callable[[Net, MoELoRA], Tensor], **changes: object) -> None:
    for got, want in zip(gradients("checkpoint", run, **changes), gradients("plain", run, **changes), strict=True):
        torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_gradients_and_router_losses() -> None:
    compare(lambda net, handle: net(X).square().sum() + 30 * handle.aux_loss())


def test_router_losses_alone_reach_the_router() -> None:
    def run(net: Net, handle: MoELoRA) -> Tensor:
        net(X)
        return 30 * handle.aux_loss()

    assert float(gradients("checkpoint", run)[0].abs().sum()) > 0
    for got, want in zip(gradients("checkpoint", run), gradients("plain", run), strict=True):
        if want is not None:
            torch.testing.assert_close(got, want, atol=1e-6, rtol=1e-5)


def test_nothing_is_kept_by_the_second_pass() -> None:
    net, handle = build("checkpoint")
    with collect(handle) as log, route_replay.record(handle) as kept:
        loss = net(X).square().sum() + handle.aux_loss()
        loss.backward()
    assert all(layer.last is None for layer in handle.layers.values())
    assert all(len(passes) == 1 for passes in [*log.counts.values(), *kept.choices.values()])


@pytest.mark.parametrize("seeded", [True, False])
def test_jitter_is_the_same_in_both_passes(seeded: bool) -> None:
    def run(net: Net, handle: MoELoRA) -> Tensor:
        if seeded:
            handle.jitter(torch.Generator().manual_seed(7))
        torch.manual_seed(11)
        return net(X).square().sum()

    compare(run, jitter=0.4)


def test_seeds_of_jitter_follow_the_generator() -> None:
    _, handle = build("plain", jitter=0.4)

    def seeds(seed: int) -> list[int | None]:
        handle.jitter(torch.Generator().manual_seed(seed))
        return [layer.state.jitter_seed for layer in handle.layers.values()]

    assert seeds(1) == seeds(1) != seeds(2) and len(set(seeds(1))) == 2


def test_token_mask_has_to_enclose_backward() -> None:
    mask = torch.arange(7) < 5

    def run(net: Net, handle: MoELoRA) -> Tensor:
        with handle.token_mask(mask):
            loss = net(X).square().sum()
            loss.backward()
        return torch.zeros(())

    compare(run)
    net, handle = build("checkpoint")
    with handle.token_mask(mask):
        loss = net(X).square().sum()
    with pytest.raises(RuntimeError, match="inside the token_mask or replay context"):
        loss.backward()


def test_replay_under_checkpointing_is_exact() -> None:
    """Records of another router, two passes before one backward: both second passes find their own."""
    rival, other = build("plain")
    with torch.no_grad():
        for layer in other.layers.values():
            layer.router.weight.neg_()
    with route_replay.record(other) as kept:
        rival(X)
        rival(-X)

    def run(net: Net, handle: MoELoRA) -> Tensor:
        with route_replay.replay(handle, kept):
            loss = net(X).square().sum() + net(-X).pow(4).sum()
            loss.backward()
        return torch.zeros(())

    compare(run)
    free = gradients("plain", lambda net, handle: net(X).square().sum() + net(-X).pow(4).sum())
    assert not torch.allclose(free[1], gradients("plain", run)[1]), "the record makes a difference"


def test_reentrant_checkpointing_trains_experts_but_says_that_the_losses_cannot() -> None:
    x = X.clone().requires_grad_()
    want = gradients("plain", lambda net, handle: net(x).square().sum())
    got = gradients("reentrant", lambda net, handle: net(x).square().sum())
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w, atol=1e-6, rtol=1e-5)
    net, handle = build("reentrant")
    net(x)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        handle.aux_loss()
    with torch.no_grad():
        assert handle.aux_loss() > 0
