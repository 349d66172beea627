"""What strangers handed over and what came of it: each of these was an adapter of NaNs, a memory bomb, half a change or a traceback once."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_lora import (
    MoELoRAConfig,
    collect,
    experts,
    inject,
    inject_saved,
    load_balance_loss,
    load_by_kind,
    mutual_information,
    route,
    router_z_loss,
    save_peft_lora,
    specialisation,
)
from safetensors.torch import save_file
from torch import nn

NAN = float("nan")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def handle(**changes: Any) -> Any:
    return inject(net(), MoELoRAConfig(**{"rank": 2, "alpha": 2.0, **changes}), ["0"])


def test_an_adapter_of_nans_is_never_written(tmp_path: Path) -> None:
    mixture = handle(num_experts=1)
    mixture.layers["0"].lora_b.data[0, 1, 1] = NAN
    for write in (mixture.save, lambda folder: save_peft_lora(mixture, folder)):
        with pytest.raises(ValueError, match=r"got NaN or infinity in .*0\.lora_"):
            write(tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "change", [lambda t: t * NAN, lambda t: t.long(), lambda t: t > 0, lambda t: t + 1j, lambda t: t.numpy()]
)
def test_a_state_of_no_numbers_is_refused_whole(change: Any) -> None:
    mixture = handle()
    before = mixture.state_dict()
    last = list(before)[-1]
    with pytest.raises(ValueError, match="must"):
        mixture.load_state_dict({**{k: v + 1 for k, v in before.items()}, last: change(before[last])})
    assert all(torch.equal(v, before[k]) for k, v in mixture.state_dict().items())
    for wrong in (None, [1]):
        with pytest.raises(ValueError, match="tensors by name"):
            mixture.load_state_dict(wrong)


def saved(tmp_path: Path) -> Path:
    handle().save(tmp_path / "a")
    return tmp_path / "a"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda c: c["config"].update(rank=10**8), "as it says"), (lambda c: c["config"].update(num_experts=10**8), "as it says"),
        (lambda c: c.update(targets="0"), "targets must be a list"),
    ],
)  # fmt: skip
def test_a_config_that_its_tensors_do_not_bear_out_costs_no_memory(change: Any, words: str, tmp_path: Path) -> None:
    """Memory was made for what moe_lora.json says before the tensors were looked at."""
    folder, model = saved(tmp_path), net()
    content = json.loads((folder / "moe_lora.json").read_text())
    change(content)
    (folder / "moe_lora.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=words):
        inject_saved(model, folder)
    assert list(model.state_dict()) == list(net().state_dict())


def test_files_that_are_nested_without_end_or_of_rare_types_leave_the_model_alone(tmp_path: Path) -> None:
    folder, model = saved(tmp_path), net()
    tensors = handle().state_dict()
    save_file({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}, folder / "moe_lora.safetensors")
    with pytest.raises(ValueError, match="got float8_e4m3fn"):
        inject_saved(model, folder)
    (folder / "moe_lora.json").write_text("[" * 100_000)
    with pytest.raises(ValueError, match="RecursionError"):
        inject_saved(model, folder)
    assert list(model.state_dict()) == list(net().state_dict())


def test_folders_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")
    mixture = handle(num_experts=1)
    for folder in (tmp_path / "f", tmp_path / "f" / "x"):
        for write in (mixture.save, lambda path: save_peft_lora(mixture, path)):
            with pytest.raises(ValueError, match="path must be a folder"):
                write(folder)
    assert (tmp_path / "f").read_text() == "mine"


@pytest.mark.parametrize("targets", [None, 5, [5], b"0", [None]])
def test_targets_that_are_none(targets: Any) -> None:
    with pytest.raises(ValueError, match="targets must be"):
        inject(net(), MoELoRAConfig(rank=2, alpha=2.0), targets)


@pytest.mark.parametrize("mask", [[True] * 3, np.ones(3, bool), {"0": [True]}])
def test_token_masks_are_tensors(mask: Any) -> None:
    with pytest.raises(ValueError, match="token_mask must be a boolean tensor"), handle().token_mask(mask):
        pass


def test_a_module_that_stands_in_two_places_is_not_adapted_in_one() -> None:
    """Only the first place got the mixture, and the model used both."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with pytest.raises(ValueError, match="must stand in one place of the model, got '0'"):
        inject(model, MoELoRAConfig(rank=2, alpha=2.0), ["0"])
    assert model[0] is model[2] is shared
    block = nn.Sequential(nn.Linear(4, 4))  # a shared block holds its linear once, and both uses see the mixture
    assert list(inject(nn.Sequential(block, block), MoELoRAConfig(rank=2, alpha=2.0), ["0.0"]).layers) == ["0.0"]


