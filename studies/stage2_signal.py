"""Which settings of stage 2 have a gradient? Scores of single samples, and from them the cosine of any two batches of any objective.

    python -m studies.stage2_signal measure       # some minutes an arm on one core; arms that are there already are left out
    python -m studies.stage2_signal record        # what docs/results/stage2.md shows of them

The shipped stage-1 adapter draws groups on the validation split. Every sample gives the gradient of its own log-ratio on policy (or of its own
matching loss, for DiffusionNFT and AWM), and only their inner products are kept: a batch's gradient is a sum of these weighed by the
advantages, so that every way to make advantages, and every batch size, can be read off the same samples.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from gspo import FlowSDE, NoiseLevels, group_advantages, multi_reward_advantages, rollout
from gspo.forward import forward_points
from gspo.score import rescore
from id_reward import match
from idar import box_masks
from multicrafter.files import write_json
from multicrafter.models.binding import BindingConfig, bind_by_draft, separable
from multicrafter.models.finding import IdentityFinder
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.scoring.evaluate import WorldJudges, score_attributes
from multicrafter.training.scenes import EncodedScenes, encode_scenes
from multicrafter.world import FAMILIES, WorldConfig, shipped_adapter
from multicrafter.world.rewards import RewardConfig, tiny_reward
from torch import Tensor

from benchmarks.run import circumstances

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "runs" / "stage2_signal"
OUT = ROOT / "benchmarks" / "results" / "stage2_signal.json"
NUM_STEPS, TAIL, GUIDANCE, NOISE_LEVEL, LEVELS = 16, 5, 3.5, 0.7, 4
WEIGHTS = {"text": 1.0, "aesthetics": 0.5, "multi_id": 2.0}
BOUND = BindingConfig(mode="draft")


@dataclass(frozen=True, kw_only=True)
class Arm:
    """How groups are drawn.

    Attributes:
        start: First step of the window of two.
        own_noise: Every member has initial noise of its own.
        bound: Attention is separated, by a draft from the same noise, as pictures are drawn.
        subjects: Gradients of each subject's tokens are measured by themselves.
        forward: Matching losses are measured besides.
        noise_level: Of the kernel.
        prompts: Groups.
        members: Of a group.
        seed: Of prompts and noise.
    """

    start: int = 0
    own_noise: bool = False
    bound: bool = True
    subjects: bool = False
    forward: bool = False
    noise_level: float = NOISE_LEVEL
    prompts: int = 24
    members: int = 8
    seed: int = 0


ARMS = {
    "bound, window 0-1": Arm(prompts=48, subjects=True),
    "bound, window 0-1, own noise": Arm(own_noise=True, forward=True),
    "free, window 0-1": Arm(bound=False),
    "free, window 4-5": Arm(bound=False, start=4),
    "free, window 8-9": Arm(bound=False, start=8),
    "free, window 0-1, own noise": Arm(bound=False, own_noise=True, forward=True),
}


class Samples(NamedTuple):
    """What an arm gave, n samples in groups of neighbours.

    Attributes:
        rewards: By name, (n,): text, aesthetics, multi_id, and of the truth attributes and count.
        subjects: Cosine of every reference with the face matched to it, (n, s).
        products: Inner products of the rows, (k n, k n) for k rows a sample, by kind of row: "ratio" (one a sample), "subjects" (a
            row for each subject's tokens, then one for what is nobody's), "matching" (one a noise level).
        sizes: ``mean |sigma (v - target)|`` of every matching row, and its noise level, (2, LEVELS * n).
        seconds: Processor seconds of drawing, and of the passes with gradients of each kind.
    """

    rewards: dict[str, np.ndarray]
    subjects: np.ndarray
    products: dict[str, np.ndarray]
    sizes: np.ndarray
    seconds: dict[str, float]


class Bench:
    """The model, scenes of the validation split, and judges."""

    def __init__(self, prompts: int, seed: int) -> None:
        self.pipeline = MultiCrafterPipeline.from_pretrained(adapter=shipped_adapter())
        self.model, adapters = self.pipeline.model, self.pipeline.adapters
        assert adapters is not None
        self.trained = list(adapters.parameters())
        for parameter in self.trained:
            parameter.requires_grad_(True)
        world = WorldConfig(split="validation", numbers=(2,), shared_attributes=4)
        self.scenes: EncodedScenes = encode_scenes(self.model, world, prompts, seed=20_000 + seed)
        self.judges = WorldJudges.load()
        self.reward = tiny_reward(RewardConfig())
        self.finder = IdentityFinder(backend=self.judges.people)
        self.text = self.model.encode_prompts(self.scenes.captions)
        self.masks: Tensor | None = None
        self.separation: Any = None

    @contextmanager
    def separated(self, bound: bool) -> Iterator[None]:
        """Attention can be separated inside."""
        grids = [self.scenes.reference_grid] * 2
        config = BOUND if bound else BindingConfig()
        with separable(self.model.transformer, self.model.backbone, self.scenes.grid, grids, config) as separation:
            self.separation, self.masks = separation, None
            yield

    def velocity(self, scene_of: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
        """The policy; ``scene_of`` is the scene of every row of the noise."""

        def velocity_fn(x: Tensor, sigma: Tensor, index: Tensor) -> Tensor:
            if self.separation is not None:
                self.separation.masks = None if self.masks is None else self.masks[index]
            rows = scene_of[index]
            context = self.scenes.context(rows)
            return self.model.velocity(x, sigma, self.text.rows(rows), guidance=GUIDANCE, **context)

        return velocity_fn

    @torch.no_grad()
    def bind(self, velocity: Callable[[Tensor, Tensor, Tensor], Tensor], noise: Tensor, scene_of: Tensor) -> None:
        """Places of the subjects in drafts from this noise."""
        found = []
        for part in torch.arange(len(noise)).split(64):
            bind_by_draft(
                lambda x, sigma, part=part: velocity(x, sigma, part), noise[part],  # type: ignore[misc]
                lambda steps: self.model.sigmas(steps, noise.shape[1]), config=BOUND, separation=self.separation,
                decode=lambda x: self.model.decode_pictures(x, self.scenes.grid), finder=self.finder,
                references=[list(self.scenes.reference_images[s]) for s in scene_of[part].tolist()], grid=self.scenes.grid,
            )  # fmt: skip
            found.append(self.separation.masks)
        self.masks = torch.cat(found)

    def score(self, latents: Tensor, scene_of: Tensor) -> tuple[dict[str, np.ndarray], np.ndarray, Tensor]:
        """Rewards by name, cosines by subject, and regions of the subjects (b, s, tokens)."""
        pictures = torch.cat([self.model.decode_pictures(x, self.scenes.grid) for x in latents.split(64)]).clamp(0, 1)
        rows = scene_of.tolist()
        references = [list(self.scenes.reference_images[s]) for s in rows]
        parts = self.reward(list(pictures), [self.scenes.captions[s] for s in rows], references).parts
        truth = self.scenes.truth
        read = self.judges.reader.read(pictures)
        family = FAMILIES["people"]
        right = [
            score_attributes(truth.identities[s], r.identities, family, truth.identities[s][0]).attributes
            for s, r in zip(rows, read, strict=True)
        ]
        known = {s: self.judges.people.detect_and_embed_references(self.scenes.reference_images[s]) for s in set(rows)}
        cosines, boxes = np.zeros((len(rows), 2)), torch.full((len(rows), 2, 4), torch.nan)
        for i, (s, faces) in enumerate(zip(rows, self.judges.people.detect_and_embed(list(pictures)), strict=True)):
            if not len(faces.scores):
                continue
            mine = np.stack(
                [k.embeddings[int(np.argmax(k.scores))] if len(k.scores) else np.zeros(48) for k in known[s]]
            )
            table = mine @ faces.embeddings.T
            for a, b in match(table).pairs:
                cosines[i, a], boxes[i, a] = table[a, b], torch.as_tensor(faces.boxes[b], dtype=torch.float32)
        regions = box_masks(torch.nan_to_num(boxes), self.scenes.grid, (pictures.shape[2], pictures.shape[3]))
        regions[boxes.isnan().any(-1)] = 0
        found = {name: np.asarray(values, np.float64) for name, values in parts.items()}
        found["attributes"] = np.array(right)
        found["count"] = np.array([float(len(r.identities) == 2) for r in read])
        return found, cosines, regions

    def gradient(self, loss: Tensor, *, again: bool = False) -> Tensor:
        """Of the trained weights, flat."""
        found = torch.autograd.grad(loss, self.trained, retain_graph=again, allow_unused=True)
        return torch.cat(
            [(torch.zeros_like(p) if g is None else g).flatten() for g, p in zip(found, self.trained, strict=True)]
        )


def measure(arm: Arm) -> Samples:
    """Draws an arm's groups and passes every sample by itself."""
    bench = Bench(arm.prompts, arm.seed)
    generator = torch.Generator().manual_seed(arm.seed)
    count = arm.prompts * arm.members
    scenes = torch.arange(arm.prompts).repeat_interleave(arm.members if arm.own_noise else 1)
    noise = torch.randn(len(scenes), *bench.scenes.tokens.shape[1:], generator=generator)
    sigmas = bench.model.sigmas(NUM_STEPS, noise.shape[1])
    velocity, seconds = bench.velocity(scenes), {}
    with bench.separated(arm.bound):
        clock = time.process_time()
        if arm.bound:
            bench.bind(velocity, noise, scenes)
        drawn = rollout(
            velocity, noise, sigmas, kernel=FlowSDE(arm.noise_level), window=(arm.start, arm.start + 1),
            group_size=1 if arm.own_noise else arm.members, generator=generator, tail_steps=TAIL, micro_batch_size=64,
        )  # fmt: skip
        rewards, subjects, regions = bench.score(drawn.latents, scenes[drawn.index])
        seconds["draw"] = time.process_time() - clock
        products: dict[str, np.ndarray] = {}
        clock = time.process_time()
        rows = _scores(bench, velocity, drawn, regions if arm.subjects else None)
        whole = rows.reshape(count, -1, rows.shape[-1]).sum(1)
        products["ratio"] = (whole @ whole.T).double().numpy()
        if arm.subjects:
            products["subjects"] = (rows @ rows.T).double().numpy()
        del rows, whole
        seconds["ratio"] = time.process_time() - clock
        sizes = np.zeros((2, 0))
        if arm.forward:
            clock = time.process_time()
            rows, sizes = _matching(bench, velocity, drawn, generator)
            products["matching"] = (rows @ rows.T).double().numpy()
            seconds["matching"] = time.process_time() - clock
    return Samples(rewards, subjects, products, sizes, seconds)


