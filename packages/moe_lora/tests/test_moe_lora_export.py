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
    with pytest.raises(ValueError, match="rank must be at least 1"):
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
    peft = pytest.importorskip("peft")
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
