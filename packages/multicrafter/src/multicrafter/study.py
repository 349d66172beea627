"""The ablation over seeds: every row on the same scenes, steps, cases and noise, compared case by case with the baseline."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from multicrafter.evaluate import Interval, Judges, bootstrap, cases, evaluate, summarise, write_json
from multicrafter.pipeline import load_flux
from multicrafter.recipes import ablation
from multicrafter.stages.data import encode_scenes
from multicrafter.stages.runs import run_align, run_pretrain


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
    names = ("attributes", "identity", "swaps", "leakage", "count", "text")
    lines = ["| row - baseline | seeds | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row, groups in results["minus_baseline"].items():
        for group, metrics in groups.items():
            cells = [
                f"{m.mean:+.3f} [{m.low:+.3f}, {m.high:+.3f}]" if (m := metrics.get(n)) is not None else ""
                for n in names
            ]
            lines.append(f"| {row} | {group} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