def _scores(bench: Bench, velocity: Any, drawn: Any, regions: Tensor | None) -> Tensor:
    """Gradients (n, p) of every sample's mean log-ratio over the window; with ``regions`` (3 n, p), of the first subject's tokens, the
    second's, nobody's: their sum is the sample's."""
    weights = torch.ones(len(drawn.latents), 1, drawn.latents.shape[1])
    if regions is not None:
        share = regions / regions.sum(1, keepdim=True).clamp_min(1)
        weights = torch.cat([share, 1 - share.sum(1, keepdim=True)], 1)
    parts = weights.shape[1]
    found = torch.zeros(parts * len(drawn.latents), sum(p.numel() for p in bench.trained))
    for row in range(len(drawn.latents)):
        scored = rescore(velocity, drawn, rows=torch.tensor([row]))
        # on policy d log-ratio / d mean = (x' - mean) / std^2, a mean over elements
        ahead = torch.stack([s.next_latents[row] for s in drawn.trajectory]) - scored.mean[0].detach()
        slope = ahead / scored.std[0][:, None, None].square()
        tokens = (slope * scored.mean[0]).mean(-1).mean(0)  # (tokens,)
        for part in range(parts):
            if bool(weights[row, part].any()):
                loss = (weights[row, part] * tokens).mean()
                found[parts * row + part] = bench.gradient(loss, again=part < parts - 1)
    return found


