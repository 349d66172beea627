"""Exported adapters draw what the adapter draws, whoever loads them; on another base they are refused, and nothing is overwritten."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from moe_lora.export import LowRank
from multicrafter import UserError, load_into
from multicrafter.cli import main
from multicrafter.files import source_commit
from multicrafter.models import export
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import Flux1, backbone_of
from multicrafter.models.flux.model import Text
from multicrafter.pipeline import MultiCrafterPipeline, load_flux
from multicrafter.world import shipped_adapter
from multicrafter.world.tiny_backbones import TINY
from multicrafter.world.tiny_flux import TinyFluxConfig
from safetensors.torch import load_file, save_file

SMALL = TinyFluxConfig(num_heads=2, head_dim=16, num_double=2, num_single=2, vae_channels=(8, 8, 8), text_width=16)
PLAIN = AdapterConfig(rank=3, alpha=5.0, num_experts=0)  # a scale that is no power of two
CLOSE = 1e-5


@torch.no_grad()
def build(name: str) -> Any:
    """A tiny pipeline whose every weight matters; the same at every call."""
    pipe = TINY[name](SMALL) if name.startswith("flux1") else TINY[name]()
    generator = torch.Generator().manual_seed(1)
    for parameter in pipe.transformer.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return pipe


@torch.no_grad()
def adapter(pipe: Any, config: AdapterConfig = PLAIN, *, seed: int = 2) -> Adapters:
    """An adapter that does something."""
    made, generator = (
        Adapters(pipe.transformer, config, backbone=backbone_of(pipe)),
        torch.Generator().manual_seed(seed),
    )
    for parameter in made.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return made


@torch.no_grad()
def velocity(pipe: Any, transformer: Any = None) -> torch.Tensor:
    """Of two references and a text, all drawn from one seed."""
    backbone, generator = backbone_of(pipe), torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    width, like = pipe.transformer.config.in_channels, backbone.empty_text(pipe.transformer, 2, 5)
    text = Text(draw(*like.embeds.shape), None if like.pooled is None else draw(*like.pooled.shape))
    return backbone.velocity(
        transformer or pipe.transformer, draw(2, 16, width), torch.tensor([0.7, 0.2]), text, image_grid=(4, 4),
        references=[draw(2, 4, width) for _ in range(2)], reference_grids=[(2, 2)] * 2, guidance=2.5,
    )  # fmt: skip


@pytest.fixture(scope="module", params=sorted(TINY))
def trained(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path, torch.Tensor, torch.Tensor]:
    """Name, saved adapter, velocity of the base and with the adapter."""
    pipe = build(request.param)
    before = velocity(pipe)
    folder = adapter(pipe).save(
        tmp_path_factory.mktemp(request.param) / "adapter", stage=1, num_references=2, sampling={"num_steps": 7}
    )
    after = velocity(pipe)
    assert float((after - before).abs().max()) > 0.1
    return request.param, folder, before, after


def exported(folder: Path, form: str, out: Path, pipe: Any = None) -> Path:
    return export.write(export.read_plain(folder), form, out, transformer=None if pipe is None else pipe.transformer)


def test_diffusers_loads_it(trained, tmp_path):
    name, folder, _, after = trained
    pipe = build(name)
    pipe.load_lora_weights(str(exported(folder, "diffusers", tmp_path / "lora.safetensors")), use_safetensors=True)
    torch.testing.assert_close(velocity(pipe), after, atol=CLOSE, rtol=0)


def test_peft_loads_it(trained, tmp_path):
    from peft import PeftModel

    name, folder, before, after = trained
    pipe = build(name)
    model = PeftModel.from_pretrained(pipe.transformer, str(exported(folder, "peft", tmp_path / "peft")))
    torch.testing.assert_close(velocity(pipe, model.base_model.model), after, atol=CLOSE, rtol=0)
    with model.disable_adapter():
        torch.testing.assert_close(velocity(pipe, model.base_model.model), before, atol=CLOSE, rtol=0)


def test_merged_it_is_a_transformer_of_diffusers(trained, tmp_path):
    name, folder, _, after = trained
    pipe = build(name)
    out = exported(folder, "merged", tmp_path / "merged", build(name))
    alone = type(pipe.transformer).from_pretrained(out)
    torch.testing.assert_close(velocity(pipe, alone), after, atol=CLOSE, rtol=0)
    (file,) = out.glob("*.safetensors")
    assert export.read_header(file)["exactness"] == {"way": "exact"}


# What ComfyUI and kohya call the layers, read from their documents and written down once more, row by row.
DOUBLE = {
    "img_attn.qkv": ["attn.to_q", "attn.to_k", "attn.to_v"],
    "txt_attn.qkv": ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
    "img_attn.proj": ["attn.to_out.0"],
    "txt_attn.proj": ["attn.to_add_out"],
}
ROWS = {
    "flux1": {
        "double": DOUBLE | {"img_mlp.0": ["ff.net.0.proj"], "img_mlp.2": ["ff.net.2"],
                            "txt_mlp.0": ["ff_context.net.0.proj"], "txt_mlp.2": ["ff_context.net.2"]},
        "single": {"linear1": ["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"]},
    },
    "flux2": {
        "double": DOUBLE | {"img_mlp.0": ["ff.linear_in"], "img_mlp.2": ["ff.linear_out"],
                            "txt_mlp.0": ["ff_context.linear_in"], "txt_mlp.2": ["ff_context.linear_out"]},
        "single": {"linear1": ["attn.to_qkv_mlp_proj"], "linear2": ["attn.to_out"]},
    },
}  # fmt: skip


@torch.no_grad()
def add_by_rows(transformer: Any, state: Mapping[str, torch.Tensor], family: str, *, form: str) -> int:
    """Adds every update of a ComfyUI or kohya file to the rows of diffusers' weights that it belongs to; the number of matrices used."""
    used = 0
    stacks = {"double": "transformer_blocks", "single": "single_transformer_blocks"}
    for stack, blocks in stacks.items():
        for index in range(len(getattr(transformer, blocks))):
            for theirs, ours in ROWS[family][stack].items():
                name = f"{stack}_blocks.{index}.{theirs}"
                if form == "comfyui":
                    a, b = (state[f"diffusion_model.{name}.lora_{x}.weight"] for x in "AB")
                    scale = 1.0
                else:
                    key = "lora_unet_" + name.replace(".", "_")
                    a, b = state[f"{key}.lora_down.weight"], state[f"{key}.lora_up.weight"]
                    scale = float(state[f"{key}.alpha"]) / a.shape[0]
                rows = scale * (b @ a)
                for layer in ours:
                    weight = transformer.get_submodule(f"{blocks}.{index}.{layer}").weight
                    weight += rows[: len(weight)]
                    rows = rows[len(weight) :]
                assert len(rows) == 0
                used += 2 if form == "comfyui" else 3
    return used


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_the_fused_layers_are_those_rows(trained, form, tmp_path):
    name, folder, _, after = trained
    if not name.startswith("flux"):
        with pytest.raises(UserError, match="known here only of Flux"):
            exported(folder, form, tmp_path / "lora.safetensors")
        return
    state = load_file(exported(folder, form, tmp_path / "lora.safetensors"))
    pipe = build(name)
    assert add_by_rows(pipe.transformer, state, name[:5], form=form) == len(state)
    torch.testing.assert_close(velocity(pipe), after, atol=CLOSE, rtol=0)


