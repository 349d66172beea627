"""Mixtures under transformers' Trainer (and trainers that are made of it, as TRL's): the router losses, and checkpoints of the adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moe_lora.inject import MoELoRA

try:
    from transformers import Trainer
except ImportError as error:  # pragma: no cover
    raise ImportError(
        'moe_lora.integrations.transformers needs transformers: pip install "moe-lora[transformers]"'
    ) from error

__all__ = ["AuxLossMixin", "MoELoRATrainer", "mixtures_in"]


def mixtures_in(model: nn.Module) -> MoELoRA:
    """The handle of the first active PEFT adapter with mixtures.

    Raises:
        ValueError: There is none.
    """
    if getattr(model, "peft_config", None):
        from moe_lora.integrations.peft import handle
        from moe_lora.integrations.peft.tuner import mixtures_of

        if active := mixtures_of(model):
            return handle(model, active[0][1])
    raise ValueError(
        f"mixtures must be the handle that inject() returned, got none, and {type(model).__name__} has no active PEFT adapter with mixtures"
    )


class AuxLossMixin:
    """Adds ``mixtures.aux_loss()`` to the loss that a Trainer minimises, once per forward pass that is trained on.

    Write ``class MyTrainer(AuxLossMixin, SFTTrainer)``, with the mixin before the trainer. The router losses are a mean over micro-batches,
    whichever way the trainer scales its own loss for gradient accumulation, and over ranks. Their mean since the last log appears as
    ``router_loss``. Evaluation is left alone. Of mixtures that `moe_lora.inject` put in, checkpoints hold the adapter only, as
    `MoELoRA.save` writes it; PEFT's adapters are saved by PEFT.
    """

    mixtures: MoELoRA

    def __init__(self, *args: Any, mixtures: MoELoRA | None = None, **kwargs: Any) -> None:
        """``mixtures`` is the handle of `moe_lora.inject`; of a PEFT adapter it is found in the model.

        Raises:
            ValueError: There are no mixtures; or something else of the model is trained, which its checkpoints would lack; or the model
                would be replicated over devices by threads, where each replica routes.
        """
        super().__init__(*args, **kwargs)
        trainer: Any = self
        self.mixtures = mixtures_in(trainer.model) if mixtures is None else mixtures
        self._router_losses: list[Tensor] = []
        if trainer.args.n_gpu > 1:
            raise ValueError(
                f"mixtures must be trained with one process per device (torchrun), got {trainer.args.n_gpu} devices in one process"
            )
        if self._saves_itself():
            own = {id(p) for p in self.mixtures.parameters()}
            other = [n for n, p in trainer.model.named_parameters() if p.requires_grad and id(p) not in own]
            if other:
                raise ValueError(
                    f"model must train nothing but its mixtures, since checkpoints hold only those, got {other[:3]}: freeze it with"
                    " model.requires_grad_(False) before inject()"
                )

    def _saves_itself(self) -> bool:
        return type(self.mixtures) is MoELoRA

    def _share(self, num_items_in_batch: Any) -> int:
        """What the router losses of one pass are divided by, so that the trainer's step takes their mean over micro-batches."""
        trainer: Any = self
        scaled = getattr(trainer, "loss_is_scaled_for_ga", None)
        if scaled is None:
            scaled = trainer.compute_loss_func is not None or (
                trainer.model_accepts_loss_kwargs and num_items_in_batch is not None
            )
        return int(trainer.current_gradient_accumulation_steps) if scaled else 1

    def compute_loss(
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        """The trainer's loss, in training plus that of the routers."""
        trainer: Any = super()
        self.mixtures.forget()
        found = trainer.compute_loss(
            model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch, **kwargs
        )
        if not model.training:
            self.mixtures.forget()
            return found
        aux = self.mixtures.aux_loss()
        self._router_losses.append(aux.detach())
        loss, *rest = found if return_outputs else (found,)
        loss = loss + (aux / self._share(num_items_in_batch)).to(loss.device, loss.dtype)
        return (loss, *rest) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Adds ``router_loss``, the mean of what was added to the loss since the last log."""
        if "loss" in logs and self._router_losses:
            logs["router_loss"] = float(torch.stack(self._router_losses).mean())
            self._router_losses = []
        trainer: Any = super()
        trainer.log(logs, *args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """The adapter alone: the base under a mixture has another name, so a checkpoint of the whole model could not be loaded again."""
        trainer: Any = self
        if not self._saves_itself():
            of_base: Any = super()
            of_base._save(output_dir, state_dict)
            return
        folder = Path(output_dir or trainer.args.output_dir)
        self.mixtures.save(folder)
        if trainer.processing_class is not None:
            trainer.processing_class.save_pretrained(folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self._saves_itself():
            self.mixtures.load(resume_from_checkpoint)
        else:
            trainer: Any = super()
            trainer._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        trainer: Any = self
        if self._saves_itself():
            self.mixtures.load(trainer.state.best_model_checkpoint)
        else:
            of_base: Any = super()
            of_base._load_best_model()


class MoELoRATrainer(AuxLossMixin, Trainer):  # type: ignore[misc]
    """transformers' Trainer with the router losses: ``MoELoRATrainer(model=..., args=..., mixtures=handle)``."""