def _matching(bench: Bench, velocity: Any, drawn: Any, generator: torch.Generator) -> tuple[Tensor, np.ndarray]:
    """Gradients (LEVELS n, p) of ``-mean |v - target|^2``, every sample's levels beside each other; their mean errors and levels."""
    count = len(drawn.latents)
    points = forward_points(drawn, NoiseLevels(count=LEVELS), generator)
    found = torch.zeros(LEVELS * count, sum(p.numel() for p in bench.trained))
    sizes = np.zeros((2, LEVELS * count))
    for level, point in enumerate(points):
        for row in range(count):
            one = point.rows(torch.tensor([row]), torch.device("cpu"))
            error = velocity(one.latents, one.sigma, drawn.index[[row]]).float() - one.target
            found[LEVELS * row + level] = bench.gradient(-error.square().mean())
            sizes[:, LEVELS * row + level] = float(error.detach().abs().mean() * one.sigma), float(one.sigma)
    return found, sizes


def save(path: Path, samples: Samples) -> None:
    """As npz."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        **{f"reward.{k}": v for k, v in samples.rewards.items()},
        **{f"products.{k}": v for k, v in samples.products.items()},
        **{f"seconds.{k}": np.array(v) for k, v in samples.seconds.items()},
        "subjects": samples.subjects,
        "sizes": samples.sizes,
    }
    np.savez(path, **content)


def load(path: Path) -> Samples:
    """Inverse of `save`."""
    with np.load(path) as content:
        under: Callable[[str], dict[str, Any]] = lambda prefix: {  # noqa: E731
            k.removeprefix(prefix): content[k] for k in content.files if k.startswith(prefix)
        }
        return Samples(
            under("reward."), content["subjects"], under("products."), content["sizes"],
            {k: float(v) for k, v in under("seconds.").items()},
        )  # fmt: skip


class Signal(NamedTuple):
    """Cosine of two batches of so many samples, its standard error (jackknife over groups), and samples for a cosine of .1 and .5."""

    cosine: float
    error: float
    samples_for_tenth: float
    samples_for_half: float


def signal(products: np.ndarray, advantages: np.ndarray, members: int, batch: int) -> Signal:
    """The gradients of groups are independent: ``|mu|^2`` is the mean over pairs of different groups, ``E|u|^2`` over groups.

        cosine(m groups) = |mu|^2 / (|mu|^2 + (E|u|^2 - |mu|^2) / m)

    Args:
        products: Inner products of the rows, (r, r); rows of a group are neighbours.
        advantages: One per row, (r,).
        members: Samples of a group.
        batch: Samples of a batch.
    """
    rows = len(advantages)
    groups = rows // members if members <= rows else 1
    weighed = (advantages[:, None] * products * advantages[None]).reshape(
        groups, rows // groups, groups, rows // groups
    )
    u = weighed.sum((1, 3))
    size = batch / members

    def cosine(table: np.ndarray) -> tuple[float, float]:
        number = len(table)
        mu = (table.sum() - np.trace(table)) / (number * (number - 1))
        noise = np.trace(table) / number - mu
        return mu / noise if noise > 0 else math.inf, mu

    ratio, _ = cosine(u)
    leave = np.array([cosine(np.delete(np.delete(u, i, 0), i, 1))[0] for i in range(groups)])
    error = math.sqrt((groups - 1) / groups * float(((leave - leave.mean()) ** 2).sum()))
    value = ratio * size / (1 + ratio * size)
    slope = size / (1 + ratio * size) ** 2
    need = [members * c / (1 - c) / ratio if ratio > 0 else math.inf for c in (0.1, 0.5)]
    return Signal(value, slope * error, *need)


def advantages_of(samples: Samples, members: int) -> dict[str, np.ndarray]:
    """Ways to make advantages, by name, (n,)."""
    count = len(samples.subjects)
    ids = torch.arange(count // members).repeat_interleave(members)
    parts = {k: torch.from_numpy(samples.rewards[k]) for k in WEIGHTS}
    total = torch.stack([WEIGHTS[k] * parts[k] for k in WEIGHTS]).sum(0)
    found = {
        "weighted sum normalised": group_advantages(total, ids),
        "weighted sum, batch's spread": group_advantages(total, ids, scale="global"),
        "one by one, weights 1 : .5 : 2": multi_reward_advantages(parts, WEIGHTS, ids),
        "one by one, equal weights": multi_reward_advantages(parts, dict.fromkeys(parts, 1.0), ids),
        **{f"{k} alone": group_advantages(parts[k], ids) for k in WEIGHTS},
        "true attributes alone (oracle)": group_advantages(torch.from_numpy(samples.rewards["attributes"]), ids),
    }
    return {name: values.double().numpy() for name, values in found.items()}


def by_subject(samples: Samples, members: int, background: float) -> np.ndarray:
    """Advantages (3 n,) of the rows "subjects": each subject's own on its tokens, the sum of both times ``background`` elsewhere."""
    ids = torch.arange(len(samples.subjects) // members).repeat_interleave(members)
    own = torch.stack([group_advantages(torch.from_numpy(column), ids) for column in samples.subjects.T], 1).double()
    return torch.cat([own, background * own.sum(1, keepdim=True)], 1).flatten().numpy()


WEIGHTINGS: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "AWM, weighting none": lambda size, sigma: np.ones_like(sigma),
    "AWM, weighting sigma": lambda size, sigma: sigma,
    "AWM, weighting sigma^2": lambda size, sigma: sigma**2,
    "NFT (at the old policy), self-normalized": lambda size, sigma: sigma**2 / size,
}


