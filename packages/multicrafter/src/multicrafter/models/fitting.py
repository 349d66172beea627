"""Plain LoRAs that stand for mixtures of experts, where another program can load nothing else; what is lost, `multicrafter export` measures.

A mixture adds ``delta(h)`` to the output of a module. On a linear layer ``delta`` would be a LoRA if every token used one expert with
one weight. Beside a whole FFN it is none even then, because no layer of the FFN maps h to its output. What the FFN's last layer sees, its
activations g, is a function of h, so ``delta`` can be fitted there, by the matrix of a rank that maps g nearest to it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from moe_lora.export import LowRank
from torch import Tensor, nn

from multicrafter import UserError
from multicrafter.models.adapters import Adapters
from multicrafter.models.export import PlainLoRA, ordinary_layers

Way = Literal["fit", "best-expert"]


def reduced_rank_regression(
    gram: Float[Tensor, "d d"], cross: Float[Tensor, "d o"], rank: int, *, ridge: float = 1e-6
) -> tuple[LowRank, float]:
    """The product ``B A`` of a rank that minimises ``sum_n |y_n - B A x_n|^2``, in closed form.

    With ``X^T X = L L^T`` the minimum is ``W = L^-T [L^-1 X^T Y]_r``, where ``[.]_r`` keeps the r largest singular values (reduced-rank
    regression: Izenman 1975, "Reduced-rank regression for the multivariate linear model", J. Multivariate Analysis 5; Eckart-Young).

    Args:
        gram: ``X^T X``, float64.
        cross: ``X^T Y``, float64.
        rank: Of the result, at least 1; more than min(d, o) gives that.
        ridge: Added to the diagonal, times its mean: keeps what was hardly seen from being fitted.

    Returns:
        lora_a (r, d) and lora_b (o, r), float32, and how much of ``sum |y|^2`` is explained.

    >>> x, true = torch.randn(50, 4).double(), torch.ones(3, 4).double()
    >>> lora, _ = reduced_rank_regression(x.T @ x, x.T @ (x @ true.T), 1)
    >>> bool(((lora.lora_b @ lora.lora_a) - true.float()).abs().max() < 1e-3)
    True
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    scale = float(gram.diagonal().mean())
    if scale == 0:
        return LowRank(torch.zeros(1, len(gram)), torch.zeros(cross.shape[1], 1)), 0.0
    lower = torch.linalg.cholesky(gram + ridge * scale * torch.eye(len(gram), dtype=gram.dtype))
    u, s, vh = torch.linalg.svd(torch.linalg.solve_triangular(lower, cross, upper=False), full_matrices=False)
    u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    down = torch.linalg.solve_triangular(lower.T, u * s, upper=True)
    return LowRank(down.T.float().contiguous(), vh.T.float().contiguous()), float(s.square().sum())


@dataclass
class _Sums:
    """What is summed over the tokens of one mixture; float64."""

    gram: Tensor
    cross: Tensor
    delta: float = 0.0
    expert_cross: list[Tensor] = field(default_factory=list)
    expert_delta: list[float] = field(default_factory=list)
    expert_square: list[float] = field(default_factory=list)


class _Watcher:
    """Sums up activations, the mixture's output and each expert's own, for every mixture of an adapter, while the model runs."""

    def __init__(self, adapters: Adapters, *, by_expert: bool) -> None:
        assert adapters.experts is not None
        self.adapters, self.by_expert = adapters, by_expert
        self.sums: dict[str, _Sums] = {}
        self.targets = {name: _target(adapters, name, layer.base) for name, layer in adapters.experts.layers.items()}
        self._seen: dict[str, dict[str, Tensor]] = {name: {} for name in self.targets}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Hooks on while the context is open."""
        assert self.adapters.experts is not None
        hooks: list[Any] = []
        for name, layer in self.adapters.experts.layers.items():
            path, inner = self.targets[name][len(name) :].lstrip("."), self._seen[name]
            last = layer.base.get_submodule(path) if path else layer.base
            hooks += [
                last.register_forward_pre_hook(lambda _m, args, kept=inner: kept.__setitem__("g", args[0])),
                layer.base.register_forward_hook(lambda _m, _a, out, kept=inner: kept.__setitem__("base", out)),
                layer.register_forward_hook(lambda _m, args, out, name=name: self._add(name, args[0], out)),
            ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def _add(self, name: str, h: Tensor, out: Tensor) -> None:
        assert self.adapters.experts is not None
        layer, kept = self.adapters.experts.layers[name], self._seen[name]
        g = kept["g"].flatten(0, -2).cpu().double()
        delta = (out.cpu().double() - kept["base"].cpu().double()).flatten(0, -2)
        kept.clear()
        if name not in self.sums:
            width, wide, count = g.shape[1], delta.shape[1], layer.config.num_experts if self.by_expert else 0
            self.sums[name] = _Sums(
                torch.zeros(width, width, dtype=torch.float64), torch.zeros(width, wide, dtype=torch.float64), 0.0,
                [torch.zeros(width, wide, dtype=torch.float64) for _ in range(count)], [0.0] * count, [0.0] * count,
            )  # fmt: skip
        sums = self.sums[name]
        sums.gram += g.T @ g
        sums.cross += g.T @ delta
        sums.delta += float(delta.square().sum())
        tokens = h.flatten(0, -2).to(layer.lora_a.dtype)
        for i in range(len(sums.expert_cross)):
            own = ((tokens @ layer.lora_a[i].T) @ layer.lora_b[i].T * layer.scaling).cpu().double()
            sums.expert_cross[i] += g.T @ own
            sums.expert_delta[i] += float((own * delta).sum())
            sums.expert_square[i] += float(own.square().sum())


def _target(adapters: Adapters, name: str, base: nn.Module) -> str:
    """The linear layer that a mixture's output is fitted on: the module itself, or the last linear layer of the FFN."""
    if isinstance(base, nn.Linear):
        return name
    assert adapters.experts is not None
    wanted, width = re.compile(adapters.backbone.ffn_linears), adapters.experts.layers[name].lora_b.shape[1]
    found = [
        full
        for inner, module in base.named_modules()
        if wanted.fullmatch(full := f"{name}.{inner}") and getattr(module, "out_features", None) == width
    ]
    if not found:
        raise UserError(f"backbone must name the linear layers of {name!r} in ffn_linears to be exported, got none")
    return found[-1]


