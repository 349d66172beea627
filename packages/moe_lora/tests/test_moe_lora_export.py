"""To an ordinary LoRA: exactly, not at all, or nearly."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from moe_lora import MoELoRA, MoELoRAConfig, MoELoRALayer, approximate, inject, save_peft_lora, to_lora
from moe_lora.export import LowRank, truncate
from torch import nn

X = torch.randn(4, 6, 8)


def build(**changes: object) -> tuple[nn.Sequential, MoELoRA]:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8))
    config = MoELoRAConfig(**{"rank": 2, "alpha": 4.0, "num_experts": 3, **changes})  # type: ignore[arg-type]
    handle = inject(net, config, ["0", "2"])
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.5)
    return net, handle


@pytest.mark.parametrize("gating", ["softmax_then_topk", "topk_then_softmax"])
@pytest.mark.parametrize("kind", ["one expert", "fixed gates"])
def test_exact_cases_are_exact(gating: str, kind: str) -> None:
    _, handle = build(gating=gating, **({"num_experts": 1} if kind == "one expert" else {"top_k": 3}))
    layer = handle.layers["0"]
    with torch.no_grad():
        layer.router.weight.copy_(layer.router.weight[:1].expand_as(layer.router.weight))
    a, b = to_lora(layer)
    assert a.shape == ((2, 8) if kind == "one expert" else (6, 8))
    torch.testing.assert_close(X @ a.T @ b.T, layer.delta(X), atol=1e-5, rtol=1e-4)


def test_anything_else_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match="top_k = 1 of 3 experts"):
        to_lora(build()[1].layers["0"])
    with pytest.raises(ValueError, match="gates depend on the token"):
        to_lora(build(top_k=3)[1].layers["0"])


def test_truncation_is_the_best_of_its_rank() -> None:
    g = torch.Generator().manual_seed(0)
    lora = LowRank(torch.randn(5, 9, generator=g), torch.randn(7, 5, generator=g))
    whole = lora.lora_b @ lora.lora_a
    singular = torch.linalg.svdvals(whole)
    for rank in range(1, 6):
        near, error = truncate(lora, rank)
        assert near.lora_a.shape == (rank, 9) and near.lora_b.shape == (7, rank)
        lost = float((whole - near.lora_b @ near.lora_a).norm() / whole.norm())
        assert error == pytest.approx(lost, abs=1e-5)
        assert lost == pytest.approx(float(singular[rank:].norm() / singular.norm()), abs=1e-5)
    near, error = truncate(lora, 20)
    torch.testing.assert_close(near.lora_b @ near.lora_a, whole, atol=1e-5, rtol=1e-5)
    assert error == pytest.approx(0, abs=1e-6)
    assert truncate(LowRank(torch.zeros(2, 4), torch.zeros(4, 2)), 1)[1] == 0
    with pytest.raises(ValueError, match="rank must be an integer of at least 1"):
        truncate(lora, 0)


def test_approximation_prints_its_error_and_the_error_is_true() -> None:
    net, handle = build(top_k=2)
    lines: list[str] = []
    found = approximate(handle, 3, lambda: net(X), report=lines.append)
    assert [line.split(":")[0] for line in lines] == ["0", "2"] and all("error of the output" in line for line in lines)
    layer = handle.layers["0"]
    delta, (a, b) = layer.delta(X), found["0"].lora
    want = float((delta - X @ a.T @ b.T).detach().norm() / delta.detach().norm())
    assert found["0"].output_error == pytest.approx(want, rel=1e-4)
    assert f"{want:.1%}" in lines[0]
    # gates take their means over the shown tokens
    routing = layer.last
    gates = torch.zeros(24, 3).scatter(1, routing.expert_index, routing.gate_weights).mean(0)
    mean = sum(2.0 * g * layer.lora_b[i] @ layer.lora_a[i] for i, g in enumerate(gates))
    exact = approximate(handle, 6, lambda: net(X), report=lines.append)["0"]
    torch.testing.assert_close(exact.lora.lora_b @ exact.lora.lora_a, mean.detach(), atol=1e-4, rtol=1e-4)
    assert exact.truncation_error < 1e-6 < found["0"].truncation_error
    assert exact.output_error is not None and exact.output_error > 0.05, "routing itself cannot be collapsed"
    assert not layer.state.observers and not layer._forward_pre_hooks


def test_approximation_of_an_exact_case_has_no_error(capsys: pytest.CaptureFixture[str]) -> None:
    net, handle = build(num_experts=1)
    found = approximate(handle, 2, lambda: net(X))
    assert all(f.output_error < 1e-5 and f.truncation_error < 1e-6 for f in found.values())
    assert "0.0%" in capsys.readouterr().out
    approximate(handle, 2)
    assert "not measured, give run" in capsys.readouterr().out


def test_peft_reads_what_is_written(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", "0.21", reason="needs the extra peft")
    net, handle = build(num_experts=1)
    out = net(X)
    save_peft_lora(handle, tmp_path)
    handle.remove()
    again = peft.PeftModel.from_pretrained(net, tmp_path)
    torch.testing.assert_close(again(X), out, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="top_k"):
        save_peft_lora(build()[1], tmp_path / "no")
    assert not (tmp_path / "no").exists()


def test_peft_files_of_an_approximation_and_of_other_modules(tmp_path: Path) -> None:
    net, handle = build()
    loras = {n: f.lora for n, f in approximate(handle, 2, lambda: net(X), report=lambda line: None).items()}
    assert save_peft_lora(handle, tmp_path, loras).joinpath("adapter_config.json").exists()
    block = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)))
    around = inject(block, MoELoRAConfig(rank=2, alpha=2.0, num_experts=1), "0")
    assert isinstance(around.layers["0"], MoELoRALayer) and to_lora(around.layers["0"]).lora_a.shape == (2, 8)
    with pytest.raises(ValueError, match=r"one nn\.Linear.*Sequential"):
        save_peft_lora(around, tmp_path)


def peft_model(**changes: object):  # type: ignore[no-untyped-def]
    """Ordinary LoRAs at 0 and 3, a mixture at 2, all awake."""
    peft = pytest.importorskip("peft", "0.21", reason="needs the extra peft")
    from moe_lora.integrations.peft import PeftMoELoRAConfig, handle

    torch.manual_seed(0)
    options = {"r": 4, "lora_alpha": 6, "num_experts": 1, "target_modules": ["0", "2", "3"], "mixture_modules": ["2"]}
    net = nn.Sequential(nn.Linear(8, 12), nn.GELU(), nn.Linear(12, 8), nn.Linear(8, 8)).eval()
    model = peft.get_peft_model(net, PeftMoELoRAConfig(**(options | changes))).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.normal_(0, 0.3)
    return model, handle(model)


@pytest.mark.parametrize("scale", [1.0, 0.25, -2.0])
@pytest.mark.parametrize(
    "changes",
    [{}, {"use_rslora": True}, {"rank_pattern": {"2": 3, "3": 1}, "alpha_pattern": {"2": 9}, "use_rslora": True}],
)
def test_an_adapter_of_peft_is_exported_with_the_scale_that_it_has(
    tmp_path: Path, changes: dict[str, object], scale: float
) -> None:
    peft = pytest.importorskip("peft", "0.21", reason="needs the extra peft")
    model, found = peft_model(**changes)
    for layer in model.modules():
        if hasattr(layer, "set_scale"):
            layer.set_scale("default", scale)
    out, (name,), x = model(X), found.layers, torch.randn(5, 12)
    module = found.module(name)
    a, b = to_lora(found.layers[name])
    torch.testing.assert_close(x @ a.T @ b.T, module(x) - module.base_layer(x), atol=1e-5, rtol=1e-4)
    (near,) = approximate(found, 4, lambda: model(X), report=lambda line: None).values()
    assert near.output_error is not None and near.output_error < 1e-5
    save_peft_lora(found, tmp_path)
    again = peft.PeftModel.from_pretrained(model.unload(), tmp_path).eval()
    torch.testing.assert_close(again(X), out, atol=1e-5, rtol=1e-4)


def test_the_measured_error_of_an_adapter_of_peft_is_true() -> None:
    model, found = peft_model(num_experts=3, top_k=2, use_rslora=True)
    ((name, near),) = approximate(found, 2, lambda: model(X), report=lambda line: None).items()
    module, (a, b) = found.module(name), near.lora
    seen = torch.nn.functional.gelu(model.base_model.model[0](X))
    delta = module(seen) - module.base_layer(seen)
    want = float((delta - seen @ a.T @ b.T).detach().norm() / delta.detach().norm())
    assert near.output_error == pytest.approx(want, rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"bias": "lora_only"}, "bias must be none"),
        ({"modules_to_save": ["1"]}, "modules_to_save must be None"),
        ({"mixture_modules": ["2"], "num_experts": 2}, "top_k = 1 of 2"),
    ],
)
def test_what_a_lora_cannot_hold_is_refused(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    _, found = peft_model(**changes)
    with pytest.raises(ValueError, match=message):
        save_peft_lora(found, tmp_path / "out")
    for method in (found.save, found.load):
        with pytest.raises(ValueError, match="adapters of PEFT must be"):
            method(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def nested() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), nn.GELU()), nn.Linear(8, 8))


def test_ranks_may_differ_and_names_are_whole_names(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft", "0.21", reason="needs the extra peft")
    net = nested()
    handle = inject(net, MoELoRAConfig(rank=2, alpha=3.0, num_experts=1), ["0", "2"])
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.4)
    loras = {"0": to_lora(handle.layers["0"]), "2": LowRank(torch.randn(5, 8) / 3, torch.randn(8, 5) / 3)}
    want = net[0](X)
    want = net[1](want)
    want = net[2].base(want) + want @ loras["2"].lora_a.T @ loras["2"].lora_b.T
    save_peft_lora(handle, tmp_path, loras)
    again = peft.PeftModel.from_pretrained(nested(), tmp_path)
    torch.testing.assert_close(again(X), want, atol=1e-5, rtol=1e-4)
    assert [n for n, m in again.named_modules() if hasattr(m, "lora_A")] == ["base_model.model.0", "base_model.model.2"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"0": t["0"]}, r"exactly the layers of the handle.*\['2'\]"),
        (lambda t: t | {"1": t["0"]}, r"difference in \['1'\]"),
        (lambda t: t | {"2": LowRank(torch.zeros(2, 7), torch.zeros(8, 2))}, r"loras\['2'\] must be lora_a \(r, 12\)"),
        (lambda t: t | {"2": LowRank(torch.zeros(2, 12), torch.zeros(8, 3))}, r"got \(2, 12\) and \(8, 3\)"),
        (lambda t: {}, "exactly the layers"),
    ],
)
def test_loras_that_do_not_fit_are_refused(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    _, handle = build(num_experts=1)
    loras = {name: to_lora(layer) for name, layer in handle.layers.items()}
    with pytest.raises(ValueError, match=message):
        save_peft_lora(handle, tmp_path / "out", change(loras))
    handle.remove()
    with pytest.raises(ValueError, match="handle must hold mixtures"):
        save_peft_lora(handle, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_tokens_are_found_by_name_and_padding_is_left_out() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ff = nn.Linear(8, 8)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.ff(input=x)

    torch.manual_seed(0)
    net = Named()
    handle = inject(net, MoELoRAConfig(rank=2, alpha=4.0, num_experts=3, top_k=2), "ff")
    with torch.no_grad():
        for p in handle.parameters():
            p.normal_(0, 0.5)
    mask = torch.arange(6) < 4
    padded = X.clone()
    padded[:, 4:] = float("nan")
    whole = approximate(handle, 2, lambda: net(X[:, :4]), report=lambda line: None)["ff"]
    with handle.token_mask(mask):
        masked = approximate(handle, 2, lambda: net(padded), report=lambda line: None)["ff"]
    assert masked.output_error == pytest.approx(whole.output_error, rel=1e-5)
    torch.testing.assert_close(masked.lora.lora_b @ masked.lora.lora_a, whole.lora.lora_b @ whole.lora.lora_a)


def test_a_run_that_shows_nothing_is_refused() -> None:
    net, handle = build()
    for run in (lambda: None, lambda: net[0](X), lambda: net(X[:0])):
        with pytest.raises(ValueError, match="run must show every layer some tokens, got none at"):
            approximate(handle, 2, run)
    assert all(not layer.state.observers for layer in handle.layers.values())
    for rank in (0, 2.5, "2"):
        with pytest.raises(ValueError, match="rank must be an integer"):
            approximate(handle, rank, lambda: 1 / 0)  # type: ignore[arg-type]
