"""Evaluation against the known truth: pictures of unseen identities, metrics per case, bootstrap intervals, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from id_reward import IdentityScorer, match
from idar import owner_masks
from torch import Tensor

from multicrafter import UserError, renamed
from multicrafter.models.binding import BindingConfig, sample_bound, separable
from multicrafter.models.checks import check_finite
from multicrafter.models.finding import Finder, IdentityFinder
from multicrafter.models.loaded import LoadedModel
from multicrafter.scoring.statistics import bootstrap_interval
from multicrafter.training.attention import measure_leakage
from multicrafter.training.scenes import EncodedScenes, encode_scenes
from multicrafter.world import FAMILIES, Family, Split, WorldConfig, judges
from multicrafter.world.judges.aesthetics import aesthetics
from multicrafter.world.judges.clip import ClipScorer
from multicrafter.world.judges.people import PeopleBackend
from multicrafter.world.judges.reader import Reader, Reading

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

renamed(__name__, {"Judges": "WorldJudges"})

METRICS = {
    "identity": "cosine of each reference with the face matched to it (people judge)",
    "attributes": "attributes of the references that the picture shows (reader of truth)",
    "swaps": "attributes in which the references differ that show the OTHER reference's value",
    "swaps_by_chance": "the same with an unrelated person in place of the other: what guessing gives",
    "count": "pictures with as many people as the caption says",
    "setting": "pictures with the setting and the time of day of the caption",
    "text": "CLIP alignment with the caption, (1 + cos) / 2",
    "aesthetics": "colourfulness and sharpness",
    "found": "drafts in which every subject was found",
    "leakage": "attention of a subject that lies on the other subject, as a share (.5: blind); double-stream blocks",
}


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is evaluated.

    Attributes:
        num_cases: Scenes of unseen identities.
        num_references: Subjects of each.
        family: "people" or "objects".
        split: Identities; "validation" is for choosing settings, "test" for what is published.
        size, reference_size: Sides of pictures and references in pixels.
        references_per_subject: References of each subject; identity is compared with the first.
        shape: Height and width of pictures in pixels, where they are no squares of ``size``.
        shared_attributes: See `WorldConfig`: how similar the subjects of a case may be.
        num_sampling_steps: Euler steps of a picture.
        guidance: Of a base that takes it as an input; training uses 1, as the paper does.
        separation: How subjects are kept apart while pictures are drawn; places are found by the people judge of the reward, or, for
            mode "masks", are the true ones. None keeps nothing apart.
        seed: Of cases and noise.
    """

    num_cases: int = 128
    num_references: int = 2
    family: str = "people"
    split: Split = "test"
    size: int = 64
    shape: tuple[int, int] | None = None
    reference_size: int = 32
    references_per_subject: int = 1
    shared_attributes: int = 4
    num_sampling_steps: int = 16
    guidance: float = 2.5
    separation: BindingConfig | None = None
    seed: int = 1000

    def __post_init__(self) -> None:
        check_finite(self)
        for name in ("num_cases", "num_sampling_steps", "guidance"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    def world(self) -> WorldConfig:
        """The world of the cases."""
        return WorldConfig(
            family=self.family,
            split=self.split,
            numbers=(self.num_references,),
            size=self.size,
            shape=self.shape,
            reference_size=self.reference_size,
            references_per_subject=self.references_per_subject,
            shared_attributes=self.shared_attributes,
        )


class WorldJudges(NamedTuple):
    """Everything that scores a picture."""

    reader: Reader
    people: PeopleBackend
    clip: ClipScorer

    @classmethod
    def load(cls, folder: Path | None = None) -> WorldJudges:
        """From ``folder``, the shipped ones by default."""
        folder = folder or judges.shipped()
        return cls(
            Reader.from_pretrained(folder),
            PeopleBackend.from_pretrained(folder),
            ClipScorer.from_pretrained(folder / "clip"),
        )


class AttributeScore(NamedTuple):
    """Shares in [0, 1]; swaps are NaN where the subjects differ in nothing visible."""

    attributes: float
    swaps: float
    swaps_by_chance: float


def score_attributes(truth: Tensor, read: Tensor, family: Family, stranger: Tensor) -> AttributeScore:
    """Compares the subjects that were read with the true ones, paired so that most attributes agree (Hungarian).

    ``attributes``: right ones over all visible ones; a subject without a partner has none right.
    ``swaps``: over the matched subjects and the attributes visible in both and different between them, how often the value read is the
    other subject's. ``swaps_by_chance``: the same with ``stranger`` as the other.

    Args:
        truth: Identities (m, a).
        read: Identities read (f, a).
        family: Says which attributes are visible.
        stranger: An unrelated identity (a,).
    """
    visible = family.visible(truth)
    agree = ((truth[:, None] == read[None]) & visible[:, None]).sum(-1)
    pairs = match(agree.double().numpy()).pairs if len(read) else ()
    right = sum(int(agree[i, j]) for i, j in pairs)
    own_of = {i: read[j] for i, j in pairs}

    def rate(other_of: Mapping[int, Tensor]) -> float:
        hits = total = 0
        for i, value in own_of.items():
            other = other_of[i]
            telling = visible[i] & family.visible(other[None])[0] & (other != truth[i])
            hits += int(((value == other) & telling).sum())
            total += int(telling.sum())
        return hits / total if total else float("nan")

    others = {i: truth[(i + 1) % len(truth)] for i in range(len(truth))}
    return AttributeScore(
        right / max(int(visible.sum()), 1),
        rate(others) if len(truth) > 1 else float("nan"),
        rate(dict.fromkeys(range(len(truth)), stranger)),
    )


class Drawn(NamedTuple):
    """Pictures (n, 3, H, W), whether every subject was found (n,), and passes of the model per picture."""

    pictures: Tensor
    complete: Tensor
    num_function_evaluations: int


def case_noise(scenes: EncodedScenes, seed: int) -> Tensor:
    """Noise (n, tokens, d) that depends on the seed and the case alone, not on how many cases there are."""
    return torch.randn(scenes.tokens.shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def draw_cases(
    model: LoadedModel | DiffusionPipeline,
    scenes: EncodedScenes,
    config: EvaluateConfig,
    *,
    finder: Finder | None = None,
    batch: int = 32,
) -> Drawn:
    """One picture per case, by any backbone, with subjects kept apart as ``config.separation`` says."""
    model, binding_config = LoadedModel.of(model), config.separation or BindingConfig()
    noise = case_noise(scenes, config.seed + 1)
    count = scenes.tokens.shape[1]
    pictures, complete, calls, device = [], [], 0, model.transformer.device
    for start in range(0, len(scenes), batch):
        part = slice(start, min(start + batch, len(scenes)))
        velocity = partial(
            model.velocity,
            text=scenes.encode_text(model, part).to(device),
            guidance=config.guidance,
            **scenes.context(part, device),
        )
        with separable(
            model.transformer, model.backbone, scenes.grid, scenes.reference_grids, binding_config, counts=scenes.counts
        ) as separation:
            tokens, binding = sample_bound(
                velocity, noise[part].to(device), lambda steps: model.sigmas(steps, count), config.num_sampling_steps,
                config=binding_config, separation=separation, finder=finder, grid=scenes.grid,
                decode=lambda x: model.decode_pictures(x, scenes.grid),
                references=scenes.subject_pictures(part), masks=owner_masks(scenes.masks[part]).to(device),
                watch=(model.transformer, model.backbone, scenes.reference_grids), counts=scenes.counts,
            )  # fmt: skip
        pictures.append(model.decode_pictures(tokens, scenes.grid).cpu())
        complete.append(binding.complete.cpu())
        calls = binding.num_function_evaluations
    return Drawn(torch.cat(pictures), torch.cat(complete), calls)


def generate_cases(
    model: LoadedModel | DiffusionPipeline,
    scenes: EncodedScenes,
    config: EvaluateConfig,
    *,
    finder: Finder | None = None,
    batch: int = 32,
) -> Tensor:
    """The pictures of `draw_cases`."""
    return draw_cases(model, scenes, config, finder=finder, batch=batch).pictures


def score_pictures(
    pictures: Tensor, scenes: EncodedScenes, judges: WorldJudges, *, family: str = "people"
) -> dict[str, np.ndarray]:
    """Metrics per case, all but leakage; see `METRICS`."""
    readings: list[Reading] = judges.reader.read(pictures)
    truth = scenes.truth
    strangers = truth.identities.roll(1, 0)[:, 0] if scenes.strangers is None else scenes.strangers
    rows = [
        score_attributes(truth.identities[i], r.identities, FAMILIES[family], strangers[i])
        for i, r in enumerate(readings)
    ]
    return {
        "identity": IdentityScorer(judges.people)(list(pictures), scenes.captions, scenes.subject_pictures()),
        "attributes": np.array([r.attributes for r in rows]),
        "swaps": np.array([r.swaps for r in rows]),
        "swaps_by_chance": np.array([r.swaps_by_chance for r in rows]),
        "count": np.array([float(len(r.identities) == truth.identities.shape[1]) for r in readings]),
        "setting": np.array(
            [
                float(r.setting == s and r.time == t)
                for r, s, t in zip(readings, truth.setting.tolist(), truth.time.tolist(), strict=True)
            ]
        ),
        "text": judges.clip(pictures, scenes.captions),
        "aesthetics": aesthetics(pictures).double().numpy(),
    }


def evaluate(
    model: LoadedModel | DiffusionPipeline, scenes: EncodedScenes, judges: WorldJudges, config: EvaluateConfig
) -> tuple[dict[str, np.ndarray], Tensor]:
    """Generates and scores every case; returns metrics per case and the pictures.

    Places of subjects are found by the people judge; the reader of truth only scores.
    """
    pictures, complete, _ = draw_cases(model, scenes, config, finder=IdentityFinder(backend=judges.people))
    metrics = score_pictures(pictures, scenes, judges, family=config.family)
    if config.separation is not None and config.separation.mode in ("draft", "in-flight"):
        metrics["found"] = complete.double().numpy()
    if scenes.num_subjects > 1:
        metrics["leakage"] = (
            measure_leakage(model, scenes, direction="image_to_reference", seed=config.seed + 2).double().numpy()
        )
    return metrics, pictures


def cases(model: LoadedModel | DiffusionPipeline, config: EvaluateConfig) -> EncodedScenes:
    """The cases of a configuration, encoded. A case does not depend on how many there are."""
    return encode_scenes(model, config.world(), config.num_cases, seed=config.seed, one_by_one=True)


class Interval(NamedTuple):
    """Mean and a 95 % bootstrap interval over n cases."""

    mean: float
    low: float
    high: float
    n: int


def bootstrap(values: Sequence[float] | np.ndarray, *, resamples: int = 2000, seed: int = 0) -> Interval:
    """`bootstrap_interval` over cases that are each their own.

    >>> bootstrap([1.0, 1.0, 1.0])
    Interval(mean=1.0, low=1.0, high=1.0, n=3)
    """
    found = bootstrap_interval(values, resamples=resamples, seed=seed)
    return Interval(found.mean, found.low, found.high, found.cases)


def summarise(metrics: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """`bootstrap` of every metric."""
    return {name: bootstrap(values) for name, values in metrics.items()}


def difference(a: Mapping[str, np.ndarray], b: Mapping[str, np.ndarray]) -> dict[str, Interval]:
    """Bootstrap of ``a - b`` case by case, over the metrics of both."""
    return {name: bootstrap(np.asarray(a[name]) - np.asarray(b[name])) for name in a if name in b}


def table(rows: Mapping[str, Mapping[str, Interval]]) -> str:
    """The summaries of several models as text: one line a model, a column a metric."""
    names = [n for n in METRICS if any(n in r for r in rows.values())]
    width = max(len(r) for r in rows)
    lines = [" " * width + "  " + "  ".join(f"{n:>19}" for n in names)]
    for label, row in rows.items():
        cells = [f"{row[n].mean:.3f} [{row[n].low:.3f}, {row[n].high:.3f}]" if n in row else "" for n in names]
        lines.append(f"{label:<{width}}  " + "  ".join(f"{c:>19}" for c in cells))
    return "\n".join(lines)
