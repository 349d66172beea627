"""Measures a tiny base and writes its model card: ``python -m multicrafter.demo.base_card FOLDER``."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from multicrafter.files import write_json
from multicrafter.models.loaded import LoadedModel
from multicrafter.pipeline import load_flux
from multicrafter.scoring.evaluate import EvaluateConfig, WorldJudges, cases, generate_cases, score_pictures, summarise

GUIDANCE = 3.5  # what FLUX pipelines sample with by default

CARD = """# Tiny FLUX

A `FluxPipeline` directory of a few million parameters, pre-trained on the drawn world of `multicrafter.world`: text to
image, and ONE reference in context. Several references at once are what stage 1 is for; the base has never seen them.

| | |
|---|---|
| transformer | {transformer:,} parameters, FluxTransformer2DModel, width {width}, {double} double and {single} single blocks |
| autoencoder | {vae:,} parameters, AutoencoderKL, 4x down, {channels} channels |
| picture, reference | 64x64 and 32x32 pixels: 64 and 16 tokens |
| data | procedural, `train` split of the identities; nothing else |
| licence | Apache-2.0, as the code |

## Recipe

    python -m multicrafter.world.train_vae --out vae0 --minutes 6
    python -m multicrafter.world.train_vae --start vae0 --out vae --minutes 7 --batch 8 --lr 1.5e-3 --seed 1
{recipe}

Two cores without a GPU; other work ran beside it. `training.json` has every leg's configuration, samples and losses.

## Measured quality

{cases} scenes with one person of the test split, {steps} Euler steps, read by the reader of truth, which itself reads
{ceiling:.1%} of the attributes of drawn scenes. The last column has the same scenes passed through the autoencoder alone: no base of it
can be read as better than that. 95 % bootstrap intervals. The transformer takes its guidance as an input: 1 is plain flow
matching, what stage 1 trains at; {guidance} is what pictures are drawn with (chosen on the validation split).

| | guidance 1 | guidance {guidance} | drawn scenes through the autoencoder |
|---|---|---|---|
| attributes of the reference | {attributes} |
| number of people as captioned | {count} |
| setting and time as captioned | {setting} |
| cosine with the reference (people judge) | {identity} |

Do not use it for anything but tests and experiments: it knows six places and people with hats.
"""


def measure(folder: Path, *, num_cases: int = 300) -> dict[str, Any]:
    """Single-reference quality on unseen identities, without and with guidance, and the reader's own accuracy on the same scenes."""
    pipe, judges = load_flux(folder), WorldJudges.load()
    config = EvaluateConfig(
        num_cases=num_cases, num_references=1, shared_attributes=0, num_sampling_steps=20, seed=5000
    )
    scenes = cases(pipe, config)
    plain, guided = (
        summarise(score_pictures(generate_cases(pipe, scenes, replace(config, guidance=g)), scenes, judges))
        for g in (1.0, GUIDANCE)
    )
    truth = summarise(score_pictures(scenes.images, scenes, judges))
    with torch.no_grad():
        passed = LoadedModel.of(pipe).decode_pictures(scenes.tokens, scenes.grid)
    return {
        "cases": num_cases,
        "steps": config.num_sampling_steps,
        "guidance": GUIDANCE,
        "plain": plain,
        "model": guided,
        "drawn_scenes": truth,
        "autoencoder": summarise(score_pictures(passed, scenes, judges)),
    }


def write_card(folder: Path, measured: dict[str, Any]) -> Path:
    """Writes ``README.md`` and ``measured.json`` beside the weights."""
    pipe = load_flux(folder)
    legs = json.loads((folder / "training.json").read_text())["legs"]
    recipe = ""
    for number, leg in enumerate(legs):
        config, start = leg["config"], f"--start base{number - 1} " if number else ""
        options = " ".join(
            f"--{k.replace('_', '-')} {config[k]}"
            for k in ("minutes", "batch", "lr", "lr_matrix", "reference_share", "top_weight", "guidance_max", "seed")
            if k in config
        ) + (" --compile-blocks" if config.get("compile_blocks") else "")
        recipe += f"    python -m multicrafter.world.train_base --vae vae {start}--out base{number} {options}\n"

    def cell(name: str) -> str:
        return " | ".join(
            f"{v.mean:.3f} [{v.low:.3f}, {v.high:.3f}]"
            for v in (measured[k][name] for k in ("plain", "model", "autoencoder"))
        )

    config = pipe.transformer.config
    text = CARD.format(
        transformer=sum(p.numel() for p in pipe.transformer.parameters()),
        vae=sum(p.numel() for p in pipe.vae.parameters()),
        width=config.num_attention_heads * config.attention_head_dim,
        double=config.num_layers,
        single=config.num_single_layers,
        channels=pipe.vae.config.latent_channels,
        recipe=recipe.rstrip("\n"),
        cases=measured["cases"],
        steps=measured["steps"],
        guidance=measured["guidance"],
        ceiling=measured["drawn_scenes"]["attributes"].mean,
        **{name: cell(name) for name in ("attributes", "count", "setting", "identity")},
    )
    write_json(folder / "measured.json", measured)
    (folder / "README.md").write_text(text)
    return folder / "README.md"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--cases", type=int, default=300)
    arguments = parser.parse_args()
    print(write_card(arguments.folder, measure(arguments.folder, num_cases=arguments.cases)).read_text())


if __name__ == "__main__":
    main()
