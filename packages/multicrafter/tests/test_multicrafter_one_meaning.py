"""One name, one thing: no two classes of multicrafter share a name, and names from when they did still work and say so."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import tomllib
import warnings
from collections import defaultdict
from pathlib import Path

import multicrafter
import pytest
from multicrafter.cli.messages import shown
from multicrafter.training.align_config import AlignConfig

SOURCE = Path(multicrafter.__file__).parent
OLD = {
    "scoring.evaluate.Judges": "WorldJudges",
    "plan.tracker.Tracker": "MemoryTracker",
    "plan.Tracker": "MemoryTracker",
    "photos.run.Run": "BuildRun",
    "photos.engines.Stage": "BatchFunction",
    "training.previews.Look": "Preview",
    "training.previews.look_at": "make_preview",
    "training.distributed.whole": "unsharded",
    "world.scenes.References": "DrawnReferences",
    "world.judges.network.Found": "Detections",
    "world.train_base.Batch": "BaseBatch",
}


def test_no_two_classes_share_a_name():
    homes = defaultdict(list)
    for path in sorted(SOURCE.rglob("*.py")):
        if path.relative_to(SOURCE).parts[0] in ("cli", "demo"):
            continue  # programs, whose insides nobody imports
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                homes[node.name].append(path.relative_to(SOURCE).as_posix())
    assert len(homes) > 100
    assert {name: found for name, found in homes.items() if len(found) > 1} == {}


@pytest.mark.parametrize("old", OLD)
def test_a_name_that_meant_two_things_works_and_says_what_it_is_now(old):
    home, _, name = old.rpartition(".")
    module = importlib.import_module(f"multicrafter.{home}")
    assert name not in vars(module)
    with pytest.warns(
        DeprecationWarning, match=rf"multicrafter\.{old} is now multicrafter\.{home}\.{OLD[old]}; the old name"
    ):
        found = getattr(module, name)
    assert found is getattr(module, OLD[old])
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = module.nothing


def test_old_modules_have_what_moved_out_of_them_and_what_is_called_otherwise_in_them(monkeypatch):
    """Both ways of being old at once: `multicrafter.evaluate` is `scoring.evaluate`, which has renamed one of its names."""
    monkeypatch.delitem(sys.modules, "multicrafter.evaluate", raising=False)
    with pytest.warns(DeprecationWarning, match=r"multicrafter\.evaluate is now"):
        was = importlib.import_module("multicrafter.evaluate")
    with pytest.warns(DeprecationWarning, match=r"evaluate\.Judges is now"):
        assert was.Judges is was.WorldJudges
    with pytest.warns(DeprecationWarning, match=r"evaluate\.write_json is now multicrafter\.files\.write_json"):
        assert was.write_json is not None


def test_an_old_name_of_ours_fails_a_test_that_does_not_expect_it(capsys):
    from multicrafter.scoring import evaluate

    with pytest.raises(DeprecationWarning, match="the old name leaves with multicrafter"):
        _ = evaluate.Judges
    with pytest.raises(DeprecationWarning, match="the old name leaves with multicrafter"):
        AlignConfig(group_size=3)
    with shown(), pytest.raises(DeprecationWarning, match="the old name leaves with multicrafter"):
        _ = evaluate.Judges  # the command line hides what other libraries say of themselves, not what ours say
    with shown():
        warnings.warn("diffusers says goodbye", FutureWarning, stacklevel=1)
    assert "goodbye" not in capsys.readouterr().err


def test_no_warning_is_silenced_wholesale():
    path = Path(__file__).parents[3] / "pyproject.toml"
    if not path.is_file():
        pytest.skip("needs a checkout, whose settings it reads")
    settings = tomllib.loads(path.read_text())["tool"]["pytest"]["ini_options"]
    silenced = [line.split(":") for line in settings["filterwarnings"] if line.startswith("ignore")]
    assert silenced and all(len(parts) > 3 and parts[3] for parts in silenced), "each names the module that warns"
    ours = ("gspo", "idar", "moe_lora", "id_reward", "multicrafter", "tests")
    assert not [name for parts in silenced for name in ours if re.match(parts[3], name)]
