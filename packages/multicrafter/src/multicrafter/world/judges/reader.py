"""The reader of truth: finds the subjects of a picture and reads their attributes. For evaluation only, never for a reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file
from torch import Tensor

from multicrafter.world import FAMILIES, SETTINGS, TIMES, Family
from multicrafter.world.judges.network import Maps, SubjectNetwork, find

WIDTH, DILATIONS = 64, (1, 2, 3, 1, 2, 1)


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
        """One `Reading` per picture, subjects from left to right."""
        readings: list[Reading] = []
        for part in pictures.split(batch):
            maps: Maps = self.network(part)
            found = find(maps)
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
