"""What the workflows, hooks and templates name exists; a workflow does no more than `make` and may no more than it needs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TEMPLATES = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
PACKAGES = {path.parent.name for path in ROOT.glob("packages/*/pyproject.toml")}
MADE = {"dist/", "site/"}
"""What `make` writes; everything else that a workflow names is in the repository."""


def name(path: Path) -> str:
    return path.name


def jobs(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[dict]:
    return [step for job in jobs(path).values() for step in job["steps"]]


def targets() -> set[str]:
    return set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M).group(1).split())


def triggers(path: Path) -> dict:
    return yaml.safe_load(path.read_text())[True]  # "on" is a Boolean to YAML 1.1


def test_there_is_a_workflow_for_everything():
    assert {p.stem for p in WORKFLOWS} == {"check", "test", "wheels", "lowest", "release", "docs"}


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_a_workflow_runs_make_targets_that_exist(path):
    """What else a step does is a check of one line: a rule that lives in YAML can be run by nobody at home."""
    commands = [line for step in steps(path) if "run" in step for line in step["run"].splitlines()]
    called = [re.match(r"make ([a-z-]+)", line) for line in commands]
    assert {match.group(1) for match in called if match} <= targets()
    assert [c for c, match in zip(commands, called, strict=True) if not match and not c.startswith("test -f ")] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_paths_that_a_workflow_names_exist(path):
    events = [event for event in triggers(path).values() if isinstance(event, dict)]
    named = [p for event in events for p in event.get("paths", [])]
    for step in steps(path):
        inputs = step.get("with", {})
        named += inputs.get("cache-dependency-path", "").split() + inputs.get("path", "").split()
    assert [p for p in named if p not in MADE and not list(ROOT.glob(p.removesuffix("/**")))] == []


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_actions_are_pinned_to_commits_and_say_which_version(path):
    used = re.findall(r"^ *- uses: (.*)$", path.read_text(), re.M)
    assert used and [u for u in used if not re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", u)] == []


def test_one_version_of_an_action_everywhere():
    used = {u for path in WORKFLOWS for u in re.findall(r"uses: (.*)", path.read_text())}
    assert len({u.split("@")[0] for u in used}) == len(used)


@pytest.mark.parametrize("path", WORKFLOWS, ids=name)
def test_a_workflow_may_read_and_ends(path):
    """More than reading is granted to single jobs, and those run no code of ours."""
    assert yaml.safe_load(path.read_text())["permissions"] == {"contents": "read"}
    for job in jobs(path).values():
        assert job["timeout-minutes"] <= 350
        if "permissions" in job:
            assert job["environment"] in ("pypi", "github-pages")
            assert [s for s in job["steps"] if "run" in s or "checkout" in s["uses"]] == []
        for step in job["steps"]:
            if "checkout" in step.get("uses", ""):
                assert step["with"]["persist-credentials"] is False


def test_a_tag_of_every_package_is_released():
    path = ROOT / ".github" / "workflows" / "release.yml"
    assert set(triggers(path)["push"]["tags"]) == {f"{package}-v*" for package in PACKAGES}
    assert not re.search(r"secrets|password|token:", path.read_text().replace("id-token:", ""))


def test_every_leaf_is_tried_with_its_lowest_versions():
    (job,) = jobs(ROOT / ".github" / "workflows" / "lowest.yml").values()
    assert set(job["strategy"]["matrix"]["package"]) == PACKAGES - {"multicrafter"}


def test_the_commands_of_ci_are_those_of_the_workflows():
    local = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    run = " ".join(step.get("run", "") for path in WORKFLOWS for step in steps(path))
    assert [command for command in local if command not in run] == []


@pytest.mark.parametrize("path", TEMPLATES, ids=name)
def test_issue_templates_are_forms(path):
    form = yaml.safe_load(path.read_text())
    if path.stem == "config":
        return
    assert form["name"] and form["description"]
    kinds = {"dropdown", "textarea", "input", "checkboxes", "markdown"}
    assert form["body"] and all(part["type"] in kinds and part["attributes"] for part in form["body"])
    offered = [o for part in form["body"] for o in part["attributes"].get("options", [])]
    assert not offered or set(offered) >= PACKAGES


def test_hooks_call_what_make_check_calls():
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    makefile = (ROOT / "Makefile").read_text().replace("$(RUN)", ".venv/bin/python")
    for hook in repository["hooks"]:
        program, *rest = hook["entry"].split()
        called = program if program == ".venv/bin/lint-imports" else f".venv/bin/python -m {Path(program).name}"
        assert called in makefile or f"{program} {' '.join(rest)}" in makefile, hook["entry"]
        assert [word for word in rest if "/" in word and not (ROOT / word).exists()] == []


def test_dependabot_looks_where_versions_are():
    updates = yaml.safe_load((ROOT / ".github" / "dependabot.yml").read_text())["updates"]
    assert {u["package-ecosystem"] for u in updates} == {"github-actions", "pip"}
    assert all((ROOT / u["directory"].lstrip("/")).is_dir() for u in updates) and (ROOT / "constraints.txt").is_file()
