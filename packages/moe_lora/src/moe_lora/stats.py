"""What routers do: load, entropy, load by token kind, block, sigma and layout, specialisation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from moe_lora.inject import MoELoRA, for_layer
from moe_lora.inputs import check_index, check_tensors, check_whole
from moe_lora.routing import Routing, RoutingStatistics, entropy_of, routing_statistics
from moe_lora.state import Observer

__all__ = [
    "By",
    "RoutingLog",
    "RoutingStatistics",
    "Specialisation",
    "collect",
    "load_by_kind",
    "mutual_information",
    "routing_statistics",
    "specialisation",
]

By = Literal["block", "kind", "sigma", "layout"]
MAX_PERMUTATIONS = 1_000_000
MAX_EXPERTS = 1_000_000


class Specialisation(NamedTuple):
    """Mutual information between experts and labels.

    nats: the estimate; share: of the labels' entropy, in [0, 1]; chance: mean of the estimate when labels are shuffled over samples (an
    estimate from few samples is never 0); p_value: how often a shuffle reached it.
    """

    nats: float
    share: float
    chance: float
    p_value: float


def load_by_kind(expert_index: Int[Tensor, "n k"], kinds: Int[Tensor, " n"], num_experts: int) -> Float[Tensor, "c e"]:
    """Joint shares (c, e) of token kinds and experts; sums to 1.

    >>> load_by_kind(torch.tensor([[0], [1]]), torch.tensor([0, 1]), 2)
    tensor([[0.5000, 0.0000],
            [0.0000, 0.5000]])

    Raises:
        ValueError: An expert or a kind is not there, or there is not one kind per token.
    """
    check_whole("num_experts", num_experts, 1, MAX_EXPERTS)
    check_tensors("whole", {}, expert_index=(expert_index, "n k"), kinds=(kinds, "n"))
    check_index("expert_index", expert_index, num_experts)
    kinds = _as_kinds(kinds)
    joint = _count(expert_index, kinds, torch.zeros_like(kinds), 1, int(kinds.max()) + 1, num_experts)[0].cpu().double()
    return joint.div(joint.sum().clamp_min(1)).float().to(expert_index.device)


def _counts(name: str, counts: Tensor) -> Tensor:
    """Counts or shares in float64 on the CPU; raises ValueError where one is negative, infinite or NaN."""
    found = counts.detach().cpu().double()
    if not bool((found.isfinite() & (found >= 0)).all()):
        raise ValueError(f"{name} must be finite and at least 0, got others among them")
    return found


def _count(index: Tensor, kinds: Tensor, rows: Tensor, b: int, c: int, e: int) -> Tensor:
    """(b, c, e): assignments per row, kind and expert."""
    cell = ((rows * c + kinds)[:, None] * e + index)[index >= 0]
    return torch.bincount(cell.flatten(), minlength=b * c * e).view(b, c, e)


def mutual_information(joint: Float[Tensor, "c e"]) -> float:
    """``sum p(c, e) log(p(c, e) / (p(c) p(e)))`` in nats, of counts or shares: 0 if experts ignore the label, at most log min(c, e).

    >>> round(mutual_information(torch.eye(2) / 2), 4)
    0.6931

    Raises:
        ValueError: A count is negative, infinite or NaN.
    """
    check_tensors("real", {}, joint=(joint, "c e"))
    counts = _counts("joint", joint)
    p = counts / counts.sum().clamp_min(1e-300)
    return max(0.0, float(entropy_of(p.sum(0)) + entropy_of(p.sum(1)) - entropy_of(p.flatten())))


def specialisation(
    counts: Float[Tensor, "s e"] | Int[Tensor, "s e"],
    labels: Int[Tensor, " s"],
    *,
    generator: torch.Generator | None = None,
    permutations: int = 199,
) -> Specialisation:
    """Do experts know the label (say, the layout) of the sample their tokens come from?

    Mutual information between expert and label over all tokens, beside what shuffled labels give: tokens of one sample are alike, so
    the textbook correction for independent tokens would call everything specialised.

    Args:
        counts: Assignments per sample and expert.
        labels: One label per sample, at least 0.
        generator: Of the shuffles; without one they are seeded with 0.
        permutations: How many.

    Raises:
        ValueError: Another number of labels than samples, fewer than one permutation, or counts or labels that are none.

    >>> score = specialisation(torch.tensor([[9, 0], [8, 1], [0, 9], [1, 8]]), torch.tensor([0, 0, 1, 1]))
    >>> score.nats > score.chance
    True
    """
    sizes: dict[str, int] = {}
    check_tensors("real", sizes, counts=(counts, "s e"))
    check_tensors("whole", sizes, labels=(labels, "s"))
    check_whole("permutations", permutations, 1, MAX_PERMUTATIONS)
    if labels.numel() and int(labels.min()) < 0:
        raise ValueError(f"labels must be at least 0, got {int(labels.min())}")
    generator = generator or torch.Generator().manual_seed(0)
    counts, onehot = _counts("counts", counts), torch.nn.functional.one_hot(labels.long().cpu()).double()

    def information(order: Tensor) -> float:
        return mutual_information(onehot[order].T @ counts)

    nats = information(torch.arange(len(labels)))
    shuffled = torch.tensor(
        [information(torch.randperm(len(labels), generator=generator)) for _ in range(permutations)]
    )
    share_of_label = onehot.T @ counts.sum(1)
    entropy = float(entropy_of(share_of_label / share_of_label.sum().clamp_min(1)))
    reached = int((shuffled >= nats - 1e-12).sum())
    return Specialisation(
        nats, nats / entropy if entropy else 0.0, float(shuffled.mean()), (1 + reached) / (1 + permutations)
    )


@dataclass(kw_only=True)
class RoutingLog:
    """Counts of many passes: layer -> one (b, c, e) tensor per pass of rows, token kinds and experts; made by `collect`.

    Set `sigma` (a number, or one per row) and `layout` (a label per row) before a pass, and its rows are counted under them.
    """

    kind_names: tuple[str, ...] = ("token",)
    counts: dict[str, list[Tensor]] = field(default_factory=dict)
    sigmas: dict[str, list[Tensor]] = field(default_factory=dict)
    layouts: dict[str, list[Tensor]] = field(default_factory=dict)
    sigma: float | Sequence[float] | Tensor | None = None
    layout: Tensor | Sequence[int] | None = None

    def joint(self, by: By, layer: str, *, sigma_bins: int = 4) -> tuple[list[str], Float[Tensor, "c e"]]:
        """Names and counts of a layer's assignments by kind, sigma (equal bins of [0, 1]) or layout; "block" is one row.

        Raises:
            ValueError: No sigma or layout was set before some pass.
        """
        counts = torch.cat(self.counts[layer]).double()
        if by == "block":
            return [layer], counts.sum((0, 1))[None]
        if by == "kind":
            return list(self.kind_names), counts.sum(0)
        label, names = self.labels(by, layer, sigma_bins=sigma_bins)
        joint = counts.new_zeros(len(names), counts.shape[-1]).index_add_(0, label, counts.sum(1))
        return names, joint

    def labels(self, by: By, layer: str, *, sigma_bins: int = 4) -> tuple[Int[Tensor, " s"], list[str]]:
        """Label of each row that passed a layer, and the labels' names, by "sigma" or "layout"."""
        if by not in ("sigma", "layout"):
            raise ValueError(f"by must be 'sigma' or 'layout', got {by!r}")
        values = torch.cat((self.sigmas if by == "sigma" else self.layouts)[layer])
        if bool((values.isnan() if by == "sigma" else values < 0).any()):
            raise ValueError(f"log.{by} must be set before every pass, got some pass without it")
        if by == "layout":
            return values, [f"layout {i}" for i in range(int(values.max()) + 1)]
        names = [f"sigma {i / sigma_bins:.2f}-{(i + 1) / sigma_bins:.2f}" for i in range(sigma_bins)]
        return (values * sigma_bins).long().clamp(0, sigma_bins - 1), names

    def load(self, by: By = "block") -> dict[str, Float[Tensor, "c e"]]:
        """Per layer, expert shares (c, e) for each kind, sigma bin or layout; a row sums to 1, or to 0 where nothing was counted."""
        joint = {layer: self.joint(by, layer)[1] for layer in self.counts}
        return {layer: (j / j.sum(1, keepdim=True).clamp_min(1)).float() for layer, j in joint.items()}

    def entropy(self) -> dict[str, float]:
        """Per layer, entropy of the load in nats: log e when balanced, 0 when one expert takes all."""
        return {layer: float(entropy_of(load[0].double())) for layer, load in self.load("block").items()}

    def mutual_information(self, by: By) -> dict[str, float]:
        """Per layer, `mutual_information` between experts and kinds, sigma bins or layouts (experts of two layers have nothing in common)."""
        return {layer: mutual_information(self.joint(by, layer)[1]) for layer in self.counts}

    def specialisation(
        self, by: By = "layout", *, generator: torch.Generator | None = None, permutations: int = 199
    ) -> dict[str, Specialisation]:
        """Per layer, `specialisation` by layout or sigma."""
        return {
            layer: specialisation(
                torch.cat(self.counts[layer]).sum(1),
                self.labels(by, layer)[0],
                generator=generator,
                permutations=permutations,
            )
            for layer in self.counts
        }


