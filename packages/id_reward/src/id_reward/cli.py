"""``id-reward score``: a table, JSON, annotated pictures; ``id-reward serve``: scores over HTTP."""

from __future__ import annotations

import argparse
import json
import math
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from id_reward import __version__
from id_reward.alignment import CONVENTIONS, IdentityScore, cosine_similarity, score_similarity
from id_reward.errors import InputError
from id_reward.options import FACES, PENALTIES, checked_options, identity_options
from id_reward.outputs import check_targets, write_atomically
from id_reward.protocols import Faces
from id_reward.serve_command import add_serve


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="id-reward", description="Identity rewards by one-to-one matching.")
    top.add_argument("--version", action="version", version=f"id-reward {__version__}")
    commands = top.add_subparsers(dest="command", required=True)
    score = commands.add_parser(
        "score",
        help="score pictures against the people of references",
        description="Scores pictures against references: who of them is there, and how faithfully. Each face counts for one reference only.",
    )
    score.add_argument("pictures", nargs="+", metavar="PICTURE", help="generated pictures")
    score.add_argument(
        "-r", "--reference", action="append", required=True, metavar="FILE", help="a photo of one person; repeat"
    )
    score.add_argument("--all-conventions", action="store_true", help="show every convention side by side")
    score.add_argument("--one-face", action="store_true", help="several faces in a reference are an error")
    score.add_argument("--json", nargs="?", const="-", metavar="FILE", help="JSON, to standard output or into FILE")
    score.add_argument("--annotate", metavar="DIR", help="write each picture with boxes and matches into DIR")
    identity_options(score)
    score.set_defaults(run=run_score)
    identity_options(add_serve(commands))
    return top


def distinct(names: Sequence[str], pattern: str = "{} ({})") -> list[str]:
    """The same names, numbered where they come again.

    >>> distinct(["a.png", "b.png", "a.png"])
    ['a.png', 'b.png', 'a.png (2)']
    """
    found: list[str] = []
    for name in names:
        candidate, count = name, 2
        while candidate in found:
            candidate, count = pattern.format(name, count), count + 1
        found.append(candidate)
    return found


def short_names(paths: Sequence[str]) -> list[str]:
    """File names without folders, made distinct by a number where they coincide."""
    return distinct([Path(path).stem for path in paths], "{}-{}")


