"""Collapsing a mixture to one ordinary LoRA: exact where it can be, by best rank on request."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from moe_lora.checkpoint import check_numbers, make_folder, whole, write_adapter
from moe_lora.dispatch import experts
from moe_lora.inject import MoELoRA
from moe_lora.layer import Mixture
from moe_lora.routing import Routing
from moe_lora.standin import StandIn


class LowRank(NamedTuple):
    """``delta(h) = lora_b (lora_a h)``: an ordinary LoRA, its scale already in lora_b. lora_a (r, d), lora_b (o, r)."""

    lora_a: Float[Tensor, "r d"]
    lora_b: Float[Tensor, "o r"]


class Approximation(NamedTuple):
    """A LoRA that stands for a mixture.

    truncation_error: relative Frobenius error against the mixture with its gates fixed to their means; output_error: relative
    error (root of summed squares) against the mixture's own output on the tokens that ``run`` showed, None without.
    """

    lora: LowRank
    truncation_error: float
    output_error: float | None


def _stacked(mixture: Mixture, gates: Float[Tensor, " e"]) -> LowRank:
    """``sum_i g_i s B_i A_i`` as one product of rank e r; s is the layer's own scaling, which PEFT may have changed."""
    a, b = whole(mixture.lora_a.detach()), whole(mixture.lora_b.detach())
    scaled = b * (gates.to(b.dtype).to(b.device) * mixture.scaling)[:, None, None]
    return LowRank(a.flatten(0, 1).clone(), scaled.transpose(0, 1).flatten(1).clone())


def to_lora(mixture: Mixture) -> LowRank:
    """The ordinary LoRA that a mixture is, exactly.

    It is one in two cases: a single expert (its gate is 1), or top_k = num_experts with fixed gates, which are 1/e each (all rows
    of the router are equal, so no token can prefer an expert); the second has rank num_experts * rank.

    Raises:
        ValueError: Neither is the case; the message says why.
    """
    config, router = mixture.config, whole(mixture.router.weight.detach())
    if config.num_experts == 1:
        return _stacked(mixture, torch.ones(1))
    if config.top_k < config.num_experts:
        raise ValueError(
            f"mixture must send every token to every expert to be one LoRA, got top_k = {config.top_k} of {config.num_experts} experts:"
            " different tokens get different updates; approximate() gives the best LoRA of a rank"
        )
    if not bool((router == router[:1]).all()):
        raise ValueError(
            "mixture must have fixed gates to be one LoRA, got a router whose weights differ between experts:"
            " gates depend on the token; approximate() gives the best LoRA of a rank"
        )
    return _stacked(mixture, torch.full((config.num_experts,), 1 / config.num_experts))


def _check_rank(rank: int) -> None:
    if not isinstance(rank, int) or rank < 1:
        raise ValueError(f"rank must be an integer of at least 1, got {rank!r}")


def truncate(lora: LowRank, rank: int) -> tuple[LowRank, float]:
    """The product of rank ``rank`` nearest to ``lora_b lora_a`` (Eckart-Young), and its relative Frobenius error.

    Works on the small factors: ``B = Q_b R_b``, ``A^T = Q_a R_a``, singular value decomposition of ``R_b R_a^T``.

    Raises:
        ValueError: rank < 1.
    """
    _check_rank(rank)
    q_a, r_a = torch.linalg.qr(lora.lora_a.cpu().double().T)  # not every device has float64
    q_b, r_b = torch.linalg.qr(lora.lora_b.cpu().double())
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    norm, lost = float(s.norm()), float(s[rank:].norm())
    root = s[:rank].sqrt()
    near = LowRank((q_a @ (v[:rank].T * root)).T, q_b @ (u[:, :rank] * root))
    near = LowRank(near.lora_a.to(lora.lora_a).contiguous(), near.lora_b.to(lora.lora_b).contiguous())
    return near, lost / norm if norm else 0.0


Seen = Callable[[str, Float[Tensor, "n d"], Routing], None]


