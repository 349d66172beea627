"""The study of objectives in miniature: it tunes, goes on where it stopped, and its page says what was found."""

from __future__ import annotations

import json
import math
import statistics

import pytest
import torch
from gspo.examples.closed_form import METHODS, TASKS

from studies import objectives, objectives_flux, objectives_page
from studies.lab.measurements import add, read_runs


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    out = tmp_path_factory.mktemp("objectives") / "objectives.parquet"
    before = objectives.LEARNING_RATES
    objectives.LEARNING_RATES = (0.03, 0.1)
    try:
        threads = torch.get_num_threads()
        assert objectives.main(["run", "--out", str(out), "--budget", "2100", "--seeds", "2"]) == 0
        torch.set_num_threads(threads)
    finally:
        objectives.LEARNING_RATES = before
    return out


def test_every_method_is_tuned_alike_on_another_seed(recorded):
    runs = list(read_runs(recorded).values())
    for task in TASKS:
        for method in METHODS:
            mine = [r for r in runs if (r["task"], r["setting"]["method"]) == (task, method)]
            tuning = [r for r in mine if r["seed"] == objectives.TUNING_SEED]
            assert len(tuning) == 4 and len({json.dumps(r["setting"]) for r in tuning}) == 4
            shown = [r for r in mine if r["seed"] != objectives.TUNING_SEED]
            assert sorted(r["seed"] for r in shown if r["budget"] == 2100) == [0, 1]
            assert all(r["setting"] == min(tuning, key=lambda r: r["score"])["setting"] for r in shown)
            short = [r for r in shown if r["budget"] == 2100]
            off = objectives_page.distance(short).deviation > objectives_page.OFF
            assert sorted(r["seed"] for r in shown if r["budget"] == 8400) == ([0, 1] if off else [])


def test_what_is_recorded_is_not_done_again(recorded, monkeypatch):
    monkeypatch.setattr(objectives, "LEARNING_RATES", (0.03, 0.1))
    monkeypatch.setattr(objectives, "record", lambda *arguments: pytest.fail("done again"))
    before = recorded.read_bytes()
    objectives.measure(recorded, 2100, (0, 1))
    assert recorded.read_bytes() == before


def test_numbers_that_are_not_finite_come_back(tmp_path):
    score = {"score": math.inf, "regrets": [1.0, -math.inf], "setting": {"method": "nft"}, "to_tenth": None}
    add(tmp_path / "runs.parquet", "a", score)
    add(tmp_path / "runs.parquet", "b", {"score": math.nan})
    found = read_runs(tmp_path / "runs.parquet")
    assert found["a"].pop("circumstances")["threads"] and found["a"] == score
    assert math.isnan(found["b"]["score"]) and read_runs(tmp_path / "none.parquet") == {}


def test_page_says_what_the_records_say(recorded, tmp_path):
    assert (
        objectives.main(["page", "--out", str(recorded), "--flux", "none", "--world", "none", "--docs", str(tmp_path)])
        == 0
    )
    page = (tmp_path / "objectives.md").read_text()
    assert (tmp_path / "objectives.png").stat().st_size > 10_000
    assert all(page.count(f"| {name} |") >= 2 for name in objectives_page.NAMES.values())
    for task in TASKS:
        assert f"In the {task} world" in page
    assert set(objectives_page.NAMES) == set(METHODS)


def test_distance_is_that_of_the_mean_in_its_standard_errors():
    errors = [[0.1, 0.0, 0.2, 0.1], [0.3, 0.2, 0.2, -0.1], [0.2, 0.1, 0.5, 0.0]]
    found = objectives_page.distance([{"error": e} for e in errors])
    columns = list(zip(*errors, strict=True))
    means = [statistics.fmean(c) for c in columns]
    spread = [statistics.variance(c) / 3 for c in columns]
    assert found.mean == pytest.approx(math.sqrt(statistics.fmean(m * m for m in means)))
    assert found.deviation == pytest.approx(found.mean / math.sqrt(statistics.fmean(spread)))


