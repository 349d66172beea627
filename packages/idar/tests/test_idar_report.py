"""``idar report``: a FLUX directory in, a report out; one sentence on bad input."""

from __future__ import annotations

import base64
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("diffusers", reason="needs idar[diffusers]")
pytest.importorskip("transformers", reason="needs idar[diffusers]")
pytest.importorskip("matplotlib", reason="needs idar[plot]")

sys.path.insert(0, str(Path(__file__).parent))

from idar.cli import main
from idar_tiny_flux import picture, tiny_flux
from PIL import Image


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline on disk, with two references and two masks beside it."""
    out = tmp_path_factory.mktemp("model")
    tiny_flux().save_pretrained(out / "flux")
    picture(40, 40).save(out / "a.png")
    picture(20, 40, (20, 40, 200)).save(out / "b.png")
    for name, box in (("mask_a", (0, 0, 12, 24)), ("mask_b", (12, 0, 24, 24))):
        mask = Image.new("L", (24, 24))
        mask.paste(255, box)
        mask.save(out / f"{name}.png")
    return out


def arguments(folder: Path, out: Path) -> list[str]:
    return [
        "report", str(folder / "flux"), "--reference", str(folder / "a.png"), "--reference", str(folder / "b.png"),
        "--prompt", "two people in a park", "--steps", "2", "--out", str(out),
    ]  # fmt: skip


def test_report_of_a_flux_directory(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = [
        "--mask",
        str(folder / "mask_a.png"),
        "--mask",
        str(folder / "mask_b.png"),
        "--name",
        "Ann",
        "--name",
        "B<b>ob",
    ]
    assert main([*arguments(folder, tmp_path / "out"), *masks]) == 0
    assert "leakage" in capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert set(found["directions"]) == {"reference_to_image", "image_to_reference"}
    assert found["grid"] == [6, 6]
    for part in found["directions"].values():
        assert part["profile"]["blocks"] == ["transformer_blocks.0.attn", "transformer_blocks.1.attn"]
        assert len(part["profile"]["sigmas"]) == 2
        assert len(part["profile"]["leakage"][1][1]) == 2
        assert all(0 <= v <= 1 for v in part["overall"]["leakage"])
    page = (tmp_path / "out" / "report.html").read_text()
    embedded = re.findall(r"base64,([^']+)", page)
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert len(embedded) == 8
    assert base64.b64decode(embedded[0])[:4] == b"\x89PNG"
    assert "B&lt;b&gt;ob" in page
    assert "B<b>ob" not in page
    assert {"maps_image_to_reference.png", "blocks_reference_to_image_1.png", "profile_image_to_reference.png"} <= files


def test_without_masks_there_is_the_overlap(folder: Path, tmp_path: Path) -> None:
    assert main([*arguments(folder, tmp_path), "--direction", "image_to_reference", "--size", "24x32"]) == 0
    found = json.loads((tmp_path / "report.json").read_text())
    assert set(found["directions"]["image_to_reference"]["overall"]) == {"overlap"}
    assert found["grid"] == [6, 8]


def test_watch_prints_leakage_and_writes_one_figure(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Masks of 0 and 1 in a palette, and of transparency, give the leakage of masks of 0 and 255."""
    inside = Image.open(folder / "mask_a.png")
    inside.point(lambda v: v // 255).save(tmp_path / "a.png")
    cut = picture(24, 24, (9, 60, 200))
    cut.putalpha(Image.open(folder / "mask_b.png"))
    cut.save(tmp_path / "b.png")
    found = []
    for place in (folder / "mask_{}.png", tmp_path / "{}.png"):
        masks = [option for name in "ab" for option in ("--mask", str(place).format(name))]
        command = ["watch", *arguments(folder, tmp_path / f"{len(found)}.png")[1:], *masks]
        assert main(command) == 0
        found.append(capsys.readouterr().out.splitlines()[:2])
        assert (tmp_path / f"{len(found) - 1}.png").is_file()
        assert main(command) == 2  # it is there
        assert "--out must be a new file" in capsys.readouterr().err
    assert found[0] == found[1] and "subject A: leakage 0." in found[0][0]


def broken(folder: Path, tmp_path: Path, what: str) -> list[str]:
    """Arguments with one thing wrong."""
    good = arguments(folder, tmp_path / "out")
    Image.new("L", (48, 24), 255).save(tmp_path / "wide.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "model_index.json").write_text("{")
    (tmp_path / "empty").mkdir()
    (tmp_path / "partial").mkdir()
    (tmp_path / "partial" / "model_index.json").write_text((folder / "flux" / "model_index.json").read_text())
    changes: dict[str, Callable[[], list[str]]] = {
        "no picture": lambda: [*good, "--reference", str(tmp_path / "nowhere.png")],
        "text": lambda: [*good, "--reference", str(tmp_path / "text.png")],
        "masks": lambda: [*good, "--mask", str(folder / "mask_a.png")],
        "steps": lambda: [*good, "--steps", "0"],
        "size": lambda: [*good, "--size", "25"],
        "prompt": lambda: [*good, "--prompt", " "],
        "block": lambda: [*good, "--block", "nowhere.attn"],
        "wide mask": lambda: [*good, "--mask", str(folder / "mask_a.png"), "--mask", str(tmp_path / "wide.png")],
        "device": lambda: [*good, "--device", "abacus"],
        "file": lambda: [*good, "--out", str(folder / "a.png")],
        **{
            name: lambda name=name: ["report", str(tmp_path / name), *good[2:]]
            for name in ("other", "torn", "empty", "partial")
        },
    }
    return changes[what]()


@pytest.mark.parametrize(
    ("what", "word"),
    [
        ("no picture", "nowhere.png"),
        ("text", "text.png"),
        ("masks", "--mask"),
        ("steps", "num_steps"),
        ("size", "size"),
        ("prompt", "--prompt"),
        ("block", "blocks"),
        ("file", "--out"),
        ("wide mask", "proportions"),
        ("device", "--device"),
        ("other", "StableDiffusionPipeline"),
        ("torn", "model_index.json"),
        ("empty", "model_index.json"),
        ("partial", "readable"),
    ],
)
def test_bad_input_is_one_sentence(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], what: str, word: str
) -> None:
    assert main(broken(folder, tmp_path, what)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("idar: error: ")
    assert word in error
    assert "Traceback" not in error
    assert not (tmp_path / "out").exists()


def test_the_module_is_a_command_and_argparse_exits_with_2() -> None:
    done = subprocess.run([sys.executable, "-m", "idar", "--help"], capture_output=True, text=True, check=True)
    assert "report" in done.stdout
    for wrong in ([], ["report"], ["report", "x", "--reference", "a", "--prompt", "b", "--size", "wide"]):
        with pytest.raises(SystemExit) as caught:
            main(wrong)
        assert caught.value.code == 2
