"""The streaming loader: order, resume, workers, ranks, buckets, crops."""

from __future__ import annotations

from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from multicrafter.photos.loader import LoaderConfig, PhotoLoader, aspect_buckets, nearest_bucket, usable_subjects
from multicrafter.photos.samples import Draw, cover, read_sample, reference_at
from multicrafter.photos.store import Store, open_split
from PIL import Image

CONFIG = {"batch": 3, "buckets": ((64, 64),), "reference_size": 32}


def loader(built, **changes) -> PhotoLoader:
    extra = {k: changes.pop(k) for k in ("rank", "world_size", "split") if k in changes}
    return PhotoLoader(built[0], LoaderConfig(**{**CONFIG, **changes}), **extra)


def same(a, b) -> bool:
    return (
        a.keys == b.keys
        and a.identities == b.identities
        and all(torch.equal(x, y) for x, y in zip(a[:4], b[:4], strict=True))
    )


def test_an_epoch_holds_every_record_once_and_the_next_is_another_order(built):
    stream = loader(built, batch=1)
    keys = [b.keys[0] for b in islice(stream, 2 * stream.batches_per_epoch)]
    n = stream.batches_per_epoch
    assert sorted(keys[:n]) == sorted(r["key"] for r in stream.store.records) == sorted(keys[n:])
    assert keys[:n] != keys[n:]


def test_shapes_and_values(built):
    batch = next(iter(loader(built)))
    assert (
        batch.images.shape == (3, 3, 64, 64)
        and batch.masks.shape == (3, 2, 64, 64)
        and batch.references.shape == (3, 2, 3, 32, 32)
    )
    assert batch.present.all()
    assert batch.images.min() >= 0 and batch.images.max() <= 1 and set(batch.masks.unique().tolist()) == {0.0, 1.0}


def test_subjects_masks_and_references_belong_together(built):
    """At the photo's own size nothing is cut: masks and references must be those of the record, in one order."""
    stream = loader(built)
    by_key = {r["key"]: r for r in stream.store.records}
    for batch in islice(stream, 3):
        for i, key in enumerate(batch.keys):
            record = by_key[key]
            planes = np.asarray(stream.store.planes(record["masks"]))
            for j, identity in enumerate(batch.identities[i]):
                subject = next(s for s in record["subjects"] if s["identity"] == identity)
                assert np.array_equal(batch.masks[i, j].numpy(), (planes >> subject["mask_bit"] & 1).astype(np.float32))
                crops = [
                    np.asarray(stream.store.open(r["image"]).resize((32, 32), 3), np.float32).transpose(2, 0, 1) / 255
                    for r in subject["references"]
                ]
                assert min(np.abs(batch.references[i, j].numpy() - c).mean() for c in crops) < 0.02


def test_the_same_seed_gives_the_same_batches_and_another_seed_others(built):
    a, b, c = loader(built), loader(built), loader(built, seed=1)
    first = [list(islice(x, 5)) for x in (a, b, c)]
    assert all(same(x, y) for x, y in zip(first[0], first[1], strict=True))
    assert not all(same(x, y) for x, y in zip(first[0], first[2], strict=True))
    assert [x.keys for x in first[0]] != [x.keys for x in first[2]], "the order too"


@pytest.mark.parametrize("stop", [0, 1, 4, 5, 6, 11])
def test_resume_goes_on_with_the_very_next_batch(built, stop):
    whole = list(islice(loader(built), stop + 4))
    before = loader(built)
    for _ in islice(before, stop):
        pass
    after = loader(built)
    after.load_state_dict(before.state_dict())
    assert all(same(x, y) for x, y in zip(islice(after, 4), whole[stop:], strict=True))


def test_workers_change_nothing_not_even_the_position(built):
    alone, helped = loader(built), loader(built, num_workers=2)
    for a, b in zip(islice(alone, 7), islice(helped, 7), strict=True):
        assert same(a, b)
    assert alone.state_dict() == helped.state_dict()


def test_workers_are_started_once_and_not_every_epoch(built, monkeypatch):
    started = []
    real = torch.utils.data.DataLoader
    monkeypatch.setattr(torch.utils.data, "DataLoader", lambda *a, **k: started.append(1) or real(*a, **k))
    helped = loader(built, num_workers=1)
    for _ in islice(helped, 3 * helped.batches_per_epoch + 1):
        pass
    assert helped.state_dict()["epoch"] == 3 and len(started) == 1


def test_a_state_of_other_data_or_settings_is_refused(built):
    state = loader(built).state_dict()
    for other in ({"batch": 2}, {"seed": 5}, {"augmented": False}, {"world_size": 2, "batch": 2}):
        with pytest.raises(ValueError, match="same records"):
            loader(built, **other).load_state_dict(state)
    with pytest.raises(ValueError, match="position"):
        loader(built).load_state_dict({**state, "position": 10**6})


def test_ranks_share_an_epoch_without_overlap(built):
    parts = [loader(built, rank=r, world_size=2, batch=2) for r in range(2)]
    assert parts[0].batches_per_epoch == parts[1].batches_per_epoch > 0
    keys = [[k for b in islice(p, p.batches_per_epoch) for k in b.keys] for p in parts]
    assert not set(keys[0]) & set(keys[1])


