"""What does each objective make of stage 2's own reward in the drawn world, and what of the things that this reward does not see?

    python -m studies.objectives_world run     # about two hours of one core; goes on where it was interrupted, several processes share the work
    python -m studies.objectives page    # its part of docs/results/objectives.md

The start with experts lies in studies/results/start_with_experts, so that runs made later, or elsewhere, join those that are there. It was made by
``multicrafter pretrain --row full --set pretrain.idar.coef=0 --steps 320 --scenes 2500``, the start without by ``--row separation``.

Every method starts from the same adapter of stage 1 and spends the same number of function evaluations: rows of every forward pass of the
transformer, drafts, drawing and updates alike. Learning rates are chosen on validation cases and one seed, over the same three values for every
method; five other seeds are then drawn once on the test split. With ``--no-tuning`` a second start takes the rates of the first. Criterion of
*moves the reward*, written before the test: the 95 % interval of the difference in the composite reward lies above 0. Criterion of *games it*: the
reward rises, and attributes or count fall or swaps rise, beyond their interval. Results: benchmarks/results/objectives_world.parquet.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gspo import (
    FlowDPPO,
    ObjectiveConfig,
    ObjectiveTrainer,
    RewardGradientConfig,
    RewardGradientTrainer,
    multi_reward_advantages,
    rollout,
)
from gspo.rollout import VelocityFunction
from id_reward import IdentityScorer
from id_reward.matching import match_with_penalties
from multicrafter.config.recipes import tiny_align
from multicrafter.models.adapters import Adapters
from multicrafter.models.binding import BindingConfig
from multicrafter.models.finding import IdentityFinder
from multicrafter.models.loading import load_model
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, cases, draw_cases, score_pictures
from multicrafter.scoring.watcher import drawn_watcher
from multicrafter.training.align import Align, AlignConfig
from multicrafter.training.runs import prompt_scenes
from multicrafter.world import WorldConfig
from multicrafter.world.judges import shipped
from multicrafter.world.judges.aesthetics import aesthetics
from multicrafter.world.judges.clip import ClipScorer
from multicrafter.world.judges.network import find
from multicrafter.world.judges.people import PeopleBackend
from multicrafter.world.rewards import RewardConfig, tiny_reward
from torch import Tensor

from benchmarks.run import ROOT
from studies.lab.measurements import add, read_runs
from studies.objectives_world_page import LEARNING_RATES, SHOWN, TUNING_SEED, best_rate, name_of

OUT = ROOT / "benchmarks" / "results" / "objectives_world.parquet"
METHODS = ("gspo", "grpo", "guarded", "dppo", "nft", "awm", "refl")
SEEDS = (0, 1, 2, 3, 4)
BUDGET, PROMPTS, MEMBERS, SOLVER_STEPS, EPOCHS = 12_000, 8, 8, 8, 2
"""A run's function evaluations; groups and members of an iteration; steps of a picture where any solver draws; of ratio methods."""
VALIDATION = EvaluateConfig(
    split="validation", num_cases=64, num_sampling_steps=16, guidance=3.5, separation=BindingConfig(mode="draft")
)
TEST = replace(VALIDATION, split="test", num_cases=128)
RATIOS = {"gspo": "sequence", "grpo": "step", "guarded": "guarded"}


class DrawnReward:
    """The composite reward of drawn pictures with a gradient: who was found and matched is held, cosines and scores are differentiated."""

    def __init__(self, config: RewardConfig | None = None) -> None:
        """Of the judges that ship."""
        self.config = config or RewardConfig()
        self.exact = tiny_reward(self.config)
        self.people, self.clip = (
            PeopleBackend.from_pretrained(shipped()),
            ClipScorer.from_pretrained(shipped() / "clip"),
        )
        self.identity = IdentityScorer(self.people)
        for network in (self.people.network, self.clip.model):
            network.requires_grad_(False)

    def __call__(self, pictures: Tensor, prompts: Sequence[str], references: Sequence[Sequence[Any]]) -> Tensor:
        """(b,), equal to the reward's totals."""
        config = self.config
        found = find(self.people.network(pictures))
        faces = torch.nn.functional.normalize(found.features, dim=1)
        identity = []
        for row, given in enumerate(references):
            known = torch.from_numpy(self.identity.embed_references(given)).float()
            if not bool(
                torch.isfinite(known).all()
            ):  # a reference that shows nobody: the sample is left out, as the reward does
                identity.append(pictures.new_tensor(torch.nan))
                continue
            cosine = known @ faces[found.picture == row].T
            pairs = match_with_penalties(
                cosine.detach().double().numpy(),
                missing_penalty=config.missing_penalty,
                extra_penalty=config.extra_penalty,
            ).pairs
            alone = config.missing_penalty * (len(known) - len(pairs)) + config.extra_penalty * (
                cosine.shape[1] - len(pairs)
            )
            total = sum((cosine[pair] for pair in pairs), start=pictures[row].sum() * 0)
            identity.append((total - alone) / len(known))
        text = (1 + (self.clip.embed_pictures(pictures) * self.clip.embed_text(prompts)).sum(1)) / 2
        return config.text * text + config.aesthetics * aesthetics(pictures) + config.multi_id * torch.stack(identity)


