"""What strangers handed over and what came of it: each of these was an adapter of NaNs, a memory bomb, half a change or a traceback once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from moe_lora import MoELoRAConfig, inject, inject_saved, save_peft_lora
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
