"""Files of strangers, read and written: each of these was a photo without consent, a lost file, a traceback or a hang once."""

from __future__ import annotations

import json
import os
from argparse import ArgumentTypeError

import numpy as np
import pytest
from multicrafter import UserError
from multicrafter.cli import main
from multicrafter.cli.options import apart, ours, positive, real, seed, writable
from multicrafter.files import parse_json, read_json
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.publish import save_pretrained
from multicrafter.photos.notes import read_notes
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.manifest import read_prompts
from multicrafter.scoring.score import Scores
from multicrafter_refusals import refused
from PIL import Image

NAN = float("nan")
PIXELS = np.random.default_rng(0).integers(0, 255, (40, 40, 3), np.uint8)
HALF = np.zeros((8, 8), np.uint8)
HALF[:, :4] = 255


# consent


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("file_name,consent,consent\na.png,no,yes\n", "'consent' is there twice"), ("file_name,file_name,consent\na.png,b.png,no\n", "twice"),
        ("a.png,no\n", "must have a column file_name"), ('file_name,caption,consent\na.png,"a,no\nb.png,b,no\n', "must be CSV"),
        ("file_name,consent,minor\na.png,no\n", "as many values as columns"), ("", "must have a column file_name"),
    ],
)  # fmt: skip
def test_a_no_in_a_table_is_not_lost(tmp_path, text, words):
    """Of two columns the last counted, a table without names said nothing, and an open quote swallowed the next photo's answer."""
    (tmp_path / "metadata.csv").write_text(text)
    with pytest.raises(UserError, match=words):
        read_notes(tmp_path)


def test_metadata_that_never_ends_or_is_no_file(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "consent": "no", "source": ' + "9" * 5000 + "}\n")
    with pytest.raises(UserError, match="line 1: must be JSON"):
        read_notes(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.jsonl").mkdir()
    with pytest.raises(UserError, match="must be a file"):
        read_notes(tmp_path)


# files that are read


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}", '{"a": 1, "a": 2}', "{", ""])
def test_json_that_means_nothing_or_two_things(text, tmp_path):
    with pytest.raises(UserError, match="x must be JSON"):
        parse_json(text, "x")
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="must be JSON"):
        read_json(tmp_path / "x.json")


def test_json_with_a_mark_is_read_and_a_pipe_is_not_waited_for(tmp_path):
    (tmp_path / "x.json").write_bytes(b"\xef\xbb\xbf[1]\r\n")
    assert read_json(tmp_path / "x.json") == [1]
    os.mkfifo(tmp_path / "p.json")
    for path in (tmp_path / "p.json", tmp_path, tmp_path / "none.json"):
        with pytest.raises(UserError, match="must be a file"):
            read_json(path)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"references": "r.png"}, "references must be a list, got 'r.png'"), ({"references": {"image": "r.png"}}, "references must be a list"),
        ({"refrences": ["r.png"]}, "'refrences' must be spelled 'references'"), ({"count": True}, "count must be a whole number"),
        ({"references": [{"image": "r.png", "box": ["0", "0", "1", "1"]}]}, "box must be"), ({"key": None}, "key must be"),
        ({"references": [{"image": "r.png", "box": {"a": 1, "b": 2, "c": 3, "d": 4}}]}, "box must be"), ({"key": ["0"]}, "key must be"),
        ({"key": ""}, "every key must name a picture"),
    ],
)  # fmt: skip
def test_entries_of_a_manifest(row, words, tmp_path):
    (tmp_path / "m.json").write_text(json.dumps([{"prompt": "a", **row}]))
    with pytest.raises(UserError, match=words):
        read_prompts(tmp_path / "m.json")


