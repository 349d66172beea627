"""TRL's own loss on the same log-probs, and its reward functions."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from gspo import (
    FlowSDE,
    OnlineConfig,
    SlidingWindow,
    clipped_surrogate_loss,
    group_advantages,
    sequence_importance_ratio,
    step_importance_ratio,
)  # fmt: skip
from gspo.integrations import trl_config
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
    trl = pytest.importorskip("trl", reason="needs gspo[trl]")
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


# one other value for every field that decides something, and where it shows
OTHER = {
    "importance_sampling_level": "sequence", "epsilon": 3e-4, "epsilon_high": 0.3, "beta": 0.04, "num_iterations": 3,
    "max_grad_norm": 0.5, "per_device_train_batch_size": 16, "num_generations": 4, "scale_rewards": "batch", "reward_weights": [1.0, 2.0],
    "learning_rate": 1e-3, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "seed": 7,
    "generation_batch_size": 32,
}  # fmt: skip
NEVER = {
    "loss_type": "sapo", "multi_objective_aggregation": "normalize_then_sum", "gradient_accumulation_steps": 2,
    "steps_per_generation": 2, "use_bias_correction_kl": True,
}  # fmt: skip
PLAIN = {
    "importance_sampling_level": "token", "epsilon": 0.2, "epsilon_high": None, "beta": 0.0, "num_iterations": 1, "max_grad_norm": 1.0,
    "per_device_train_batch_size": 8, "num_generations": 8, "scale_rewards": "group", "reward_weights": None, "loss_type": "dapo",
    "multi_objective_aggregation": "sum_then_normalize", "learning_rate": 1e-6, "weight_decay": 0.0, "adam_beta1": 0.9,
    "adam_beta2": 0.999, "adam_epsilon": 1e-8, "seed": 42, "gradient_accumulation_steps": 1, "steps_per_generation": 1,
    "generation_batch_size": 8, "use_bias_correction_kl": False,
}  # fmt: skip


def grpo(**changes):  # type: ignore[no-untyped-def]
    return from_grpo_config(
        SimpleNamespace(**{**PLAIN, **changes}), reward_names=["a", "b"] if "reward_weights" in changes else []
    )


def test_every_field_of_trls_config_is_known_in_one_way() -> None:
    """A field that a new trl adds fails here: say whether it is mapped, handed back, refused, or means nothing alone."""
    config = pytest.importorskip("trl", reason="needs gspo[trl]").GRPOConfig
    names = {field.name for field in dataclasses.fields(config) if not field.name.startswith("_")}
    tables = [trl_config.MAPPED, set(trl_config.REFUSED), set(trl_config.INERT), trl_config.LOOP]
    assert names - set().union(*tables) == set()
    assert sum(len(table) for table in tables) == len(set().union(*tables)), "a field is in one table"
    assert set(PLAIN) == set(OTHER) | set(NEVER) == trl_config.MAPPED


def test_what_transformers_4_fills_in_by_itself_is_no_wish() -> None:
    """Its `TrainingArguments` set ``logging_dir``, which those of 5 lack; an old name of the batch size is another matter."""
    fields = {
        "_n_gpu": 1,
        "logging_dir": "runs/Nov29",
        "warmup_ratio": 0.0,
        "save_safetensors": True,
        "num_generations": 4,
    }
    config = dataclasses.make_dataclass("GRPOConfig", fields)(**fields)
    got = from_grpo_config(config)
    assert got.loop == {"logging_dir": "runs/Nov29", "warmup_ratio": 0.0, "save_safetensors": True}
    with pytest.raises(ValueError, match="per_gpu_train_batch_size must be None"):
        from_grpo_config({"per_gpu_train_batch_size": 2})


def test_a_config_as_trl_makes_it_is_translated(tmp_path) -> None:  # type: ignore[no-untyped-def]
    trl = pytest.importorskip("trl", reason="needs gspo[trl]")
    cpu = {"use_cpu": True, "bf16": False, "output_dir": str(tmp_path)}
    config = trl.GRPOConfig(
        **cpu,
        importance_sampling_level="sequence",
        epsilon=3e-4,
        epsilon_high=4e-4,
        learning_rate=1e-4,
        num_generations=4,
        logging_steps=3,
    )
    got = from_grpo_config(config)
    online = OnlineConfig(window=SlidingWindow(8), kernel=FlowSDE(), **got.online)
    assert (online.policy.ratio, online.policy.clip_range, online.group_size) == ("sequence", (3e-4, 4e-4), 4)
    assert (online.advantage_ddof, got.optimizer["lr"], got.num_prompts) == (1, 1e-4, 2)
    assert got.loop["logging_steps"] == 3 and set(got.loop) == trl_config.LOOP & {
        f.name for f in dataclasses.fields(config)
    }
    torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], **got.optimizer)
    with pytest.raises(ValueError, match="temperature"):
        from_grpo_config(trl.GRPOConfig(**cpu, temperature=0.7))

    @dataclasses.dataclass
    class Newer(trl.GRPOConfig):  # type: ignore[name-defined,misc]
        surprise: float = 0.0

    assert from_grpo_config(Newer(**cpu)).online["seed"] == 42

    @dataclasses.dataclass
    class Older(trl.GRPOConfig):  # type: ignore[name-defined,misc]
        router_aux_loss_coef: float = 0.001  # the default of trl 1.10: nobody asked for it

    assert from_grpo_config(Older(**cpu)).online["seed"] == 42
    with pytest.raises(ValueError, match="router_aux_loss_coef"):
        from_grpo_config(Older(**cpu, router_aux_loss_coef=0.01))
    with pytest.raises(ValueError, match="surprise"):
        from_grpo_config(Newer(**cpu, surprise=1.0))


@pytest.mark.parametrize("name", sorted(OTHER))
def test_a_mapped_field_changes_what_comes_out(name: str) -> None:
    found, plain = grpo(**{name: OTHER[name]}), grpo()
    assert (found.online, found.optimizer, found.num_prompts) != (plain.online, plain.optimizer, plain.num_prompts)


@pytest.mark.parametrize("name", sorted({**NEVER, **dict.fromkeys(trl_config.REFUSED)}))
def test_what_gspo_does_not_do_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{name}\b"):
        grpo(beta=0.1, **{name: NEVER.get(name, "other")})


@pytest.mark.parametrize("name", sorted(trl_config.INERT))
def test_a_field_without_meaning_of_its_own_hangs_on_a_switch_that_is_refused(name: str) -> None:
    switch = trl_config.INERT[name]
    assert grpo(**{name: "anything"}) == grpo()
    with pytest.raises(ValueError, match=switch):
        grpo(**{name: "anything", switch: {"loss_type": name.split("_")[0]}.get(switch, True)})


def test_wrong_values_are_named() -> None:
    for change, word in (
        ({"importance_sampling_level": "word"}, "importance_sampling_level"),
        ({"reward_weights": [1.0]}, "reward_names"),
        ({"generation_batch_size": 9}, "generation_batch_size"),
        ({"scale_rewards": "sometimes"}, "scale_rewards"),
        ({"never_heard_of": 1}, "never_heard_of"),
    ):
        with pytest.raises(ValueError, match=word):
            grpo(**change)
    assert grpo(scale_rewards=False).online["advantage_scale"] == "none"
    assert grpo(reward_weights=[1.0, 2.0]).online["reward_weights"] == {"a": 1.0, "b": 2.0}


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages_are_those_that_trl_computes(scale: str) -> None:
    """Mean of the group, std of the sample plus 1e-4, as in GRPOTrainer._generate_and_score_completions."""
    rewards = torch.randn(12, generator=torch.Generator().manual_seed(3))
    online = grpo(scale_rewards=scale).online
    got = group_advantages(
        rewards, torch.arange(3).repeat_interleave(4), scale=online["advantage_scale"], ddof=online["advantage_ddof"]
    )
    centred = rewards.view(3, 4) - rewards.view(3, 4).mean(1, keepdim=True)
    std = {"group": rewards.view(3, 4).std(1, keepdim=True), "batch": rewards.std(), "none": torch.tensor(1 - 1e-4)}[
        scale
    ]
    torch.testing.assert_close(got, (centred / (std + 1e-4)).flatten())
