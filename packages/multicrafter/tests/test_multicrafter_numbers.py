"""NaN and infinity are refused wherever a number is read, and never come out as a black picture or an adapter."""

from __future__ import annotations

import dataclasses
import json
import math
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from multicrafter.cli import parser
from multicrafter.config import settings
from multicrafter.config.recipes import Stage1, Stage2, tiny
from multicrafter.demo.both_stages import DemoConfig
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.binding import BindingConfig
from multicrafter.models.checks import check_finite, finite, whole
from multicrafter.photos.config import BuildConfig
from multicrafter.photos.loader import LoaderConfig
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import EvaluateConfig
from multicrafter.training.distillation import DistillationConfig
from multicrafter.training.loop import Diverged, LoopConfig, run
from multicrafter.training.pretrain import SamplingConfig, SeparationConfig
from multicrafter.world.train_base import BaseConfig
from PIL import Image
from safetensors.torch import load_file, save_file

BAD = (math.nan, math.inf, -math.inf)
RED = Image.new("RGB", (40, 60), (200, 40, 40))
CONFIGS = [
    Stage1(), Stage2(), tiny(seed=0).pretrain, tiny(seed=0).align, BuildConfig(), LoaderConfig(), EvaluateConfig(), BindingConfig(),
    LoopConfig(), SamplingConfig(guidance=2.0), SeparationConfig(),
    DistillationConfig(velocity=1.0, attention=0.1), AdapterConfig(), BaseConfig(), DemoConfig(),
]  # fmt: skip


def floats(config, path=()):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from floats(value, (*path, field.name))
        elif isinstance(value, float):
            yield (*path, field.name)


def with_value(config, path, value):
    first, *rest = path
    inner = with_value(getattr(config, first), rest, value) if rest else value
    return dataclasses.replace(config, **{first: inner})


@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: type(c).__name__)
def test_every_float_of_every_configuration_is_finite(config):
    for path in floats(config):
        for bad in BAD:
            with pytest.raises(ValueError):
                with_value(config, path, bad)
            content = settings.to_dict(config)
            node = content
            for name in path[:-1]:
                node = node[name]
            for written in (bad, str(bad)) if bad is math.nan else (bad,):
                node[path[-1]] = written
                with pytest.raises(ValueError, match=path[-1]):
                    settings.from_dict(type(config), content)


@pytest.mark.parametrize("text", [".inf", ".nan", "-.inf", "1e999", "nan"])
def test_infinite_learning_rates_are_refused_as_yaml_writes_them(text):
    with pytest.raises(ValueError, match="lr must be"):
        settings.override(Stage1(), [f"pretrain.lr={text}"])


@given(st.one_of(st.floats(), st.integers(), st.text(max_size=3), st.none(), st.booleans()))
def test_finite_is_finite(value):
    good = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
    if good:
        assert finite("x", value) == float(value)
        assert finite("x", np.float64(value)) == float(value)
    elif not (isinstance(value, (int, float)) and not isinstance(value, bool)) or not math.isfinite(value):
        with pytest.raises(ValueError, match="x must be a finite number"):
            finite("x", value)


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)])
def test_whole_numbers_of_any_kind(value):
    got = whole("seed", value)
    assert got == 3
    assert type(got) is int


@pytest.mark.parametrize(
    "value", [3.0, "3", None, True, np.float32(3), torch.tensor(3.0), [3], np.array([3]), math.nan]
)
def test_other_things_are_no_whole_numbers(value):
    with pytest.raises(ValueError, match="seed must be a whole number"):
        whole("seed", value)


def test_nested_floats_are_found():
    @dataclasses.dataclass(frozen=True)
    class Odd:
        values: tuple = (1.0, 2.0)
        table: dict = dataclasses.field(default_factory=dict)

    check_finite(Odd())
    for bad in (Odd(values=(1.0, math.nan)), Odd(table={"a": np.float32("inf")}), Odd(table={"a": [[math.inf]]})):
        with pytest.raises(ValueError, match="must be finite"):
            check_finite(bad)