def test_a_handle_whose_mixtures_were_removed_writes_nothing(tmp_path: Path) -> None:
    mixture = handle()
    mixture.remove()
    with pytest.raises(ValueError, match="must hold mixtures to be written"):
        mixture.save(tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_numbers_of_numpy_are_plain_ones_in_the_file(tmp_path: Path) -> None:
    mixture = handle(rank=np.int64(2), alpha=np.float32(2), num_experts=np.int8(3))
    mixture.save(tmp_path / "a")
    assert json.loads((tmp_path / "a" / "moe_lora.json").read_text())["config"]["rank"] == 2
    assert inject_saved(net(), tmp_path / "a").config == MoELoRAConfig(rank=2, alpha=2.0, num_experts=3)
    with pytest.raises(ValueError, match="alpha must be a finite number"):
        MoELoRAConfig(rank=2, alpha=10**400)


def test_a_name_that_is_there_twice_and_a_pipe_are_refused(tmp_path: Path) -> None:
    """The last of two alphas won; a pipe was waited for."""
    folder, model = saved(tmp_path), net()
    text = (folder / "moe_lora.json").read_text()
    (folder / "moe_lora.json").write_text(text.replace('"alpha": 2.0', '"alpha": 2.0, "alpha": 4.0'))
    with pytest.raises(ValueError, match="got 'alpha' twice"):
        inject_saved(model, folder)
    for name in ("moe_lora.safetensors", "moe_lora.json"):
        (folder / "moe_lora.json").write_text(text)
        (folder / name).unlink()
        os.mkfifo(folder / name)
        with pytest.raises(ValueError, match="got a pipe or a device"):
            inject_saved(model, folder)
        (folder / name).unlink()


@pytest.mark.parametrize(
    "kinds",
    [torch.tensor([0.0, 0.5, 1.0]), [0, 0.5, 1], torch.tensor([0, -1, 1]), torch.tensor([]), "001", {"0": [-1, 0, 0]}],
)
def test_kinds_of_tokens_that_are_none(kinds: Any) -> None:
    """Half a kind was counted as kind 0."""
    with pytest.raises(ValueError, match="kinds must be whole numbers of at least 0"), collect(handle(), kinds):
        pass


def test_kinds_and_masks_in_lists_arrays_and_under_names() -> None:
    mixture, x, results = handle(), torch.randn(3, 4), []
    for kinds in ([0, 0, 1], np.array([0, 0, 1]), torch.tensor([0, 0, 1]), {"0": [0, 0, 1]}):
        with collect(mixture, kinds) as log:
            mixture.model(x)
        results.append(log.load("block")["0"])
    assert all(torch.equal(r, results[0]) for r in results)
    with (
        pytest.raises(ValueError, match="names must be regular expressions, got '\\('"),
        collect(mixture, {"(": [0, 0, 1]}),
    ):
        mixture.model(x)
    with pytest.raises(ValueError, match="token_mask must be boolean"), mixture.token_mask(torch.ones(3)):
        mixture.model(x)


@pytest.mark.parametrize(
    ("model", "config"), [(None, MoELoRAConfig(rank=2, alpha=2.0)), (net(), {"rank": 2}), ("net", None)]
)
def test_what_is_no_model_and_no_config(model: Any, config: Any) -> None:
    with pytest.raises(ValueError, match="model must be a torch module and config a MoELoRAConfig"):
        inject(model, config, ["0"])


TOKENS, DOWN, UP, ONES = torch.ones(6, 4), torch.ones(3, 2, 4), torch.ones(3, 5, 2), torch.ones(6, 1)


@pytest.mark.parametrize("dispatch", ["grouped", "loop", "dense"])
@pytest.mark.parametrize("index", [3, -2, 7])
def test_an_expert_that_is_not_there_is_no_silent_zero(dispatch: Any, index: int) -> None:
    with pytest.raises(ValueError, match=r"expert_index must be in \[-1, 3\), got"):
        experts(TOKENS, DOWN, UP, ONES, torch.full((6, 1), index), dispatch)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: experts(TOKENS, DOWN, UP, ONES, torch.zeros(6, 1).long(), "dens"), "dispatch must be one of"),
        (lambda: experts(TOKENS, DOWN, UP, torch.ones(6, 2), torch.zeros(6, 1).long()), "expert_index must have the shape"),
        (lambda: route(torch.rand(6, 3), 1, "topk"), "gating must be one of"),
        (lambda: route(torch.rand(6, 3), 0, "softmax_then_topk"), r"top_k must be a whole number in \[1, 3\]"),
        (lambda: route(torch.rand(6, 3), 1, "softmax_then_topk", token_mask=torch.ones(1).bool()), "token_mask must have the shape"),
        (
            lambda: route(torch.rand(6, 3), 1, "softmax_then_topk", expert_index=torch.zeros(6, 2).long()),
            "expert_index must have the shape .* k = 1",
        ),
        (lambda: router_z_loss(torch.rand(6, 3), torch.rand(6)), "mask must hold boolean values"),
        (lambda: load_balance_loss(torch.rand(6, 3), torch.full((6, 1), 3)), "expert_index must be in"),
        (lambda: load_by_kind(torch.tensor([[2], [0]]), torch.tensor([0, 1]), 2), "expert_index must be in"),
        (lambda: load_by_kind(torch.tensor([[1], [0]]), torch.tensor([1]), 2), "kinds must have the shape"),
        (lambda: mutual_information(torch.tensor([[NAN, 1.0]])), "joint must be finite"),
        (lambda: mutual_information(torch.tensor([[-1.0, 2.0]])), "joint must be finite and at least 0"),
        (lambda: specialisation(torch.ones(2, 2), torch.tensor([0.0, 0.7])), "labels must hold whole values"),
        (lambda: specialisation(torch.ones(2, 2), torch.tensor([0, 1]), permutations=10**30), "permutations must be"),
    ],
)  # fmt: skip
def test_what_gave_a_wrong_number_in_silence(call: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        call()
