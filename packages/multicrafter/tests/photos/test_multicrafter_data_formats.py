"""The three formats: `datasets` loads them, the loader gives the same batches from each, and the validator finds every kind of damage."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice

import numpy as np
import pytest
import torch
from multicrafter.photos import WriteConfig, build, schema
from multicrafter.photos.check import check_dataset
from multicrafter.photos.loader import LoaderConfig, PhotoLoader
from multicrafter.photos.store import open_split, safe_path
from PIL import Image

FORMATS = ("parquet", "jsonl", "webdataset")


@pytest.fixture(scope="module")
def sets(drawn, built, make_config, tmp_path_factory):
    """The same dataset in every format, several files a split."""
    folder = tmp_path_factory.mktemp("formats")
    for name in FORMATS:
        shutil.copytree(built[0], folder / name)
        build(
            drawn[0],
            folder / name,
            make_config(write=WriteConfig(format=name, test_fraction=0.7, shard_size=7)),
            progress=False,
        )
    return folder


@pytest.mark.parametrize("name", FORMATS)
def test_datasets_loads_it(sets, name, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    datasets = pytest.importorskip("datasets", reason="needs datasets")
    loaded = datasets.load_dataset(str(sets / name), cache_dir=str(tmp_path))
    about = schema.read_dataset_json(sets / name)
    assert {split: len(loaded[split]) for split in loaded} == about["splits"]
    row = loaded["train"][0]
    if name == "webdataset":
        record = row["json"] if isinstance(row["json"], dict) else json.loads(row["json"])
        assert row["jpg"].size == row["masks.png"].size == (record["width"], record["height"])
        assert record["subjects"][0]["references"][0]["strip_box"][3] <= row["refs.jpg"].height
    else:
        assert set(row) == set(schema.FIELDS)
        assert set(row["subjects"][0]) == set(schema.SUBJECT)
        assert set(row["subjects"][0]["references"][0]) == set(schema.REFERENCE)


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_valid_and_in_several_files(sets, name):
    assert check_dataset(sets / name, progress=False) == []
    assert len(schema.read_dataset_json(sets / name)["files"]["train"]) >= 2


def test_batches_are_the_same_from_every_format(sets):
    config = LoaderConfig(batch=3, buckets=((64, 64),), reference_size=32)
    batches = [list(islice(PhotoLoader(sets / name, config), 6)) for name in FORMATS]
    for other in batches[1:]:
        for a, b in zip(batches[0], other, strict=True):
            assert a.keys == b.keys and a.captions == b.captions and a.identities == b.identities
            assert torch.equal(a.images, b.images) and torch.equal(a.masks, b.masks)
            # a strip is compressed anew, so its references are only nearly the same
            assert (a.references - b.references).abs().mean() < 0.02


def test_shards_are_the_same_bytes_again(sets, drawn, make_config, tmp_path):
    shutil.copytree(sets / "webdataset", tmp_path / "out")
    before = {p.name: p.read_bytes() for p in (tmp_path / "out" / "shards").iterdir()}
    build(
        drawn[0],
        tmp_path / "out",
        make_config(write=WriteConfig(format="webdataset", test_fraction=0.7, shard_size=7)),
        progress=False,
    )
    assert {p.name: p.read_bytes() for p in (tmp_path / "out" / "shards").iterdir()} == before


# -- damage


@pytest.fixture
def copy(sets, tmp_path):
    shutil.copytree(sets / "jsonl", tmp_path / "set")
    return tmp_path / "set"


def edit(folder, change, split="train"):
    """Changes the first record of a split."""
    path = sorted((folder / "manifest").glob(f"{split}-*.jsonl"))[0]
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows[0])
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))


def kinds(folder):
    return {p.kind for p in check_dataset(folder, progress=False)}


def first(folder, split="train"):
    return open_split(folder, split).records[0]


def test_missing_and_broken_files(copy):
    (copy / first(copy)["image"]).unlink()
    assert kinds(copy) == {"missing file"}
    (copy / first(copy)["masks"]).write_bytes(b"no png")
    assert kinds(copy) == {"missing file", "broken file"}


def test_masks_of_another_size_or_without_a_pixel(copy):
    path = copy / first(copy)["masks"]
    Image.open(path).resize((63, 64)).save(path)
    assert kinds(copy) == {"mask size"}
    Image.fromarray(np.full((64, 64), 1 << first(copy)["subjects"][0]["mask_bit"], np.uint8)).save(path)
    problems = check_dataset(copy, progress=False)
    assert [(p.kind, p.key) for p in problems] == [("empty mask", first(copy)["key"])]
    assert f"bit {first(copy)['subjects'][1]['mask_bit']} of" in str(problems[0])
    Image.fromarray(np.zeros((64, 64), np.uint8)).save(path)
    assert [p.kind for p in check_dataset(copy, progress=False)] == ["empty mask"] * 2


def test_identities_and_photos_on_both_sides(copy):
    stranger = first(copy, "test")["subjects"][0]
    edit(copy, lambda r: r["subjects"][0].update(identity=stranger["identity"]))
    problems = check_dataset(copy, progress=False)
    assert [p.kind for p in problems] == ["leak"]
    assert stranger["identity"] in str(problems[0]) and "both train and test" in str(problems[0])
    edit(copy, lambda r: r["subjects"][0]["references"][0].update(from_key=first(copy, "test")["key"]))
    assert len(check_dataset(copy, progress=False)) == 2


@pytest.mark.parametrize("name", ["../outside.jpg", "/etc/passwd", "images/../../x.jpg", "a\\b.jpg", ""])
def test_paths_that_leave_the_folder(copy, name):
    edit(copy, lambda r: r.update(image=name))
    assert "path" in kinds(copy)
    with pytest.raises(ValueError, match="inside the dataset"):
        safe_path(copy, name)


def test_links_that_leave_the_folder(copy, tmp_path):
    path = copy / first(copy)["image"]
    (tmp_path / "secret.jpg").write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(tmp_path / "secret.jpg")
    assert kinds(copy) == {"path"}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda r: r.pop("caption"), "field"),
        (lambda r: r.update(width="64"), "field"),
        (lambda r: r.update(num_subjects=5), "field"),
        (lambda r: r["subjects"][0].pop("identity"), "field"),
        (lambda r: r["subjects"][1].update(mask_bit=r["subjects"][0]["mask_bit"]), "field"),
        (lambda r: r["subjects"][0].update(face_box=[0, 0, 500, 500]), "box"),
        (lambda r: r["subjects"][0].update(references=[]), "reference"),
        (lambda r: r["subjects"][0]["references"][0].update(width=1), "size"),
        (lambda r: r.update(width=65), "size"),
    ],
)
def test_records_that_are_wrong(copy, change, kind):
    edit(copy, change)
    assert kind in kinds(copy)


def test_records_twice_lost_or_unreadable(copy):
    path = sorted((copy / "manifest").glob("train-*.jsonl"))[0]
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    assert kinds(copy) == {"count", "key"}
    path.write_text("{")
    assert "manifest" in kinds(copy)


def test_damaged_shards(sets, tmp_path):
    shutil.copytree(sets / "webdataset", tmp_path / "set")
    path = sorted((tmp_path / "set" / "shards").glob("train-*.tar"))[0]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert kinds(tmp_path / "set") & {"manifest", "broken file", "missing file", "count"}


@pytest.mark.parametrize("content", [None, "{", '{"schema": 99}', "[]"])
def test_no_dataset_is_one_sentence(tmp_path, content):
    if content is not None:
        (tmp_path / "dataset.json").write_text(content)
    with pytest.raises(ValueError, match=r"dataset\.json"):
        check_dataset(tmp_path, progress=False)


def test_every_field_is_described_in_the_parquet_schema():
    for field in schema.arrow_schema():
        assert field.metadata[b"description"].decode() == schema.FIELDS[field.name]
    assert replace(WriteConfig(), format="jsonl").format == "jsonl"
