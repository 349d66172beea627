"""The trainer of objectives: what it accumulates equals one graph, and its old policy follows as it should."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from gspo import (
    AdvantageWeightedMatching,
    DecaySchedule,
    DiffusionNFT,
    MovingAverage,
    NoiseLevels,
    ObjectiveConfig,
    ObjectiveTrainer,
    RowLosses,
    finished_samples,
    nft_loss,
    objective_step,
    optimality,
)  # fmt: skip
from gspo import reference_forward as slow
from gspo.forward import ForwardPoint, forward_points
from gspo.reference import gaussian_velocity
from linear_objective import LEVELS, NAN, Case

OBJECTIVES = [
    DiffusionNFT(levels=LEVELS),
    DiffusionNFT(levels=LEVELS, weighting="none", beta=0.3),
    AdvantageWeightedMatching(levels=LEVELS),
    AdvantageWeightedMatching(levels=LEVELS, old_coef=0.5, weighting="sigma"),
]
OPTIONS = [{}, {"micro_batch_size": 5}, {"micro_batch_size": 1}, {"drop_silent_rows": False}]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("options", OPTIONS)
def test_accumulated_gradient_equals_one_graph(objective: Any, options: dict) -> None:
    case = Case()
    want = case.slow_gradient(objective)
    statistics = case.trainer(objective, **options).update(case.policy, case.rollout, case.advantages)
    torch.testing.assert_close(case.weight.grad, want, atol=1e-6, rtol=1e-3)
    assert statistics.num_samples == 11, "an advantage of 0 counts, a NaN does not"
    assert statistics.grad_norm == pytest.approx(float(want.norm()), rel=1e-4)
    assert want.abs().max() > 1e-3


@pytest.mark.parametrize("options", OPTIONS)
def test_the_moving_average_is_the_old_policy(options: dict) -> None:
    objective = DiffusionNFT(levels=LEVELS, schedule=DecaySchedule(rate=1.0, cap=0.5), weighting="none")
    case = Case()
    trainer = case.trainer(objective, **options)
    trainer.average = MovingAverage([case.weight])
    old = case.weight.detach().clone()
    with torch.no_grad():
        case.weight.mul_(1.3)
    want = case.slow_gradient(objective, old)
    before = case.weight.detach().clone()
    statistics = trainer.update(case.policy, case.rollout, case.advantages)
    torch.testing.assert_close(case.weight.grad, want, atol=1e-6, rtol=1e-3)
    assert torch.equal(case.weight, before), "the weights come back bit for bit"
    rows = 12 if options.get("drop_silent_rows") is False else 11
    assert statistics.num_function_evaluations == 2 * 3 * rows, "once for the old policy, once for the policy"
    assert statistics.metrics["drift"] > 0


def test_on_policy_one_pass_is_enough() -> None:
    case = Case()
    statistics = case.trainer(DiffusionNFT(levels=LEVELS)).update(case.policy, case.rollout, case.advantages)
    assert statistics.num_function_evaluations == 3 * 11
    statistics = case.trainer(AdvantageWeightedMatching(levels=LEVELS)).update(
        case.policy, case.rollout, case.advantages
    )
    assert statistics.num_function_evaluations == 3 * 7, "rows without a gradient are not passed"


def test_later_epochs_compare_with_the_policy_before_the_first() -> None:
    case = Case()
    objective = AdvantageWeightedMatching(levels=LEVELS, clip_range=0.05)
    start = case.weight.detach().clone()
    trainer = case.trainer(objective, lr=0.5, num_inner_epochs=2)
    gradients = []
    case.weight.register_hook(lambda g: None)
    original = trainer.optimizer.step
    trainer.optimizer.step = lambda: (gradients.append(case.weight.grad.clone()), original())  # type: ignore[method-assign]
    trainer.update(case.policy, case.rollout, case.advantages)
    after_one = start - 0.5 * gradients[0]
    with torch.no_grad():
        case.weight.copy_(after_one)
    want = case.slow_gradient(objective, start)
    torch.testing.assert_close(gradients[1], want, atol=1e-6, rtol=1e-3)
    assert (gradients[1] - gradients[0]).abs().max() > 1e-3


def test_the_old_policy_follows_by_its_schedule() -> None:
    case = Case()
    schedule = DecaySchedule(flat=1, rate=0.3, cap=0.7)
    trainer = case.trainer(DiffusionNFT(levels=LEVELS, schedule=schedule), lr=0.2)
    path, old = [case.weight[0, 0].item()], []
    for _ in range(6):
        trainer.update(case.policy, case.rollout, case.advantages)
        path.append(case.weight[0, 0].item())
        with trainer.old_policy():
            old.append(case.weight[0, 0].item())
        assert case.weight[0, 0].item() == path[-1]
    decays = [schedule.at(i) for i in range(6)]
    assert decays == pytest.approx([0, 0, 0.3, 0.6, 0.7, 0.7])
    assert old == pytest.approx(slow.moving_average(path, decays), rel=1e-5)
    assert len(set(path)) == 7


def test_the_average_survives_what_happens_inside() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    average = MovingAverage([weight])
    assert average.is_current
    with torch.no_grad():
        weight.add_(1)
    assert not average.is_current
    average.follow(0.75)

    def fails() -> None:
        with average.applied():
            assert weight.tolist() == [1.25, 2.25]
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fails()
    assert weight.tolist() == [2.0, 3.0]
    average.follow(0.0)
    assert average.is_current
    average.follow(1.0)
    assert average.is_current


def test_half_precision_weights_keep_a_fine_average() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0], dtype=torch.bfloat16))
    average = MovingAverage([weight])
    with torch.no_grad():
        weight.fill_(2.0)
    for _ in range(10):
        average.follow(0.999)
    # in bf16 1 + .001 is 1: nothing would ever move
    assert average.values[0].item() == pytest.approx(2 - 0.999**10, rel=1e-5)


@pytest.mark.parametrize("objective", OBJECTIVES[:1] + OBJECTIVES[2:3])
def test_kl_to_the_reference_is_added(objective: Any) -> None:
    case = Case()
    base = torch.randn(3, 3, generator=torch.Generator().manual_seed(9))

    @contextmanager
    def reference():  # type: ignore[no-untyped-def]
        kept = case.weight.data
        case.weight.data = base
        yield
        case.weight.data = kept

    kept = torch.isfinite(case.advantages)
    kl = torch.zeros(())
    for point in case.points:
        x = point.latents[kept]
        difference = (x @ case.weight - x @ base) * (1 + point.sigma[kept, None])
        kl = kl + difference.square().mean() / len(case.points)
    (gradient,) = torch.autograd.grad(kl, case.weight)
    want = case.slow_gradient(objective) + 0.7 * gradient
    trainer = case.trainer(objective, kl_coef=0.7, micro_batch_size=4)
    statistics = trainer.update(case.policy, case.rollout, case.advantages, reference=reference)
    torch.testing.assert_close(case.weight.grad, want, atol=1e-6, rtol=1e-3)
    assert statistics.metrics["kl"] == pytest.approx(kl.item(), rel=1e-4)
    with pytest.raises(ValueError, match="reference must be given"):
        trainer.update(case.policy, case.rollout, case.advantages)


def test_another_library_may_call_backward_and_clip() -> None:
    case, losses = Case(), []

    def backward(loss: torch.Tensor) -> None:
        losses.append(loss.item())
        loss.backward()

    optimizer = torch.optim.SGD([case.weight], lr=0.0)
    trainer = ObjectiveTrainer(
        [case.weight], optimizer, OBJECTIVES[0], ObjectiveConfig(seed=5, micro_batch_size=4), backward=backward,
        clip_grad_norm=lambda parameters, limit: 100 * limit,
    )  # fmt: skip
    statistics = trainer.update(case.policy, case.rollout, case.advantages)
    assert len(losses) == 3 * 3 and sum(losses) == pytest.approx(statistics.loss, rel=1e-5)
    assert statistics.grad_norm == 100
    torch.testing.assert_close(case.weight.grad, case.slow_gradient(OBJECTIVES[0]), atol=1e-6, rtol=1e-3)


def test_nothing_to_learn_from_takes_no_step() -> None:
    case = Case()
    trainer = case.trainer(DiffusionNFT(levels=LEVELS), lr=1.0)
    before = case.weight.detach().clone()
    statistics = trainer.update(case.policy, case.rollout, torch.full((12,), NAN))
    assert statistics.skipped and statistics.num_samples == 0 and torch.equal(case.weight, before)
    infinite = lambda x, sigma, index: case.policy(x, sigma, index) * float("inf")  # noqa: E731
    statistics = trainer.update(infinite, case.rollout, case.advantages)
    assert statistics.skipped and torch.equal(case.weight, before)
    statistics = trainer.update(case.policy, case.rollout, case.advantages)
    assert not statistics.skipped and not torch.equal(case.weight, before)


def test_half_the_reward_leaves_the_old_policy_alone_but_pulls_back_to_it() -> None:
    """DiffusionNFT passes samples whose advantage is 0: at r = 1/2 the optimum is the old policy."""
    case = Case()
    objective = DiffusionNFT(levels=LEVELS, weighting="none", schedule=DecaySchedule(rate=1.0, cap=1.0))
    trainer = case.trainer(objective, lr=0.2, num_inner_epochs=200)
    trainer.average = MovingAverage([case.weight])
    trainer.iteration = 9
    start = case.weight.detach().clone()
    with torch.no_grad():
        case.weight.add_(0.5)
    trainer.update(case.policy, case.rollout, torch.zeros(12))
    torch.testing.assert_close(case.weight.detach(), start, atol=1e-3, rtol=0)


def test_memory_does_not_grow_with_the_points() -> None:
    def peak(count: int) -> int:
        weight = torch.nn.Parameter(torch.eye(64) * 0.1)
        policy = lambda x, s, i: torch.tanh(x @ weight) @ weight  # noqa: E731
        held, highest = [0], [0]

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            held[0] += tensor.numel()
            highest[0] = max(highest[0], held[0])
            return tensor

        def unpack(tensor: torch.Tensor) -> torch.Tensor:
            held[0] -= tensor.numel()
            return tensor

        objective = DiffusionNFT(levels=NoiseLevels(count=count))
        trainer = ObjectiveTrainer([weight], torch.optim.SGD([weight], lr=0.0), objective)
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            trainer.update(
                policy, finished_samples(torch.randn(8, 64), torch.zeros(8, dtype=torch.long)), torch.randn(8)
            )
        return highest[0]

    assert peak(6) <= 1.05 * peak(1)


class Pull:
    """An objective of one's own, in one class: towards the data's mean, weighed by the advantage."""

    needs_trajectory = False
    silent_without_advantage = True

    def points(self, rollout: Any, generator: torch.Generator | None) -> Sequence[ForwardPoint]:
        return forward_points(rollout, NoiseLevels(count=1), generator)

    def loss(self, velocity: Any, old_velocity: Any, point: ForwardPoint, advantages: torch.Tensor) -> RowLosses:
        losses = torch.nan_to_num(advantages) * (velocity - point.target).abs().mean(1)
        return RowLosses(losses, {"size": velocity.detach().abs().mean(1)})

    def decay(self, iteration: int) -> float:
        return 0.0


def test_an_objective_of_ones_own_is_one_class() -> None:
    case = Case()
    statistics = case.trainer(Pull(), lr=0.1).update(case.policy, case.rollout, case.advantages)
    assert statistics.grad_norm > 0
    assert statistics.metrics["size"] > 0


def test_resuming_goes_on_as_if_nothing_had_happened() -> None:
    def run(stop: int | None) -> torch.Tensor:
        weight = torch.nn.Parameter(torch.zeros(2))
        policy = lambda x, s, i: gaussian_velocity(x, s, 0.0, 0.5) + weight  # noqa: E731
        noise = torch.Generator().manual_seed(1)

        def build() -> ObjectiveTrainer:
            objective = DiffusionNFT(schedule=DecaySchedule(rate=0.2, cap=0.6))
            return ObjectiveTrainer([weight], torch.optim.SGD([weight], lr=0.1), objective, ObjectiveConfig(seed=3))

        trainer = build()
        for iteration in range(6):
            if iteration == stop:
                state = {k: v.clone() for k, v in trainer.state_dict().items()}
                trainer = build()
                trainer.load_state_dict(state)
            objective_step(
                trainer, policy, torch.randn(8, 2, generator=noise), torch.linspace(1, 0, 5), lambda x, i: x[:, 0],
                group_size=4,
            )  # fmt: skip
        return torch.cat([weight.detach(), trainer.average.values[0] if trainer.average else weight * 0])

    whole = run(None)
    assert torch.equal(run(3), whole)
    assert torch.equal(run(1), whole)
    assert whole.abs().max() > 1e-3


def test_the_loss_that_is_logged_is_the_loss() -> None:
    case = Case()
    objective = DiffusionNFT(levels=LEVELS, weighting="none", beta=0.5)
    statistics = case.trainer(objective).update(case.policy, case.rollout, case.advantages)
    kept = torch.isfinite(case.advantages)
    losses = []
    for point in case.points:
        velocity = case.policy(point.latents, point.sigma, case.rollout.index)[kept].detach()
        losses.append(
            nft_loss(velocity, velocity, point.target[kept], optimality(case.advantages[kept]), beta=0.5) * 10
        )
    assert statistics.loss == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)