@pytest.mark.parametrize(
    ("argv", "flag"),
    [
        (["generate", "--prompt", "x", "--out", "x.png"], "--guidance"),
        (["generate", "--prompt", "x", "--out", "x.png"], "--true-guidance"),
        (["generate", "--prompt", "x", "--out", "x.png"], "--bind-at"),
        (["pretrain", "--out", "x"], "--idar-coef"),
        (["plan"], "--memory"),
        (["evaluate"], "--guidance"),
    ],
)
@pytest.mark.parametrize("text", ["nan", "inf", "-inf", "1e999", "x"])
def test_flags_refuse_them(argv, flag, text, capsys):
    with pytest.raises(SystemExit) as stopped:
        parser().parse_args([*argv, f"{flag}={text}"])
    assert stopped.value.code == 2
    assert "must be a finite number" in capsys.readouterr().err


def adapter(pipe, folder):
    return Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=2)).save(folder, num_references=2)


@pytest.mark.parametrize("bad", BAD)
def test_an_adapter_of_nan_is_neither_loaded_nor_saved(pipe, tmp_path, bad):
    folder = adapter(deepcopy(pipe), tmp_path / "a")
    state = load_file(folder / "adapter.safetensors")
    next(iter(state.values())).view(-1)[0] = bad
    save_file(state, folder / "adapter.safetensors")
    names = [n for n, _ in pipe.transformer.named_parameters()]
    with pytest.raises(ValueError, match="must be finite"):
        Adapters.load(pipe.transformer, folder)
    assert [n for n, _ in pipe.transformer.named_parameters()] == names
    other = Adapters(pipe.transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=0))
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] = bad
    with pytest.raises(ValueError, match="must be finite"):
        other.save(tmp_path / "b")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("notes", "words"),
    [
        ({"size": math.nan}, "size must be a whole"), ({"size": "big"}, "size must be a whole"), ({"size": -64}, "size must be a whole"),
        ({"num_references": 1.5}, "num_references must be a whole"), ({"sampling": {"guidance": math.nan}}, "guidance must be a finite"),
        ({"sampling": {"num_steps": 0}}, "num_steps must be a whole"), ({"sampling": [1]}, "sampling must be an object"),
    ],
)  # fmt: skip
def test_notes_of_an_adapter_are_read_as_numbers(pipe, tmp_path, notes, words):
    folder = adapter(deepcopy(pipe), tmp_path / "a")
    meta = json.loads((folder / "adapter.json").read_text())
    (folder / "adapter.json").write_text(json.dumps({**meta, **notes}))
    with pytest.raises(ValueError, match=words):
        Adapters.load(pipe.transformer, folder)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"guidance": math.nan}, "guidance must be a finite"), ({"true_guidance": math.nan}, "true_guidance must be a finite"),
        ({"guidance": "2"}, "guidance must be a finite"), ({"num_steps": 1.5}, "num_steps must be a whole"),
        ({"true_guidance": 1e38}, "picture must be finite"),
    ],
)  # fmt: skip
def test_no_black_picture(pipe, options, words):
    with pytest.raises(ValueError, match=words):
        MultiCrafterPipeline(pipe)("two people", [RED], **{"num_steps": 2, **options})


class Exploding:
    """A stage whose weights become infinite in the second step."""

    def __init__(self):
        self.weight = torch.zeros(2)

    def step(self, index):
        self.weight = self.weight + (math.inf if index == 1 else 1.0)
        return {"loss": 1.0}

    def tensors(self):
        return {"adapters.weight": self.weight.clone()}

    def restore(self, tensors):
        self.weight = tensors["adapters.weight"]


def test_weights_that_are_not_finite_end_a_run_and_leave_the_good_checkpoint(tmp_path: Path):
    with pytest.raises(
        Diverged, match=r"adapters.weight holds NaN or infinity at step 2; the newest checkpoint is of step 1"
    ):
        run(Exploding(), num_steps=4, out=tmp_path, loop=LoopConfig(save_every=1, keep=1))
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_000001"]
