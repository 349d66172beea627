"""Whatever somebody puts into a setting of any package, it fits the field's type, or one sentence names the setting."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import numbers
import pkgutil
import typing
from typing import Any

import gspo
import id_reward
import idar
import moe_lora
import multicrafter
import numpy as np
import pytest
import torch
from beartype import BeartypeConf
from beartype.door import is_bearable

ODD = [
    None, True, "x", "", b"x", -1, 0, 1.5, float("nan"), float("inf"), 10**30, [], [[]], [["a"]], ["x"], (1,), {}, {"a": 1}, {1}, object(),
    torch.tensor([1.0, 2.0]), np.array([1, 2]), np.float32(0.5), 1j, lambda: 0,
]  # fmt: skip
TOWER = BeartypeConf(is_pep484_tower=True)
"""Whole numbers are floats."""
REQUIRED: dict[str, dict[str, Any]] = {
    "OnlineConfig": {"window": gspo.SlidingWindow(num_steps=8)},
    "SlidingWindow": {"num_steps": 8},
    "SubjectLayout": {"num_text": 1, "image_span": (1, 3), "subject_spans": ((3, 4),)},
    "MoELoRAConfig": {"rank": 4, "alpha": 4.0},
    "DistillationConfig": {"velocity": 1.0, "attention": 1.0},
    "RemoteScorer": {"urls": ["http://127.0.0.1:9"]},
}
"""What has no default."""
ELSEWHERE = {
    "PeftMoELoRAConfig": "most of its fields are peft's own",
    "Separation": "what holds in one pass; its layout is set by the pass",
    "PlainLoRA": "holds tensors",
    "EncodedScenes": "holds tensors",
    "SlicedNoise": "holds tensors",
    "DrawRequest": "speaks to who clicks: its sentences start otherwise",
    "Evaluator": "needs parts",
    "IdentityScorer": "needs a backend",
    "IdentityFinder": "needs a backend",
    "CopyPaste": "needs a scorer",
}
"""What is no plain setting, and why."""


def checked_dataclasses() -> list[type]:
    """Dataclasses of all packages that check themselves, but for examples."""
    found: dict[str, type] = {}
    for package in (gspo, idar, moe_lora, id_reward, multicrafter):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if ".examples" in module.name or module.name.endswith("__main__"):
                continue
            try:
                names = vars(importlib.import_module(module.name))
            except ImportError:  # an extra that is not installed
                continue
            for name, value in names.items():
                own = inspect.isclass(value) and value.__module__ == module.name
                if own and dataclasses.is_dataclass(value) and "__post_init__" in vars(value):
                    found[name] = value
    return [value for name, value in sorted(found.items()) if name not in ELSEWHERE]


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; any real number will do as a float."""
    real = isinstance(value, numbers.Real) and not isinstance(value, bool)
    return is_bearable(value, hint, conf=TOWER) or (real and is_bearable(float(value), hint))


def attempt(kind: Any, settings: dict[str, Any]) -> tuple[Any, str]:
    """What is made of the settings, or None and why not."""
    try:
        return kind(**settings), ""
    except ValueError as error:
        return None, str(error)


@pytest.mark.parametrize("kind", checked_dataclasses(), ids=lambda kind: kind.__name__)
def test_an_odd_setting_is_refused_by_name_or_fits(kind: Any) -> None:
    given = REQUIRED.get(kind.__name__, {})
    kind(**given)
    hints = typing.get_type_hints(kind)
    for field in dataclasses.fields(kind):
        if not field.init or field.name.startswith("_"):
            continue
        for odd in ODD:
            made, message = attempt(kind, {**given, field.name: odd})
            assert "\n" not in message, (field.name, odd)
            assert len(message) < 600, (field.name, odd)
            good = made is None or fits(getattr(made, field.name), hints[field.name])
            assert good, (field.name, odd)


def test_the_list_of_what_is_no_plain_setting_holds_nothing_else() -> None:
    assert len(checked_dataclasses()) > 40
    assert {"OnlineConfig", "AlignConfig", "BindingConfig"} <= {kind.__name__ for kind in checked_dataclasses()}
