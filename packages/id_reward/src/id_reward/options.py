"""Options that the commands share: how faces are found, and how they are counted."""

from __future__ import annotations

import argparse
from typing import Any

from id_reward.alignment import CONVENTIONS, check_options
from id_reward.errors import InputError

FACES = ("model", "threshold", "reference_threshold")
PENALTIES = ("missing_penalty", "extra_penalty", "off_pair_penalty", "min_similarity")


def identity_options(command: argparse.ArgumentParser) -> None:
    """Options that both commands have: how faces are found, and how they are counted."""
    add = command.add_argument
    add("--backend", default="auto", choices=["auto", "dlib", "insightface", "torch"], help="face backend")
    add("--model", metavar="DIR", help="insightface: folder of .onnx files or name of a pack")
    add("--threshold", type=float, metavar="X", help="detector score from which a face counts")
    add(
        "--reference-threshold",
        type=float,
        metavar="X",
        help="the same in a reference where nothing reaches --threshold",
    )
    add("--convention", default="multicrafter", choices=CONVENTIONS, help="how rewards are counted")
    add("--missing-penalty", type=float, default=0.0, metavar="X", help="for a reference without a face")
    add("--extra-penalty", type=float, default=0.0, metavar="X", help="for a face without a reference")
    add("--off-pair-penalty", type=float, default=0.0, metavar="X", help="for faces that blend several references")
    add("--min-similarity", type=float, default=0.0, metavar="X", help="cosine from which faces can match")
    add("--debug", action="store_true", help="show where in the code an error comes from")
    add("--quiet", action="store_true", help="no progress and no warnings")


def checked_options(arguments: argparse.Namespace) -> dict[str, Any]:
    """The options of faces and penalties, found to be sound before a model is loaded.

    Raises:
        InputError: One is not.
    """
    if arguments.model and arguments.backend != "insightface":
        raise InputError(f"--model needs --backend insightface, got {arguments.backend}")
    check_options(**{name: getattr(arguments, name) for name in PENALTIES})
    return {name: getattr(arguments, name) for name in (*FACES, *PENALTIES)}
