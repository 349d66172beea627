"""The study of a base without references: its arms, its arithmetic, and a page that says it."""

from __future__ import annotations

import json

import numpy as np
import pytest
from multicrafter.config.settings import to_dict
from multicrafter.files import write_json

from studies import text_only_base
from studies.lab.experiment import FULL, SMOKE, Base, deciding
from studies.text_only_base import APART, LOSS, NAMES, PLAIN, STEPS, label_of, steps_to


def test_no_other_base_is_renamed_by_it():
    assert deciding(to_dict(Base())) == deciding({k: v for k, v in to_dict(Base()).items() if k != "text_only"})
    with pytest.raises(ValueError, match="minutes must be given"):
        Base(text_only=True)


def test_every_form_is_trained_from_that_base_for_every_number_of_steps():
    arms = text_only_base.arms(FULL)
    assert all(e.base.text_only for by in arms.values() for e in by.values())
    assert {n: arms[label_of(LOSS, n)][1].pretrain.num_steps for n in STEPS} == {n: n for n in STEPS}
    assert (
        arms[label_of(PLAIN, STEPS[0])][0].pretrain.idar.coef
        == 0
        < arms[label_of(LOSS, STEPS[0])][0].pretrain.idar.coef
    )
    assert arms[label_of(APART, STEPS[0])][0].pretrain.separation.share > 0
    assert all(t.guidance == 1.0 for by in arms.values() for e in by.values() for t in e.tests)
    assert all(
        e.pretrain is None or e.pretrain.num_steps >= 1
        for by in text_only_base.arms(SMOKE).values()
        for e in by.values()
    )


@pytest.mark.parametrize(
    ("curve", "expected"),
    [
        ({100: 0.4, 400: 0.6}, 200),
        ({100: 0.5, 400: 0.6}, 100),
        ({100: 0.4, 400: 0.5}, 400),
        ({100: 0.4}, None),
        ({}, None),
    ],
)
def test_steps_to_a_level_are_read_off_a_logarithmic_scale(curve, expected):
    found = steps_to(0.5, curve)
    assert found is None if expected is None else found == pytest.approx(expected)


def record(attributes: float, bound: float) -> dict:
    base = np.linspace(-0.1, 0.1, 32)
    tests = [{"metrics": {name: (base + value).tolist() for name in NAMES}} for value in (attributes, bound)]
    return {"tests": tests}


def test_the_page_shows_what_a_form_gives_over_a_plain_one(tmp_path):
    rise = {160: 0.2, 640: 0.5, 2560: 0.6}
    records = {label_of(PLAIN, n): {0: record(v, v + 0.05)} for n, v in rise.items()}
    records |= {label_of(LOSS, n): {0: record(v + 0.1, v)} for n, v in rise.items()}
    records[text_only_base.ALONE] = {0: {"tests": [record(0.15, 0.0)["tests"][0]]}}
    found = text_only_base.summarise(records)
    assert found["curves"][f"{LOSS}, as it is"]["minus"][640].mean == pytest.approx(0.1)
    assert found["curves"][f"{PLAIN}, bound by its own draft"]["minus"][160].mean == pytest.approx(0.05)
    assert found["curves"][f"{LOSS}, bound by its own draft"]["minus"][160].mean == pytest.approx(0.0)
    assert found["steps_to"][f"{LOSS}, as it is"] == pytest.approx(640) and found["level"]["steps"] == 2560
    write_json(tmp_path / "summary.json", found)
    page = text_only_base.page(json.loads((tmp_path / "summary.json").read_text()), tmp_path)
    assert "| attention loss, as it is | **+0.100" in page and "| 640 |" in page
    assert "0.150 [" in page and (tmp_path / "text_only_base.png").stat().st_size > 5_000
