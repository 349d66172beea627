"""Recipes, YAML, overrides: what is saved runs again as it is, and what is wrong is named."""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st
from multicrafter.cli import main
from multicrafter.config import recipes, settings
from multicrafter.config.described import described
from multicrafter.config.provenance import STUDIED, provenance
from multicrafter.config.recipes import Stage1, Stage2, get_recipe, resolve


@dataclass(frozen=True, kw_only=True)
class Inner:
    rate: float = 0.1
    kind: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    span: tuple[float, float] | None = None

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError(f"rate must not be negative, got {self.rate}")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str | None = None
    steps: int = 3
    on: bool = True
    limit: float | Literal["auto"] = "auto"
    inner: Inner = field(default_factory=Inner)


@dataclass(frozen=True, kw_only=True)
class Seed:
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Two:
    align: Seed = field(default_factory=Seed)
    pretrain: Seed = field(default_factory=Seed)


words = st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=12)
outers = st.builds(
    Outer,
    name=st.none() | words, steps=st.integers(-5, 10**6), on=st.booleans(),
    limit=st.just("auto") | st.floats(-1e6, 1e6),
    inner=st.builds(
        Inner, rate=st.floats(0, 1e9), kind=st.sampled_from("ab"), sizes=st.lists(st.integers(0, 9)).map(tuple),
        span=st.none() | st.tuples(st.floats(-1, 1), st.floats(-1, 1)),
    ),
)  # fmt: skip


@given(outers)
@example(Outer(name="\xa0..."))
@example(Outer(name="\x85\u2028"))
def test_yaml_and_back(config):
    text = settings.as_yaml(settings.to_dict(config), {"inner.rate": "ours", "steps": "paper"})
    assert settings.from_dict(Outer, yaml.safe_load(text)) == config
    assert settings.from_dict(Outer, json.loads(json.dumps(settings.to_dict(config)))) == config


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_a_saved_recipe_is_itself_again(name, tmp_path):
    run = get_recipe(name, seed=7)
    path = recipes.save(tmp_path / "deep" / "recipe.yaml", run)
    assert resolve(config=path) == run
    assert [p.name for p in path.parent.iterdir()] == ["recipe.yaml"]
    lines = [line for line in path.read_text().splitlines() if not line.endswith(":")]
    assert all("  # paper" in line or "  # ours" in line for line in lines)


def test_the_papers_numbers():
    """Output 512, references 320, rank 512, 4 experts top 1; 16 steps, w = 2, tau = 50 (arXiv 2509.21953), and nothing else is claimed."""
    one, two = recipes.flux1_dev_stage1(), recipes.flux1_dev_stage2()
    assert (one.world.size, one.world.reference_size) == (two.world.size, two.world.reference_size) == (512, 320)
    for adapters in (one.adapters, two.adapters):
        assert (adapters.rank, adapters.num_experts, adapters.top_k) == (512, 4, 1)
    window = two.align.online.window
    assert (window.num_steps, window.size, window.interval, window.stride) == (16, 2, 50, 1)
    claimed = {k for run in (one, two) for k, v in provenance(run).items() if v == "paper"}
    assert claimed == {
        "model.path", "model.backbone", "adapters.rank", "adapters.num_experts", "adapters.top_k", "world.size",
        "world.reference_size", "pretrain.adapters.rank", "pretrain.adapters.num_experts", "pretrain.adapters.top_k",
        "pretrain.world.size", "pretrain.world.reference_size", "align.online.window.num_steps",
        "align.online.window.size", "align.online.window.interval",
    }  # fmt: skip
    changed = settings.override(one, ["pretrain.adapters.rank=64"])
    assert provenance(changed)["pretrain.adapters.rank"] == "ours"


def test_values_that_come_from_a_study_name_it():
    """Every study that is named has a page; a value that was changed does not come from it any more."""
    runs = [get_recipe(name) for name in recipes.RECIPES]
    named = {(k, v.removeprefix("ours, see ")) for run in runs for k, v in provenance(run).items() if "see" in v}
    assert {k for k, _ in named} == set(STUDIED), "all of them are values of recipes, as they are chosen"
    pages = Path(__file__).parents[3] / "docs" / "results"
    if pages.is_dir():  # in a checkout; the source archive has none
        assert all((pages / f"{study}.md").is_file() for _, study in named)
    changed = settings.override(recipes.tiny_stage1(), ["pretrain.idar.coef=0.3"])
    assert provenance(changed)["pretrain.idar.coef"] == "ours"
    assert provenance(changed)["pretrain.idar.sigma_max"] == "ours, see regime"


