"""``multicrafter data build`` on a million tiny files: is every file accounted for, how long does it take, how much memory?

    python -m studies.tiny_files --files 1000000 --folder /tmp/million --out benchmarks/results/data.parquet

Of each thousand files 400 are no pictures, 200 empty, 200 pictures of one pixel, 200 pictures cut short; among them are 24 photos of two
drawn people.
"""

from __future__ import annotations

import argparse
import json
import resource
import struct
import sys
import tempfile
import time
import zlib
from pathlib import Path

from studies.lab.measurements import add, read_runs

PHOTOS = 24
NAME = "million_files"
"""Row of the table."""


def pixel(number: int) -> bytes:
    """A PNG of one pixel, another for each number."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    row = bytes([0, number & 255, number >> 8 & 255, number >> 16 & 255])
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(row)) + chunk(b"IEND", b"")


def make(folder: Path, files: int) -> None:
    """Writes the files, a thousand a folder, and the photos."""
    import torch
    from multicrafter.world import WorldConfig, make_scenes
    from PIL import Image

    for number in range(files):
        place, kind = folder / f"{number // 1000:04d}", number % 1000
        if kind == 0:
            place.mkdir(parents=True)
        if kind < 400:
            (place / f"{kind}.txt").touch()
        elif kind < 600:
            (place / f"{kind}.jpg").touch()
        else:
            (place / f"{kind}.png").write_bytes(pixel(number) if kind < 800 else pixel(number)[:40])
    (folder / "photos").mkdir()
    scenes = make_scenes(PHOTOS, WorldConfig(numbers=(2,)), torch.Generator().manual_seed(0))
    for i, picture in enumerate(scenes.images):
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / "photos" / f"{i}.png")


def run(folder: Path, files: int) -> dict[str, object]:
    """Builds, and compares what came out with what was there."""
    from multicrafter.photos import BuildConfig, FilterConfig, ReferenceConfig, WriteConfig, build

    config = BuildConfig(
        faces="tiny", people="same", filter=FilterConfig(min_side=32, min_face_pixels=4, duplicate_distance=0),
        references=ReferenceConfig(scale=1.1), write=WriteConfig(test_fraction=0.0),
    )  # fmt: skip
    wall, processor = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as out:
        done = build(folder, Path(out) / "set", config, progress=sys.stderr.isatty())
        log = (Path(out) / "set" / "dropped.jsonl").stat().st_size
    records = sum(done.records.values())
    accounted = records + sum(done.counts.values())
    if accounted != files + PHOTOS or records != PHOTOS:
        raise SystemExit(
            f"{files + PHOTOS} files must all be accounted for, got {accounted}, of which {records} records"
        )
    return {
        "files": files + PHOTOS, "records": records, "left_out": done.counts,
        "wall_s": round(time.perf_counter() - wall, 1), "processor_s": round(time.process_time() - processor, 1),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2), "log_mb": round(log / 1e6, 1),
        "seconds": {name: stage["seconds"] for name, stage in done.stages.items()},
    }  # fmt: skip


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--folder", type=Path, help="where the files are made, or were by an earlier run")
    parser.add_argument("--out", type=Path, required=True, help="table of the figures")
    arguments = parser.parse_args()
    read_runs(arguments.out)  # before the work: what is there must be a table
    folder = arguments.folder or Path(tempfile.mkdtemp()) / "photos"
    if not folder.exists():
        make(folder, arguments.files)
    figures = run(folder, arguments.files)
    add(arguments.out, NAME, figures)
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
