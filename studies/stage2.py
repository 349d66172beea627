"""Which settings of stage 2 have a gradient at all, and does it pay on the adapter that ships?

    python -m studies.stage2 run                       # the adapters that ship, of stage 1 and of stage 2 (seed 0)
    python -m studies.stage2 run ADAPTER --seed 1      # another run of stage 2; some five minutes an adapter on one core
    python -m studies.stage2 page                      # docs/results/stage2.md

Criterion, written before the test split was drawn. All adapters draw the same 512 test cases from the same noise, bound by a draft as they ship
(16 steps, guidance 3.5). The stage-2 adapter ships if the 95 % interval of the difference in the composite reward is above 0, and no interval of
text, aesthetics, attributes, count, setting, identity (by the judge that trained and by the one that did not) lies below 0, nor that of swaps
above. It becomes the default of ``generate`` only if the interval of attributes or of count is above 0 besides: that is what a viewer sees.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from multicrafter.files import write_whole
from multicrafter.models.binding import BindingConfig
from multicrafter.models.finding import IdentityFinder
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import (
    EvaluateConfig,
    WorldJudges,
    cases,
    difference,
    draw_cases,
    score_pictures,
    summarise,
)
from multicrafter.scoring.watcher import drawn_watcher
from multicrafter.world import shipped_adapter
from multicrafter.world.rewards import RewardConfig, tiny_reward

from benchmarks.run import circumstances

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "benchmarks" / "results" / "stage2_cases.parquet"
SIGNAL = ROOT / "benchmarks" / "results" / "stage2_signal.json"
PAGE = ROOT / "docs" / "results" / "stage2.md"
BETTER = ("reward", "text", "aesthetics", "attributes", "count", "setting", "identity", "identity_watched")
WORSE = ("swaps",)
DRAWN = {"bound": BindingConfig(mode="draft"), "attention as it is": None}


def measured(folder: Path, config: EvaluateConfig) -> dict[str, dict[str, np.ndarray]]:
    """Metrics per case of one adapter, by how it is drawn."""
    pipeline = MultiCrafterPipeline.from_pretrained(adapter=folder)
    judges, reward, watcher = WorldJudges.load(), tiny_reward(RewardConfig()), drawn_watcher()
    scenes = cases(pipeline.model, config)
    references = [list(row) for row in scenes.reference_images]
    found = {}
    for name, separation in DRAWN.items():
        drawn = draw_cases(
            pipeline.model, scenes, replace(config, separation=separation), finder=IdentityFinder(backend=judges.people)
        )
        pictures = list(drawn.pictures)
        found[name] = {
            **score_pictures(drawn.pictures, scenes, judges),
            "reward": reward(pictures, scenes.captions, references).totals,
            "identity_watched": watcher(pictures, scenes.captions, references),
        }
    return found


def verdict(differences: dict[str, Any]) -> dict[str, bool]:
    """The criterion, of the differences (stage 2 minus stage 1) that were drawn bound."""
    worse = any(differences[n].high < 0 for n in BETTER) or any(differences[n].low > 0 for n in WORSE)
    ships = differences["reward"].low > 0 and not worse
    return {"ships": ships, "default": ships and max(differences[n].low for n in ("attributes", "count")) > 0}


Metrics = dict[str, np.ndarray]


def label(seed: int | None) -> str:
    """How the table calls an adapter: that of stage 1, or of a run of stage 2."""
    return "stage 1" if seed is None else f"stage 2, seed {seed}"


def read_cases(path: Path, split: str) -> dict[str, dict[str, Metrics]]:
    """What has been measured on a split: metrics per case, by adapter and by how it is drawn."""
    rows = [row for row in pq.read_table(path).to_pylist() if row["split"] == split] if path.exists() else []
    found: dict[str, dict[str, Metrics]] = {}
    for row in rows:
        found.setdefault(row["adapter"], {})[row["drawn"]] = {name: np.asarray(row[name]) for name in (*BETTER, *WORSE)}
    return found


def record_cases(path: Path, split: str, adapter: str, metrics: dict[str, Metrics]) -> None:
    """Adds an adapter's metrics to the table, in place of those that it has."""
    rows = pq.read_table(path).to_pylist() if path.exists() else []
    rows = [row for row in rows if (row["split"], row["adapter"]) != (split, adapter)]
    for drawn, values in metrics.items():
        row = {name: values[name].astype(float).tolist() for name in (*BETTER, *WORSE)}
        rows.append({"split": split, "adapter": adapter, "drawn": drawn, "commit": circumstances()["commit"], **row})
    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, compression="zstd")
    write_whole(path, sink.getvalue())


