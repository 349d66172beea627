"""Two worlds whose optimum is known on paper, and every objective of gspo trained in them: seconds on a CPU.

    python -m gspo.examples.closed_form --task mixture --method nft

A policy is the exact flow from noise to a mixture of Gaussians, and the mixture's parameters are what is trained. Therefore the density
that a policy samples is known, and so is the best one:

- "gaussian": one Gaussian in four dimensions, whose mean is trained. The reward is ``-|x - c|^2 / 2``. The optimum is mean = c.
- "mixture": four Gaussians in the plane; weights, means and widths are trained. The reward is ``-|x - c|^2 / (2 tau^2)`` minus the KL to the
  base, which is in the reward as ``log base(x) - log policy(x)``. The optimum is the base tilted by the reward, again such a mixture.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from gspo.advantage import group_advantages
from gspo.awm import AdvantageWeightedMatching
from gspo.dppo import FlowDPPO
from gspo.forward import NoiseLevels
from gspo.nft import DecaySchedule, DiffusionNFT
from gspo.objective_loop import objective_step
from gspo.objective_trainer import ObjectiveConfig, ObjectiveTrainer
from gspo.reward_gradient import RewardGradientConfig, RewardGradientTrainer
from gspo.rollout import Rollout, rollout
from gspo.sde import FlowSDE, wide
from gspo.step import PolicyConfig, PolicyTrainer
from gspo.window import SlidingWindow

TaskName = Literal["gaussian", "mixture"]
METHODS = ("gspo", "grpo", "guarded", "dppo", "nft", "awm", "refl", "draft")
NUM_STEPS = 8
GROUPS, MEMBERS = 16, 16


def components(
    logits: Tensor, means: Tensor, log_stds: Tensor, x: Tensor, sigma: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Each component of the mixture, noised to sigma: log of its share of the density at x, E[data | x, component], both (b, k, ...).

        x | k ~ N((1 - sigma) mean_k, ((1 - sigma)^2 std_k^2 + sigma^2) I)

    Returns:
        Log shares (b, k); expected data (b, k, d); log density of x, (b,).
    """
    clean = (1 - sigma)[:, None]
    variance = (2 * log_stds).exp()
    spread = clean.square() * variance + sigma[:, None].square()
    away = x[:, None] - clean[..., None] * means
    log_shares = (
        torch.log_softmax(logits, 0)
        - away.square().sum(2) / (2 * spread)
        - x.shape[1] / 2 * (2 * math.pi * spread).log()
    )
    return log_shares, means + (clean * variance / spread)[..., None] * away, log_shares.logsumexp(1)


