"""What a folder can throw at the scan, and what metadata may say."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from multicrafter.photos.scan import Found, Skipped, printable, read_notes, walk


def touch(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(b"")


def photos(folder: Path) -> list[str]:
    return [item.path for item in walk(folder) if isinstance(item, Found)]


def skipped(folder: Path) -> dict[str, str]:
    return {item.path: item.reason for item in walk(folder) if isinstance(item, Skipped)}


def test_every_file_is_either_found_or_skipped_with_a_reason(tmp_path):
    touch(
        tmp_path,
        "b.JPG",
        "a/deep/er/c.png",
        "a/notes.txt",
        "a/no suffix",
        "x.heic",
        ".hidden.jpg",
        ".git/y.jpg",
        "metadata.csv",
    )
    assert photos(tmp_path) == ["b.JPG", "x.heic", "a/deep/er/c.png"]
    assert skipped(tmp_path) == {"a/notes.txt": "not a picture", "a/no suffix": "not a picture"}


def test_unicode_and_spaces_in_names(tmp_path):
    names = ["Größe 1.jpg", "写真 \U0001f600.png", " lead.webp", "new\nline.jpg", "a'b\"c.jpeg"]
    touch(tmp_path, *names)
    assert set(photos(tmp_path)) == set(names)


def test_names_that_are_no_utf8(tmp_path):
    try:
        touch(tmp_path, os.fsdecode(b"caf\xe9.jpg"))
    except OSError:
        pytest.skip("this file system takes UTF-8 names only")
    (found,) = photos(tmp_path)
    assert printable(found) == r"caf\xe9.jpg"
    json.dumps(printable(found)).encode("utf-8")


def test_link_loops_end(tmp_path):
    touch(tmp_path, "a/x.jpg", "b/y.jpg")
    (tmp_path / "a" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "b" / "to_a").symlink_to(tmp_path / "a", target_is_directory=True)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    assert sorted(photos(tmp_path)) == ["a/x.jpg", "b/y.jpg"]
    reasons = skipped(tmp_path)
    assert reasons["a/up"] == "link loop"
    assert reasons["b/to_a"] == "link loop"
    assert reasons["self"] == "unreadable"


def test_links_out_of_the_folder_are_followed(tmp_path):
    touch(tmp_path, "elsewhere/z.jpg", "in/a.jpg")
    (tmp_path / "in" / "more").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    assert photos(tmp_path / "in") == ["a.jpg", "more/z.jpg"]


def test_a_folder_that_cannot_be_read_does_not_stop_the_scan(tmp_path, monkeypatch):
    touch(tmp_path, "a/x.jpg", "b/y.jpg")
    real = os.scandir

    def scandir(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    assert photos(tmp_path) == ["b/y.jpg"]
    assert skipped(tmp_path) == {"a": "unreadable"}


def test_the_order_is_always_the_same(tmp_path):
    touch(tmp_path, *(f"{i % 7}/{i * 37 % 101:03d}.jpg" for i in range(101)))
    assert photos(tmp_path) == photos(tmp_path)
    assert photos(tmp_path) == sorted(photos(tmp_path))


def test_many_tiny_files(tmp_path):
    for i in range(5000):
        (tmp_path / f"{i}.{'jpg' if i % 2 else 'tmp'}").touch()
    assert len(photos(tmp_path)) == 2500
    assert len(skipped(tmp_path)) == 2500


def test_a_build_accounts_for_every_tiny_file(tmp_path):
    """What row `million_files` of benchmarks/results/data.parquet records of a million, with 3000."""
    study = pytest.importorskip("studies.tiny_files", reason="needs a checkout, where the studies are")
    study.make(tmp_path / "many", 3000)
    figures = study.run(tmp_path / "many", 3000)
    assert figures["records"] == study.PHOTOS
    assert figures["left_out"] == {
        "duplicates: near-duplicate": 599, "filter: too small": 1, "fingerprint: unreadable": 1200, "scan: not a picture": 1200,
    }  # fmt: skip


def test_a_changed_file_has_another_key():
    assert Found("a.jpg", 1, 2).key != Found("a.jpg", 1, 3).key != Found("a.jpg", 2, 3).key


# -- metadata


def test_notes_from_json_lines(tmp_path):
    rows = [
        {"file_name": "./a/b.jpg", "consent": "YES", "licence": "CC0", "caption": " two friends ", "minor": False},
        {"file_name": "c d.png", "license": "MIT", "people": [{"box": [1, 2, 30, 40], "consent": "no"}]},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows) + "\n")
    notes = read_notes(tmp_path, consent="unknown", licence="all rights reserved")
    assert notes["a/b.jpg"].consent == "yes"
    assert notes["a/b.jpg"].minor == "no"
    assert notes["a/b.jpg"].caption == "two friends"
    assert notes["c d.png"].licence == "MIT"
    assert notes["c d.png"].people[0].consent == "no"
    assert notes["c d.png"].people[0].box == (1, 2, 30, 40)


def test_notes_from_csv_with_defaults(tmp_path):
    (tmp_path / "metadata.csv").write_text(
        "\ufefffile_name,consent,licence\nü.jpg,,\nb.jpg,no,CC-BY\n", encoding="utf-8"
    )
    notes = read_notes(tmp_path, consent="yes", licence="own")
    assert (notes["ü.jpg"].consent, notes["ü.jpg"].licence) == ("yes", "own")
    assert (notes["b.jpg"].consent, notes["b.jpg"].licence) == ("no", "CC-BY")
    assert read_notes(tmp_path / "nowhere") == {}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"file_name": "a.jpg", "consent": "maybe"}', ("line 2", "consent", "yes, no or unknown", "maybe")),
        ('{"consent": "yes"}', ("line 2", "file_name")),
        ('{"file_name": "a.jpg", "people": [{"box": [5, 5, 1, 1]}]}', ("line 2", "box")),
        ('{"file_name": "a.jpg", "people": [{"consent": "no"}]}', ("line 2", "box")),
        ('{"file_name": "first.jpg"}', ("line 2", "twice")),
        ('["a.jpg"]', ("line 2", "object")),
        ("{broken", ("line 2", "JSON")),
    ],
)
def test_metadata_that_cannot_be_understood_stops_the_build(tmp_path, line, words):
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "first.jpg"}}\n{line}\n')
    with pytest.raises(ValueError) as caught:
        read_notes(tmp_path)
    assert all(w in str(caught.value) for w in words), caught.value


def test_two_metadata_files_are_refused(tmp_path):
    touch(tmp_path, "metadata.jsonl", "metadata.csv")
    with pytest.raises(ValueError, match="both"):
        read_notes(tmp_path)
