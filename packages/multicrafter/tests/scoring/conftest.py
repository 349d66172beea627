"""Pictures of drawn people with known identities, scored by the judges that ship."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image


def save(picture, path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()).save(path)


@pytest.fixture(scope="session")
def asked(tmp_path_factory):
    """A folder with manifest.jsonl (six prompts, two people each), their references and targets, and two runs: "right" and "wrong" people."""
    from multicrafter.world import PEOPLE, WorldConfig, make_references, make_scenes

    folder = tmp_path_factory.mktemp("asked")
    generator = torch.Generator().manual_seed(11)
    count = 6
    first = PEOPLE.sample(count, "test", generator)
    second = PEOPLE.sample(count, "test", generator)
    identities = torch.stack([first, second], 1)
    world = WorldConfig(numbers=(2,))
    zeros = torch.zeros(count, dtype=torch.long)
    scenes = {
        "target": make_scenes(count, world, generator, identities=identities, arrangement=zeros + 1),
        "right": make_scenes(count, world, generator, identities=identities, arrangement=zeros + 1),
        "wrong": make_scenes(count, world, generator, identities=identities.roll(1, 0), arrangement=zeros + 1),
    }
    references = make_references(PEOPLE, identities.flatten(0, 1), 64, generator).unflatten(0, (count, 2))
    rows = []
    for i in range(count):
        for name, part in scenes.items():
            save(part.images[i], folder / name / f"{i:02d}.png")
        for j in range(2):
            save(references[i, j], folder / "references" / f"{i}{'ab'[j]}.png")
        boxes = (scenes["right"].boxes[i] / 64).clamp(0, 1).tolist()
        rows.append(
            {
                "key": f"{i:02d}", "prompt": scenes["right"].captions()[i], "target": f"target/{i:02d}.png",
                "category": "even" if i % 2 == 0 else "odd",
                "references": [{"image": f"references/{i}{'ab'[j]}.png", "box": boxes[j]} for j in range(2)],
            }
        )  # fmt: skip
    (folder / "manifest.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    return folder


@pytest.fixture(scope="session")
def scored(asked):
    """Scores of both runs."""
    from multicrafter.scoring.judges import JudgeConfig, Judges
    from multicrafter.scoring.manifest import find_cases, read_prompts
    from multicrafter.scoring.score import score

    judges = Judges(JudgeConfig(faces="tiny", clip="tiny"))
    kind, prompts = read_prompts(asked / "manifest.jsonl")
    return {
        n: score(find_cases(prompts, asked / n, format=kind), judges, name=n, progress=False)
        for n in ("right", "wrong")
    }
