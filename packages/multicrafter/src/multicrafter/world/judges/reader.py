"""The reader of truth: finds the subjects of a picture and reads their attributes. For evaluation and watching, never for a reward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from id_reward import Faces
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from multicrafter.world import FAMILIES, SETTINGS, TIMES, Family
from multicrafter.world.judges.network import PICTURE_SIDE, Maps, SubjectNetwork, find, shown_at
from multicrafter.world.judges.people import as_tensor

WIDTH, DILATIONS = 64, (1, 2, 3, 1, 2, 1)
REFERENCE_SIDE = 48
"""Shorter side, in pixels, at which a reference shows a person as large as a scene does."""


class Reading(NamedTuple):
    """What is in one picture: identities (f, a) as category indices, boxes (f, 4) in pixels, setting and time as indices."""

    identities: Int[Tensor, "f a"]
    boxes: Float[Tensor, "f 4"]
    setting: int
    time: int


def build_reader(family: Family) -> SubjectNetwork:
    """An untrained reader for a family."""
    return SubjectNetwork(WIDTH, DILATIONS, sum(family.sizes), len(SETTINGS) + len(TIMES))


class Reader:
    """Reads pictures with trained weights."""

    def __init__(self, network: SubjectNetwork, family: Family) -> None:
        """Takes a trained network."""
        self.network, self.family = network.eval(), family

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Reader:
        """Loads ``reader.safetensors`` and ``reader.json``."""
        family = FAMILIES[json.loads((Path(folder) / "reader.json").read_text())["family"]]
        network = build_reader(family)
        network.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "reader.safetensors").items()})
        return cls(network, family)

    @torch.inference_mode()
    def read(self, pictures: Float[Tensor, "b 3 H W"], *, batch: int = 64) -> list[Reading]:
        """One `Reading` per picture, of any size; subjects from left to right."""
        readings: list[Reading] = []
        for part in pictures.split(batch):
            shown, scale = shown_at(part)
            maps: Maps = self.network(shown)
            found = find(maps)
            found = found._replace(boxes=found.boxes / scale)
            setting, time = maps.scene.split([len(SETTINGS), len(TIMES)], 1)
            logits = found.features.split(list(self.family.sizes), 1)
            identities = self.family.canonical(torch.stack([x.argmax(1) for x in logits], 1))
            for row in range(len(part)):
                mine = torch.where(found.picture == row)[0]
                mine = mine[found.boxes[mine, 0].argsort()]
                readings.append(
                    Reading(identities[mine], found.boxes[mine], int(setting[row].argmax()), int(time[row].argmax()))
                )
        return readings


class ReaderBackend:
    """The reader behind `id_reward.FaceBackend`: who is whom as a judge sees it that no reward is made of.

    A subject's embedding is the root of the probability of every value of every attribute, as a unit vector: the cosine of two is the mean
    Bhattacharyya coefficient of their attributes, 1 where all are read alike.

    References show people smaller than the scenes that the reader was trained on, and are looked at in `REFERENCE_SIDE` pixels.
    """

    def __init__(self, reader: Reader) -> None:
        """Takes a reader."""
        self.reader = reader

    def detect_and_embed(self, images: Sequence[Any] | Tensor) -> list[Faces]:
        """One `Faces` per scene, of any size; pictures of one size are batched."""
        return self._find(images, PICTURE_SIDE)

    def detect_and_embed_references(self, images: Sequence[Any] | Tensor) -> list[Faces]:
        """`detect_and_embed` of references, in which a person fills the picture."""
        return self._find(images, REFERENCE_SIDE)

    @torch.inference_mode()
    def _find(self, images: Sequence[Any] | Tensor, side: int) -> list[Faces]:
        sizes = list(self.reader.family.sizes)
        pictures = as_tensor(images)
        results = [Faces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, sum(sizes))))] * len(pictures)
        for shape in {p.shape for p in pictures}:
            rows = [i for i, p in enumerate(pictures) if p.shape == shape]
            for start in range(0, len(rows), 64):
                part = rows[start : start + 64]
                shown, scale = shown_at(torch.stack([pictures[i] for i in part]), side)
                found = find(self.reader.network(shown))
                likely = [logits.softmax(1) for logits in found.features.split(sizes, 1)]
                unit = (torch.cat(likely, 1) / len(sizes)).sqrt().double().numpy()
                boxes = (found.boxes / scale).numpy()
                for position, row in enumerate(part):
                    mine = (found.picture == position).numpy()
                    results[row] = Faces(boxes[mine], found.scores.numpy()[mine], unit[mine])
        return results
