"""``multicrafter export``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from multicrafter import UserError
from multicrafter.cli.options import add_command, writable


def export(arguments: argparse.Namespace) -> int:
    """A trained adapter for other programs: diffusers, ComfyUI, kohya, peft, or merged into its base."""
    from multicrafter.models.export import check_out, read_plain, write
    from multicrafter.models.loading import get_dtype, load_flux, resolve_adapter

    check_out(arguments.out, arguments.format)
    writable(arguments.out, file=arguments.format not in ("peft", "merged"))
    dtype = get_dtype(arguments.dtype)
    lora = read_plain(resolve_adapter(arguments.adapter))
    transformer = None
    if arguments.format == "merged":
        base = arguments.model or lora.notes.get("base_model")
        transformer = load_flux(base, dtype=dtype).transformer
        check_fits(lora, transformer)
    print(
        write(
            lora if transformer is not None else lora.to(dtype),
            arguments.format,
            arguments.out,
            transformer=transformer,
        )
    )
    return 0


def check_fits(lora: Any, transformer: Any) -> None:
    """Raises UserError where the base is another one than the adapter was trained on."""
    from multicrafter.models.adapters import fingerprint

    if (found := fingerprint(transformer)) != lora.notes["base"]:
        raise UserError(f"--model must be the base of the adapter, {lora.notes['base']}, got {found}")


def add_parser(commands: Any) -> None:
    """Adds ``export`` to the command line."""
    sub = add_command(commands, "export", export, model=False)
    sub.add_argument("adapter", help="folder or hub id of an adapter")
    sub.add_argument(
        "--format", required=True, choices=("diffusers", "comfyui", "kohya", "peft", "merged"),
        help="merged: the transformer with the adapter added to its weights, as a folder of diffusers",
    )  # fmt: skip
    sub.add_argument(
        "--out",
        type=Path,
        required=True,
        help="a .safetensors file, or for peft and merged a folder; must not be there",
    )
    sub.add_argument("--dtype", default="float32", help="of what is written: float32 (exact), bfloat16 or float16")
    sub.add_argument(
        "--model",
        help="base to merge into, folder or hub id; default: the one that the adapter names, else the tiny one",
    )
