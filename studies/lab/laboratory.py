"""What the studies share: an experiment is trained and measured once, whoever asks for it, and its record is kept with the code.

    python -m studies.<study>                   all of it; what is recorded already is not done again
    python -m studies.<study> --seeds 0 1       these seeds
    python -m studies.<study> --arms "+ IDAR"   these arms
    python -m studies.<study> --minutes 120     starts nothing new after that time
    python -m studies.<study> --page            only the page and its plots, from the records
    python -m studies.<study> --smoke           in miniature, into runs/science-smoke

A record is named after what decides it: base, both stages, tests. So a study goes on where it was interrupted, on another machine too, several processes share the
work, and studies share runs. Records lie in ``studies/results``, in the table of the study that made them (`studies.lab.records`), a study's page in
``docs/results/<study>.md``.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch
from multicrafter.config.settings import to_dict
from multicrafter.files import json_text, write_json, write_whole
from multicrafter.models.adapters import fingerprint
from multicrafter.models.finding import IdentityFinder
from multicrafter.models.loading import load_flux
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, draw_cases, score_pictures
from multicrafter.training.pretrain import measure_leakages
from multicrafter.training.runs import run_align, run_pretrain
from multicrafter.training.scenes import EncodedScenes, encode_scenes
from multicrafter.world import FAMILIES
from multicrafter.world import judges as shipped_judges
from multicrafter.world.judges.train import RECIPES
from multicrafter.world.rewards import tiny_reward
from multicrafter.world.train_base import BaseConfig, train

from benchmarks.run import ROOT, circumstances
from studies.lab import poses, probes, results_index
from studies.lab.experiment import FULL, SMOKE, Base, Budget, Experiment, deciding, key_of
from studies.lab.records import OTHERS, RUNS, TABLES, Records, read_rows
from studies.lab.report import Record

DIGITS = 4
COPIES = 256
"""Sets of more cases do not record poses: they would be most of the file."""
JUDGES = {"reader": (9.0, "reader.json"), "people": (7.0, "people.json"), "clip": (3.0, "clip/training.json")}
"""Minutes each is trained, as the shipped ones were, and the file that says it is done."""


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question.

    Attributes:
        name: Of the module, the table and the page.
        title: Of the page.
        arms: Experiments by label, one per seed.
        summarise: Records by label (of the seeds that are done) to what the page shows, as JSON.
        page: The summary as Markdown; plots go into the folder it is given.
        seeds: Of training, that it takes when nobody says which.
    """

    name: str
    title: str
    arms: Callable[[Budget], dict[str, dict[int, Experiment]]]
    summarise: Callable[[dict[str, dict[int, Record]]], dict[str, Any]]
    page: Callable[[dict[str, Any], Path], str]
    seeds: int = 5

    def planned(self, budget: Budget) -> Budget:
        """A budget with the seeds that this study takes."""
        return replace(budget, seeds=budget.seeds[: self.seeds])

    def asked(self, budget: Budget, recorded: Mapping[str, Mapping[int, Record]]) -> dict[str, list[int]]:
        """Seeds of every label that it takes, and those that are recorded beyond."""
        takes = set(self.planned(budget).seeds)
        return {k: sorted(takes & set(by) | set(recorded.get(k, ()))) for k, by in self.arms(budget).items()}


