"""Records a second of the streaming loader against those that a stage-1 step of the tiny model consumes (wanted: 3 times as many).

    python packages/multicrafter/benchmarks/bench_multicrafter_data_loader.py DATASET --name loader --out benchmarks/results/data.parquet

Named baseline: one step of `recipes.tiny` stage 1 on the same machine, in the same run, the two in turns. The loader reads 64x64 pictures
and 32x32 references from JPEG and PNG files, decodes, cuts, resizes and stacks them; the step includes neither reading nor encoding.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path

import pytest
import torch
from multicrafter.photos.loader import LoaderConfig, PhotoLoader


def dataset(folder: Path, count: int = 60) -> Path:
    """A small dataset of drawn photos, for the smoke run."""
    import numpy as np
    from multicrafter.photos import BuildConfig, FilterConfig, ReferenceConfig, WriteConfig, build
    from multicrafter.world import WorldConfig, make_scenes
    from PIL import Image

    (folder / "photos").mkdir()
    for i, picture in enumerate(make_scenes(count, WorldConfig(numbers=(2,)), torch.Generator().manual_seed(0)).images):
        pixels = (picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(np.ascontiguousarray(pixels)).save(folder / "photos" / f"{i}.png")
    config = BuildConfig(
        faces="tiny", people="same", filter=FilterConfig(min_side=32, min_face_pixels=4, duplicate_distance=0),
        references=ReferenceConfig(scale=1.1), write=WriteConfig(test_fraction=0.0),
    )  # fmt: skip
    build(folder / "photos", folder / "set", config, progress=False)
    return folder / "set"


def loading(folder: Path, *, batch: int, workers: int, side: int = 64, subjects: int = 2) -> tuple[PhotoLoader, object]:
    """A loader whose workers are already busy."""
    config = LoaderConfig(
        batch=batch, buckets=((side, side),), reference_size=side // 2, num_subjects=subjects, num_workers=workers
    )
    stream = PhotoLoader(folder, config)
    return stream, iter(stream)


def step(batch: int):
    """A stage-1 step of the tiny model, ready to be called."""
    from dataclasses import replace

    from multicrafter.config.recipes import ablation
    from multicrafter.pipeline import load_flux
    from multicrafter.training.pretrain import Pretrain
    from multicrafter.training.scenes import encode_scenes

    pipe, config = load_flux(), replace(ablation()["moe"].pretrain, batch=batch)
    stage = Pretrain(pipe, config, encode_scenes(pipe, config.world, batch, seed=0))
    return lambda: stage.step(0)


def test_loader(benchmark, tmp_path):
    """One batch of 16, in this process."""
    _, batches = loading(dataset(tmp_path), batch=16, workers=0)
    benchmark.pedantic(lambda: next(batches), rounds=5, warmup_rounds=1)
    benchmark.extra_info["records_per_second"] = round(16 / benchmark.stats.stats.median)


@pytest.mark.parametrize("batch", [16])
def test_step(benchmark, batch):
    """Named baseline: the step that consumes the batch."""
    benchmark.pedantic(step(batch), rounds=3, warmup_rounds=1)


def main() -> None:
    """Both in turns, five rounds; records medians, spreads and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("dataset", type=Path, nargs="?")
    parser.add_argument("--out", type=Path, required=True, help="table of the figures")
    parser.add_argument("--name", default="loader", help="row of the table")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--subjects", type=int, default=2, help="of the records that are read")
    arguments = parser.parse_args()
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))
    from studies.lab.measurements import add, read_runs

    read_runs(arguments.out)  # before the work: what is there must be a table
    folder = arguments.dataset or dataset(Path(tempfile.mkdtemp()), 400)
    one_step = step(arguments.batch)
    one_step()
    rows: dict[str, list[float]] = {"step": [], "loader": [], "loader, no workers": []}
    for _ in range(arguments.rounds):
        started = time.perf_counter()
        for _ in range(2):
            one_step()
        rows["step"].append(2 * arguments.batch / (time.perf_counter() - started))
        for name, workers in (("loader", arguments.workers), ("loader, no workers", 0)):
            _, batches = loading(folder, batch=arguments.batch, workers=workers, subjects=arguments.subjects)
            for _ in islice(batches, 2 * workers + 2):  # start of the processes, and what they have read ahead
                pass
            count = 24
            started = time.perf_counter()
            for _ in islice(batches, count):
                pass
            rows[name].append(count * arguments.batch / (time.perf_counter() - started))
            batches.close()
    ratios = [a / b for a, b in zip(rows["loader"], rows["step"], strict=True)]
    figures = {
        "what": "records a second; step: stage 1 of the tiny model (row moe), the named baseline",
        "batch": arguments.batch, "workers": arguments.workers, "subjects": arguments.subjects,
        "records_per_second": {n: {"median": statistics.median(v), "all": v} for n, v in rows.items()},
        "loader_over_step": {"median": statistics.median(ratios), "low": min(ratios), "high": max(ratios)},
    }  # fmt: skip
    add(arguments.out, arguments.name, figures)
    print(json.dumps(figures["loader_over_step"]), {n: round(statistics.median(v)) for n, v in rows.items()})


if __name__ == "__main__":
    main()
