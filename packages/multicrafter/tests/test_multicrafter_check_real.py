"""`multicrafter check-real` runs whole on tiny checkpoints, notes what fails and goes on, and gives nothing away."""

from __future__ import annotations

import argparse
import json
import re
import shutil
from types import SimpleNamespace

import pytest
import torch
from multicrafter.cli import check_real, main
from multicrafter.config.recipes import Stage1, Stage2
from multicrafter.world.tiny_backbones import tiny_klein
from safetensors.torch import load_file

SMALL = ["--set", "pretrain.adapters.rank=2", "--set", "pretrain.adapters.num_experts=2", "--set", "pretrain.batch=2"]
QUICK = [
    *SMALL, "--set", "align.online.window.num_steps=6", "--set", "pretrain.execution.dtype=float32",
    "--set", "align.execution.dtype=float32", "--set", "align.online.policy.num_inner_epochs=1",
    "--set", "pretrain.execution.gradient_checkpointing=false", "--set", "align.execution.gradient_checkpointing=false",
]  # fmt: skip
NAMES = ["load", "draw with two references", "capture attention", "stage 1, 10 steps", "stage 2, one iteration"]


@pytest.fixture(
    scope="module", params=[False, pytest.param(True, marks=pytest.mark.slow)], ids=["plan known", "planned"]
)
def checked(request, tmp_path_factory):
    """Exit code, report and page of FLUX.2-klein's recipes on a tiny pipeline of its class; plans take most of the time."""
    home = tmp_path_factory.mktemp("somebodys_home")
    tiny_klein().save_pretrained(home / "secret_weights")
    out, asked = home / "out", []
    with pytest.MonkeyPatch.context() as patch:
        if not request.param:
            known = SimpleNamespace(peak=5e6, seconds=1.0)
            patch.setattr("multicrafter.plan.predict", lambda run, card: asked.append((run, card)) or known)
        code = main(
            [
                "check-real",
                "--backbone",
                "flux2_klein",
                "--model",
                str(home / "secret_weights"),
                "--out",
                str(out),
                *QUICK,
            ]
        )
    if not request.param:
        assert [type(run) for run, _ in asked] == [Stage1, Stage2]
        assert all(
            run.model.path == str(home / "secret_weights") and run.execution.cache is not None for run, _ in asked
        )
    return code, json.loads((out / "report.json").read_text()), (out / "report.html").read_text(), home


def test_everything_runs_on_a_tiny_checkpoint(checked):
    code, report, page, _ = checked
    assert [(p["name"], p["ok"], p["error"]) for p in report["parts"]] == [(name, True, None) for name in NAMES]
    assert code == 0
    draw, attention, one, two = (part["facts"] for part in report["parts"][1:])
    assert draw["passes"] == 2 * draw["steps"], "guided, as the backbone says"
    assert 0 < attention["leakage of the base (1/2 is blind)"] < 1
    assert one["skipped steps"] == 0 and one["loss, first and last"][0] != one["loss, first and last"][1]
    assert two["initial_log_ratio"] == pytest.approx(0, abs=1e-4), "the policy is the one that drew"
    assert two["reward_spread"] > 0
    assert all(part["predicted_bytes"] > 0 for part in report["parts"][3:])
    assert all(part["peak_bytes"] is None and part["predicted_seconds"] is None for part in report["parts"]), "no card"
    assert page.count("<img") == 2 + 1 + 1 + 2


def test_the_report_gives_nothing_away(checked):
    _, report, page, home = checked
    text = json.dumps(report) + re.sub(r"data:image/png;base64,[\w+/=]+", "", page)
    for private in ("somebodys_home", "secret_weights", str(home), "/home/", "/tmp/"):
        assert private not in text
    assert report["model"] == "a local folder"


