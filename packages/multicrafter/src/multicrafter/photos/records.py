"""Putting together what the stages found into records, and records into splits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from multicrafter.photos.cache import Result
from multicrafter.photos.config import BuildConfig
from multicrafter.photos.identities import split_groups
from multicrafter.photos.scan import printable
from multicrafter.photos.select import Crop, Drop, Photo
from multicrafter.photos.write import Record

MIN_COVERED = 0.5  # a mask that misses the middle of its own face belongs to somebody else


def assemble(
    targets: Sequence[Photo],
    kept: Sequence[Photo],
    crops: Mapping[tuple[str, int], Sequence[Crop]],
    masks: Mapping[str, Result],
    captions: Mapping[str, tuple[str, str]],
    rendered: Mapping[str, Result],
    config: BuildConfig,
) -> tuple[dict[str, list[Record]], list[Drop]]:
    """Records by split, in order of their keys, and what fell out on the way."""
    records, drops = [], []
    for photo in sorted(targets, key=lambda p: p.stem):
        if photo.stem not in masks or photo.stem not in rendered:
            continue  # the stage has logged why
        subjects, lost = _subjects(photo, crops, masks[photo.stem], rendered)
        drops += lost
        if len(subjects) < config.filter.min_people:
            drops.append(Drop(photo.path, "masks", "too few subjects", f"{len(subjects)} have a mask and a reference"))
            continue
        records.append(_record(photo, subjects, captions[photo.stem], rendered[photo.stem]))
    side = split_groups({p.stem: list(p.identities.values()) for p in kept}, config.write.test_fraction)
    splits: dict[str, list[Record]] = {"train": [], "test": []}
    for record in records:
        splits[side[record["key"]]].append(record)
    return splits, drops


def _subjects(
    photo: Photo, crops: Mapping[tuple[str, int], Sequence[Crop]], mask: Result, rendered: Mapping[str, Result]
) -> tuple[list[dict[str, Any]], list[Drop]]:
    scale = rendered[photo.stem]["scale"]
    subjects, drops = [], []
    for bit, face in enumerate(photo.usable):
        references = [
            {**rendered[c.stem]["references"][f"{c.number}{'a' if c.augmented else ''}"], "from_key": c.stem}
            for c in crops[photo.stem, face.number]
            if c.stem in rendered
        ]
        if mask["face_covered"][bit] < MIN_COVERED or mask["share"][bit] == 0:
            drops.append(
                Drop(
                    photo.path,
                    "masks",
                    "mask misses the face",
                    f"covers {mask['face_covered'][bit]:.2f} of it",
                    face.number,
                )
            )
        elif references:
            subjects.append(
                {
                    "identity": photo.identities[face.number],
                    "mask_bit": bit,
                    "face_box": [round(x / scale, 2) for x in face.box],
                    "body_box": [round(x / scale, 2) for x in face.body],
                    "mask_share": mask["share"][bit],
                    "references": references,
                }
            )
    return subjects, drops


def _record(photo: Photo, subjects: list[dict[str, Any]], caption: tuple[str, str], rendered: Result) -> Record:
    return {
        "key": photo.stem,
        "image": f"images/{photo.stem[:2]}/{photo.stem}.jpg",
        "masks": f"masks/{photo.stem[:2]}/{photo.stem}.png",
        "width": rendered["width"],
        "height": rendered["height"],
        "caption": caption[0],
        "caption_source": caption[1],
        "num_subjects": len(subjects),
        "num_faces": len(photo.faces),
        "subjects": subjects,
        "sharpness": round(photo.sharpness, 4),
        "aesthetics": photo.aesthetics,
        "source_file": printable(photo.path),
        "source": photo.note.source,
        "licence": photo.licence,
        "consent": photo.note.consent,
        "minor": photo.note.minor,
    }