def test_batches_of_mixed_counts_are_padded_and_marked(built, monkeypatch):
    stream = loader(built, mix_counts=True, batch=6)
    for row, (index, subjects) in enumerate(stream.rows):
        stream.rows[row] = (index, subjects[: 1 + row % 2])
    batch = next(iter(stream))
    counts = [len(names) for names in batch.identities]
    assert set(counts) == {1, 2}
    assert batch.present.sum(1).tolist() == counts
    for i, count in enumerate(counts):
        assert batch.masks[i, count:].abs().sum() == 0 and batch.references[i, count:].abs().sum() == 0


def test_the_last_batch_is_kept_or_dropped(built):
    kept, dropped = loader(built, batch=4, drop_last=False), loader(built, batch=4)
    whole = len(kept.store.records)
    assert whole % 4 and dropped.batches_per_epoch == whole // 4
    sizes = [len(b.keys) for b in islice(kept, kept.batches_per_epoch)]
    assert sum(sizes) == whole and sorted(sizes)[0] == whole % 4


def test_numbers_of_subjects_are_kept_apart_unless_mixed(built):
    for mixed in (False, True):
        stream = loader(built, batch=2, mix_counts=mixed)
        stream.rows = [(index, subjects[: 1 + row % 2]) for row, (index, subjects) in enumerate(stream.rows)]
        stream._groups = stream._by_bucket()
        counts = {tuple(len(stream.rows[r][1]) for r in rows) for epoch in range(4) for _, rows in stream.plan(epoch)}
        assert counts == ({(1, 1), (2, 2), (1, 2), (2, 1)} if mixed else {(1, 1), (2, 2)})


def test_records_are_used_whole_or_not_at_all():
    def subject(*augmented):
        return {"references": [{"augmented": a} for a in augmented]}

    record = {"subjects": [subject(False, True), subject(True)]}
    assert usable_subjects(record, LoaderConfig()) == record["subjects"]
    assert usable_subjects(record, LoaderConfig(augmented=False)) == []
    known = {"subjects": [subject(False, True), subject(False)]}
    assert usable_subjects(known, LoaderConfig(augmented=False)) == [subject(False), subject(False)]
    assert usable_subjects(known, LoaderConfig(num_subjects=3)) == []


@pytest.mark.parametrize("bucket", [(64, 32), (32, 64), (48, 48)])
def test_masks_are_cut_as_their_pictures_are(tmp_path, bucket):
    """The subject is red, so its mask must lie where the sample is red, wherever the cut fell."""
    pixels = np.zeros((90, 120, 3), np.uint8)
    planes = np.zeros((90, 120), np.uint8)
    pixels[30:70, 50:85], planes[30:70, 50:85] = (255, 0, 0), 4
    for name, content in (("a.png", pixels), ("m.png", planes), ("r.png", pixels)):
        Image.fromarray(content).save(tmp_path / name)
    subject = {"identity": "x", "mask_bit": 2, "face_box": [55, 32, 75, 50], "references": [{"image": "r.png"}]}
    record = {"key": "k", "image": "a.png", "masks": "m.png", "width": 120, "height": 90, "caption": "c"}
    for epoch in range(5):
        sample = read_sample(Store(tmp_path, {}, [], {}), record, [subject], bucket, Draw(0, epoch, 8, (16, 16)))
        red = sample.image[0] > 0.5
        assert (red == (sample.masks[0] > 0.5)).float().mean() > 0.95 and 0 < red.float().mean() < 0.9


