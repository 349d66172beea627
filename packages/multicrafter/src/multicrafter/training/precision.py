"""How training is computed, as opposed to what: precision, memory, optimizer states, attention kernels, processes.

Nothing here changes the method; results differ by rounding only (docs/adr/0083-precision.md).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from multicrafter import UserError
from multicrafter.models.checks import check_finite
from multicrafter.models.placing import Quantization as Quantization
from multicrafter.models.placing import place_transformer, transformer_blocks
from multicrafter.training.distributed import Parallel
from multicrafter.training.optimization import AdamWConfig


@dataclass(frozen=True, kw_only=True)
class ExecutionConfig:
    """How a stage is computed.

    Attributes:
        dtype: Of the frozen base and of matrix products ("float32" or "bfloat16"). Adapters, optimizer, losses and log-probs are
            always fp32.
        gradient_checkpointing: Recompute each block in the backward: activations of one block at a time.
        quantization: Weights of the frozen base: "none", "int8" or "fp8" (torchao) or "nf4" (bitsandbytes).
        optimizer: "adamw", or "adamw8bit" (bitsandbytes), whose two states take a byte each instead of four.
        micro_batch: Rows that go through the model at once on each rank; None takes the rank's whole part of the batch.
        parallel: "ddp" or "fsdp" where there are several processes.
        compile_blocks: Compile every transformer block (torch.compile needs a C++ compiler on a CPU): a minute at the start, faster steps.
        attention_backend: Of diffusers ("native", "flash", "sage", ...); None keeps the model's.
        ema_decay: Of an exponential moving average of the adapters, in [0, 1); 0 keeps none.
        cache: Folder for encoded texts and pictures; None keeps texts in memory.
    """

    dtype: Literal["float32", "bfloat16"] = "float32"
    gradient_checkpointing: bool = False
    quantization: Quantization = "none"
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    micro_batch: int | None = None
    parallel: Parallel = "ddp"
    compile_blocks: bool = False
    attention_backend: str | None = None
    ema_decay: float = 0.0
    cache: str | None = None

    def __post_init__(self) -> None:
        check_finite(self)
        if self.micro_batch is not None and self.micro_batch < 1:
            raise UserError(f"micro_batch must be at least 1, got {self.micro_batch}")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if self.quantization != "none" and self.parallel == "fsdp":
            raise UserError(
                f"quantization must be 'none' with parallel 'fsdp' (quantised weights are not sharded), got {self.quantization!r}"
            )

    @property
    def torch_dtype(self) -> torch.dtype:
        """The frozen base's dtype."""
        return torch.bfloat16 if self.dtype == "bfloat16" else torch.float32

    def autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        """Around the model's forward: matrix products in bf16, if so chosen."""
        return torch.autocast(device.type, torch.bfloat16) if self.dtype == "bfloat16" else nullcontext()


def prepare_transformer(
    transformer: nn.Module,
    config: ExecutionConfig,
    *,
    device: torch.device | None = None,
    keep: Iterable[nn.Parameter] = (),
) -> None:
    """Casts a frozen transformer, brings it onto ``device``, quantised on the way, and configures it, in place.

    Adapters that sit on it are to be in ``keep``: they are neither cast nor quantised. Without ``device`` it stays where it is.
    """
    kept = list(keep)
    if config.dtype == "bfloat16" and not kept and next(transformer.parameters()).dtype != torch.bfloat16:
        cast_weights(transformer, torch.bfloat16)
    place_transformer(transformer, device, config.quantization, keep=kept)
    configure_transformer(transformer, config)


def cast_weights(module: nn.Module, dtype: torch.dtype) -> None:
    """What a checkpoint holds in another dtype, in place, as if it had been loaded in it.

    Tables that a module makes itself (buffers that are not saved) stay as they are: frequencies of a noise level in bf16 are other frequencies.
    """
    saved = module.state_dict().keys()
    tables = [(name, table) for name, table in module.named_buffers() if name not in saved]
    module.to(dtype)
    for name, table in tables:
        parent, _, leaf = name.rpartition(".")
        module.get_submodule(parent).register_buffer(leaf, table, persistent=False)


def configure_transformer(transformer: nn.Module, config: ExecutionConfig) -> None:
    """Gradient checkpointing, the attention backend and compilation, which can be set at any time."""
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()  # type: ignore[operator]
    if config.attention_backend is not None:
        set_attention_backend(transformer, config.attention_backend)
    if config.compile_blocks:
        for _, block in transformer_blocks(transformer):
            block.compile()


def set_attention_backend(transformer: nn.Module, name: str) -> None:
    """Chooses diffusers' attention kernel for every block.

    Raises:
        ValueError: diffusers has no such backend, or its package is missing here.
    """
    try:
        transformer.set_attention_backend(name)  # type: ignore[operator]
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"attention_backend must be one that diffusers has and can use here, got {name!r}: {reason}"
        ) from error


def quantize(transformer: nn.Module, kind: Quantization) -> nn.Module:
    """Quantises a transformer where it is, in place; see `place_transformer`.

    Raises:
        ImportError: The package is missing; the message has the pip line.
    """
    place_transformer(transformer, None, kind)
    return transformer


def make_optimizer(
    parameters: Iterable[nn.Parameter], config: ExecutionConfig, *, lr: float, adamw: AdamWConfig
) -> torch.optim.Optimizer:
    """AdamW, its states in fp32 or in 8 bits.

    Raises:
        ImportError: bitsandbytes is missing.
    """
    if config.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay)
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError as error:
        raise ImportError("optimizer 'adamw8bit' needs: pip install 'multicrafter[quantize]' (bitsandbytes)") from error
    made: torch.optim.Optimizer = AdamW8bit(
        parameters, lr=lr, betas=adamw.betas, eps=adamw.eps, weight_decay=adamw.weight_decay
    )
    return made


def offload_groups(
    model: nn.Module, device: torch.device | str, *, blocks_per_group: int = 1, use_stream: bool = False
) -> None:
    """For inference: keeps a diffusers model in CPU memory and moves a few blocks at a time to ``device`` (diffusers' group offloading).

    Args:
        model: A transformer, VAE or other diffusers model, adapters included.
        device: Where it computes.
        blocks_per_group: Blocks that are there at once.
        use_stream: Overlap copies and computation (CUDA).
    """
    from diffusers.hooks import apply_group_offloading

    apply_group_offloading(
        model,
        onload_device=torch.device(device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=blocks_per_group,
        use_stream=use_stream,
    )