def test_manifests_of_others_and_lines(tmp_path):
    for name, row in (
        ("people", {"prompt": "a", "people": "r.png", "vlm_questions": []}),
        ("image_paths", {"prompt": "a", "image_paths": "r.png", "ori_img_path": "0.png"}),
    ):
        (tmp_path / "m.json").write_text(json.dumps([row]))
        with pytest.raises(UserError, match=f"{name} must be a list, got 'r.png'"):
            read_prompts(tmp_path / "m.json")
    row = {"key": "0", "task_type": "character", "instruction": 5, "input_images": ["r.png"]}
    (tmp_path / "m.json").write_text(json.dumps([row]))
    with pytest.raises(UserError, match="must be a sentence, got 5"):
        read_prompts(tmp_path / "m.json")
    (tmp_path / "m.parquet").write_bytes(b"PAR1xxxx")
    with pytest.raises(UserError, match="JSON, JSON lines or Parquet"):
        read_prompts(tmp_path / "m.parquet")
    (tmp_path / "m.jsonl").write_text(
        '{"prompt": "two\u2028people"}\n', encoding="utf-8"
    )  # a line of JSON, whatever else ends lines
    assert read_prompts(tmp_path / "m.jsonl")[1][0].prompt == "two\u2028people"


def scores(**changes):
    case = {"key": "0", "group": "0", "category": "", "metrics": {"aes": 0.5}}
    about = {"judges": {}, "format": "native", "prompts": "x"}
    return {"schema": 1, "name": "a", "about": about, "cases": [case], "missing": [], "problems": [], **changes}


def test_scores_that_are_none(tmp_path):
    path = tmp_path / "scores.json"
    path.write_text(json.dumps(scores()))
    good = Scores.load(path).cases[0]
    for wrong in (
        {"cases": []}, {"cases": {}}, {"about": {}}, {"about": []}, {"about": {**scores()["about"], "judges": "a"}}, {"name": 5}, {"name": " "},
        {"missing": 5}, {"cases": [good, good]},
        *({"cases": [{**good, "metrics": m}]} for m in ({"aes": "high"}, {"aes": [1]}, {"aes": True}, [])),
        {"cases": [{**good, "key": {}}]}, {"cases": [{**good, "group": [1]}]}, {"cases": [{**good, "metrics": {"aes": NAN}}]},
    ):  # fmt: skip
        path.write_text(json.dumps(scores(**wrong)))
        with pytest.raises(UserError, match="must be written by multicrafter evaluate"):
            Scores.load(path)


# files that are written


def test_what_is_read_is_never_written_over(tmp_path, capsys):
    (tmp_path / "a.json").write_text(json.dumps(scores(name="a")))
    (tmp_path / "b.json").write_text(json.dumps(scores(name="b")))
    (tmp_path / "link.json").symlink_to(tmp_path / "a.json")
    (tmp_path / "notes.json").write_text('{"mine": 1}')
    (tmp_path / "dir.json").mkdir()
    compare = ("compare", tmp_path / "a.json", tmp_path / "b.json", "--out")
    for name, words in (
        ("a.json", "which is read"), ("link.json", "which is read"), ("notes.json", "did not write"), ("dir.json", "must be a file"),
        ("a.json/x.json", "must be writable"), ("x" * 300 + ".json", "a name that a file can have"),
    ):  # fmt: skip
        assert words in refused(capsys, tmp_path, *compare, tmp_path / name)
    assert "must be writable" in refused(
        capsys, tmp_path, "leaderboard", tmp_path / "a.json", "--out", tmp_path / "a.json" / "x.md"
    )
    assert (
        main([str(a) for a in (*compare, tmp_path / "c.json")])
        == main([str(a) for a in (*compare, tmp_path / "c.json")])
        == 0
    )


def test_a_name_that_no_file_can_have(tmp_path):
    with pytest.raises(UserError, match="a name that a file can have"):
        writable(tmp_path / "a\0b.png", file=True)


def test_runs_without_a_common_metric_and_names_that_end_a_cell(tmp_path, capsys):
    """Nothing was compared, and said nothing; a bar in a run's name moved the numbers into other columns."""
    (tmp_path / "a.json").write_text(json.dumps(scores(name="a|b\nc")))
    (tmp_path / "b.json").write_text(
        json.dumps(scores(name="b", cases=[{**scores()["cases"][0], "metrics": {"clip_t": 0.2}}]))
    )
    assert "must share a metric, got aes and " in refused(
        capsys, tmp_path, "compare", tmp_path / "a.json", tmp_path / "b.json"
    )
    assert main(["leaderboard", str(tmp_path / "a.json")]) == 0
    table = capsys.readouterr().out.splitlines()
    assert table[2].startswith(r"| a\|b c | **0.50") and len(table) == 3