def table(rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest entry; numbers to the right."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join(cell.ljust(w) if c == 0 else cell.rjust(w) for c, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def _plain(value: float) -> float | None:
    """A number as JSON can say it."""
    return round(float(value), 6) if math.isfinite(value) else None


def as_record(
    path: str, score: IdentityScore | None, faces: Faces, references: Sequence[str], others: dict[str, float]
) -> dict[str, Any]:
    """What the JSON says about a picture; NaN becomes null. ``references`` are distinct names, one for each."""
    owner = {face: references[reference] for reference, face in score.matching.pairs} if score else {}
    return {
        "picture": path,
        "reward": _plain(score.reward) if score else None,
        "per_reference": {r: _plain(v) for r, v in zip(references, score.per_reference)} if score else None,
        "missing": [references[r] for r in score.matching.unmatched_references] if score else None,
        "extra_faces": len(score.matching.unmatched_faces) if score else None,
        "faces": [
            {"box": [round(float(v), 1) for v in box], "score": _plain(s), "reference": owner.get(f)}
            for f, (box, s) in enumerate(zip(faces.boxes, faces.scores))
        ],
        "conventions": {name: _plain(value) for name, value in others.items()},
    }


def _all_conventions(known: np.ndarray, faces: Faces) -> dict[str, float]:
    """The reward of one picture by every convention; empty where an embedding is not finite."""
    if not (np.isfinite(faces.embeddings).all() and np.isfinite(known).all()):
        return {}
    similarity = cosine_similarity(known, faces.embeddings.reshape(-1, known.shape[1])).reshape(len(known), -1)
    return {name: score_similarity(similarity, convention=name).reward for name in CONVENTIONS}


def _row(short: str, score: IdentityScore | None, faces: Faces, count: int, others: dict[str, float]) -> list[str]:
    """A picture's line of the table."""
    missing = score.matching.unmatched_references if score else ()
    cells = ["-" if r in missing or not score else f"{score.per_reference[r]:.3f}" for r in range(count)]
    extra = str(len(score.matching.unmatched_faces)) if score else "?"
    reward = f"{score.reward:.3f}" if score else "?"
    return [
        short,
        reward,
        str(len(faces.boxes)),
        *cells,
        str(len(missing)),
        extra,
        *(f"{v:.3f}" for v in others.values()),
    ]


def _scorer(arguments: argparse.Namespace) -> Any:
    """The identity scorer that the options describe."""
    from id_reward.backends.faces import get_face_backend
    from id_reward.identity import IdentityScorer

    options = checked_options(arguments)
    return IdentityScorer(
        get_face_backend(arguments.backend, **{k: options[k] for k in FACES if options[k] is not None}),
        convention=arguments.convention,
        several_faces="error" if arguments.one_face else "largest",
        no_face="error",
        **{name: options[name] for name in PENALTIES},
    )


def run_score(arguments: argparse.Namespace) -> int:
    """The command ``score``; what it warns of comes after its result."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        _score(arguments)
    if not arguments.quiet:
        for text in dict.fromkeys(str(w.message) for w in caught):
            print(f"warning: {text}", file=sys.stderr)
    return 0


def _score(arguments: argparse.Namespace) -> None:
    from id_reward.images import open_image

    shorts, names = short_names(arguments.pictures), short_names(arguments.reference)
    if arguments.annotate == "" or arguments.json == "":
        raise InputError(
            "--annotate and --json must name a place, got an empty name; --json alone writes to standard output"
        )
    sheets = [Path(arguments.annotate) / f"{short}.png" for short in shorts] if arguments.annotate else []
    inputs = list(dict.fromkeys([*arguments.reference, *arguments.pictures]))
    check_targets(arguments.json if arguments.json != "-" else None, sheets, inputs)
    for path in inputs:
        open_image(path)  # everything can be read, or nothing is scored and nothing is left out silently
    scorer = _scorer(arguments)
    known, labels = scorer.embed_references(arguments.reference), distinct(arguments.reference)
    records, rows = [], []
    progress = not arguments.quiet and len(arguments.pictures) > 1
    for number, (path, short) in enumerate(zip(arguments.pictures, shorts), 1):
        if progress:
            print(f"\rscoring {number} of {len(arguments.pictures)} ...", end="", file=sys.stderr, flush=True)
        ((score, faces),) = scorer.inspect([path], [arguments.reference])
        others = _all_conventions(known, faces) if arguments.all_conventions else {}
        records.append(as_record(path, score, faces, labels, others))
        rows.append(_row(short, score, faces, len(names), others))
        if arguments.annotate:
            from id_reward.annotate import annotate, png

            write_atomically(sheets[number - 1], png(annotate(path, faces, score, arguments.reference, names)))
    if progress:
        print("\r\033[K", end="", file=sys.stderr, flush=True)
    content = {"references": arguments.reference, "convention": arguments.convention, "pictures": records}
    if arguments.json == "-":
        print(json.dumps(content, indent=1))
        return
    if arguments.json:
        write_atomically(Path(arguments.json), json.dumps(content, indent=1).encode())
    others_shown = list(CONVENTIONS) if arguments.all_conventions else []
    print(table([["picture", "reward", "faces", *names, "missing", "extra", *others_shown], *rows]))
    if arguments.annotate:
        print(f"annotated pictures in {arguments.annotate}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; what a user gave wrongly ends with one sentence and exit code 2, a mistake in the code with its traceback."""
    arguments = parser().parse_args(argv)
    try:
        code: int = arguments.run(arguments)
        return code
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        return 130
    except (InputError, ImportError, OSError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