@torch.no_grad()
def plain_of(adapters: Adapters, run: Callable[[], object], way: Way, *, rank: int | None = None) -> PlainLoRA:
    """A plain LoRA in place of a mixture, from what the mixture does while ``run`` shows the model typical inputs.

    The ordinary LoRAs of the attention are kept as they are. For each mixture, "fit" is the best LoRA of a rank, see
    `reduced_rank_regression`. "best-expert" keeps the one expert that comes nearest to the mixture over all tokens, with the one weight that
    is best for it; on a linear layer that is the expert itself, beside a whole FFN it is fitted on the FFN's last layer.

    Args:
        adapters: With experts, on their model.
        run: Runs the model.
        way: One of the two.
        rank: Of each fitted LoRA; default: ranks of all experts together for "fit", of one for "best-expert".

    Raises:
        UserError: There are no experts, or ``run`` showed some of them nothing.
    """
    if adapters.experts is None:
        raise UserError("adapter must have experts to be fitted, got none: it is exported exactly")
    if way not in ("fit", "best-expert"):
        raise UserError(f"lossy must be 'fit' or 'best-expert', got {way!r}")
    config = adapters.config
    rank = rank or (config.rank * config.num_experts if way == "fit" else config.rank)
    watcher = _Watcher(adapters, by_expert=way == "best-expert")
    with watcher.watching():
        run()
    layers = ordinary_layers(adapters.state_dict(), config)
    for name, layer in adapters.experts.layers.items():
        if name not in watcher.sums:
            raise UserError(f"run must show every mixture some tokens, got none at {name}")
        sums, target = watcher.sums[name], watcher.targets[name]
        if way == "fit":
            layers[target] = reduced_rank_regression(sums.gram, sums.cross, rank)[0]
            continue
        i, weight = best_expert(sums.expert_delta, sums.expert_square)
        if target == name:
            a, b = (t.detach()[i].float().cpu().clone() for t in (layer.lora_a, layer.lora_b))
            layers[target] = LowRank(a, weight * layer.scaling * b)
        else:
            layers[target] = reduced_rank_regression(sums.gram, weight * sums.expert_cross[i], rank)[0]
    return PlainLoRA(
        layers=layers, backbone=adapters.backbone, notes=adapters.notes, exactness={"way": way, "rank": rank}
    )


def best_expert(inner: list[float], square: list[float]) -> tuple[int, float]:
    """The expert e and weight w with the least ``sum |delta - w e|^2``: the one with the largest ``<delta, e>^2 / |e|^2``.

    >>> best_expert([2.0, 3.0], [4.0, 3.0])
    (1, 1.0)
    """
    gains = [a * a / b if b > 0 else 0.0 for a, b in zip(inner, square, strict=True)]
    best = max(range(len(gains)), key=gains.__getitem__)
    return best, inner[best] / square[best] if square[best] > 0 else 0.0


@contextmanager
def applied(transformer: nn.Module, layers: Mapping[str, LowRank]) -> Iterator[None]:
    """``W x + B (A x)`` on a base without adapters, inside the context; gradients reach A and B.

    Raises:
        UserError: A layer is not there.
    """
    modules = dict(transformer.named_modules())
    if missing := [name for name in layers if not isinstance(modules.get(name), nn.Linear)]:
        raise UserError(
            f"transformer must have a linear layer {missing[0]!r}, got none: another base, or an adapter is still on it"
        )

    def hook(lora: LowRank) -> Callable[..., Tensor]:
        def add(_m: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = args[0].to(lora.lora_a.dtype)
            return out + ((x @ lora.lora_a.T) @ lora.lora_b.T).to(out.dtype)

        return add

    hooks = [modules[name].register_forward_hook(hook(lora)) for name, lora in layers.items()]
    try:
        yield
    finally:
        for handle in hooks:
            handle.remove()


def distil(
    transformer: nn.Module,
    lora: PlainLoRA,
    velocity: Callable[[int], Tensor],
    targets: Sequence[Tensor],
    *,
    steps: int,
    learning_rate: float = 1e-3,
) -> PlainLoRA:
    """Trains a plain LoRA further so that the model's velocity comes nearer to the mixture's: Adam on the squared difference.

    Args:
        transformer: The base, without adapters.
        lora: Where to start.
        velocity: Runs the model on batch i, with gradients.
        targets: The mixture's velocity on each batch.
        steps: Batches are taken in turn.
        learning_rate: At the start; it falls linearly to 0.
    """
    layers = {n: LowRank(*(t.detach().clone().requires_grad_() for t in pair)) for n, pair in lora.layers.items()}
    parameters = [t for pair in layers.values() for t in pair]
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    with torch.enable_grad(), applied(transformer, layers):
        for step in range(steps):
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * (1 - step / steps)
            loss = (velocity(step % len(targets)) - targets[step % len(targets)]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    trained = {n: LowRank(*(t.detach() for t in pair)) for n, pair in layers.items()}
    return replace(lora, layers=trained, exactness={**lora.exactness, "distilled_steps": steps})
