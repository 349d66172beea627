"""What PEFT cannot do with mixtures fails before anything is touched; what it can do is right."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

peft = pytest.importorskip("peft", "0.21", reason="needs the extra peft")

from moe_lora.integrations.peft import (  # noqa: E402
    PeftMoELoRAConfig,
    PeftMoELoRALayer,
    handle,
    load_adapter,
    save_adapter,
)
from safetensors.torch import load_file, save_file  # noqa: E402

X = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))


def base() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 8)).eval()


def config(**changes: Any) -> PeftMoELoRAConfig:
    """Ordinary LoRAs at 0 and 3, a mixture at 2."""
    options = {"r": 2, "lora_alpha": 4, "num_experts": 3, "target_modules": ["0", "2", "3"], "mixture_modules": ["2"]}
    return PeftMoELoRAConfig(**(options | changes))


def awake(model: nn.Module, seed: int = 1) -> None:
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.4, generator=g)


def wrapped(**changes: Any) -> Any:
    model = peft.get_peft_model(base(), config(**changes)).eval()
    awake(model)
    return model


def snapshot(model: nn.Module) -> tuple[dict[str, str], dict[str, Tensor], list[str], list[str]]:
    return (
        {n: type(m).__name__ for n, m in model.named_modules()},
        {k: t.clone() for k, t in model.state_dict().items()},
        list(getattr(model, "peft_config", {})),
        [str(m.active_adapters) for m in model.modules() if hasattr(m, "active_adapters") and hasattr(m, "base_layer")],
    )


def unchanged(model: nn.Module, before: tuple[Any, ...]) -> None:
    now = snapshot(model)
    assert now[0] == before[0] and now[2:] == before[2:]
    assert now[1].keys() == before[1].keys() and all(torch.equal(t, now[1][k]) for k, t in before[1].items())


@pytest.mark.parametrize(
    "merge",
    [
        lambda m: m.merge_and_unload(),
        lambda m: m.merge_and_unload(safe_merge=True, adapter_names=["default"]),
        lambda m: m.merge_adapter(),
        lambda m: m.merge_adapter(["other", "default"]),
        lambda m: m.base_model.merge_adapter(adapter_names=["other"]),
        lambda m: m.add_weighted_adapter(["default", "other"], [0.5, 0.5], "both"),
        lambda m: m.add_weighted_adapter(["default"], [0.5], "both", combination_type="linear"),
        lambda m: m.add_weighted_adapter(
            adapters=["other"], weights=[1.0], adapter_name="both", combination_type="cat"
        ),
    ],
)
def test_a_refused_merge_touches_nothing(merge: Callable[[Any], object]) -> None:
    model = wrapped()
    model.add_adapter("other", config())
    awake(model)
    out, before = model(X), snapshot(model)
    with pytest.raises(ValueError, match=r"must be ordinary LoRAs.*, got '(default|other)', a mixture at '2'"):
        merge(model)
    unchanged(model, before)
    assert torch.equal(model(X), out)
    model.unmerge_adapter()
    assert torch.equal(model(X), out)
    assert torch.equal(model.unload()(X), base()(X))


def test_ordinary_loras_beside_mixtures_merge_and_combine() -> None:
    model = wrapped()
    plain = {"target_modules": ["0", "3"], "mixture_modules": []}
    model.add_adapter("style", config(**plain))
    model.add_adapter("light", config(**plain, r=3))
    awake(model)
    model.base_model.set_adapter(["default", "style"])
    both = model(X)
    model.merge_adapter(["style"])
    merged = {n: m.merged_adapters for n, m in model.named_modules() if hasattr(m, "merged_adapters")}
    assert merged == {"base_model.model.0": ["style"], "base_model.model.2": [], "base_model.model.3": ["style"]}
    model.unmerge_adapter()
    torch.testing.assert_close(model(X), both, atol=1e-5, rtol=1e-4)
    model.add_weighted_adapter(["style", "light"], [0.5, 2.0], "both", combination_type="cat")
    model.set_adapter("both")
    x = torch.randn(4, 8)
    layer = model.base_model.model[0]
    want = layer.base_layer(x)
    for name, weight in (("style", 0.5), ("light", 2.0)):
        want = want + weight * layer.scaling[name] * layer.lora_B[name](layer.lora_A[name](x))
    torch.testing.assert_close(layer(x), want, atol=1e-5, rtol=1e-4)
    model.set_adapter("style")
    out = model(X)
    torch.testing.assert_close(model.merge_and_unload()(X), out, atol=1e-5, rtol=1e-4)


def test_plain_peft_loads_what_was_saved_or_fails_with_the_types_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = wrapped()
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "MOE_LORA"
    out = model(X)
    for low in (False, True):
        again = peft.PeftModel.from_pretrained(base(), tmp_path, low_cpu_mem_usage=low)
        assert isinstance(again.base_model.model[2], PeftMoELoRALayer) and torch.equal(again.eval()(X), out)
    again.load_adapter(tmp_path, "second")
    again.set_adapter("second")
    assert torch.equal(again(X), out)
    # what PEFT does where nobody has imported the integration
    monkeypatch.delitem(peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "MOE_LORA")
    for load in (
        lambda: peft.PeftModel.from_pretrained(base(), tmp_path),
        lambda: peft.PeftConfig.from_pretrained(tmp_path),
    ):
        with pytest.raises(KeyError, match="MOE_LORA"):
            load()


@pytest.mark.slow
def test_a_process_that_knows_nothing_of_mixtures_fails_with_the_types_name(tmp_path: Path) -> None:
    wrapped().save_pretrained(tmp_path)
    code = (
        "import sys, peft; from torch import nn\n"
        "net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 8))\n"
        "try: peft.PeftModel.from_pretrained(net, sys.argv[1])\n"
        "except KeyError as error: print('unknown', error)\n"
    )
    ran = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert "unknown 'MOE_LORA'" in ran.stdout, ran.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {k: v for k, v in t.items() if "2.lora_router" not in k}, r"'.*2\.lora_router.*got (nothing|None)"),
        (lambda t: {k: v for k, v in t.items() if "0.lora_A" not in k}, r"'.*0\.lora_A.*got (nothing|None)"),
        (lambda t: {k: v[:2] if "experts_a" in k else v for k, v in t.items()}, r"\(3, 2, 12\).* got \(2, 2, 12\)"),
        (lambda t: {k.replace("2.lora_", "1.lora_"): v for k, v in t.items()}, r"1\.lora_experts_a"),
        (lambda t: {}, "got (nothing|None)"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    wrapped().save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)
    with pytest.raises(ValueError, match=message):
        peft.PeftModel.from_pretrained(base(), tmp_path)
    model = wrapped()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path, "wrong")
    unchanged(model, before)


def test_files_of_before_the_type_had_its_name(tmp_path: Path) -> None:
    model = wrapped()
    save_adapter(model, tmp_path)
    meta = json.loads((tmp_path / "adapter_config.json").read_text())
    (tmp_path / "adapter_config.json").write_text(json.dumps(meta | {"peft_type": "LORA"}))
    again = peft.get_peft_model(base(), config()).eval()
    load_adapter(again, tmp_path, "old")
    again.set_adapter("old")
    assert torch.equal(again(X), model(X))
    (tmp_path / "adapter_config.json").write_text(json.dumps(meta | {"peft_type": "IA3"}))
    with pytest.raises(ValueError, match=r"peft_type must be MOE_LORA or LORA.*IA3"):
        load_adapter(again, tmp_path, "other")


def test_an_ordinary_loras_folder_is_loaded_as_one(tmp_path: Path) -> None:
    lora = peft.get_peft_model(base(), peft.LoraConfig(r=3, lora_alpha=5, target_modules=["0", "3"])).eval()
    awake(lora)
    lora.save_pretrained(tmp_path)
    model = wrapped()
    style = load_adapter(model, tmp_path, "style")
    model.set_adapter("style")
    assert torch.equal(model(X), lora(X)) and not style.layers and style.aux_loss() == 0


def test_every_option_that_a_mixture_does_not_have_is_refused() -> None:
    import dataclasses

    from moe_lora.integrations.peft.config import HONOURED

    tried = 0
    for option in dataclasses.fields(peft.LoraConfig):
        value = {bool: True, str: "other", int: 3}.get(type(option.default), {"a": 1})
        if option.name not in HONOURED | {"loftq_config"}:  # PEFT empties that one itself, and warns
            with pytest.raises((ValueError, TypeError)):
                config(**{option.name: value})
            tried += 1
    assert tried > 10
    with pytest.raises(ValueError, match="use_qalora must be False for mixtures"):
        config(use_qalora=True)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(8, 8)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        return self.q(hidden_states), None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target_modules": ["0", "4"], "mixture_modules": ["4"]}, "target '4' must return one tensor, got Attention"),
        (
            {"target_modules": ["0", "5"], "mixture_modules": ["5"]},
            "'5' must be a module that is called, got ModuleList",
        ),
        ({"target_modules": ["0", "1"], "mixture_modules": ["1"]}, "must hold a linear layer"),
        ({"target_modules": ["0", "2", "q"], "mixture_modules": ["nowhere"]}, "mixture_modules must match some"),
        ({"target_modules": ["0", "6", "ff"], "mixture_modules": ["6"]}, "'6.ff' inside '6'"),
    ],
)
def test_targets_are_checked_before_any_is_adapted(changes: Any, message: str) -> None:
    inner = nn.Sequential()
    inner.add_module("ff", nn.Linear(8, 8))
    net = nn.Sequential(*base(), Attention(), nn.ModuleList([nn.Linear(8, 8)]), inner)
    before = snapshot(net)
    with pytest.raises(ValueError, match=message):
        peft.get_peft_model(net, config(**changes))
    unchanged(net, before)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"target_modules": ["0"], "mixture_modules": ["0"]},
            "an ordinary LoRA on '0', which has one already, got a mixture",
        ),
        (
            {"target_modules": ["3", "2"], "mixture_modules": []},
            "a mixture on '2', which has one already, got an ordinary LoRA",
        ),
    ],
)
def test_a_second_adapter_of_another_kind_in_one_place_is_refused(changes: Any, message: str) -> None:
    model = wrapped()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        model.add_adapter("second", config(**changes))
    unchanged(model, before)


def test_targets_inside_a_mixture_and_around_an_adapter_are_refused() -> None:
    def net() -> nn.Module:
        return nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)), nn.Linear(8, 8))

    model = peft.get_peft_model(net(), config(target_modules=r"0", mixture_modules=None))
    with pytest.raises(ValueError, match=r"must not lie inside a mixture, got '0\.base_layer\.1' inside '0'"):
        model.add_adapter("in", config(target_modules=["1"], mixture_modules=[]))
    model = peft.get_peft_model(net(), config(target_modules=r"0\.1", mixture_modules=[]))
    with pytest.raises(ValueError, match=r"got '0\.1' inside '0'"):
        model.add_adapter("around", config(target_modules=r"0", mixture_modules=None))


def test_scales_reach_mixtures() -> None:
    model = wrapped(use_rslora=True)
    layer = model.base_model.model[2]
    x = torch.randn(4, 12)
    delta = layer(x) - layer.base_layer(x)
    assert layer.scaling["default"] == pytest.approx(4 / 2**0.5)
    layer.scale_layer(0.25)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 0.25 * delta, atol=1e-5, rtol=1e-4)
    layer.unscale_layer(0.25)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), delta, atol=1e-5, rtol=1e-4)
    layer.set_scale("default", 3.0)
    torch.testing.assert_close(layer(x) - layer.base_layer(x), 3 * delta, atol=1e-5, rtol=1e-4)
    layer.unscale_layer()
    torch.testing.assert_close(layer(x) - layer.base_layer(x), delta, atol=1e-5, rtol=1e-4)
    layer.scale_layer(0.0)
    torch.testing.assert_close(layer(x), layer.base_layer(x))


def test_attributes_and_keyword_calls_through_peft() -> None:
    layer = wrapped().base_model.model[2]
    x = torch.randn(4, 12)
    assert layer.weight is layer.base_layer.weight and torch.equal(layer(input=x), layer(x))
    net = nn.Sequential(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8)))
    net[0].note = "theirs"
    ffn = peft.get_peft_model(net, config(target_modules=r"0", mixture_modules=None)).base_model.model[0]
    assert ffn.note == "theirs" and not hasattr(ffn, "weight")
    twin = copy.deepcopy(ffn)
    assert torch.equal(twin(X), ffn(X))


def test_an_output_that_is_no_tensor_is_refused_in_the_first_pass() -> None:
    class Quiet(nn.Linear):
        def forward(self, hidden_states: Tensor):  # type: ignore[no-untyped-def]
            return super().forward(hidden_states), None

    model = peft.get_peft_model(nn.Sequential(Quiet(8, 8)), config(target_modules=["0"], mixture_modules=None))
    with pytest.raises(ValueError, match=r"target '0' \(Quiet\) must return one tensor, got a tuple of 2"):
        model(X)


def test_diffusers_fuses_nothing_and_scales_everything() -> None:
    diffusers = pytest.importorskip("diffusers", reason="needs diffusers")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=8, axes_dims_rope=(4, 2, 2),
    ).eval()  # fmt: skip
    g = torch.Generator().manual_seed(1)
    inputs = {
        "hidden_states": torch.randn(2, 6, 8, generator=g),
        "encoder_hidden_states": torch.randn(2, 3, 16, generator=g),
        "pooled_projections": torch.randn(2, 8, generator=g),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.arange(18.0).view(6, 3),
        "txt_ids": torch.zeros(3, 3),
    }

    def velocity(net: Any, **more: Any) -> Tensor:
        found: Tensor = net(**inputs, **more).sample
        return found

    plain = velocity(model)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"]), "style")
    model.add_adapter(config(target_modules=["to_q", "ff"], mixture_modules=["ff"]), "mixed")
    awake(model)
    for names in (["style", "mixed"], ["mixed"]):
        model.set_adapter(names)
        out = velocity(model)
        for net in (model, copy.deepcopy(model)):
            before = snapshot(net)
            with pytest.raises(ValueError, match="nothing was merged"):
                net.fuse_lora()
            with pytest.raises(ValueError, match="nothing was merged"):
                net.fuse_lora(adapter_names=["style", "mixed"])
            unchanged(net, before)
            net.unfuse_lora()
            assert torch.equal(velocity(net), out)
        half = {"joint_attention_kwargs": {"scale": 0.5}}
        assert not torch.allclose(velocity(model, **half), out)
        torch.testing.assert_close(velocity(model, joint_attention_kwargs={"scale": 0.0}), plain)
        assert torch.equal(velocity(model), out)
    model.set_adapter("style")
    out = velocity(model)
    model.fuse_lora()
    torch.testing.assert_close(velocity(model), out, atol=1e-5, rtol=1e-4)
    model.unfuse_lora()
    model.set_adapter("mixed")
    assert handle(model, "mixed").layers


def test_tensors_of_nans_are_neither_read_nor_written(tmp_path: Path) -> None:
    """PEFT's own way in took them; the file's experts were NaN and the model's pictures black."""
    model = wrapped()
    model.save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / "adapter_model.safetensors"
    tensors = load_file(file)
    (key,) = [k for k in tensors if "experts_b" in k]
    for wrong in (tensors[key] * float("nan"), tensors[key].long()):
        save_file({**tensors, key: wrong}, file)
        with pytest.raises(ValueError, match="must hold finite floating-point numbers"):
            peft.PeftModel.from_pretrained(base(), tmp_path / "a")
    before = snapshot(model)
    state = peft.get_peft_model_state_dict(model)
    with pytest.raises(ValueError, match="got NaN or infinity"):
        peft.set_peft_model_state_dict(model, {k: t * float("nan") for k, t in state.items()})
    unchanged(model, before)
    with torch.no_grad():
        model.base_model.model[2].lora_experts_b["default"][0] = float("nan")
    with pytest.raises(ValueError, match="adapter to save must hold finite"):
        save_adapter(model, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_a_module_under_two_names_and_options_of_another_kind() -> None:
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.GELU(), shared)
    with pytest.raises(ValueError, match="must stand in one place of the model, got '0'"):
        peft.get_peft_model(model, PeftMoELoRAConfig(r=2, lora_alpha=2, target_modules=["0"]))
    assert model[0] is model[2] is shared
    for changes, words in (
        ({"lora_alpha": "4"}, "alpha must be a finite number"),
        ({"lora_dropout": float("nan")}, "lora_dropout must be"),
        ({"lora_dropout": "0.1"}, "lora_dropout must be"),
    ):
        with pytest.raises(ValueError, match=words):
            config(**changes)
