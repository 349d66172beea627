"""Recipes of the judges: ``python -m multicrafter.world.judges.train {reader,people,clip} --out DIR [--family objects]``.

Each measures itself on unseen identities. ``people`` is the detector and embedder of whatever family it is trained on.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from multicrafter.files import follow_umask
from multicrafter.world import FAMILIES, PEOPLE, SETTINGS, TIMES, Family, Scenes, WorldConfig, make_scenes
from multicrafter.world.judges.clip import MEAN, STD, ClipScorer, build_clip
from multicrafter.world.judges.network import centre_cells, detection_loss
from multicrafter.world.judges.people import PeopleBackend, build_people
from multicrafter.world.judges.reader import Reader, build_reader
from multicrafter.world.precision import fast_autocast


def soften(pictures: Tensor, generator: torch.Generator) -> Tensor:
    """Makes drawn pictures look generated: blur, down- and up-sampling, noise, a change of light; each sample its own strength."""
    b = len(pictures)
    blurred = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    size = pictures.shape[-1]
    small = nn.functional.interpolate(
        nn.functional.interpolate(pictures, size // 2, mode="bilinear", antialias=True, align_corners=False),
        size,
        mode="bilinear",
        align_corners=False,
    )
    kind = torch.rand(b, 1, 1, 1, generator=generator)
    strength = torch.rand(b, 1, 1, 1, generator=generator)
    mixed = pictures.lerp(torch.where(kind < 0.5, blurred, small), strength)
    light = 1 + 0.08 * torch.randn(b, 3, 1, 1, generator=generator) * torch.rand(b, 1, 1, 1, generator=generator)
    noise = 0.05 * torch.rand(b, 1, 1, 1, generator=generator) * torch.randn(pictures.shape, generator=generator)
    return (mixed * light + noise).clamp(0, 1)


def fit(modules: nn.Module, loss_fn: Callable[[], Tensor], *, minutes: float, lr: float, name: str) -> dict[str, Any]:
    """AdamW with warm-up and cosine decay over wall time; returns steps and seconds."""
    optimizer = torch.optim.AdamW(modules.parameters(), lr=lr, weight_decay=1e-3, betas=(0.9, 0.98))
    started, step, running = time.monotonic(), 0, 0.0
    bar = tqdm(total=100, unit="%", desc=name)
    while (progress := (time.monotonic() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 100) * 0.5 * (1.02 + math.cos(math.pi * progress))
        loss = loss_fn()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(modules.parameters(), 1.0)
        optimizer.step()
        step += 1
        running += (loss.item() - running) * max(0.02, 1 / step)
        bar.update(int(100 * progress) - bar.n)
        if step % 20 == 0:
            bar.set_postfix(step=step, loss=f"{running:.4f}")
    bar.close()
    return {"steps": step, "seconds": round(time.monotonic() - started), "final_loss": round(running, 4)}


def _scenes(
    family: Family,
    generator: torch.Generator,
    count: int,
    numbers: tuple[int, ...] = (1, 2, 3, 4),
    split: Any = "train",
) -> Scenes:
    weights = (2.0, 4.0, 1.0, 1.0) if numbers == (1, 2, 3, 4) else ()
    shared = len(family.attributes) - 2
    world = WorldConfig(family=family.name, split=split, numbers=numbers, weights=weights, shared_attributes=shared)
    return make_scenes(count, world, generator)


def train_reader(out: Path, *, minutes: float, seed: int, family: Family = PEOPLE, batch: int = 48) -> dict[str, Any]:
    """Reader of truth, trained on the train split of both look-alikes and strangers."""
    torch.manual_seed(seed)
    generator, network = torch.Generator().manual_seed(seed), build_reader(family).to(memory_format=torch.channels_last)

    def loss_fn() -> Tensor:
        scenes = _scenes(family, generator, batch)
        with fast_autocast():
            maps = network(soften(scenes.images, generator))
        present = scenes.identities[:, :, 0] >= 0
        loss = detection_loss(maps, scenes.boxes, present, 64)
        row, column = centre_cells(scenes.boxes, 64)
        where = torch.arange(batch)[:, None].expand_as(row)
        logits = maps.features.float()[where[present], :, row[present], column[present]]
        truth = scenes.identities[present]
        seen = family.visible(truth)
        for i, part in enumerate(logits.split(list(family.sizes), 1)):
            if bool(seen[:, i].any()):
                loss = loss + nn.functional.cross_entropy(part[seen[:, i]], truth[seen[:, i], i])
        setting, when = maps.scene.float().split([len(SETTINGS), len(TIMES)], 1)
        return loss + 0.3 * (
            nn.functional.cross_entropy(setting, scenes.setting) + nn.functional.cross_entropy(when, scenes.time)
        )

    report = fit(network, loss_fn, minutes=minutes, lr=2e-3, name="reader")
    _write(out, "reader", network)
    report |= {"seed": seed, "family": family.name, "measured": measure_reader(Reader(network, family))}
    (out / "reader.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def train_people(out: Path, *, minutes: float, seed: int, family: Family = PEOPLE, batch: int = 40) -> dict[str, Any]:
    """Detector and embedder: a scene's person and its reference attract each other, everybody else repels (InfoNCE, arXiv 1807.03748)."""
    torch.manual_seed(seed)
    generator, network = torch.Generator().manual_seed(seed), build_people().to(memory_format=torch.channels_last)

    def loss_fn() -> Tensor:
        scenes = _scenes(family, generator, batch)
        present = scenes.identities[:, :, 0] >= 0
        with fast_autocast():
            maps = network(soften(scenes.images, generator))
            portraits = network(soften(scenes.references[present], generator))
        loss = detection_loss(maps, scenes.boxes, present, 64)
        box = torch.tensor([[[6.0, 6.0, 26.0, 31.0]]]).expand(len(portraits.heat), 1, 4)
        loss = loss + 0.3 * detection_loss(portraits, box, torch.ones(len(box), 1, dtype=torch.bool), 32)
        row, column = centre_cells(scenes.boxes, 64)
        where = torch.arange(batch)[:, None].expand_as(row)
        here = nn.functional.normalize(maps.features.float()[where[present], :, row[present], column[present]], dim=1)
        r, c = centre_cells(box, 32)
        there = nn.functional.normalize(portraits.features.float()[torch.arange(len(box)), :, r[:, 0], c[:, 0]], dim=1)
        logits = here @ there.T / 0.07
        target = torch.arange(len(here))
        return loss + nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)

    report = fit(network, loss_fn, minutes=minutes, lr=2e-3, name="people")
    _write(out, "people", network)
    report |= {"seed": seed, "family": family.name, "measured": measure_people(PeopleBackend(network), family=family)}
    (out / "people.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def train_clip(out: Path, *, minutes: float, seed: int, family: Family = PEOPLE, batch: int = 96) -> dict[str, Any]:
    """Contrastive training on captions (CLIP, arXiv 2103.00020); equal captions in a batch share the target."""
    torch.manual_seed(seed)
    generator, (model, tokenizer) = torch.Generator().manual_seed(seed), build_clip()
    scorer = ClipScorer(model, tokenizer)
    model.train()

    def loss_fn() -> Tensor:
        scenes = _scenes(family, generator, batch)
        captions = scenes.captions(family)
        pictures = nn.functional.normalize(
            model.get_image_features(pixel_values=(soften(scenes.images, generator) - MEAN) / STD).pooler_output, dim=1
        )
        logits = pictures @ scorer.embed_text(captions).T * model.logit_scale.exp().clamp(max=50)
        same = torch.tensor([[float(a == b) for b in captions] for a in captions])
        target = same / same.sum(1, keepdim=True)
        return nn.functional.cross_entropy(logits, target) + nn.functional.cross_entropy(logits.T, target)

    report = fit(model, loss_fn, minutes=minutes, lr=1.5e-3, name="clip")
    folder = out / "clip"
    model.half().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    report |= {
        "seed": seed,
        "family": family.name,
        "measured": measure_clip(ClipScorer(model.float(), tokenizer), family=family),
    }
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return report


def _write(out: Path, name: str, network: nn.Module) -> None:
    out.mkdir(parents=True, exist_ok=True)
    save_file({k: v.half().contiguous() for k, v in network.state_dict().items()}, out / f"{name}.safetensors")
    follow_umask(out / f"{name}.safetensors")


def measure_reader(reader: Reader, *, count: int = 400) -> dict[str, float]:
    """Accuracy on unseen identities, one or two people, and with three or four."""
    result: dict[str, float] = {}
    for label, numbers in (("", (1, 2)), ("_crowd", (3, 4))):
        scenes = _scenes(reader.family, torch.Generator().manual_seed(77), count, numbers, "test")
        right = total = counted = placed = 0
        for i, reading in enumerate(reader.read(scenes.images)):
            truth = scenes.identities[i, : int(scenes.number[i])]
            counted += int(len(reading.identities) == len(truth))
            placed += int(reading.setting == scenes.setting[i] and reading.time == scenes.time[i])
            seen = reader.family.visible(truth)
            total += int(seen.sum())
            if len(reading.identities):
                centre = (reading.boxes[:, :2] + reading.boxes[:, 2:]) / 2
                wanted = (scenes.boxes[i, : len(truth), :2] + scenes.boxes[i, : len(truth), 2:]) / 2
                nearest = torch.cdist(wanted, centre).argmin(1)
                right += int(((reading.identities[nearest] == truth) & seen).sum())
        result |= {
            f"attributes{label}": right / total,
            f"count{label}": counted / count,
            f"setting_and_time{label}": placed / count,
        }
    return {k: round(v, 4) for k, v in result.items()}


def measure_people(backend: PeopleBackend, *, family: Family = PEOPLE, count: int = 400) -> dict[str, float]:
    """Count accuracy, AUC of same against different subject, and how often two look-alikes are matched right; unseen identities."""
    from id_reward import match

    scenes = _scenes(family, torch.Generator().manual_seed(78), count, (2,), "test")
    found = backend.detect_and_embed(scenes.images)
    references = backend.detect_and_embed_references(scenes.references.flatten(0, 1))
    same, different, matched, usable = [], [], 0, 0
    for i, faces in enumerate(found):
        known = references[2 * i : 2 * i + 2]
        if len(faces.boxes) != 2 or any(len(k.boxes) == 0 for k in known):
            continue
        usable += 1
        order = torch.from_numpy(faces.boxes[:, 0]).argsort().tolist()
        truth = scenes.boxes[i, :, 0].argsort().tolist()
        cosine = torch.tensor([[float(known[r].embeddings[0] @ faces.embeddings[f]) for f in order] for r in truth])
        same += cosine.diag().tolist()
        different += [cosine[0, 1].item(), cosine[1, 0].item()]
        matched += int(match(cosine.numpy()).pairs == ((0, 0), (1, 1)))
    a, b = torch.tensor(same), torch.tensor(different)
    return {
        "count": round(usable / count, 4),
        "auc": round(((a[:, None] > b[None]).float() + 0.5 * (a[:, None] == b[None]).float()).mean().item(), 4),
        "matched": round(matched / max(usable, 1), 4),
        "same_cosine": round(a.mean().item(), 4),
        "different_cosine": round(b.mean().item(), 4),
    }


@torch.no_grad()
def measure_clip(scorer: ClipScorer, *, family: Family = PEOPLE, count: int = 300) -> dict[str, float]:
    """How often the right caption beats one that differs in number, setting or time; unseen identities."""
    from multicrafter.world import ARRANGEMENTS, caption

    scenes = _scenes(family, torch.Generator().manual_seed(79), count, (1, 2, 3, 4), "test")
    own = scorer(scenes.images, scenes.captions(family))
    result = {}
    for what in ("number", "setting", "time"):
        wrong = []
        for n, s, t, a in zip(
            scenes.number.tolist(),
            scenes.setting.tolist(),
            scenes.time.tolist(),
            scenes.arrangement.tolist(),
            strict=True,
        ):
            n, s, t = (
                (n % 4 + 1 if what == "number" else n),
                ((s + 1) % 6 if what == "setting" else s),
                ((t + 1) % 3 if what == "time" else t),
            )
            wrong.append(caption(n, s, t, a % len(ARRANGEMENTS[n]), family))
        result[what] = round(float((own > scorer(scenes.images, wrong)).mean()), 4)
    return result


RECIPES = {"reader": train_reader, "people": train_people, "clip": train_clip}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("judge", choices=tuple(RECIPES))
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--family", choices=tuple(FAMILIES), default="people")
    parser.add_argument("--minutes", type=float, default=6.0)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    options = {"minutes": arguments.minutes, "seed": arguments.seed, "family": FAMILIES[arguments.family]}
    print(json.dumps(RECIPES[arguments.judge](arguments.out, **options), indent=2))


if __name__ == "__main__":
    main()
