"""Command line: ``idar report MODEL --reference A.png --reference B.png --prompt "..."``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from idar import __version__
from idar.attention import DIRECTIONS


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
        "Qwen-Image-Edit) once and writes report.html, its figures and report.json: heat maps of every subject, block and step.",
    )
    report.add_argument("model", metavar="MODEL", help="folder in diffusers format, or hub id")
    report.add_argument(
        "--reference", action="append", required=True, metavar="PNG", help="picture of a subject; repeat"
    )
    report.add_argument("--prompt", required=True, help="what the picture shows")
    report.add_argument(
        "--mask", action="append", metavar="PNG", help="where the subject is in the result, white; one per reference"
    )
    report.add_argument("--name", action="append", help="name of a subject; one per reference")
    report.add_argument("--out", type=Path, default=Path("idar_report"), help="folder to write (default: %(default)s)")
    report.add_argument("--lora", help="LoRA weights that the pipeline can load")
    report.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    report.add_argument("--size", type=_size, help="pixels, N or HEIGHTxWIDTH (default: the autoencoder's)")
    report.add_argument(
        "--reference-size", type=int, help="long side of references in pixels (FLUX.1; default: half the picture's)"
    )
    report.add_argument("--guidance", type=float, help="guidance scale (default: the pipeline's)")
    report.add_argument("--direction", choices=[*DIRECTIONS, "both"], default="both", help="default: both")
    report.add_argument(
        "--block", action="append", help="attention module to watch; repeat (default: all double blocks)"
    )
    report.add_argument("--seed", type=int, default=0)
    report.add_argument("--device", default=None, help="default: cuda where there is one, else cpu")
    report.add_argument(
        "--dtype", choices=["float32", "bfloat16", "float16"], help="default: float32 on cpu, else bfloat16"
    )
    return top


def _report(options: argparse.Namespace) -> None:
    import torch

    from idar.integrations.recording import record
    from idar.integrations.report import load_picture, load_pipeline, write_report

    for what, given in (("--mask", options.mask), ("--name", options.name)):
        if given is not None and len(given) != len(options.reference):
            raise ValueError(f"{what} must be given once per reference, got {len(given)} for {len(options.reference)}")
    references = [load_picture(path) for path in options.reference]
    masks = None if options.mask is None else [load_picture(path) for path in options.mask]
    if options.out.exists() and not options.out.is_dir():
        raise ValueError(f"--out must be a folder, but {options.out} is a file")
    if not options.prompt.strip():
        raise ValueError("--prompt must not be empty")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = getattr(torch, options.dtype or ("float32" if device == "cpu" else "bfloat16"))
    pipe = load_pipeline(options.model, dtype=dtype, device=device, lora=options.lora)
    recording = record(
        pipe,
        references,
        options.prompt,
        directions=DIRECTIONS[::-1] if options.direction == "both" else [options.direction],
        blocks=options.block,
        size=options.size,
        reference_size=options.reference_size,
        num_steps=options.steps,
        seed=options.seed,
        options={} if options.guidance is None else {"guidance_scale": options.guidance},
    )
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
        _report(options)
    except (ValueError, ImportError, OSError) as error:
        print(f"idar: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("idar: interrupted", file=sys.stderr)
        return 130
    return 0
