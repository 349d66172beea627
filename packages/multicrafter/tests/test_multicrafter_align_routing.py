"""Stage 2 with experts: routing that is replayed, tokens that would go elsewhere; rewards by convention."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from gspo import PolicyConfig, rescore
from id_reward import CompositeReward, IdentityScorer
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.training.align import Align, AlignConfig
from multicrafter.training.precision import ExecutionConfig
from multicrafter.world.rewards import MeanIdentity, RewardConfig, tiny_reward

SMALL = AdapterConfig(rank=4, alpha=4.0, num_experts=2)
STAGE2 = AlignConfig(num_steps=2, prompts=2, group_size=3, num_sampling_steps=5, tail_steps=None, lr=1e-3)


def brightness(images, prompts, references):
    return type("Score", (), {"totals": np.array([float(i.mean()) for i in images]), "parts": {}})()


def stage_with(pipe, scenes, **changes):
    adapters = Adapters(pipe.transformer, SMALL)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return Align(pipe, adapters, replace(STAGE2, **changes), scenes, brightness)


def test_replayed_routing_chooses_the_rollouts_experts_whatever_the_router_says_now(pipe, scenes):
    stage = stage_with(pipe, scenes, routing_replay=True)
    rows = torch.tensor([0, 1])
    drawn = stage.rollout(rows, 0)
    assert set(stage.routes) == {0, 1}, "one record for each step of the window"
    velocity = stage.velocity(rows)
    with torch.no_grad():
        same = rescore(velocity, drawn, stage.kernel, replay=stage._replay).log_prob_mean
        assert torch.equal(same, drawn.log_prob_mean), "on policy, to the bit"
        part = rescore(velocity, drawn, stage.kernel, rows=torch.tensor([1, 4]), replay=stage._replay).log_prob_mean
        assert torch.allclose(part, drawn.log_prob_mean[[1, 4]], atol=1e-5), "rows belong to their own record"
        for name, parameter in stage.adapters.named_parameters():
            if "router" in name:
                parameter.neg_()  # every token would go elsewhere
        free = rescore(velocity, drawn, stage.kernel).log_prob_mean
    assert not torch.allclose(free, drawn.log_prob_mean, atol=1e-6)
    assert stage._jitter(velocity, drawn) > 0.5


@pytest.mark.parametrize("size", [1, 4])
def test_a_rollout_in_parts_notes_the_same_experts(pipe, scenes, size, monkeypatch):
    """No more than ``micro_batch`` rows go through transformer or VAE at once; samples, routes and jitter are those of the whole."""
    whole = stage_with(pipe, scenes, routing_replay=True, routing_jitter=True)
    rows = torch.tensor([0, 1])
    drawn = whole.rollout(rows, 0)
    whole.adapters.detach()
    small = {"policy": PolicyConfig(micro_batch_size=size), "execution": ExecutionConfig(micro_batch=size)}
    parts = stage_with(pipe, scenes, routing_replay=True, routing_jitter=True, **small)
    sizes, decode = [], parts.backbone.decode_pictures
    monkeypatch.setattr(
        type(parts.backbone), "decode_pictures", lambda self, p, x, grid: sizes.append(len(x)) or decode(p, x, grid)
    )
    hook = pipe.transformer.register_forward_hook(
        lambda module, args, kwargs, out: sizes.append(len(out[0])), with_kwargs=True
    )
    got = parts.rollout(rows, 0)
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
    drawn = stage.rollout(torch.tensor([0, 1]), 0)
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