def test_a_part_that_fails_is_noted_and_the_rest_goes_on(tmp_path, monkeypatch, capsys):
    def broken(self, part):
        raise RuntimeError(f"no room in {tmp_path / 'here'}")

    monkeypatch.setattr(check_real.Check, "_attention", broken)
    monkeypatch.setattr(check_real.Check, "_stage1", broken)
    assert main(["check-real", "--out", str(tmp_path / "out"), *SMALL]) == 1
    assert "failed: capture attention, stage 1, 10 steps" in capsys.readouterr().err
    text = (tmp_path / "out" / "report.json").read_text()
    parts = json.loads(text)["parts"]
    assert [p["ok"] for p in parts] == [True, True, False, False], "stage 2 needs what stage 1 makes, and is left out"
    assert "no room in .../here" in parts[2]["error"] and str(tmp_path) not in text
    assert "capture attention failed" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--backbone", "flux9"], "must be one that has a recipe, one of flux1_dev, flux1_kontext"),
        (["--backbone", "flux2_klein_kv"], "must be one that has a recipe"),
        (["--model", "somewhere"], "--backbone must be given with --model"),
        (["--set", "rank=3"], "--set must begin with"),
        (["--device", "cuda:77"], "device must be one of"),
    ],
)
def test_bad_input_is_one_sentence(words, sentence, tmp_path, capsys):
    assert main(["check-real", "--out", str(tmp_path / "out"), *words]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A tiny FLUX.2-klein, whole."""
    folder = tmp_path_factory.mktemp("weights") / "klein"
    tiny_klein().save_pretrained(folder)
    return folder


def cut_short(folder):
    (file,) = (folder / "transformer").glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:2000])


def pickled(folder):
    (file,) = (folder / "vae").glob("*.safetensors")
    torch.save(load_file(file), file.with_name("diffusion_pytorch_model.bin"))
    file.unlink()


@pytest.mark.parametrize(
    ("backbone", "change", "sentence"),
    [
        ("flux2_klein", shutil.rmtree, "must be a readable pipeline directory of diffusers or a hub id, got"),
        ("flux2_klein", lambda folder: shutil.rmtree(folder / "transformer"), "but it lacks transformer"),
        ("flux2_klein", cut_short, "Unable to load weights from checkpoint file"),
        ("flux2_klein", pickled, "no file named diffusion_pytorch_model.safetensors"),
        ("flux2_klein", lambda folder: (folder / "model_index.json").write_text("{"), "got a broken one"),
        ("flux1_dev", lambda folder: None, "must be a FluxPipeline for flux1_dev, got a Flux2KleinPipeline"),
        ("flux2_dev", lambda folder: None, "must be a Flux2Pipeline for flux2_dev, got a Flux2KleinPipeline"),
    ],
)
def test_weights_that_cannot_be_loaded_are_one_sentence_and_no_report(
    weights, backbone, change, sentence, tmp_path, capsys
):
    """Half a checkpoint, one of another backbone, one that would have to be unpickled: 2, and nothing is written."""
    shutil.copytree(weights, tmp_path / "given")
    change(tmp_path / "given")
    assert (
        main(["check-real", "--backbone", backbone, "--model", str(tmp_path / "given"), "--out", str(tmp_path / "out")])
        == 2
    )
    said = capsys.readouterr().err.splitlines()
    assert said[-1].startswith("error: ") and sentence in said[-1]
    assert not any("Traceback" in line for line in said) and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("free", "sentence"), [(1e6, "the report must have 20 MB"), (1e8, "encoded texts and pictures must have 168 MB")]
)
def test_a_full_disk_is_said_before_the_work(weights, free, sentence, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))
    words = ["check-real", "--backbone", "flux1_dev", "--model", str(weights), "--out", str(tmp_path / "out" / "deep")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert sentence in said and "load ..." not in said and not (tmp_path / "out").exists()


def test_an_earlier_report_is_not_overwritten(tmp_path, capsys):
    (tmp_path / "report.json").write_text("{}")
    assert main(["check-real", "--out", str(tmp_path)]) == 2
    assert "holds report.json" in capsys.readouterr().err
    assert (tmp_path / "report.json").read_text() == "{}"


def test_paths_are_cut_and_addresses_kept():
    cut = check_real.without_paths
    assert cut("cannot open C:\\Users\\ada\\w.bin or '/srv/a b/w.bin'") == "cannot open .../w.bin or '.../w.bin'"
    assert cut("black-forest-labs/FLUX.1-dev at https://huggingface.co/black-forest-labs/FLUX.1-dev") == (
        "black-forest-labs/FLUX.1-dev at https://huggingface.co/black-forest-labs/FLUX.1-dev"
    )
    assert cut("1/2 of 3 / 4") == "1/2 of 3 / 4"


@pytest.mark.parametrize("backbone", [None, "flux1_kontext", "flux2_dev"])
def test_no_recipe_asks_for_a_judge_that_is_not_there(backbone):
    """The tiny recipe has a judge watch; the stand-in for a reward comes without one."""
    asked = argparse.Namespace(backbone=backbone, model=None, seed=0, changes=[])
    align = check_real.runs(asked)[1].align
    assert (align.watch.action, align.reward_normalization) == ("none", "sum")
