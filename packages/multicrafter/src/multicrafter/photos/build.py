"""A folder of photos becomes training pairs with masks (MultiCrafter, arXiv 2509.21953, Fig. 1).

scan -> fingerprint -> duplicates and privacy -> detect -> filter -> aesthetics -> group identities -> count people -> masks ->
captions -> render -> write.
Every stage is cached by content hash: an interrupted build goes on where it stopped, and a changed setting repeats only what depends on it.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from multicrafter import UserError, __version__, user_input
from multicrafter.files import write_whole
from multicrafter.photos import select, stages, write
from multicrafter.photos.cache import Cache
from multicrafter.photos.config import BuildConfig
from multicrafter.photos.engines import BatchFunction, Engine, InProcess
from multicrafter.photos.run import BuildRun
from multicrafter.photos.scan import printable
from multicrafter.photos.select import Drop


@dataclass(frozen=True)
class Summary:
    """What a build did. ``stages``: photos asked for, computed now, failed, and seconds, by stage."""

    records: dict[str, int]
    identities: int
    counts: dict[str, int]
    drops: list[Drop]
    stages: dict[str, dict[str, float]]


def prepare(config: BuildConfig) -> None:
    """Loads every model once, so that one that is missing is found before the first photo and not after hours."""
    side = config.detect_side
    wanted: list[BatchFunction] = [
        stages.Detect(config.faces, config.people, side),
        stages.Count(config.means, side),
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
        raise UserError(f"PHOTOS must be a folder, but {photos} is {'a file' if photos.exists() else 'not there'}")
    inner, outer = out.resolve(), photos.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UserError(f"OUT must lie outside of PHOTOS and the other way round, got {out} and {photos}")
    if out.exists() and (not out.is_dir() or (any(out.iterdir()) and not (out / ".build").is_dir())):
        raise UserError(f"OUT must be new, empty or of an earlier build, but {out} holds something else")


def build(
    photos: Path, out: Path, config: BuildConfig | None = None, *, engine: Engine | None = None, progress: bool = True
) -> Summary:
    """Builds a dataset in ``out`` from the photos under ``photos``, which is only read.

    Raises:
        ValueError: Folders, metadata or models do not fit.
        ImportError: A backend's extra is missing.
        OSError: ``out`` cannot be written to.
    """
    from multicrafter.photos.records import assemble
    from multicrafter.photos.report import write_report

    config = config or BuildConfig()
    photos, out = Path(photos), Path(out)
    check_folders(photos, out)
    prepare(config)
    with user_input(f"OUT {out} must be a folder that can be made"):
        (out / ".build").mkdir(parents=True, exist_ok=True)
    files = out / ".build" / "files" if config.write.format == "webdataset" else out
    with Cache(out / ".build" / "cache.sqlite") as cache:
        run = BuildRun(photos, out, config, engine or InProcess(), cache, progress)
        scanned = run.scan()
        kept, detector = run.detect(run.first_of_each(scanned))
        kept = run.rate(kept)
        run.group(kept)
        crops = select.choose_references(kept, config.references)
        targets = run.without_strangers(run.targets(kept, crops))
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
    write_whole(out / "dropped.jsonl", "".join(lines))
    whole = write.write_dataset(out, splits, config.write, about, files=files)
    write_report(out, whole, splits, kept, masks, files)
    if files != out:
        shutil.rmtree(files, ignore_errors=True)
    return Summary(dict(whole["splits"]), len(people_in), counts, run.drops, run.timing)