def _watch(handle: MoELoRA, run: Callable[[], object], seen: Seen) -> None:
    """Calls ``seen`` with the name, the tokens and the routing of every pass of a layer that ``run`` makes; padding is left out.

    Raises:
        ValueError: A layer was shown no token.
    """
    shown: dict[str, int] = dict.fromkeys(handle.layers, 0)
    latest: dict[str, Routing] = {}

    def observer(name: str) -> Callable[[Routing, tuple[int, ...]], None]:
        return lambda routing, shape: latest.__setitem__(name, routing)

    def hook(name: str, width: int) -> Callable[..., None]:
        def after(module: StandIn, args: tuple[object, ...], kwargs: dict[str, object], out: object) -> None:
            routing = latest.pop(name, None)  # none where the adapter is off
            if routing is not None:
                routed = routing.expert_index[:, 0] >= 0
                tokens = module.tokens(args, kwargs, width).reshape(-1, width)[routed]
                shown[name] += len(tokens)
                seen(name, tokens, Routing(*(t.detach()[routed] for t in routing)))

        return after

    observers = {name: observer(name) for name in handle.layers}
    hooks = [
        handle.module(name).register_forward_hook(hook(name, layer.lora_a.shape[-1]), with_kwargs=True)
        for name, layer in handle.layers.items()
    ]
    for name, layer in handle.layers.items():
        layer.state.observers.append(observers[name])
    try:
        with torch.no_grad():
            run()
    finally:
        for name, layer in handle.layers.items():
            layer.state.observers.remove(observers[name])
        for h in hooks:
            h.remove()
    if unseen := [name for name, count in shown.items() if not count]:
        raise ValueError(f"run must show every layer some tokens, got none at {unseen[:3]}")


def _mean_gates(handle: MoELoRA, run: Callable[[], object]) -> dict[str, Tensor]:
    """Mean weight of each expert over all tokens that ``run`` shows a layer; an expert that is not chosen counts as 0."""
    total = {n: torch.zeros(layer.config.num_experts, dtype=torch.float64) for n, layer in handle.layers.items()}
    count = dict.fromkeys(handle.layers, 0)

    def seen(name: str, tokens: Tensor, routing: Routing) -> None:
        total[name].index_add_(0, routing.expert_index.flatten().cpu(), routing.gate_weights.flatten().cpu().double())
        count[name] += len(tokens)

    _watch(handle, run, seen)
    return {name: t / count[name] for name, t in total.items()}


def _output_errors(handle: MoELoRA, loras: dict[str, LowRank], run: Callable[[], object]) -> dict[str, float]:
    """``sqrt(sum |delta(h) - B A h|^2 / sum |delta(h)|^2)`` over the tokens that ``run`` shows."""
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in loras}

    def seen(name: str, tokens: Tensor, routing: Routing) -> None:
        layer, (a, b) = handle.layers[name], loras[name]
        h, up, down = tokens.to(a.dtype), whole(layer.lora_b.detach()), whole(layer.lora_a.detach())
        delta = experts(h, down, up, routing.gate_weights * layer.scaling, routing.expert_index)
        near = (h @ a.T) @ b.T
        by_token = [t.float().square().sum(-1).cpu().double() for t in (delta - near, delta)]
        sums[name] += torch.stack(by_token).sum(1)

    _watch(handle, run, seen)
    return {name: float((s[0] / s[1].clamp_min(1e-300)).sqrt()) for name, s in sums.items()}


def approximate(
    handle: MoELoRA, rank: int, run: Callable[[], object] | None = None, *, report: Callable[[str], object] = print
) -> dict[str, Approximation]:
    """The LoRA of a rank that is nearest to each mixture with its gates fixed to their means; says how far off it is.

    Args:
        handle: Of the model.
        rank: Of the result; at rank num_experts * rank nothing is truncated.
        run: Shows the model typical inputs (called twice, without gradients): gates take their means over these tokens, and the
            error of the output is measured. Without it every gate counts as 1 / num_experts.
        report: Gets one line per layer.

    Raises:
        ValueError: rank < 1, or ``run`` shows some layer no token.
    """
    _check_rank(rank)
    gates = {
        n: torch.full((layer.config.num_experts,), 1 / layer.config.num_experts) for n, layer in handle.layers.items()
    }
    if run is not None:
        gates = _mean_gates(handle, run)
    near = {name: truncate(_stacked(layer, gates[name]), rank) for name, layer in handle.layers.items()}
    errors = _output_errors(handle, {n: lora for n, (lora, _) in near.items()}, run) if run is not None else {}
    result = {name: Approximation(lora, lost, errors.get(name)) for name, (lora, lost) in near.items()}
    for name, (_, lost, error) in result.items():
        measured = "not measured, give run" if error is None else f"{error:.1%}"
        report(f"{name}: rank {rank} keeps the mean of the experts to {lost:.1%}; error of the output {measured}")
    return result


