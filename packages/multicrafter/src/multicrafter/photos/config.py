"""What a build does: one frozen dataclass per concern, each checked when it is made."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from multicrafter import UserError
from multicrafter.models.checks import check_finite

MAX_SUBJECTS = 8  # a mask file holds one bit per subject

Minors = Literal["keep", "drop", "drop_unknown"]
Strangers = Literal["drop", "keep"]
Format = Literal["parquet", "jsonl", "webdataset"]


def _at_least(owner: object, low: float, *names: str) -> None:
    for name in names:
        if getattr(owner, name) < low:
            raise UserError(f"{name} must be at least {low}, got {getattr(owner, name)}")


def _fraction(owner: object, *names: str) -> None:
    for name in names:
        if not 0 <= getattr(owner, name) <= 1:
            raise UserError(f"{name} must be in [0, 1], got {getattr(owner, name)}")


def _one_of(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise UserError(f"{name} must be one of {', '.join(allowed)}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Which photos and faces are good enough.

    Attributes:
        min_side: Shorter side of a photo in pixels.
        min_sharpness: See `quality.sharpness`; 0 keeps every photo.
        min_aesthetics: Of the chosen scorer; None keeps every photo.
        min_people, max_people: Usable faces of a target; a photo with fewer still lends references.
        min_face: Shorter side of a face box, as a share of the photo's shorter side.
        min_face_pixels: Shorter side of a face box in pixels.
        min_face_score: Confidence of the face detector.
        duplicate_distance: Photos whose perceptual hashes differ in at most this many of 64 bits are one photo; -1 keeps all.
        strangers: "drop" makes no target of a photo that shows somebody without a mask (see ``count`` of `BuildConfig`): training would
            teach strangers; "keep" does.
    """

    min_side: int = 256
    min_sharpness: float = 0.0
    min_aesthetics: float | None = None
    min_people: int = 1
    max_people: int = 6
    min_face: float = 0.0
    min_face_pixels: int = 32
    min_face_score: float = 0.0
    duplicate_distance: int = 4
    strangers: Strangers = "drop"

    def __post_init__(self) -> None:
        check_finite(self)
        _at_least(self, 1, "min_side", "min_people", "min_face_pixels")
        _at_least(self, 0, "min_sharpness")
        _at_least(self, -1, "duplicate_distance")
        _fraction(self, "min_face", "min_face_score")
        if not self.min_people <= self.max_people <= MAX_SUBJECTS:
            raise UserError(
                f"max_people must be in [min_people, {MAX_SUBJECTS}], got {self.max_people} with min_people {self.min_people}"
            )
        if self.duplicate_distance > 16:
            raise UserError(f"duplicate_distance must be at most 16 of 64 bits, got {self.duplicate_distance}")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig:
    """Whose faces may be used. A photo or person marked ``consent: no`` never is.

    Attributes:
        require_consent: Use only photos and people marked ``consent: yes``.
        minors: "drop" leaves out those marked as minors, "drop_unknown" also those of whom it is not said.
    """

    require_consent: bool = False
    minors: Minors = "drop"

    def __post_init__(self) -> None:
        check_finite(self)


@dataclass(frozen=True, kw_only=True)
class ReferenceConfig:
    """References of a subject.

    Attributes:
        threshold: Two faces at least this similar (cosine, group averages) are one person; None takes the backend's own.
        per_subject: References of a subject from other photos, at most.
        augment: Where a person is on one photo only, use an altered crop of it, marked ``augmented``; False drops the subject.
        scale: Side of a reference crop over the longer side of the face box.
        size: Side of a stored reference in pixels, at most (paper: 320).
    """

    threshold: float | None = None
    per_subject: int = 4
    augment: bool = True
    scale: float = 2.2
    size: int = 320

    def __post_init__(self) -> None:
        check_finite(self)
        _at_least(self, 1, "per_subject", "scale")
        _at_least(self, 16, "size")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise UserError(f"threshold must be a cosine in [-1, 1], got {self.threshold}")


