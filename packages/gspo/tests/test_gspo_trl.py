"""TRL's own loss on the same log-probs, and its reward functions."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from gspo import clipped_surrogate_loss, group_advantages, sequence_importance_ratio, step_importance_ratio
from gspo.integrations.trl import from_grpo_config, trl_reward

PROMPTS = ["a", "b"]


def case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    old = torch.randn(8, 3, generator=g)
    new = old + 0.5 * torch.randn(8, 3, generator=g)
    return new, old, group_advantages(torch.randn(8, generator=g), torch.arange(2).repeat_interleave(4))


@pytest.mark.parametrize(
    ("level", "ratio"), [("sequence", sequence_importance_ratio), ("token", step_importance_ratio)]
)
def test_loss_and_gradient_are_those_of_grpo_trainer(level: str, ratio) -> None:  # type: ignore[no-untyped-def]
    """GRPOTrainer._compute_loss itself, fed with our log-probs: denoising steps are its tokens."""
    trl = pytest.importorskip("trl")
    new, old, advantages = case()
    accelerator = SimpleNamespace(gather=lambda x: x, reduce=lambda x, reduction: x)
    theirs = new.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, torch.zeros(8, 3), None),
        importance_sampling_level=level, loss_type="grpo", beta=0.0, epsilon_low=0.1, epsilon_high=0.1,
        top_entropy_quantile=1.0, off_policy_mask_threshold=None, use_vllm=False, aux_loss_enabled=False,
        vllm_importance_sampling_correction=False, _entropy_bonus_enabled=False, use_adaptive_entropy=False,
        current_gradient_accumulation_steps=1, args=SimpleNamespace(delta=None), accelerator=accelerator,
        model=SimpleNamespace(training=True), _metrics={"train": defaultdict(list)},
    )  # fmt: skip
    ids = torch.zeros(8, 3, dtype=torch.long)
    inputs = {
        "prompt_ids": ids, "prompt_mask": ids + 1, "completion_ids": ids, "completion_mask": ids + 1,
        "old_per_token_logps": old, "advantages": advantages,
    }  # fmt: skip
    want = trl.GRPOTrainer._compute_loss(trainer, None, inputs)
    ours = new.clone().requires_grad_()
    got = clipped_surrogate_loss(ratio(ours, old), advantages, 0.1)
    torch.testing.assert_close(got.loss, want)
    assert got.clip_fraction.item() == pytest.approx(trainer._metrics["train"]["clip_ratio/region_mean"][0])
    assert 0 < got.clip_fraction < 1
    want.backward()
    got.loss.backward()
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_reward_functions_are_called_as_trl_calls_them() -> None:
    seen = {}

    def length(prompts, completions, completion_ids, **kwargs):  # type: ignore[no-untyped-def]
        seen.update(prompts=prompts, completions=completions, **kwargs)
        return [None if p == "b" else float(len(c)) for p, c in zip(prompts, completions, strict=True)]

    async def constant(completions, **kwargs):  # type: ignore[no-untyped-def]
        return [1.0] * len(completions)

    reward = trl_reward(
        [length, constant], PROMPTS, lambda x, index: ["x" * int(v) for v in x[:, 0]], columns={"answer": [7, 8]}
    )
    got = reward(torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([0, 0, 1]))
    assert list(got) == ["length", "constant"] and got["constant"].tolist() == [1, 1, 1]
    assert got["length"][:2].tolist() == [1, 2] and got["length"][2].isnan()
    assert seen["answer"] == [7, 7, 8] and seen["prompts"] == ["a", "a", "b"]


def test_wrong_reward_functions_are_named() -> None:
    decode = lambda x, index: list(x)  # noqa: E731
    for functions, columns, word in (
        ([], {}, "reward_funcs"),
        ([len, len], {}, "reward_funcs"),
        ([len], {"c": [1]}, "columns"),
    ):
        with pytest.raises(ValueError, match=word):
            trl_reward(functions, PROMPTS, decode, columns=columns)

    def short(**kwargs):  # type: ignore[no-untyped-def]
        return [1.0]

    with pytest.raises(ValueError, match="short"):
        trl_reward(short, PROMPTS, decode)(torch.zeros(2, 1), torch.tensor([0, 1]))


def test_grpo_config_is_translated() -> None:
    options = {
        "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": None, "beta": 0.04, "num_iterations": 3,
        "max_grad_norm": 0.5, "loss_type": "grpo", "scale_rewards": "batch",
    }  # fmt: skip
    policy, scale = from_grpo_config(SimpleNamespace(**options))
    assert (policy.ratio, policy.clip_range, policy.kl_coef, policy.num_inner_epochs, scale) == (
        "sequence", 3e-4, 0.04, 3, "global",
    )  # fmt: skip
    for change, word in (
        ({"epsilon_high": 1.0}, "epsilon_high"),
        ({"loss_type": "sapo"}, "loss_type"),
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
    ):
        with pytest.raises(ValueError, match=word):
            from_grpo_config(SimpleNamespace(**{**options, **change}))
