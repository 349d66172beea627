"""One build, step by step: every per-photo stage goes through the cache, every decision leaves its reasons."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from multicrafter import UserError, renamed
from multicrafter.files import content_digest
from multicrafter.photos import captions, counting, identities, people, pictures, select, stages
from multicrafter.photos.cache import Cache, Result
from multicrafter.photos.config import BuildConfig
from multicrafter.photos.engines import BatchFunction, Engine, Job
from multicrafter.photos.notes import PhotoNote, is_metadata, match_notes, read_notes
from multicrafter.photos.scan import Found, Skipped, printable, walk
from multicrafter.photos.select import Crop, Drop, Photo

renamed(__name__, {"Run": "BuildRun"})


@dataclass
class BuildRun:
    """One build: folders, cache, engine, and what was learned so far."""

    photos: Path
    out: Path
    config: BuildConfig
    engine: Engine
    cache: Cache
    progress: bool
    drops: list[Drop] = field(default_factory=list)
    timing: dict[str, dict[str, float]] = field(default_factory=dict)
    used: dict[str, set[str]] = field(default_factory=dict)

    def stage(self, stage: BatchFunction, jobs: Sequence[Job], *, upstream: str = "") -> tuple[dict[str, Result], str]:
        """Results by key, computed where the cache has none; failures are dropped and not cached. Also the stage's fingerprint."""
        name = f"{stage.name}:{content_digest([stage.settings(), upstream])}"
        known = self.cache.known(name)
        todo = [job for job in {j.key: j for j in jobs}.values() if job.key not in known]
        started, failed, done = time.perf_counter(), 0, 0
        batches = [todo[i : i + self.config.batch] for i in range(0, len(todo), self.config.batch)]
        with self.bar(stage.name, total=len(todo)) as bar:
            for batch, results in self.engine.run(stage, batches) if batches else ():
                good = {job.key: r for job, r in zip(batch, results, strict=True) if "error" not in r}
                self.cache.put(name, good)
                for job, result in zip(batch, results, strict=True):
                    if "error" in result:
                        failed += 1
                        reason = "unreadable" if stage.name == "fingerprint" else "failed"
                        self.drop(str(Path(job.path).relative_to(self.photos)), stage.name, reason, result["error"])
                done += len(batch)
                bar.update(len(batch))
        self.timed(stage.name, started, len(jobs), done, failed)
        keys = [job.key for job in jobs]
        self.used[name] = set(keys)
        return dict(self.cache.items(name, keys)), name

    def drop(self, path: str, stage: str, reason: str, detail: str = "", face: int | None = None) -> None:
        """Logs that something is left out."""
        self.drops.append(Drop(path, stage, reason, detail, face))

    def timed(self, stage: str, started: float, photos: int, computed: int, failed: int = 0) -> None:
        """Notes what a stage did since ``started``."""
        seconds = round(time.perf_counter() - started, 3)
        self.timing[stage] = {"photos": photos, "computed": computed, "failed": failed, "seconds": seconds}

    def bar(
        self, name: str, items: Iterable[Any] | None = None, total: int | None = None, unit: str = "photo"
    ) -> tqdm[Any]:
        """A progress bar on stderr."""
        hidden = not self.progress or total == 0
        return tqdm(items, total=total, desc=name, unit=unit, disable=hidden, mininterval=0.5, file=sys.stderr)

    def where(self, photo: Photo) -> str:
        """Path of a photo."""
        return str(self.photos / photo.path)

    # -- the steps, in order

    def scan(self) -> list[Photo]:
        """Photos that can be opened, with what the metadata says about them."""
        notes = read_notes(self.photos, licence=self.config.licence, consent=self.config.consent)
        plain = PhotoNote(licence=self.config.licence, consent=self.config.consent)
        found, others = [], []
        started = time.perf_counter()
        for item in self.bar("scan", walk(self.photos), unit="file"):
            if isinstance(item, Skipped):
                if is_metadata(os.path.basename(item.path)):
                    raise UserError(
                        f"metadata must lie in the folder itself, but {self.photos / item.path} is in one below it"
                    )
                others.append(item.path)
                self.drop(item.path, "scan", item.reason, item.detail)
            else:
                found.append(item)
        self.timed("scan", started, len(found), len(found))
        note_of, unused = match_notes(notes, [item.path for item in found], others, root=self.photos)
        for name in sorted(unused):
            self.drop(name, "scan", "noted but missing", "the metadata names a photo that is not there")
        results, _ = self.stage(stages.Fingerprint(), [Job(i.key, str(self.photos / i.path), {}) for i in found])
        return [
            self._photo(item, results[item.key], note_of.get(item.path, plain)) for item in found if item.key in results
        ]

    def _photo(self, item: Found, result: Result, note: PhotoNote) -> Photo:
        licence = note.licence if note.licence != "unknown" else result["copyright"] or "unknown"
        return Photo(
            path=item.path, stem=result["hash"], width=result["width"], height=result["height"],
            phash=result["phash"], sharpness=result["sharpness"], note=note, licence=licence,
        )  # fmt: skip

    def first_of_each(self, photos: list[Photo]) -> list[Photo]:
        """Largest first, then by path: the copy that is kept."""
        privacy = self.config.privacy
        order = sorted(photos, key=lambda p: (-p.width * p.height, printable(p.path)))
        hashes = np.array([p.phash for p in order], np.uint64)
        owner = pictures.near_duplicates(hashes, self.config.filter.duplicate_distance)
        if self.config.filter.duplicate_distance < 0:  # copies byte for byte share every file name
            first: dict[str, int] = {}
            owner = np.array([first.setdefault(p.stem, i) for i, p in enumerate(order)], np.int64)
        banned = {
            p.path: reason
            for p in order
            if (reason := select.forbidden(p.note.consent, p.note.minor, privacy)) and not _by_person(p)
        }
        kept, drops = select.duplicates(order, owner.tolist(), banned)
        self.drops += drops
        result = []
        for photo in kept:
            fault = select.drop_photo(photo, self.config.filter)
            if fault is None:
                result.append(photo)
            else:
                self.drop(photo.path, "filter", *fault)
        return result

    def detect(self, photos: list[Photo]) -> tuple[list[Photo], str]:
        """Photos with a usable face and not too many; and the fingerprint of the detection."""
        config = self.config
        stage = stages.Detect(config.faces, config.people, config.detect_side)
        results, name = self.stage(stage, [Job(p.stem, self.where(p), {}) for p in photos])
        kept = []
        for photo in (p for p in photos if p.stem in results):
            photo.faces = people.read_faces(results[photo.stem])
            self.drops += select.sort_faces(photo, config.filter, config.privacy)
            if not photo.usable:
                self.drop(photo.path, "filter", "no usable face", f"{len(photo.faces)} found")
            elif len(photo.usable) > (most := config.filter.max_people):
                self.drop(photo.path, "filter", "too many people", f"{len(photo.usable)}, more than {most}")
            else:
                kept.append(photo)
        return kept, name

    def rate(self, photos: list[Photo]) -> list[Photo]:
        """Photos that are beautiful enough."""
        least = self.config.filter.min_aesthetics
        if self.config.aesthetics == "none":
            if least is not None:
                raise UserError("min_aesthetics needs a scorer, but aesthetics is 'none'")
            return photos
        stage = stages.Aesthetics(self.config.aesthetics, self.config.detect_side)
        jobs = [Job(f"{p.stem}.{len(p.usable)}", self.where(p), {"people": len(p.usable)}) for p in photos]
        results, _ = self.stage(stage, jobs)
        kept = []
        for photo, job in zip(photos, jobs, strict=True):
            if job.key not in results:
                continue
            photo.aesthetics = results[job.key]["aesthetics"]
            if least is not None and (photo.aesthetics is None or photo.aesthetics < least):
                self.drop(photo.path, "filter", "not aesthetic", f"{photo.aesthetics} below {least}")
            else:
                kept.append(photo)
        return kept

    def group(self, photos: list[Photo]) -> None:
        """Names the person of every usable face."""
        started = time.perf_counter()
        faces = [(photo.stem, face.number) for photo in photos for face in photo.usable]
        threshold = self.config.references.threshold
        threshold = people.identity_threshold(self.config.faces) if threshold is None else threshold
        if faces:
            embeddings = np.stack([face.embedding for photo in photos for face in photo.usable])
            numbers = [i for i, photo in enumerate(photos) for _ in photo.usable]
            labels = identities.group_identities(embeddings, numbers, threshold)
            names = select.name_identities(faces, labels.tolist())
            for photo in photos:
                photo.identities = {f.number: names[photo.stem, f.number] for f in photo.usable}
        self.timed("group", started, len(photos), len(faces))

    def targets(self, photos: list[Photo], crops: dict[tuple[str, int], list[Crop]]) -> list[Photo]:
        """Photos with enough people who have a reference; the others only lend references."""
        least, kept = self.config.filter.min_people, []
        for photo in photos:
            with_reference = [f for f in photo.usable if crops[photo.stem, f.number]]
            for face in photo.usable:
                if not crops[photo.stem, face.number]:
                    self.drop(photo.path, "group", "no reference", "the person is on no other photo", face.number)
            if len(with_reference) >= least:
                kept.append(photo)
            else:
                few = f"{len(with_reference)} subjects, fewer than {least}"
                self.drop(photo.path, "group", "lends references only", few)
        return kept

    def without_strangers(self, targets: list[Photo]) -> list[Photo]:
        """Photos on which everybody has a mask or is hidden; the others only lend references."""
        if self.config.filter.strangers == "keep" or not targets:
            return targets
        stage = stages.Count(self.config.means, self.config.detect_side)
        results, _ = self.stage(stage, [Job(p.stem, self.where(p), {}) for p in targets])
        kept = []
        for photo in (p for p in targets if p.stem in results):
            shown = [f.box for f in photo.usable]
            known = [*shown, *photo.hidden]
            faces = [f.box for f in photo.faces if f.box not in known]  # found, but too small or too uncertain
            noted = [p.box for p in photo.note.people]
            counted = [tuple(box) for box in results[photo.stem]["boxes"]]
            alone = max(
                (counting.strangers(means, known) for means in (faces, noted, counted)),  # type: ignore[arg-type]
                key=len,
            )
            if alone:
                detail = f"{len(shown) + len(photo.hidden) + len(alone)} people counted, {len(shown)} with a mask"
                self.drop(photo.path, "count", "people without a mask", detail)
            else:
                kept.append(photo)
        return kept

    def mask(self, targets: list[Photo], upstream: str) -> dict[str, Result]:
        """Masks by stem."""
        jobs = {p.stem: Job(
            f"{p.stem}.{content_digest([f.number for f in p.usable])}", self.where(p),
            {"faces": [f.box for f in p.usable], "bodies": [f.body for f in p.usable]},
        ) for p in targets}  # fmt: skip
        side = min(self.config.detect_side, self.config.write.max_side)
        results, _ = self.stage(stages.Masks(self.config.masks, side), list(jobs.values()), upstream=upstream)
        return {stem: results[job.key] for stem, job in jobs.items() if job.key in results}

    def caption(self, targets: list[Photo]) -> dict[str, tuple[str, str]]:
        """Caption and its source, by stem: metadata first, then the model, then the template."""
        made = {p.stem: (p.note.caption, "metadata") for p in targets if p.note.caption}
        rest = [p for p in targets if p.stem not in made]
        if self.config.captions != "template":
            stage = stages.Captions(self.config.captions, self.config.detect_side)
            results, _ = self.stage(stage, [Job(p.stem, self.where(p), {}) for p in rest])
            made |= {stem: (r["caption"], "model") for stem, r in results.items() if r["caption"]}
        return {p.stem: made.get(p.stem, (captions.template(len(p.usable)), "template")) for p in targets}

    def render(
        self, photos: list[Photo], crops: dict[tuple[str, int], list[Crop]], masks: dict[str, Result], files: Path
    ) -> dict[str, Result]:
        """Writes pictures, masks and reference crops into ``files``; what was written, by stem."""
        needed: dict[str, set[Crop]] = {}
        for photo in photos:
            if photo.stem in masks:
                for face in photo.usable:
                    for crop in crops[photo.stem, face.number]:
                        needed.setdefault(crop.stem, set()).add(crop)
        stage = stages.Render(str(files), self.config.write, self.config.references)
        jobs: dict[str, Job] = {}
        for photo in photos:
            wanted = sorted(needed.get(photo.stem, ()))
            if photo.stem not in masks and not wanted:
                continue
            box_of = {f.number: f.box for f in photo.faces}
            others = {c.number: [b for i, b in box_of.items() if i != c.number] for c in wanted}
            inputs: dict[str, Any] = {
                "stem": photo.stem, "target": photo.stem in masks, "hide": photo.hidden,
                "masks": masks[photo.stem]["png"] if photo.stem in masks else "",
                "crops": [
                    {"number": c.number, "augmented": c.augmented, "box": box_of[c.number], "others": others[c.number]}
                    for c in wanted
                ],
            }  # fmt: skip
            jobs[photo.stem] = Job(f"{photo.stem}.{content_digest(inputs)}", self.where(photo), inputs)
        self._forget_missing(stage, jobs.values(), files)
        results, _ = self.stage(stage, list(jobs.values()))
        return {stem: results[job.key] for stem, job in jobs.items() if job.key in results}

    def _forget_missing(self, stage: BatchFunction, jobs: Any, files: Path) -> None:
        """A cached result whose files are gone or cut short is no result."""
        name = f"{stage.name}:{content_digest([stage.settings(), ''])}"
        for key, result in self.cache.items(name, [j.key for j in jobs]):
            paths = result["files"].items()
            if not all((files / p).is_file() and (files / p).stat().st_size == size for p, size in paths):
                self.cache.forget(name, key)

    def clean(self) -> None:
        """Forgets results of photos and settings that this build did not use."""
        self.cache.keep_only(set().union(*self.used.values()), self.used)


def _by_person(photo: Photo) -> bool:
    """Whether the metadata speaks of single people: then they are judged one by one."""
    return bool(photo.note.people) and photo.note.consent != "no" and photo.note.minor != "yes"
