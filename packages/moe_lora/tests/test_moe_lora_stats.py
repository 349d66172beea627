"""Loads, entropies, information, pictures."""

from __future__ import annotations

import math
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from moe_lora import (
    MoELoRA,
    MoELoRAConfig,
    collect,
    inject,
    load_by_kind,
    mutual_information,
    reference,
    route,
    routing_statistics,
    specialisation,
)
from torch import nn


def build() -> tuple[nn.Module, MoELoRA]:
    """A router that sends a token to the expert whose coordinate is largest."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    handle = inject(net, MoELoRAConfig(rank=1, alpha=1.0, num_experts=3), ["0", "1"])
    with torch.no_grad():
        for layer in handle.layers.values():
            layer.router.weight.copy_(5 * torch.eye(3))
        net[0].base.weight.copy_(torch.eye(3))
        net[0].base.bias.zero_()
    return net, handle


def onehot(index: list[list[int]]) -> torch.Tensor:
    return nn.functional.one_hot(torch.tensor(index), 3).float()


def test_statistics_of_one_pass_by_hand() -> None:
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.9, 0.05, 0.05], [0.1, 0.8, 0.1]]))
    found = routing_statistics(route(logits, 1, "softmax_then_topk", token_mask=torch.tensor([True, False, True])))
    torch.testing.assert_close(found.load, torch.tensor([0.5, 0.5, 0.0]))
    assert found.load_entropy == pytest.approx(math.log(2))
    entropies = [1.5 * math.log(2), -(0.8 * math.log(0.8) + 0.2 * math.log(0.1))]
    assert found.gate_entropy == pytest.approx(sum(entropies) / 2, abs=1e-6)
    masked = routing_statistics(route(logits, 1, "softmax_then_topk"), torch.tensor([False, True, False]))
    assert masked.load.tolist() == [1, 0, 0] and masked.load_entropy == 0


@given(c=st.integers(1, 4), e=st.integers(1, 4), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_mutual_information_equals_reference_and_keeps_its_limits(c: int, e: int, seed: int) -> None:
    joint = torch.randint(0, 9, (c, e), generator=torch.Generator().manual_seed(seed))
    joint[0, 0] += 1
    found = mutual_information(joint.float())
    assert found == pytest.approx(reference.mutual_information(joint.float()), abs=1e-9)
    assert -1e-12 <= found <= math.log(min(c, e)) + 1e-12
    independent = joint.sum(1, keepdim=True) * joint.sum(0, keepdim=True)
    assert mutual_information(independent.float()) == pytest.approx(0, abs=1e-9)


def test_load_by_kind_ignores_padding() -> None:
    joint = load_by_kind(torch.tensor([[0], [1], [-1], [1]]), torch.tensor([0, 0, 1, 1]), 2)
    torch.testing.assert_close(joint, torch.tensor([[1, 1], [0, 1]]) / 3)


def test_log_counts_by_kind_block_sigma_and_layout() -> None:
    net, handle = build()
    kinds = torch.tensor([0, 0, 1, 2])
    with collect(handle, kinds, ("text", "image", "reference 1")) as log:
        log.sigma, log.layout = torch.tensor([0.4, 0.9]), [0, 1]
        net(onehot([[0, 0, 1, 2], [0, 0, 2, 2]]))
        log.sigma, log.layout = 0.9, torch.tensor([1])
        net(onehot([[0, 1, 2, 2]]))
    net(onehot([[1, 1, 1, 1]]))  # outside: not counted
    names, by_kind = log.joint("kind", "0")
    assert names == ["text", "image", "reference 1"]
    assert by_kind.tolist() == [[5, 1, 0], [0, 1, 2], [0, 0, 3]]
    assert log.load("kind")["0"][0].tolist() == pytest.approx([5 / 6, 1 / 6, 0])
    names, by_sigma = log.joint("sigma", "1", sigma_bins=2)
    assert names == ["sigma 0.00-0.50", "sigma 0.50-1.00"] and by_sigma.tolist() == [[2, 1, 1], [3, 1, 4]]
    assert log.joint("layout", "0")[1].tolist() == [[2, 1, 1], [3, 1, 4]]
    assert log.load("block")["0"].tolist()[0] == pytest.approx([5 / 12, 2 / 12, 5 / 12])
    p = torch.tensor([5 / 12, 2 / 12, 5 / 12], dtype=torch.float64)
    assert log.entropy()["0"] == pytest.approx(float(-(p * p.log()).sum()), abs=1e-6)
    assert log.mutual_information("kind")["0"] == pytest.approx(reference.mutual_information(by_kind))
    assert not any(layer.state.observers for layer in handle.layers.values())


def test_log_with_kinds_by_layer_and_masks() -> None:
    net, handle = build()
    x = onehot([[0, 1, 2]])
    kinds = {"0": torch.tensor([[0, 0, 1]]), "1": torch.tensor([1, 1, 0])}
    with handle.token_mask(torch.tensor([True, True, False])), collect(handle, kinds) as log:
        net(x)
    assert log.joint("kind", "0")[1].tolist() == [[1, 1, 0], [0, 0, 0]]
    assert log.joint("kind", "1")[1].tolist() == [[0, 0, 0], [1, 1, 0]]
    with pytest.raises(ValueError, match="sigma must be set before every pass"):
        log.joint("sigma", "0")
    with (
        collect(handle, {"0": torch.zeros(3, dtype=torch.int64)}),
        pytest.raises(ValueError, match=r"kinds of '1'.*none"),
    ):
        net(x)
    with (
        collect(handle, torch.zeros(2, dtype=torch.int64)),
        pytest.raises(ValueError, match=r"shape of its tokens \(1, 3\), got \(2,\)"),
    ):
        net(x)
    with pytest.raises(ValueError, match="name all 2 kinds"), collect(handle, torch.tensor([0, 1, 1]), ("text",)):
        pass
    with collect(handle) as log:
        log.sigma = torch.zeros(4)
        with pytest.raises(ValueError, match="one per row"):
            net(x)


def test_specialisation_tells_signal_from_few_samples() -> None:
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(24) % 2
    # tokens of one sample share an expert by chance: far from independent, yet no specialisation
    clumped = 100 * nn.functional.one_hot(torch.randint(0, 4, (24,), generator=g), 4)
    chance = specialisation(clumped, labels)
    assert chance.p_value > 0.1 and chance.nats < 3 * chance.chance
    told = specialisation(100 * nn.functional.one_hot(labels, 4), labels)
    assert told.nats == pytest.approx(math.log(2)) and told.share == pytest.approx(1)
    assert told.p_value == pytest.approx(1 / 200), "no shuffle reached it, and the labels as they are count as one"
    assert told == specialisation(100 * nn.functional.one_hot(labels, 4), labels), "seeded"
    with pytest.raises(ValueError, match="labels must have the shape"):
        specialisation(clumped, labels[:3])


def test_specialisation_of_a_log_finds_a_router_that_reads_the_layout() -> None:
    net, handle = build()
    with collect(handle) as log:
        for i in range(16):
            log.layout, log.sigma = [i % 2], (i % 4) / 4
            net(onehot([[2 * (i % 2)] * 3 + [1]]))
    found = log.specialisation("layout")["0"]
    assert found.nats == pytest.approx(0.75 * math.log(2)) and found.p_value < 0.02
    assert set(log.specialisation("sigma")) == {"0", "1"}


@pytest.mark.parametrize("by", ["kind", "sigma", "layout", "block"])
def test_plot_is_written_whole(by: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="needs the extra plot")
    from moe_lora.plot import plot_load
    from PIL import Image

    net, handle = build()
    with collect(handle, torch.tensor([0, 1, 1]), ("text", "image")) as log:
        with pytest.raises(ValueError, match="at least one pass"):
            plot_load(log, tmp_path / "none.png")
        log.sigma, log.layout = [0.2, 0.7], [0, 1]
        net(onehot([[0, 1, 2], [0, 0, 2]]))
    path = plot_load(log, tmp_path / "sub" / "load.png", by)  # type: ignore[arg-type]
    assert [p.name for p in path.parent.iterdir()] == ["load.png"]
    assert len(set(Image.open(path).convert("L").getdata())) > 20