@dataclass(frozen=True, kw_only=True)
class WriteConfig:
    """What is written.

    Attributes:
        format: Manifest in Parquet or JSON lines beside picture files, or WebDataset shards.
        max_side: Longer side of a written picture in pixels, at most.
        quality: Of the JPEGs.
        test_fraction: Share of the groups of people kept for testing; no identity is on both sides.
        shard_size: Records of a Parquet file or shard.
    """

    format: Format = "parquet"
    max_side: int = 1024
    quality: int = 93
    test_fraction: float = 0.05
    shard_size: int = 10_000

    def __post_init__(self) -> None:
        check_finite(self)
        _at_least(self, 32, "max_side")
        _at_least(self, 1, "shard_size")
        _fraction(self, "test_fraction")
        if not 1 <= self.quality <= 100:
            raise UserError(f"quality must be in [1, 100], got {self.quality}")


@dataclass(frozen=True, kw_only=True)
class BuildConfig:
    """A build. Backends are named ``NAME`` or ``NAME:PATH``, PATH being a local model folder or file.

    Attributes:
        faces: "tiny" (drawn people), "dlib_cnn" (slower than "dlib", misses fewer profiles) or a name of `id_reward.get_face_backend`.
        people: "faces" (body boxes guessed from face boxes), "same" (the backend's boxes are whole bodies already) or "detector:PATH" (a
            transformers object detector).
        count: The second means by which people are counted: "auto" (another detector than ``faces``), "dlib_cnn", "dlib", "detector:PATH"
            or "none". Faces and noted people are counted anyway.
        masks: "boxes", "selfie:PATH" (tflite), "semantic:PATH" (transformers) or "sam2:PATH".
        captions: "template" or "vlm:PATH" (a transformers image-text-to-text model).
        aesthetics: "closed_form", "hps:PATH" or "none".
        detect_side: Photos are shown to detectors with a longer side of at most this many pixels.
        batch: Photos a batch.
        licence, consent: Of photos whose metadata does not say.
    """

    faces: str = "dlib"
    people: str = "faces"
    count: str = "auto"
    masks: str = "boxes"
    captions: str = "template"
    aesthetics: str = "closed_form"
    detect_side: int = 1280
    batch: int = 16
    licence: str = "unknown"
    consent: str = "unknown"
    filter: FilterConfig = field(default_factory=FilterConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    references: ReferenceConfig = field(default_factory=ReferenceConfig)
    write: WriteConfig = field(default_factory=WriteConfig)

    def __post_init__(self) -> None:
        check_finite(self)
        _at_least(self, 1, "batch")
        _at_least(self, 32, "detect_side")
        _one_of("consent", self.consent, ("yes", "no", "unknown"))
        for name, allowed in BACKENDS.items():
            kind, _, path = getattr(self, name).partition(":")
            _one_of(name, kind, tuple(allowed))
            if allowed[kind] and not path:
                raise UserError(
                    f"{name} {kind!r} needs a model: write {name} as {kind}:PATH, got {getattr(self, name)!r}"
                )

    @property
    def means(self) -> str:
        """``count``, resolved."""
        return resolve(self.count, self.faces)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, as saved in dataset.json."""
        return asdict(self)


BACKENDS: Mapping[str, Mapping[str, bool]] = {  # kind -> whether it needs a path
    "people": {"faces": False, "same": False, "detector": True},
    "count": {"auto": False, "dlib_cnn": False, "dlib": False, "detector": True, "none": False},
    "masks": {"boxes": False, "selfie": True, "semantic": True, "sam2": True},
    "captions": {"template": False, "vlm": True},
    "aesthetics": {"closed_form": False, "hps": True, "none": False},
}


def resolve(name: str, faces: str) -> str:
    """The second means where nobody chose one: another detector than the first.

    >>> resolve("auto", "dlib"), resolve("auto", "dlib_cnn"), resolve("auto", "tiny"), resolve("none", "dlib")
    ('dlib_cnn', 'dlib', 'none', 'none')
    """
    if name != "auto":
        return name
    return {"tiny": "none", "dlib_cnn": "dlib"}.get(faces, "dlib_cnn")
