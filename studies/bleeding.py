"""Why do attributes bleed? Which attention carries them, and what each remedy captures of what perfect separation would give."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from idar import SUBJECT_ARROWS
from multicrafter.config.settings import from_dict
from multicrafter.models.binding import LOOK_UNTIL, BindingConfig
from multicrafter.scoring.evaluate import EvaluateConfig, bootstrap
from multicrafter.training.pretrain import SeparationConfig
from multicrafter.training.runs import with_execution
from multicrafter.training.scenes import draw_scenes
from multicrafter.world import FAMILIES

from studies.lab.experiment import Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, by_case, cell, markdown_table, mean_over_seeds, save_plot

NAMES = ("attributes", "identity", "swaps", "swaps_by_chance", "count", "setting")
GUIDANCE = 3.5
WAYS: dict[str, BindingConfig | None] = {
    "as it is": None,
    "true masks": BindingConfig(mode="masks"),
    "bound by its own draft": BindingConfig(mode="draft"),
    "bound in flight": BindingConfig(mode="in-flight"),
}
"""How a trained model draws; the second one knows what nobody knows, and is the most that separation can give."""
WAYS_AGAIN: dict[str, BindingConfig] = {
    "bound in flight, looking again": BindingConfig.chosen("in-flight"),
    "bound by its own draft, looking again": BindingConfig(mode="draft", look_until=LOOK_UNTIL),
}
"""The same, and places are looked for again while the picture becomes clearer."""

MEDIATION: dict[str, BindingConfig] = {
    "image to reference": BindingConfig(mode="masks", arrows=("image_to_reference",)),
    "reference to image": BindingConfig(mode="masks", arrows=("reference_to_image",)),
    "reference to reference": BindingConfig(mode="masks", arrows=("reference_to_reference",)),
    "image to image, between people": BindingConfig(mode="masks", arrows=("image_to_image",)),
    "text to reference": BindingConfig(mode="masks", arrows=("text_to_reference",)),
    "all that joins references": BindingConfig(mode="masks"),
    "all, and image to image": BindingConfig(mode="masks", arrows=(*SUBJECT_ARROWS, "image_to_image")),
    "only in double-stream blocks": BindingConfig(mode="masks", blocks="double"),
    "only in single-stream blocks": BindingConfig(mode="masks", blocks="single"),
    "only above noise level .8": BindingConfig(mode="masks", sigmas=(0.8, 1.0)),
    "only from .5 to .8": BindingConfig(mode="masks", sigmas=(0.5, 0.8)),
    "only below .5": BindingConfig(mode="masks", sigmas=(0.0, 0.5)),
}
"""What is forbidden, in a plain LoRA that was never trained that way: so a fall of the swaps is what that attention caused."""

DOSES = (0.5, 0.9, 0.99)
PLAIN, APART, LOSS, ROUTED = "plain LoRA", "mask dropout", "attention loss", "routed by attention"
CAUSES = "plain LoRA, one kind of attention forbidden"
THREE = {PLAIN: "plain LoRA, three people", APART: "mask dropout, three people"}
OTHER_NUMBERS = {PLAIN: "plain LoRA, other numbers of people", APART: "mask dropout, other numbers of people"}
AGAIN = {PLAIN: "plain LoRA, looking again", APART: "mask dropout, looking again"}
THREE_AGAIN = {APART: "mask dropout, three people, looking again"}
NUMBERS = (1, 3, 4)
"""Of people in a picture that a model drawn from training on two has never seen."""


def tests(test: EvaluateConfig, *ways: BindingConfig | None) -> tuple[EvaluateConfig, ...]:
    """The same cases, drawn in several ways."""
    return tuple(replace(test, separation=way) for way in ways)


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """Plain LoRA, the attention loss, mask dropout, and routing by attention; the first and the third on other numbers of people too."""
    found: dict[str, dict[int, Experiment]] = {}
    for seed in budget.seeds:
        plain, apart = (
            with_execution(budget.rows(seed)[n][0], compile_blocks=False) for n in ("baseline", "separation")
        )
        test = budget.test(guidance=GUIDANCE)
        doses = [BindingConfig(mode="masks", strength=dose) for dose in DOSES]
        found.setdefault(PLAIN, {})[seed] = Experiment(pretrain=plain, tests=tests(test, *WAYS.values()))
        causes = tests(test, None, BindingConfig(mode="masks"), *MEDIATION.values(), *doses)
        found.setdefault(CAUSES, {})[seed] = Experiment(pretrain=plain, tests=causes)
        found.setdefault(APART, {})[seed] = Experiment(pretrain=apart, tests=tests(test, *WAYS.values()))
        routed = replace(apart, separation=SeparationConfig(share=1.0, routing=True))
        found.setdefault(ROUTED, {})[seed] = Experiment(
            pretrain=routed, tests=tests(test, BindingConfig(mode="attention"))
        )
        found.setdefault(LOSS, {})[seed] = Experiment(
            pretrain=replace(plain, idar=budget.rows(seed)["idar"][0].idar),
            tests=tests(test, None, BindingConfig(mode="masks")),
        )
        three = replace(test, num_references=3)
        for label, config in ((PLAIN, plain), (APART, apart)):
            again = tests(test, *WAYS_AGAIN.values())
            found.setdefault(AGAIN[label], {})[seed] = Experiment(pretrain=config, tests=again)
        for label, config in ((PLAIN, plain), (APART, apart)):
            found.setdefault(THREE[label], {})[seed] = Experiment(
                pretrain=replace(config, world=replace(config.world, numbers=(3,))),
                tests=tests(three, None, BindingConfig(mode="draft")),
            )
            others = [replace(test, num_references=n) for n in NUMBERS]
            found.setdefault(OTHER_NUMBERS[label], {})[seed] = Experiment(
                pretrain=config, tests=tuple(t for o in others for t in tests(o, None, BindingConfig(mode="draft")))
            )
        found.setdefault(THREE_AGAIN[APART], {})[seed] = Experiment(
            pretrain=replace(apart, world=replace(apart.world, numbers=(3,))), tests=tests(three, *WAYS_AGAIN.values())
        )
    return found


def _means(by: dict[int, Record], labels: list[str]) -> dict[str, Any]:
    """Metrics by way of drawing, swaps above chance, and drafts in which everybody was found."""
    count = min(len(record["tests"]) for record in by.values())
    return {
        label: {n: mean_over_seeds(by, n, i) for n in NAMES}
        | {"above": bootstrap(by_case(by, "swaps", i) - by_case(by, "swaps_by_chance", i))}
        | (
            {"found": mean_over_seeds(by, "found", i)}
            if "found" in next(iter(by.values()))["tests"][i]["metrics"]
            else {}
        )
        for i, label in enumerate(labels[:count])
    }


def differing_attributes(test: EvaluateConfig) -> np.ndarray:
    """In how many attributes, visible in both, the first two people of each case differ, (n,)."""
    family = FAMILIES[test.family]
    truth = torch.cat([scenes.identities for scenes, _ in draw_scenes(test.world(), test.num_cases, seed=test.seed)])
    one, other = truth[:, 0], truth[:, 1]
    return np.asarray(((one != other) & family.visible(one) & family.visible(other)).sum(1))


def _by_likeness(records: dict[str, dict[int, Record]], test: EvaluateConfig) -> dict[str, Any]:
    """The plain LoRA as it is and mask dropout bound by its draft, on the more alike half of the pairs and on the other."""
    apart = differing_attributes(test)
    middle = float(np.median(apart))
    halves = {
        f"alike: differ in at most {middle:.0f} attributes": apart <= middle,
        f"unlike: differ in more than {middle:.0f}": apart > middle,
    }
    chosen = {(PLAIN, "as it is"): 0, (APART, "bound by its own draft"): 2}
    found: dict[str, Any] = {}
    for half, rows in halves.items():
        for (label, way), index in chosen.items():
            by = records[label]
            above = by_case(by, "swaps", index) - by_case(by, "swaps_by_chance", index)
            found.setdefault(half, {})[f"{label}, {way}"] = {
                "pairs": int(rows.sum()),
                "attributes": bootstrap(by_case(by, "attributes", index)[rows]),
                "identity": bootstrap(by_case(by, "identity", index)[rows]),
                "above": bootstrap(above[rows]),
            }
    return found


def _explained(by: dict[int, Record], index: int, oracle: int = 1) -> dict[str, float]:
    """Share of the swaps above chance that goes when something is forbidden, 1 being what perfect separation takes away: of all models, and the least and
    the most that it is in one of them.
    """

    def share(of: dict[int, Record]) -> float:
        own, best, here = (
            float(np.nanmean(by_case(of, "swaps", i) - by_case(of, "swaps_by_chance", i))) for i in (0, oracle, index)
        )
        return (own - here) / (own - best)

    each = [share({seed: record}) for seed, record in by.items()]
    return {"share": share(by), "least": min(each), "most": max(each)}


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """Means of every model in every way of drawing; what each attention explains; what each remedy captures."""
    ways = list(WAYS)
    found: dict[str, Any] = {"models": {}, "three": {}, "numbers": {}}
    for label, by in records.items():
        if base := _base_of(label, AGAIN):
            found["models"].setdefault(base, {}).update(_means(by, list(WAYS_AGAIN)))
        elif base := _base_of(label, THREE_AGAIN):
            found["three"].setdefault(THREE[base], {}).update(_means(by, list(WAYS_AGAIN)))
        elif label in THREE.values():
            found["three"].setdefault(label, {}).update(_means(by, ["as it is", "bound by its own draft"]))
        elif label in OTHER_NUMBERS.values():
            way = ("as it is", "bound by its own draft")
            found["numbers"][label] = _means(by, [f"{n} in the picture, {w}" for n in NUMBERS for w in way])
        elif label == ROUTED:
            found["models"][label] = _means(by, ["routed by its attention"])
        elif label != CAUSES:
            found["models"].setdefault(label, {}).update(_means(by, ways))
    if causes := records.get(CAUSES):
        labels = [*MEDIATION, *(f"weighed down to {1 - dose:.2f}" for dose in DOSES)]
        means = _means(causes, ["as it is", "true masks", *labels])
        found["causes"] = {label: means[label] | _explained(causes, 2 + i) for i, label in enumerate(labels)}
        found["causes_seeds"] = len(causes)
    if PLAIN in records and APART in records:
        seeds = records[PLAIN].keys() & records[APART].keys()
        pairs = {label: {s: records[label][s] for s in seeds} for label in (PLAIN, APART)}
        if seeds:
            gain = {way: _paired(pairs, i, "attributes") for i, way in enumerate(ways)}
            if again := {s: r for s, r in records.get(AGAIN[APART], {}).items() if s in seeds}:
                both = {PLAIN: {s: records[PLAIN][s] for s in again}, APART: again}
                gain |= {way: _paired(both, i, "attributes") for i, way in enumerate(WAYS_AGAIN)}
            found["gain"] = gain
            recorded = next(iter(pairs[PLAIN].values()))["experiment"]["tests"][0]
            found["likeness"] = _by_likeness(pairs, from_dict(EvaluateConfig, recorded))
            oracle = gain["true masks"]["mean"]
            found["captured"] = {way: g["mean"] / oracle if oracle > 0 else None for way, g in gain.items()}
    if AGAIN[APART] in records and APART in records:
        seeds = records[AGAIN[APART]].keys() & records[APART].keys()
        once, again = ({s: records[label][s] for s in seeds} for label in (APART, AGAIN[APART]))
        found["again"] = {
            way: bootstrap(by_case(again, "attributes", i) - by_case(once, "attributes", ways.index(before)))
            for i, (way, before) in enumerate(
                zip(WAYS_AGAIN, ("bound in flight", "bound by its own draft"), strict=True)
            )
            if seeds
        }
    if all(label in records for label in THREE.values()):
        first, second = (records[label] for label in THREE.values())
        seeds = first.keys() & second.keys()
        pairs = {PLAIN: {s: first[s] for s in seeds}, APART: {s: second[s] for s in seeds}}
        if seeds:
            found["gain_three"] = {n: _paired(pairs, 1, n) for n in ("attributes", "count")}
    return found


def _base_of(label: str, further: dict[str, str]) -> str | None:
    """The model that a label shows drawn in further ways."""
    return next((base for base, name in further.items() if name == label), None)


def _paired(pairs: dict[str, dict[int, Record]], index: int, name: str) -> dict[str, float]:
    """Mask dropout, drawn in some way, minus the plain LoRA as it is, case by case."""
    interval = bootstrap(by_case(pairs[APART], name, index) - by_case(pairs[PLAIN], name, 0))
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


HEAD = ("", "", *NAMES, "swaps above chance")
MEANING = """Attention is *separated* when the image tokens of one subject cannot look at the other subject's reference, nor the other way round, references not at each other, and tokens of nobody at no reference. *Bound* means that the model's own draft of three steps says who stands where: a detector finds subjects in it, and a match by identity says who is who. *In flight* reads the same from the picture that the model predicts after its first step, and draws no draft; *looking again* repeats that at every noise level down to .7. The reader of truth only scores."""


def model_rows(models: dict[str, Any]) -> list[list[str]]:
    """Every model in every way of drawing, under `HEAD`."""
    return [
        [label if i == 0 else "", way, *(cell(m.get(n)) for n in NAMES), cell(m["above"], "+.3f")]
        for label, by in models.items()
        for i, (way, m) in enumerate(by.items())
    ]


def gains(content: dict[str, Any]) -> str:
    """What mask dropout gives in every way of drawing, and the share of what the oracle gives."""
    captured = content.get("captured", {})
    shares = {way: "" if share is None else f"{share:.2f}" for way, share in captured.items()}
    rows = [[way, cell(g, "+.3f"), shares[way]] for way, g in content.get("gain", {}).items()]
    return markdown_table(["drawn", "attributes, minus plain LoRA as it is", "share of the oracle's gain"], rows)


def likeness(content: dict[str, Any]) -> str:
    """Alike and unlike pairs."""
    rows = [
        [half if i == 0 else "", label, str(m["pairs"]), cell(m["attributes"]), cell(m["identity"]), cell(m["above"], "+.3f")]
        for half, by in content.get("likeness", {}).items()
        for i, (label, m) in enumerate(by.items())
    ]  # fmt: skip
    return markdown_table(["pairs", "model", "number of pairs", "attributes", "identity", "swaps above chance"], rows)


def costs(num_steps: int) -> str:
    """Passes of the model and looks of the detector that a picture takes, by way of drawing."""
    sigmas = [1 - step / num_steps for step in range(num_steps + 1)]
    rows = []
    for way, config in (WAYS | WAYS_AGAIN).items():
        config = config or BindingConfig()
        draft = config.mode == "draft"
        passes = num_steps + draft * config.draft_steps
        looks = draft + len(config.steps_of_looks(sigmas))
        rows.append([way, str(passes), f"{passes / num_steps:.2f}", str(looks)])
    return markdown_table(["drawn", "passes of the model", "over those without", "looks of the detector"], rows)


def page(content: dict[str, Any], folder: Path) -> str:
    """The answer first, then the figure, then tables."""
    causes = [
        [
            label,
            cell(m["swaps"]),
            cell(m["attributes"]),
            cell(m["identity"]),
            f"{m['share']:.2f} [{m['least']:.2f}, {m['most']:.2f}]",
        ]
        for label, m in content.get("causes", {}).items()
    ]
    figure(content, folder / "bleeding.png")
    again = "".join(
        f" Mask dropout {way}: {cell(g, '+.3f')} of the attributes more than looking once."
        for way, g in content.get("again", {}).items()
    )
    three = ""
    if "gain_three" in content:
        g = content["gain_three"]
        three = (
            f"Mask dropout, bound by its own draft, minus the plain LoRA as it is: attributes {cell(g['attributes'], '+.3f')}, "
            f"pictures with everyone {cell(g['count'], '+.3f')}."
        )
    return f"""Two people in one picture exchange hats and hair. This page asks which attention carries them over, and how much of that can be stopped without anybody drawing a layout. {MEANING}

