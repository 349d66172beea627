"""Names from before the rooms were rebuilt: they import for one more version, as the very modules of today, and say so."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import multicrafter
import pytest
from multicrafter._moved import MOVED, NAMES


@pytest.fixture
def unimported():
    """As if nobody had imported an old name yet."""
    before = {name: module for name, module in sys.modules.items() if name.removeprefix("multicrafter.") in MOVED}
    for name in before:
        del sys.modules[name]
    yield
    sys.modules.update(before)


@pytest.mark.parametrize("old", MOVED)
def test_an_old_name_is_the_new_module_and_says_so(old, unimported):
    with pytest.warns(DeprecationWarning, match=rf"multicrafter\.{old} is now multicrafter\.{MOVED[old]};"):
        found = importlib.import_module(f"multicrafter.{old}")
    assert found is importlib.import_module(f"multicrafter.{MOVED[old]}")
    assert found.__spec__.name == found.__name__ == f"multicrafter.{MOVED[old]}"


def test_no_old_name_is_also_a_new_one():
    walked = pkgutil.walk_packages(multicrafter.__path__, "multicrafter.")
    today = {module.name.removeprefix("multicrafter.") for module in walked}
    assert not today & MOVED.keys()
    assert set(MOVED.values()) <= today


def test_new_names_warn_of_nothing_and_unknown_old_ones_are_unknown():
    program = """
import warnings
warnings.simplefilter("error", DeprecationWarning)
import multicrafter, multicrafter.cli, multicrafter.demo, multicrafter.world
try:
    import multicrafter.stages.precision
except ModuleNotFoundError as error:
    assert error.name == "multicrafter.stages.precision", error.name
except DeprecationWarning:
    warnings.simplefilter("ignore")
    import multicrafter.stages
    try:
        import multicrafter.stages.precision
    except ModuleNotFoundError:
        print("unknown")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "unknown\n", done.stderr


@pytest.mark.parametrize(("module", "name"), [(m, n) for m, names in NAMES.items() for n in names])
def test_what_moved_out_of_a_module_is_still_there_and_says_so(module, name):
    home, _, now = f"multicrafter.{NAMES[module][name]}".rpartition(".")
    old = importlib.import_module(f"multicrafter.{module}")
    assert name not in vars(old)
    with pytest.warns(DeprecationWarning, match=rf"multicrafter\.{module}\.{name} is now {home}\.{now};"):
        found = getattr(old, name)
    assert found is getattr(importlib.import_module(home), now)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = old.nothing