@dataclass
class Laboratory:
    """Where runs, records and results lie; keeps what several experiments need in memory.

    Attributes:
        patience: Seconds to wait for what another process is making; -1 is as long as it takes.
    """

    runs: Path
    records: Records
    pages: Path
    pose_steps: int = poses.STEPS
    judge_share: float = 1.0
    patience: float = -1
    _scenes: dict[str, EncodedScenes] = field(default_factory=dict)
    _prints: dict[Base, str] = field(default_factory=dict)
    _judges: dict[str, WorldJudges] = field(default_factory=dict)

    @classmethod
    def full(cls) -> Laboratory:
        """Records and pages are part of the repository."""
        return cls(RUNS, Records(TABLES, RUNS / "records.lock"), ROOT / "docs" / "results")

    @classmethod
    def within(cls, folder: Path) -> Laboratory:
        """Everything in one folder."""
        runs = folder / "runs"
        records = Records(folder / "records", runs / "records.lock")
        return cls(runs, records, folder / "pages", pose_steps=2, judge_share=0.001)

    def alone(self, path: Path) -> filelock.BaseFileLock:
        """Keeps other processes from making ``path``; raises `filelock.Timeout` if one of them is at it after ``patience``."""
        return filelock.FileLock(path.with_suffix(".lock"), timeout=self.patience)

    # what an experiment is made of

    def judges_folder(self, family: str) -> Path:
        """Weights of a family's judges: shipped for people, trained by the same recipes, once, for others."""
        if family == "people":
            return shipped_judges.shipped()
        folder = self.runs / "judges" / family
        folder.mkdir(parents=True, exist_ok=True)
        with self.alone(folder), torch.enable_grad():  # who measures may be the first to ask
            for seed, (name, (minutes, done)) in enumerate(JUDGES.items()):
                if not (folder / done).is_file():
                    RECIPES[name](folder, minutes=minutes * self.judge_share, seed=seed, family=FAMILIES[family])
        return folder

    def judges(self, family: str) -> WorldJudges:
        """Readers and judges of a family."""
        if family not in self._judges:
            self._judges[family] = WorldJudges.load(self.judges_folder(family))
        return self._judges[family]

    def base_folder(self, base: Base) -> Path:
        """Where a base that does not ship lies."""
        return self.runs / "bases" / key_of(to_dict(base))

    def base(self, base: Base) -> Path | None:
        """Folder of a base, trained first if need be; None is the one that ships."""
        if base.minutes is None:
            return None
        folder = self.base_folder(base)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with self.alone(folder):
            if not (folder / "training.json").is_file():
                config = BaseConfig(
                    family=base.family,
                    minutes=base.minutes,
                    num_heads=base.num_heads,
                    batch=32,
                    lr_matrix=2e-3,
                    **({"reference_share": 0.0, "guidance_max": 1.0} if base.text_only else {"reference_share": 0.9}),
                    compile_blocks=base.minutes > 5,
                )
                unfinished = folder.with_name(f"{folder.name}.unfinished")  # what is saved on the way is not the base
                train(shipped_vae(), unfinished, config)
                unfinished.replace(folder)
        return folder

    def fingerprint(self, base: Base) -> str:
        """Of the weights that ship; bases that are trained here are known by their recipe."""
        if base not in self._prints:
            self._prints[base] = fingerprint(load_flux(None).transformer) if base.minutes is None else "recipe"
        return self._prints[base]

    def key(self, experiment: Experiment) -> str:
        """Name of an experiment's record."""
        return key_of([self.fingerprint(experiment.base), deciding(to_dict(experiment))])

    def scenes(self, pipe: Any, base: Base, world: Any, count: int, seed: int) -> list[EncodedScenes]:
        """Encoded scenes, one bucket per number of subjects; drawn once a process."""
        found = []
        for number in world.numbers:
            one = replace(world, numbers=(number,), weights=())
            name = key_of([to_dict(base), to_dict(one), count, seed])
            if name not in self._scenes:
                self._scenes[name] = encode_scenes(pipe, one, max(1, count // len(world.numbers)), seed=seed)
            found.append(self._scenes[name])
        return found

    # doing it

    def stage1_folder(self, experiment: Experiment) -> Path:
        """Where an experiment's first stage lies."""
        decides = [to_dict(experiment.base), deciding(to_dict(experiment.pretrain))]
        return self.runs / key_of([self.fingerprint(experiment.base), *decides])

    def stage1(self, experiment: Experiment) -> Path:
        """Adapter of an experiment's first stage, trained if it is not there; stage 2 of several experiments may start from one."""
        config = experiment.pretrain
        assert config is not None
        folder = self.stage1_folder(experiment)
        with self.alone(folder):
            if not (folder / "adapter" / "adapter.json").is_file():
                pipe = load_flux(self.base(experiment.base))
                scenes = self.scenes(pipe, experiment.base, config.world, config.num_scenes, config.data_seed)
                if config.execution.compile_blocks:
                    torch._dynamo.config.automatic_dynamic_shapes = False
                run_pretrain(pipe, config, folder, scenes=scenes, resume=folder.exists())
        return folder

    def perform(self, experiment: Experiment) -> Record:
        """Trains and measures."""
        seconds, clock = {}, time.monotonic()
        curves: dict[str, list[dict[str, float]]] = {}
        base = self.base(experiment.base)
        if experiment.pretrain is None:
            loaded = MultiCrafterPipeline.from_pretrained(base)
        else:
            folder = self.stage1(experiment)
            curves["stage 1"] = _thin([json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()])
            loaded = MultiCrafterPipeline.from_pretrained(base, adapter=folder / "adapter")
        seconds["stage 1"] = time.monotonic() - clock
        if experiment.align is not None:
            assert experiment.pretrain is not None
            clock = time.monotonic()
            number = max(experiment.pretrain.world.numbers)
            out = self.runs / f"{self.key(experiment)}_stage2"
            reward = tiny_reward(experiment.align.reward, folder=self.judges_folder(experiment.base.family))
            options = {"num_references": number, "family": experiment.base.family, "reward": reward}
            curves["stage 2"] = run_align(
                loaded.model, loaded.adapters, experiment.align, out, resume=out.exists(), **options
            )
            seconds["stage 2"] = time.monotonic() - clock
        clock = time.monotonic()
        tests = [self.measure(loaded, experiment.base, test) for test in experiment.tests]
        seconds["tests"] = time.monotonic() - clock
        return {
            "experiment": to_dict(experiment),
            "base": self.fingerprint(experiment.base),
            "base_training": base and json.loads((base / "training.json").read_text()),
            "judges": shipped_judges.accuracy(self.judges_folder(experiment.base.family)),
            "seconds": seconds,
            "curves": curves,
            "tests": tests,
            **circumstances(),
        }

    @torch.no_grad()
    def measure(self, loaded: MultiCrafterPipeline, base: Base, test: EvaluateConfig) -> dict[str, Any]:
        """All metrics by case, pose against reference, and routing where there are experts."""
        model, family = loaded.model, self.judges(test.family)
        (scenes,) = self.scenes(model, base, test.world(), test.num_cases, test.seed)
        drawn = draw_cases(model, scenes, test, finder=IdentityFinder(backend=family.people))
        pictures, plain = drawn.pictures, test.separation is None
        judged = scenes if test.size == 64 else _shrunk(scenes)
        pictures = _shrink(pictures, 64)
        metrics = score_pictures(pictures, judged, family, family=test.family)
        reward = tiny_reward(folder=self.judges_folder(test.family))
        metrics["reward"] = reward(list(pictures), judged.captions, [list(x) for x in judged.reference_images]).totals
        if test.separation is not None and test.separation.mode in ("draft", "in-flight"):
            metrics["found"] = drawn.complete.double().numpy()
        if test.num_references > 1 and plain:
            groups = {"leakage": None, "leakage_single": probes.is_single}
            seed = test.seed + 2
            leaks = measure_leakages(model, scenes, groups, direction="image_to_reference", seed=seed)
            metrics |= {name: value.numpy() for name, value in leaks.items()}
        found: dict[str, Any] = {"metrics": {k: np.round(v.astype(float), DIGITS).tolist() for k, v in metrics.items()}}
        if plain and test.family == "people" and test.split == "test" and test.num_cases <= COPIES:
            reader = poses.reader_at(self.runs / "poses.safetensors", family, steps=self.pose_steps)
            found["copies"] = poses.copy_scores(pictures, judged, family, reader)._asdict()
        if plain and loaded.adapters is not None and loaded.adapters.experts is not None:
            found["routing"] = probes.routing(loaded, scenes, seed=test.seed + 3)
        return found

    def record(self, experiment: Experiment, study: str = OTHERS) -> Record | None:
        """The record of an experiment, made if need be, for the table of ``study``; None if another process is at it, or at what it starts from, for longer
        than ``patience``.
        """
        key = self.key(experiment)
        made = self.runs / f"{key}.json"
        self.runs.mkdir(parents=True, exist_ok=True)
        try:
            with self.alone(self.runs / key):
                if self.records.get(key) is None:
                    if not made.is_file():  # it is there if a process died before the next line
                        write_json(made, self.perform(experiment))
                    self.records.add(study, read_rows(made))
                    made.unlink()
        except filelock.Timeout:
            return None
        return self.records.get(key)

    def known(self, experiment: Experiment) -> Record | None:
        """The record of an experiment, if there is one."""
        return self.records.get(self.key(experiment))

    def recorded(self, study: Study, budget: Budget) -> dict[str, dict[int, Record]]:
        """Records of a study by label and seed, of the labels that have any."""
        arms = study.arms(budget)
        found = {
            label: {seed: r for seed, e in seeds.items() if (r := self.known(e)) is not None}
            for label, seeds in arms.items()
        }
        return {label: by for label, by in found.items() if by}

    def summary(self, study: Study, budget: Budget) -> dict[str, Any] | None:
        """What the page of a study shows, from its records; None where nothing is recorded."""
        records = self.recorded(study, budget)
        if not records:
            return None
        everything = [r for by in records.values() for r in by.values()]
        content = {
            "study": study.name,
            "done": {label: sorted(by) for label, by in records.items()},
            "planned": study.asked(budget, records),
            "commits": sorted({r["commit"][:10] for r in everything}),
            "versions": everything[-1]["versions"],
            "devices": sorted({r["device"] for r in everything}),
            "minutes": sum(sum(r["seconds"].values()) for r in everything) / 60,
            "judges": next((r["judges"] for r in everything if "judges" in r), shipped_judges.accuracy()),
            "budget": to_dict(budget),
            **study.summarise(records),
        }
        return dict(json.loads(json_text(content)))  # keys are text, and what is not finite is None

    def publish(self, study: Study, budget: Budget) -> Path | None:
        """Page and plots of what is recorded; None where nothing is."""
        content = self.summary(study, budget)
        if content is None:
            return None
        self.pages.mkdir(parents=True, exist_ok=True)
        path = self.pages / f"{study.name}.md"
        write_whole(path, _page(study, content, self.pages))
        results_index.write(self.pages)
        return path


def _shrink(pictures: torch.Tensor, size: int) -> torch.Tensor:
    """Judges know one size; larger pictures are averaged down to it."""
    shape = pictures.shape[:-3]
    small = torch.nn.functional.interpolate(pictures.flatten(0, -4), size=(size, size), mode="area")
    return small.unflatten(0, shape)


def _shrunk(scenes: EncodedScenes) -> EncodedScenes:
    return replace(scenes, images=_shrink(scenes.images, 64), reference_images=_shrink(scenes.reference_images, 32))


def shipped_vae() -> Path:
    """The autoencoder that every base shares."""
    return shipped_judges.shipped().parent / "tiny_flux" / "vae"


def _thin(history: Sequence[dict[str, float]], most: int = 64) -> list[dict[str, float]]:
    """At most ``most`` entries, each the mean of its neighbours."""
    groups = np.array_split(np.arange(len(history)), min(most, len(history)))
    names = [k for k, v in history[0].items() if isinstance(v, (int, float))]
    return [{k: float(np.mean([history[i].get(k, np.nan) for i in g])) for k in names} for g in groups if len(g)]


def _page(study: Study, content: dict[str, Any], folder: Path) -> str:
    planned = sum(len(s) for s in content["planned"].values())
    done = sum(len(s) for s in content["done"].values())
    seeds = sorted({s for by in content["done"].values() for s in by})
    missing = {k: sorted(set(v) - set(content["done"].get(k, []))) for k, v in content["planned"].items()}
    left = "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in missing.items() if v)
    budget = content["budget"]
    return f"""# {study.title}

Generated by `python -m studies.{study.name}` from the records in `studies/results`: {done} of {planned} runs are done (seeds {", ".join(map(str, seeds))}), {content["minutes"]:.0f} minutes
of training and measuring on {", ".join(content["devices"])}; commits {", ".join(content["commits"])}; torch {content["versions"]["torch"]}, diffusers {content["versions"]["diffusers"]}.
{"Not run yet (seeds): " + left + "." if left else ""}

{study.page(content, folder)}

Unless a row says otherwise: {budget["steps"]} steps of stage 1 on {budget["scenes"]} scenes, {budget["iterations"]} iterations of stage 2, {budget["cases"]} cases of unseen identities. Brackets: 95 % bootstrap
intervals over cases, each case averaged over the seeds first; a difference is taken case by case, and is bold where its interval excludes 0.
{_trust(content["judges"])}
"""


def _trust(judges: dict[str, dict[str, float | None]]) -> str:
    """How far the judges can be believed; what the miniature's judges never see has no share."""
    named = {
        "attributes read right": judges["reader"]["attributes"],
        "the same where three or four subjects are": judges["reader"]["attributes_crowd"],
        "subjects counted right": judges["reader"]["count"],
        "the same subject told from another (AUC)": judges["people"]["auc"],
        "a picture's setting told from others (CLIP)": judges["clip"]["setting"],
    }
    shares = ", ".join(f"{what} {'-' if share is None else f'{share:.3f}'}" for what, share in named.items())
    return f"The judges, on pictures of the world with unseen identities: {shares}."


def carry_out(
    study: Study,
    laboratory: Laboratory,
    budget: Budget,
    *,
    seeds: Sequence[int] | None = None,
    until: float | None = None,
    only: Sequence[str] | None = None,
) -> bool:
    """What is missing of a study (of these seeds, else of those it takes), seed by seed, but for what another process is at for longer than the laboratory's
    patience; its page now and then. False if the time ran out.
    """
    seeds = study.planned(budget).seeds if seeds is None else seeds
    arms = study.arms(replace(budget, seeds=tuple(seeds)))
    todo = [(s, label, by[s]) for s in seeds for label, by in arms.items() if s in by and (not only or label in only)]
    published = time.monotonic()
    for seed, label, experiment in todo:
        if laboratory.known(experiment) is not None:
            continue
        if until is not None and time.monotonic() > until:
            laboratory.publish(study, budget)
            return False
        print(f"==> {study.name}: {label}, seed {seed}", flush=True)
        if laboratory.record(experiment, study.name) is None:
            print("    another process is at it", flush=True)
        if time.monotonic() > published + 60:
            laboratory.publish(study, budget)
            published = time.monotonic()
    laboratory.publish(study, budget)
    return True


def check_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    """Exits with 2 where seeds are negative or no time is left to begin with."""
    if wrong := [s for s in options.seeds or () if s < 0]:
        parser.error(f"--seeds must be at least 0, got {', '.join(map(str, wrong))}")
    if options.minutes is not None and not options.minutes > 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")


def main(study: Study, arguments: Sequence[str] | None = None) -> int:
    """Command line of one study."""
    parser = argparse.ArgumentParser(prog=f"python -m studies.{study.name}", description=study.title)
    parser.add_argument("--smoke", action="store_true", help="in miniature, into runs/science-smoke")
    parser.add_argument("--seeds", type=int, nargs="+", help="of training")
    parser.add_argument("--arms", nargs="+", help="labels; all others wait")
    parser.add_argument("--minutes", type=float, help="start nothing new after this time")
    parser.add_argument("--page", action="store_true", help="only the page, from what is recorded")
    options = parser.parse_args(arguments)
    check_options(parser, options)
    budget = SMOKE if options.smoke else FULL
    laboratory = Laboratory.within(ROOT / "runs" / "science-smoke") if options.smoke else Laboratory.full()
    laboratory.patience = 0
    arms = study.arms(budget)
    if unknown := set(options.arms or ()) - set(arms):
        parser.error(f"--arms must name arms of {study.name} ({', '.join(arms)}), got {', '.join(unknown)}")
    until = time.monotonic() + 60 * options.minutes if options.minutes else None
    if not options.page and not carry_out(
        study, laboratory, budget, seeds=options.seeds, until=until, only=options.arms
    ):
        print(f"time is up; the same command goes on with {study.name}")
    path = laboratory.publish(study, budget)
    print(f"page: {path}" if path else f"nothing is recorded for {study.name} yet")
    return 0
