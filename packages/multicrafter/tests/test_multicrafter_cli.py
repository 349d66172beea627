"""The command line: whole runs on a small model, and one sentence for everything that can be wrong."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from multicrafter import UserError
from multicrafter.cli import main, messages
from multicrafter.demo.figures import reward_curve
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.training.checkpoint import CheckpointError
from PIL import Image


@pytest.fixture
def model(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (40, 60), (200, 40, 40)).save(tmp_path / "a.png")
    return str(tmp_path / "a.png")


@pytest.fixture
def adapter(pipe, tmp_path):
    return str(
        Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2)).save(
            tmp_path / "adapter", num_references=2
        )
    )


def fails(capsys, *words, argv):
    """Exit code 2, one line that holds all the words, nothing on stdout."""
    code = main(argv)
    captured = capsys.readouterr()
    assert code == 2
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert len(lines) == 1
    assert "Traceback" not in captured.err
    assert all(w in lines[0] for w in words), lines[0]


def test_generate_writes_a_picture(model, picture, tmp_path, capsys):
    out = tmp_path / "new" / "out.png"
    assert (
        main(
            [
                "generate",
                "--model",
                model,
                "--reference",
                picture,
                "--prompt",
                "one person",
                "--out",
                str(out),
                "--steps",
                "2",
            ]
        )
        == 0
    )
    assert Image.open(out).size == (64, 64)
    assert capsys.readouterr().out.strip() == str(out)
    assert [p.name for p in out.parent.iterdir()] == ["out.png"]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_generate_reads_and_writes_other_formats(model, tmp_path, suffix):
    rgba = Image.new("RGBA", (30, 30), (0, 255, 0, 0))
    rgba.save(tmp_path / "alpha.webp")
    out = tmp_path / f"out{suffix}"
    argv = [
        "generate",
        "--model",
        model,
        "--reference",
        str(tmp_path / "alpha.webp"),
        "--prompt",
        "x",
        "--out",
        str(out),
        "--steps",
        "1",
        "--num-images",
        "2",
    ]
    assert main(argv) == 0
    assert sorted(p.name for p in tmp_path.glob(f"out*{suffix}")) == [f"out_0{suffix}", f"out_1{suffix}"]


def test_too_many_references_warn_and_work(model, picture, adapter, tmp_path, capsys):
    argv = [
        "generate",
        "--model",
        model,
        "--adapter",
        adapter,
        *["--reference", picture] * 3,
        "--prompt",
        "x",
        "--out",
        str(tmp_path / "o.png"),
        "--steps",
        "1",
    ]
    assert main(argv) == 0
    assert "warning: 3 references" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--reference": "/nowhere/a.png"}, ["/nowhere/a.png", "no such file"]),
        ({"--reference": __file__}, ["readable picture"]),
        ({"--reference": None}, ["--reference"]),
        ({"--prompt": "  "}, ["--prompt", "empty"]),
        ({"--out": f"{__file__}/o.png"}, ["--out", "writ"]),
        ({"--out": "o.txt"}, ["--out", ".png"]),
        ({"--adapter": "/nowhere"}, ["adapter", "missing"]),
    ],
)
def test_bad_input_gets_one_sentence(model, picture, tmp_path, capsys, monkeypatch, change, words):
    monkeypatch.chdir(tmp_path)
    options = {
        "--model": model,
        "--reference": picture,
        "--prompt": "one person",
        "--out": "o.png",
        "--steps": "1",
        **change,
    }
    fails(capsys, *words, argv=["generate", *[x for k, v in options.items() if v is not None for x in (k, v)]])
    assert not list(tmp_path.glob("o.*"))


def test_a_broken_adapter_gets_one_sentence(model, picture, adapter, tmp_path, capsys):
    (Path(adapter) / "adapter.safetensors").write_bytes(b"broken")
    argv = [
        "generate",
        "--model",
        model,
        "--adapter",
        adapter,
        "--reference",
        picture,
        "--prompt",
        "x",
        "--out",
        str(tmp_path / "o.png"),
    ]
    fails(capsys, "adapter", argv=argv)


def test_a_model_without_a_part_gets_one_sentence(model, picture, tmp_path, capsys):
    (Path(model) / "model_index.json").unlink()
    fails(
        capsys,
        "model_index.json",
        argv=["generate", "--model", model, "--reference", picture, "--prompt", "x", "--out", str(tmp_path / "o.png")],
    )


@pytest.mark.parametrize("argv", [[], ["generate"], ["pretrain"], ["generate", "--steps", "0"], ["nonsense"]])
def test_usage_errors_exit_2(argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2


@pytest.mark.parametrize("command", ["", "generate", "pretrain", "align", "evaluate", "demo", "report"])
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*([command] if command else []), "--help"])
    assert stop.value.code == 0
    assert "usage: multicrafter" in capsys.readouterr().out


def test_both_stages_evaluation_and_resume(model, tmp_path, capsys):
    stage1, stage2 = str(tmp_path / "s1"), str(tmp_path / "s2")
    first = ["pretrain", "--model", model, "--out", stage1, "--steps", "2", "--batch", "2", "--scenes", "6"]
    assert main(first) == 0
    assert main([*first, "--resume"]) == 0
    fails(
        capsys_reset(capsys),
        "num_steps",
        argv=[
            "pretrain",
            "--model",
            model,
            "--out",
            stage1,
            "--steps",
            "3",
            "--batch",
            "2",
            "--scenes",
            "6",
            "--resume",
        ],
    )
    assert (
        main(
            [
                "align",
                "--model",
                model,
                "--adapter",
                f"{stage1}/adapter",
                "--out",
                stage2,
                "--steps",
                "1",
                "--prompts",
                "1",
                "--group-size",
                "2",
            ]
        )
        == 0
    )
    notes = json.loads(Path(stage2, "adapter", "adapter.json").read_text())
    assert notes["stage"] == 2
    assert notes["num_references"] == 2
    out = tmp_path / "e.json"
    assert (
        main(["evaluate", "--model", model, "--adapter", f"{stage2}/adapter", "--cases", "3", "--out", str(out)]) == 0
    )
    summary = json.loads(out.read_text())["summary"]
    assert {"identity", "attributes", "swaps", "text", "aesthetics", "leakage"} <= summary.keys()


def capsys_reset(capsys):
    capsys.readouterr()
    return capsys


def test_demo_writes_everything(model, tmp_path, capsys):
    out = tmp_path / "demo"
    assert (
        main(
            [
                "demo",
                "--model",
                model,
                "--out",
                str(out),
                "--stage1-steps",
                "2",
                "--stage2-steps",
                "1",
                "--cases",
                "4",
                "--scenes",
                "8",
            ]
        )
        == 0
    )
    printed = capsys.readouterr().out
    for name in ("pictures.png", "attention.png", "reward.png", "results.json", "report.html"):
        assert (out / name).stat().st_size > 0
        assert str(out / name) in printed
    results = json.loads((out / "results.json").read_text())
    assert results["summary"].keys() == {"baseline", "stage 1", "stage 2"}
    page = (out / "report.html").read_text()
    assert f"{results['summary']['stage 1']['text']['mean']:.2f}" in page
    assert main(["report", str(out)]) == 0
    fails(capsys_reset(capsys), "results.json", argv=["report", str(tmp_path)])


def test_reward_curve_has_a_panel_for_failures_only_where_something_failed(tmp_path):
    history = [{"step": i, "reward": 0.1 * i, "reward_text": 0.2, "reward_failures": 0.0} for i in range(3)]
    failed = [history[0], {**history[1], "reward_failures": 1.0}, history[2]]
    widths = [Image.open(reward_curve(tmp_path / f"{i}.png", h)).width for i, h in enumerate((history, failed))]
    assert widths[0] * 3 == widths[1] * 2


def test_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "multicrafter", "generate", "--prompt", "x", "--out", "o.png"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1].startswith("error: --reference")


def test_flags_change_a_recipe_too(model, tmp_path, capsys):
    """They were ignored beside --recipe; what --set says comes last."""
    flags = ["--recipe", "tiny_stage1", "--model", model, "--steps", "7", "--batch", "2", "--scenes", "4"]
    assert main(["pretrain", *flags, "--set", "num_steps=1", "--out", str(tmp_path / "run")]) == 0
    run = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["pretrain"]
    assert (run["num_steps"], run["batch"], run["num_scenes"]) == (1, 2, 4)


def test_rows_are_those_of_the_recipes():
    from multicrafter.cli import ROWS
    from multicrafter.config.recipes import ablation

    assert tuple(ablation()) == ROWS


@pytest.fixture
def failing(monkeypatch):
    """``multicrafter report`` raises what it is given."""

    def raising(error):
        def write_report(_):
            raise error

        monkeypatch.setattr("multicrafter.demo.report.write_report", write_report)

    return raising


@pytest.mark.parametrize(
    "error",
    [ValueError("broken inside"), KeyError("x"), FileNotFoundError(2, "gone"), ImportError("cannot import name")],
)
def test_a_defect_keeps_its_traceback(failing, tmp_path, error):
    (tmp_path / "results.json").write_text("{}")
    failing(error)
    with pytest.raises(type(error)) as raised:
        main(["report", str(tmp_path)])
    assert raised.value is error


@pytest.mark.parametrize(
    "error",
    [
        UserError("steps must be at least 1, got 0"),
        OSError(28, "No space left on device"),
        PermissionError(13, "closed"),
        ImportError("needs: pip install tensorboard"),
        CheckpointError("checkpoint x cannot be read"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence_and_with_debug_a_traceback_too(failing, tmp_path, capsys, error):
    (tmp_path / "results.json").write_text("{}")
    failing(error)
    assert main(["report", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {error}\n"
    for argv in (["--debug", "report", str(tmp_path)], ["report", str(tmp_path), "--debug"]):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert "Traceback" in said and "write_report" in said and said.endswith(f"error: {error}\n")


def test_debug_shows_what_a_sentence_came_from(tmp_path, capsys):
    wrong = tmp_path / "run.yaml"
    wrong.write_text("pretrain: {lr: -1}\n")
    assert main(["--debug", "plan", "--config", str(wrong)]) == 2
    assert "lr must be positive, got -1" in (said := capsys.readouterr().err)
    assert said.count("Traceback") > 1 and "direct cause" in said


def test_records_and_our_warnings_are_shown_and_others_insides_are_not(capsys):
    before = warnings.showwarning
    with warnings.catch_warnings(), messages.shown():
        logging.getLogger("gspo.step").warning("one")
        logging.getLogger("multicrafter.training.loop").info("two")
        logging.getLogger("multicrafter.training.loop").debug("hidden")
        warnings.warn_explicit("three", UserWarning, "x.py", 1, module="idar.masks")
        warnings.warn_explicit("hidden", UserWarning, "x.py", 1, module="diffusers.models.attention")
        warnings.warn_explicit("hidden", FutureWarning, "x.py", 1, module="somebody")
        warnings.warn_explicit("four", UserWarning, "x.py", 1, module="diffuserslike")
    assert capsys.readouterr().err == "warning: one\ntwo\nwarning: three\nwarning: four\n"
    assert warnings.showwarning is before and logging.getLogger("gspo").propagate
