"""Which photos, faces and references are used: pure decisions, each with a reason that goes into the log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from multicrafter.photos.config import FilterConfig, PrivacyConfig, ReferenceConfig
from multicrafter.photos.people import Box, Face, inside
from multicrafter.photos.scan import PhotoNote


class Drop(NamedTuple):
    """What was left out, where, and why; ``face`` is its number on the photo if only a face was."""

    path: str
    stage: str
    reason: str
    detail: str = ""
    face: int | None = None


@dataclass
class Photo:
    """A photo on its way through the pipeline; faces in pixels of the upright photo."""

    path: str
    stem: str
    width: int
    height: int
    phash: int
    sharpness: float
    note: PhotoNote
    licence: str
    faces: list[Face] = field(default_factory=list)
    usable: list[Face] = field(default_factory=list)
    hidden: list[Box] = field(default_factory=list)
    aesthetics: float | None = None
    identities: dict[int, str] = field(default_factory=dict)


def forbidden(consent: str, minor: str, privacy: PrivacyConfig) -> str | None:
    """Why a photo or person may not be used, or None."""
    if consent == "no":
        return "consent refused"
    if privacy.require_consent and consent != "yes":
        return "no consent"
    if privacy.minors != "keep" and minor == "yes":
        return "minor"
    if privacy.minors == "drop_unknown" and minor != "no":
        return "may be a minor"
    return None


def drop_photo(photo: Photo, filters: FilterConfig) -> tuple[str, str] | None:
    """Reason and detail if size or sharpness are not enough."""
    if min(photo.width, photo.height) < filters.min_side:
        return "too small", f"{photo.width}x{photo.height}, shorter side below {filters.min_side}"
    if photo.sharpness < filters.min_sharpness:
        return "blurred", f"sharpness {photo.sharpness:.2f} below {filters.min_sharpness}"
    return None


def face_fault(face: Face, photo: Photo, filters: FilterConfig) -> tuple[str, str] | None:
    """Reason and detail if a face cannot be a subject."""
    side = min(face.box[2] - face.box[0], face.box[3] - face.box[1])
    least = max(filters.min_face_pixels, filters.min_face * min(photo.width, photo.height))
    if side < least:
        return "face too small", f"{side:.0f} pixels, below {least:.0f}"
    if face.score < filters.min_face_score:
        return "face uncertain", f"score {face.score:.2f} below {filters.min_face_score}"
    return None


def person_note(face: Face, note: PhotoNote) -> tuple[str, str]:
    """Consent and minor of a face: of the person whose noted box holds most of it (at least half), else of the photo."""
    best = max(note.people, key=lambda p: max(inside(face.box, p.box), inside(p.box, face.box)), default=None)
    if best is None or max(inside(face.box, best.box), inside(best.box, face.box)) < 0.5:
        return note.consent, note.minor
    return (
        best.consent if best.consent != "unknown" else note.consent,
        best.minor if best.minor != "unknown" else note.minor,
    )


def sort_faces(photo: Photo, filters: FilterConfig, privacy: PrivacyConfig) -> list[Drop]:
    """Fills ``usable`` and ``hidden``; a noted person who may not be seen is hidden even where no face was found."""
    drops = []
    for face in photo.faces:
        reason = forbidden(*person_note(face, photo.note), privacy)
        if reason is not None:
            photo.hidden.append(face.box)
            drops.append(Drop(photo.path, "privacy", reason, "face pixelated", face.number))
        elif (fault := face_fault(face, photo, filters)) is not None:
            drops.append(Drop(photo.path, "filter", *fault, face.number))
        else:
            photo.usable.append(face)
    for person in photo.note.people:
        consent = person.consent if person.consent != "unknown" else photo.note.consent
        minor = person.minor if person.minor != "unknown" else photo.note.minor
        reason = forbidden(consent, minor, privacy)
        if reason is not None and not any(
            inside(h, person.box) >= 0.5 or inside(person.box, h) >= 0.5 for h in photo.hidden
        ):
            photo.hidden.append(person.box)
            drops.append(Drop(photo.path, "privacy", reason, "noted box pixelated, no face was found in it"))
    return drops


def duplicates(
    order: Sequence[Photo], owner: Sequence[int], banned: Mapping[str, str]
) -> tuple[list[Photo], list[Drop]]:
    """Keeps the first photo of each group of duplicates; none if one of them is banned: a copy of a withdrawn photo is withdrawn."""
    reason_of: dict[int, tuple[str, str]] = {}
    for photo, first in zip(order, owner, strict=True):
        if photo.path in banned:
            reason_of.setdefault(int(first), (banned[photo.path], photo.path))
    kept, drops = [], []
    for index, (photo, first) in enumerate(zip(order, owner, strict=True)):
        if photo.path in banned:
            drops.append(Drop(photo.path, "privacy", banned[photo.path]))
        elif int(first) in reason_of:
            reason, other = reason_of[int(first)]
            drops.append(Drop(photo.path, "privacy", reason, f"a copy of {other}"))
        elif int(first) != index:
            same = photo.stem == order[int(first)].stem
            drops.append(
                Drop(
                    photo.path, "duplicates", "duplicate" if same else "near-duplicate", f"of {order[int(first)].path}"
                )
            )
        else:
            kept.append(photo)
    return kept, drops


class Crop(NamedTuple):
    """A reference crop to make: a face of a photo, as it is or augmented."""

    stem: str
    number: int
    augmented: bool


def choose_references(photos: Sequence[Photo], config: ReferenceConfig) -> dict[tuple[str, int], list[Crop]]:
    """Crops for each usable face (stem, number): the person's largest faces on other photos, or an augmented crop of this one."""
    faces_of: dict[str, list[tuple[float, str, int]]] = {}
    for photo in photos:
        for face in photo.usable:
            area = (face.box[2] - face.box[0]) * (face.box[3] - face.box[1])
            faces_of.setdefault(photo.identities[face.number], []).append((-area, photo.stem, face.number))
    chosen = {}
    for faces in faces_of.values():
        faces.sort()
        for _, stem, index in faces:
            crops = [Crop(s, i, False) for _, s, i in faces if s != stem][: config.per_subject]
            if not crops and config.augment:
                crops = [Crop(stem, index, True)]
            chosen[stem, index] = crops
    return chosen


def name_identities(faces: Sequence[tuple[str, int]], labels: Sequence[int]) -> dict[tuple[str, int], str]:
    """A name for every face's identity, made of the group's smallest face: the same from build to build."""
    from multicrafter.files import content_digest

    smallest: dict[int, tuple[str, int]] = {}
    for face, label in sorted(zip(faces, np.asarray(labels).tolist(), strict=True)):
        smallest.setdefault(label, face)
    return {
        face: f"id_{content_digest(smallest[label])[:12]}"
        for face, label in zip(faces, np.asarray(labels).tolist(), strict=True)
    }


def summary_counts(drops: Sequence[Drop]) -> dict[str, int]:
    """How often each "stage: reason" occurs."""
    counts: dict[str, Any] = {}
    for drop in drops:
        name = f"{drop.stage}: {drop.reason}"
        counts[name] = counts.get(name, 0) + 1
    return dict(sorted(counts.items()))
