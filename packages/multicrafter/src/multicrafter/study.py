"""The ablation over seeds: every row on the same scenes, steps, cases and noise, compared case by case with the baseline."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from multicrafter.evaluate import METRICS, Interval, Judges, bootstrap, cases, evaluate, summarise, write_json
from multicrafter.pipeline import load_flux
from multicrafter.recipes import ablation
from multicrafter.stages.data import encode_scenes
from multicrafter.stages.runs import run_align, run_pretrain

SHOWN = ("attributes", "identity", "swaps", "leakage", "count", "text")


def run_row(
    row: str, seed: int, out: Path, *, steps: int, num_scenes: int, num_cases: int, model: str | None = None
) -> dict[str, Any]:
    """Trains and evaluates one row with one seed into ``out/<row>_<seed>``; a finished one is read back."""
    folder = out / f"{row}_{seed}"
    path = folder / "cases.json"
    if path.is_file():
        return dict(json.loads(path.read_text()))
    recipe = ablation(seed=seed)[row]
    config = replace(recipe.pretrain, num_steps=steps, num_scenes=num_scenes, seed=seed)
    pipe = load_flux(model)
    adapters = run_pretrain(
        pipe,
        config,
        folder,
        scenes=encode_scenes(pipe, config.world, num_scenes, seed=config.data_seed),
        resume=folder.exists(),
    )
    if recipe.align is not None:
        run_align(pipe, adapters, recipe.align, folder / "stage2", num_references=config.world.numbers[0])
    test = replace(recipe.evaluate, num_cases=num_cases)
    metrics, _ = evaluate(pipe, cases(pipe, test), Judges.load(), test)
    write_json(path, {name: values.tolist() for name, values in metrics.items()})
    return dict(json.loads(path.read_text()))


def compare(rows: dict[int, dict[str, Any]], baseline: dict[int, dict[str, Any]]) -> dict[str, Interval]:
    """``row - baseline`` by case, averaged over the seeds both have, then bootstrapped over cases: a case is one unit, not one per seed."""
    seeds = sorted(rows.keys() & baseline.keys())
    result = {}
    for name in rows[seeds[0]]:
        differences = [np.array(rows[s][name], np.float64) - np.array(baseline[s][name], np.float64) for s in seeds]
        result[name] = bootstrap(np.mean(differences, 0))
    return result


def run_study(
    out: Path,
    rows: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int,
    num_scenes: int,
    num_cases: int,
    model: str | None = None,
) -> dict[str, Any]:
    """All rows with all seeds; writes ``out/study.json`` after every one, so that an interrupted study goes on."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    results: dict[str, Any] = {}
    for seed in seeds:
        for row in rows:
            print(f"==> {row}, seed {seed}", flush=True)
            done = run_row(row, seed, out, steps=steps, num_scenes=num_scenes, num_cases=num_cases, model=model)
            found.setdefault(row, {})[seed] = done
            results = {
                "commit": _commit(),
                "torch": torch.__version__,
                "settings": {
                    "rows": list(rows),
                    "seeds": list(seeds),
                    "steps": steps,
                    "scenes": num_scenes,
                    "cases": num_cases,
                    "model": model,
                },
                "rows": {
                    r: {str(s): summarise({k: np.array(v, np.float64) for k, v in m.items()}) for s, m in by.items()}
                    for r, by in found.items()
                },
                "minus_baseline": {
                    r: {
                        "all seeds": compare(by, found["baseline"]),
                        **{
                            f"seed {s}": compare({s: m}, found["baseline"])
                            for s, m in by.items()
                            if s in found["baseline"]
                        },
                    }
                    for r, by in found.items()
                    if r != "baseline" and "baseline" in found and by.keys() & found["baseline"].keys()
                },
            }
            write_json(out / "study.json", results)
    return results


def as_markdown(results: dict[str, Any]) -> str:
    """The study's differences as a table."""
    lines = ["| row - baseline | seeds | " + " | ".join(SHOWN) + " |", "|---" * (len(SHOWN) + 2) + "|"]
    for row, groups in results["minus_baseline"].items():
        for group, metrics in groups.items():
            cells = [_cell(metrics.get(n), "+.3f") for n in SHOWN]
            lines.append(f"| {row} | {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _cell(interval: Sequence[float] | None, form: str) -> str:
    """``mean [low, high]``; bold where the interval of a difference excludes 0."""
    if interval is None:
        return ""
    mean, low, high = interval[:3]
    text = f"{mean:{form}} [{low:{form}}, {high:{form}}]"
    return f"**{text}**" if "+" in form and (low > 0 or high < 0) else text


def as_page(results: dict[str, Any]) -> str:
    """A page of the documentation, every figure of it from ``results``: means by row and seed, then paired differences."""
    settings = results["settings"]
    rows = ["| row | seed | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for row, seeds in results["rows"].items():
        for seed, metrics in seeds.items():
            rows.append(f"| {row} | {seed} | " + " | ".join(_cell(metrics.get(n), ".3f") for n in METRICS) + " |")
    command = (
        f"multicrafter ablation --out runs/ablation --rows {' '.join(settings['rows'])} --seeds {' '.join(map(str, settings['seeds']))} "
        f"--steps {settings['steps']} --scenes {settings['scenes']} --cases {settings['cases']} --page docs/results/ablation.md"
    )
    meaning = "\n".join(f"- **{name}**: {text}" for name, text in METRICS.items())
    return f"""# Ablation in the tiny world

Generated from `study.json` by

    {command}

{settings["cases"]} scenes with two look-alikes of the test split (identities that neither the base nor stage 1 has
seen), the same scenes, noise and training data for every row and seed; {settings["steps"]} steps of stage 1.
Brackets: 95 % bootstrap intervals over the cases. Commit {results["commit"]}, torch {results["torch"]}.

## Minus the baseline, case by case

A case is one unit: its differences are averaged over the seeds first. Bold: the interval excludes 0.

{as_markdown(results)}

## Means

{chr(10).join(rows)}

{meaning}
"""


def write_page(path: Path, results: dict[str, Any]) -> None:
    """Writes `as_page` through a temporary name."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(as_page(results))
    os.replace(temporary, path)


def _commit() -> str:
    """Commit of the checkout this runs from, or 'unknown'."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
