"""Where the parts of a pipeline are, and how little of it is ever on the card at once.

The transformer goes there part by part and is quantised on the way (QLoRA, arXiv 2305.14314, for NF4), so that loading holds

    quantised weights + one linear as the checkpoint has it + what is never quantised,

and never the whole checkpoint. Text encoders are there only to encode.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from torch import nn

from multicrafter.models.needs import free_memory

Quantization = Literal["none", "int8", "fp8", "nf4"]


def transformer_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The repeated blocks of a transformer: the members of its module lists."""
    return [
        (f"{name}.{child}", block)
        for name, module in model.named_children()
        if isinstance(module, nn.ModuleList)
        for child, block in module.named_children()
    ]


def quantized_linears(transformer: nn.Module, keep: Iterable[nn.Parameter] = ()) -> list[str]:
    """Names of the linears that quantisation replaces: those of the blocks, but adaptive norms, which are small and sensitive.

    Args:
        transformer: Adapters may sit on it.
        keep: Parameters whose linears stay as they are, such as an adapter's.
    """
    blocks = tuple(name + "." for name, _ in transformer_blocks(transformer))
    kept = {id(parameter) for parameter in keep}
    return [
        name
        for name, module in transformer.named_modules()
        if isinstance(module, nn.Linear)
        and name.startswith(blocks)
        and "norm" not in name
        and ".lora_" not in name  # of whatever other LoRA there is
        and id(module.weight) not in kept
        and not _is_quantized(module)
    ]


def place_transformer(
    transformer: nn.Module,
    device: torch.device | str | None,
    quantization: Quantization = "none",
    *,
    keep: Iterable[nn.Parameter] = (),
) -> None:
    """Brings a transformer onto a device, one linear after the other, each quantised before the next one comes.

    Embedders, norms and the output layer come last and stay as they are. What is quantised already is only moved. Gradients still reach
    the input of a quantised linear, so adapters beside it train.

    Args:
        transformer: In place.
        device: Where it is to be; None leaves it where it is.
        quantization: int8 or fp8 (e4m3) by channel (torchao), NF4 by 64 weights (bitsandbytes).
        keep: See `quantized_linears`.

    Raises:
        ImportError: The package is missing; the message has the pip line.
    """
    if quantization != "none":
        quantize_linear = _quantizer(quantization)
        for name in quantized_linears(transformer, keep):
            linear = transformer.get_submodule(name)
            if device is not None:
                linear.to(device)
            parent, _, leaf = name.rpartition(".")
            setattr(transformer.get_submodule(parent), leaf, quantize_linear(linear))
    if device is not None and any(tensor.device != torch.device(device) for tensor in _tensors(transformer)):
        transformer.to(device)


def bring_encoders(encoders: Iterable[nn.Module], device: torch.device) -> None:
    """Moves text encoders to where they are to encode, unless a hook of accelerate or diffusers already moves them."""
    for encoder in encoders:
        if not _is_hooked(encoder) and any(t.device != device for t in _tensors(encoder)):
            encoder.to(device)


def lacks_room(encoders: Iterable[nn.Module], device: torch.device) -> bool:
    """Whether text encoders that are elsewhere do not fit into what is free on a device."""
    if device.type == "cpu":
        return False
    needed = sum(t.nbytes for e in encoders if not _is_hooked(e) for t in _tensors(e) if t.device != device)
    return needed > 0 and needed > free_memory(device)


def _tensors(module: nn.Module) -> list[torch.Tensor]:
    return [*module.parameters(), *module.buffers()]


def _is_hooked(module: nn.Module) -> bool:
    return hasattr(module, "_hf_hook") or hasattr(module, "_diffusers_hook")


def _is_quantized(linear: nn.Linear) -> bool:
    """Whether its weight is of a class of torchao's, or no floating-point number (bitsandbytes)."""
    weight = linear.weight
    return type(weight.data).__module__.partition(".")[0] == "torchao" or not weight.is_floating_point()


def _quantizer(kind: Quantization) -> Callable[[Any], nn.Module]:
    """What quantises a linear where it is."""
    if kind in ("int8", "fp8"):
        try:
            from torchao.quantization import Float8WeightOnlyConfig, Int8WeightOnlyConfig, quantize_
        except ImportError as error:
            raise ImportError(f"quantization {kind!r} needs: pip install 'multicrafter[quantize]' (torchao)") from error

        def by_channel(linear: nn.Linear) -> nn.Module:
            quantize_(linear, Int8WeightOnlyConfig() if kind == "int8" else Float8WeightOnlyConfig())
            return linear

        return by_channel
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ImportError("quantization 'nf4' needs: pip install 'multicrafter[quantize]' (bitsandbytes)") from error

    def by_64(linear: nn.Linear) -> nn.Module:
        new = Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias is not None,
            compute_dtype=linear.weight.dtype,
            quant_type="nf4",
            device="meta",
        )
        new.weight = Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4", module=new)
        new.bias = linear.bias
        moved: nn.Module = new.to(linear.weight.device).requires_grad_(False)  # moving it quantises it
        return moved

    return by_64
