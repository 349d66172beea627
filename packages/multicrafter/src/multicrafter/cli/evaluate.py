"""``multicrafter evaluate``: on the drawn world, or with ``--pictures`` pictures of any model."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from pathlib import Path
from typing import Any

from multicrafter import UserError, user_input
from multicrafter.cli.options import (
    add_command,
    apart,
    binding,
    ours,
    picture_size,
    positive,
    real,
    separation_options,
    writable,
)

logger = logging.getLogger(__name__)


def evaluate(arguments: argparse.Namespace) -> int:
    """Metrics on unseen identities; with --pictures, of any model's pictures."""
    if arguments.pictures is not None:
        return score(arguments)
    from multicrafter.files import write_json
    from multicrafter.pipeline import MultiCrafterPipeline
    from multicrafter.scoring.evaluate import METRICS, EvaluateConfig, WorldJudges, cases, summarise, table
    from multicrafter.scoring.evaluate import evaluate as run
    from multicrafter.world import judges

    if arguments.out is not None:
        writable(arguments.out, file=True)
        ours(arguments.out, "summary", "what", "cases")
    loaded = MultiCrafterPipeline.from_pretrained(arguments.model, adapter=arguments.adapter)
    if arguments.finder not in ("auto", "people"):
        raise UserError(f"--finder must be people on the drawn world, got {arguments.finder}")
    size = arguments.size or loaded.size
    shape = None if isinstance(size, int) else size
    config = EvaluateConfig(
        num_cases=arguments.cases, num_references=arguments.references or loaded.max_references, seed=arguments.seed,
        num_sampling_steps=arguments.steps or loaded.num_steps, guidance=loaded.guidance if arguments.guidance is None else arguments.guidance,
        separation=binding(arguments, loaded.notes), size=loaded.size if shape is not None else size, shape=shape,
        reference_size=loaded.reference_size, references_per_subject=arguments.references_per_subject,
    )  # fmt: skip
    metrics, _ = run(loaded.model, cases(loaded.model, config), WorldJudges.load(), config)
    summary = summarise(metrics)
    print(table({str(arguments.adapter or "base"): summary}))
    for judge, measured in judges.accuracy().items():
        print(f"judge {judge}: " + ", ".join(f"{k} {v:.3f}" for k, v in measured.items()))
    if arguments.out is not None:
        write_json(
            arguments.out, {"summary": summary, "what": METRICS, "cases": {k: v.tolist() for k, v in metrics.items()}}
        )
        print(f"written to {arguments.out}")
    return 0


def score(arguments: argparse.Namespace) -> int:
    """Pictures of any model, scored against a manifest."""
    from multicrafter.files import write_whole
    from multicrafter.pages import interval
    from multicrafter.scoring.judges import JudgeConfig, Judges
    from multicrafter.scoring.manifest import find_cases, read_prompts
    from multicrafter.scoring.pages import run_page
    from multicrafter.scoring.score import score as run

    if arguments.manifest is None or arguments.out is None:
        raise UserError("--pictures needs --manifest FILE and --out FOLDER")
    if arguments.out.suffix or (arguments.out.exists() and not arguments.out.is_dir()):
        raise UserError(f"--out must be a folder for scores.json and report.html, got {str(arguments.out)!r}")
    writable(arguments.out, file=False)
    apart(arguments.out / "scores.json", arguments.manifest)
    ours(arguments.out / "scores.json", "schema", "about", "cases")
    if os.path.lexists(arguments.out / "report.html") and not (arguments.out / "scores.json").exists():
        raise UserError(f"--out would overwrite {arguments.out / 'report.html'}, which this command did not write")
    kind, prompts = read_prompts(arguments.manifest, format=arguments.format, root=arguments.root)
    found = find_cases(prompts, arguments.pictures, format=kind)
    if found.missing and not arguments.allow_missing:
        raise UserError(
            f"--pictures must answer every prompt, but {len(found.missing)} of {len(prompts)} have no picture "
            f"({', '.join(found.missing[:5])}); say --allow-missing to leave them out"
        )
    config = JudgeConfig(
        faces=arguments.faces,
        clip=arguments.clip,
        dino=arguments.dino,
        aesthetics=arguments.aesthetics,
        vlm=arguments.vlm,
    )
    with user_input():
        judges = Judges(config)
    arguments.out.mkdir(parents=True, exist_ok=True)
    scores = run(found, judges, name=arguments.name or arguments.pictures.resolve().name, progress=sys.stderr.isatty())
    for name, e in scores.summary().items():
        mean, ends, _ = interval(e.mean, e.low, e.high)
        print(f"{name:16} {mean} {ends}  {e.cases} pictures, {e.groups} prompts")
    for problem in scores.problems[:10]:
        logger.info(f"note: {problem}")
    if scores.missing:
        logger.info(f"note: {len(scores.missing)} pictures are missing")
    print(
        f"written to {scores.save(arguments.out / 'scores.json')} and {write_whole(arguments.out / 'report.html', run_page(scores))}"
    )
    return 0


def add_scoring(evaluate: argparse.ArgumentParser) -> None:
    """Adds the options for pictures of any model to ``evaluate``, which calls `score` where --pictures is given."""
    group = evaluate.add_argument_group(
        "pictures of any model", "with --pictures nothing is generated; --out is then a folder"
    )
    group.add_argument(
        "--pictures",
        type=Path,
        metavar="FOLDER",
        help="pictures named after the manifest's keys: KEY.png or KEY_0.png, ...",
    )
    group.add_argument(
        "--manifest", type=Path, metavar="FILE", help="our manifest, or the prompt list of a published benchmark"
    )
    group.add_argument(
        "--format", default="auto", choices=("auto", "native", "xverse", "multihuman", "multiid", "omnicontext")
    )
    group.add_argument(
        "--root", type=Path, help="folder that the manifest's paths are relative to; default: the manifest's"
    )
    group.add_argument("--name", help="of this run; default: the folder's name")
    group.add_argument("--faces", default="dlib", help="dlib, insightface, tiny, none, ...")
    group.add_argument("--clip", help="folder of a CLIP (transformers), or tiny")
    group.add_argument("--dino", help="folder of a DINO or DINOv2 (transformers)")
    group.add_argument("--aesthetics", default="closed_form", help="closed_form, hps:PATH, none")
    group.add_argument("--vlm", help="folder of a vision-language model (transformers) that judges as OmniContext does")
    group.add_argument(
        "--allow-missing", action="store_true", help="score although prompts have no picture; they are listed"
    )


def add_parser(commands: Any) -> None:
    """Adds ``evaluate`` to the command line."""
    sub = add_command(commands, "evaluate", evaluate)
    sub.set_defaults(seed=1000)
    sub.add_argument("--adapter", type=Path)
    sub.add_argument("--cases", type=positive, default=128)
    sub.add_argument(
        "--references", type=int, choices=(1, 2, 3, 4), help="people of a case; default: as the adapter was trained for"
    )
    sub.add_argument(
        "--references-per-subject", type=positive, default=1, metavar="N", help="references of each person; default: 1"
    )
    sub.add_argument(
        "--size", type=picture_size, metavar="SIDE|HEIGHTxWIDTH",
        help="of the pictures in pixels; default: the square that the adapter was trained at",
    )  # fmt: skip
    sub.add_argument("--out", type=Path, help="JSON")
    sub.add_argument("--steps", type=positive, help="default: what the adapter says, else 20")
    sub.add_argument(
        "--guidance", type=real, help="embedded guidance; default: what the adapter says, else the backbone's"
    )
    separation_options(sub)
    add_scoring(sub)
