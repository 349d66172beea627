"""The changelog check finds what it is there for."""

import subprocess
import sys
from pathlib import Path

import check_fragments
import pytest


@pytest.fixture
def checkout(tmp_path):
    """A repository with one package, committed, without a fragment."""
    package = tmp_path / "packages" / "thing"
    (package / "src" / "thing").mkdir(parents=True)
    (package / "changelog.d").mkdir()
    (package / "pyproject.toml").write_text("")
    (package / "src" / "thing" / "__init__.py").write_text("")
    git(tmp_path, "init", "-q")
    commit(tmp_path)
    return tmp_path


def git(root, *arguments):
    subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *arguments], cwd=root, check=True, capture_output=True
    )


def commit(root):
    git(root, "add", "-A")
    git(root, "commit", "-q", "--allow-empty", "-m", "x")


def test_changed_source_needs_a_fragment(checkout):
    assert len(check_fragments.problems(checkout)) == 1
    (checkout / "packages/thing/changelog.d/2.feature.md").write_text("A thing.")
    assert check_fragments.problems(checkout) == []


def test_after_a_release_only_new_changes_need_one(checkout):
    git(checkout, "tag", "thing-v0.1.0")
    assert check_fragments.problems(checkout) == []
    (checkout / "packages/thing/src/thing/__init__.py").write_text("x = 1")
    commit(checkout)
    assert "since thing-v0.1.0" in check_fragments.problems(checkout)[0]


def test_without_tags_the_changelog_is_the_release(checkout):
    (checkout / "packages/thing/CHANGELOG.md").write_text("## 0.2.0")
    (checkout / "packages/thing/src/thing/__init__.py").write_text("version = 2")
    commit(checkout)
    assert check_fragments.problems(checkout) == []
    (checkout / "packages/thing/src/thing/__init__.py").write_text("x = 1")
    commit(checkout)
    (problem,) = check_fragments.problems(checkout)
    assert "the beginning" not in problem
    (checkout / "packages/thing/changelog.d/2.feature.md").write_text("A thing.")
    assert check_fragments.problems(checkout) == []


def test_the_newest_tag_counts_by_version(checkout):
    git(checkout, "tag", "thing-v0.10.0")
    git(checkout, "tag", "thing-v0.9.0")
    (checkout / "packages/thing/src/thing/__init__.py").write_text("x = 1")
    commit(checkout)
    assert "since thing-v0.10.0" in check_fragments.problems(checkout)[0]


@pytest.mark.parametrize("name", ["feature.md", "2.features.md", "2.feature.txt", "notes.md"])
def test_misnamed_fragments_are_found(checkout, name):
    (checkout / "packages/thing/changelog.d" / name).write_text("A thing.")
    assert any(name in line for line in check_fragments.problems(checkout))


def test_empty_fragments_are_found(checkout):
    (checkout / "packages/thing/changelog.d/2.feature.md").write_text("\n")
    assert "empty" in check_fragments.problems(checkout)[0]


PACKAGES = sorted(p.parent for p in Path(check_fragments.ROOT).glob("packages/*/pyproject.toml"))


@pytest.mark.parametrize("package", PACKAGES, ids=lambda p: p.name)
def test_a_release_would_have_every_fragment(package):
    """towncrier renders them all, under headings, with a title and without numbers of issues."""
    command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "9.9.9"]
    done = subprocess.run(command, cwd=package, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "\n## 9.9.9 (" in f"\n{done.stdout}"
    fragments = [path.read_text().strip() for path in (package / "changelog.d").glob("[!.]*.md")]
    assert [text for text in fragments if f"- {text.splitlines()[0]}" not in done.stdout] == []
    assert "(issue" not in done.stdout and "===" not in done.stdout