def test_overrides():
    run = settings.override(
        recipes.flux1_dev_stage1(),
        [
            "pretrain.lr=3e-5",
            "pretrain.world.numbers=[3]",
            "pretrain.execution.dtype=float32",
            "pretrain.execution.micro_batch=null",
        ],
    )
    pretrain = run.pretrain
    assert (pretrain.lr, pretrain.world.numbers, pretrain.execution.dtype, pretrain.execution.micro_batch) == (
        3e-5, (3,), "float32", None,
    )  # fmt: skip
    short = settings.override(recipes.flux1_dev_stage1(), ["rank=8", "execution.dtype=float32", "lr=3e-5"])
    assert (short.adapters.rank, short.execution.dtype, short.pretrain.lr) == (8, "float32", 3e-5)
    with pytest.raises(ValueError, match=r"'seed'; it may be align.seed or pretrain.seed"):
        settings.override(Two(), ["seed=1"])
    untouched = recipes.flux1_dev_stage1().pretrain
    assert replace(pretrain, lr=untouched.lr, world=untouched.world, execution=untouched.execution) == untouched


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("pretrain.lr", "NAME=VALUE"),
        ("pretrain.lrr=1", r"got 'pretrain.lrr'; nearest: 'pretrain.lr'"),
        ("pretrain.lr.x=1", "must name a value"),
        ("weights.x=64", "must name a value"),
        ("pretrain.lr=fast", "pretrain.lr must be float, got 'fast'"),
        ("pretrain.batch=1.5", "pretrain.batch must be int"),
        ("pretrain.batch=true", "pretrain.batch must be int"),
        ("pretrain.lr=-1", "pretrain: lr must be positive"),
        ("pretrain.execution.dtype=int8", "pretrain.execution.dtype must be one of"),
        ("pretrain.world.numbers=3", "pretrain.world.numbers must be"),
        ("pretrain.adapters={rnk: 3}", "nearest: 'rank'"),
        ("pretrain.lr=[", "readable YAML"),
    ],
)
def test_wrong_overrides_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        settings.override(recipes.flux1_dev_stage1(), [change])


def test_wrong_files_are_named(tmp_path):
    path = tmp_path / "x.yaml"
    for text, words in [("a: [", "must be YAML"), ("- 1", "must hold a mapping"), ("pretrain: {batsh: 1}", "nearest: 'batch'"),
                        ("align: 3", "align must be a mapping"), ("model: {path: 3}", "model.path must be str")]:  # fmt: skip
        path.write_text(text)
        with pytest.raises(ValueError, match=words):
            resolve(config=path)
    with pytest.raises(ValueError, match="cannot be read"):
        resolve(config=tmp_path / "none.yaml")
    with pytest.raises(ValueError, match="got neither"):
        resolve()
    with pytest.raises(ValueError, match=r"tiny_stage1.*got 'huge'"):
        resolve(recipe="huge")
    path.write_text("pretrain: {batch: 4}")
    assert resolve(config=path) == Stage1(pretrain=replace(Stage1().pretrain, batch=4))
    path.write_text("align: {prompts: 3}")
    assert isinstance(resolve(config=path), Stage2)


def test_a_run_saves_what_it_was_and_runs_again_as_it_is(pipe, tmp_path, capsys):
    """Command line: recipe and overrides, then the saved file alone; the same adapter, bit for bit."""
    pipe.save_pretrained(tmp_path / "model")
    change = [f"model.path={tmp_path / 'model'}", "pretrain.num_steps=2", "pretrain.batch=2", "pretrain.num_scenes=4",
              "pretrain.adapters.rank=2", "pretrain.adapters.num_experts=2"]  # fmt: skip
    first, again = tmp_path / "first", tmp_path / "again"
    argv = ["pretrain", "--recipe", "tiny_stage1", "--out", str(first), *[x for c in change for x in ("--set", c)]]
    assert main(argv) == 0
    saved = resolve(config=first / "recipe.yaml")
    assert (saved.pretrain.num_steps, saved.model.path) == (2, str(tmp_path / "model"))
    assert main(["pretrain", "--config", str(first / "recipe.yaml"), "--out", str(again)]) == 0
    one, two = (folder / "adapter" / "adapter.safetensors" for folder in (first, again))
    assert one.read_bytes() == two.read_bytes()
    assert (again / "recipe.yaml").read_text() == (first / "recipe.yaml").read_text()
    align = ["align.num_steps=1", "align.prompts=1", "align.group_size=2", "align.num_sampling_steps=4", "num_scenes=4"]
    out = tmp_path / "stage2"
    argv = ["align", "--recipe", "tiny_stage2", "--adapter", str(first / "adapter"), "--out", str(out)]
    assert main([*argv, *[x for c in (change[0], *align) for x in ("--set", c)]]) == 0
    assert isinstance(resolve(config=out / "recipe.yaml"), Stage2)
    capsys.readouterr()
    for words, extra in [("must be a stage-1 run", ["--recipe", "tiny_stage2"]), ("got both", ["--recipe", "tiny_stage1", "--config", "x"]),
                         ("nearest", ["--recipe", "tiny_stage1", "--set", "pretrain.btch=1"])]:  # fmt: skip
        assert main(["pretrain", "--out", str(tmp_path / "no"), *extra]) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize("name", recipes.RECIPES)
def test_every_value_of_a_recipe_is_explained(name):
    found = described(get_recipe(name))
    assert [d.name for d in found if not d.meaning] == []
    known = settings.leaves(settings.to_dict(get_recipe(name)))
    assert {d.name for d in found} <= known.keys() | {"align.online.kernel"}


def test_the_settings_of_a_run_are_printed(capsys):
    assert main(["settings", "learning", "peak", "--set", "lr=3e-3"]) == 0
    assert capsys.readouterr().out == "pretrain.lr = 0.003  (float; ours)\n    Peak learning rate.\n"
    assert main(["settings", "--recipe", "tiny_stage2", "no-such-thing"]) == 2
    assert "words must be in the name or the meaning of a value, got 'no-such-thing'" in capsys.readouterr().err
