"""What belongs to an adapter: its own tensors, all of them and no others, whatever somebody does to the transformer."""

from __future__ import annotations

import pytest
import torch
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.loading import load_flux
from multicrafter.pipeline import MultiCrafterPipeline
from peft import LoraConfig
from safetensors.torch import load_file


def filled(pipe, *, num_experts=2):
    adapters = Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=num_experts))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return adapters


def freeze(pipe):
    pipe.transformer.requires_grad_(False)


def other_lora(pipe):
    pipe.transformer.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), "attn")
    pipe.transformer.set_adapters(["default", "attn"])


def unfreeze_everything(pipe):
    pipe.transformer.requires_grad_(True)


def switch(pipe):
    other_lora(pipe)
    pipe.transformer.set_adapters(["attn"])


@pytest.mark.parametrize("num_experts", [0, 2])
@pytest.mark.parametrize("change", [freeze, other_lora, switch, unfreeze_everything])
def test_all_of_the_adapter_is_saved_and_nothing_else(pipe, tmp_path, change, num_experts):
    adapters = filled(pipe, num_experts=num_experts)
    want = adapters.state_dict()
    change(pipe)
    got = load_file(adapters.save(tmp_path / "a") / "adapter.safetensors")
    assert got.keys() == want.keys()
    assert all(torch.equal(got[k], want[k]) for k in want)
    adapters.load_state_dict({k: v + 1 for k, v in want.items()})
    assert all(torch.equal(v, want[k] + 1) for k, v in adapters.state_dict().items())


def test_an_adapter_that_is_gone_is_not_saved_in_part(pipe, tmp_path):
    adapters = filled(pipe)
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match=r"must be on the transformer, but \d+ of its \d+ tensors are gone"):
        adapters.save(tmp_path / "a")
    with pytest.raises(ValueError, match="gone"):
        MultiCrafterPipeline(pipe, adapters).save_pretrained(tmp_path / "b")
    assert not list(tmp_path.iterdir())


def test_a_part_is_no_adapter(pipe, tmp_path):
    adapters = filled(pipe)
    state = adapters.state_dict()
    state.popitem()
    with pytest.raises(ValueError, match="exactly"):
        adapters.save(tmp_path / "a", state=state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_survive_a_base_in_half_precision(pipe, tmp_path, dtype):
    pipe.save_pretrained(tmp_path / "base")
    adapters = filled(pipe)
    want = load_file(adapters.save(tmp_path / "a", num_references=1) / "adapter.safetensors")
    loaded = MultiCrafterPipeline.from_pretrained(tmp_path / "base", adapter=tmp_path / "a", dtype=dtype)
    assert loaded.pipe.transformer.proj_out.weight.dtype == dtype
    loaded.save_pretrained(tmp_path / "b")
    got = load_file(tmp_path / "b" / "adapter.safetensors")
    assert got.keys() == want.keys()
    assert all(got[k].dtype == torch.float32 and torch.equal(got[k], want[k]) for k in want)
    fresh = Adapters(load_flux(tmp_path / "base", dtype=dtype).transformer, AdapterConfig(rank=2, alpha=2.0))
    assert {p.dtype for p in fresh.parameters()} == {torch.float32}


def test_training_goes_on_after_a_freeze(pipe):
    from multicrafter.training.optimization import AdamWConfig
    from multicrafter.training.precision import ExecutionConfig
    from multicrafter.training.trainee import Trainee

    adapters = filled(pipe)
    freeze(pipe)
    trainee = Trainee(adapters, ExecutionConfig(), lr=1e-3, adamw=AdamWConfig(), seed=0)
    assert all(p.requires_grad for p in adapters.parameters())
    assert len(trainee.tensors()) > len(adapters.names)
    assert sum(len(g["params"]) for g in trainee.optimizer.param_groups) == len(adapters.names)


@pytest.mark.parametrize("base", [False, True])
def test_a_mixed_in_lora_is_not_dropped_in_silence(pipe, tmp_path, base):
    pipeline = MultiCrafterPipeline(pipe, filled(pipe))
    other_lora(pipe)
    with pytest.raises(ValueError, match=r"without mixed-in LoRAs.*attn"):
        pipeline.save_pretrained(tmp_path / "a", base=base)
    assert not list(tmp_path.iterdir())
    pipe.transformer.delete_adapters("attn")
    assert (pipeline.save_pretrained(tmp_path / "a", base=base) / "adapter.safetensors").exists()
