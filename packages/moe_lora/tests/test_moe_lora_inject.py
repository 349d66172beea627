"""Into a model, out of it, onto the disk."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moe_lora import MoELoRAConfig, inject, inject_saved
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

CONFIG = MoELoRAConfig(rank=4, alpha=8.0)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Linear(8, 8)
        self.ff = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.ff(x + self.attn(x))


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(8, 8))


def awake(handle, seed: int = 5) -> None:  # type: ignore[no-untyped-def]
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.5, generator=g)


X = torch.randn(2, 5, 8)


def test_disable_and_remove_are_exact() -> None:
    net = model()
    plain, modules = net(X), [m for _, m in net.named_modules()]
    names = list(net.state_dict())
    handle = inject(net, CONFIG, [r"\d\.ff", "2"])
    assert list(handle.layers) == ["0.ff", "1.ff", "2"]
    assert torch.equal(net(X), plain)
    awake(handle)
    assert not torch.allclose(net(X), plain)
    with handle.disable():
        assert torch.equal(net(X), plain)
        with pytest.raises(ZeroDivisionError), handle.disable():
            1 / 0  # noqa: B018
        assert torch.equal(net(X), plain)
    assert not torch.allclose(net(X), plain)
    handle.remove()
    assert torch.equal(net(X), plain)
    assert all(a is b for a, b in zip(modules, [m for _, m in net.named_modules()], strict=True))
    assert list(net.state_dict()) == names


def test_targets_by_regex_string_and_predicate() -> None:
    for targets in ([r"\d\.ff"], r"\d\.ff", lambda name: name.endswith(".ff")):
        assert list(inject(model(), CONFIG, targets).layers) == ["0.ff", "1.ff"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (["fff"], "nearest: .*ff"),
        (["0.ff", "nothing"], "'nothing', which matches none"),
        (lambda name: False, "at least one module"),
        (["0", "0.ff"], "inside each other"),
        (["("], "regular expressions"),
        ([], "at least one module"),
    ],
)
def test_bad_targets_name_themselves_and_leave_the_model_alone(targets, message: str) -> None:  # type: ignore[no-untyped-def]
    net = model()
    names = list(net.state_dict())
    with pytest.raises(ValueError, match=message):
        inject(net, CONFIG, targets)
    assert list(net.state_dict()) == names


def test_a_second_mixture_in_the_same_place_is_refused() -> None:
    net = model()
    inject(net, CONFIG, r"0\.ff")
    for targets in (r"0\.ff", r"0\.ff\.base\.0", "0"):
        with pytest.raises(ValueError, match="without a mixture"):
            inject(net, CONFIG, targets)
    inject(net, CONFIG, r"1\.ff")


def test_injection_follows_the_generator_and_leaves_the_base_trainable_as_it_was() -> None:
    net, twin = model(), model()
    net.requires_grad_(False)
    handles = [inject(m, CONFIG, r"\d\.ff", generator=torch.Generator().manual_seed(1)) for m in (net, twin)]
    for a, b in zip(*(h.parameters() for h in handles), strict=True):
        assert torch.equal(a, b) and a.requires_grad
    assert [n for n, p in net.named_parameters() if p.requires_grad] == [
        f"{i}.ff.{n}" for i in range(2) for n in ("lora_a", "lora_b", "router.weight")
    ]


def test_aux_loss_is_the_weighted_mean_and_is_forgotten() -> None:
    net = model()
    handle = inject(net, replace(CONFIG, balance_coef=0.5, z_coef=0.25), r"\d\.ff")
    net(X)
    parts = [layer.aux_loss() for layer in handle.layers.values()]
    want = 0.5 * (parts[0].balance + parts[1].balance) / 2 + 0.25 * (parts[0].z + parts[1].z) / 2
    torch.testing.assert_close(handle.aux_loss(), want)
    assert handle.aux_loss() == 0
    assert set(handle.stats()) == {"0.ff", "1.ff"}, "statistics survive the losses"
    off = inject(model(), replace(CONFIG, balance_coef=0.0, z_coef=0.0), r"\d\.ff")
    off.model(X)
    assert off.aux_loss() == 0


def test_masks_by_layer_name() -> None:
    net = model()
    handle = inject(net, CONFIG, [r"\d\.ff", "2"])
    mask = torch.arange(5) < 3
    with handle.token_mask({r"\d\.ff": mask}):
        net(X)
        assert bool((handle.layers["0.ff"].last.expert_index.view(2, 5)[:, 3:] == -1).all())
        assert bool((handle.layers["2"].last.expert_index >= 0).all())
    assert all(layer.state.token_mask is None for layer in handle.layers.values())
    with handle.token_mask(mask):
        with handle.token_mask(~mask):
            pass
        assert all(layer.state.token_mask is mask for layer in handle.layers.values()), (
            "an inner context ends, the outer goes on"
        )
    with handle.token_mask(mask):
        net(X)
        assert all(bool((layer.last.expert_index.view(2, 5)[:, 3:] == -1).all()) for layer in handle.layers.values())


def test_files_hold_the_adapter_only_and_round_trip_to_the_bit(tmp_path: Path) -> None:
    net, x = model(), X
    handle = inject(net, replace(CONFIG, top_k=2, gating="topk_then_softmax"), [r"\d\.ff"])
    awake(handle)
    handle.save(tmp_path / "a")
    assert len({p.stat().st_mode for p in (tmp_path / "a").iterdir()}) == 1, "who may read one file may read both"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["moe_lora.json", "moe_lora.safetensors"]
    keys = {f"{i}.ff.{n}" for i in range(2) for n in ("lora_a", "lora_b", "router.weight")}
    with safe_open(tmp_path / "a" / "moe_lora.safetensors", "pt") as file:
        assert set(file.keys()) == keys
    again = model()
    fresh = inject(again, handle.config, [r"\d\.ff"])
    fresh.load(tmp_path / "a")
    assert torch.equal(again(x), net(x))
    saved = inject_saved(model(), tmp_path / "a")
    assert saved.config == handle.config and torch.equal(saved.model(x), net(x))
    # over an old file, without leaving anything half-written
    awake(fresh, seed=6)
    fresh.save(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["moe_lora.json", "moe_lora.safetensors"]
    assert torch.equal(inject_saved(model(), tmp_path / "a").model(x), again(x))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rank": 2}, "rank = 2, got 4"),
        ({"num_experts": 3}, "num_experts = 3, got 4"),
        ({"alpha": 1.0}, "alpha"),
        ({"gating": "topk_then_softmax"}, "gating"),
    ],
)
def test_a_file_of_another_config_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    inject(model(), CONFIG, r"\d\.ff").save(tmp_path)
    with pytest.raises(ValueError, match=message):
        inject(model(), replace(CONFIG, **changes), r"\d\.ff").load(tmp_path)


def test_broken_files_name_what_is_wrong_and_change_nothing(tmp_path: Path) -> None:
    handle = inject(model(), CONFIG, r"\d\.ff")
    handle.save(tmp_path)
    # copies: an older safetensors maps the file, which is written over below
    good = {k: t.clone() for k, t in load_file(tmp_path / "moe_lora.safetensors").items()}
    meta = json.loads((tmp_path / "moe_lora.json").read_text())
    other = inject(model(), CONFIG, r"\d\.ff")
    awake(other)
    before = {k: t.clone() for k, t in other.state_dict().items()}

    def refused(message: str) -> None:
        with pytest.raises(ValueError, match=message):
            other.load(tmp_path)
        assert all(torch.equal(t, other.state_dict()[k]) for k, t in before.items())

    save_file({k: t for k, t in good.items() if k != "1.ff.lora_b"}, tmp_path / "moe_lora.safetensors")
    refused("'1.ff.lora_b', but it is missing")
    save_file(good | {"1.ff.lora_b": torch.zeros(4, 8, 2)}, tmp_path / "moe_lora.safetensors")
    refused(r"1.ff.lora_b must have shape \(4, 8, 4\), got \(4, 8, 2\)")
    save_file(good | {"1.ff.lora_c": torch.zeros(1)}, tmp_path / "moe_lora.safetensors")
    refused("'1.ff.lora_c'; nearest: .*1.ff.lora")
    for bad, got in ((float("nan"), "NaN or infinity"), (float("inf"), "NaN or infinity")):
        save_file(good | {"1.ff.lora_b": torch.full((4, 8, 4), bad)}, tmp_path / "moe_lora.safetensors")
        refused(f"finite floating-point numbers, got {got} in '1.ff.lora_b'")
    save_file(good | {"1.ff.lora_b": torch.zeros(4, 8, 4, dtype=torch.int32)}, tmp_path / "moe_lora.safetensors")
    refused("got int32 in '1.ff.lora_b'")
    (tmp_path / "moe_lora.safetensors").write_bytes(b"junk")
    refused("readable safetensors")
    (tmp_path / "moe_lora.json").write_text(json.dumps(meta | {"targets": ["0.ff"]}))
    refused(r"lacks \['1.ff'\]")
    (tmp_path / "moe_lora.json").write_text(json.dumps(meta | {"targets": ["0.ff", "1.ff", "2"]}))
    refused(r"got \['2'\] too")
    (tmp_path / "moe_lora.json").write_text(json.dumps(meta | {"format": 9}))
    refused("format must be 1, got 9")
    (tmp_path / "moe_lora.json").write_text(json.dumps(meta | {"config": meta["config"] | {"top_k": 9}}))
    refused("top_k")
    (tmp_path / "moe_lora.json").write_text("{")
    refused("JSONDecodeError")
    (tmp_path / "moe_lora.json").unlink()
    refused("missing")
    net = model()
    with pytest.raises(ValueError, match="missing"):
        inject_saved(net, tmp_path / "nowhere")
    inject(model(), CONFIG, r"\d\.ff").save(tmp_path)
    with pytest.raises(ValueError, match="matches none"):
        inject_saved(nn.Sequential(nn.Linear(8, 8)), tmp_path)
    save_file(good | {"1.ff.lora_b": torch.zeros(4, 8, 2)}, tmp_path / "moe_lora.safetensors")
    with pytest.raises(ValueError, match="shape"):
        inject_saved(net, tmp_path)
    assert not any("lora" in n for n, _ in net.named_parameters()), "the model is as it was"


def test_an_injected_model_can_be_deep_copied_and_moved() -> None:
    import copy

    net = model()
    handle = inject(net, CONFIG, r"\d\.ff")
    awake(handle)
    out = net(X)  # leaves a graph behind
    twin = copy.deepcopy(net)
    assert torch.equal(twin(X), out)
    assert twin[0].ff.state is not net[0].ff.state
    assert all(p.dtype == torch.float64 for n, p in net.double().named_parameters() if "router" not in n)
    torch.testing.assert_close(net(X.double()), out.double(), atol=1e-5, rtol=1e-4)
