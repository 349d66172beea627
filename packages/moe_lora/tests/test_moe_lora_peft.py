"""PEFT, diffusers and transformers with mixtures."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", "0.21", reason="needs the extra peft")
transformers = pytest.importorskip("transformers", reason="needs transformers")

from moe_lora import collect, route_replay  # noqa: E402
from moe_lora.integrations.peft import (  # noqa: E402
    PeftMoELoRAConfig,
    PeftMoELoRALayer,
    handle,
    load_adapter,
    save_adapter,
)

IDS = torch.arange(18).view(2, 9) % 64
OPTIONS = {"r": 4, "lora_alpha": 8, "num_experts": 3, "top_k": 2}


def llama() -> nn.Module:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "vocab_size": 64,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, **sizes)).eval()


def llama_config(**changes: object) -> PeftMoELoRAConfig:
    targets = {"target_modules": ["q_proj", "mlp"], "mixture_modules": ["mlp"]}
    return PeftMoELoRAConfig(**(OPTIONS | targets | changes))


def flux() -> nn.Module:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(0)
    sizes = {
        "in_channels": 8,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 8,
        "num_attention_heads": 2,
    }
    return diffusers.FluxTransformer2DModel(
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2), **sizes
    ).eval()


FLUX_TARGETS = {
    "target_modules": ["to_q", "ff", "ff_context", "proj_mlp"],
    "mixture_modules": ["ff", "ff_context", "proj_mlp"],
}


def velocity(model: nn.Module) -> Tensor:
    g = torch.Generator().manual_seed(1)
    out: Tensor = model(
        hidden_states=torch.randn(2, 6, 8, generator=g),
        encoder_hidden_states=torch.randn(2, 3, 16, generator=g),
        pooled_projections=torch.randn(2, 8, generator=g),
        timestep=torch.tensor([0.3, 0.7]),
        img_ids=torch.arange(18.0).view(6, 3),
        txt_ids=torch.zeros(3, 3),
    ).sample
    return out


def awake(model: nn.Module, adapter: str = "default", seed: int = 3) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if f".{adapter}" in name:
                p.normal_(0, 0.3, generator=g)


def test_get_peft_model_changes_nothing_trains_all_and_round_trips(tmp_path: Path) -> None:
    base, fresh = llama(), llama()
    plain = base(IDS).logits
    model = peft.get_peft_model(base, llama_config())
    assert torch.equal(model(IDS).logits, plain)
    kinds = {type(m).__name__ for m in model.modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    assert kinds == {"Linear", "PeftMoELoRALayer"}
    trainable = {n.split("layers.0.")[1] for n, p in model.named_parameters() if p.requires_grad and "layers.0." in n}
    assert trainable == {
        "self_attn.q_proj.lora_A.default.weight", "self_attn.q_proj.lora_B.default.weight", "mlp.lora_router.default.weight",
        "mlp.lora_experts_a.default", "mlp.lora_experts_b.default",
    }  # fmt: skip
    awake(model)
    model.train()
    (model(IDS, labels=IDS).loss + handle(model).aux_loss()).backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in handle(model).parameters())
    out = model.eval()(IDS).logits
    assert not torch.allclose(out, plain)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["num_experts"] == 3
    again = peft.PeftModel.from_pretrained(fresh, tmp_path, config=PeftMoELoRAConfig.from_pretrained(tmp_path))
    assert torch.equal(again.eval()(IDS).logits, out)
    with again.disable_adapter():
        assert torch.equal(again(IDS).logits, plain)
    assert torch.equal(again.unload()(IDS).logits, plain)


def test_several_adapters_of_different_shape() -> None:
    base = llama()
    plain = base(IDS).logits
    model = peft.get_peft_model(base, llama_config())
    model.add_adapter("second", llama_config(num_experts=5, r=2, top_k=1))
    awake(model), awake(model, "second", seed=4)
    model.eval()
    first = model(IDS).logits
    model.set_adapter("second")
    second = model(IDS).logits
    assert not torch.allclose(first, second) and not torch.allclose(second, plain)
    assert handle(model, "second").config.num_experts == 5
    active = [n for n, p in model.named_parameters() if p.requires_grad]
    assert active and all(".second" in n for n in active)
    model.base_model.set_adapter(["default", "second"])
    layer = next(m for m in model.modules() if isinstance(m, PeftMoELoRALayer))
    x = torch.randn(2, 3, 16)
    both = layer(x)
    layer.set_adapter("default")
    one = layer(x)
    layer.set_adapter("second")
    torch.testing.assert_close(
        both - layer.base_layer(x), (one - layer.base_layer(x)) + (layer(x) - layer.base_layer(x)), atol=1e-5, rtol=1e-4
    )
    model.set_adapter("default")
    assert torch.equal(model(IDS).logits, first)
    model.delete_adapter("second")
    assert torch.equal(model(IDS).logits, first)
    with pytest.raises(ValueError, match=r"one of \['default'\], got 'second'"):
        handle(model, "second")


def test_transformers_add_adapter_and_files(tmp_path: Path) -> None:
    source, target = llama(), llama()
    plain = source(IDS).logits
    source.add_adapter(llama_config(), "mine")
    assert torch.equal(source(IDS).logits, plain)
    awake(source, "mine")
    out = source(IDS).logits
    save_adapter(source, tmp_path, "mine")
    load_adapter(target, tmp_path, "theirs")
    target.set_adapter("theirs")
    assert torch.equal(target(IDS).logits, out)


def test_diffusers_add_adapter_and_files(tmp_path: Path) -> None:
    source, target, wrapped = flux(), flux(), flux()
    plain = velocity(source)
    source.add_adapter(PeftMoELoRAConfig(**OPTIONS, **FLUX_TARGETS), "mine")
    assert torch.equal(velocity(source), plain)
    found = handle(source, "mine")
    assert sorted(found.layers) == [
        "single_transformer_blocks.0.proj_mlp",
        "transformer_blocks.0.ff",
        "transformer_blocks.0.ff_context",
    ]
    awake(source, "mine")
    out = velocity(source)
    out.square().mean().backward()
    assert all(p.grad is not None and bool(p.grad.any()) for p in found.parameters())
    save_adapter(source, tmp_path, "mine")
    loaded = load_adapter(target, tmp_path, "theirs")
    assert torch.equal(velocity(target), out)
    # the files are PEFT's own: PeftModel reads what was trained through diffusers
    model = peft.PeftModel.from_pretrained(wrapped, tmp_path, config=PeftMoELoRAConfig.from_pretrained(tmp_path))
    assert torch.equal(velocity(model), out)
    with loaded.disable():
        assert torch.equal(velocity(target), plain)
    target.disable_adapters()
    assert torch.equal(velocity(target), plain)
    target.enable_adapters()
    target.set_adapters("theirs", 0.5)
    half = velocity(target)
    assert not torch.allclose(half, out) and not torch.allclose(half, plain)
    target.set_adapters("theirs", 1.0)
    assert torch.equal(velocity(target), out)


def test_diffusers_own_files_hold_the_mixture(tmp_path: Path) -> None:
    model = flux()
    model.add_adapter(PeftMoELoRAConfig(**OPTIONS, **FLUX_TARGETS))
    awake(model)
    model.save_lora_adapter(tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    other = flux()
    other.add_adapter(PeftMoELoRAConfig(**OPTIONS, **FLUX_TARGETS))
    result = peft.set_peft_model_state_dict(other, tensors)
    assert not result.unexpected_keys
    assert torch.equal(velocity(other), velocity(model))


def test_the_handle_works_on_an_adapter() -> None:
    model = flux()
    model.add_adapter(PeftMoELoRAConfig(**OPTIONS, **FLUX_TARGETS))
    awake(model)
    found = handle(model)
    kinds = {
        ".*ff_context": torch.zeros(3, dtype=torch.int64),
        ".*ff": torch.ones(6, dtype=torch.int64),
        ".*": torch.tensor([0] * 3 + [1] * 6),
    }
    with collect(found, kinds, ("text", "image")) as log, route_replay.record(found) as kept:
        out = velocity(model)
    assert log.joint("kind", "transformer_blocks.0.ff")[1].sum(1).tolist() == [0, 24]
    assert log.joint("kind", "single_transformer_blocks.0.proj_mlp")[1].sum(1).tolist() == [12, 24]
    assert found.aux_loss() > 0
    with torch.no_grad():
        for name, p in found.named_parameters():
            if "router" in name:
                p.neg_()
    assert not torch.allclose(velocity(model), out)
    with route_replay.replay(found, kept):
        velocity(model)
        last = found.layers["transformer_blocks.0.ff"].last.expert_index
    assert torch.equal(last.view(2, 6, 2).short(), kept.choices["transformer_blocks.0.ff"][0])
    with pytest.raises(ValueError, match="removed by PEFT"):
        found.remove()


def test_the_layer_is_the_same_as_ours() -> None:
    from moe_lora import MoELoRALayer

    base = nn.Sequential(nn.Linear(8, 8))
    model = peft.get_peft_model(copy.deepcopy(base), PeftMoELoRAConfig(**OPTIONS, target_modules=["0"]))
    awake(model)
    ours = MoELoRALayer(base[0], model.peft_config["default"].mixture())
    theirs = handle(model)
    with torch.no_grad():
        for mine, p in zip((ours.router.weight, ours.lora_a, ours.lora_b), theirs.parameters(), strict=True):
            mine.copy_(p)
    x = torch.randn(3, 5, 8)
    assert torch.equal(model(x), ours(x))


def test_options_of_lora() -> None:
    base, x = nn.Sequential(nn.Linear(8, 8)), torch.randn(3, 8)
    rs = peft.get_peft_model(copy.deepcopy(base), PeftMoELoRAConfig(**OPTIONS, target_modules=["0"], use_rslora=True))
    assert next(iter(handle(rs).layers.values())).layer.scaling["default"] == 8 / 2
    drop = peft.get_peft_model(
        copy.deepcopy(base), PeftMoELoRAConfig(**OPTIONS, target_modules=["0"], lora_dropout=0.5)
    )
    awake(drop)
    drop.train()
    assert not torch.equal(drop(x), drop(x))
    drop.eval()
    assert torch.equal(drop(x), drop(x))
    patterns = PeftMoELoRAConfig(**OPTIONS, target_modules=["0"], rank_pattern={"0": 2}, alpha_pattern={"0": 6})
    ranked = handle(peft.get_peft_model(copy.deepcopy(base), patterns))
    assert next(iter(ranked.layers.values())).lora_a.shape == (3, 2, 8)
    assert next(iter(ranked.layers.values())).layer.scaling["default"] == 3
    asleep = peft.get_peft_model(
        copy.deepcopy(base), PeftMoELoRAConfig(**OPTIONS, target_modules=["0"], init_lora_weights=False)
    )
    assert not torch.equal(asleep(x), base(x))


def test_a_model_in_bfloat16_keeps_its_router_in_float32() -> None:
    model = peft.get_peft_model(llama().to(torch.bfloat16), llama_config(), autocast_adapter_dtype=False)
    found = dict(handle(model).named_parameters())
    assert {p.dtype for n, p in found.items() if "router" in n} == {torch.float32}
    assert {p.dtype for n, p in found.items() if "router" not in n} == {torch.bfloat16}
    assert model(IDS).logits.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_dora": True}, "use_dora must be False"),
        ({"init_lora_weights": "gaussian"}, "init_lora_weights must be a bool"),
        ({"top_k": 9}, "top_k must be at most"),
        ({"gating": "x"}, "gating must be"),
        ({"r": 0}, "must be"),
    ],
)
def test_bad_options_are_named(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        llama_config(**changes)


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    model = peft.get_peft_model(llama(), llama_config())
    with pytest.raises(ValueError, match="different tokens get different updates"):
        model.merge_and_unload()
    with pytest.raises(ValueError, match=r"must be an ordinary LoRA on.*got a mixture"):
        model.add_adapter("plain", llama_config(mixture_modules=["q_proj"]))
    with pytest.raises(ValueError, match="adapter_names must not be given"):
        next(m for m in model.modules() if isinstance(m, PeftMoELoRALayer))(
            torch.randn(1, 16), adapter_names=["default"]
        )
    with pytest.raises(ValueError, match="must be an adapter of the model"):
        save_adapter(model, tmp_path, "nobody")
    with pytest.raises(ValueError, match=r"must hold adapter_config\.json"):
        load_adapter(model, tmp_path / "nowhere")


def test_a_file_of_another_rank_names_the_key_and_leaves_no_adapter(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = flux()
    source.add_adapter(PeftMoELoRAConfig(**OPTIONS, **FLUX_TARGETS))
    save_adapter(source, tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    key = next(k for k in tensors if k.endswith("ff.lora_experts_a"))
    save_file(tensors | {key: torch.zeros(3, 2, 16)}, tmp_path / "adapter_model.safetensors")
    for model in (flux(), peft.get_peft_model(flux(), PeftMoELoRAConfig(**OPTIONS, **FLUX_TARGETS))):
        with pytest.raises(ValueError, match=r"ff.lora_experts_a' of shape \(3, 4, 16\), got \(3, 2, 16\)"):
            load_adapter(model, tmp_path, "wrong")
        assert "wrong" not in getattr(model, "peft_config", {})
    (tmp_path / "adapter_model.safetensors").write_bytes(b"junk")
    with pytest.raises(ValueError, match="readable safetensors"):
        load_adapter(flux(), tmp_path, "wrong")


@pytest.mark.parametrize("how", ["inject", "peft"])
def test_t5_reads_a_weight_of_what_is_wrapped_and_its_attention_returns_a_tuple(how: str) -> None:
    from moe_lora import MoELoRAConfig, inject

    torch.manual_seed(0)
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "vocab_size": 32}
    config = transformers.T5Config(**sizes, feed_forward_proj="gated-gelu", decoder_start_token_id=0)
    model = transformers.T5ForConditionalGeneration(config).eval()
    inputs = {"input_ids": IDS[:, :5] % 32, "labels": IDS[:, :4] % 32}

    def adapt(base: nn.Module, targets: str) -> nn.Module:
        if how == "inject":
            inject(base, MoELoRAConfig(rank=2, alpha=4.0), rf".*\.{targets}")
            return base
        options = {"r": 2, "lora_alpha": 4, "target_modules": rf".*\.{targets}"}
        adapted: nn.Module = peft.get_peft_model(base, PeftMoELoRAConfig(**options)).eval()
        return adapted

    plain = model(**inputs).logits
    for targets in ("wo", "DenseReluDense"):
        net = adapt(copy.deepcopy(model), targets)
        torch.testing.assert_close(net(**inputs).logits, plain)
        with torch.no_grad():
            for name, p in net.named_parameters():
                if "lora" in name or "router" in name:
                    p.normal_(0, 0.3, generator=torch.Generator().manual_seed(1))
        assert not torch.allclose(net(**inputs).logits, plain)
    with pytest.raises(ValueError, match=r"SelfAttention' \(T5Attention\) must return one tensor, got a tuple"):
        adapt(copy.deepcopy(model), "SelfAttention")(**inputs)
    # what annotations tell is refused before anything is adapted
    llm = llama()
    with pytest.raises(
        ValueError, match=r"self_attn' must return one tensor, got LlamaAttention, which returns a tuple"
    ):
        adapt(llm, "self_attn")
    assert not any("lora" in name for name, _ in llm.named_parameters())
