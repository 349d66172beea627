"""The validator: everything that would break a training run or mix train and test, each as one line."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from id_reward.images import open_image
from tqdm import tqdm

from multicrafter.photos import schema
from multicrafter.photos.config import MAX_SUBJECTS
from multicrafter.photos.pictures import open_planes
from multicrafter.photos.store import Store, open_split
from multicrafter.photos.write import Record, record_files

if TYPE_CHECKING:
    from PIL import Image


class Problem(NamedTuple):
    """What is wrong with a record, or with the dataset (``key`` is then empty)."""

    kind: str
    key: str
    detail: str

    def __str__(self) -> str:
        return f"{self.kind}: {self.detail}" + (f" (record {self.key})" if self.key else "")


def check_dataset(folder: str | Path, *, progress: bool = True) -> list[Problem]:
    """All problems of a dataset; an empty list if there is none.

    Found: fields missing or of a wrong type, files missing, broken or of another size than stated, masks of another size than their
    picture or without a pixel, boxes outside, paths that leave the folder, keys twice, identities or photos in both train and test.

    Raises:
        ValueError: The folder is no dataset at all.
    """
    folder = Path(folder)
    about = schema.read_dataset_json(folder)
    problems: list[Problem] = []
    stores: dict[str, Store] = {}
    for split in schema.SPLITS:
        try:
            stores[split] = open_split(folder, split)
        except ValueError as error:
            problems.append(Problem("manifest", "", str(error)))
            continue
        stated = about.get("splits", {}).get(split, 0)
        if len(stores[split].records) != stated:
            problems.append(
                Problem("count", "", f"{split} must have {stated} records, got {len(stores[split].records)}")
            )
    seen: set[str] = set()
    for split, store in stores.items():
        for record in tqdm(store.records, desc=f"check {split}", unit="record", disable=not progress, mininterval=0.5):
            faults = list(check_fields(record))
            problems += faults
            if faults:
                continue
            if record["key"] in seen:
                problems.append(Problem("key", record["key"], "must be there once, but it is there again"))
            seen.add(record["key"])
            problems += check_files(record, store)
    return problems + list(check_splits(stores))


def check_fields(record: Mapping[str, Any]) -> Iterator[Problem]:
    """Names, types and ranges of one record."""
    key = str(record.get("key", "?"))
    whole = {"width", "height", "num_subjects", "num_faces"}
    real = {"sharpness", "aesthetics"}
    for name in schema.FIELDS:
        if name not in record:
            yield Problem("field", key, f"{name} is missing")
            return
        kind: Any = (
            int if name in whole else (int, float, type(None)) if name in real else list if name == "subjects" else str
        )
        if not isinstance(record[name], kind):
            yield Problem("field", key, f"{name} must be {getattr(kind, '__name__', 'a number')}, got {record[name]!r}")
            return
    subjects = record["subjects"]
    if not 1 <= len(subjects) <= MAX_SUBJECTS or len(subjects) != record["num_subjects"]:
        yield Problem(
            "field",
            key,
            f"num_subjects is {record['num_subjects']}, but subjects holds {len(subjects)} (1 to {MAX_SUBJECTS})",
        )
    for subject in subjects:
        missing = [n for n in schema.SUBJECT if not isinstance(subject, Mapping) or subject.get(n) is None]
        if missing:
            yield Problem("field", key, f"a subject lacks {', '.join(missing)}")
            return
        if not 0 <= subject["mask_bit"] < MAX_SUBJECTS:
            yield Problem("field", key, f"mask_bit must be in 0 to {MAX_SUBJECTS - 1}, got {subject['mask_bit']}")
        if not subject["references"]:
            yield Problem("reference", key, f"{subject['identity']} has no reference")
        for name in ("face_box", "body_box"):
            left, top, right, bottom = subject[name]
            if not (-1 <= left < right <= record["width"] + 1 and -1 <= top < bottom <= record["height"] + 1):
                yield Problem(
                    "box",
                    key,
                    f"{name} {subject[name]} must lie in the picture of {record['width']}x{record['height']}",
                )
        for reference in subject["references"]:
            if any(reference.get(n) is None for n in schema.REFERENCE):
                yield Problem("field", key, f"a reference of {subject['identity']} lacks a field")
                return
    if len({s["mask_bit"] for s in subjects}) != len(subjects) or len({s["identity"] for s in subjects}) != len(
        subjects
    ):
        yield Problem("field", key, "subjects must differ in mask_bit and identity")


def check_files(record: Record, store: Store) -> Iterator[Problem]:
    """Files of one record: there, inside the folder, readable, of the size stated; masks with pixels."""
    key = record["key"]
    opened: dict[str, Image.Image] = {}
    for name in dict.fromkeys(record_files(record)):
        try:
            content = store.read(name)
        except ValueError as error:
            kind = "path" if "inside the dataset" in str(error) else "missing file"
            yield Problem(kind, key, str(error))
            continue
        try:
            opened[name] = open_planes(content) if name == record["masks"] else open_image(io.BytesIO(content))
        except Exception as error:
            yield Problem("broken file", key, f"{name} cannot be read ({type(error).__name__}: {error})")
    size = (record["width"], record["height"])
    if (image := opened.get(record["image"])) is not None and image.size != size:
        yield Problem("size", key, f"{record['image']} is {image.width}x{image.height}, stated {size[0]}x{size[1]}")
    if (planes := opened.get(record["masks"])) is not None:
        if planes.size != size or planes.mode != "L":
            yield Problem(
                "mask size",
                key,
                f"{record['masks']} must be {size[0]}x{size[1]} grey, got {planes.width}x{planes.height} {planes.mode}",
            )
        else:
            values = np.asarray(planes)
            for subject in record["subjects"]:
                if not (values >> subject["mask_bit"] & 1).any():
                    yield Problem("empty mask", key, f"bit {subject['mask_bit']} of {record['masks']} has no pixel")
    for subject in record["subjects"]:
        for reference in subject["references"]:
            crop = opened.get(reference["image"])
            stated = (reference["width"], reference["height"])
            box = reference.get("strip_box")
            if crop is None:
                continue
            got = (box[2] - box[0], box[3] - box[1]) if box else crop.size
            if got != stated or (
                box and not (0 <= box[0] < box[2] <= crop.width and 0 <= box[1] < box[3] <= crop.height)
            ):
                yield Problem("size", key, f"{reference['image']} is {got[0]}x{got[1]}, stated {stated[0]}x{stated[1]}")


def check_splits(stores: Mapping[str, Store]) -> Iterator[Problem]:
    """Nobody, and no photo, is in both train and test: neither as subject nor as reference."""
    people: dict[str, set[str]] = {}
    photos: dict[str, set[str]] = {}
    for split, store in stores.items():
        subjects = [
            (r, s)
            for r in store.records
            if isinstance(r.get("subjects"), list)
            for s in r["subjects"]
            if isinstance(s, Mapping)
        ]
        people[split] = {str(s.get("identity")) for _, s in subjects}
        photos[split] = {str(r.get("key")) for r, _ in subjects} | {
            str(x.get("from_key")) for _, s in subjects for x in s.get("references") or ()
        }
    if set(people) == {"train", "test"}:
        for identity in sorted(people["train"] & people["test"]):
            yield Problem("leak", "", f"identity {identity} is in both train and test")
        for key in sorted(photos["train"] & photos["test"]):
            yield Problem("leak", "", f"photo {key} is used in both train and test")
