"""Every study: ``python -m studies.all [--smoke] [--minutes 120] [--seeds 0] [--workers 2] [--page]``.

Seed by seed, so that every study has something to show early. What is recorded is not done again: a piece of at most two hours is ``--minutes 100``. Workers are
processes of one thread each; none begins what another is at, and what is left over at the end is waited for.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from multicrafter.files import write_whole

from benchmarks.run import ROOT
from studies import (
    ablation,
    ablation_objects,
    bleeding,
    bleeding_objects,
    claims,
    copy_paste,
    experts,
    inference_overhead,
    ratios,
    regime,
    reward_hacking,
    scaling,
    subjects,
    text_only_base,
)  # fmt: skip
from studies.lab import results_index
from studies.lab.experiment import FULL, SMOKE, Budget
from studies.lab.laboratory import Laboratory, carry_out, check_options
from studies.lab.report import markdown_table

STUDIES = tuple(
    module.STUDY
    for module in (
        ablation,
        bleeding,
        bleeding_objects,
        text_only_base,
        claims,
        experts,
        copy_paste,
        subjects,
        reward_hacking,
        ratios,
        regime,
        scaling,
        ablation_objects,
    )
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.all", description=__doc__)
    parser.add_argument("--smoke", action="store_true", help="in miniature, into runs/science-smoke")
    parser.add_argument("--minutes", type=float, help="start nothing new after this time")
    parser.add_argument("--seeds", type=int, nargs="+")
    parser.add_argument("--page", action="store_true", help="only the pages, from what is recorded")
    parser.add_argument("--workers", type=int, default=2, help="processes that share the work")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)  # one of those: only experiments
    options = parser.parse_args(arguments)
    check_options(parser, options)
    if options.workers < 1:
        parser.error(f"--workers must be at least 1, got {options.workers}")
    budget = SMOKE if options.smoke else FULL
    laboratory = Laboratory.within(ROOT / "runs" / "science-smoke") if options.smoke else Laboratory.full()
    until = time.monotonic() + 60 * options.minutes if options.minutes else None
    if not options.page:
        flags = ["--smoke"] if options.smoke else []
        if not options.worker and (options.smoke or not inference_overhead.RESULTS.is_file()):
            inference_overhead.main(flags)
        shared = options.workers > 1 and not options.worker
        if shared and (code := share(list(sys.argv[1:] if arguments is None else arguments), options.workers)):
            return code
        if not work(laboratory, budget, options.seeds, until):
            print("time is up; the same command goes on")
            return 0
        if options.worker:
            return 0
    for study in STUDIES:
        print(f"{study.name}: {laboratory.publish(study, budget) or 'nothing is recorded yet'}")
    write_whole(laboratory.pages / "science.md", overview(laboratory, budget))
    results_index.write(laboratory.pages)
    return 0


def work(laboratory: Laboratory, budget: Budget, seeds: Sequence[int] | None, until: float | None) -> bool:
    """What is missing, first what no other process is at, then the rest; False if the time ran out."""
    for laboratory.patience in (0, -1):
        for seed in seeds or budget.seeds:
            for study in STUDIES:
                asked = seeds or seed in study.planned(budget).seeds
                if asked and not carry_out(study, laboratory, budget, seeds=(seed,), until=until):
                    return False
    return True


def share(arguments: Sequence[str], workers: int) -> int:
    """The same command in several processes, one thread each; the first exit status that is not 0, or 0."""
    command = [sys.executable, "-m", "studies.all", *arguments, "--worker"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    started = [subprocess.Popen(command, cwd=ROOT, env=environment) for _ in range(workers)]
    return next((code for code in [process.wait() for process in started] if code), 0)


def hours(laboratory: Laboratory, budget: Budget) -> float:
    """Of one process, as recorded: every run of the studies once, and a first stage that several of them start from once."""
    first: dict[str, float] = {}
    rest: dict[str, float] = {}
    for study in STUDIES:
        for by_seed in study.arms(study.planned(budget)).values():
            for experiment in by_seed.values():
                key = laboratory.key(experiment)
                if key in rest or (known := laboratory.known(experiment)) is None:
                    continue
                seconds = dict(known["seconds"])
                shared = key if experiment.pretrain is None else laboratory.stage1_folder(experiment).name
                first[shared] = max(first.get(shared, 0.0), seconds.pop("stage 1"))
                rest[key] = sum(seconds.values())
    return (sum(first.values()) + sum(rest.values())) / 3600


def overview(laboratory: Laboratory, budget: Budget) -> str:
    """The page that leads to the studies."""
    rows = []
    for study in STUDIES:
        recorded = laboratory.recorded(study, budget)
        done, planned = (sum(map(len, by.values())) for by in (recorded, study.asked(budget, recorded)))
        title = f"[{study.title}]({study.name}.md)" if done else study.title
        rows.append([title, f"`python -m studies.{study.name}`", f"{done} of {planned}" if done else "none yet"])
    if inference_overhead.RESULTS.is_file():
        name = inference_overhead.NAME
        rows.append(
            [f"[What experts and references cost at inference]({name}.md)", f"`python -m studies.{name}`", "all"]
        )
    return f"""# Does it reproduce?

Generated by `python -m studies.all --page`. Every study trains and measures the tiny FLUX, where truth is known exactly; each has a command, goes on where it was
interrupted, and writes its page and plots from the table of records that it leaves. `make bench-science` runs what is missing, `make bench-science-smoke` all of it in miniature.
As recorded, these runs take {hours(laboratory, budget):.1f} hours of one process; two share them. A first stage that several runs start from counts once, and so does a base
that was trained for its first run; what was interrupted and done again is not in it.

{markdown_table(["question", "command", "runs done"], rows)}

The guide to adding a study: [docs/guides/studies.md](../guides/studies.md).
"""


if __name__ == "__main__":
    sys.exit(main())
