r"""Milliseconds a photo of every stage of ``multicrafter data build``, and what a million photos would take: measured costs, linear in photos.

    python packages/multicrafter/benchmarks/bench_multicrafter_data_build.py --photos .photos --name build --out benchmarks/results/data.parquet
    python packages/multicrafter/benchmarks/bench_multicrafter_data_build.py --from OUT/dataset.json --name 20000 \
        --out benchmarks/results/data.parquet

Grouping compares all pairs of faces: its share grows with the square, and is stated apart, from a matrix product of the measured width.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np


def costs(stages: dict[str, dict[str, float]], photos: int) -> dict[str, float]:
    """Milliseconds per photo of the folder, by stage, of those stages that computed something."""
    return {n: round(1000 * t["seconds"] / photos, 3) for n, t in stages.items() if t["computed"]}


def pairs_per_second(width: int, rows: int = 4096) -> float:
    """Pairs of faces compared a second."""
    from multicrafter.photos.identities import similar_pairs

    faces = np.random.default_rng(0).normal(size=(rows, width)).astype(np.float32)
    faces /= np.linalg.norm(faces, axis=1, keepdims=True)
    started = time.perf_counter()
    similar_pairs(faces, 0.8)
    return rows * rows / 2 / (time.perf_counter() - started)


def plan(
    per_photo: dict[str, float], faces_per_photo: float, pairs: float, *, photos: int = 1_000_000
) -> dict[str, Any]:
    """Hours of one process, and of 64, for so many photos: per-photo stages divide, scan, grouping and duplicates do not."""
    alone = sum(v for n, v in per_photo.items() if n not in ("scan", "group"))
    faces = faces_per_photo * photos
    group = faces * faces / 2 / pairs / 3600
    hours = alone * photos / 1000 / 3600
    return {
        "photos": photos, "ms_per_photo": round(alone, 2), "hours_one_process": round(hours, 1), "hours_64_processes": round(hours / 64, 2),
        "hours_grouping": round(group, 2), "faces": round(faces),
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--photos", type=Path)
    parser.add_argument("--faces", default="dlib")
    parser.add_argument("--masks", default="boxes")
    parser.add_argument("--from", dest="about", type=Path, help="dataset.json of a build that ran through in one go")
    parser.add_argument("--name", default="build", help="row of the table")
    parser.add_argument("--out", type=Path, required=True, help="table of the figures")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from studies.lab.measurements import add, read_runs

    read_runs(arguments.out)  # before the work: what is there must be a table
    width = 48
    if arguments.about is None:
        from multicrafter.photos import BuildConfig, FilterConfig, WriteConfig, build

        folder = Path(tempfile.mkdtemp()) / "set"
        config = BuildConfig(
            faces=arguments.faces,
            masks=arguments.masks,
            filter=FilterConfig(duplicate_distance=0),
            write=WriteConfig(test_fraction=0),
        )
        build(arguments.photos, folder, config, progress=False)
        arguments.about, width = folder / "dataset.json", 128
    about = json.loads(arguments.about.read_text())
    photos = int(about["stages"]["scan"]["photos"])
    per_photo = costs(about["stages"], photos)
    faces = about["stages"]["group"]["computed"] / photos
    pairs = pairs_per_second(width)
    figures = {
        "photos": photos, "records": about["splits"], "identities": about["identities"], "dropped": about["dropped"], "config": about["config"],
        "ms_per_photo": per_photo, "faces_per_photo": round(faces, 3), "pairs_per_second": round(pairs), "plan": plan(per_photo, faces, pairs),
    }  # fmt: skip
    add(arguments.out, arguments.name, figures)
    print(json.dumps({k: figures[k] for k in ("photos", "ms_per_photo", "plan")}))


if __name__ == "__main__":
    main()
