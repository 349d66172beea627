"""``multicrafter data build | check``: everything heavy is imported when a command runs."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from multicrafter.cli.options import positive, real


def build(arguments: argparse.Namespace) -> int:
    """Photos into a dataset with masks and references."""
    from multicrafter.photos.build import build as run
    from multicrafter.photos.config import BuildConfig, FilterConfig, PrivacyConfig, ReferenceConfig, WriteConfig
    from multicrafter.photos.engines import make_engine

    def given(*names: str) -> dict[str, Any]:
        return {name: value for name in names if (value := getattr(arguments, name)) is not None}

    config = BuildConfig(
        **given("faces", "people", "count", "masks", "captions", "aesthetics", "licence", "consent", "batch", "detect_side"),
        filter=FilterConfig(
            **given(
                "min_side", "min_sharpness", "min_aesthetics", "min_people", "max_people", "min_face", "min_face_pixels",
                "min_face_score", "duplicate_distance", "strangers",
            )
        ),
        privacy=PrivacyConfig(**given("require_consent", "minors")),
        references=ReferenceConfig(
            augment=not arguments.no_augmented, **given("threshold", "per_subject", "size", "scale"),
        ),
        write=WriteConfig(**given("format", "max_side", "quality", "test_fraction", "shard_size")),
    )  # fmt: skip
    done = run(
        arguments.photos, arguments.out, config, engine=make_engine(arguments.engine, arguments.workers),
        progress=sys.stderr.isatty() or arguments.progress,
    )  # fmt: skip
    for reason, count in done.counts.items():
        print(f"left out, {reason}: {count}")
    print(f"records: {done.records['train']} train, {done.records['test']} test, {done.identities} identities")
    print(f"report: {arguments.out / 'report.html'}")
    return 0


def check(arguments: argparse.Namespace) -> int:
    """Problems of a dataset; exit code 1 if there are any."""
    from multicrafter.photos.check import check_dataset

    problems = check_dataset(arguments.dataset, progress=sys.stderr.isatty())
    for problem in problems[: arguments.limit]:
        print(problem)
    if len(problems) > arguments.limit:
        print(f"... and {len(problems) - arguments.limit} more")
    print(f"{len(problems)} problem{'' if len(problems) == 1 else 's'}")
    return 1 if problems else 0


def add_parser(commands: Any) -> None:
    """Adds ``data`` to the command line."""
    top = commands.add_parser("data", help="Training data from photos.", description="Training data from photos.")
    sub = top.add_subparsers(dest="data_command", required=True, metavar="COMMAND")

    made = sub.add_parser("build", help=build.__doc__, description=build.__doc__)
    made.set_defaults(function=build)
    made.add_argument(
        "photos",
        type=Path,
        metavar="PHOTOS",
        help="folder of photos, with an optional metadata.jsonl or metadata.csv; only read",
    )
    made.add_argument(
        "out", type=Path, metavar="OUT", help="folder of the dataset; an interrupted or earlier build there goes on"
    )
    made.add_argument("--engine", choices=("local", "ray"), default="local")
    made.add_argument("--workers", type=int, help="processes of the engine ray; default: one per core")
    made.add_argument("--progress", action="store_true", help="show bars even where stderr is no terminal")
    backends = made.add_argument_group("backends", "NAME, or NAME:PATH with a local model")
    backends.add_argument("--faces", help="tiny, dlib (default), dlib_cnn (slower, misses fewer), insightface, ...")
    backends.add_argument("--count", help="second count of people: auto (default), dlib_cnn, dlib, detector:PATH, none")
    backends.add_argument("--people", help="faces (guessed bodies, default), same, detector:PATH")
    backends.add_argument("--masks", help="boxes (default), selfie:PATH, semantic:PATH, sam2:PATH")
    backends.add_argument("--captions", help="template (default), vlm:PATH")
    backends.add_argument("--aesthetics", help="closed_form (default), hps:PATH, none")
    backends.add_argument("--batch", type=int, help="photos a batch")
    backends.add_argument("--detect-side", type=int, help="longer side shown to detectors, in pixels")
    filters = made.add_argument_group("filters")
    for name, kind, what in (
        ("min-side", int, "shorter side of a photo, pixels"),
        ("min-sharpness", real, "see the histogram in the report"),
        ("min-aesthetics", real, "of the chosen scorer"),
        ("min-people", int, "usable faces of a target"),
        ("max-people", int, "the same, at most"),
        ("min-face", real, "shorter side of a face over the photo's"),
        ("min-face-pixels", int, "shorter side of a face"),
        ("min-face-score", real, "confidence of the detector"),
        ("duplicate-distance", int, "bits of 64 in which near-duplicates differ, -1: keep them"),
    ):
        filters.add_argument(f"--{name}", type=kind, help=what)
    filters.add_argument(
        "--strangers", choices=("drop", "keep"), help="photos that show somebody without a mask; default: drop"
    )
    privacy = made.add_argument_group("consent and licence")
    privacy.add_argument(
        "--require-consent", action="store_true", default=None, help="use only people marked consent: yes"
    )
    privacy.add_argument(
        "--minors", choices=("keep", "drop", "drop_unknown"), help="default drop: those marked as minors"
    )
    privacy.add_argument("--licence", help="of photos whose metadata does not say")
    privacy.add_argument("--consent", choices=("yes", "no", "unknown"), help="the same")
    references = made.add_argument_group("references")
    references.add_argument(
        "--same-person",
        dest="threshold",
        type=real,
        help="cosine from which two faces are one person; default: the backend's",
    )
    references.add_argument("--references", dest="per_subject", type=int, help="of a subject, at most")
    references.add_argument("--reference-size", dest="size", type=int, help="pixels")
    references.add_argument("--reference-scale", dest="scale", type=real, help="side of a crop over the face")
    references.add_argument("--no-augmented", action="store_true", help="drop people who are on one photo only")
    output = made.add_argument_group("output")
    output.add_argument("--format", choices=("parquet", "jsonl", "webdataset"))
    output.add_argument("--max-side", type=int, help="longer side of a written picture")
    output.add_argument("--quality", type=int, help="of the JPEGs")
    output.add_argument("--test-fraction", type=real, help="of the groups of people")
    output.add_argument("--shard-size", type=int, help="records a file")

    checked = sub.add_parser("check", help=check.__doc__, description=check.__doc__)
    checked.set_defaults(function=check)
    checked.add_argument("dataset", type=Path)
    checked.add_argument("--limit", type=positive, default=50, help="problems printed")
