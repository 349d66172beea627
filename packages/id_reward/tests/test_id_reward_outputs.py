"""The command line writes over nothing that it did not write itself, and says everything that it was asked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("PIL", reason="needs id-reward[image]")
import id_reward.backends.faces
from id_reward import Faces
from id_reward.cli import distinct, main, short_names
from id_reward.images import as_array
from id_reward.outputs import check_target, write_atomically
from PIL import Image


class Colours:
    """One face a picture, its mean colour; black pictures have none."""

    seen = 0

    def detect_and_embed(self, images):  # type: ignore[no-untyped-def]
        Colours.seen += len(images)
        means = [as_array(i).reshape(-1, 3).mean(0) for i in images]
        return [
            Faces(
                np.array([[1.0, 1, 6, 6]] * bool(m.any())).reshape(-1, 4),
                np.ones(int(m.any())),
                m[None][: int(m.any())],
            )
            for m in means
        ]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(id_reward.backends.faces, "get_face_backend", lambda *a, **k: Colours())
    monkeypatch.chdir(tmp_path)
    Colours.seen = 0
    for name, colour in (("anna", (255, 0, 0)), ("ben", (0, 255, 0)), ("p1", (255, 0, 0)), ("p2", (0, 255, 0))):
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{name}.png")
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


GIVEN = ["score", "-r", "anna.png", "-r", "ben.png"]


@pytest.mark.parametrize(("arguments", "words"), [
    (["p1.png", "--annotate", "."], "--annotate . would overwrite p1.png, which is read"),
    (["p1.png", "p2.png", "--annotate", "sub/.."], "would overwrite p1.png"),
    (["p1.png", "--annotate", "link"], "would overwrite p1.png"),
    (["sub/anna.png", "--annotate", "."], "would overwrite anna.png"),
    (["sub/other.png", "--annotate", "elsewhere"], "other.png, which id-reward did not write"),
    (["p1.png", "--annotate", "p2.png"], "p2.png cannot"),
    (["p1.png", "--json", "p2.png"], "--json must name a file for JSON, got p2.png; put --json last"),
    (["p1.png", "--json=new.jpg"], "must name a file for JSON"),
    (["p1", "--json", "p1"], "--json p1 would overwrite p1, which is read"),
    (["p1.png", "--json", "notes.json"], "notes.json, which id-reward did not write"),
    (["p1.png", "--json", "text.txt"], "text.txt, which id-reward did not write"),
    (["p1.png", "--json", "sub"], "sub is a folder"),
    (["p1.png", "--json", "p1.png/x.json"], "cannot"),
    (["p1.png", "--json", "out.json", "--missing-penalty", "nan"], "missing_penalty"),
    (["p1.png", "--json", "out.json", "--min-similarity", "nan"], "min_similarity"),
    (["p1.png", "--min-similarity", "2"], "min_similarity"),
    (["p1.png", "--annotate", ""], "must name a place"),
    (["p1.png", "--json="], "must name a place"),
    (["p1.png", "--json", "a\0.json"], "a name with a 0"),
    (["p1.png", "--annotate", "a\0"], "a name with a 0"),
])  # fmt: skip
def test_nothing_of_the_users_is_touched(folder, capsys, arguments, words) -> None:
    (folder / "sub").mkdir()
    (folder / "elsewhere").mkdir()
    (folder / "link").symlink_to(folder, target_is_directory=True)
    for name in ("sub/anna.png", "sub/other.png", "elsewhere/other.png"):
        Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / name)
    Image.new("RGB", (8, 8), (9, 9, 9)).save(folder / "p1", "PNG")
    (folder / "notes.json").write_text('{"mine": 1}')
    (folder / "text.txt").write_text("mine")
    before = files(folder)
    assert main([*GIVEN, *arguments]) == 2
    printed, message = capsys.readouterr()
    assert words in message and message.count("\n") == 1 and printed == ""
    assert files(folder) == before and Colours.seen == 0  # before work begins


def test_what_the_command_wrote_it_may_write_again(folder) -> None:
    arguments = [*GIVEN, "p1.png", "p2.png", "--annotate", "drawn", "--json", "out.json", "--quiet"]
    assert main(arguments) == main(arguments) == 0
    assert sorted(p.name for p in (folder / "drawn").iterdir()) == ["p1.png", "p2.png"]
    assert Image.open(folder / "drawn" / "p1.png").info["Software"] == "id-reward"
    (folder / "drawn" / "p1.png").write_bytes((folder / "p1.png").read_bytes())
    assert main(arguments) == 2


def test_hard_links_are_the_same_file(folder) -> None:
    os.link(folder / "p1.png", folder / "other.json")
    with pytest.raises(ValueError, match=r"would overwrite p1\.png"):
        check_target(folder / "other.json", "--json other.json", ["p1.png"])


def test_the_same_reference_twice_has_two_entries(folder, capsys) -> None:
    assert main(["score", "-r", "anna.png", "-r", "anna.png", "p1.png", "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["references"] == ["anna.png", "anna.png"]
    (picture,) = content["pictures"]
    assert picture["per_reference"] == {"anna.png": 1.0, "anna.png (2)": 0.0} and picture["reward"] == 0.5
    assert picture["missing"] == ["anna.png (2)"] and picture["faces"][0]["reference"] == "anna.png"
    assert main(["score", "-r", "anna.png", "-r", "anna.png", "p1.png"]) == 0
    assert capsys.readouterr().out.split()[:5] == ["picture", "reward", "faces", "anna", "anna-2"]


def test_names_stay_distinct_whatever_they_are() -> None:
    assert distinct(["a", "a", "a (2)", "a"]) == ["a", "a (2)", "a (2) (2)", "a (3)"]
    assert short_names(["x/a.png", "y/a.png", "a-2.png"]) == ["a", "a-2", "a-2-2"]


def test_a_mistake_in_the_code_keeps_its_traceback(folder, monkeypatch, capsys) -> None:
    """A user's mistake is a sentence; a bug that happens to be a ValueError is not."""
    monkeypatch.setattr(Colours, "detect_and_embed", lambda self, images: np.zeros(2) @ np.zeros(3))
    with pytest.raises(ValueError, match=r"matmul|shapes"):
        main([*GIVEN, "p1.png"])
    monkeypatch.undo()
    assert main(["score", "-r", "nothing.png", "p1.png"]) == 2
    with pytest.raises(ValueError, match="nothing"):
        main(["score", "-r", "nothing.png", "p1.png", "--debug"])


def test_a_file_is_whole_or_not_there(tmp_path, monkeypatch) -> None:
    (tmp_path / "x.json").write_text("old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("full")))
    with pytest.raises(OSError, match="full"):
        write_atomically(tmp_path / "x.json", b"new")
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"] and (tmp_path / "x.json").read_text() == "old"