@pytest.mark.parametrize("form", ["comfyui", "kohya"])
def test_diffusers_reads_those_of_klein_too(form, tmp_path):
    pipe = build("flux2_klein")
    folder = adapter(pipe).save(tmp_path / "adapter")
    after, fresh = velocity(pipe), build("flux2_klein")
    fresh.load_lora_weights(str(exported(folder, form, tmp_path / "lora.safetensors")), use_safetensors=True)
    torch.testing.assert_close(velocity(fresh), after, atol=CLOSE, rtol=0)


def test_diffusers_reads_kohyas_at_the_width_of_flux1_dev():
    """Its converter knows FLUX.1's widths by heart, so only the matrices are compared: rank 2, one block of each kind, no model."""
    from diffusers import FluxPipeline

    sizes = {
        "in_channels": 64,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
    }
    widths, generator = export.linears(Flux1(), {"base": sizes}), torch.Generator().manual_seed(0)
    layers = {
        n: LowRank(torch.randn(2, i, generator=generator), torch.randn(o, 2, generator=generator))
        for n, (i, o) in widths.items()
    }
    lora = export.PlainLoRA(layers=layers, backbone=Flux1(), notes={"base": sizes, "config": {}})
    read = FluxPipeline.lora_state_dict(export.tensors(lora, "kohya"))
    assert len(read) == 2 * len(layers) == 2 * 16
    for name, (a, b) in layers.items():
        x = torch.randn(a.shape[1], 3, generator=generator)
        down, up = (read[f"transformer.{name}.lora_{kind}.weight"] for kind in "AB")
        torch.testing.assert_close(up @ (down @ x), b @ (a @ x))


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(1, 6)), min_size=1, max_size=4),
    st.integers(0, 99),
)
def test_fused_is_one_above_the_other(width, parts, seed):
    generator = torch.Generator().manual_seed(seed)
    loras = [
        LowRank(torch.randn(r, width, generator=generator), torch.randn(o, r, generator=generator)) for r, o in parts
    ]
    a, b = export.fuse(loras)
    assert len(a) == sum(r for r, _ in parts)
    torch.testing.assert_close(b @ a, torch.cat([lora.lora_b @ lora.lora_a for lora in loras]))


