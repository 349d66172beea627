"""Pipelines and adapters as files: saving, the card, the hub, and what does not belong together."""

from __future__ import annotations

import json
import math

import pytest
import torch
from multicrafter.cli import main
from multicrafter.models.loading import resolve_adapter
from multicrafter.pipeline import MultiCrafterPipeline, load_flux
from multicrafter.world.tiny_backbones import tiny_flux1, tiny_klein
from multicrafter_tiny import BLUE, CONFIG, RED, filled, latents, with_adapter


@pytest.fixture
def flux():
    return filled(tiny_flux1(CONFIG, guidance_embeds=True))


@pytest.fixture
def klein():
    return filled(tiny_klein())


@pytest.mark.parametrize("base", [False, True])
def test_a_saved_pipeline_draws_the_same(klein, tmp_path, base):
    klein.save_pretrained(tmp_path / "base")
    made = with_adapter(load_flux(tmp_path / "base"), stage=1, size=64, reference_size=24)
    want = latents(made, "x", [RED, BLUE])
    folder = made.save_pretrained(tmp_path / "saved", base=base)
    assert torch.equal(latents(made, "x", [RED, BLUE]), want), "saving leaves it as it was"
    names = {p.name for p in folder.iterdir()}
    assert {"adapter.json", "adapter.safetensors", "README.md"} <= names
    assert ("model_index.json" in names) == base
    assert not list(tmp_path.glob(".saved*"))
    assert {p.stat().st_mode for p in folder.rglob("*") if p.is_file()} == {(folder / "README.md").stat().st_mode}
    if base:
        assert "lora" not in "".join(json.loads((folder / "transformer" / "config.json").read_text()))
        (tmp_path / "base" / "model_index.json").unlink()
    again = MultiCrafterPipeline.from_pretrained(folder)
    assert (again.size, again.reference_size, again.max_references) == (64, 24, 2)
    assert torch.equal(latents(again, "x", [RED, BLUE]), want)
    again.save_pretrained(folder, base=base)
    assert torch.equal(latents(MultiCrafterPipeline.from_pretrained(folder), "x", [RED, BLUE]), want)


def test_the_card_is_written_from_the_run(klein, tmp_path):
    klein.save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    with_adapter(klein).adapters.save(run / "adapter", stage=1, num_references=2, steps=20)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i + 1, "loss": float(i)}) + "\n" for i in range(20)))
    (run / "config.json").write_text(json.dumps({"lr": 0.125}))
    loaded = MultiCrafterPipeline.from_pretrained(tmp_path / "base", adapter=run / "adapter")
    card = (loaded.save_pretrained(tmp_path / "saved") / "README.md").read_text()
    for words in (
        "| loss | 18.5 |",
        "0.125",
        "2 experts, top 1",
        "license: apache-2.0",
        "library_name: multicrafter",
        "| steps | 20 |",
    ):
        assert words in card
    with pytest.raises(ValueError, match="neither"):
        MultiCrafterPipeline(loaded.pipe).save_pretrained(tmp_path / "none")
    assert not (tmp_path / "none").exists()


def test_pushing_uploads_what_is_saved(klein, monkeypatch):
    import huggingface_hub

    calls = {}

    class Api:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, *, private, exist_ok):
            calls["create"] = (repo_id, private, exist_ok)
            return type("Repo", (), {"repo_id": repo_id})

        def upload_folder(self, *, repo_id, folder_path, commit_message, create_pr):
            calls["files"] = sorted(p.name for p in folder_path.iterdir())
            calls["card"] = (folder_path / "README.md").read_text()
            return f"https://hub/{repo_id}/commit/1"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert (
        with_adapter(klein).push_to_hub("me/two-people", private=True, token="t")
        == "https://hub/me/two-people/commit/1"
    )
    assert calls["create"] == ("me/two-people", True, True)
    assert calls["files"] == ["README.md", "adapter.json", "adapter.safetensors"]
    assert 'from_pretrained("me/two-people")' in calls["card"]
    assert calls["token"] == "t"
    monkeypatch.setattr(Api, "create_repo", lambda *a, **k: (_ for _ in ()).throw(OSError("403 forbidden")))
    with pytest.raises(ValueError, match="writable on the hub"):
        with_adapter(filled(tiny_klein())).push_to_hub("me/two-people")


