"""The per-photo stages of the pipeline (MultiCrafter, arXiv 2509.21953, Fig. 1), each a function on batches."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from multicrafter.files import write_whole
from multicrafter.photos import captions, counting, masks, people, pictures, quality, references
from multicrafter.photos.cache import Result
from multicrafter.photos.config import ReferenceConfig, WriteConfig
from multicrafter.photos.engines import Job

COPYRIGHT = 0x8298  # EXIF tag


@dataclass(frozen=True)
class Fingerprint:
    """Content hash, perceptual hash, size, sharpness, and the copyright the file itself states."""

    name: str = "fingerprint"

    def settings(self) -> dict[str, Any]:
        """See `engines.BatchFunction`."""
        return {"version": 1}

    def prepare(self) -> None:
        """See `engines.BatchFunction`."""

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """See `engines.BatchFunction`."""
        return [self._one(Path(job.path)) for job in jobs]

    def _one(self, path: Path) -> Result:
        picture = pictures.open_photo(path)
        return {
            "hash": pictures.content_hash(path),
            "phash": pictures.perceptual_hash(picture),
            "width": picture.width,
            "height": picture.height,
            "sharpness": quality.sharpness(picture),
            "copyright": _copyright(path),
        }


def _copyright(path: Path) -> str:
    from PIL import Image

    try:
        with Image.open(path) as picture:
            return " ".join(str(picture.getexif().get(COPYRIGHT, "")).replace("\0", " ").split())[:200]
    except Exception:  # broken EXIF beside a sound picture
        return ""


@dataclass(frozen=True)
class Detect:
    """Faces with embeddings, and a body box for each."""

    faces: str
    bodies: str
    side: int
    name: str = "detect"

    def settings(self) -> dict[str, Any]:
        """See `engines.BatchFunction`."""
        return {"version": 1, "faces": self.faces, "bodies": self.bodies, "side": self.side}

    def prepare(self) -> None:
        """See `engines.BatchFunction`."""
        people.face_backend(self.faces)
        if self.bodies.startswith("detector:"):
            people.body_detector(self.bodies.partition(":")[2])

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """See `engines.BatchFunction`."""
        opened = [pictures.open_photo(job.path) for job in jobs]
        shrunk = [people.shrink(picture, self.side) for picture in opened]
        found = people.face_backend(self.faces).detect_and_embed([p for p, _ in shrunk])
        bodies: list[list[people.Box]] = [[] for _ in jobs]
        if self.bodies.startswith("detector:"):
            bodies = people.body_detector(self.bodies.partition(":")[2])([p for p, _ in shrunk])
        results = []
        for picture, (_, scale), faces, near in zip(opened, shrunk, found, bodies, strict=True):
            size = picture.width, picture.height
            boxes = [people.clip([float(x) * scale for x in box], *size) for box in faces.boxes]
            bodies_of = boxes if self.bodies == "same" else assign(boxes, [[x * scale for x in b] for b in near], *size)
            results.append(
                {
                    "faces": [
                        {
                            "box": _round(box),
                            "body": _round(body),
                            "score": round(float(score), 4),
                            "embedding": people.encode_array(e),
                        }
                        for box, body, score, e in zip(boxes, bodies_of, faces.scores, faces.embeddings, strict=True)
                    ],
                    "bodies": len(near),
                }
            )
        return results


@dataclass(frozen=True)
class Count:
    """Boxes of people by a second means, in pixels of the upright photo; see `counting`."""

    means: str
    side: int
    name: str = "count"

    def settings(self) -> dict[str, Any]:
        """See `engines.BatchFunction`."""
        return {"version": 1, "means": self.means, "side": self.side}

    def prepare(self) -> None:
        """See `engines.BatchFunction`."""
        counting.people_counter(self.means)

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """See `engines.BatchFunction`."""
        count = counting.people_counter(self.means)
        if count is None:
            return [{"boxes": []} for _ in jobs]
        shrunk = [people.shrink(pictures.open_photo(job.path), self.side) for job in jobs]
        found = count([picture for picture, _ in shrunk])
        return [
            {"boxes": [_round([x * scale for x in box]) for box in boxes]}
            for (_, scale), boxes in zip(shrunk, found, strict=True)
        ]


def assign(faces: Sequence[people.Box], bodies: Sequence[Sequence[float]], width: int, height: int) -> list[people.Box]:
    """`people.assign_bodies` with bodies cut at the photo's edge."""
    return people.assign_bodies(faces, [people.clip(b, width, height) for b in bodies], width, height)


def _round(box: Sequence[float]) -> list[float]:
    return [round(float(x), 2) for x in box]


@dataclass(frozen=True)
class Aesthetics:
    """One number per photo."""

    scorer: str
    side: int
    name: str = "aesthetics"

    def settings(self) -> dict[str, Any]:
        """See `engines.BatchFunction`."""
        return {"version": 1, "scorer": self.scorer, "side": self.side}

    def prepare(self) -> None:
        """See `engines.BatchFunction`."""
        quality.aesthetics_scorer(self.scorer)

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """See `engines.BatchFunction`."""
        score = quality.aesthetics_scorer(self.scorer)
        if score is None:
            return [{"aesthetics": None}] * len(jobs)
        shown = [people.shrink(pictures.open_photo(job.path), self.side)[0] for job in jobs]
        prompts = [captions.template(min(8, job.inputs["people"])) for job in jobs]
        values = score(shown, prompts, [()] * len(jobs))
        return [{"aesthetics": round(float(v), 5) if np.isfinite(v) else None} for v in values]


