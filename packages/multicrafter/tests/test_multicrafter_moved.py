"""Names from before the rooms were rebuilt: they import for one more version, as the very modules of today, and say so."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import multicrafter
import pytest
from multicrafter._moved import MOVED


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


def test_what_was_in_the_module_demo():
    from multicrafter.demo import both_stages

    with pytest.warns(DeprecationWarning, match=r"demo\.DemoConfig is now multicrafter\.demo\.both_stages\.DemoConfig"):
        from multicrafter.demo import DemoConfig
    assert DemoConfig is both_stages.DemoConfig
    with pytest.raises(ImportError):
        from multicrafter.demo import Nothing  # noqa: F401