def over_seeds(measured: dict[str, dict[str, Metrics]], drawn: str) -> Metrics:
    """Metrics per case of stage 2, averaged over its runs: a case is one unit, not one per seed."""
    runs = [ways[drawn] for adapter, ways in measured.items() if adapter != label(None)]
    return {name: np.mean([run[name] for run in runs], 0) for name in runs[0]}


def run(folder: Path, seed: int | None, split: str, num_cases: int, path: Path | None) -> None:
    """One adapter on one split."""
    config = EvaluateConfig(split=split, num_cases=num_cases, num_sampling_steps=16, guidance=3.5)  # type: ignore[arg-type]
    found = measured(folder, config)
    print(f"== {label(seed)}: {folder}")
    for drawn, metrics in found.items():
        means = ", ".join(f"{name} {np.nanmean(metrics[name]):.3f}" for name in (*BETTER, *WORSE))
        print(f"{drawn}: {means}")
    if path is not None:
        record_cases(path, split, label(seed), found)


def compare(split: str) -> dict[str, Any]:
    """Stage 2 over its seeds against stage 1, by how they are drawn, with the verdict; nothing without both."""
    known = read_cases(CASES, split)
    if label(None) not in known or len(known) < 2:
        return {}
    content: dict[str, Any] = {"split": split, "seeds": sorted(a for a in known if a != label(None))}
    for drawn in DRAWN:
        before, after = known[label(None)][drawn], over_seeds(known, drawn)
        content["cases"] = len(before["reward"])
        content[drawn] = {
            "stage 1": {k: v._asdict() for k, v in summarise(before).items()},
            "stage 2": {k: v._asdict() for k, v in summarise(after).items()},
            "difference": {k: v._asdict() for k, v in difference(after, before).items()},
            "by seed": {
                adapter: {k: v._asdict() for k, v in difference(ways[drawn], before).items()}
                for adapter, ways in sorted(known.items())
                if adapter != label(None)
            },
        }
        if drawn == "bound":
            content["verdict"] = verdict(difference(after, before))
    return content


def signal_table(arms: dict[str, Any], wanted: tuple[str, ...]) -> str:
    """Cosines at a batch of 256, a row an objective with its advantages, a column an arm."""
    head = ["objective; advantages", *(f"{name} ({arm['samples']})" for name, arm in arms.items())]
    rows = []
    for label in wanted:
        cells = [
            f"{r['cosine']:.2f} ± {r['error']:.2f}" if (r := arm["readings"].get(label)) else ""
            for arm in arms.values()
        ]
        if any(cells):
            rows.append([label, *cells])
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def spread_table(arms: dict[str, Any]) -> str:
    """Spread inside groups."""
    names = ("reward", "multi_id", "text", "aesthetics", "attributes", "count")
    head = ["arm", *names]
    rows = [[name, *(f"{arm['spread'][n]:.3f}" for n in names)] for name, arm in arms.items()]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, ["---"] * len(head), *rows])


VERDICT = {
    "no": "By the criterion that was written down before this test it does not ship, and stage 1 stays what is drawn with.",
    "beside": "By the criterion that was written down before this test it ships, beside the one of stage 1. What a viewer sees, attributes and "
    "the number of people, has not changed beyond chance.",
    "default": "By the criterion that was written down before this test it ships, and `generate` draws with it.",
}


def outcome(content: dict[str, Any]) -> str:
    """How it was trained, the criterion's word, and differences on the test split, drawn bound and not."""
    verdict, seeds = content["verdict"], len(content["seeds"])
    runs = "one training run" if seeds == 1 else f"{seeds} training runs, each case averaged over them"
    parts = [f"{TRAINED}\n\n{VERDICT['default' if verdict['default'] else 'beside' if verdict['ships'] else 'no']}"]
    for name in DRAWN:
        rows = [
            f"| {metric} | {content[name]['stage 1'][metric]['mean']:.2f} | {content[name]['stage 2'][metric]['mean']:.2f} | {_signed(d)} |"
            for metric in (*BETTER, *WORSE)
            if (d := content[name]["difference"][metric])
        ]
        parts.append(
            f"Drawn {name}, {content['cases']} cases, {runs}:\n\n| | stage 1 | stage 2 | difference |\n| --- | --- | --- | --- |\n"
            + "\n".join(rows)
        )
    shown = ("reward", "text", "aesthetics", "attributes", "count", "identity_watched", "swaps")
    rows = [
        f"| {adapter} | " + " | ".join(_signed(each[metric]) for metric in shown) + " |"
        for adapter, each in content["bound"]["by seed"].items()
    ]
    if seeds > 1:
        head = "| | " + " | ".join(shown) + " |\n|" + " --- |" * (len(shown) + 1)
        parts.append("Every run by itself, drawn bound, minus stage 1:\n\n" + "\n".join([head, *rows]))
    return "\n\n".join(parts)


