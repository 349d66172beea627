"""The first minute: references of the drawn world, a picture by the adapter that ships, and how people are kept apart."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from multicrafter.cli import main
from multicrafter.demo.both_stages import claims
from multicrafter.demo.figures import side_by_side
from multicrafter.models.adapters import Adapters
from multicrafter.pipeline import MultiCrafterPipeline, load_flux
from multicrafter.scoring.evaluate import EvaluateConfig, Interval, cases
from multicrafter.world import shipped_adapter
from PIL import Image

QUICK = ["--steps", "2", "--draft-steps", "1"]


@pytest.fixture(scope="module")
def people(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("drawn") / "people"
    assert main(["draw-references", "--number", "2", "--seed", "5", "--out", str(out)]) == 0
    return out


def asked(people: Path, out: Path, *more: str) -> list[str]:
    given = [part for name in ("a", "b") for part in ("--reference", str(people / f"{name}.png"))]
    return ["generate", *given, "--prompt", (people / "caption.txt").read_text().strip(), "--out", str(out), *more]


def test_references_are_people_with_a_caption_and_nothing_is_overwritten(
    people: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sorted(p.name for p in people.iterdir()) == ["a.png", "b.png", "caption.txt"]
    assert Image.open(people / "a.png").size == (128, 128)
    assert (people / "caption.txt").read_text().startswith("two people")
    before = (people / "a.png").read_bytes()
    assert main(["draw-references", "--seed", "6", "--out", str(people)]) == 2
    assert "must not hold a.png" in capsys.readouterr().err
    assert (people / "a.png").read_bytes() == before


def test_another_seed_other_people(people: Path, tmp_path: Path) -> None:
    assert main(["draw-references", "--seed", "5", "--out", str(tmp_path / "same")]) == 0
    assert main(["draw-references", "--seed", "6", "--number", "3", "--out", str(tmp_path / "other")]) == 0
    assert (tmp_path / "same" / "b.png").read_bytes() == (people / "b.png").read_bytes()
    assert (tmp_path / "other" / "a.png").read_bytes() != (people / "a.png").read_bytes()
    assert (tmp_path / "other" / "c.png").exists()


def test_without_a_model_the_shipped_adapter_draws_bound(people: Path, tmp_path: Path) -> None:
    out, sheet = tmp_path / "picture.png", tmp_path / "sheet.png"
    assert main(asked(people, out, *QUICK, "--sheet", str(sheet))) == 0
    assert Image.open(out).size == (64, 64) and Image.open(sheet).width > 800
    ways = {"none": ["--separation", "none"], "base": ["--adapter", "none"]}
    four = ["--steps", "4"]  # with two, in flight would know too late
    ways |= {"four": [*four, "--separation", "none"], "flight": [*four, "--separation", "in-flight"]}
    for name, more in ways.items():
        assert main(asked(people, tmp_path / f"{name}.png", *QUICK, *more)) == 0
    pictures = {p.stem: p.read_bytes() for p in tmp_path.glob("*.png") if p.stem != "sheet"}
    assert len(set(pictures.values())) == 5, "each way draws another picture"


def test_masks_say_who_goes_where(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left = np.zeros((64, 64), np.uint8)
    left[:, :32] = 255
    for name, mask in (("l", left), ("r", 255 - left)):
        Image.fromarray(mask).save(tmp_path / f"{name}.png")
    masks = ["--mask", str(tmp_path / "l.png"), "--mask", str(tmp_path / "r.png")]
    assert main(asked(people, tmp_path / "one.png", *QUICK, "--separation", "masks", *masks)) == 0
    assert main(asked(people, tmp_path / "two.png", *QUICK, "--separation", "masks", *masks[2:], *masks[:2])) == 0
    assert (tmp_path / "one.png").read_bytes() != (tmp_path / "two.png").read_bytes()
    for wrong, word in (
        (["--separation", "masks"], "masks must be given"),
        (["--separation", "masks", *masks[:2]], "one per reference"),
        (["--separation", "draft", *masks], "--mask is for --separation masks"),
        (["--bind-at", "2"], "bind_at"),
        (["--sheet", str(tmp_path / "x.jpg")], "--sheet"),
    ):
        assert main(asked(people, tmp_path / "no.png", *QUICK, *wrong)) == 2
        assert word in capsys.readouterr().err
    assert not (tmp_path / "no.png").exists()


def test_one_picture_for_two_people_is_told(people: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "b.png").write_bytes((people / "a.png").read_bytes())
    given = asked(people, tmp_path / "out.png", *QUICK)
    given[given.index(str(people / "b.png"))] = str(tmp_path / "b.png")
    assert main(given) == 0
    assert "warning: subjects 1 and 2 have the same picture" in capsys.readouterr().err


@pytest.mark.parametrize("stage", [1, 2])
def test_the_shipped_adapters_say_how_they_are_drawn(stage: int) -> None:
    folder = shipped_adapter(stage)
    notes = json.loads((folder / "adapter.json").read_text())
    assert notes["stage"] == stage
    assert notes["sampling"]["separation"] == "draft" and notes["num_references"] == 2
    pipeline = MultiCrafterPipeline.from_pretrained(None, adapter=folder)
    assert pipeline.separation.mode == "draft"
    assert pipeline.num_steps == notes["sampling"]["num_steps"] and pipeline.guidance == notes["sampling"]["guidance"]
    assert isinstance(pipeline.adapters, Adapters)
    with pytest.raises(ValueError, match="stage must be"):
        shipped_adapter(9)


def test_side_by_side_frames_without_above_with(tmp_path: Path) -> None:
    scenes = cases(load_flux(None), EvaluateConfig(num_cases=2, split="validation"))
    path = side_by_side(tmp_path / "s.png", scenes, scenes.images, 1 - scenes.images, [0, 1])
    seen = np.asarray(Image.open(path).convert("RGB"))
    red, green = (np.flatnonzero((seen == colour).all(-1).any(1)) for colour in ((214, 39, 40), (44, 160, 44)))
    assert 0 < red.min() < red.max() < green.min(), "framed, without above with"


def interval(low: float, high: float) -> Interval:
    return Interval((low + high) / 2, low, high, 10)


def test_claims_hold_only_with_their_intervals() -> None:
    """Each claim flips when the interval that it rests on crosses its bound."""
    names = ("attributes", "identity", "swaps", "leakage", "reward", "swaps_above_chance")
    good = {
        "stage 1 - baseline": {n: interval(0.1, 0.2) for n in names} | {"swaps": interval(-0.2, -0.1)},
        "stage 2 - stage 1": {n: interval(0.1, 0.2) for n in names},
    }
    alone = {
        "baseline": {"swaps_above_chance": interval(0.1, 0.2)},
        "stage 1": {"swaps_above_chance": interval(-0.02, 0.03)},
    }
    assert all(c["holds"] for c in claims(good, alone).values())  # type: ignore[arg-type]
    torn = {k: {n: interval(-0.1, 0.2) for n in v} for k, v in good.items()}
    bad_alone = {k: {"swaps_above_chance": interval(-0.1, 0.3)} for k in alone}
    held = [text for text, c in claims(torn, bad_alone).items() if c["holds"]]  # type: ignore[arg-type]
    assert held == ["Stage 2 does not lower identity"]
