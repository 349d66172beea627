"""Collapsing a mixture to one ordinary LoRA: exact where it can be, by best rank on request."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save_file
from torch import Tensor, nn

from moe_lora.checkpoint import whole
from moe_lora.inject import MoELoRA
from moe_lora.layer import Mixture, MoELoRALayer
from moe_lora.routing import Routing


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
    """``sum_i g_i s B_i A_i`` as one product of rank e r."""
    a, b = whole(mixture.lora_a.detach()), whole(mixture.lora_b.detach())
    scaled = b * (gates.to(b.dtype).to(b.device) * mixture.config.scaling)[:, None, None]
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


def truncate(lora: LowRank, rank: int) -> tuple[LowRank, float]:
    """The product of rank ``rank`` nearest to ``lora_b lora_a`` (Eckart-Young), and its relative Frobenius error.

    Works on the small factors: ``B = Q_b R_b``, ``A^T = Q_a R_a``, singular value decomposition of ``R_b R_a^T``.

    Raises:
        ValueError: rank < 1.
    """
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    q_a, r_a = torch.linalg.qr(lora.lora_a.double().T)
    q_b, r_b = torch.linalg.qr(lora.lora_b.double())
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    norm, lost = float(s.norm()), float(s[rank:].norm())
    root = s[:rank].sqrt()
    near = LowRank((q_a @ (v[:rank].T * root)).T, q_b @ (u[:, :rank] * root))
    dtype = lora.lora_a.dtype
    return LowRank(near.lora_a.to(dtype).contiguous(), near.lora_b.to(dtype).contiguous()), lost / norm if norm else 0.0


def _mean_gates(handle: MoELoRA, run: Callable[[], object]) -> dict[str, Tensor]:
    """Mean weight of each expert over all tokens that ``run`` shows a layer; an expert that is not chosen counts as 0."""
    total = {
        name: torch.zeros(layer.config.num_experts + 1, dtype=torch.float64) for name, layer in handle.layers.items()
    }

    def observer(name: str, e: int) -> Callable[[Routing, tuple[int, ...]], None]:
        def observe(routing: Routing, shape: tuple[int, ...]) -> None:
            index, weights = routing.expert_index.cpu(), routing.gate_weights.detach().double().cpu()
            kept = index >= 0
            total[name].index_add_(0, index[kept], weights[kept])
            total[name][e] += int(kept[:, 0].sum())

        return observe

    observers = {name: observer(name, layer.config.num_experts) for name, layer in handle.layers.items()}
    for name, layer in handle.layers.items():
        layer.state.observers.append(observers[name])
    try:
        with torch.no_grad():
            run()
    finally:
        for name, layer in handle.layers.items():
            layer.state.observers.remove(observers[name])
    return {name: t[:-1] / t[-1].clamp_min(1) for name, t in total.items()}


def _output_errors(handle: MoELoRA, loras: dict[str, LowRank], run: Callable[[], object]) -> dict[str, float]:
    """``sqrt(sum |delta(h) - B A h|^2 / sum |delta(h)|^2)`` over the tokens that ``run`` shows."""
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in loras}

    def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def compare(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            assert isinstance(module, MoELoRALayer)
            delta = Mixture.forward(module, args[0])
            h, (a, b) = args[0].reshape(-1, args[0].shape[-1]), loras[name]
            near = (h.to(a.dtype) @ a.T) @ b.T
            sums[name] += torch.stack([(delta - near).double().square().sum(), delta.double().square().sum()]).cpu()

        return compare

    hooks = [layer.register_forward_pre_hook(hook(name)) for name, layer in handle.layers.items()]
    try:
        with torch.no_grad():
            run()
    finally:
        for h in hooks:
            h.remove()
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
        ValueError: rank < 1.
    """
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


def save_peft_lora(handle: MoELoRA, path: str | Path, loras: dict[str, LowRank] | None = None) -> Path:
    """Writes ordinary LoRA files as peft does (``adapter_config.json``, ``adapter_model.safetensors``); peft itself is not needed.

    Args:
        handle: Of the model.
        path: Folder.
        loras: Of every layer, for example from `approximate`; by default `to_lora` of each.

    Raises:
        ValueError: A mixture is no ordinary LoRA (see `to_lora`), or sits around a module that is not one linear, which peft cannot adapt.
    """
    for name, layer in handle.layers.items():
        if not isinstance(layer.base, nn.Linear):
            raise ValueError(
                f"{name} must be one nn.Linear to be a LoRA in peft's format, got {type(layer.base).__name__}"
            )
    loras = {name: to_lora(layer) for name, layer in handle.layers.items()} if loras is None else loras
    ranks = {len(lora.lora_a) for lora in loras.values()}
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{n}.lora_A.weight": lora.lora_a.contiguous().cpu() for n, lora in loras.items()}
    tensors |= {f"base_model.model.{n}.lora_B.weight": lora.lora_b.contiguous().cpu() for n, lora in loras.items()}
    (rank,) = ranks
    meta = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "target_modules": sorted(loras),
        "lora_dropout": 0.0,
        "bias": "none",
    }
    save_file(tensors, folder / "adapter_model.safetensors.tmp", {"format": "pt"})
    (folder / "adapter_config.json.tmp").write_text(json.dumps(meta, indent=2) + "\n")
    os.replace(folder / "adapter_model.safetensors.tmp", folder / "adapter_model.safetensors")
    os.replace(folder / "adapter_config.json.tmp", folder / "adapter_config.json")
    return folder
