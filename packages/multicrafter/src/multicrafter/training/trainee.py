"""What both stages train: adapters on a transformer, on all ranks, with optimizer, moving average and generator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from moe_lora import MoELoRA, router_z_loss
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.adapters import Adapters, check_tensors
from multicrafter.models.flux.model import Text
from multicrafter.training import distributed
from multicrafter.training.checkpoint import Section
from multicrafter.training.optimization import AdamWConfig
from multicrafter.training.precision import ExecutionConfig, make_optimizer


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, flat: ``optimizer.<parameter>.<name>``."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value).clone()
        for index, parameter in enumerate(parameters)
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Restores `optimizer_tensors`, sharded as the parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    state: dict[int, dict[str, Any]] = {}
    for key in Section(tensors, "optimizer."):
        index, name = key.split(".", 1)
        value = distributed.like(tensors[f"optimizer.{key}"], parameters[int(index)])
        whole_number = value.dim() == 0 and not value.is_floating_point()
        state.setdefault(int(index), {})[name] = int(value) if whole_number else value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def global_aux_loss(experts: MoELoRA) -> Tensor:
    """`MoELoRA.aux_loss` with expert loads counted over all ranks, so that its gradient, averaged over ranks, is one process's.

        balance = e * sum_i f_i P_i,   f_i: share of the assignments of ALL ranks (no gradient),   P_i: this rank's mean probability

    The balance loss (Switch, arXiv 2101.03961, Eq. 4-6) is linear in P but not in f and P together.
    """
    routings = [layer.last for layer in experts.layers.values() if layer.last is not None]
    counts = torch.stack(
        [torch.bincount(r.expert_index.flatten(), minlength=experts.config.num_experts) for r in routings]
    )
    loads = distributed.all_sum(counts)
    loads = loads / loads.sum(1, keepdim=True)  # whole numbers: exact, and no device needs float64 for it
    balance = torch.stack(
        [
            experts.config.num_experts * (load * routing.gate_logits.softmax(-1).mean(0)).sum()
            for load, routing in zip(loads, routings, strict=True)
        ]
    ).mean()
    z = torch.stack([router_z_loss(routing.gate_logits) for routing in routings]).mean()
    experts.forget()
    return experts.config.balance_coef * balance + experts.config.z_coef * z


class Trainee:
    """The trained part of a stage."""

    def __init__(
        self,
        adapters: Adapters,
        execution: ExecutionConfig,
        *,
        lr: float,
        adamw: AdamWConfig,
        seed: int,
        sync_in_backward: bool = True,
    ) -> None:
        """Takes adapters on a prepared transformer; distributes it (see `distributed.distribute`), then makes the optimizer."""
        self.adapters, self.execution = adapters, execution
        for parameter in adapters.parameters():
            parameter.data = parameter.data.float()
            parameter.requires_grad_(True)  # somebody may have frozen the whole transformer meanwhile
        self.model = distributed.distribute(adapters.transformer, execution.parallel, sync_in_backward=sync_in_backward)
        self.optimizer = make_optimizer(adapters.parameters(), execution, lr=lr, adamw=adamw)
        self.generator = torch.Generator().manual_seed(seed)
        self.ema = {n: p.detach().clone() for n, p in adapters.named_parameters()} if execution.ema_decay else {}
        self.samples_seen = 0

    @property
    def device(self) -> torch.device:
        """Where the transformer is."""
        found: torch.device = next(self.adapters.transformer.parameters()).device
        return found

    def predict(self, tokens: Tensor, sigma: Tensor, text: Text, **context: Any) -> Tensor:
        """Velocity of the model with its adapters, in fp32 whatever it computes in."""
        with self.execution.autocast(self.device):
            return self.adapters.backbone.velocity(self.model, tokens, sigma, text, **context).float()

    def aux_loss(self) -> Tensor:
        """Router losses of the last forward pass."""
        if self.adapters.experts is None or not distributed.active():
            return self.adapters.aux_loss()
        return global_aux_loss(self.adapters.experts)

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Around the forward and backward of one micro-batch: ranks exchange gradients only in the last one."""
        if isinstance(self.model, distributed.Replicated) and not last:
            with self.model.no_sync():
                yield
            return
        if callable(switch := getattr(self.model, "set_requires_gradient_sync", None)):
            switch(last)
        yield

    def apply(self, max_grad_norm: float) -> float:
        """Clips, steps and averages; returns the gradients' norm over all ranks. Nothing happens if it is not finite."""
        norm = torch.nn.utils.clip_grad_norm_(list(self.adapters.parameters()), max_grad_norm)
        value = float(distributed.unsharded(norm))
        if value == value and abs(value) != float("inf"):
            self.optimizer.step()
            self.update_ema()
        return value

    @torch.no_grad()
    def update_ema(self) -> None:
        """``ema = decay * ema + (1 - decay) * adapters``."""
        for name, parameter in self.adapters.named_parameters() if self.ema else ():
            self.ema[name].lerp_(parameter, 1 - self.execution.ema_decay)

    def tensors(self) -> dict[str, Tensor]:
        """Adapters, optimizer, moving average, generator, samples seen."""
        return {
            **{f"adapters.{n}": p.detach().clone() for n, p in self.adapters.named_parameters()},
            **{f"ema.{n}": t.clone() for n, t in self.ema.items()},
            **optimizer_tensors(self.optimizer),
            "generator": self.generator.get_state(),
            "samples_seen": torch.tensor(self.samples_seen),
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores `tensors`, whatever number of ranks wrote them."""
        templates = dict(self.adapters.named_parameters())
        self.adapters.load_state_dict(_Like(Section(tensors, "adapters."), templates))
        ema = Section(tensors, "ema.")
        for name in self.ema:
            self.ema[name].copy_(distributed.like(ema[name], templates[name]))
        restore_optimizer(self.optimizer, tensors)
        self.generator.set_state(tensors["generator"])
        self.samples_seen = int(tensors["samples_seen"])

    def notes(self) -> dict[str, Any]:
        """What a checkpoint says about it: routing and rank of the adapters, how it was computed, where in the data it is."""
        return {
            "adapters": asdict(self.adapters.config),
            "execution": asdict(self.execution),
            "samples_seen": self.samples_seen,
        }

    def check_notes(self, notes: Mapping[str, Any]) -> None:
        """Refuses a checkpoint of other adapters.

        Raises:
            ValueError: Naming what differs.
        """
        saved, own = notes.get("adapters", {}), asdict(self.adapters.config)
        for name in sorted(own):
            if name in saved and saved[name] != own[name]:
                raise UserError(f"checkpoint must have {name} = {own[name]!r}, got {saved[name]!r}")
        if bool(self.ema) != bool(notes.get("execution", {}).get("ema_decay")):
            raise UserError("checkpoint must hold a moving average exactly if ema_decay is set, but they disagree")

    def save(self, out: Path, **notes: Any) -> None:
        """Writes ``out/adapter`` and, with a moving average, ``out/adapter_ema``. All ranks call it, rank 0 writes."""
        for folder, state in (("adapter", dict(self.adapters.named_parameters())), ("adapter_ema", self.ema)):
            if not state:
                continue
            tensors = {n: distributed.unsharded(t.detach()).cpu() for n, t in state.items()}
            check_tensors(f"{folder} after training", tensors)  # on every rank, so that none waits for the other
            if distributed.is_main():
                self.adapters.save(out / folder, state=tensors, **notes)
        distributed.broadcast_object(None)


class _Like(Mapping[str, Tensor]):
    """Whole tensors, sharded as templates are when they are read."""

    def __init__(self, tensors: Mapping[str, Tensor], templates: Mapping[str, Tensor]) -> None:
        self._tensors, self._templates = tensors, templates

    def __getitem__(self, key: str) -> Tensor:
        value = self._tensors[key]
        return distributed.like(value, self._templates[key]) if key in self._templates else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)
