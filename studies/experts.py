"""Do experts specialise? Load and mutual information of the expert with token kind, subject, arrangement and sigma, against shuffled labels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np

from studies import ablation
from studies.lab.experiment import Budget, Experiment
from studies.lab.laboratory import Study, main
from studies.lab.report import Record, markdown_table, save_plot

QUESTIONS = ("token kind", "subject", "arrangement", "sigma")


def arms(budget: Budget) -> dict[str, dict[int, Experiment]]:
    """The mixtures of the ablation, after stage 1 and after stage 2: no run of their own."""
    rows = ablation.arms(budget)
    return {label: rows[label] for label in (ablation.LABELS["moe"], ablation.LABELS["ippo"])}


def summarise(records: dict[str, dict[int, Record]]) -> dict[str, Any]:
    """By row, layer and question: information in nats, as a share of the label's entropy, by chance, and p-values of all seeds."""
    found: dict[str, Any] = {}
    for label, by in records.items():
        routing = {seed: r["tests"][0]["routing"] for seed, r in by.items()}
        first = next(iter(routing.values()))
        layers = {}
        for layer in first["layers"]:
            information = {}
            for question in QUESTIONS:
                scores = [r["layers"][layer]["information"].get(question) for r in routing.values()]
                scores = [s for s in scores if s is not None]
                if scores:
                    information[question] = {
                        **{k: float(np.mean([s[k] for s in scores])) for k in ("nats", "share", "chance")},
                        "p_values": [s["p_value"] for s in scores],
                    }
            load = np.mean([_shares(r["layers"][layer]["load"]) for r in routing.values()], 0)
            busiest = [float(_shares(np.sum(r["layers"][layer]["load"], 0)[None]).max()) for r in routing.values()]
            layers[layer] = {
                "information": information,
                "load_of_one_seed": _shares(first["layers"][layer]["load"]).tolist(),
                "busiest_expert": busiest,
                "mean_load": load.tolist(),
            }
        found[label] = {"kinds": first["kinds"], "layers": layers}
    return {"rows": found}


def _shares(counts: Any) -> np.ndarray:
    counts = np.asarray(counts, float)
    return counts / np.maximum(counts.sum(1, keepdims=True), 1)


def page(content: dict[str, Any], folder: Path) -> str:
    """One table per row of the ablation, and a picture of the load."""
    parts = [
        """A router knows a label if the mutual information between expert and label is larger than when labels are shuffled: token kinds and subjects between (scene, kind) cells, arrangements and sigmas between
scenes. "Share" is the information over the label's entropy: 1 would be an expert per label. Tokens of a scene are alike, so shuffling whole scenes is the honest null."""
    ]
    for number, (label, row) in enumerate(content["rows"].items()):
        table = []
        for layer, found in row["layers"].items():
            cells = []
            for question in QUESTIONS:
                score = found["information"].get(question)
                if score is None:
                    cells.append("-")
                    continue
                significant = max(score["p_values"]) <= 0.05
                text = f"{score['share']:.3f} ({score['nats']:.4f} nats, chance {score['chance']:.4f})"
                cells.append(f"**{text}**" if significant else text)
            busiest = found["busiest_expert"]
            table.append([f"`{layer}`", f"{np.mean(busiest):.2f}", *cells])
        name = f"experts_{number}.png"
        _picture(row, folder / name)
        parts.append(
            f"""## {label}

Share of the label's entropy that the expert tells; bold where shuffles reach it in at most 5 % of the cases in every seed.

{markdown_table(["layer", "load of the busiest expert (even: .25)", *QUESTIONS], table)}

![share of each token kind's tokens that each expert gets, one seed]({name})"""
        )
    return "\n\n".join(parts)


def _picture(row: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    layers = row["layers"]
    figure = Figure(figsize=(12, 2.1 * -(-len(layers) // 4)), layout="constrained")
    axes = figure.subplots(-(-len(layers) // 4), 4, squeeze=False).flatten()
    for axis, (layer, found) in zip(axes, layers.items(), strict=False):
        load = np.array(found["load_of_one_seed"])
        axis.imshow(np.where(load.sum(1, keepdims=True) > 0, load, np.nan), vmin=0, vmax=1, cmap="Blues", aspect="auto")
        axis.set_title(layer.replace("transformer_blocks", "blocks"), fontsize=8)
        axis.set_yticks(range(len(row["kinds"])), row["kinds"], fontsize=7)
        axis.set_xticks(range(load.shape[1]))
        axis.tick_params(labelsize=7)
    for axis in axes[len(layers) :]:
        axis.axis("off")
    save_plot(figure, path)


STUDY = Study(name="experts", title="Do experts specialise?", arms=arms, summarise=summarise, page=page)

if __name__ == "__main__":
    sys.exit(main(STUDY))
