"""What an older version wrote is read: adapters without a word, checkpoints with one."""

import json
import shutil

import multicrafter
import pytest
import torch
from multicrafter.models.adapters import Adapters
from multicrafter.training import checkpoint, loop
from multicrafter.world import shipped_adapter
from multicrafter.world.tiny_flux import TinyFluxConfig, build_transformer


class Walk:
    """The smallest stage: a place that moves at random."""

    def __init__(self):
        self.place = torch.zeros(2)

    def step(self, index):
        self.place = self.place + torch.randn(2)
        return {"loss": float(self.place.square().sum())}

    def tensors(self):
        return {"place": self.place.clone()}

    def restore(self, tensors):
        self.place = tensors["place"]


def test_a_checkpoint_of_another_version_goes_on_and_says_so(tmp_path, monkeypatch, caplog):
    torch.manual_seed(0)
    straight = Walk()
    loop.run(straight, num_steps=4, out=tmp_path / "straight")
    torch.manual_seed(0)
    with monkeypatch.context() as older:
        older.setattr(checkpoint, "__version__", "0.0.9")
        loop.run(Walk(), num_steps=2, out=tmp_path / "halted")
    found = checkpoint.find_checkpoint(tmp_path / "halted" / "checkpoints")
    assert found.manifest["code"]["multicrafter"] == "0.0.9"
    torch.manual_seed(1)
    resumed = Walk()
    with caplog.at_level("WARNING"):
        loop.run(resumed, num_steps=4, out=tmp_path / "halted", resume="auto")
    assert torch.equal(resumed.place, straight.place)
    assert f"was written by multicrafter 0.0.9, this is {multicrafter.__version__}" in caplog.text


@pytest.mark.parametrize("code", ["0.0.9", None])
def test_an_adapter_of_another_version_loads(code, tmp_path):
    """The version is a note, not a condition; what decides is the file's format."""
    folder = shutil.copytree(shipped_adapter(), tmp_path / "older")
    notes = {**json.loads((folder / "adapter.json").read_text()), "code": code}
    (folder / "adapter.json").write_text(json.dumps(notes))
    old, read = Adapters.load(build_transformer(TinyFluxConfig()), folder)
    new, _ = Adapters.load(build_transformer(TinyFluxConfig()), shipped_adapter())
    assert read["code"] == code
    assert all(torch.equal(value, new.state_dict()[name]) for name, value in old.state_dict().items())