def test_references_of_a_subject_differ_and_everybody_on_a_photo_has_as_many(built):
    """At most three of each; the first epochs show others of those that there are. One of each is what it was."""
    stream = loader(built, batch=1, references_per_subject=3, reference_shapes=((32, 32), (32, 16)), drop_last=False)
    by_key, shapes = {r["key"]: r for r in stream.store.records}, []
    for batch in islice(stream, stream.batches_per_epoch):
        record = by_key[batch.keys[0]]
        own = {s["identity"]: s["references"] for s in record["subjects"]}
        each = min(3, *map(len, own.values()))
        assert batch.references.shape[:2] == (1, 2 * each) and batch.masks.shape[1] == 2
        shapes.append(tuple(batch.references.shape[-2:]))
        for i, identity in enumerate(batch.identities[0]):
            crops = [
                np.asarray(stream.store.open(r["image"]).resize((32, 32), 3), np.float32) / 255 for r in own[identity]
            ]
            crops = [c.transpose(2, 0, 1)[..., 16 - shapes[-1][1] // 2 : 16 + shapes[-1][1] // 2] for c in crops]
            given_ = batch.references[0, i * each : (i + 1) * each].numpy()
            which = [int(np.argmin([np.abs(g - c).mean() for c in crops])) for g in given_]
            assert len(set(which)) == each and all(
                np.abs(g - crops[w]).mean() < 0.06 for g, w in zip(given_, which, strict=True)
            )
    assert abs(shapes.count((32, 32)) - shapes.count((32, 16))) <= len(stream._groups)
    same_as_ever = loader(built, references_per_subject=1, reference_shapes=((32, 32),))
    assert all(same(a, b) for a, b in zip(islice(loader(built), 4), islice(same_as_ever, 4), strict=True))
    with pytest.raises(ValueError, match="records, seed, batch"):
        stream.load_state_dict(loader(built).state_dict())


def test_references_are_cut_in_the_middle_and_not_stretched(tmp_path):
    wide = np.zeros((60, 120, 3), np.uint8)
    wide[:, :40, 0] = wide[:, 40:80, 1] = wide[:, 80:, 2] = 255
    Image.fromarray(wide).save(tmp_path / "wide.png")
    Image.fromarray(wide[:, :61]).save(tmp_path / "nearly.png")
    store = Store(tmp_path, {}, [], {})
    square, high, whole, nearly = (
        reference_at(store, {"image": f"{name}.png"}, size)
        for name, size in (("wide", (60, 60)), ("wide", (60, 20)), ("wide", (30, 60)), ("nearly", (60, 60)))
    )
    assert np.array_equal(square, wide[:, 30:90]) and np.array_equal(high, wide[:, 50:70])
    assert np.array_equal(whole, np.asarray(Image.fromarray(wide).resize((60, 30), 3)))
    assert np.array_equal(nearly, np.asarray(Image.fromarray(wide[:, :61]).resize((60, 60), 3, reducing_gap=2.0)))


def test_max_references_draws_anew_every_epoch(built):
    stream = loader(built, batch=1, max_references=1)
    seen: dict[str, set[str]] = {}
    for batch in islice(stream, 8 * stream.batches_per_epoch):
        assert batch.references.shape[1] == 1
        seen.setdefault(batch.keys[0], set()).update(batch.identities[0])
    assert sum(len(names) == 2 for names in seen.values()) > 0.8 * len(seen)


def test_without_augmented_references_lonely_people_fall_out(built):
    everyone, known = loader(built, batch=1), loader(built, batch=1, augmented=False)
    lonely = [r["key"] for r in everyone.store.records if any(s["references"][0]["augmented"] for s in r["subjects"])]
    assert {r[0] for r in known.rows} == {i for i, r in enumerate(everyone.store.records) if r["key"] not in lonely}


def test_what_cannot_be_loaded_is_one_sentence(built, tmp_path):
    for changes, words in (
        ({"num_subjects": 7}, "7 subjects"),
        ({"batch": 10**6}, "smaller batch"),
        ({"rank": 2, "world_size": 2}, "rank"),
        ({"split": "validation"}, "split"),
        ({"batch": 0}, "batch"),
        ({"buckets": ()}, "buckets"),
        ({"num_workers": -1}, "num_workers"),
    ):
        with pytest.raises(ValueError, match=words):
            loader(built, **changes)
    with pytest.raises(ValueError, match=r"dataset\.json"):
        PhotoLoader(tmp_path, LoaderConfig())


def test_a_file_lost_on_the_way_is_named(built):
    stream = loader(built)
    stream.store.records[0]["image"] = "images/gone.jpg"
    with pytest.raises(ValueError, match=r"images/gone\.jpg"):
        for _ in islice(stream, stream.batches_per_epoch):
            pass
    assert open_split(built[0]).records[0]["image"] != "images/gone.jpg"


def test_buckets():
    for height, width in aspect_buckets(512 * 512):
        assert height % 16 == width % 16 == 0
        assert 0.85 < height * width / 512**2 < 1.15
    buckets = ((64, 64), (48, 96), (96, 48))
    assert nearest_bucket(100, 100, buckets) == (64, 64)
    assert nearest_bucket(300, 100, buckets) == (48, 96)
    assert nearest_bucket(100, 160, buckets) == (96, 48)
    with pytest.raises(ValueError, match="pixels"):
        aspect_buckets(10)


SIDE = st.integers(20, 2000)


@settings(deadline=None, max_examples=200)
@given(SIDE, SIDE, SIDE, SIDE, st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_the_part_shown_has_the_aspect_lies_inside_and_keeps_the_faces_where_it_can(width, height, h, w, seed, count):
    random = np.random.default_rng(seed)
    corners = random.random((count, 2)) * [width * 0.9, height * 0.9]
    faces = [(x, y, x + 0.1 * width, y + 0.1 * height) for x, y in corners]
    left, top, right, bottom = cover(width, height, (h, w), faces, random)
    assert left >= -1e-6 and top >= -1e-6 and right <= width + 1e-6 and bottom <= height + 1e-6
    assert (right - left) / (bottom - top) == pytest.approx(w / h, rel=1e-6)
    assert right - left == pytest.approx(width) or bottom - top == pytest.approx(height)
    for low, high, start, stop, whole in ((0, 2, left, right, width), (1, 3, top, bottom, height)):
        spread = max(f[high] for f in faces) - min(f[low] for f in faces)
        if spread <= stop - start and max(f[high] for f in faces) <= whole:
            assert all(start - 1e-6 <= f[low] and f[high] <= stop + 1e-6 for f in faces)
