"""What strangers handed over through TRL's interface: columns, completions and configurations."""

from __future__ import annotations

import asyncio
import math
from types import SimpleNamespace
from typing import Any

import jaxtyping
import pytest
import torch
from gspo.integrations.trl import from_grpo_config, trl_reward

NAN = math.nan


@pytest.fixture(autouse=True)
def without_shape_hook(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' shape hook would catch wrong kinds before the package does; here the package must."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


class Column:
    """A column of pandas whose labels were shuffled: iteration goes by place, indexing by label."""

    def __init__(self, values: list[Any], labels: list[int]) -> None:
        self.values, self.labels = values, labels

    def __len__(self) -> int:
        return len(self.values)

    def __iter__(self) -> Any:
        return iter(self.values)

    def __getitem__(self, label: int) -> Any:
        return self.values[self.labels.index(label)]


def call(
    functions: Any, prompts: Any = ("A", "B"), decode: Any = None, rows: tuple[int, ...] = (0, 0, 1, 1), **columns: Any
) -> Any:
    decode = decode or (lambda latents, index: [f"picture {i}" for i in index.tolist()])
    return trl_reward(functions, prompts, decode, columns=columns)(torch.zeros(4, 2), torch.tensor(rows))


def test_columns_go_by_place_not_by_label() -> None:
    """A shuffled or filtered column of pandas gave every sample another's prompt and references."""
    seen: dict[str, Any] = {}

    def reward(prompts: list[str], completions: list[str], references: list[str], **_: Any) -> list[float]:
        seen.update(prompts=prompts, references=references)
        return [1.0] * len(prompts)

    shuffled = Column(["A", "B"], [1, 0]), Column(["a", "b"], [1, 0])
    for prompts, references in (
        shuffled,
        (Column(["A", "B"], [5, 9]), Column(["a", "b"], [7, 8])),
        (iter("AB"), iter("ab")),
    ):
        call(reward, prompts, references=references)
        assert seen == {"prompts": ["A", "A", "B", "B"], "references": ["a", "a", "b", "b"]}


def one(prompts: Any, completions: Any, **_: Any) -> list[float]:
    return [1.0] * len(prompts)


@pytest.mark.parametrize(
    ("run", "words"),
    [
        (lambda: call(one, b"AB"), "prompts must be a list"), (lambda: call(one, refs={"x", "y"}), r"columns\['refs'\] must be a list, got set"),
        (lambda: call(one, refs={0: "x", 1: "y"}), r"columns\['refs'\] must be a list, got dict"), (lambda: call(None), "reward_funcs must be"),
        (lambda: call(one, ["A"]), "prompts must have one entry per row of noise, got 1 for row 1"),
        (lambda: call(one, completions=["x", "y"]), "names of their own"),
        (lambda: call(one, decode=lambda x, i: ["one"]), r"one completion per sample \(4\), got 1"),
        (lambda: call(one, decode=lambda x, i: "abcd"), r"one completion per sample \(4\), got 1"),
    ],
)  # fmt: skip
def test_what_trl_would_not_hand_over(run: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        run()


def test_coroutines_work_in_a_notebook() -> None:
    async def reward(prompts: Any, completions: Any, **_: Any) -> list[float]:
        await asyncio.sleep(0)
        return [2.0] * len(prompts)

    async def notebook() -> Any:
        return call(reward)

    assert asyncio.run(notebook())["reward"].tolist() == call(reward)["reward"].tolist() == [2.0] * 4


@pytest.mark.parametrize(
    "options",
    [
        {"learning_rate": NAN}, {"learning_rate": None}, {"learning_rate": -1}, {"num_generations": None}, {"num_generations": 1},
        {"num_generations": 0}, {"seed": None}, {"seed": 1.5}, {"reward_weights": [NAN]}, {"reward_weights": "1"}, {"generation_batch_size": -8},
    ],
)  # fmt: skip
def test_a_config_of_trl_that_cannot_train(options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be"):
        from_grpo_config(SimpleNamespace(**options), reward_names=["a"])


def test_a_config_of_trl_may_be_its_fields_and_is_nothing_else() -> None:
    online = from_grpo_config({"beta": 0.1, "num_generations": 4}, reward_names=["a"]).online
    assert online["policy"].kl_coef == 0.1 and online["group_size"] == 4
    for wrong in (None, SimpleNamespace, 5, ["beta"]):
        with pytest.raises(ValueError, match=r"config must be a trl\.GRPOConfig"):
            from_grpo_config(wrong, reward_names=["a"])
    with pytest.raises(ValueError, match="kl_coef must be"):
        from_grpo_config({"beta": True}, reward_names=["a"])
    with pytest.raises(ValueError, match="reward_names must be a list"):
        from_grpo_config({"reward_weights": [1.0, 2.0]}, reward_names="ab")