class MixturePolicy(torch.nn.Module):
    """The exact flow from noise to ``sum_k w_k N(mean_k, std_k^2 I)``, and that density."""

    def __init__(self, logits: Tensor, means: Tensor, log_stds: Tensor, trained: Sequence[str]) -> None:
        """``trained`` names those of logits (k,), means (k, d) and log_stds (k,) that have gradients."""
        super().__init__()
        self.logits = torch.nn.Parameter(logits.clone(), requires_grad="logits" in trained)
        self.means = torch.nn.Parameter(means.clone(), requires_grad="means" in trained)
        self.log_stds = torch.nn.Parameter(log_stds.clone(), requires_grad="log_stds" in trained)
        self.dimension = means.shape[1]
        self.shape: tuple[int, ...] = (self.dimension,)

    def trained(self) -> list[torch.nn.Parameter]:
        """What has gradients."""
        return [p for p in self.parameters() if p.requires_grad]

    def forward(self, latents: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
        """``(x - E[data | x]) / sigma``; prompts play no part."""
        log_shares, data, log_density = components(self.logits, self.means, self.log_stds, latents, sigma)
        expected = ((log_shares - log_density[:, None]).exp()[..., None] * data).sum(1)
        return (latents - expected) / wide(sigma, latents)

    def log_density(self, x: Tensor) -> Tensor:
        """Of the density that the exact flow would sample, (b,), differentiable in x only."""
        still = (self.logits.detach(), self.means.detach(), self.log_stds.detach())
        return components(*still, x, torch.zeros(len(x)))[2]

    def coordinates(self) -> Tensor:
        """Trained parameters as one vector; logits as log weights, since only their differences matter."""
        parts = {"logits": torch.log_softmax(self.logits, 0), "means": self.means, "log_stds": self.log_stds}
        found = [parts[name] for name, p in self.named_parameters() if p.requires_grad]
        return torch.cat([part.detach().flatten() for part in found])


@dataclass(frozen=True)
class Task:
    """A world: where a policy begins, what is rewarded, and where it should end.

    Attributes:
        name: "gaussian" or "mixture".
        start: Makes the policy to train.
        optimum: The best policy of the family.
        reward: ``(policy, x) -> (b,)``, differentiable in x only.
        regret: ``policy -> optimal mean reward - its own``, exact, not negative.
        batch: Groups and members an iteration; by default those of the module.
    """

    name: str
    start: Callable[[], MixturePolicy]
    optimum: MixturePolicy
    reward: Callable[[MixturePolicy, Tensor], Tensor]
    regret: Callable[[MixturePolicy], float]
    batch: tuple[int, int] | None = None


def gaussian_task() -> Task:
    """See the module."""
    goal = torch.tensor([1.0, -0.5, 0.5, 0.0])
    zero, log_std = torch.zeros(1), torch.tensor([math.log(0.5)])

    def start() -> MixturePolicy:
        return MixturePolicy(zero, torch.zeros(1, 4), log_std, ["means"])

    def regret(policy: MixturePolicy) -> float:
        return float((policy.means.detach()[0] - goal).square().sum() / 2)

    optimum = MixturePolicy(zero, goal[None], log_std, ["means"])
    return Task("gaussian", start, optimum, lambda policy, x: -(x - goal).square().sum(1) / 2, regret)


def mixture_task() -> Task:
    """See the module. A Gaussian times ``exp(reward)`` is a Gaussian: precisions add, and the weight takes the integral."""
    goal, tau, std = torch.tensor([0.8, 0.3]), 1.0, 0.3
    logits, log_stds = torch.zeros(4), torch.full((4,), math.log(std))
    means = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    trained = ["logits", "means", "log_stds"]
    base = MixturePolicy(logits, means, log_stds, [])
    precision = 1 / std**2 + 1 / tau**2
    best = MixturePolicy(
        -(means - goal).square().sum(1) / (2 * (std**2 + tau**2)),
        (means / std**2 + goal / tau**2) / precision,
        torch.full((4,), -0.5 * math.log(precision)),
        trained,
    )
    line = torch.linspace(-3, 3, 121)
    grid = torch.cartesian_prod(line, line)
    cell = float(line[1] - line[0]) ** 2

    def reward(policy: MixturePolicy, x: Tensor) -> Tensor:
        return -(x - goal).square().sum(1) / (2 * tau**2) + base.log_density(x) - policy.log_density(x)

    def regret(policy: MixturePolicy) -> float:
        """KL(policy || optimum), by quadrature."""
        with torch.no_grad():
            own = policy.log_density(grid)
            return max(float((own.exp() * (own - best.log_density(grid))).sum() * cell), 0.0)

    return Task("mixture", lambda: MixturePolicy(logits, means, log_stds, trained), best, reward, regret)


TASKS: dict[str, Callable[[], Task]] = {"gaussian": gaussian_task, "mixture": mixture_task}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One method with its knobs; what a method does not have is ignored.

    Attributes:
        method: One of `METHODS`.
        lr: Adam's, falling linearly to 0 over the budget.
        own_starts: Ratio methods: members of a group have initial noise of their own, instead of sharing start and prefix.
        num_inner_epochs: Ratio methods.
        threshold: "dppo".
        beta: "nft".
        weighting: "nft" and "awm".
        levels: "nft" and "awm": noise levels per sample.
        refl_from: "refl": where the late steps begin.
        last_steps: "draft": K.
    """

    method: str
    lr: float = 0.03
    own_starts: bool = True
    num_inner_epochs: int = 2
    threshold: float = 1e-2
    beta: float = 1.0
    weighting: Literal["none", "sigma", "sigma_squared"] = "none"
    levels: int = 2
    refl_from: float = 0.5
    last_steps: int = 1

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {METHODS}, got {self.method!r}")


@dataclass
class Run:
    """What a run leaves.

    Attributes:
        policy: As trained.
        evaluations: Function evaluations after each iteration.
        regrets: After each iteration, the first before any.
        seconds: Of one processor's time.
    """

    policy: MixturePolicy
    evaluations: list[int] = field(default_factory=lambda: [0])
    regrets: list[float] = field(default_factory=list)
    seconds: float = 0.0


Iteration = Callable[[int], int]


def _ratio(setting: Setting, task: Task, policy: MixturePolicy, optimizer: Any, g: torch.Generator) -> Iteration:
    """GSPO, GRPO, GRPO-Guard and the divergence mask: rollouts with a stochastic window."""
    parameters = policy.trained()
    kernel, window = FlowSDE(), SlidingWindow(NUM_STEPS, size=2, interval=1)
    sigmas, (groups, members) = torch.linspace(1, 0, NUM_STEPS + 1), task.batch or (GROUPS, MEMBERS)
    ratios = {"gspo": "sequence", "grpo": "step", "guarded": "guarded"}
    update: Callable[[Rollout, Tensor], Any]
    if setting.method == "dppo":
        objective = FlowDPPO(threshold=setting.threshold, kernel=kernel)
        config = ObjectiveConfig(num_inner_epochs=setting.num_inner_epochs, max_grad_norm=1e9)
        masked = ObjectiveTrainer(parameters, optimizer, objective, config)
        update = lambda drawn, advantages: masked.update(policy, drawn, advantages)  # noqa: E731
    else:
        ratio: Any = ratios[setting.method]
        clipped = PolicyTrainer(
            parameters,
            optimizer,
            PolicyConfig(ratio=ratio, num_inner_epochs=setting.num_inner_epochs, max_grad_norm=1e9),
        )
        update = lambda drawn, advantages: clipped.update(policy, drawn, advantages, kernel)  # noqa: E731

    def iterate(iteration: int) -> int:
        own = setting.own_starts
        noise = torch.randn(groups * members if own else groups, *policy.shape, generator=g)
        drawn = rollout(
            policy,
            noise,
            sigmas,
            kernel=kernel,
            window=window.at(iteration),
            group_size=1 if own else members,
            generator=g,
        )
        ids = drawn.index // members if own else drawn.index
        advantages = group_advantages(task.reward(policy, drawn.latents).detach(), ids)
        return drawn.num_function_evaluations + int(update(drawn, advantages).num_function_evaluations)

    return iterate


def _forward(setting: Setting, task: Task, policy: MixturePolicy, optimizer: Any, g: torch.Generator) -> Iteration:
    """DiffusionNFT and AWM: finished samples of an ODE solver."""
    parameters = policy.trained()
    levels, weighting = NoiseLevels(count=setting.levels, low=0.02, high=0.98), setting.weighting
    objective: Any
    if setting.method == "nft":
        # the paper's schedule is for thousands of iterations; here the old policy follows at half speed from the start
        objective = DiffusionNFT(
            beta=setting.beta, weighting=weighting, levels=levels, schedule=DecaySchedule(rate=0.5, cap=0.5)
        )
    else:
        objective = AdvantageWeightedMatching(weighting=weighting, levels=levels)
    seed = int(torch.randint(2**31, (), generator=g))
    trainer = ObjectiveTrainer(parameters, optimizer, objective, ObjectiveConfig(max_grad_norm=1e9, seed=seed))
    sigmas, (groups, members) = torch.linspace(1, 0, NUM_STEPS + 1), task.batch or (GROUPS, MEMBERS)

    def iterate(iteration: int) -> int:
        noise = torch.randn(groups * members, *policy.shape, generator=g)
        report = objective_step(
            trainer, policy, noise, sigmas, lambda x, i: task.reward(policy, x).detach(), group_size=members
        )
        return report.rollout.num_function_evaluations + report.update.num_function_evaluations

    return iterate


def _gradient(setting: Setting, task: Task, policy: MixturePolicy, optimizer: Any, g: torch.Generator) -> Iteration:
    """ReFL and DRaFT-K: the reward's own gradient."""
    parameters = policy.trained()
    config = RewardGradientConfig(
        method="refl" if setting.method == "refl" else "draft",
        last_steps=setting.last_steps,
        refl_from=setting.refl_from,
        max_grad_norm=1e9,
        seed=int(torch.randint(2**31, (), generator=g)),
    )
    trainer = RewardGradientTrainer(parameters, optimizer, config)
    sigmas, (groups, members) = torch.linspace(1, 0, NUM_STEPS + 1), task.batch or (GROUPS, MEMBERS)

    def iterate(iteration: int) -> int:
        noise = torch.randn(groups * members, *policy.shape, generator=g)
        return trainer.step(policy, noise, sigmas, lambda x, i: task.reward(policy, x)).num_function_evaluations

    return iterate


def train(task: Task, setting: Setting, *, budget: int = 400_000, seed: int = 0) -> Run:
    """Trains until the budget of function evaluations (rows whose velocity is computed) is spent.

    Args:
        task: See `TASKS`.
        setting: Method and knobs.
        budget: Function evaluations, drawing and updating together.
        seed: Of everything random.
    """
    if budget < 1:
        raise ValueError(f"budget must be at least 1, got {budget}")
    generator = torch.Generator().manual_seed(seed)
    policy = task.start()
    run = Run(policy, regrets=[task.regret(policy)])
    optimizer = torch.optim.Adam(policy.trained(), lr=setting.lr, betas=(0.9, 0.99))
    build = {"nft": _forward, "awm": _forward, "refl": _gradient, "draft": _gradient}.get(setting.method, _ratio)
    iterate, start, iteration = build(setting, task, policy, optimizer, generator), time.process_time(), 0
    while run.evaluations[-1] < budget:
        optimizer.param_groups[0]["lr"] = setting.lr * (1 - run.evaluations[-1] / budget)
        spent = iterate(iteration)
        run.evaluations.append(run.evaluations[-1] + max(spent, 1))
        run.regrets.append(task.regret(policy))
        iteration += 1
    run.seconds = time.process_time() - start
    return run


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m gspo.examples.closed_form", description="Objectives in worlds whose optimum is known."
    )
    parser.add_argument("--task", choices=sorted(TASKS), default="mixture", help="the world")
    parser.add_argument("--method", choices=METHODS, default="nft", help="the objective")
    parser.add_argument("--lr", type=float, default=0.03, help="Adam's learning rate, falling to 0")
    parser.add_argument("--budget", type=int, default=400_000, help="function evaluations")
    parser.add_argument("--seed", type=int, default=0, help="of everything random")
    options = parser.parse_args(arguments)
    if not options.lr > 0:
        parser.error(f"--lr must be positive, got {options.lr}")
    if options.budget < 1:
        parser.error(f"--budget must be at least 1, got {options.budget}")
    task = TASKS[options.task]()
    run = train(task, Setting(method=options.method, lr=options.lr), budget=options.budget, seed=options.seed)
    print(f"regret {run.regrets[0]:.4f} before, {run.regrets[-1]:.6f} after {run.evaluations[-1]} function evaluations")
    for name, found, best in zip(
        range(len(run.policy.coordinates())), run.policy.coordinates(), task.optimum.coordinates(), strict=True
    ):
        print(f"parameter {name:2d}: {float(found):7.3f}, optimum {float(best):7.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
