"""A folder of photos becomes training pairs with masks (MultiCrafter, arXiv 2509.21953, Fig. 1).

scan -> fingerprint -> duplicates and privacy -> detect -> filter -> aesthetics -> group identities -> masks -> captions -> render -> write.
Every stage is cached by content hash: an interrupted build goes on where it stopped, and a changed setting repeats only what depends on it.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from multicrafter import __version__
from multicrafter.data.photos import captions, identities, people, pictures, select, stages, write
from multicrafter.data.photos.cache import Cache, Result, fingerprint
from multicrafter.data.photos.config import BuildConfig
from multicrafter.data.photos.engines import Engine, InProcess, Job, Stage
from multicrafter.data.photos.scan import Found, PhotoNote, Skipped, printable, read_notes, walk
from multicrafter.data.photos.select import Crop, Drop, Photo


@dataclass(frozen=True)
class Summary:
    """What a build did. ``stages``: photos asked for, computed now, failed, and seconds, by stage."""

    records: dict[str, int]
    identities: int
    counts: dict[str, int]
    drops: list[Drop]
    stages: dict[str, dict[str, float]]


@dataclass
class _Run:
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

    def stage(self, stage: Stage, jobs: Sequence[Job], *, upstream: str = "") -> tuple[dict[str, Result], str]:
        """Results by key, computed where the cache has none; failures are dropped and not cached. Also the stage's fingerprint."""
        name = f"{stage.name}:{fingerprint([stage.settings(), upstream])}"
        known = self.cache.known(name)
        todo = [job for job in {j.key: j for j in jobs}.values() if job.key not in known]
        started, failed, done = time.perf_counter(), 0, 0
        batches = [todo[i : i + self.config.batch] for i in range(0, len(todo), self.config.batch)]
        bar = tqdm(
            total=len(todo),
            desc=stage.name,
            unit="photo",
            disable=not (self.progress and todo),
            mininterval=0.5,
            file=sys.stderr,
        )
        with bar:
            for batch, results in self.engine.run(stage, batches) if batches else ():
                good = {job.key: r for job, r in zip(batch, results, strict=True) if "error" not in r}
                self.cache.put(name, good)
                for job, result in zip(batch, results, strict=True):
                    if "error" in result:
                        failed += 1
                        where = printable(str(Path(job.path).relative_to(self.photos)))
                        self.drops.append(
                            Drop(
                                where,
                                stage.name,
                                "unreadable" if stage.name == "fingerprint" else "failed",
                                result["error"],
                            )
                        )
                done += len(batch)
                bar.update(len(batch))
        self.timing[stage.name] = {
            "photos": len(jobs), "computed": done, "failed": failed, "seconds": round(time.perf_counter() - started, 3),
        }  # fmt: skip
        keys = [job.key for job in jobs]
        self.used[name] = set(keys)
        return dict(self.cache.items(name, keys)), name

    def where(self, photo: Photo) -> str:
        return str(self.photos / photo.path)

    # -- the steps, in order

    def scan(self) -> list[Photo]:
        notes = read_notes(self.photos, licence=self.config.licence, consent=self.config.consent)
        plain = PhotoNote(licence=self.config.licence, consent=self.config.consent)
        found = []
        started = time.perf_counter()
        for item in tqdm(
            walk(self.photos), desc="scan", unit="file", disable=not self.progress, mininterval=0.5, file=sys.stderr
        ):
            if isinstance(item, Skipped):
                self.drops.append(Drop(printable(item.path), "scan", item.reason, item.detail))
            else:
                found.append(item)
        self.timing["scan"] = {
            "photos": len(found),
            "computed": len(found),
            "failed": 0,
            "seconds": round(time.perf_counter() - started, 3),
        }
        for name in notes.keys() - {item.path for item in found}:
            self.drops.append(
                Drop(printable(name), "scan", "noted but missing", "the metadata names a photo that is not there")
            )
        results, _ = self.stage(stages.Fingerprint(), [Job(i.key, str(self.photos / i.path), {}) for i in found])
        return [
            self._photo(item, results[item.key], notes.get(item.path, plain)) for item in found if item.key in results
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
                self.drops.append(Drop(photo.path, "filter", *fault))
        return result

    def detect(self, photos: list[Photo]) -> tuple[list[Photo], str]:
        config = self.config
        stage = stages.Detect(config.faces, config.people, config.detect_side)
        results, name = self.stage(stage, [Job(p.stem, self.where(p), {}) for p in photos])
        kept = []
        for photo in (p for p in photos if p.stem in results):
            photo.faces = people.read_faces(results[photo.stem])
            self.drops += select.sort_faces(photo, config.filter, config.privacy)
            if not photo.usable:
                self.drops.append(Drop(photo.path, "filter", "no usable face", f"{len(photo.faces)} found"))
            elif len(photo.usable) > config.filter.max_people:
                self.drops.append(
                    Drop(
                        photo.path,
                        "filter",
                        "too many people",
                        f"{len(photo.usable)}, more than {config.filter.max_people}",
                    )
                )
            else:
                kept.append(photo)
        return kept, name

    def rate(self, photos: list[Photo]) -> list[Photo]:
        least = self.config.filter.min_aesthetics
        if self.config.aesthetics == "none":
            if least is not None:
                raise ValueError("min_aesthetics needs a scorer, but aesthetics is 'none'")
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
                self.drops.append(Drop(photo.path, "filter", "not aesthetic", f"{photo.aesthetics} below {least}"))
            else:
                kept.append(photo)
        return kept

    def group(self, photos: list[Photo]) -> None:
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
        self.timing["group"] = {
            "photos": len(photos),
            "computed": len(faces),
            "failed": 0,
            "seconds": round(time.perf_counter() - started, 3),
        }

    def targets(self, photos: list[Photo], crops: dict[tuple[str, int], list[Crop]]) -> list[Photo]:
        least, kept = self.config.filter.min_people, []
        for photo in photos:
            with_reference = [f for f in photo.usable if crops[photo.stem, f.number]]
            for face in photo.usable:
                if not crops[photo.stem, face.number]:
                    self.drops.append(
                        Drop(photo.path, "group", "no reference", "the person is on no other photo", face.number)
                    )
            if len(with_reference) >= least:
                kept.append(photo)
            else:
                self.drops.append(
                    Drop(
                        photo.path,
                        "group",
                        "lends references only",
                        f"{len(with_reference)} subjects, fewer than {least}",
                    )
                )
        return kept

    def mask(self, targets: list[Photo], upstream: str) -> dict[str, Result]:
        jobs = {p.stem: Job(
            f"{p.stem}.{fingerprint([f.number for f in p.usable])}", self.where(p),
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
            jobs[photo.stem] = Job(f"{photo.stem}.{fingerprint(inputs)}", self.where(photo), inputs)
        self._forget_missing(stage, jobs.values(), files)
        results, _ = self.stage(stage, list(jobs.values()))
        return {stem: results[job.key] for stem, job in jobs.items() if job.key in results}

    def _forget_missing(self, stage: Stage, jobs: Any, files: Path) -> None:
        """A cached result whose files are gone or cut short is no result."""
        name = f"{stage.name}:{fingerprint([stage.settings(), ''])}"
        for key, result in self.cache.items(name, [j.key for j in jobs]):
            paths = result["files"].items()
            if not all((files / p).is_file() and (files / p).stat().st_size == size for p, size in paths):
                self.cache.forget(name, key)

    def clean(self) -> None:
        self.cache.keep_only(set().union(*self.used.values()), self.used)


def _by_person(photo: Photo) -> bool:
    """Whether the metadata speaks of single people: then they are judged one by one."""
    return bool(photo.note.people) and photo.note.consent != "no" and photo.note.minor != "yes"


def prepare(config: BuildConfig) -> None:
    """Loads every model once, so that one that is missing is found before the first photo and not after hours."""
    side = config.detect_side
    wanted: list[Stage] = [
        stages.Detect(config.faces, config.people, side),
        stages.Aesthetics(config.aesthetics, side),
        stages.Masks(config.masks, side),
    ]
    if config.captions != "template":
        wanted.append(stages.Captions(config.captions, side))
    for stage in wanted:
        stage.prepare()


def check_folders(photos: Path, out: Path) -> None:
    """Raises a ValueError if a build cannot work between these folders."""
    if not photos.is_dir():
        raise ValueError(f"PHOTOS must be a folder, but {photos} is {'a file' if photos.exists() else 'not there'}")
    inner, outer = out.resolve(), photos.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise ValueError(f"OUT must lie outside of PHOTOS and the other way round, got {out} and {photos}")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ".build").is_dir())):
        raise ValueError(f"OUT must be new, empty or of an earlier build, but {out} holds something else")


