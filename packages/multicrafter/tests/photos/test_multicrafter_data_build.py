"""Whole builds of drawn photos: truth found again, nothing lost to bad input, interruptions or changed settings."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sqlite3
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from multicrafter.cli import main
from multicrafter.photos import FilterConfig, PrivacyConfig, ReferenceConfig, WriteConfig, build, stages
from multicrafter.photos.check import check_dataset
from multicrafter.photos.engines import InProcess
from multicrafter.photos.store import open_split
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from multicrafter_looks import check_page, needs_chromium, overflow


def records(out):
    return [r for split in ("train", "test") for r in open_split(out, split).records]


def content(out):
    """Every file of a dataset by its bytes, without what tells the time."""
    return {
        p.relative_to(out).as_posix(): p.read_bytes()
        for p in sorted(out.rglob("*"))
        if p.is_file()
        and ".build" not in p.parts
        and p.suffix not in (".html",)
        and p.name not in ("dataset.json", "README.md")
    }


def dropped(out):
    return [json.loads(line) for line in (out / "dropped.jsonl").read_text().splitlines()]


def run(photos, out, config, **kwargs):
    return build(photos, out, config, progress=False, **kwargs)


def test_identities_are_the_true_ones(drawn, built):
    """Two people on every photo, and the same identity exactly where the same person is."""
    out, summary = built
    rows = records(out)
    truth = {f"{i:03d}.png": pair for i, pair in enumerate(drawn[1])}
    assert len(rows) == len(truth)
    assert all(r["num_subjects"] == 2 for r in rows)
    seen: dict[str, Counter] = {}
    for row in rows:
        for subject in row["subjects"]:
            seen.setdefault(subject["identity"], Counter()).update(truth[row["source_file"]])
    # a group's person is on all its photos; the other one changes
    people = {i: c.most_common(1)[0][0] for i, c in seen.items()}
    assert all(seen[i][p] == max(seen[i].values()) for i, p in people.items())
    assert summary.identities == len({p for pair in truth.values() for p in pair})


def test_references_show_the_person_on_another_photo(drawn, built):
    truth = {f"{i:03d}.png": set(pair) for i, pair in enumerate(drawn[1])}
    rows = records(built[0])
    file_of = {r["key"]: r["source_file"] for r in rows}
    checked = 0
    for row in rows:
        for subject in row["subjects"]:
            for reference in subject["references"]:
                if not reference["augmented"]:
                    assert reference["from_key"] != row["key"]
                    assert truth[file_of[reference["from_key"]]] & truth[row["source_file"]]
                    checked += 1
                else:
                    assert reference["from_key"] == row["key"]
    assert checked > 20


def test_the_result_passes_the_validator_and_says_what_it_did(built):
    out, summary = built
    assert check_dataset(out, progress=False) == []
    assert summary.records["train"] > 0
    page = (out / "report.html").read_text()
    assert "histograms.png" in page and "sheet_0.jpg" in page
    assert Image.open(out / "report" / "sheet_0.jpg").width > 500
    assert Image.open(out / "report" / "histograms.png").width > 500
    card = (out / "README.md").read_text()
    assert "personal data" in card and "split: train" in card


def test_the_report_is_whole_with_words_for_pictures_in_light_and_dark(built):
    page = check_page(built[0] / "report.html")
    assert sum(tag == "img" for tag, _ in page.tags) == 3


@needs_chromium
def test_the_report_fits_a_phone(built, tmp_path):
    assert overflow(built[0] / "report.html", tmp_path) == 0


def test_masks_lie_where_the_people_are(built):
    out = built[0]
    store = open_split(out, "train")
    for record in store.records:
        planes = np.asarray(store.planes(record["masks"]))
        for subject in record["subjects"]:
            rows, columns = np.nonzero(planes >> subject["mask_bit"] & 1)
            left, top, right, bottom = subject["body_box"]
            assert columns.min() >= left - 1 and columns.max() <= right + 1
            assert rows.min() >= top - 1 and rows.max() <= bottom + 1


class Stopping(InProcess):
    """Stops like Ctrl-C or a lost machine after some batches."""

    def __init__(self, batches):
        self.left = batches

    def run(self, stage, batches):
        for done in super().run(stage, batches):
            if self.left == 0:
                raise KeyboardInterrupt
            self.left -= 1
            yield done


def test_an_interrupted_build_goes_on_and_ends_the_same(drawn, built, make_config, tmp_path):
    config = make_config(batch=4)
    for batches in (3, 9, 2):
        with pytest.raises(KeyboardInterrupt):
            run(drawn[0], tmp_path / "out", config, engine=Stopping(batches))
        assert not (tmp_path / "out" / "dataset.json").exists()
    summary = run(drawn[0], tmp_path / "out", config)
    computed = {name: t["computed"] for name, t in summary.stages.items()}
    assert computed["fingerprint"] == 0  # six batches were done before
    assert computed["detect"] < len(drawn[1])
    assert content(tmp_path / "out") == content(built[0])


class Dying(InProcess):
    """Is killed without a warning while a batch is on its way."""

    def run(self, stage, batches):
        for number, done in enumerate(super().run(stage, batches)):
            if stage.name == "render" and number == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            yield done


def test_a_killed_build_goes_on_and_ends_the_same(drawn, built, make_config, tmp_path):
    child = multiprocessing.get_context("fork").Process(
        target=run, args=(drawn[0], tmp_path / "out", make_config(batch=4)), kwargs={"engine": Dying()}
    )
    child.start()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    summary = run(drawn[0], tmp_path / "out", make_config(batch=4))
    assert summary.stages["detect"]["computed"] == 0 and summary.stages["render"]["computed"] == len(drawn[1]) - 8
    assert content(tmp_path / "out") == content(built[0])


def test_a_second_build_computes_nothing(drawn, built, make_config, tmp_path):
    shutil.copytree(built[0], tmp_path / "out")
    summary = run(drawn[0], tmp_path / "out", make_config())
    assert all(t["computed"] == 0 for name, t in summary.stages.items() if name not in ("scan", "group"))
    assert content(tmp_path / "out") == content(built[0])


def test_a_changed_setting_repeats_only_what_depends_on_it(drawn, built, make_config, tmp_path):
    shutil.copytree(built[0], tmp_path / "out")
    base = make_config()
    summary = run(drawn[0], tmp_path / "out", replace(base, write=replace(base.write, quality=50)))
    assert {n for n, t in summary.stages.items() if t["computed"] and n not in ("scan", "group")} == {"render"}


def test_lost_files_are_made_again(drawn, built, make_config, tmp_path):
    shutil.copytree(built[0], tmp_path / "out")
    victims = sorted((tmp_path / "out" / "images").rglob("*.jpg"))[:2]
    victims[0].unlink()
    victims[1].write_bytes(victims[1].read_bytes()[:100])
    run(drawn[0], tmp_path / "out", make_config())
    assert content(tmp_path / "out") == content(built[0])


def test_bad_files_are_logged_and_stop_nothing(few, make_config, tmp_path):
    (few / "text.jpg").write_text("not a picture")
    (few / "empty.png").touch()
    (few / "half.png").write_bytes((few / "000.png").read_bytes()[:300])
    (few / "notes.docx").write_text("x")
    (few / "Größe 写真.png").write_bytes((few / "001.png").read_bytes())
    Image.new("RGB", (200, 200), (90, 90, 90)).save(few / "nobody.png")
    Image.open(few / "004.png").rotate(90).resize((20, 20)).save(few / "small.png")
    (few / "loop").symlink_to(few, target_is_directory=True)
    summary = run(few, tmp_path / "out", make_config())
    reasons = {(d["path"], d["reason"]) for d in dropped(tmp_path / "out")}
    assert {
        ("text.jpg", "unreadable"),
        ("empty.png", "unreadable"),
        ("half.png", "unreadable"),
        ("notes.docx", "not a picture"),
    } <= reasons
    assert {("nobody.png", "no usable face"), ("small.png", "too small"), ("loop", "link loop")} <= reasons
    assert ("Größe 写真.png", "duplicate") in reasons
    assert sum(summary.records.values()) == 6
    assert check_dataset(tmp_path / "out", progress=False) == []


def test_a_stage_that_fails_on_one_photo_loses_only_that_one(few, make_config, tmp_path, monkeypatch):
    real = stages.Detect.__call__

    def fragile(self, jobs):
        if any(job.path.endswith("003.png") for job in jobs):
            raise RuntimeError("out of luck")
        return real(self, jobs)

    monkeypatch.setattr(stages.Detect, "__call__", fragile)
    summary = run(few, tmp_path / "out", make_config())
    assert sum(summary.records.values()) == 5
    assert (
        next(d for d in dropped(tmp_path / "out") if d["reason"] == "failed")["detail"] == "RuntimeError: out of luck"
    )
    monkeypatch.setattr(stages.Detect, "__call__", real)
    assert sum(run(few, tmp_path / "out", make_config()).records.values()) == 6  # failures are tried again


def test_the_photos_are_never_written_to(few, make_config, tmp_path):
    before = {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in few.iterdir()}
    few.chmod(0o555)
    run(few, tmp_path / "out", make_config())
    few.chmod(0o755)
    assert {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in few.iterdir()} == before


def notes(folder, **by_name):
    (folder / "metadata.jsonl").write_text(
        "".join(json.dumps({"file_name": n.replace("_", "") + ".png", **v}) + "\n" for n, v in by_name.items())
    )


def test_a_withdrawn_photo_and_its_copies_leave_nothing_behind(few, make_config, tmp_path):
    out = tmp_path / "out"
    run(few, out, make_config())
    stem = next(r["key"] for r in records(out) if r["source_file"] == "002.png")
    shutil.copy(few / "002.png", few / "copy.png")
    notes(few, _002={"consent": "no"})
    run(few, out, make_config())
    assert {(d["path"], d["reason"]) for d in dropped(out) if d["stage"] == "privacy"} == {
        ("002.png", "consent refused"), ("copy.png", "consent refused"),
    }  # fmt: skip
    assert not [p for p in out.rglob("*") if stem in p.name]
    keys = [k for (k,) in sqlite3.connect(out / ".build" / "cache.sqlite").execute("SELECT key FROM results")]
    assert len(keys) > 20 and not [k for k in keys if k.startswith(stem)]  # no embedding, no mask
    assert stem not in json.dumps(records(out))


def test_consent_can_be_required(few, make_config, tmp_path):
    notes(few, _000={"consent": "yes"}, _001={"consent": "yes", "minor": "yes"}, _002={"consent": "unknown"})
    summary = run(few, tmp_path / "out", make_config(privacy=PrivacyConfig(require_consent=True)))
    assert [r["source_file"] for r in records(tmp_path / "out")] == ["000.png"]
    assert summary.counts == {"privacy: minor": 1, "privacy: no consent": 4}


def test_one_person_without_consent_is_pixelated_and_never_a_subject(few, make_config, tmp_path):
    run(few, tmp_path / "before", make_config())
    whole = next(r for r in records(tmp_path / "before") if r["source_file"] == "000.png")
    gone, other = whole["subjects"]
    notes(few, _000={"people": [{"box": gone["face_box"], "consent": "no"}]})
    run(few, tmp_path / "out", make_config())
    (record,) = [r for r in records(tmp_path / "out") if r["source_file"] == "000.png"]
    assert [s["face_box"] for s in record["subjects"]] == [other["face_box"]]
    old, new = (np.asarray(Image.open(tmp_path / d / record["image"]), np.float64) for d in ("before", "out"))
    left, top, right, bottom = (round(x) for x in gone["face_box"])
    inside = np.abs(old - new)[top + 2 : bottom - 2, left + 2 : right - 2]
    assert inside.mean() > 8
    references = [x for r in records(tmp_path / "out") for s in r["subjects"] for x in s["references"]]
    assert not [
        x
        for x in references
        if x["image"].startswith(f"references/{record['key'][:2]}/{record['key']}_{0 if gone['mask_bit'] == 0 else 1}.")
    ]


def test_people_on_one_photo_only_get_a_marked_crop_or_none(few, make_config, tmp_path):
    lonely = tmp_path / "one"
    lonely.mkdir()
    shutil.copy(few / "000.png", lonely)
    run(lonely, tmp_path / "out", make_config())
    (record,) = records(tmp_path / "out")
    assert [[x["augmented"] for x in s["references"]] for s in record["subjects"]] == [[True], [True]]
    summary = run(lonely, tmp_path / "out", make_config(references=ReferenceConfig(augment=False)))
    assert sum(summary.records.values()) == 0
    assert summary.counts["group: no reference"] == 2


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"filter": FilterConfig(min_side=32, min_face_pixels=4, max_people=1)}, "filter: too many people"),
        ({"filter": FilterConfig(min_side=32, min_face_pixels=60)}, "filter: no usable face"),
        ({"filter": FilterConfig(min_side=100)}, "filter: too small"),
        ({"filter": FilterConfig(min_side=32, min_face_pixels=4, min_sharpness=1e4)}, "filter: blurred"),
        ({"filter": FilterConfig(min_side=32, min_face_pixels=4, min_aesthetics=2.0)}, "filter: not aesthetic"),
        ({"filter": FilterConfig(min_side=32, min_face_pixels=4, min_people=3)}, "group: lends references only"),
    ],
)
def test_every_filter_says_why(few, make_config, tmp_path, change, reason):
    summary = run(few, tmp_path / "out", make_config(**change))
    assert summary.counts[reason] == 6
    assert sum(summary.records.values()) == 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["{tmp}/nowhere", "{tmp}/out"], ("PHOTOS", "not there")),
        (["{few}", "{few}/out"], ("OUT must lie outside",)),
        (["{few}", "/proc/out"], ("/proc/out",)),
        (["{few}", "{tmp}/full"], ("new, empty or of an earlier build",)),
        (["{few}", "{tmp}/out", "--masks", "sam2"], ("sam2:PATH",)),
        (["{few}", "{tmp}/out", "--masks", "sam2:/nowhere"], ("sam2:PATH", "no folder /nowhere")),
        (["{few}", "{tmp}/out", "--masks", "selfie:/nowhere.tflite"], ("/nowhere.tflite",)),
        (["{few}", "{tmp}/out", "--captions", "vlm:/nowhere"], ("/nowhere",)),
        (["{few}", "{tmp}/out", "--min-people", "9"], ("max_people", "9")),
        (["{few}", "{tmp}/out", "--faces", "nobody"], ("nobody",)),
    ],
)
def test_what_cannot_work_is_one_sentence_and_exit_code_2(few, tmp_path, capsys, arguments, words):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").touch()
    argv = [
        "data",
        "build",
        *(a.format(few=few, tmp=tmp_path) for a in arguments),
        *(["--faces", "tiny", "--people", "same", "--min-side", "32"]),
    ]
    if "--faces" in arguments:
        argv = argv[: len(arguments) + 2]
    assert main(argv) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and "Traceback" not in "".join(lines)
    assert all(w in errors[0] for w in words), errors[0]


def test_the_command_line_builds_and_checks(few, tmp_path, capsys):
    argv = [
        "data",
        "build",
        str(few),
        str(tmp_path / "out"),
        *["--faces", "tiny", "--people", "same", "--min-side", "32", "--min-face-pixels", "4", "--test-fraction", "0"],
    ]
    assert main(argv) == 0
    assert "records: 6 train, 0 test" in capsys.readouterr().out
    assert main(["data", "check", str(tmp_path / "out")]) == 0
    next((tmp_path / "out" / "masks").rglob("*.png")).unlink()
    assert main(["data", "check", str(tmp_path / "out")]) == 1
    assert "missing file" in capsys.readouterr().out


def test_two_builds_do_not_share_a_folder(few, make_config, tmp_path):
    from multicrafter.photos.cache import Cache

    (tmp_path / "out" / ".build").mkdir(parents=True)
    with Cache(tmp_path / "out" / ".build" / "cache.sqlite") as held:
        held.put("s", {"k": {}})
        with pytest.raises(ValueError, match="another one works here"):
            run(few, tmp_path / "out", make_config())


def test_a_damaged_cache_is_named(few, make_config, tmp_path):
    (tmp_path / "out" / ".build").mkdir(parents=True)
    (tmp_path / "out" / ".build" / "cache.sqlite").write_bytes(b"no database at all" * 100)
    with pytest.raises(ValueError, match=r"cache\.sqlite"):
        run(few, tmp_path / "out", make_config())


def test_changing_the_format_leaves_no_files_of_the_old_one(few, make_config, tmp_path):
    run(few, tmp_path / "out", make_config())
    run(few, tmp_path / "out", make_config(write=WriteConfig(format="webdataset", test_fraction=0.0)))
    names = {p.name for p in (tmp_path / "out").iterdir()}
    assert "shards" in names and not names & {"images", "masks", "references", "manifest"}
