"""LoRAs of other trainers: all of one or nothing of it, on the transformer and on the text encoder."""

from __future__ import annotations

import pytest
import torch
from multicrafter.cli.generate import lora
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.pipeline import MultiCrafterPipeline
from PIL import Image
from safetensors.torch import save_file

RED = Image.new("RGB", (40, 60), (200, 40, 40))


@pytest.fixture
def pipeline(pipe):
    return MultiCrafterPipeline(pipe, Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2)))


def tensors(layers, part, *, rank=2, fill=None, seed=5):
    generator = torch.Generator().manual_seed(seed)
    state = {}
    for name, layer in layers:
        shapes = {"lora_A": (rank, layer.in_features), "lora_B": (layer.out_features, rank)}
        for kind, shape in shapes.items():
            value = 0.5 * torch.randn(shape, generator=generator) if fill is None else torch.full(shape, fill)
            state[f"{part}.{name}.{kind}.weight"] = value
    return state


def of(model, suffix, part, **options):
    found = [(n, m) for n, m in model.named_modules() if n.endswith(suffix) and hasattr(m, "in_features")]
    assert found
    return tensors(found, part, **options)


def latents(pipeline):
    return pipeline("two people", [RED], num_steps=2, output_type="latent")[0]


def values(pipe):
    return {
        f"{part}.{n}": p.detach().clone()
        for part in ("transformer", "text_encoder", "text_encoder_2", "vae")
        for n, p in getattr(pipe, part).named_parameters()
    }


def unchanged(pipe, before):
    now = values(pipe)
    return now.keys() == before.keys() and all(torch.equal(now[k], before[k]) for k in before)


def test_a_text_encoder_part_is_weighed_and_switched_off(pipeline):
    plain = latents(pipeline)
    state = of(pipeline.pipe.text_encoder, "q_proj", "text_encoder")
    state |= of(pipeline.pipe.transformer, "attn.to_k", "transformer", fill=0.0)
    pipeline.load_lora(state, name="style")
    strong = latents(pipeline)
    assert not torch.allclose(strong, plain, atol=1e-4), "the text encoder's part does something"
    pipeline.set_loras({"style": 0.5})
    assert not torch.allclose(latents(pipeline), strong, atol=1e-5), "its weight reaches the text encoder"
    pipeline.set_loras({"style": 0.0})
    assert torch.equal(latents(pipeline), plain)
    assert not any(p.requires_grad for p in pipeline.pipe.text_encoder.parameters())
    pipeline.unload_lora("style")
    assert pipeline.loras == {}
    assert torch.equal(latents(pipeline), plain)
    with pytest.raises(ValueError, match="must be a loaded LoRA"):
        pipeline.unload_lora("style")


def nowhere(pipe, state):
    state["transformer.blocks.99.to_k.lora_A.weight"] = torch.zeros(2, 4)


def nowhere_in_the_encoder(pipe, state):
    state["text_encoder.layers.99.q_proj.lora_A.weight"] = torch.zeros(2, 4)


def another_encoder(pipe, state):
    state["text_encoder_2.layers.0.q_proj.lora_A.weight"] = torch.zeros(2, 4)


def too_wide(pipe, state):
    key = next(k for k in state if k.startswith("transformer") and "lora_A" in k)
    state[key] = torch.zeros(2, state[key].shape[1] + 1)


def nan(pipe, state):
    state[next(iter(state))].view(-1)[0] = float("nan")


def infinite(pipe, state):
    state[list(state)[-1]].view(-1)[0] = float("inf")


def half_a_pair(pipe, state):
    del state[next(k for k in state if k.startswith("transformer") and "lora_B" in k)]


@pytest.mark.parametrize(
    "spoil", [nowhere, nowhere_in_the_encoder, another_encoder, too_wide, nan, infinite, half_a_pair]
)
def test_one_that_fits_in_part_is_refused_and_changes_nothing(pipeline, spoil, tmp_path):
    state = of(pipeline.pipe.text_encoder, "q_proj", "text_encoder")
    state |= of(pipeline.pipe.transformer, "attn.to_k", "transformer")
    spoil(pipeline.pipe, state)
    before, picture = values(pipeline.pipe), latents(pipeline)
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "style.safetensors")
    for source in (state, tmp_path / "style.safetensors"):
        with pytest.raises(ValueError, match=r"must fit flux1_\w+, got"):
            pipeline.load_lora(source)
        assert pipeline.loras == {}
        assert unchanged(pipeline.pipe, before)
    assert torch.equal(latents(pipeline), picture)


def test_names_may_be_anything(pipeline, tmp_path):
    """Dots, the name of a layer, the same name in two folders, an equals sign."""
    state = of(pipeline.pipe.transformer, "attn.to_k", "transformer")
    other = of(pipeline.pipe.transformer, "attn.to_q", "transformer", seed=6)
    for folder, content in (("a", state), ("b", other)):
        (tmp_path / folder).mkdir()
        save_file(content, tmp_path / folder / "style.safetensors")
    save_file(state, tmp_path / "a=b.safetensors")
    plain, trained = latents(pipeline), pipeline.adapters.state_dict()
    assert pipeline.load_lora(tmp_path / "a" / "style.safetensors") == "style"
    first = latents(pipeline)
    assert pipeline.load_lora(tmp_path / "b" / "style.safetensors") == "style_2"
    assert not torch.allclose(latents(pipeline), first, atol=1e-4)
    pipeline.set_loras({"style_2": 0.0})
    assert torch.allclose(latents(pipeline), first, atol=1e-6)
    for name in ("v1.5/style", "attn", "default", "to_k", "lora_A"):
        assert pipeline.load_lora(state, name=name, weight=0.0) == name
    assert pipeline.load_lora(str(tmp_path / "a=b.safetensors"), weight=0.0) == "a=b"
    pipeline.set_loras(dict.fromkeys(pipeline.loras, 0.0))
    assert torch.allclose(latents(pipeline), plain, atol=1e-6)
    now = pipeline.adapters.state_dict()
    assert now.keys() == trained.keys()
    assert all(torch.equal(now[k], trained[k]) for k in trained)


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), "1", None])
def test_weights_are_finite(pipeline, weight):
    state = of(pipeline.pipe.transformer, "attn.to_k", "transformer")
    with pytest.raises(ValueError, match="weight must be a finite number"):
        pipeline.load_lora(state, weight=weight)
    pipeline.load_lora(state, name="x", weight=0.25)
    with pytest.raises(ValueError, match="weight of x must be a finite number"):
        pipeline.set_loras({"x": weight})
    assert pipeline.loras == {"x": 0.25}


def test_nothing_is_unpickled(pipeline, tmp_path):
    torch.save(of(pipeline.pipe.transformer, "attn.to_k", "transformer"), tmp_path / "style.bin")
    with pytest.raises(ValueError, match="must fit"):
        pipeline.load_lora(tmp_path / "style.bin")


def test_files_and_weights_of_the_command_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b.safetensors").touch()
    (tmp_path / "a=1").touch()
    assert lora("a=b.safetensors") == ("a=b.safetensors", 1.0)
    assert lora("a=b.safetensors=0.5") == ("a=b.safetensors", 0.5)
    assert lora("a=1") == ("a=1", 1.0)
    assert lora("x.safetensors=.7") == ("x.safetensors", 0.7)
    for text in ("x=nan", "x=inf", "x=", "x=y"):
        with pytest.raises(ValueError, match="finite number as weight"):
            lora(text)