def build(
    photos: Path, out: Path, config: BuildConfig | None = None, *, engine: Engine | None = None, progress: bool = True
) -> Summary:
    """Builds a dataset in ``out`` from the photos under ``photos``, which is only read.

    Raises:
        ValueError: Folders, metadata or models do not fit.
        ImportError: A backend's extra is missing.
        OSError: ``out`` cannot be written to.
    """
    from multicrafter.data.photos.records import assemble
    from multicrafter.data.photos.report import write_report

    config = config or BuildConfig()
    photos, out = Path(photos), Path(out)
    check_folders(photos, out)
    prepare(config)
    (out / ".build").mkdir(parents=True, exist_ok=True)
    files = out / ".build" / "files" if config.write.format == "webdataset" else out
    with Cache(out / ".build" / "cache.sqlite") as cache:
        run = _Run(photos, out, config, engine or InProcess(), cache, progress)
        scanned = run.scan()
        kept, detector = run.detect(run.first_of_each(scanned))
        kept = run.rate(kept)
        run.group(kept)
        crops = select.choose_references(kept, config.references)
        targets = run.targets(kept, crops)
        masks = run.mask(targets, detector)
        sentences = run.caption(targets)
        rendered = run.render(kept, crops, masks, files)
        splits, late = assemble(targets, kept, crops, masks, sentences, rendered, config)
        run.drops += late
        run.clean()
    counts = select.summary_counts(run.drops)
    people_in = {s["identity"] for records in splits.values() for r in records for s in r["subjects"]}
    about = {
        "code": __version__, "config": config.as_dict(), "identities": len(people_in), "files_scanned": len(scanned) + sum(
            d.stage in ("scan", "fingerprint") for d in run.drops), "dropped": counts, "stages": run.timing,
    }  # fmt: skip
    lines = (
        json.dumps({k: v for k, v in d._asdict().items() if v not in (None, "")} | {"path": printable(d.path)}) + "\n"
        for d in run.drops
    )
    write.replace(out / "dropped.jsonl", "".join(lines))
    whole = write.write_dataset(out, splits, config.write, about, files=files)
    write_report(out, whole, splits, kept, masks, files)
    if files != out:
        shutil.rmtree(files, ignore_errors=True)
    return Summary(dict(whole["splits"]), len(people_in), counts, run.drops, run.timing)
