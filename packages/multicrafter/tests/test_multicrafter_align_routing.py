"""Stage 2 with experts: routing that is replayed, tokens that would go elsewhere; rewards by convention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gspo import OnlineConfig, PolicyConfig, SlidingWindow, rescore, rollout
from id_reward import CompositeReward, IdentityScorer
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.training.align import Align
from multicrafter.training.align_config import AlignConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.world.rewards import MeanIdentity, RewardConfig, tiny_reward

SMALL = AdapterConfig(rank=4, alpha=4.0, num_experts=2)
ONLINE = OnlineConfig(window=SlidingWindow(5, interval=4), group_size=3)
STAGE2 = AlignConfig(num_steps=2, prompts=2, lr=1e-3, online=ONLINE)


def brightness(images, prompts, references):
    return type("Score", (), {"totals": np.array([float(i.mean()) for i in images]), "parts": {}})()


def stage_with(pipe, scenes, **changes):
    adapters = Adapters(pipe.transformer, SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Align(pipe, adapters, replace(STAGE2, **changes), scenes, brightness)


def draw(stage, rows):
    """The rollout of a step, without the step."""
    noise = torch.randn(len(rows), *stage.scenes.tokens.shape[1:], generator=torch.Generator().manual_seed(1))
    return rollout(
        stage.velocity(rows), noise, stage.sigmas, kernel=stage.online.kernel, window=stage.online.window.at(0),
        group_size=stage.online.group_size, generator=torch.Generator().manual_seed(2),
        micro_batch_size=stage.online.micro_batch_size, record=stage._record,
    )  # fmt: skip


def test_replayed_routing_chooses_the_rollouts_experts_whatever_the_router_says_now(pipe, scenes):
    stage = stage_with(pipe, scenes, routing_replay=True)
    rows = torch.tensor([0, 1])
    drawn = draw(stage, rows)
    assert set(stage.routes) == {0, 1}, "one record for each step of the window"
    velocity = stage.velocity(rows)
    with torch.no_grad():
        same = rescore(velocity, drawn, replay=stage._replay).log_prob_mean
        assert torch.equal(same, drawn.log_prob_mean), "on policy, to the bit"
        part = rescore(velocity, drawn, rows=torch.tensor([1, 4]), replay=stage._replay).log_prob_mean
        assert torch.allclose(part, drawn.log_prob_mean[[1, 4]], atol=1e-5), "rows belong to their own record"
        for name, parameter in stage.adapters.named_parameters():
            if "router" in name:
                parameter.neg_()  # every token would go elsewhere
        free = rescore(velocity, drawn).log_prob_mean
    assert not torch.allclose(free, drawn.log_prob_mean, atol=1e-6)
    assert stage._jitter(velocity, drawn) > 0.5


@pytest.mark.parametrize("size", [1, 4])
def test_a_rollout_in_parts_notes_the_same_experts(pipe, scenes, size, monkeypatch):
    """No more than ``micro_batch`` rows go through transformer or VAE at once; samples, routes and jitter are those of the whole."""
    whole = stage_with(pipe, scenes, routing_replay=True, routing_jitter=True)
    rows = torch.tensor([0, 1])
    drawn = draw(whole, rows)
    whole.adapters.detach()
    online = replace(ONLINE, policy=PolicyConfig(micro_batch_size=size))
    small = {"online": online, "execution": ExecutionConfig(micro_batch=size)}
    parts = stage_with(pipe, scenes, routing_replay=True, routing_jitter=True, **small)
    sizes, decode = [], parts.model.backbone.decode_pictures
    monkeypatch.setattr(
        type(parts.model.backbone),
        "decode_pictures",
        lambda self, p, x, grid: sizes.append(len(x)) or decode(p, x, grid),
    )
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(len(out[0])), with_kwargs=True
    )
    got = draw(parts, rows)
    torch.testing.assert_close(got.latents, drawn.latents, atol=1e-4, rtol=1e-4)
    for position, kept in whole.routes.items():
        for name, (chosen,) in kept.choices.items():
            (same,) = parts.routes[position].choices[name]
            assert same.shape == chosen.shape
            assert (same == chosen).float().mean() > 0.999, "rounding may turn a token that hesitates"
    assert parts._jitter(parts.velocity(rows), got) == 0.0
    before = parts.adapters.state_dict()
    metrics = parts.step(0)
    hook.remove()
    assert max(sizes) == size
    assert metrics["skipped"] == 0
    assert any(not torch.equal(before[n], v) for n, v in parts.adapters.state_dict().items())


def test_jitter_is_0_on_policy_and_measured_where_asked(pipe, scenes):
    stage = stage_with(pipe, scenes, routing_jitter=True)
    drawn = draw(stage, torch.tensor([0, 1]))
    assert stage._jitter(stage.velocity(torch.tensor([0, 1])), drawn) == 0.0
    assert 0 <= stage.step(0)["routing_jitter"] <= 1
    assert stage.routes == {}, "nothing is kept between iterations"


def test_replay_needs_experts_and_no_recomputation(pipe, scenes):
    plain = Adapters(pipe.transformer, replace(SMALL, num_experts=0))
    for option in ("routing_replay", "routing_jitter"):
        with pytest.raises(ValueError, match="need an adapter with experts"):
            Align(pipe, plain, replace(STAGE2, **{option: True}), scenes, brightness)
    with pytest.raises(ValueError, match="gradient_checkpointing"):
        replace(STAGE2, routing_replay=True, execution=ExecutionConfig(gradient_checkpointing=True))


class Backend:
    """Faces are the rows of an array."""

    def detect_and_embed(self, images):
        from id_reward import Faces

        return [Faces(np.tile([0.0, 0, 1, 1], (len(i), 1)), np.ones(len(i)), np.asarray(i, float)) for i in images]


def test_the_mean_of_all_pairs_by_hand_and_how_it_is_gamed():
    references = [np.array([[1.0, 0.0]]), np.array([[0.0, 1.0]])]
    right, average = np.eye(2), np.full((2, 2), np.sqrt(0.5))
    scorer = IdentityScorer(Backend())
    got = MeanIdentity(scorer)([right, average, np.zeros((0, 2))], [""] * 3, [references] * 3)
    assert got == pytest.approx([0.5, np.sqrt(0.5), 0.0])
    assert got[1] > got[0], "one average face twice beats both people"
    matched = scorer([right, average], [""] * 2, [references] * 2)
    assert matched[0] == pytest.approx(1.0) and matched[1] < matched[0]


def test_conventions_have_names():
    assert isinstance(tiny_reward(RewardConfig(convention="mean")), CompositeReward)
    with pytest.raises(ValueError, match=r"convention must be one of multicrafter, umo, .*, mean, got .best."):
        RewardConfig(convention="best")
