"""``multicrafter evaluate --pictures``, ``compare`` and ``leaderboard``: everything heavy is imported when a command runs."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any


def score(arguments: argparse.Namespace) -> int:
    """Pictures of any model, scored against a manifest."""
    from multicrafter.photos.write import replace
    from multicrafter.scoring.judges import JudgeConfig, Judges
    from multicrafter.scoring.manifest import find_cases, read_prompts
    from multicrafter.scoring.pages import number, run_page
    from multicrafter.scoring.score import score as run

    if arguments.manifest is None or arguments.out is None:
        raise ValueError("--pictures needs --manifest FILE and --out FOLDER")
    if arguments.out.suffix or (arguments.out.exists() and not arguments.out.is_dir()):
        raise ValueError(f"--out must be a folder for scores.json and report.html, got {str(arguments.out)!r}")
    arguments.out.mkdir(parents=True, exist_ok=True)
    kind, prompts = read_prompts(arguments.manifest, format=arguments.format, root=arguments.root)
    found = find_cases(prompts, arguments.pictures, format=kind)
    if found.missing and not arguments.allow_missing:
        raise ValueError(
            f"--pictures must answer every prompt, but {len(found.missing)} of {len(prompts)} have no picture "
            f"({', '.join(found.missing[:5])}); say --allow-missing to leave them out"
        )
    judges = Judges(
        JudgeConfig(
            faces=arguments.faces,
            clip=arguments.clip,
            dino=arguments.dino,
            aesthetics=arguments.aesthetics,
            vlm=arguments.vlm,
        )
    )
    scores = run(found, judges, name=arguments.name or arguments.pictures.resolve().name, progress=sys.stderr.isatty())
    for name, e in scores.summary().items():
        print(f"{name:16} {number(e.mean)} [{number(e.low)}, {number(e.high)}]  {e.cases} pictures, {e.groups} prompts")
    for problem in scores.problems[:10]:
        print(f"note: {problem}", file=sys.stderr)
    if scores.missing:
        print(f"note: {len(scores.missing)} pictures are missing", file=sys.stderr)
    print(
        f"written to {scores.save(arguments.out / 'scores.json')} and {replace(arguments.out / 'report.html', run_page(scores))}"
    )
    return 0


def compare(arguments: argparse.Namespace) -> int:
    """Two runs, case by case: intervals and paired tests."""
    from multicrafter.photos.write import replace
    from multicrafter.scoring.leaderboard import compare_runs
    from multicrafter.scoring.pages import compare_page
    from multicrafter.scoring.score import Scores

    a, b = Scores.load(arguments.first), Scores.load(arguments.second)
    result, notes = compare_runs(a, b, strict=not arguments.allow_different_judges)
    for note in notes:
        print(f"note: {note}", file=sys.stderr)
    print(f"{b.name} - {a.name}")
    for name, c in result.items():
        print(
            f"{name:16} {c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]  p {c.p:.4f}, Holm {c.p_corrected:.4f}  {c.cases} pictures"
        )
    if arguments.out is not None:
        if arguments.out.suffix == ".json":
            content = json.dumps(
                {
                    "first": a.name,
                    "second": b.name,
                    "notes": notes,
                    "metrics": {n: c._asdict() for n, c in result.items()},
                },
                indent=1,
            )
        elif arguments.out.suffix == ".html":
            content = compare_page(a, b, result, notes)
        else:
            raise ValueError(f"--out must end in .html or .json, got {str(arguments.out)!r}")
        print(f"written to {replace(arguments.out, content)}")
    return 0


def leaderboard(arguments: argparse.Namespace) -> int:
    """Several runs in one table."""
    from multicrafter.photos.write import replace
    from multicrafter.scoring.leaderboard import as_markdown
    from multicrafter.scoring.leaderboard import leaderboard as make
    from multicrafter.scoring.pages import leaderboard_page
    from multicrafter.scoring.score import Scores

    if arguments.out is not None and arguments.out.suffix not in (".html", ".md"):
        raise ValueError(f"--out must end in .html or .md, got {str(arguments.out)!r}")
    board = make([Scores.load(path) for path in arguments.runs], sort_by=arguments.sort_by, metrics=arguments.metrics)
    text = as_markdown(board)
    print(text, end="")
    for note in board.notes:
        print(f"note: {note}", file=sys.stderr)
    if arguments.out is not None:
        whole = (
            text
            if arguments.out.suffix == ".md"
            else leaderboard_page(arguments.title, board.rows, board.names, board.notes)
        )
        print(f"written to {replace(arguments.out, whole)}")
    return 0


def add_options(evaluate: argparse.ArgumentParser) -> None:
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
    """Adds ``compare`` and ``leaderboard`` to the command line."""
    sub = commands.add_parser("compare", help=compare.__doc__, description=compare.__doc__)
    sub.set_defaults(function=compare)
    sub.add_argument("first", type=Path, help="folder or scores.json of evaluate --pictures")
    sub.add_argument("second", type=Path, help="the same; differences are second minus first")
    sub.add_argument("--out", type=Path, help="page (.html) or figures (.json)")
    sub.add_argument("--allow-different-judges", action="store_true")
    sub = commands.add_parser("leaderboard", help=leaderboard.__doc__, description=leaderboard.__doc__)
    sub.set_defaults(function=leaderboard)
    sub.add_argument("runs", type=Path, nargs="+", help="folders or scores.json of evaluate --pictures")
    sub.add_argument("--out", type=Path, help="page (.html) or table (.md)")
    sub.add_argument("--title", default="Leaderboard")
    sub.add_argument("--sort-by", help="metric")
    sub.add_argument("--metrics", nargs="+", help="columns")