def readings(samples: Samples, members: int, batch: int = 256) -> dict[str, Signal]:
    """Every objective and way to make advantages that the samples tell about."""
    ways = advantages_of(samples, members)
    found = {f"ratio; {name}": signal(samples.products["ratio"], a, members, batch) for name, a in ways.items()}
    if "subjects" in samples.products:
        for label, background in (("sum elsewhere", 1.0), ("nothing elsewhere", 0.0)):
            found[f"ratio; identity by subject, {label}"] = signal(
                samples.products["subjects"], by_subject(samples, members, background), members, batch
            )
    total = samples.subjects.sum(1)
    ids = torch.arange(len(total) // members).repeat_interleave(members)
    plain = group_advantages(torch.from_numpy(total), ids).double().numpy()
    found["ratio; identity, sum of subjects on all tokens"] = signal(samples.products["ratio"], plain, members, batch)
    if "matching" in samples.products:
        for objective, weigh in WEIGHTINGS.items():
            weight = weigh(*samples.sizes)
            for name in ("weighted sum normalised", "one by one, weights 1 : .5 : 2", "one by one, equal weights"):
                a = np.repeat(ways[name], LEVELS) * weight
                found[f"{objective}; {name}"] = signal(samples.products["matching"], a, members, batch)
    return found


def place(name: str) -> Path:
    """Where an arm's samples are."""
    return SAMPLES / f"{name.replace(', ', '_').replace(' ', '-')}.npz"


def summary(name: str, samples: Samples) -> dict[str, Any]:
    """What the page shows of an arm."""
    arm, count = ARMS[name], len(samples.subjects)
    groups = {k: v.reshape(-1, arm.members) for k, v in samples.rewards.items()}
    total = sum(WEIGHTS[k] * groups[k] for k in WEIGHTS)
    return {
        "arm": asdict(arm),
        "samples": count,
        "means": {k: float(np.nanmean(v)) for k, v in samples.rewards.items()},
        "spread": {k: float(v.std(1).mean()) for k, v in {**groups, "reward": total}.items()},
        "seconds": {k: v / count for k, v in samples.seconds.items()},
        "readings": {k: s._asdict() for k, s in readings(samples, arm.members).items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m studies.stage2_signal", description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("measure", "print", "record"))
    parser.add_argument("--arm", action="append", choices=tuple(ARMS))
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    found: dict[str, Any] = {}
    for name in given.arm or ARMS:
        path = place(name)
        if given.part == "measure" and not path.exists():
            save(path, measure(ARMS[name]))
        if not path.exists():
            continue
        found[name] = one = summary(name, load(path))
        print(
            f"== {name}: {one['samples']} samples; seconds a sample",
            {k: round(v, 3) for k, v in one["seconds"].items()},
        )
        print("   means", {k: round(v, 3) for k, v in one["means"].items()})
        print("   spread in groups", {k: round(v, 3) for k, v in one["spread"].items()})
        for label, s in one["readings"].items():
            print(
                f"   {s['cosine']:6.3f} +- {s['error']:.3f}  for .1: {s['samples_for_tenth']:6.0f}  {label}", flush=True
            )
    if given.part == "record":
        write_json(OUT, {"arms": found, **circumstances()})
    return 0


if __name__ == "__main__":
    sys.exit(main())
