"""Stage 2 with what moves it: own noise, separated rollouts, rewards one by one, objectives without a likelihood, averaged weights, a watch."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from gspo import AdvantageWeightedMatching, DiffusionNFT, NoiseLevels, OnlineConfig, PolicyConfig, SlidingWindow
from multicrafter import UserError
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.binding import BindingConfig
from multicrafter.models.finding import Places
from multicrafter.training import loop
from multicrafter.training.align import Align, online_config
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.training.watching import WatchConfig
from multicrafter.world.rewards import RewardConfig

PLAIN = AdapterConfig(rank=4, alpha=4.0, num_experts=0)
ONLINE = OnlineConfig(
    window=SlidingWindow(4, size=2, strategy="fixed"),
    group_size=3,
    tail_steps=2,
    own_noise=True,
    policy=PolicyConfig(num_inner_epochs=1),
)
LEVELS = NoiseLevels(count=2)


class Two:
    """A reward of two parts, of which one has a hundred times the spread of the other."""

    def __call__(self, images, prompts, references):
        parts = {
            "bright": np.array([100 * float(i.mean()) for i in images]),
            "blue": np.array([float(i[2].mean() - i[0].mean()) for i in images]),
        }
        return type("Score", (), {"totals": parts["bright"] + parts["blue"], "parts": parts})()


class Halves:
    """Finds the first reference's subject on the left, the second's on the right."""

    needs_maps = False
    calls = 0

    def __call__(self, pictures, references, maps, grid):
        self.calls += 1
        assert all(len(row) == 2 for row in references) and len(references) == len(pictures)
        side = pictures.shape[-1]
        boxes = torch.tensor([[0.0, 0, side / 2, side], [side / 2, 0, side, side]]).expand(len(pictures), 2, 4)
        return Places(boxes.clone(), torch.ones(len(pictures), 2))


def config(**changes) -> AlignConfig:
    plain = AlignConfig(
        num_steps=3, prompts=2, online=ONLINE, lr=1e-3, reward_wait_s=0.0, nft=DiffusionNFT(levels=LEVELS),
        awm=AdvantageWeightedMatching(levels=LEVELS),
    )  # fmt: skip
    return replace(plain, **changes)


def stage(pipe, scenes, run: AlignConfig, *, seed=0, **options) -> Align:
    pipe = copy.deepcopy(pipe)
    adapters = Adapters(pipe.transformer, PLAIN, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Align(pipe, adapters, run, scenes, Two(), **options)


def weights(made: Align) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in made.adapters.parameters()])


def gradient(made: Align) -> torch.Tensor:
    """Of the last update."""
    return torch.cat([p.grad.flatten() for p in made.adapters.parameters()])


@pytest.mark.parametrize("objective", ["ratio", "nft", "awm"])
def test_every_objective_moves_the_adapter_and_resumes_exactly(pipe, scenes, objective, tmp_path):
    run = config(objective=objective, separation=BindingConfig(mode="draft", draft_steps=1))
    finder = Halves()
    whole = stage(pipe, scenes, run, finder=finder)
    before = weights(whole)
    history = loop.run(whole, num_steps=3, out=tmp_path / "whole")
    after = weights(whole)
    assert not torch.equal(before, after) and finder.calls == 3 and not any(m["skipped"] for m in history)
    assert all(np.isfinite(m["reward"]) and m["grad_norm"] > 0 for m in history) and "gradient_cosine" in history[-1]
    # 6 starts: a step of a draft, and a picture of 4 steps; the points of an update are counted where there is no rollout to score again
    drawn = 6 * (1 + 4)
    assert history[0]["function_evaluations"] == drawn + (6 * 2 if objective != "ratio" else 0)
    loop.run(stage(pipe, scenes, run, finder=Halves()), num_steps=2, out=tmp_path / "parts")
    second = stage(pipe, scenes, run, seed=1, finder=Halves())
    loop.run(second, num_steps=3, out=tmp_path / "parts", resume=True)
    assert torch.equal(weights(second), after)
    other = stage(pipe, scenes, replace(run, objective="awm" if objective == "nft" else "nft"), finder=Halves())
    with pytest.raises(UserError, match="checkpoint must have objective"):
        loop.run(other, num_steps=4, out=tmp_path / "whole", resume=True)


@pytest.mark.parametrize("objective", ["ratio", "nft"])
def test_rollouts_in_parts_are_bound_to_the_same_places(pipe, scenes, objective):
    """Every start keeps the masks of its own draft, whichever rows go through the model together."""
    masks = BindingConfig(mode="masks")
    run = config(objective=objective, separation=masks)
    whole, parts = (
        stage(pipe, scenes, replace(run, execution=ExecutionConfig(micro_batch=size))) for size in (None, 1)
    )
    assert whole.step(0)["reward"] == pytest.approx(parts.step(0)["reward"], rel=1e-5)
    torch.testing.assert_close(
        gradient(parts), gradient(whole), atol=1e-4 * float(gradient(whole).abs().max()), rtol=1e-3
    )
    free = stage(pipe, scenes, replace(run, separation=None))
    free.step(0)
    apart = float((gradient(free) - gradient(whole)).norm() / gradient(whole).norm())
    assert apart > 0.01, "and to be bound is something else than not to be"


def test_masks_are_those_of_the_scene_of_the_start(pipe, scenes):
    made = stage(pipe, scenes, config(separation=BindingConfig(mode="masks")))
    rows, noise = torch.tensor([4, 7]), torch.zeros(6, *scenes.tokens.shape[1:])
    with made.separated():
        made.bind(made.velocity(rows), noise, rows)
        seen = []
        velocity, predict = made.velocity(rows), made.trainee.predict
        made.trainee.predict = lambda *a, **k: seen.append(made.separation.masks) or predict(*a, **k)  # type: ignore[method-assign]
        with torch.no_grad():
            velocity(noise[:2], torch.full((2,), 0.5), torch.tensor([5, 1]))
    truth = (scenes.masks > 0).float()
    kept = seen[0]
    assert kept.shape == truth[:2].shape
    for mask, scene in zip(kept, (7, 4), strict=True):
        assert bool((truth[scene][mask > 0] > 0).all()) and mask.sum() > 0
    assert made.separation is None and made.masks is None, "nothing is left behind"


def test_each_part_of_the_reward_counts_where_they_are_normalised_one_by_one(pipe, scenes):
    """Summed, a part with a hundredth of the spread decides nothing; one by one, it weighs what it is given."""
    found = {}
    for name, online in (("sum", ONLINE), ("each", replace(ONLINE, reward_weights={"bright": 1.0, "blue": 1.0}))):
        made = stage(pipe, scenes, config(reward_normalization=name, online=online))
        kept = {}
        update = made.trainer.update
        made.trainer.update = lambda v, r, a, *rest, kept=kept, update=update, **k: (
            kept.update(a=a) or update(v, r, a, *rest, **k)
        )  # type: ignore[method-assign]
        metrics = made.step(0)
        pictures = made.last_pictures
        parts = Two()(list(pictures), None, None).parts
        found[name] = {
            k: float(
                np.corrcoef(kept["a"].numpy(), v.reshape(2, 3).__sub__(v.reshape(2, 3).mean(1, keepdims=True)).ravel())[
                    0, 1
                ]
            )
            for k, v in parts.items()
        }
        assert metrics["reward"] == pytest.approx(parts["bright"].mean() + parts["blue"].mean(), rel=1e-4)
        assert {"reward_bright", "reward_blue"} <= set(metrics)
    assert found["sum"]["bright"] > 0.9
    assert found["each"]["blue"] > found["sum"]["blue"] + 0.1
    weights_of = RewardConfig(copy_paste=0.25, aesthetics=0.0).weights
    assert weights_of == {"text": 1.0, "multi_id": 2.0, "copy_paste": -0.25}
    assert online_config(config(reward_normalization="each", reward=RewardConfig())).reward_weights == {
        "text": 1.0,
        "aesthetics": 0.5,
        "multi_id": 2.0,
    }


def test_averaged_weights_are_what_is_kept(pipe, scenes):
    made = stage(pipe, scenes, config(keep="average", execution=ExecutionConfig(ema_decay=0.5)))
    states = [weights(made)]
    for index in range(2):
        made.step(index)
        states.append(weights(made))
    made.finish()
    torch.testing.assert_close(weights(made), 0.25 * states[0] + 0.25 * states[1] + 0.5 * states[2], atol=1e-6, rtol=0)
    last = stage(pipe, scenes, config(execution=ExecutionConfig(ema_decay=0.5)))
    for index in range(2):
        last.step(index)
    last.finish()
    assert torch.equal(weights(last), states[2])


def test_who_watches_sees_the_pictures_of_the_rollout(pipe, scenes):
    seen = []

    def watcher(pictures, prompts, references):
        seen.append((torch.stack(list(pictures)), list(prompts), [len(r) for r in references]))
        return np.array([np.nan, *[0.25] * (len(pictures) - 1)])

    made = stage(pipe, scenes, config(watch=WatchConfig(action="stop", window=2)), watcher=watcher)
    metrics = made.step(0)
    pictures, prompts, references = seen[0]
    assert metrics["watched"] == 0.25 and torch.equal(pictures, made.last_pictures) and references == [2] * 6
    assert prompts[0] == prompts[2] and len(prompts) == 6 and made.finished() is None
    few = stage(pipe, scenes, config(watch=WatchConfig(action="stop", pictures=2)), watcher=watcher)
    few.step(0)
    assert torch.equal(seen[1][0], few.last_pictures[[0, 5]]), "spread over the prompts"
    made.watch.rewards, made.watch.watched = [0.0, 0.1, 2.0, 2.1], [1.0, 0.9, 0.1, 0.0]
    assert "gamed" in (made.finished() or "")
    with pytest.raises(UserError, match=r"watcher must be given for watch\.action 'warn', got none"):
        stage(pipe, scenes, config(watch=WatchConfig(action="warn")))


def test_checkpoints_of_before_there_was_a_start_still_fit(pipe, scenes):
    sliding = replace(ONLINE, window=SlidingWindow(5, interval=4), own_noise=False)
    made = stage(pipe, scenes, config(online=sliding))
    notes = json.loads(json.dumps(made.notes()))
    del notes["window"]["start"], notes["objective"]
    made.check_notes(notes)
    notes["window"]["interval"] = 5
    with pytest.raises(UserError, match="checkpoint must have the window"):
        made.check_notes(notes)


SHARED = replace(ONLINE, own_noise=False)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": "x"}, "objective must be one of"),
        ({"objective": "nft", "online": SHARED}, "objective 'nft' needs online.own_noise"),
        ({"objective": "awm", "routing_replay": True}, "need objective 'ratio'"),
        ({"reward_normalization": "x"}, "reward_normalization must be one of"),
        ({"online": replace(ONLINE, reward_weights={"a": 1.0})}, "online.reward_weights must be empty"),
        ({"keep": "x"}, "keep must be one of"),
        ({"keep": "average"}, "keep 'average' needs execution.ema_decay above 0"),
        ({"separation": BindingConfig(mode="in-flight")}, "separation.mode must be 'draft', 'attention' or 'masks'"),
    ],
)
def test_refusals(changes, words):
    with pytest.raises(UserError, match=words):
        config(**changes)


def test_new_knobs_default_to_what_was_before():
    plain = asdict(AlignConfig())
    assert plain["objective"] == "ratio" and plain["separation"] is None and plain["reward_normalization"] == "sum"
    assert plain["keep"] == "last" and plain["watch"]["action"] == "none" and not plain["online"]["own_noise"]