@dataclass(frozen=True)
class Masks:
    """A bit-plane PNG of the subjects, bit i for the i-th face of ``inputs``, at a longer side of ``side``."""

    masker: str
    side: int
    name: str = "masks"

    def settings(self) -> dict[str, Any]:
        """See `engines.BatchFunction`."""
        return {"version": 1, "masker": self.masker, "side": self.side}

    def prepare(self) -> None:
        """See `engines.BatchFunction`."""
        masks.masker(self.masker)

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """See `engines.BatchFunction`."""
        results = []
        for job in jobs:
            picture, scale = people.shrink(pictures.open_photo(job.path), self.side)
            faces, bodies = ([tuple(x / scale for x in box) for box in job.inputs[k]] for k in ("faces", "bodies"))
            found = masks.masker(self.masker)(picture, faces, bodies)
            results.append(
                {
                    "png": base64.b64encode(pictures.pack_masks(list(found))).decode(),
                    "share": [round(float(m.mean()), 5) for m in found],
                    "face_covered": [round(_covered(m, face), 4) for m, face in zip(found, faces, strict=True)],
                }
            )
        return results


def _covered(mask: np.ndarray, face: Sequence[float]) -> float:
    """Share of the face's middle half that the mask holds."""
    left, top, right, bottom = face
    w, h = right - left, bottom - top
    part = mask[
        int(top + h / 4) : max(int(bottom - h / 4), int(top + h / 4) + 1),
        int(left + w / 4) : max(int(right - w / 4), int(left + w / 4) + 1),
    ]
    return float(part.mean()) if part.size else 0.0


@dataclass(frozen=True)
class Captions:
    """A caption by a vision-language model."""

    model: str
    side: int
    name: str = "captions"

    def settings(self) -> dict[str, Any]:
        """See `engines.BatchFunction`."""
        return {"version": 1, "model": self.model, "side": self.side, "prompt": captions.PROMPT}

    def prepare(self) -> None:
        """See `engines.BatchFunction`."""
        captions.captioner(self.model.partition(":")[2])

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """See `engines.BatchFunction`."""
        shown = [people.shrink(pictures.open_photo(job.path), self.side)[0] for job in jobs]
        return [{"caption": text} for text in captions.captioner(self.model.partition(":")[2])(shown)]


@dataclass(frozen=True)
class Render:
    """Writes a photo's files into ``out``: picture (faces that must not be seen pixelated), masks, reference crops."""

    out: str
    write: WriteConfig
    references: ReferenceConfig
    name: str = "render"

    def settings(self) -> dict[str, Any]:
        """See `engines.BatchFunction`."""
        kept = (self.write.max_side, self.write.quality, self.references.scale, self.references.size)
        return {"version": 1, "settings": kept}

    def prepare(self) -> None:
        """See `engines.BatchFunction`."""

    def __call__(self, jobs: Sequence[Job]) -> list[Result]:
        """See `engines.BatchFunction`."""
        return [self._one(job) for job in jobs]

    def _one(self, job: Job) -> Result:
        from PIL import Image

        inputs = job.inputs
        photo = references.pixelate(pictures.open_photo(job.path), inputs["hide"])
        result: Result = {"references": {}, "files": {}}
        if inputs["target"]:
            picture, scale = people.shrink(photo, self.write.max_side)
            planes = pictures.open_planes(base64.b64decode(inputs["masks"])).resize(
                picture.size, Image.Resampling.NEAREST
            )
            buffer = io.BytesIO()
            planes.save(buffer, "PNG", compress_level=6)
            self._save(
                result,
                f"images/{inputs['stem'][:2]}/{inputs['stem']}.jpg",
                pictures.encode_jpeg(picture, self.write.quality),
            )
            self._save(result, f"masks/{inputs['stem'][:2]}/{inputs['stem']}.png", buffer.getvalue())
            result |= {"width": picture.width, "height": picture.height, "scale": scale}
        for crop in inputs["crops"]:
            picture = references.crop(
                photo, crop["box"], crop["others"], scale=self.references.scale, size=self.references.size
            )
            if crop["augmented"]:
                picture = references.augment(picture, seed=int(inputs["stem"][:12], 16) + crop["number"])
            path = f"references/{inputs['stem'][:2]}/{inputs['stem']}_{crop['number']}{'_augmented' if crop['augmented'] else ''}.jpg"
            self._save(result, path, pictures.encode_jpeg(picture, self.write.quality))
            result["references"][f"{crop['number']}{'a' if crop['augmented'] else ''}"] = {
                "image": path, "width": picture.width, "height": picture.height, "augmented": crop["augmented"],
            }  # fmt: skip
        return result

    def _save(self, result: Result, path: str, content: bytes) -> None:
        target = Path(self.out) / path
        write_whole(target, content)
        result["files"][path] = len(content)
