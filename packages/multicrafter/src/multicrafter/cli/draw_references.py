"""``multicrafter draw-references``: people of the drawn world to try the tiny model with."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from multicrafter import UserError, user_input
from multicrafter.cli.options import add_command, positive, seed, writable


def draw_references(arguments: argparse.Namespace) -> int:
    """References and a caption of the drawn world, of people that no model has seen: something to try generate with."""
    from multicrafter.files import write_whole
    from multicrafter.pipeline import to_image
    from multicrafter.world.strangers import strangers

    out: Path = arguments.out
    names = [out / f"{chr(97 + i)}.png" for i in range(arguments.number)]
    writable(out, file=False)
    there = [path for path in [*names, out / "caption.txt"] if os.path.lexists(path)]
    if there:
        raise UserError(f"--out must not hold {there[0].name} yet, but {out} does; name another folder")
    portraits, text = strangers(arguments.number, arguments.seed)
    with user_input(f"--out {out} must be a folder that can be made"):
        out.mkdir(parents=True, exist_ok=True)
    for path, portrait in zip(names, portraits, strict=True):
        to_image(portrait).save(path)
        print(path)
    print(write_whole(out / "caption.txt", text + "\n"))
    given = " ".join(f"--reference {path}" for path in names)
    print(
        f'try: multicrafter generate {given} --prompt "{text}" --out {out / "picture.png"} --sheet {out / "sheet.png"}'
    )
    return 0


def add_parser(commands: Any) -> None:
    """Adds ``draw-references`` to the command line."""
    sub = add_command(commands, "draw-references", draw_references, model=False)
    sub.add_argument("--number", type=positive, choices=(1, 2, 3, 4), default=2, help="people")
    sub.add_argument("--seed", type=seed, default=0, help="another seed, other people")
    sub.add_argument("--out", type=Path, required=True, help="folder for a.png, b.png, ... and caption.txt")
