"""What the studies measure beside `multicrafter.scoring.evaluate`: where experts send which tokens."""

from __future__ import annotations

from typing import Any

import torch
from moe_lora import collect
from moe_lora.stats import RoutingLog, specialisation
from multicrafter.models.flux.model import add_noise
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.training.scenes import EncodedScenes
from multicrafter.world import ARRANGEMENTS
from torch import Tensor

SIGMAS = (0.15, 0.4, 0.6, 0.85)


def is_single(name: str) -> bool:
    """Whether an attention module belongs to a single-stream block."""
    return name.startswith("single_")


def arrangement(caption: str, number: int) -> int:
    """Which arrangement a caption tells of.

    >>> arrangement("two people far apart in the park at sunset", 2)
    1
    """
    return next(i for i, words in enumerate(ARRANGEMENTS[number]) if words in caption)


def token_kinds(masks: Tensor, num_reference: int, num_text: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Kind of every token (b, n) by FFN (regex), and the kinds' names: text, background, person i in the picture, reference i.

    In FLUX ``ff`` sees picture and references, ``ff_context`` the text, single blocks all of them. A token of the picture belongs to the person who covers
    most of it, if that is a third of it or more.
    """
    b, m = masks.shape[:2]
    strongest, who = masks.max(1)
    picture = torch.where(strongest >= 1 / 3, 2 + who, 1)
    references = (2 + m + torch.arange(m)).repeat_interleave(num_reference).expand(b, -1)
    text = torch.zeros(b, num_text, dtype=torch.long)
    stream = torch.cat([picture, references], 1)
    kinds = {r".*\.ff_context": text, r".*\.ff": stream, r"single_.*": torch.cat([text, stream], 1)}
    names = ("text", "background", *(f"person {i + 1}" for i in range(m)), *(f"reference {i + 1}" for i in range(m)))
    return kinds, names


@torch.no_grad()
def routing(loaded: MultiCrafterPipeline, scenes: EncodedScenes, *, seed: int, batch: int = 64) -> dict[str, Any]:
    """Where a trained adapter sends tokens of noisy scenes, by layer.

    Returns:
        ``kinds``: names; ``load``: layer -> (kind, expert) counts; ``information``: label -> layer -> nats, share of the label's entropy, what shuffled labels
        give, p-value, for the labels token kind, arrangement, sigma, and subject (person 1 and reference 1 against person 2 and reference 2).
    """
    experts = loaded.adapters.experts  # type: ignore[union-attr]
    assert experts is not None
    generator = torch.Generator().manual_seed(seed)
    number = scenes.references.shape[1]
    log, names = None, ()
    for start in range(0, len(scenes), batch):
        part = slice(start, min(start + batch, len(scenes)))
        text = scenes.encode_text(loaded.model, part)
        kinds, names = token_kinds(scenes.masks[part], scenes.references.shape[2], text.embeds.shape[1])
        with collect(experts, kinds, names) as found:
            found.layout = [arrangement(c, number) for c in scenes.captions[part]]
            for sigma in SIGMAS:
                found.sigma = sigma
                latents = scenes.tokens[part]
                noise = torch.randn(latents.shape, generator=generator)
                level = torch.full((len(latents),), sigma)
                loaded.backbone.velocity(
                    loaded.pipe.transformer, add_noise(latents, noise, level), level, text, **scenes.context(part)
                )
        experts.forget()
        log = found if log is None else _joined(log, found)
    assert log is not None
    layers = {}
    for layer in log.counts:
        counts = torch.cat(log.counts[layer]).double()  # (sample, kind, expert)
        by = {
            "arrangement": (counts.sum(1), log.labels("layout", layer)[0]),
            "sigma": (counts.sum(1), log.labels("sigma", layer, sigma_bins=len(SIGMAS))[0]),
            "token kind": _cells(counts, range(len(names))),
            "subject": _cells(_subjects(counts, number), range(number)),
        }
        layers[layer] = {
            "load": counts.sum(0).long().tolist(),
            "information": {
                label: specialisation(c, y)._asdict()
                for label, (c, y) in by.items()
                if c.sum() and y.unique().numel() > 1
            },
        }
    return {"kinds": list(names), "layers": layers}


def _joined(a: RoutingLog, b: RoutingLog) -> RoutingLog:
    for into, more in ((a.counts, b.counts), (a.sigmas, b.sigmas), (a.layouts, b.layouts)):
        for layer, found in more.items():
            into[layer] += found
    return a


def _subjects(counts: Tensor, number: int) -> Tensor:
    """(sample, subject, expert): tokens of a person and of the reference that shows them."""
    return counts[:, 2 : 2 + number] + counts[:, 2 + number : 2 + 2 * number]


def _cells(counts: Tensor, labels: range) -> tuple[Tensor, Tensor]:
    """Every (sample, kind) as a sample of its own, so that shuffles exchange kinds between samples."""
    flat = counts.flatten(0, 1)
    label = torch.tensor(list(labels)).repeat(len(counts))
    some = flat.sum(1) > 0
    return flat[some], label[some]