# Bad input: one sentence, exit code 2, nothing half-written


def fails(capsys, *words, argv):
    code = main(argv)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error:")]
    assert (code, captured.out, len(lines)) == (2, "", 1)
    assert "Traceback" not in captured.err
    assert all(w in lines[0] for w in words), lines[0]


@pytest.fixture
def command(klein, tmp_path):
    klein.save_pretrained(tmp_path / "base")
    RED.save(tmp_path / "a.png")
    return {
        "--model": str(tmp_path / "base"), "--reference": str(tmp_path / "a.png"), "--prompt": "x", "--out": str(tmp_path / "o.png"),
        "--steps": "1",
    }  # fmt: skip


def argv(command, **change):
    merged = {**command, **{f"--{k.replace('_', '-')}": v for k, v in change.items()}}
    return ["generate", *[x for pair in merged.items() for x in pair]]


def test_another_backbones_adapter(command, flux, tmp_path, capsys):
    saved = with_adapter(flux).adapters.save(tmp_path / "flux_adapter", num_references=2)
    fails(capsys, "backbone flux2_klein", "flux1_dev", argv=argv(command, adapter=str(saved)))
    assert not (tmp_path / "o.png").exists()


def test_adapter_of_the_wrong_dtype(command, klein, tmp_path, capsys):
    from safetensors.torch import load_file, save_file

    saved = with_adapter(klein).adapters.save(tmp_path / "a", num_references=2)
    state = load_file(saved / "adapter.safetensors")
    save_file({k: v.to(torch.int8) for k, v in state.items()}, saved / "adapter.safetensors")
    fails(capsys, "float32, bfloat16 or float16", "int8", argv=argv(command, adapter=str(saved)))
    fails(capsys, "dtype must be one of", "int4", argv=argv(command, dtype="int4"))


def test_references_larger_than_allowed(command, tmp_path, capsys):
    fails(capsys, "reference_size must be at most", "128", argv=argv(command, reference_size="128"))
    assert not (tmp_path / "o.png").exists()
    fails(capsys, "reference_size must be a positive multiple of 8", argv=argv(command, reference_size="30"))


def test_gated_weights_without_a_token(command, capsys, monkeypatch):
    import diffusers
    import httpx2
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    def raising(error_class):
        def from_pretrained(*_args, **_options):
            response = httpx2.Response(401, request=httpx2.Request("GET", "https://huggingface.co/x"))
            try:
                raise error_class("401 Client Error", response=response)
            except error_class as error:
                raise OSError("cannot load model") from error

        return from_pretrained

    monkeypatch.setattr("multicrafter.models.publish._base_on_hub", lambda model: None)
    monkeypatch.setattr("multicrafter.plan.memory.available_memory", lambda *_: 1e12)  # whatever this machine has
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", raising(GatedRepoError))
    fails(
        capsys,
        "is gated",
        "huggingface.co/black-forest-labs/FLUX.1-dev",
        argv=argv(command, model="black-forest-labs/FLUX.1-dev"),
    )
    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", raising(RepositoryNotFoundError))
    fails(capsys, "exists and that you may read", argv=argv(command, model="me/nothing"))


def test_an_adapter_without_its_base(klein, tmp_path):
    folder = with_adapter(klein).adapters.save(tmp_path / "a")
    with pytest.raises(ValueError, match="must name its base_model"):
        MultiCrafterPipeline.from_pretrained(folder)
    assert resolve_adapter("./x") != "./x"
    assert math.isclose(MultiCrafterPipeline(klein).size, 64)