def _signed(interval: dict[str, float]) -> str:
    """A difference with its interval."""
    return f"{interval['mean']:+.3f} [{interval['low']:+.3f}, {interval['high']:+.3f}]"


RATIO = tuple(
    f"ratio; {ways}"
    for ways in (
        "weighted sum normalised", "weighted sum, batch's spread", "one by one, weights 1 : .5 : 2", "one by one, equal weights",
        "text alone", "aesthetics alone", "multi_id alone", "true attributes alone (oracle)",
        "identity, sum of subjects on all tokens", "identity by subject, sum elsewhere", "identity by subject, nothing elsewhere",
    )
)  # fmt: skip
FORWARD = tuple(
    f"{objective}; {ways}"
    for objective in (
        "AWM, weighting none", "AWM, weighting sigma", "AWM, weighting sigma^2", "NFT (at the old policy), self-normalized",
    )
    for ways in ("weighted sum normalised", "one by one, weights 1 : .5 : 2", "one by one, equal weights")
)  # fmt: skip
CHOSEN, BEST = "bound, window 0-1", "ratio; one by one, weights 1 : .5 : 2"


def write_page() -> int:
    """docs/results/stage2.md from what has been recorded."""
    content = json.loads(SIGNAL.read_text())
    arms = content["arms"]
    best, plain = (
        arms[CHOSEN]["readings"][f"ratio; {ways}"] for ways in (BEST.removeprefix("ratio; "), "weighted sum normalised")
    )
    by_subject, together, oracle = (
        arms[CHOSEN]["readings"][f"ratio; {name}"]
        for name in (
            "identity by subject, sum elsewhere",
            "identity, sum of subjects on all tokens",
            "true attributes alone (oracle)",
        )
    )
    spread = arms[CHOSEN]["spread"]
    at = {b: (x := best["cosine"] / (1 - best["cosine"]) * b / 256) / (1 + x) for b in (64, 128)}
    tested = compare("test")
    result = outcome(tested) if tested else NOT_TRAINED
    text = f"""# Does stage 2 have a gradient?

Generated by `python -m studies.stage2 page` from `benchmarks/results/stage2_signal.json` and `stage2_cases.parquet`. How to read a cosine: [Is there a signal?](../guides/signal.md)

Two independent batches give two gradients, and their cosine says how much of each is signal. As the recipe was, with a window that slides over all steps, attention as it is and the sum of rewards normalised, two batches of 64 pictures had a cosine of .015 ± .040 (issue 22). Nothing can be learnt from that.

Here the adapter that ships draws groups of eight pictures on the validation split. Every picture gives the gradient of its own log-ratio, and the inner products of all of them are kept. A batch's gradient is a sum of these, weighed by the advantages. So every way to make advantages is read off the same pictures, and groups are independent samples for the error.

## What has a signal

Cosine of two batches of 256 pictures with its standard error (jackknife over groups). The number of pictures measured is in brackets.

{signal_table(arms, RATIO)}

The recipe is the column "{CHOSEN}" with rewards normalised one by one: {best["cosine"]:.2f} ± {best["error"]:.2f} at 256 pictures, hence {at[128]:.2f} at the recipe's 128 and {at[64]:.2f} at 64. A cosine of .1 takes {best["samples_for_tenth"]:.0f} pictures. With the weighted sum normalised it is {plain["cosine"]:.2f} ± {plain["error"]:.2f}.

- **Rewards one by one.** In a group identity (times 2) has a spread of {2 * spread["multi_id"]:.3f}, text {spread["text"]:.3f}, aesthetics (times .5) {0.5 * spread["aesthetics"]:.3f}. Summed first, the advantage is identity. Text and aesthetics have gradients of their own, and aesthetics the clearest of all.
- **Credit by subject shows no signal.** Each subject's tokens, weighed by its own identity alone, give {by_subject["cosine"]:.2f} ± {by_subject["error"]:.2f}; the sum of both on all tokens gives {together["cosine"]:.2f} ± {together["error"]:.2f}. These are the first steps, in which it is decided who stands where, and a box that is found afterwards may be the wrong place to look for the cause.
- **True attributes**, which no reward sees, have no gradient that these pictures could show ({oracle["cosine"]:.2f} ± {oracle["error"]:.2f}).

## Spread inside groups

What the trained steps do not change, they cannot learn. Standard deviation inside groups that share what the arm's column says:

{spread_table(arms)}
{forward_section(arms)}
## Did it pay?

{result}

## Batches, and what an hour buys

The recipe draws 16 groups of 8. Larger batches need no more memory: rollouts and updates go in micro-batches, so that raising `prompts` is accumulation. A picture costs seven function evaluations and a share of its group's draft, and the update two passes with gradients.{hour(arms)}

Measured at {content["commit"][:10]}, torch {content["versions"]["torch"]}, {content["device"]}, {content["threads"]} thread.
"""
    write_whole(PAGE, text)
    return 0