def _check_linears(handle: MoELoRA) -> None:
    for name, layer in handle.layers.items():
        if not isinstance(layer.base, nn.Linear):
            raise ValueError(
                f"{name} must be one nn.Linear to be a LoRA in peft's format, got {type(layer.base).__name__}"
            )


def _checked(handle: MoELoRA, loras: dict[str, LowRank]) -> dict[str, LowRank]:
    """The LoRAs that go into a file, by the module's name in the model that it is for."""
    if loras.keys() != handle.layers.keys():
        odd = sorted(loras.keys() ^ handle.layers.keys())
        raise ValueError(
            f"loras must hold exactly the layers of the handle, {list(handle.layers)[:3]}, ..., got a difference in {odd[:3]}"
        )
    for name, (a, b) in loras.items():
        base = handle.layers[name].base
        assert isinstance(base, nn.Linear)
        want = f"lora_a (r, {base.in_features}) and lora_b ({base.out_features}, r)"
        if a.ndim != 2 or b.ndim != 2 or a.shape[1] != base.in_features or b.shape != (base.out_features, len(a)):
            raise ValueError(f"loras[{name!r}] must be {want}, got {tuple(a.shape)} and {tuple(b.shape)}")
    named = {handle.name_in_base(name): lora for name, lora in loras.items()}
    return named | {name: LowRank(a, b) for name, (a, b) in handle.ordinary_loras().items()}


def save_peft_lora(handle: MoELoRA, path: str | Path, loras: dict[str, LowRank] | None = None) -> Path:
    """Writes ordinary LoRA files as peft does (``adapter_config.json``, ``adapter_model.safetensors``); peft itself is not needed.

    Ranks may differ between layers. Of an adapter of PEFT the ordinary LoRAs beside the mixtures are written too.

    Args:
        handle: Of the model.
        path: Folder.
        loras: Of every layer, for example from `approximate`; by default `to_lora` of each.

    Raises:
        ValueError: A mixture is no ordinary LoRA (see `to_lora`), or sits around a module that is not one linear, which peft cannot adapt; or
            ``loras`` has other layers or shapes than the handle. Nothing is written then.
    """
    if not handle.layers:
        raise ValueError("handle must hold mixtures to be written, got none (removed?)")
    _check_linears(handle)
    loras = {name: to_lora(layer) for name, layer in handle.layers.items()} if loras is None else loras
    written = {
        n: LowRank(*(t.detach().contiguous().cpu() for t in lora)) for n, lora in _checked(handle, loras).items()
    }
    ranks = {name: len(lora.lora_a) for name, lora in written.items()}
    rank = max(set(ranks.values()), key=list(ranks.values()).count)
    other = {f"^{re.escape(name)}": r for name, r in ranks.items() if r != rank}
    folder = Path(path)
    tensors = {f"base_model.model.{n}.lora_A.weight": lora.lora_a for n, lora in written.items()}
    tensors |= {f"base_model.model.{n}.lora_B.weight": lora.lora_b for n, lora in written.items()}
    meta = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": other,
        "alpha_pattern": other,
        # a list would be taken for suffixes, and match "1.0" where "0" is meant
        "target_modules": "|".join(re.escape(name) for name in sorted(written)),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    check_numbers("adapter to save", tensors)
    make_folder(folder)
    write_adapter(folder / "adapter_model.safetensors", tensors, {"format": "pt"}, folder / "adapter_config.json", meta)
    return folder
