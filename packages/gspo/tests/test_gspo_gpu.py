"""On a card: a policy in bf16 has ratio 1 before its first update, whatever the kernel. Bodies run on the CPU as well."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from gspo import (
    DanceSDE,
    FlowCPS,
    FlowSDE,
    OnlineConfig,
    OnlineTrainer,
    PolicyConfig,
    PolicyTrainer,
    SignalLog,
    SlidingWindow,
    group_advantages,
    rescore,
    rollout,
    sequence_importance_ratio,
)

NO_CARD = "needs a CUDA device, and there is none here"
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason=NO_CARD)]
KERNELS = {"flow_sde": FlowSDE, "flow_cps": FlowCPS, "dance_sde": DanceSDE}


def policy_of(device: str, dtype: torch.dtype) -> tuple[torch.nn.Module, Callable[..., torch.Tensor]]:
    """Two layers in ``dtype``; the velocity comes out in float32, as a trainer has it."""
    torch.manual_seed(0)
    layers = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.GELU(), torch.nn.Linear(256, 64)).to(device, dtype)
    return layers, lambda x, sigma, index: layers(x.to(dtype)).float()


def on_policy(device: str, dtype: torch.dtype, kernel: str) -> None:
    """Scored again, the rollout has the log-probabilities that it was drawn with; the update finds the ratio 1 and moves the weights."""
    layers, velocity = policy_of(device, dtype)
    generator = torch.Generator(device).manual_seed(0)
    noise = torch.randn(3, 64, generator=generator, device=device)
    made = KERNELS[kernel]()
    drawn = rollout(
        velocity, noise, torch.linspace(1, 0, 9), kernel=made, window=(1, 2), group_size=4, generator=generator
    )
    with torch.no_grad():
        again = rescore(velocity, drawn, made)
    ratio = sequence_importance_ratio(again.log_prob_mean, drawn.log_prob_mean)
    assert torch.equal(ratio, torch.ones_like(ratio))
    before = [p.detach().clone() for p in layers.parameters()]
    trainer = PolicyTrainer(
        list(layers.parameters()), torch.optim.SGD(layers.parameters(), lr=10.0), PolicyConfig(off_policy="raise")
    )
    statistics = trainer.update(velocity, drawn, group_advantages(drawn.latents.sum(1), drawn.index), made)
    assert not statistics.skipped
    assert any(not torch.equal(a, b) for a, b in zip(before, layers.parameters(), strict=True))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        pytest.param("cuda", torch.bfloat16, marks=GPU),
        pytest.param("cuda", torch.float32, marks=GPU),
        ("cpu", torch.bfloat16),
    ],
)
def test_the_ratio_is_one_before_the_first_update(device: str, dtype: torch.dtype, kernel: str) -> None:
    on_policy(device, dtype, kernel)


def same_on_both(device: str) -> None:
    """Noise that is drawn on the CPU: the same rollout wherever it is computed, to rounding."""
    found = []
    for where in ("cpu", device):
        _, velocity = policy_of("cpu", torch.float32)
        layers, velocity = policy_of(where, torch.float32)
        layers.load_state_dict(policy_of("cpu", torch.float32)[0].state_dict())
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(2, 64, generator=generator).to(where)
        drawn = rollout(
            velocity, noise, torch.linspace(1, 0, 9), kernel=FlowSDE(), window=(0, 1), group_size=2, generator=generator
        )
        found.append((drawn.latents.cpu(), drawn.log_prob_mean.cpu()))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_a_rollout_does_not_depend_on_the_device(device: str) -> None:
    same_on_both(device)


def split_batch_rewards(device: str) -> torch.Tensor:
    """Of one step of a trainer that shares its batch; the generator of the rollout's noise is on the CPU, wherever the latents are."""
    layers, velocity = policy_of("cpu", torch.float32)
    layers.to(device)
    trainer = OnlineTrainer(
        list(layers.parameters()),
        torch.optim.SGD(layers.parameters(), lr=0.1),
        OnlineConfig(window=SlidingWindow(num_steps=8, size=2), group_size=2, split_batch=True),
    )
    noise = torch.randn(2, 64, generator=torch.Generator().manual_seed(1)).to(device)
    return trainer.step(velocity, noise, torch.linspace(1, 0, 9), lambda x, index: x[:, 0]).rewards.cpu()


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_a_split_batch_draws_the_same_on_every_device(device: str) -> None:
    torch.testing.assert_close(split_batch_rewards(device), split_batch_rewards("cpu"), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", [pytest.param("cuda", marks=GPU), "cpu"])
def test_a_signal_log_goes_on_from_a_checkpoint_that_was_read_on_the_cpu(device: str) -> None:
    parameter = torch.nn.Parameter(torch.zeros(8, device=device))
    log = SignalLog(walk_window=3)
    for step in range(9):
        parameter.grad = torch.ones(8, device=device)
        found = log.observe([parameter], num_samples=4)
        state = {name: tensor.cpu() for name, tensor in log.state_dict().items()}
        log = SignalLog(walk_window=3)
        log.load_state_dict(state)
        with torch.no_grad():
            parameter.sub_(0.1 * (step + 1))
    assert found["gradient_cosine"] == pytest.approx(1) and found["walk_ratio"] > 1
