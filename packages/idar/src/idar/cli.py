"""Command line: ``idar watch`` and ``idar report MODEL --reference A.png --reference B.png --prompt "..."``."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from idar import __version__
from idar.attention import DIRECTIONS, Direction

if TYPE_CHECKING:
    from idar.integrations.recording import Recording

FIGURES = (".png", ".pdf", ".svg")


def _size(text: str) -> tuple[int, int]:
    try:
        height, _, width = text.lower().partition("x")
        return int(height), int(width or height)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected N or HEIGHTxWIDTH in pixels, got {text!r}") from None


def parser() -> argparse.ArgumentParser:
    """The command line's arguments."""
    top = argparse.ArgumentParser(
        prog="idar", description="Attention supervision and a microscope for attribute leakage."
    )
    top.add_argument("--version", action="version", version=f"idar {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    report = commands.add_parser(
        "report",
        help="run a multi-reference pipeline once and write where its subjects bleed",
        description="Runs any supported diffusers pipeline (FLUX.1 with references in context, FLUX.1-Kontext, FLUX.2, "
        "Qwen-Image-Edit, Qwen-Image 2.1) once and writes report.html, its figures and report.json: heat maps of every subject, block and step.",
    )
    _drawing(report)
    report.add_argument("--out", type=Path, default=Path("idar_report"), help="folder to write (default: %(default)s)")
    report.add_argument("--direction", choices=[*DIRECTIONS, "both"], default="both", help="default: both")
    report.set_defaults(run=_report)
    watch = commands.add_parser(
        "watch",
        help="run a multi-reference pipeline once, print each subject's leakage and write one figure",
        description="Runs any supported pipeline once, prints how much each subject leaks, and writes one figure. Without masks "
        "the subjects are looked for in the maps themselves, and leakage is a lower estimate.",
    )
    _drawing(watch)
    watch.add_argument("--out", type=Path, default=Path("idar_watch.png"), help="figure (default: %(default)s)")
    watch.set_defaults(run=_watch)
    return top


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, got {text!r}")
    return value


def _drawing(command: argparse.ArgumentParser) -> None:
    """What a picture is drawn with."""
    command.add_argument("model", metavar="MODEL", help="folder in diffusers format, or hub id")
    command.add_argument(
        "--reference", action="append", required=True, metavar="PNG", help="picture of a subject; repeat"
    )
    command.add_argument("--prompt", required=True, help="what the picture shows")
    command.add_argument(
        "--mask", action="append", metavar="PNG", help="where the subject is in the result, white; one per reference"
    )
    command.add_argument("--name", action="append", help="name of a subject; one per reference")
    command.add_argument("--lora", help="LoRA weights that the pipeline can load")
    command.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    command.add_argument("--size", type=_size, help="pixels, N or HEIGHTxWIDTH (default: the autoencoder's)")
    command.add_argument(
        "--reference-size",
        type=int,
        help="long side of references in pixels (FLUX.1; default: half the picture's); of Qwen-Image 2.1 "
        "the side of a square as large",
    )
    command.add_argument("--guidance", type=_number, help="guidance scale (default: the pipeline's)")
    command.add_argument(
        "--block", action="append", help="attention module to watch; repeat (default: all double blocks)"
    )
    command.add_argument("--seed", type=int, default=0)
    command.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    command.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on cpu, else bfloat16"
    )


def _drawn(options: argparse.Namespace, directions: Sequence[Direction]) -> tuple[Recording, list[Any] | None]:
    """The recording, and the masks; everything that can be wrong is looked at before the pipeline runs."""
    import torch

    from idar.integrations.pictures import read_mask, read_masks, read_picture
    from idar.integrations.recording import guided, record, size_of
    from idar.integrations.report import load_pipeline

    for what, given in (("--mask", options.mask), ("--name", options.name)):
        if given is not None and len(given) != len(options.reference):
            raise ValueError(f"{what} must be given once per reference, got {len(given)} for {len(options.reference)}")
    references = [read_picture(path, f"--reference {path}") for path in options.reference]
    masks = None if options.mask is None else [read_mask(path, f"--mask {path}") for path in options.mask]
    if not options.prompt.strip():
        raise ValueError("--prompt must not be empty")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device must be one that this machine has, got {device}: {error}") from None
    dtype = getattr(torch, options.dtype or ("float32" if device == "cpu" else "bfloat16"))
    pipe = load_pipeline(options.model, dtype=dtype, device=device, lora=options.lora)
    if masks is not None:
        read_masks(masks, (1, 1), size_of(pipe, options.size))  # their proportions
    recording = record(
        pipe, references, options.prompt, directions=directions, blocks=options.block, size=options.size,
        reference_size=options.reference_size, num_steps=options.steps, seed=options.seed,
        options={} if options.guidance is None else guided(pipe, options.guidance),
    )  # fmt: skip
    return recording, masks


def _watch(options: argparse.Namespace) -> None:
    from idar.integrations.watching import watched
    from idar.plot import require_matplotlib

    if options.out.exists() or options.out.suffix.lower() not in FIGURES:
        raise ValueError(f"--out must be a new file that ends in {', '.join(FIGURES)}, got {options.out}")
    if not options.out.resolve().parent.is_dir():
        raise ValueError(f"--out must be in a folder that is there, got {options.out}")
    require_matplotlib()
    recording, masks = _drawn(options, ["image_to_reference"])
    found = watched(recording, masks=masks, names=options.name)
    found.figure(options.out)
    print(found)
    print(f"figure: {options.out}")


def _report(options: argparse.Namespace) -> None:
    from idar.integrations.report import write_report

    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, but {options.out} is a file")
    if (options.out / "report.html").exists() and not (options.out / "report.json").exists():
        raise ValueError(f"--out would overwrite {options.out / 'report.html'}, which idar did not write")
    recording, masks = _drawn(options, DIRECTIONS[::-1] if options.direction == "both" else [options.direction])
    notes = {"model": options.model, "prompt": options.prompt, "seed": options.seed}
    found = write_report(recording, options.out, masks=masks, names=options.name, notes=notes)
    for direction, part in found["directions"].items():
        overall = "; ".join(
            f"{k} {', '.join('-' if v is None else f'{v:.3f}' for v in row)}" for k, row in part["overall"].items()
        )
        print(f"{direction}: {overall}")
    print(f"report: {options.out / 'report.html'}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line; 0 on success, 2 with one sentence on bad input, 130 when interrupted."""
    options = parser().parse_args(argv)
    try:
        options.run(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"idar: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("idar: interrupted", file=sys.stderr)
        return 130
    return 0