def invented(budget: int, size: float) -> list[dict]:
    """Runs of one method whose mean error is ``size`` and whose standard errors are .1, and the tuning run that chose them."""
    common = {"task": "gaussian", "setting": {"method": "nft"}}
    shown = [
        {**common, "seed": seed, "budget": budget, "error": [size + s * 0.1 * 3**0.5] * 2}
        for seed, s in enumerate((-1, 0, 1))
    ]
    return [*shown, {**common, "seed": objectives_page.TUNING_SEED, "budget": 10, "score": 1.0}]


@pytest.mark.parametrize(("longer", "word"), [(0.15, "bring it there"), (0.3, "still on its way"), (0.9, "stays off")])
def test_a_method_that_has_not_arrived_is_told_from_one_that_is_off(longer, word):
    runs = invented(10, 1.0) + invented(40, longer)
    assert objectives_page.distance(objectives_page.chosen(runs, "gaussian", "nft")[1]).deviation == pytest.approx(10)
    assert word in objectives_page.why(runs, "gaussian", "nft")


@pytest.mark.parametrize(
    "arguments", [["run", "--budget", "0"], ["run", "--seeds", "1"], ["page", "--out", "/nowhere/x.parquet"]]
)
def test_wrong_arguments_end_with_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        objectives.main(arguments)
    assert stop.value.code == 2 and arguments[1] in capsys.readouterr().err


@pytest.mark.slow
def test_a_tiny_flux_is_tuned_run_and_shown(tmp_path, recorded, monkeypatch):
    monkeypatch.setattr(objectives_flux, "SETTINGS", {"gspo": {}, "draft": {}})
    monkeypatch.setattr(objectives_flux, "LEARNING_RATES", (1e-3, 1e-2))
    monkeypatch.setattr(objectives_flux, "BATCH", (2, 2))
    monkeypatch.setattr(objectives_flux, "CASES", 4)
    monkeypatch.setattr(objectives_flux, "SEEDS", (0, 1))
    out, threads = tmp_path / "flux.parquet", torch.get_num_threads()
    command = ["--out", str(out), "--budget", "60", "--teaching-steps", "2"]
    assert objectives_flux.main(command) == 0
    runs = list(read_runs(out).values())
    assert len(runs) == 2 * (2 + 2) and all(math.isfinite(r["rewards"][-1]) for r in runs)
    assert len({r["level"] for r in runs}) == 1 and all(r["rewards"][0] == runs[0]["rewards"][0] for r in runs)
    arguments = ["page", "--out", str(recorded), "--flux", str(out), "--world", "none", "--docs", str(tmp_path)]
    assert objectives.main(arguments) == 0
    torch.set_num_threads(threads)
    page = (tmp_path / "objectives.md").read_text()
    assert "![Mean redness over function evaluations](objectives_flux.png)" in page and "| DRaFT-K |" in page
    assert (tmp_path / "objectives_flux.png").stat().st_size > 5_000


def test_redness_is_seen_and_weights_of_the_decoder_stay():
    policy = objectives_flux.base(2)
    pictures = torch.zeros(2, 3, 4, 4)
    pictures[0, 0], pictures[1, 1:] = 1.0, 1.0
    policy.vae.decode, kept = (lambda latents, return_dict: (pictures,)), policy.vae.decode
    try:
        torch.testing.assert_close(policy.redness(torch.zeros(2, 64, 16)), torch.tensor([1.0, -1.0]))
    finally:
        policy.vae.decode = kept
    assert not any(p.requires_grad for p in policy.vae.parameters()) and all(p.requires_grad for p in policy.trained())


def test_what_tuning_prefers():
    reached, later = {"to_level": 100, "budget": 1000}, {"to_level": 400, "budget": 1000}
    near, far = ({"to_level": None, "budget": 1000, "level": 1.0, "rewards": [r]} for r in (0.9, 0.1))
    costs = [objectives_flux.cost([r]) for r in (reached, later, near, far)]
    assert costs == sorted(costs) and costs[2] > 1000


def test_a_run_that_falls_back_is_told():
    run = {"level": 1.0, "evaluations": [0, 10, 20, 30], "to_level": 10, "rewards": [0.0, 1.1, 1.2, 1.3]}
    assert not objectives_flux.fell_back(run)
    assert objectives_flux.fell_back({**run, "rewards": [0.0, 1.1, 0.9, 1.3]})
    assert not objectives_flux.fell_back({**run, "to_level": None, "rewards": [0.0, 0.1, 0.9, 0.3]})