def test_a_part_of_a_fused_layer_that_is_missing_is_named():
    lora = LowRank(torch.ones(1, 4), torch.ones(4, 1))
    layers = {"transformer_blocks.0.attn.to_q": lora, "transformer_blocks.0.attn.to_v": lora}
    with pytest.raises(UserError, match=r"all 3 parts of double_blocks\.0\.img_attn\.qkv, got parts \[0, 2\]"):
        export.original_layers(export.PlainLoRA(layers=layers, backbone=Flux1(), notes={}))


def test_the_header_says_what_it_is(trained, tmp_path):
    name, folder, *_ = trained
    file = exported(folder, "diffusers", tmp_path / "lora.safetensors")
    about, backbone = export.read_header(file), backbone_of(build(name))
    assert about["backbone"] == name and about["base"] and backbone.licence
    assert about["base_model"] is about["base_licence"] is None, "of these sizes nobody published a base"
    assert about["training"] == {"stage": 1, "num_references": 2} and about["sampling"] == {"num_steps": 7}
    assert about["trained_by"]["commit"] == about["exported_by"]["commit"] == source_commit()
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", source_commit() or "0" * 40)
    assert about["adapter"]["rank"] == 3 and about["form"] == "diffusers" and about["exactness"] == {"way": "exact"}
    save_file({"x": torch.ones(1)}, tmp_path / "other.safetensors", {"format": "pt"})
    assert export.read_header(tmp_path / "other.safetensors") is None
    save_file({"x": torch.ones(1)}, tmp_path / "later.safetensors", {export.HEADER: json.dumps({"format_version": 99})})
    with pytest.raises(UserError, match="header of version 1, got 99"):
        export.read_header(tmp_path / "later.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="must be a safetensors file"):
        export.read_header(tmp_path / "broken.safetensors")


def test_a_licence_is_that_of_the_weights(tmp_path):
    """The published one for the published sizes, whatever the folder is called; the tiny FLUX has its own; of others nothing is said."""
    layers, full = {"x": LowRank(torch.ones(1, 2), torch.ones(2, 1))}, Flux1.full_config
    names = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
    sizes = {name: full[name] for name in names}
    for notes, want in (
        ({"base": sizes}, (Flux1.hub_id, Flux1.licence)),
        ({"base": sizes, "base_model": "my/finetune"}, ("my/finetune", Flux1.licence)),
        ({"base": {**sizes, "num_layers": 8}}, (None, None)),
        ({"base": {**sizes, "num_layers": 8}, "base_model": "my/small"}, ("my/small", None)),
    ):
        assert export.base_of(export.PlainLoRA(layers=layers, backbone=Flux1(), notes=notes)) == want
    read = export.read_plain(shipped_adapter())
    assert export.base_of(read) == ("the tiny FLUX that ships with multicrafter", "Apache-2.0")
    assert export.peft_config(read)["base_model_name_or_path"] == "the tiny FLUX that ships with multicrafter"


def test_another_base_is_refused(tmp_path):
    """Also one of the same shapes, where everything would load and draw something else."""
    dev, kontext = build("flux1_dev"), build("flux1_kontext")
    file = exported(adapter(dev).save(tmp_path / "adapter"), "diffusers", tmp_path / "lora.safetensors")
    with pytest.raises(
        UserError, match="must fit flux1_kontext, got one that was made for the backbone flux1_dev, not flux1_kontext"
    ):
        MultiCrafterPipeline(kontext).load_lora(file)
    with pytest.raises(UserError, match="must fit flux1_dev, got one that was made for the base"):
        MultiCrafterPipeline(load_flux()).load_lora(file)
    fresh = MultiCrafterPipeline(build("flux1_dev"))
    fresh.load_lora(file)
    torch.testing.assert_close(velocity(fresh.pipe), velocity(dev), atol=CLOSE, rtol=0)
    with pytest.raises(UserError, match="must be of the backbone flux1_kontext"):
        load_into(kontext, tmp_path / "adapter")


@pytest.mark.parametrize("experts", [0, 3])
def test_load_into_is_exact_with_and_without_experts(experts, tmp_path):
    pipe, fresh = build("flux2_klein"), build("flux2_klein")
    folder = adapter(pipe, AdapterConfig(rank=2, alpha=3.0, num_experts=experts)).save(
        tmp_path / "adapter", sampling={"num_steps": 3}
    )
    base, loaded = velocity(fresh), load_into(fresh, folder)
    assert torch.equal(velocity(fresh), velocity(pipe)) and loaded.notes["sampling"] == {"num_steps": 3}
    with pytest.raises(UserError, match=r"must have no adapter yet, got \['default'\]"):
        load_into(fresh, folder)
    loaded.detach()
    assert torch.equal(velocity(fresh), base)


def test_experts_are_refused_with_both_ways_out(tmp_path):
    folder = adapter(build("flux1_dev"), AdapterConfig(rank=2, alpha=2.0, num_experts=2)).save(tmp_path / "adapter")
    with pytest.raises(UserError, match=r"got 2 experts: .*--lossy.*load_into"):
        export.read_plain(folder)


def test_a_missing_layer_is_named(tmp_path):
    folder = adapter(build("flux1_dev")).save(tmp_path / "adapter")
    state = load_file(folder / "adapter.safetensors")
    kept = {k: v for k, v in state.items() if "single_transformer_blocks.1.proj_mlp" not in k}
    save_file(kept, folder / "adapter.safetensors")
    with pytest.raises(UserError, match=r"'single_transformer_blocks\.1\.proj_mlp', \(32, 128\), got nothing"):
        export.read_plain(folder)


def test_nothing_is_overwritten_and_nothing_half_written(tmp_path, monkeypatch):
    folder = adapter(build("flux1_dev")).save(tmp_path / "adapter")
    (tmp_path / "there.safetensors").write_text("mine")
    with pytest.raises(UserError, match="must not be there yet"):
        exported(folder, "diffusers", tmp_path / "there.safetensors")
    assert (tmp_path / "there.safetensors").read_text() == "mine"
    with pytest.raises(UserError, match=r"must end in \.safetensors"):
        exported(folder, "comfyui", tmp_path / "lora.bin")

    def full(found: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "_save", full)
    before = sorted(tmp_path.iterdir())
    for form, name in (("diffusers", "new.safetensors"), ("peft", "new")):
        with pytest.raises(OSError, match="No space"):
            exported(folder, form, tmp_path / name)
        assert sorted(tmp_path.iterdir()) == before


def test_merging_into_what_is_no_linear_layer_is_refused(tmp_path):
    pipe = build("flux1_dev")
    lora = export.read_plain(adapter(pipe).save(tmp_path / "adapter"))
    before = {k: v.clone() for k, v in pipe.transformer.state_dict().items()}
    with pytest.raises(UserError, match="must have a plain linear layer"):  # the adapter is still on it
        export.merge(pipe.transformer, lora)
    assert all(torch.equal(v, before[k]) for k, v in pipe.transformer.state_dict().items())


def test_a_backbone_without_those_names_is_told_what_there_is():
    class Other(Flux1):
        name, transformer_class = "other", "OtherTransformer"

    lora = export.PlainLoRA(layers={"x": LowRank(torch.ones(1, 2), torch.ones(2, 1))}, backbone=Other(), notes={})
    with pytest.raises(UserError, match="must be diffusers, peft or merged for other"):
        export.tensors(lora, "kohya")
    assert export.tensors(lora, "diffusers").keys() == {"transformer.x.lora_A.weight", "transformer.x.lora_B.weight"}


@pytest.mark.parametrize("form", export.FORMATS)
def test_the_command_writes_the_shipped_adapter(form, tmp_path, capsys):
    out = tmp_path / ("out" if form in ("peft", "merged") else "out.safetensors")
    words = ["export", str(shipped_adapter()), "--format", form, "--out", str(out)]
    assert main([*words, "--dtype", "bfloat16"]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    (file,) = [out] if out.is_file() else out.glob("*.safetensors")
    (tmp_path / "new").touch()
    assert file.stat().st_mode == (tmp_path / "new").stat().st_mode, "as any file, not for its owner alone"
    assert export.read_header(file)["training"]["steps"] == 4000
    dtypes = {v.dtype for k, v in load_file(file).items() if "lora" in k or form == "merged"}
    assert dtypes == {torch.bfloat16}
    assert main(words) == 2
    assert "must not be there yet" in capsys.readouterr().err


def test_a_full_disk_is_a_sentence_and_leaves_nothing(tmp_path, capsys, monkeypatch):
    """safetensors raises an error of its own kind, which says the number in its text."""
    import safetensors.torch
    from safetensors import SafetensorError

    def full(tensors: Any, path: Path, metadata: Any) -> None:
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(safetensors.torch, "save_file", full)
    for form, name in (("diffusers", "x.safetensors"), ("peft", "folder")):
        assert main(["export", str(shipped_adapter()), "--format", form, "--out", str(tmp_path / name)]) == 2
        assert capsys.readouterr().err.startswith("error: Error while serializing: I/O error: No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_the_commands_mistakes_are_sentences(tmp_path, capsys):
    missing = ["export", str(tmp_path / "none"), "--format", "peft", "--out", str(tmp_path / "out")]
    assert main(missing) == 2 and "must hold adapter.json" in capsys.readouterr().err
    small = adapter(build("flux1_dev")).save(tmp_path / "adapter")
    assert main(["export", str(small), "--format", "merged", "--out", str(tmp_path / "out")]) == 2
    assert "--model must be the base of the adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
