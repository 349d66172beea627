"""The studies' harness: names of records, sharing, resuming, comparisons, and every study in miniature."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import filelock
import numpy as np
import pytest
import torch
from multicrafter.files import write_json
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.loading import load_flux
from multicrafter.training.optimization import AdamWConfig, ScheduleConfig, SigmaSamplingConfig
from multicrafter.training.runs import with_execution
from multicrafter.training.scenes import encode_scenes
from multicrafter.world import FAMILIES

from studies import ablation, bleeding, claims, inference_overhead, ratios, regime, scaling, subjects
from studies import all as everything
from studies.lab import probes, report
from studies.lab.experiment import FULL, SMOKE, Base, Experiment
from studies.lab.laboratory import Laboratory, Study, carry_out, main


@pytest.fixture(scope="module")
def laboratory(tmp_path_factory) -> Laboratory:
    return Laboratory.within(tmp_path_factory.mktemp("science"))


def experiment(**changes) -> Experiment:
    config = replace(SMOKE.rows(0)["baseline"][0], **changes)
    return Experiment(pretrain=config, tests=(SMOKE.test(num_cases=2),))


KNOBS = {
    "schedule": ScheduleConfig(warmup_steps=5, decay="constant"),
    "adamw": AdamWConfig(betas=(0.9, 0.99)),
    "max_grad_norm": 2.0,
    "sigma_sampling": SigmaSamplingConfig(shift=3.0),
}
"""What was constant once: at their old values they rename no record (every recorded run is found), at others they do."""


def test_every_record_belongs_to_an_experiment_that_is_planned(laboratory):
    planned = {
        laboratory.key(e)
        for study in everything.STUDIES
        for seeds in study.arms(study.planned(FULL)).values()
        for e in seeds.values()
    }
    kept = Laboratory.full().records.keys()
    assert kept and kept <= planned


def test_a_record_is_named_after_what_decides_it(laboratory):
    one = experiment()
    faster = replace(one, pretrain=with_execution(one.pretrain, compile_blocks=True, micro_batch=4))
    assert laboratory.key(faster) == laboratory.key(one)
    off = replace(one.pretrain.idar, sigma_max=0.5, all_blocks=False)
    assert off.coef == 0 and laboratory.key(experiment(idar=off)) == laboratory.key(one), "0 times anything"
    others = [
        experiment(idar=replace(off, coef=0.1)),
        experiment(seed=1),
        experiment(lr=1e-4),
        replace(one, tests=(SMOKE.test(num_cases=3),)),
        replace(one, base=Base(minutes=1.0)),
        replace(one, align=SMOKE.rows(0)["ippo"][1]),
        *(experiment(**{name: value}) for name, value in KNOBS.items()),
    ]
    assert len({laboratory.key(e) for e in [one, *others]}) == 7 + len(KNOBS)
    rarer = replace(one.pretrain, loop=replace(one.pretrain.loop, save_every=7, picture_every=0))
    assert laboratory.key(replace(one, pretrain=rarer)) == laboratory.key(one), "what is written on the way"


def test_what_is_recorded_is_not_done_again(laboratory, monkeypatch):
    first = laboratory.record(experiment())
    monkeypatch.setattr(Laboratory, "perform", lambda *_: pytest.fail("done again"))
    assert laboratory.record(experiment()) == first == laboratory.known(experiment())
    assert set(first["tests"][0]["metrics"]) >= {"attributes", "swaps", "leakage", "leakage_single"}
    assert first["commit"] and first["versions"]["torch"] and first["experiment"]["pretrain"]["seed"] == 0


@pytest.mark.parametrize("what", ["record", "stage 1", "base"])
def test_another_process_is_at_it(laboratory, monkeypatch, what):
    """An impatient laboratory leaves what another process makes, be it what the experiment only starts from."""
    base = Base(minutes=0.02) if what == "base" else Base()
    other = replace(experiment(seed=7), base=base)
    monkeypatch.setattr(laboratory, "patience", 0)
    laboratory.runs.mkdir(parents=True, exist_ok=True)
    paths = {
        "record": laboratory.runs / laboratory.key(other),
        "stage 1": laboratory.stage1_folder(other),
        "base": laboratory.base_folder(base),
    }
    paths[what].parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(paths[what].with_suffix(".lock")):
        assert laboratory.record(other) is None
    assert laboratory.known(other) is None


def test_a_base_whose_training_was_cut_short_is_trained_again(laboratory, monkeypatch):
    """Training saves on the way; what it left when it was killed must not be taken for a base."""
    calls = []

    def train(_, out, config):
        calls.append(config.minutes)
        out.mkdir(parents=True, exist_ok=True)
        (out / "training.json").write_text("{}")
        if len(calls) == 1:
            raise KeyboardInterrupt

    monkeypatch.setattr("studies.lab.laboratory.train", train)
    base = Base(minutes=0.03)
    with pytest.raises(KeyboardInterrupt):
        laboratory.base(base)
    assert (laboratory.base(base) / "training.json").is_file()
    assert laboratory.base(base) and calls == [0.03, 0.03]


@pytest.mark.slow
def test_stage_2_of_several_experiments_starts_from_one_first_stage(laboratory, monkeypatch):
    from studies.lab import laboratory as science

    calls = []
    monkeypatch.setattr(science, "run_pretrain", lambda *a, **k: calls.append(1) or run(*a, **k))
    from multicrafter.training.runs import run_pretrain as run

    align = SMOKE.rows(0)["ippo"][1]
    for seed in (0, 1):
        made = replace(experiment(seed=5), align=replace(align, online=replace(align.online, seed=seed)))
        assert "stage 2" in laboratory.record(made)["curves"]
    assert calls == [1]


def test_time_that_is_up_leaves_the_rest(laboratory, capsys):
    study = Study(
        name="late",
        title="Late",
        arms=lambda b: {"one": {0: experiment(seed=11)}},
        summarise=lambda r: {},
        page=lambda c, f: "",
    )
    assert carry_out(study, laboratory, SMOKE, until=0.0) is False
    assert laboratory.known(experiment(seed=11)) is None


def test_a_study_takes_its_own_number_of_seeds_and_shows_more_if_there_are_more(laboratory):
    study = Study(
        name="few",
        title="Few",
        arms=lambda b: {"one": {s: experiment(seed=20 + s) for s in b.seeds}},
        summarise=lambda r: {},
        page=lambda c, f: "",
        seeds=1,
    )
    budget = replace(SMOKE, seeds=(0, 1, 2))
    assert carry_out(study, laboratory, budget)
    assert laboratory.known(experiment(seed=20)) and not laboratory.known(experiment(seed=21))
    assert carry_out(study, laboratory, budget, seeds=[2]), "asked for by name"
    content = laboratory.summary(study, budget)
    assert content["done"] == {"one": [0, 2]} == content["planned"]


def test_workers_report_what_went_wrong(capfd):
    assert everything.share(["--seeds", "none"], 2) == 2
    assert capfd.readouterr().err.count("invalid int value") == 2
    with pytest.raises(SystemExit) as stop:
        everything.main(["--workers", "0"])
    assert stop.value.code == 2


def test_a_claim_holds_only_where_the_interval_says_so():
    gain, up, down, loss = [0.1, 0.01, 0.2], [0.1, -0.1, 0.3], [-0.1, -0.3, 0.1], [-0.1, -0.2, -0.01]
    idar, _, large, ippo = claims.CLAIMS
    for first, second in itertools.product((gain, up, down, loss), repeat=2):
        found = claims.verdict(idar, {"attributes": first, "leakage": second})
        assert found == {"attributes rise": first is gain, "leakage falls": second is loss}
        found = claims.verdict(large, {"attributes": first, "leakage": gain, "leakage_single": second})
        assert found == {"attributes rise": first is gain, "leakage of the single blocks falls": second is loss}
        found = claims.verdict(ippo, {"reward": first, "identity": second})
        assert found == {"the reward rises": first is gain, "identity does not fall": second is not loss}


def record(values: list[float]) -> dict:
    return {"tests": [{"metrics": {"attributes": values}}]}


def test_differences_are_taken_case_by_case_and_averaged_over_the_seeds_both_have():
    a = {0: record([1.0, 0.5]), 1: record([0.8, 0.7]), 2: record([9.0, 9.0])}
    b = {0: record([0.5, 0.5]), 1: record([0.5, 0.3])}
    found = report.difference(a, b, "attributes")
    assert found.mean == pytest.approx((0.5 + 0.0 + 0.3 + 0.4) / 4)
    assert found.n == 2, "a case is one unit, however many seeds"
    assert found.low == pytest.approx(0.2) and found.high == pytest.approx(0.4)
    assert report.spread(a, b, "attributes") == pytest.approx([0.25, 0.35])


def test_a_cell_is_bold_only_where_a_difference_excludes_0():
    assert report.cell((0.1, 0.05, 0.2), "+.2f").startswith("**")
    assert not report.cell((0.1, -0.05, 0.2), "+.2f").startswith("**")
    assert not report.cell((0.1, 0.05, 0.2)).startswith("**")


def test_kinds_of_tokens():
    masks = torch.tensor([[[1.0, 0.4, 0.2, 0.0], [0.0, 0.6, 0.3, 1.0]]])
    kinds, names = probes.token_kinds(masks, num_reference=2, num_text=3)
    assert names == ("text", "background", "person 1", "person 2", "reference 1", "reference 2")
    assert kinds[r".*\.ff"].tolist() == [[2, 3, 1, 3, 4, 4, 5, 5]]
    assert kinds[r".*\.ff_context"].tolist() == [[0, 0, 0]]
    assert kinds["single_.*"].tolist() == [[0, 0, 0, 2, 3, 1, 3, 4, 4, 5, 5]]


def test_the_wide_lora_has_as_many_parameters_as_the_experts():
    def count(config: AdapterConfig) -> int:
        return sum(p.numel() for p in Adapters(load_flux(None).transformer, config).parameters())

    rank = ablation.SIZE_MATCHED
    experts, plain = (
        count(AdapterConfig()),
        [count(AdapterConfig(num_experts=0, rank=r, alpha=1.0)) for r in (rank - 1, rank)],
    )
    assert plain[0] < experts <= plain[1]


QUICK = ("ablation", "copy_paste")
"""The studies of which each `make test` runs a miniature; `make test-all` runs one of all."""


@pytest.mark.parametrize(
    "study",
    [pytest.param(s, id=s.name, marks=() if s.name in QUICK else pytest.mark.slow) for s in everything.STUDIES],
)
def test_every_study_runs(study, laboratory):
    """Two arms of each, in miniature; ``make bench-science-smoke`` runs all arms."""

    def few(budget):
        arms = study.arms(budget)
        chosen = {  # those that need everything: base, judges and reward of objects; experts
            "ablation_objects": ["baseline", ablation.LABELS["ippo"]],
            "copy_paste": [ablation.LABELS["moe"], ablation.LABELS["ippo"]],
            "ratios": ["before stage 2, experts", "GSPO, experts"],
        }
        wanted = chosen.get(study.name, list(arms)[:2])
        return {k: arms[k] for k in wanted}

    small = replace(study, arms=few)
    assert carry_out(small, laboratory, SMOKE)
    content = laboratory.summary(small, SMOKE)
    assert content["done"] == {k: [0] for k in small.arms(SMOKE)} and content["commits"] and content["versions"]
    page = (laboratory.pages / f"{study.name}.md").read_text()
    assert f"python -m studies.{study.name}" in page
    for picture in [p.split(")")[0] for p in page.split("](")[1:] if ".png)" in p[:60]]:
        assert (laboratory.pages / picture).stat().st_size > 1000


def test_the_page_of_all_studies_is_what_the_results_say():
    """Generated, never typed; the README is the other way round."""
    laboratory = Laboratory.full()
    assert "generated" not in (everything.ROOT / "README.md").read_text()
    assert (laboratory.pages / "science.md").read_text() == everything.overview(laboratory, FULL)


def test_hours_count_what_runs_share_once(laboratory, monkeypatch):
    """Two runs from one first stage, that only one of them trained; both are asked for by two studies."""
    runs = {0: experiment(seed=1), 1: replace(experiment(seed=1), align=SMOKE.rows(1)["ippo"][1])}
    study = Study(name="s", title="", arms=lambda b: {"one": runs}, summarise=lambda r: {}, page=lambda c, f: "")
    monkeypatch.setattr(everything, "STUDIES", (study, study))
    seconds = {0: {"stage 1": 3600.0, "tests": 360.0}, 1: {"stage 1": 7.0, "stage 2": 1800.0, "tests": 360.0}}
    monkeypatch.setattr(laboratory, "known", lambda e: {"seconds": seconds[int(e.align is not None)]})
    assert everything.hours(laboratory, SMOKE) == pytest.approx(1 + 0.5 + 0.2)
    monkeypatch.setattr(laboratory, "known", lambda e: None)
    assert everything.hours(laboratory, SMOKE) == 0


def test_command_line(monkeypatch, tmp_path, capsys):
    from studies.lab import laboratory as science

    monkeypatch.setattr(science, "ROOT", tmp_path)
    assert main(replace(ablation.STUDY, arms=lambda b: {}), ["--smoke", "--page"]) == 0
    assert "nothing is recorded" in capsys.readouterr().out
    with pytest.raises(SystemExit) as stop:
        main(ablation.STUDY, ["--seeds", "x"])
    assert stop.value.code == 2


@pytest.mark.parametrize(
    "wrong", [["--seeds", "0", "-3"], ["--minutes", "-1"], ["--minutes", "0"], ["--minutes", "nan"], ["--rounds", "0"]]
)
def test_command_lines_refuse_what_makes_no_sense(wrong, monkeypatch, capsys):
    """A negative seed was trained, and negative minutes were taken for time that is up."""
    monkeypatch.setattr(Laboratory, "perform", lambda *_: pytest.fail("begun"))
    programs = (
        [lambda a: main(ablation.STUDY, a), everything.main] if wrong[0] != "--rounds" else [inference_overhead.main]
    )
    for program in programs:
        with pytest.raises(SystemExit) as stop:
            program(["--smoke", *wrong])
        assert stop.value.code == 2
        assert f"{wrong[0]} must be" in (said := capsys.readouterr().err) and said.strip().endswith(f"got {wrong[-1]}")


def test_thin_keeps_the_mean():
    from studies.lab.laboratory import _thin

    history = [{"loss": float(i)} for i in range(1000)]
    thin = _thin(history, 10)
    assert len(thin) == 10 and np.mean([h["loss"] for h in thin]) == pytest.approx(499.5)


def test_trend_of_a_straight_line_and_of_gains_that_shrink():
    amounts, cases = [80, 160, 320, 1280], np.array([[0.1, 0.3]])
    doublings = np.array([0.0, 1.0, 2.0, 4.0])[:, None]
    straight = scaling.trend(amounts, cases + doublings * np.array([0.02, 0.04]))
    assert straight["a doubling"].mean == pytest.approx(0.03) and straight["a doubling"].low == pytest.approx(0.02)
    assert straight["measured - foretold"].mean == pytest.approx(0.0)
    shrinking = scaling.trend(amounts, cases + np.sqrt(doublings))
    assert shrinking["measured - foretold"].high < 0 < shrinking["a doubling"].low
    assert scaling.trend(amounts, np.full((4, 1), np.nan))["a doubling"].n == 0
    assert "measured - foretold" not in scaling.trend(amounts[:2], np.ones((2, 1)))


def test_scaling_orders_by_amount_and_tells_what_each_base_saw():
    def record(value, samples=None):
        metrics = {n: [value, value] for n in scaling.NAMES}
        return {0: {"tests": [{"metrics": metrics}], "base_training": samples and {"samples": samples}}}

    arms = {"1280 steps": record(0.3), "80 steps": record(0.1), "width 128": record(0.5, 7), "width 64": record(0.4, 9)}
    found = scaling.summarise(arms)
    assert list(found["steps"]) == ["80", "1280"] and list(found["widths"]) == ["64", "128"]
    assert found["base_samples"] == {"64": 9, "128": 7}
    assert found["trends"]["steps"]["swaps"]["a doubling"].mean == pytest.approx(0.2 / 4)
    assert found["trends"]["widths"]["swaps"]["a doubling"].mean == pytest.approx(0.1)


def test_where_numbers_of_subjects_break(tmp_path):
    """Records of made-up metrics: everyone is there up to two subjects, and attributes bleed at two only."""

    def record(counts, swaps):
        cases = np.linspace(-0.05, 0.05, 8)
        metrics = {"attributes": cases, "swaps_by_chance": cases + 0.1, "leakage": cases}
        return {
            "tests": [
                {"metrics": {**metrics, "count": cases + c, "swaps": cases + s}}
                for c, s in zip(counts, swaps, strict=True)
            ]
        }

    few, many = subjects.TRAINED
    summary = subjects.summarise(
        {
            few: {0: record((1, 0.9, 0.4, 0.2), (np.nan, 0.3, 0.1, 0.1))},
            many: {0: record((1, 0.9, 0.8, 0.7), (np.nan, 0.1, 0.1, 0.1))},
        }
    )
    write_json(tmp_path / "found.json", summary)
    found = json.loads((tmp_path / "found.json").read_text())
    first, second = (f"{label.capitalize()}: " for label in (few, many))
    assert (
        f"{first}fewer than half of the pictures show everyone from 3 subjects on; bleeding is shown at 2 subjects."
        in subjects.breaks(found)
    )
    assert (
        f"{second}fewer than half of the pictures show everyone at no number tried; bleeding is shown at no number of subjects."
        in subjects.breaks(found)
    )
    assert [m["count"]["mean"] for m in found["more"]] == pytest.approx([0, 0, 0.4, 0.5])


def test_runs_that_are_compared_differ_in_the_ratio_or_in_the_replay_alone():
    arms, seen = ratios.arms(SMOKE), set()
    for title, pairs in ratios.comparisons().items():
        for one, other in pairs:
            a, b = arms[one][0], arms[other][0]
            same = {"routing_replay": False} if "replayed -" in title else {"online": a.align.online}
            assert replace(b.align.online, policy=a.align.online.policy) == a.align.online
            assert a != b and replace(a, align=replace(a.align, **same)) == replace(b, align=replace(b.align, **same))
            seen |= {one, other}
    assert seen == {label for label in arms if not label.startswith(ratios.BEFORE)}


def test_the_other_rates_are_the_same_runs_at_another_rate():
    arms = ratios.arms(FULL)
    for label, by in arms.items():
        recipe, _, rate = label.partition(", ten times")
        if rate:
            assert set(by) == {0}
            for seed, experiment in by.items():
                usual = arms[recipe][seed]
                assert experiment == replace(usual, align=replace(usual.align, lr=10 * usual.align.lr))
    later = ratios.arms(replace(FULL, seeds=(3,)))  # the studies together ask seed by seed
    assert all(set(by) == (set() if "ten times" in label else {3}) for label, by in later.items())


def test_the_map_of_the_regime_has_every_form_beside_the_plain_lora_of_its_own_circumstances():
    def record(value):
        return {0: {"tests": [{"metrics": {n: [value, value] for n in regime.NAMES}}]}}

    arms = {"plain": 0.9, "96: plain": 0.1, "96: centre": 0.4, "96: the paper's letter": 0.05, "young: centre": 0.3}
    found = regime.summarise({label: record(value) for label, value in arms.items()})["circumstances"]
    bought = {k: v["minus_baseline"][f]["swaps"].mean for k, v in found.items() for f in v["minus_baseline"]}
    assert bought == {"96": pytest.approx(0.3), "96, the paper's letter": pytest.approx(-0.05)}


def test_pairs_are_parted_by_the_attributes_in_which_the_drawn_cases_differ() -> None:
    """The study draws its cases anew to know who looks alike; they must be the cases that were measured."""
    pipe = load_flux(None)
    test = replace(SMOKE.test(), num_cases=5, seed=77)
    scenes = encode_scenes(pipe, test.world(), test.num_cases, seed=test.seed)
    family = FAMILIES[test.family]
    expected = []
    for one, other in scenes.truth.identities.tolist():
        seen = [family.visible(torch.tensor([who]))[0].tolist() for who in (one, other)]
        expected.append(sum(a != b and u and v for a, b, u, v in zip(one, other, *seen, strict=True)))
    assert bleeding.differing_attributes(test).tolist() == expected
    assert len(set(expected)) > 1
