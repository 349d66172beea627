"""Names from before the rooms were rebuilt: they work for one more version, as the very modules and functions of today, and say so."""

from __future__ import annotations

import importlib
import pkgutil
import subprocess
import sys

import multicrafter
import pytest
from multicrafter import _MOVED, _MOVED_OUT, _today

# the import of an old module also warns of the old packages that it is in
pytestmark = pytest.mark.filterwarnings("ignore:.*the old name leaves with:DeprecationWarning")

OLD = {
    "adapters": "models.adapters",
    "backbones": "models.backbones",
    "backbones.base": "models.backbones.base",
    "backbones.drift": "models.backbones.drift",
    "backbones.flux1": "models.backbones.flux1",
    "backbones.flux2_klein": "models.backbones.flux2_klein",
    "backbones.flux2_klein_kv": "models.backbones.flux2_klein_kv",
    "backbones.tiny": "world.tiny_backbones",
    "benchmarking": "scoring",
    "benchmarking.judges": "scoring.judges",
    "benchmarking.leaderboard": "scoring.leaderboard",
    "benchmarking.manifest": "scoring.manifest",
    "benchmarking.metrics": "scoring.metrics",
    "benchmarking.pages": "scoring.pages",
    "benchmarking.score": "scoring.score",
    "benchmarking.statistics": "scoring.statistics",
    "cache": "training.encoding_cache",
    "checkpoint": "training.checkpoint",
    "data.cli": "cli.data",
    "data.photos": "photos",
    "data.photos.build": "photos.build",
    "data.photos.cache": "photos.cache",
    "data.photos.captions": "photos.captions",
    "data.photos.check": "photos.check",
    "data.photos.config": "photos.config",
    "data.photos.encode": "training.photo_scenes",
    "data.photos.engines": "photos.engines",
    "data.photos.identities": "photos.identities",
    "data.photos.loader": "photos.loader",
    "data.photos.masks": "photos.masks",
    "data.photos.people": "photos.people",
    "data.photos.pictures": "photos.pictures",
    "data.photos.quality": "photos.quality",
    "data.photos.records": "photos.records",
    "data.photos.reference": "photos.reference",
    "data.photos.references": "photos.references",
    "data.photos.report": "photos.report",
    "data.photos.run": "photos.run",
    "data.photos.samples": "photos.samples",
    "data.photos.scan": "photos.scan",
    "data.photos.schema": "photos.schema",
    "data.photos.select": "photos.select",
    "data.photos.stages": "photos.stages",
    "data.photos.store": "photos.store",
    "data.photos.write": "photos.write",
    "data.synthetic": "world",
    "data.synthetic.attributes": "world.attributes",
    "data.synthetic.render": "world.render",
    "data.synthetic.scenes": "world.scenes",
    "distributed": "training.distributed",
    "evaluate": "scoring.evaluate",
    "execution": "training.precision",
    "figures": "demo.figures",
    "flux": "models.flux",
    "flux.model": "models.flux.model",
    "flux.packing": "models.flux.packing",
    "flux.tiny": "world.tiny_flux",
    "flux.train_base": "world.train_base",
    "flux.train_vae": "world.train_vae",
    "judges": "world.judges",
    "judges.aesthetics": "world.judges.aesthetics",
    "judges.clip": "world.judges.clip",
    "judges.network": "world.judges.network",
    "judges.people": "world.judges.people",
    "judges.reader": "world.judges.reader",
    "judges.train": "world.judges.train",
    "loading": "models.loading",
    "loop": "training.loop",
    "model_card": "demo.base_card",
    "plan.command": "cli.plan",
    "publish": "models.publish",
    "recipes": "config.recipes",
    "report": "demo.report",
    "rewards": "world.rewards",
    "run_options": "config.run_options",
    "settings": "config.settings",
    "stages": "training",
    "stages.align": "training.align",
    "stages.data": "training.scenes",
    "stages.look": "training.previews",
    "stages.noise": "training.noise",
    "stages.pretrain": "training.pretrain",
    "stages.runs": "training.runs",
    "stages.scoring": "training.rewarding",
    "stages.trainee": "training.trainee",
    "trackers": "training.trackers",
}
"""Every module that there was and that has another name now."""


@pytest.fixture
def unimported():
    """As if nobody had imported an old name yet."""
    before = {name: module for name, module in sys.modules.items() if _today(name.removeprefix("multicrafter."))}
    for name in before:
        del sys.modules[name]
    yield
    sys.modules.update(before)


@pytest.mark.parametrize("old", OLD)
def test_an_old_name_is_the_new_module_and_says_so(old, unimported):
    with pytest.warns(DeprecationWarning, match=rf"multicrafter\.{old} is now multicrafter\.{OLD[old]};"):
        found = importlib.import_module(f"multicrafter.{old}")
    assert found is importlib.import_module(f"multicrafter.{OLD[old]}")
    assert found.__spec__.name == found.__name__ == f"multicrafter.{OLD[old]}"


@pytest.mark.parametrize("old", _MOVED_OUT)
def test_what_moved_out_of_a_module_is_still_there_and_says_so(old, unimported):
    module, _, name = old.rpartition(".")
    home, _, now = f"multicrafter.{_MOVED_OUT[old]}".rpartition(".")
    with pytest.warns(DeprecationWarning, match="the old name leaves"):
        was = importlib.import_module(f"multicrafter.{module}")
    assert name not in vars(was)
    with pytest.warns(DeprecationWarning, match=rf"multicrafter\.{old} is now {home}\.{now};"):
        found = getattr(was, name)
    assert found is getattr(importlib.import_module(home), now)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = was.nothing


def test_no_old_name_is_also_a_new_one():
    walked = pkgutil.walk_packages(multicrafter.__path__, "multicrafter.")
    today = {module.name.removeprefix("multicrafter.") for module in walked}
    assert not [name for name in today if _today(name)]
    assert {*_MOVED.values()} <= today
    assert {*_MOVED} <= {*OLD}


def test_new_names_warn_of_nothing_and_what_never_was_is_unknown():
    program = """
import warnings
warnings.simplefilter("error", DeprecationWarning)
import multicrafter.cli, multicrafter.demo, multicrafter.files, multicrafter.config
try:
    import multicrafter.nothing
except ModuleNotFoundError as error:
    print(error.name)
warnings.simplefilter("ignore")
try:
    import multicrafter.stages.nothing
except ModuleNotFoundError as error:
    print(error.name)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["multicrafter.nothing", "multicrafter.training.nothing"], done.stderr


def test_the_demonstration_keeps_its_names():
    from multicrafter.demo import DemoConfig, both_stages, run

    assert (DemoConfig, run) == (both_stages.DemoConfig, both_stages.run)
    with pytest.raises(ImportError):
        from multicrafter.demo import Nothing  # noqa: F401
