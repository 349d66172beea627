"""A "no" reaches its photo however the name is spelled, and one that reaches none stops the build."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multicrafter.photos.notes import PhotoNote, match_notes, read_notes, spelling

NO, YES = PhotoNote(consent="no"), PhotoNote(consent="yes")
ROOT = Path("/photos")


def consent_of(notes, photos, others=()):
    found, unused = match_notes(notes, photos, others, root=ROOT)
    return {k: v.consent for k, v in found.items()}, unused


@pytest.mark.parametrize(
    ("noted", "photo"),
    [
        (unicodedata.normalize("NFD", "Zoë.jpg"), unicodedata.normalize("NFC", "Zoë.jpg")),
        (unicodedata.normalize("NFC", "Zoë/Å.jpg"), unicodedata.normalize("NFD", "Zoë/Å.jpg")),
        ("party\\zoe.jpg", "party/zoe.jpg"),
        (".\\party\\zoe.jpg", "party/zoe.jpg"),
        ("Party/Zoe.JPG", "party/zoe.jpg"),
        ("STRASSE.jpg", "straße.jpg"),
        (" zoe.jpg ", "zoe.jpg"),
        ("zoe\u200b.jpg", "zoe.jpg"),
        ("ﬁne.jpg", "fine.jpg"),
        ("/photos/party/zoe.jpg", "party/zoe.jpg"),
        ("party//zoe.jpg", "party/zoe.jpg"),
    ],
)
def test_a_no_in_another_spelling_counts(noted, photo):
    assert consent_of({noted: NO}, [photo, "other.jpg"]) == ({photo: "no"}, [])


@given(st.text(st.characters(codec="utf-8", exclude_characters="/\\\0"), min_size=1, max_size=8))
def test_every_unicode_form_of_a_name_is_that_name(name):
    forms = {unicodedata.normalize(form, name) for form in ("NFC", "NFD", "NFKC", "NFKD")}
    assert len({spelling(form) for form in forms}) == 1


def test_exact_names_come_first():
    assert consent_of({"a.jpg": NO, "A.jpg": YES}, ["a.jpg", "A.jpg"]) == ({"a.jpg": "no", "A.jpg": "yes"}, [])
    with pytest.raises(ValueError, match="could both be"):
        consent_of({"a.jpg": NO, "A.jpg": YES}, ["Ａ.jpg"])


def test_a_no_that_matches_nothing_stops_the_build():
    with pytest.raises(ValueError, match=r"'zoo.jpg' matches none, nearest: 'zoe.jpg'"):
        consent_of({"zoo.jpg": NO}, ["zoe.jpg"])
    for note in (PhotoNote(minor="yes"), PhotoNote(people=(PhotoNote(consent="no"),))):
        with pytest.raises(ValueError, match="matches none"):
            consent_of({"gone.jpg": note}, ["zoe.jpg"])
    assert consent_of({"zoo.jpg": YES}, ["zoe.jpg"]) == ({}, ["zoo.jpg"]), "a yes that matches nothing lends nothing"
    assert consent_of({"film.mov": NO}, ["zoe.jpg"], ["film.mov"]) == ({}, []), "it is there, and is not used anyway"


def write(folder, name, *rows):
    (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"file_name": "a.jpg", "concent": "no"}, "'consent'"),
        ({"file_name": "a.jpg", "consents": "no"}, "'consent'"),
        ({"filename": "a.jpg", "consent": "no"}, "'file_name'"),
        ({"file_name": "a.jpg", "people": [{"box": [1, 2, 3, 4], "consnt": "no"}]}, "'consent'"),
        ({"file_name": "a.jpg", "people": [{"box": [1, 2, 3, float("nan")], "consent": "no"}]}, "people must be"),
        ({"file_name": "a.jpg", "people": "nobody"}, "people must be"),
    ],
)
def test_a_misspelt_field_stops_the_build(tmp_path, row, words):
    write(tmp_path, "metadata.jsonl", row)
    with pytest.raises(ValueError, match=words):
        read_notes(tmp_path)


def test_two_answers_in_one_line_are_none(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "consent": "no", "consent": "yes"}')
    with pytest.raises(ValueError, match="there twice"):
        read_notes(tmp_path)


def test_fields_and_answers_in_any_case(tmp_path):
    write(tmp_path, "metadata.jsonl", {"File_Name": "a.jpg", " Consent ": "ＮＯ", "camera": "X"})
    assert read_notes(tmp_path)["a.jpg"].consent == "no"
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("\ufeffFile_Name,CONSENT\na.jpg,No\n", encoding="utf-8")
    assert read_notes(tmp_path)["a.jpg"].consent == "no"


@pytest.mark.parametrize("name", ["Metadata.csv", "metadata.json", "METADATA.JSONL", "metadata.txt"])
def test_a_metadata_file_of_another_name_is_not_overlooked(tmp_path, name):
    write(tmp_path, name, {"file_name": "a.jpg", "consent": "no"})
    with pytest.raises(ValueError, match="must be called"):
        read_notes(tmp_path)


def test_a_build_obeys(few, make_config, tmp_path):
    """From end to end: a backslash, another Unicode form, a name that is not there, metadata in a folder below."""
    from multicrafter.photos.build import build

    (few / "000.png").rename(few / unicodedata.normalize("NFC", "Zoë.png"))
    rows = [
        {"file_name": unicodedata.normalize("NFD", "Zoë.png"), "consent": "no"},
        {"file_name": ".\\001.PNG", "consent": "no"},
    ]
    write(few, "metadata.jsonl", *rows)
    summary = build(few, tmp_path / "out", make_config(), progress=False)
    assert summary.counts["privacy: consent refused"] >= 2
    write(few, "metadata.jsonl", *rows, {"file_name": "gone.png", "consent": "no"})
    with pytest.raises(ValueError, match=r"'gone\.png' matches none"):
        build(few, tmp_path / "out2", make_config(), progress=False)
    (few / "metadata.jsonl").unlink()
    (few / "below").mkdir()
    write(few / "below", "metadata.jsonl", *rows)
    with pytest.raises(ValueError, match="in the folder itself"):
        build(few, tmp_path / "out3", make_config(), progress=False)