![What each remedy captures, and which attention carries attributes](bleeding.png)

## Models and ways of drawing

All models are trained for the demo's 320 steps. "True masks" is an oracle that nobody has.

{markdown_table(HEAD, model_rows(content["models"]))}

## What mask dropout gives over a plain LoRA

Attributes, case by case, and the share of what the oracle gives.

{gains(content)}
{again}

## What it costs

A look decodes one picture and runs the detector once. A pass with separated attention takes 1.04 times as long as one without ([measured](../packages/idar.md#what-it-costs)).

{costs(content["budget"]["sampling_steps"])}

## Which attention carries attributes

A plain LoRA, never trained with separation; each row forbids one kind of attention by the true masks. The last column is the share of the swaps above chance that goes, and in brackets the least and the most that it is in one of the {content.get("causes_seeds", 0)} trained models.

{markdown_table(["forbidden", "swaps", "attributes", "identity", "share of the bleeding"], causes)}

## People who look alike, and people who do not

The same pairs as above, parted by how many visible attributes the two differ in.

{likeness(content)}

## Three people

Trained on three people and drawn with three.

{markdown_table(HEAD, model_rows(content["three"]))}

{three}

## Numbers of people that the training did not show

Trained on two people.

{markdown_table(HEAD, model_rows(content["numbers"]))}"""


def figure(content: dict[str, Any], path: Path) -> None:
    """Left: attributes and swaps above chance, a colour a model and a mark a way of drawing. Right, if it is known: share of the bleeding that each attention carries."""
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

    causes = content.get("causes", {})
    made = Figure(figsize=(11 if causes else 6.5, 5.4), layout="constrained")
    left, *rest = made.subplots(1, 2 if causes else 1, squeeze=False)[0]
    marks = dict(zip((*WAYS, *WAYS_AGAIN), "o*D^vP", strict=True))
    colours = {PLAIN: "tab:gray", LOSS: "tab:orange", APART: "tab:blue", ROUTED: "tab:green"}
    for label, by in content["models"].items():
        for way, m in by.items():
            x, y = m["above"], m["attributes"]
            left.errorbar(
                x["mean"], y["mean"], xerr=[[x["mean"] - x["low"]], [x["high"] - x["mean"]]],
                yerr=[[y["mean"] - y["low"]], [y["high"] - y["mean"]]], marker=marks.get(way, "s"), markersize=9,
                color=colours.get(label, "k"), capsize=2, linestyle="none",
            )  # fmt: skip
    left.axvline(0, color="0.7", linestyle=":")
    left.set_xlabel("attributes of the other subject, above chance")
    left.set_ylabel("right attributes")
    ways = dict.fromkeys(way for by in content["models"].values() for way in by)
    shown = [
        Line2D([], [], linestyle="none", marker="o", color=colours.get(k, "k"), label=k) for k in content["models"]
    ]
    shown += [Line2D([], [], linestyle="none", marker=marks.get(way, "s"), color="0.3", label=way) for way in ways]
    left.legend(handles=shown, fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2, frameon=False)
    for right in rest:
        names = [name for name in reversed(causes) if not name.startswith("weighed")]
        shares = np.array([causes[name]["share"] for name in names])
        ends = np.array([[causes[name][end] for name in names] for end in ("least", "most")])
        right.barh(names, shares, xerr=abs(ends - shares), color="tab:red", ecolor="0.3", capsize=2)
        right.axvline(0, color="0.3", linewidth=0.8)
        right.axvline(1, color="0.7", linestyle=":")
        right.set_xlabel(
            "share of the bleeding that goes when\nit is forbidden (whiskers: the least and\nthe most of a model)"
        )
        right.tick_params(labelsize=8)
    save_plot(made, path)


STUDY = Study(name="bleeding", title="Why do attributes bleed?", arms=arms, summarise=summarise, page=page)

if __name__ == "__main__":
    sys.exit(main(STUDY))
