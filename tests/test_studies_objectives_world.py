"""Every objective on the drawn world's composite reward: the reward's gradient is the reward's, and the page says what the records say."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from multicrafter.scoring.evaluate import EvaluateConfig, cases
from multicrafter.world import shipped_adapter
from multicrafter.world.rewards import RewardConfig

from studies import objectives, objectives_world, objectives_world_page
from studies.lab.measurements import add, read_runs
from studies.lab.records import encode, read_table, write_table
from studies.objectives_world import METHODS, DrawnReward, World


@pytest.fixture(scope="module")
def world():
    return World(shipped_adapter())


@pytest.fixture(scope="module")
def pictures(world):
    """Targets and references of drawn cases."""
    scenes = cases(world.model, EvaluateConfig(num_cases=4))
    drawn = world.model.decode_pictures(scenes.tokens, scenes.grid).detach()
    return drawn, scenes.captions, [list(row) for row in scenes.reference_images]


def test_the_reward_with_a_gradient_is_the_reward(world, pictures):
    drawn, captions, references = pictures
    expected = world.reward.exact(list(drawn), captions, references).totals
    np.testing.assert_allclose(world.reward(drawn, captions, references).detach().numpy(), expected, atol=1e-5)


def test_penalties_count_in_it(pictures):
    drawn, captions, references = pictures
    alone = [row[:1] for row in references]  # one reference for two people: one of them is extra
    reward = DrawnReward()
    expected = reward.exact(list(drawn), captions, alone).totals
    np.testing.assert_allclose(reward(drawn, captions, alone).detach().numpy(), expected, atol=1e-5)


@pytest.mark.filterwarnings("ignore:reference")
def test_a_reference_without_anybody_leaves_its_picture_out(world, pictures):
    drawn, captions, references = pictures
    given = [[torch.zeros(3, 32, 32), references[0][1]], *references[1:]]
    found, expected = world.reward(drawn, captions, given), world.reward.exact(list(drawn), captions, given).totals
    assert np.isnan(expected[0])
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("part", ["text", "aesthetics", "multi_id"])
def test_its_gradient_is_that_of_the_exact_reward(pictures, part):
    """A small step along the gradient raises the exact reward, part by part, by the step times the gradient's norm."""
    drawn, captions, references = pictures
    reward = DrawnReward(RewardConfig(**{"text": 0.0, "aesthetics": 0.0, "multi_id": 0.0, part: 1.0}))
    shown = (0.05 + 0.9 * drawn).requires_grad_()  # inside, so that no pixel is clipped
    reward(shown, captions, references).sum().backward()
    assert shown.grad.norm() > 1e-3  # somebody is found, and the reward depends on the picture
    direction = shown.grad / shown.grad.norm()
    ends = [
        reward.exact(list((shown + s * direction).detach()), captions, references).totals.sum() for s in (-3e-3, 3e-3)
    ]
    assert (ends[1] - ends[0]) / 6e-3 == pytest.approx(float(shown.grad.norm()), rel=0.05)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_moves_the_adapter_and_counts_its_passes(world, method):
    found = world.train(method, 1e-3, 0, 1, prompts=2, members=2, num_scenes=4)
    evaluations, _, reward = found["curve"][-1]
    assert len(found["curve"]) == 1 and found["pictures"] == 4 and np.isfinite(reward)
    ratio = 3 * 2 + 4 * 7 + 4 * 2 * objectives_world.EPOCHS  # drafts, the window with its tail, two steps of two epochs
    forward = 3 * 4 + 4 * objectives_world.SOLVER_STEPS + 4 * 2  # drafts, the solver, two noise levels
    if method in ("nft", "awm"):
        assert evaluations == forward
    elif method == "refl":
        assert (
            3 * 4 + 4 * (objectives_world.SOLVER_STEPS // 2) < evaluations <= 3 * 4 + 4 * objectives_world.SOLVER_STEPS
        )
    else:
        assert evaluations >= ratio
    moved = [float((world.start[n] - p).abs().max()) for n, p in world.adapters.state_dict().items()]
    assert max(moved) > 0


def record(reward: float, count: float = 0.0) -> dict:
    """128 cases around an offset, of a run."""
    base = np.linspace(0, 1, 128)
    offsets = {"reward": reward, "count": count}
    scores = {name: (base + offsets.get(name, 0.0)).tolist() for name in objectives_world_page.SHOWN}
    return {"cases": scores, "curve": [[10, 1.0, 0.1]], "pictures": 4}


@pytest.fixture
def recorded(tmp_path):
    """GSPO stands still, DiffusionNFT rises, ReFL rises at the cost of the count."""
    runs = {"x, before, test": record(0.0), "x, before, validation": record(0.0)}
    for method, gain, count in (("gspo", 0.0, 0.0), ("nft", 0.2, 0.0), ("refl", 0.5, -0.1)):
        for lr in objectives_world_page.LEARNING_RATES:
            runs[objectives_world_page.name_of("x", method, lr, 100, 10)] = record(gain if lr == 3e-3 else gain - 0.01)
        for seed in (0, 1):
            runs[objectives_world_page.name_of("x", method, 3e-3, seed, 10)] = record(gain, count)
            runs[objectives_world_page.name_of("x", method, 1e-3, seed, 10)] = record(
                9.0
            )  # not the rate that was chosen
    path = tmp_path / "world.parquet"
    about = {"commit": "0" * 12, "modified": False, "versions": {}, "device": "cpu", "threads": 1}
    write_table(path, {name: encode({**run, "circumstances": about}) for name, run in runs.items()})
    return path


def test_the_page_names_who_moves_and_who_games(recorded, tmp_path):
    text = objectives_world_page.section(recorded, tmp_path)
    assert "DiffusionNFT, ReFL raised the reward beyond its interval, GSPO did not." in text
    assert "ReFL games it: count became worse." in text and "DiffusionNFT games" not in text
    assert "| DiffusionNFT | 0.003 | 2 | 4 |" in text and "+9.0" not in text
    assert (tmp_path / "objectives_world.png").stat().st_size > 5_000


def test_seconds_of_unlike_machines_are_not_compared(recorded, tmp_path):
    assert "| DiffusionNFT | 0.003 | 2 | 4 | 1 |" in objectives_world_page.section(recorded, tmp_path)
    rows, name = read_table(recorded), objectives_world_page.name_of("x", "nft", 3e-3, 0, 10)
    elsewhere = {"commit": "0" * 12, "versions": {}, "device": "cpu", "threads": 1, "processor": "another"}
    rows[name] = encode({**read_runs(recorded)[name], "circumstances": elsewhere})
    write_table(recorded, rows)
    text = objectives_world_page.section(recorded, tmp_path)
    assert "| DiffusionNFT | 0.003 | 2 | 4 | - |" in text and "so their seconds are not compared" in text


def test_a_method_that_is_not_complete_is_not_on_the_page(recorded, tmp_path):
    rows = read_table(recorded)
    del rows[objectives_world_page.name_of("x", "nft", 1e-2, 100, 10)]
    write_table(recorded, rows)
    assert "DiffusionNFT |" not in objectives_world_page.section(recorded, tmp_path)


def test_a_start_that_was_not_tuned_takes_the_rates_of_the_first(recorded, tmp_path):
    rows = read_table(recorded)
    name_of = objectives_world_page.name_of
    first = rows[name_of("x", "nft", 3e-3, 0, 10)]
    more = {f"y, before, {split}": rows[f"x, before, {split}"] for split in ("test", "validation")}
    more |= {name_of("y", "nft", 3e-3, seed, 10): first for seed in (0, 1)}
    more[name_of("y", "nft", 1e-3, 0, 10)] = first  # not the rate that was chosen
    write_table(recorded, rows | more)
    runs = read_runs(recorded)
    assert objectives_world_page.best_rate(runs, "y", "nft", 10) == 3e-3
    assert len(objectives_world_page.found_of(runs, "y", "nft", 10)) == 2
    _, other = objectives_world_page.section(recorded, tmp_path).split("### Stage 1 y")
    assert "Learning rates are those that were chosen x." in other and "| DiffusionNFT | 0.003 | 2 | 4 |" in other


def test_without_tuning_nothing_runs_where_no_rate_is_known(tmp_path, capsys):
    arguments = ["run", str(tmp_path), "--start", "y", "--methods", "gspo", "--no-tuning", "--out", str(tmp_path / "t")]
    with pytest.raises(SystemExit) as stopped:
        objectives_world.main(arguments)
    assert stopped.value.code == 2 and "got none for gspo" in capsys.readouterr().err


def test_what_is_not_a_number_comes_back_so_and_rows_join_those_that_are_there(recorded):
    before = read_runs(recorded)
    cases = objectives_world.by_case({"reward": np.array([1.0, np.nan])})
    add(recorded, "one more", {"cases": cases})
    after = read_runs(recorded)
    assert cases == {"reward": [1.0, None]} and after["one more"]["cases"] == cases
    assert {n: r for n, r in after.items() if n != "one more"} == before


def test_what_is_recorded_is_not_done_again(recorded, monkeypatch):
    monkeypatch.setattr(objectives_world, "World", lambda adapter: None)  # has nothing to train or to measure with
    before = recorded.read_bytes()
    objectives_world.run(shipped_adapter(), "x", recorded, ["gspo", "nft", "refl"], (0, 1), 10)
    assert recorded.read_bytes() == before
    assert tuple(m for m in objectives.METHODS if m != "draft") == objectives_world.METHODS
