"""A reader of pose, scale and light for drawn people, and how much of them is copied from the references. For evaluation only.

A small convolutional network reads the crop of a person that the reader of truth found; it is trained on drawn people of the train split, softened as generated ones are. What references
show is known exactly. A network that is unsure says the mean, so a perfect copy has about the slope R^2, not 1: every result carries the R^2 on drawn people of the test split.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from id_reward import match
from jaxtyping import Float
from multicrafter.scoring.evaluate import Interval, WorldJudges, bootstrap
from multicrafter.training.scenes import EncodedScenes
from multicrafter.world import FAMILIES, Scenes, WorldConfig, make_scenes
from multicrafter.world.judges.train import soften
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

NAMES = ("lean", "left arm", "right arm", "head turn", "leg spread", "brightness")
CROP = (40, 24)
STEPS = 900


class Copies(NamedTuple):
    """values: name -> "generated" and "reference", one number per person found; reader: name -> R^2 on drawn people."""

    values: dict[str, dict[str, list[float]]]
    reader: dict[str, float]


def build() -> nn.Sequential:
    """An untrained reader of crops (n, 3, 40, 24) -> (n, 6) standardised values."""
    return nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1), nn.SiLU(),
        nn.Conv2d(24, 48, 3, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.SiLU(),
        nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.SiLU(),
        nn.Flatten(), nn.Linear(64 * 5 * 3, 128), nn.SiLU(), nn.Linear(128, len(NAMES)),
    )  # fmt: skip


def crops(pictures: Float[Tensor, "b 3 H W"], row: Tensor, boxes: Float[Tensor, "n 4"]) -> Float[Tensor, "n 3 h w"]:
    """Boxes (left, top, right, bottom in pixels, of picture ``row``) resampled to one size; what lies outside a picture is grey."""
    height, width = pictures.shape[-2:]
    y = (torch.arange(CROP[0]) + 0.5) / CROP[0]
    x = (torch.arange(CROP[1]) + 0.5) / CROP[1]
    at_x = (boxes[:, None, 0] + x * (boxes[:, 2] - boxes[:, 0])[:, None]) / width * 2 - 1
    at_y = (boxes[:, None, 1] + y * (boxes[:, 3] - boxes[:, 1])[:, None]) / height * 2 - 1
    grid = torch.stack(torch.broadcast_tensors(at_x[:, None, :], at_y[:, :, None]), -1)
    return 0.5 + nn.functional.grid_sample(pictures[row] - 0.5, grid, align_corners=False)


def _truth(scenes: Scenes) -> tuple[Tensor, Tensor, Tensor]:
    """Row, boxes and values (n, 6) of all people of some scenes."""
    row, subject = torch.where(scenes.identities[:, :, 0] >= 0)
    brightness = scenes.light.mean(1)[row, None]
    return row, scenes.boxes[row, subject], torch.cat([scenes.poses[row, subject], brightness], 1)


class PoseReader:
    """Reads `NAMES` of people in boxes."""

    def __init__(self, network: nn.Sequential, mean: Tensor, spread: Tensor, quality: dict[str, float]) -> None:
        """Takes a trained network, and how values were standardised."""
        self.network, self.mean, self.spread, self.quality = network.eval(), mean, spread, quality

    @torch.inference_mode()
    def read(self, pictures: Tensor, row: Tensor, boxes: Tensor) -> Float[Tensor, "n 6"]:
        """Values of the people in ``boxes`` of ``pictures[row]``."""
        if not len(boxes):
            return torch.zeros(0, len(NAMES))
        found: Tensor = self.network(crops(pictures, row, boxes)) * self.spread + self.mean
        return found

    @classmethod
    @torch.enable_grad()
    def train(cls, judges: WorldJudges, *, steps: int = STEPS, seed: int = 0) -> PoseReader:
        """Trains on drawn people, and measures R^2 on those of the test split, found by the reader of truth."""
        torch.manual_seed(seed)
        generator, network = torch.Generator().manual_seed(seed), build()
        world = WorldConfig(numbers=(1, 2), shared_attributes=4)
        _, _, values = _truth(make_scenes(500, world, generator))
        mean, spread = values.mean(0), values.std(0)
        optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-3)
        for step in tqdm(range(steps), desc="reader of poses"):
            for group in optimizer.param_groups:
                group["lr"] = 2e-3 * min(1, (step + 1) / 30) * (1 - step / steps)
            scenes = make_scenes(64, world, generator)
            row, boxes, values = _truth(scenes)
            jitter = torch.randn(boxes.shape, generator=generator) * 0.025 * (boxes[:, 3] - boxes[:, 1])[:, None]
            got = network(crops(soften(scenes.images, generator), row, boxes + jitter))
            loss = (got - (values - mean) / spread).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        reader = cls(network, mean, spread, {})
        reader.quality = reader.measure(
            judges, make_scenes(400, WorldConfig(split="test", numbers=(2,), shared_attributes=4), generator)
        )
        return reader

    def measure(self, judges: WorldJudges, scenes: Scenes) -> dict[str, float]:
        """R^2 = 1 - residual / variance, by name, of people that the reader of truth finds in drawn scenes; and of the heights of its boxes."""
        got, want = [], []
        for number, reading in enumerate(judges.reader.read(scenes.images)):
            for subject, face in people(scenes.identities[number], reading.identities):
                box = reading.boxes[face : face + 1]
                values = self.read(scenes.images, torch.tensor([number]), box)[0]
                got.append(torch.cat([values, (box[0, 3] - box[0, 1])[None] / 1.02]))
                truth = [
                    scenes.poses[number, subject],
                    scenes.light[number].mean()[None],
                    scenes.heights[number, subject][None],
                ]
                want.append(torch.cat(truth))
        a, b = torch.stack(got), torch.stack(want)
        r2 = 1 - (a - b).square().mean(0) / b.var(0, correction=0)
        return dict(zip((*NAMES, "height"), r2.tolist(), strict=True))

    def save(self, path: Path) -> None:
        """Writes everything into one file."""
        tensors = {**self.network.state_dict(), "mean": self.mean, "spread": self.spread}
        tensors |= {f"quality.{k}": torch.tensor(v) for k, v in self.quality.items()}
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path.with_suffix(".tmp"))
        path.with_suffix(".tmp").replace(path)

    @classmethod
    def load(cls, path: Path) -> PoseReader:
        """Reads it back."""
        tensors = load_file(path)
        quality = {k.removeprefix("quality."): float(tensors.pop(k)) for k in list(tensors) if k.startswith("quality.")}
        mean, spread, network = tensors.pop("mean"), tensors.pop("spread"), build()
        network.load_state_dict(tensors)
        return cls(network, mean, spread, quality)


def people(truth: Tensor, read: Tensor) -> Sequence[tuple[int, int]]:
    """(subject, person found), paired so that most attributes agree."""
    if not len(read):
        return ()
    visible = FAMILIES["people"].visible(truth)
    return match(((truth[:, None] == read[None]) & visible[:, None]).sum(-1).double().numpy()).pairs


def copy_scores(pictures: Tensor, scenes: EncodedScenes, judges: WorldJudges, reader: PoseReader) -> Copies:
    """Pose, height and brightness of generated people, and of the references that they come from."""
    assert (
        scenes.reference_poses is not None
        and scenes.reference_heights is not None
        and scenes.reference_light is not None
    )
    values: dict[str, dict[str, list[float]]] = {n: {"generated": [], "reference": []} for n in (*NAMES, "height")}
    for number, reading in enumerate(judges.reader.read(pictures)):
        for subject, face in people(scenes.truth.identities[number], reading.identities):
            box = reading.boxes[face : face + 1]
            read = reader.read(pictures, torch.tensor([number]), box)[0].tolist()
            given = [
                *scenes.reference_poses[number, subject].tolist(),
                float(scenes.reference_light[number, subject].mean()),
            ]
            read.append(float(box[0, 3] - box[0, 1]) / 1.02)
            given.append(float(scenes.reference_heights[number, subject]))
            for name, a, b in zip(values, read, given, strict=True):
                values[name]["generated"].append(round(a, 4))
                values[name]["reference"].append(round(b, 4))
    return Copies(values, reader.quality)


def slope(generated: Sequence[float], reference: Sequence[float]) -> float:
    """``sum (x - mean x)(y - mean y) / sum (x - mean x)^2``: what one step of the reference (x) does to the generated person (y).

    >>> slope([1.0, 2.0, 3.0], [0.0, 2.0, 4.0])
    0.5
    """
    x, y = np.asarray(reference), np.asarray(generated)
    centred = x - x.mean()
    return float((centred * (y - y.mean())).sum() / max((centred**2).sum(), 1e-12))


def slopes(
    values: Mapping[str, Mapping[str, Sequence[float]]], *, resamples: int = 1000, seed: int = 0
) -> dict[str, Interval]:
    """`slope` by name with a 95 % bootstrap interval over people."""
    found = {}
    for name, columns in values.items():
        x, y = np.asarray(columns["reference"], float), np.asarray(columns["generated"], float)
        if len(x) < 3:
            found[name] = bootstrap([])
            continue
        rows = np.random.default_rng(seed).integers(len(x), size=(resamples, len(x)))
        draws = [slope(y[r], x[r]) for r in rows]
        low, high = np.quantile(draws, [0.025, 0.975])
        found[name] = Interval(slope(y, x), float(low), float(high), len(x))
    return found


def reader_at(path: Path, judges: WorldJudges, *, steps: int = STEPS) -> Any:
    """The reader kept at ``path``, trained first if it is not there."""
    if not path.is_file():
        PoseReader.train(judges, steps=steps).save(path)
    return PoseReader.load(path)