TRAINED = """A run has 80 iterations of 128 pictures and starts from the adapter of stage 1 that ships. Its peak learning rate is 1e-3, three times the recipe's, because the average over ten batches that Adam takes is mostly signal here. The adapter that ships is the run of seed 0; the others say how much of it is chance. A run took 95 minutes on a core that was shared, and 17 to 27 on a faster machine. The commands are

```sh
multicrafter align --recipe tiny_stage2 --adapter packages/multicrafter/src/multicrafter/world/weights/adapters/stage1 --steps 80 --set align.lr=1e-3 --set align.online.seed=1 --out runs/stage2
python -m studies.stage2 run                              # the adapters that ship
python -m studies.stage2 run runs/stage2/adapter --seed 1
```"""

NOT_TRAINED = """No stage-2 adapter ships. The machine on which this was measured was shared by a dozen programs, which left an experiment a tenth of a core: some ten iterations of the recipe in the time that there was, where the trial of issue 22 took eighty for a rise in the composite reward of .041 [-.001, .086] on test cases. An adapter of ten
iterations would show nothing, and the test split was not drawn for it. The criterion by which one will ship is written down in `studies/stage2.py`, before any test: the reward's interval above 0, and nothing worse. The commands are

```sh
multicrafter align --recipe tiny_stage2 --adapter packages/multicrafter/src/multicrafter/world/weights/adapters/stage1 --steps 80 --out runs/stage2
python -m studies.stage2 run runs/stage2/adapter --seed 0
```"""


def hour(arms: dict[str, Any]) -> str:
    """What an hour of one core buys, by the arms that have measured processor time with the recipe's passes."""
    known = [a["seconds"] for n, a in arms.items() if n != CHOSEN and a["arm"]["bound"]]
    if not known:
        return ""
    each = sum(s["draw"] + s["ratio"] for s in known) / len(known)
    return f" With a draft of its own and passed by itself, as here, a picture took {each:.2f} s of processor time: an hour of one core buys {3600 / each:,.0f} pictures, or {3600 / each / 128:.0f} iterations."


def forward_section(arms: dict[str, Any]) -> str:
    """Objectives without a likelihood, if an arm has measured them."""
    known = {name: arm for name, arm in arms.items() if any(label in arm["readings"] for label in FORWARD)}
    if not known:
        return ""
    seconds = {name: arm["seconds"] for name, arm in known.items()}
    cost = "; ".join(f"{n}: {s['matching'] / s['ratio']:.1f} times the ratio's" for n, s in seconds.items())
    return f"""
## Without a likelihood

DiffusionNFT and advantage-weighted matching learn from finished pictures, each at four noise levels; at the old policy the gradient of both is an advantage-weighted matching loss. Their passes with gradients took ({cost}).

{signal_table(known, FORWARD)}
"""


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.stage2", description=__doc__.partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("run")
    one.add_argument("adapter", type=Path, nargs="?", help="of stage 2; default: those of both stages that ship")
    one.add_argument("--seed", type=int, help="of its training")
    one.add_argument("--split", choices=("validation", "test"), default="test")
    one.add_argument("--cases", type=int, default=512)
    one.add_argument("--dry", action="store_true", help="print only")
    commands.add_parser("page")
    given = parser.parse_args(arguments)
    if given.command == "page":
        return write_page()
    if (given.adapter is None) != (given.seed is None):
        parser.error("an adapter of one's own takes --seed, those that ship take none")
    torch.set_num_threads(1)
    chosen = [(given.adapter, given.seed)] if given.adapter else [(shipped_adapter(), None), (shipped_adapter(2), 0)]
    for folder, seed in chosen:
        run(folder, seed, given.split, given.cases, None if given.dry else CASES)
    return 0


if __name__ == "__main__":
    sys.exit(main())