def test_a_plan_does_not_take_the_place_of_its_configuration(tmp_path):
    for wrong in (tmp_path / "run.yaml", tmp_path / "sub" / ".." / "run.yaml"):
        with pytest.raises(UserError, match="which is read"):
            apart(wrong, tmp_path / "run.yaml")
    (tmp_path / "x.txt").write_text("mine")
    with pytest.raises(UserError, match="did not write"):
        ours(tmp_path / "x.txt", "run")


def test_reports_of_others_stay(tmp_path, capsys):
    Image.fromarray(PIXELS).save(tmp_path / "0.png")
    (tmp_path / "m.json").write_text('[{"prompt": "a"}]')
    for name in ("report.html", "scores.json"):
        (tmp_path / name.replace(".", "_")).mkdir()
        (tmp_path / name.replace(".", "_") / name).write_text("mine")
        words = refused(
            capsys, tmp_path, "evaluate", "--pictures", tmp_path, "--manifest", tmp_path / "m.json", "--out", tmp_path / name.replace(".", "_")
        )  # fmt: skip
        assert "would overwrite" in words
    (tmp_path / "notes.json").write_text("[1]")
    assert "would overwrite" in refused(capsys, tmp_path, "evaluate", "--cases", 1, "--out", tmp_path / "notes.json")


def test_a_sheet_is_no_reference_and_no_picture(tmp_path, capsys):
    """``--sheet`` could be one of the references, which was then gone."""
    for name in ("a", "b", "m"):
        Image.fromarray(PIXELS if name != "m" else HALF).save(tmp_path / f"{name}.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "a.png")
    given = (
        "generate",
        "--prompt",
        "x",
        "--steps",
        1,
        "--reference",
        tmp_path / "a.png",
        "--reference",
        tmp_path / "b.png",
    )
    for more in (["b.png"], ["link.png"], ["m.png", "--separation", "masks", "--mask", tmp_path / "m.png"]):
        assert "--sheet must be" in refused(
            capsys, tmp_path, *given, "--out", tmp_path / "o.png", "--sheet", tmp_path / more[0], *more[1:]
        )
    assert "--sheet must be" in refused(
        capsys, tmp_path, *given, "--out", tmp_path / "o.png", "--num-images", 2, "--sheet", tmp_path / "o_1.png"
    )


def test_people_are_drawn_where_they_can_be_and_over_nothing(tmp_path, capsys):
    (tmp_path / "f").write_text("mine")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "a.png").symlink_to(tmp_path / "nowhere" / "x")
    for name in ("f", "f/x", "half", "x" * 300):
        refused(capsys, tmp_path, "draw-references", "--out", tmp_path / name)
    assert not (tmp_path / "nowhere").exists()
    for wrong in ("1" + "0" * 30, "x", "1.5", "1_000", "٣", "--1", "+1", ""):
        with pytest.raises(ArgumentTypeError, match="whole number"):
            seed(wrong)
    assert seed("-7") == -7 and real("-1e3") == -1000
    for wrong in ("1_0.5", "٣", "1e400", "nan"):
        with pytest.raises(ArgumentTypeError, match="finite number"):
            real(wrong)
    with pytest.raises(ArgumentTypeError, match="whole number of at least 1"):
        positive("²")


def test_a_folder_of_somebody_else_keeps_its_readme(tmp_path, pipe):
    pipeline = MultiCrafterPipeline(pipe, Adapters(pipe.transformer, AdapterConfig(rank=2, num_experts=0)))
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "README.md").write_text("mine")
    for folder, words in (
        (tmp_path / "project", "README.md of somebody else"),
        (tmp_path / "project" / "README.md" / "x", "can be made"),
    ):
        with pytest.raises(UserError, match=words):
            save_pretrained(pipeline, folder)
    assert [p.name for p in (tmp_path / "project").iterdir()] == ["README.md"]
    save_pretrained(pipeline, tmp_path / "new")
    save_pretrained(pipeline, tmp_path / "new")