def _as_kinds(kinds: Any) -> Tensor:
    """Kinds of tokens as whole numbers from 0 on.

    Raises:
        ValueError: They are none.
    """
    try:
        found = torch.as_tensor(kinds)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"kinds must be whole numbers of at least 0, got {type(kinds).__name__}") from None
    if found.is_floating_point() or found.is_complex() or not found.numel() or int(found.min()) < 0:
        got = f"{found.dtype} {tuple(found.shape)}" + (
            f" down to {int(found.min())}" if found.numel() and not found.is_complex() else ""
        )
        raise ValueError(f"kinds must be whole numbers of at least 0, one per token, got {got}")
    return found.long()


def _per_row(
    value: Tensor | Sequence[float] | Sequence[int] | float | None,
    rows: int,
    missing: float,
    dtype: torch.dtype,
    name: str,
) -> Tensor:
    filled = torch.as_tensor(missing if value is None else value, dtype=dtype).cpu()
    if filled.ndim > 1 or (filled.ndim == 1 and len(filled) not in (1, rows)):
        raise ValueError(f"{name} must be one value or one per row ({rows}), got shape {tuple(filled.shape)}")
    return filled.expand(rows).clone()


@contextmanager
def collect(
    handle: MoELoRA,
    kinds: Int[Tensor, ...] | Mapping[str, Int[Tensor, ...]] | None = None,
    kind_names: Sequence[str] | None = None,
) -> Iterator[RoutingLog]:
    """Counts where tokens go in all forward passes inside the context; padding and checkpointing's second passes are not counted.

    Args:
        handle: Of the model.
        kinds: Kind of each token, (n,) for all rows or (b, n), at least 0; or regex on layer names -> kinds, where layers see different tokens
            (in FLUX: ff has image and reference tokens, ff_context text, single blocks all of them).
        kind_names: Names of the kinds, for example ("text", "image", "reference 1").

    Raises:
        ValueError: A layer has no kinds, or they do not fit its tokens.
    """
    by_name: Mapping[str, Any] = {} if kinds is None else kinds if isinstance(kinds, Mapping) else {".*": kinds}
    given = {pattern: _as_kinds(some) for pattern, some in by_name.items()}
    count = max((int(t.max()) + 1 for t in given.values()), default=1)
    names = (
        tuple(kind_names)
        if kind_names is not None
        else tuple(f"kind {i}" for i in range(count))
        if given
        else ("token",)
    )
    if len(names) < count:
        raise ValueError(f"kind_names must name all {count} kinds, got {names}")
    log = RoutingLog(kind_names=names)

    def observer(name: str, num_experts: int) -> Observer:
        def observe(routing: Routing, shape: tuple[int, ...]) -> None:
            rows = shape[0] if len(shape) > 1 else 1
            index = routing.expert_index.cpu()
            kind = torch.zeros(len(index), dtype=torch.int64) if kinds is None else for_layer(given, name)
            if kind is None or kind.shape not in (shape, (len(index),), shape[-1:]):
                got = "none" if kind is None else str(tuple(kind.shape))
                raise ValueError(f"kinds of {name!r} must have the shape of its tokens {tuple(shape)}, got {got}")
            kind = (kind.expand(shape) if kind.shape == shape[-1:] else kind).reshape(-1).cpu().long()
            row = torch.arange(len(index)) // max(len(index) // rows, 1)
            log.counts.setdefault(name, []).append(_count(index, kind, row, rows, len(names), num_experts))
            log.sigmas.setdefault(name, []).append(_per_row(log.sigma, rows, float("nan"), torch.float64, "sigma"))
            log.layouts.setdefault(name, []).append(_per_row(log.layout, rows, -1.0, torch.int64, "layout"))

        return observe

    added = {name: observer(name, layer.config.num_experts) for name, layer in handle.layers.items()}
    try:
        for name, layer in handle.layers.items():
            layer.state.observers.append(added[name])
        yield log
    finally:
        for name, layer in handle.layers.items():
            layer.state.observers.remove(added[name])
