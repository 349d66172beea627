"""Slow twins of the objectives that are means over points: Python loops over samples and elements, one formula a line."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def nft_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    reward: list[float],
    beta: float,
    sigma: list[float] | None = None,
    self_normalized: bool = False,
) -> Tensor:
    """DiffusionNFT's loss, sample by sample; self-normalised as written in the paper, on predicted clean samples.

    The noised sample is taken as 0 and the clean one as ``-sigma * target``, which is what makes ``target`` the velocity.
    """
    losses = []
    for i, r in enumerate(reward):
        if math.isnan(r):
            continue
        v, old, goal = velocity[i].flatten(), old_velocity[i].flatten().detach(), target[i].flatten()
        terms = []
        for policy, weight in (((1 - beta) * old + beta * v, r), ((1 + beta) * old - beta * v, 1 - r)):
            if self_normalized:
                assert sigma is not None
                clean, predicted = 0.0 - sigma[i] * goal, 0.0 - sigma[i] * policy
                size = sum(abs(float(p - c)) for p, c in zip(predicted.detach(), clean, strict=True)) / len(goal)
                terms.append(
                    weight * sum((p - c) ** 2 for p, c in zip(predicted, clean, strict=True)) / len(goal) / size
                )
            else:
                terms.append(weight * sum((p - g) ** 2 for p, g in zip(policy, goal, strict=True)) / len(goal))
        losses.append(terms[0] + terms[1])
    return torch.stack(losses).mean()


def awm_loss(
    velocity: Tensor,
    old_velocity: Tensor,
    target: Tensor,
    advantages: list[float],
    clip_range: float | None,
    weight: list[float],
) -> Tensor:
    """Advantage-weighted matching, from the two matching losses themselves."""
    losses = []
    for i, a in enumerate(advantages):
        if math.isnan(a):
            continue
        n = target[i].numel()
        new = sum((v - t) ** 2 for v, t in zip(velocity[i].flatten(), target[i].flatten(), strict=True)) / n
        old = (
            sum((v - t) ** 2 for v, t in zip(old_velocity[i].flatten().detach(), target[i].flatten(), strict=True)) / n
        )
        ratio = torch.exp(-weight[i] * new) / torch.exp(torch.as_tensor(-weight[i] * old))
        plain = ratio * a
        clipped = plain if clip_range is None else torch.clamp(ratio, 1 - clip_range, 1 + clip_range) * a
        losses.append(-torch.min(plain, clipped))
    return torch.stack(losses).mean()


def kl_mask(
    new_log_prob: list[float],
    old_log_prob: list[float],
    mean: Tensor,
    old_mean: Tensor,
    std: list[float],
    advantages: list[float],
    threshold: float,
) -> list[bool]:
    """Flow-DPPO's mask, sample by sample."""
    keep = []
    for i, a in enumerate(advantages):
        pairs = list(zip(mean[i].flatten().tolist(), old_mean[i].flatten().tolist(), strict=True))
        divergence = sum((m - o) ** 2 for m, o in pairs) / len(pairs) / (2 * std[i] ** 2)
        ratio = math.exp(new_log_prob[i] - old_log_prob[i])
        wrong = (a > 0 and ratio > 1) or (a < 0 and ratio < 1)
        keep.append(not (wrong and divergence > threshold))
    return keep


def gdpo_advantages(
    rewards: list[list[float]], weights: list[float], group_ids: list[int], eps: float = 1e-4
) -> list[float]:
    """GDPO in full, by loops: normalise in groups, weigh, sum, whiten."""
    summed = [0.0] * len(group_ids)
    for values, weight in zip(rewards, weights, strict=True):
        for i, group in enumerate(group_ids):
            members = [v for v, g in zip(values, group_ids, strict=True) if g == group]
            mean = sum(members) / len(members)
            std = math.sqrt(sum((m - mean) ** 2 for m in members) / len(members))
            summed[i] += weight * (values[i] - mean) / (std + eps)
    mean = sum(summed) / len(summed)
    std = math.sqrt(sum((a - mean) ** 2 for a in summed) / len(summed))
    return [(a - mean) / (std + eps) for a in summed]


def token_advantages(
    advantages: list[list[float]], regions: list[list[list[float]]], background: str
) -> list[list[float]]:
    """One advantage per token, by loops."""
    result = []
    for sample, areas in zip(advantages, regions, strict=True):
        row = []
        for n in range(len(areas[0])):
            owned = [area[n] for area in areas]
            total = max(1.0, sum(owned))
            value = sum(o / total * a for o, a in zip(owned, sample, strict=True))
            rest = 1 - sum(owned) / total
            row.append(value + (rest * sum(sample) if background == "sum" else 0.0))
        result.append(row)
    return result


def gradient_signal(gradients: list[list[float]]) -> tuple[float, float, float]:
    """Squared signal, squared noise and mean cosine, by loops over pairs of batches."""
    products, cosines = [], []
    lengths = [math.sqrt(sum(x * x for x in g)) for g in gradients]
    for i, g in enumerate(gradients):
        for j, h in enumerate(gradients):
            if i < j:
                products.append(sum(x * y for x, y in zip(g, h, strict=True)))
                cosines.append(products[-1] / (lengths[i] * lengths[j]))
    signal = sum(products) / len(products)
    second = sum(x * x for x in lengths) / len(lengths)
    return signal, second - signal, sum(cosines) / len(cosines)


def moving_average(values: list[float], decays: list[float]) -> list[float]:
    """An average that starts at the first value and follows the others."""
    average, path = values[0], []
    for value, decay in zip(values[1:], decays, strict=True):
        average = decay * average + (1 - decay) * value
        path.append(average)
    return path