class Contender(Align):
    """Stage 2 by any method. The recipe's own are `Align`'s; the divergence mask and the reward's gradient are here."""

    def __init__(self, method: str, differentiable: DrawnReward, *arguments: Any, **options: Any) -> None:
        """See `Align`."""
        super().__init__(*arguments, **options)
        self.method, self.differentiable, self.evaluations = method, differentiable, 0
        predict, parameters = self.trainee.predict, list(self.adapters.parameters())

        def counted(tokens: Tensor, *rest: Any, **context: Any) -> Tensor:
            self.evaluations += len(tokens)
            return predict(tokens, *rest, **context)

        self.trainee.predict = counted  # type: ignore[method-assign]
        self.mask = ObjectiveTrainer(
            parameters, self.optimizer, FlowDPPO(kernel=self.online.kernel), ObjectiveConfig(num_inner_epochs=EPOCHS)
        )
        self.ascent = RewardGradientTrainer(
            parameters, self.optimizer, RewardGradientConfig(method="refl", seed=self.online.seed)
        )

    def _ratio_step(self, index: int, rows: Tensor, velocity: VelocityFunction, noise: Tensor) -> dict[str, float]:
        """By the method."""
        own: dict[str, Callable[..., float]] = {"dppo": self._masked, "refl": self._ascent}
        if self.method not in own:
            return super()._ratio_step(index, rows, velocity, noise)
        return {"reward": own[self.method](rows, velocity, noise), "unmoved": 0.0, "function_evaluations": 0.0}

    def _masked(self, rows: Tensor, velocity: VelocityFunction, noise: Tensor) -> float:
        """The rollout and the advantages of the recipe, with the update of Flow-DPPO."""
        online = self.online
        drawn = rollout(
            velocity, noise, self.sigmas, kernel=online.kernel, window=online.window.at(0), group_size=online.group_size,
            share_prefix=online.share_prefix, generator=self.generator, tail_steps=online.tail_steps,
        )  # fmt: skip
        scores = self.score(drawn.latents, rows[drawn.index.cpu()].tolist())
        parts = {name: torch.as_tensor(values) for name, values in scores.items()}
        weights = dict(online.reward_weights)
        advantages = multi_reward_advantages(parts, weights, drawn.index, scale=online.advantage_scale)
        self.mask.update(velocity, drawn, advantages)
        return float(sum(weights[name] * part.nanmean() for name, part in parts.items()))

    def _ascent(self, rows: Tensor, velocity: VelocityFunction, noise: Tensor) -> float:
        """The composite reward's own gradient, through one step's prediction."""
        scene = rows[self.starts // self.members]

        def reward(latents: Tensor, index: Tensor) -> Tensor:
            here = scene[index.cpu()].tolist()
            pictures = self.model.decode_pictures(latents, self.scenes.grid)
            return self.differentiable(pictures, [self.scenes.captions[r] for r in here], self.references_of(here))

        return float(self.ascent.step(velocity, noise, self.sigmas, reward, index=self.starts).rewards.nanmean())


def configured(method: str, lr: float, seed: int, *, prompts: int = PROMPTS, members: int = MEMBERS) -> AlignConfig:
    """The recipe of stage 2 with a method's update, in batches that this study can pay."""
    recipe = tiny_align(seed=seed)
    ratio: Any = RATIOS.get(method, "sequence")
    objective: Any = method if method in ("nft", "awm") else "ratio"
    online = replace(
        recipe.online, group_size=members, seed=seed,
        policy=replace(recipe.online.policy, ratio=ratio, num_inner_epochs=EPOCHS if method in RATIOS else 1),
    )  # fmt: skip
    if method in ("nft", "awm", "refl"):
        online = replace(online, own_noise=True, window=replace(online.window, num_steps=SOLVER_STEPS))
    return replace(
        recipe, objective=objective, online=online, prompts=prompts, lr=lr,
        schedule=replace(recipe.schedule, warmup_steps=0, decay="constant"), watch=replace(recipe.watch, action="none"),
    )  # fmt: skip


class World:
    """What all runs share: the model with an adapter, judges, and cases."""

    def __init__(self, adapter: Path) -> None:
        """Loads them."""
        self.model = load_model()
        self.adapters, self.notes = Adapters.load(self.model.transformer, adapter, backbone=self.model.backbone)
        self.start = {name: tensor.clone() for name, tensor in self.adapters.state_dict().items()}
        self.judges, self.watcher, self.reward = WorldJudges.load(), drawn_watcher(), DrawnReward()
        self.finder = IdentityFinder(backend=self.judges.people)

    def train(
        self, method: str, lr: float, seed: int, budget: int, *, num_scenes: int = 512, **sizes: Any
    ) -> dict[str, Any]:
        """One run; leaves the averaged weights in the adapter. The rate falls linearly to 0 over the budget."""
        self.adapters.load_state_dict(self.start)
        config = configured(method, lr, seed, **sizes)
        world = WorldConfig(numbers=(int(self.notes["num_references"]),), shared_attributes=4)
        scenes = prompt_scenes(self.model, config, world, num_scenes)
        stage = Contender(
            method, self.reward, self.model, self.adapters, config, scenes, self.reward.exact, finder=self.finder
        )
        curve, start, index = [], time.process_time(), 0
        while stage.evaluations < budget:
            stage.config = replace(config, lr=lr * (1 - stage.evaluations / budget))
            reward = stage.step(index)["reward"]
            curve.append([stage.evaluations, round(time.process_time() - start, 2), round(reward, 5)])
            index += 1
        stage.finish()
        return {"curve": curve, "pictures": index * config.prompts * config.online.group_size}

    def measure(self, config: EvaluateConfig) -> dict[str, np.ndarray]:
        """Metrics per case of the adapter as it is."""
        scenes = cases(self.model, config)
        with torch.no_grad():
            drawn = draw_cases(self.model, scenes, config, finder=self.finder)
        pictures, references = list(drawn.pictures), [list(row) for row in scenes.reference_images]
        found = score_pictures(drawn.pictures, scenes, self.judges)
        found["reward"] = self.reward.exact(pictures, scenes.captions, references).totals
        found["identity_watched"] = self.watcher(pictures, scenes.captions, references)
        return {name: np.asarray(found[name], float) for name in SHOWN}


def by_case(measured: dict[str, np.ndarray]) -> dict[str, list[float | None]]:
    """Metrics as they are recorded; None is NaN."""
    return {k: [float(x) if np.isfinite(x) else None for x in np.round(v, 4)] for k, v in measured.items()}


def run(
    adapter: Path,
    start: str,
    out: Path,
    methods: Sequence[str],
    seeds: Sequence[int],
    budget: int,
    *,
    tune: bool = True,
) -> None:
    """What of the grid and of the comparison is not recorded yet, for some methods and seeds; without tuning, at the rates of the first start."""
    world = World(adapter)

    def one(method: str, lr: float, seed: int, config: EvaluateConfig) -> None:
        name = name_of(start, method, lr, seed, budget)
        if name in read_runs(out):
            return
        found = world.train(method, lr, seed, budget)
        measured = world.measure(config)
        add(out, name, {**found, "cases": by_case(measured)})
        means = ", ".join(f"{k} {np.nanmean(v):.3f}" for k, v in measured.items())
        print(
            f"{name}: {len(found['curve'])} iterations, {found['curve'][-1][1]:.0f} s of processor time; {means}",
            flush=True,
        )

    for config, name in ((VALIDATION, f"{start}, before, validation"), (TEST, f"{start}, before, test")):
        if name not in read_runs(out):
            measured = world.measure(config)
            add(out, name, {"cases": by_case(measured)})
    for method in methods:
        for lr in LEARNING_RATES if tune else ():
            one(method, lr, TUNING_SEED, VALIDATION)
        rate = best_rate(read_runs(out), start, method, budget)
        assert rate is not None
        for seed in seeds:
            one(method, rate, seed, TEST)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m studies.objectives_world", description=(__doc__ or "").partition("\n")[0]
    )
    commands = parser.add_subparsers(dest="command", required=True)
    go = commands.add_parser("run")
    go.add_argument("adapter", type=Path, help="of stage 1")
    go.add_argument("--start", required=True, help="how the page calls it")
    go.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    go.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    go.add_argument("--budget", type=int, default=BUDGET, help=f"function evaluations of a run (default {BUDGET})")
    go.add_argument("--no-tuning", action="store_true", help="take the rates that were chosen for the first start")
    go.add_argument("--out", type=Path, default=OUT)
    given = parser.parse_args(arguments)
    known = read_runs(given.out)
    untuned = [m for m in given.methods if given.no_tuning and best_rate(known, given.start, m, given.budget) is None]
    if untuned:
        parser.error(f"--no-tuning takes the rates of a start that was tuned, got none for {', '.join(untuned)}")
    torch.set_num_threads(1)
    run(given.adapter, given.start, given.out, given.methods, given.seeds, given.budget, tune=not given.no_tuning)
    return 0


if __name__ == "__main__":
    sys.exit(main())
