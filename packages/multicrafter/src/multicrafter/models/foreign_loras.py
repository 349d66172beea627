"""LoRAs of other trainers on a pipeline of diffusers: all of one or nothing of it, on every part that it touches.

diffusers reads the layouts (its own, kohya, ai-toolkit, ...). What it would leave out is refused here before the pipeline is touched.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from multicrafter import UserError

Source = str | Path | dict[str, Tensor]

MATRIX = re.compile(r"\.(?P<kind>lora_A|lora_B|lora\.down|lora\.up|lora_down|lora_up)(\.[^.]+)?\.weight$")
DOWN = ("lora_A", "lora.down", "lora_down")
LEFT_OUT = ("nsupported keys", "filter out", "led to unexpected keys", "led to missing keys")


@contextmanager
def _heard() -> Iterator[list[str]]:
    """What diffusers warns of inside, instead of on the terminal."""
    logger, said = logging.getLogger("diffusers"), []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            said.append(record.getMessage())

    handlers, level, propagate = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [Listener()], False
    logger.setLevel(logging.WARNING)
    try:
        yield said
    finally:
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def parts_of(pipe: Any) -> dict[str, nn.Module]:
    """The parts that diffusers puts LoRAs on: the transformer, for FLUX.1 also the first text encoder."""
    found = {name: getattr(pipe, name, None) for name in pipe._lora_loadable_modules}
    return {name: part for name, part in found.items() if isinstance(part, nn.Module)}


def _layer(parts: Mapping[str, nn.Module], key: str) -> nn.Module | None:
    """The layer that a tensor of a converted LoRA belongs to."""
    part, _, path = MATRIX.sub("", key).partition(".")
    for name in (path, path.removeprefix("text_model.")):
        try:
            return parts[part].get_submodule(name)
        except (KeyError, AttributeError):
            continue
    return None


def _check(pipe: Any, state: Mapping[str, Tensor]) -> None:
    """Refuses what does not fit, in whole or in part.

    Raises:
        ValueError: Says how many tensors do not fit, and names one.
    """
    parts, strange = parts_of(pipe), []
    for key, tensor in state.items():
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise UserError(f"NaN or infinity in {key!r}")
        found = MATRIX.search(key)
        if found is None:
            if not key.endswith((".alpha", ".lora_B.bias")) and ".lokr_" not in key:
                strange.append(key)
            continue
        layer = _layer(parts, key)
        if layer is None:
            strange.append(key)
            continue
        side, width = (1, "in_features") if found["kind"] in DOWN else (0, "out_features")
        want = getattr(layer, width, None)
        if want is not None and (tensor.dim() < 2 or tensor.shape[side] != want):
            raise UserError(f"shape {tuple(tensor.shape)} of {key!r} where the layer's {width} is {want}")
    if strange:
        raise UserError(f"{len(strange)} of {len(state)} tensors that belong nowhere in it, such as {strange[0]!r}")


def attach(pipe: Any, source: Source, handle: str) -> None:
    """Puts a LoRA under the name ``handle`` on the parts of ``pipe`` that it was made for.

    Raises:
        ValueError: It cannot be read, is not finite, or does not fit in whole; the pipeline is then as it was.
    """
    given = dict(source) if isinstance(source, dict) else str(source)
    with _heard() as said:
        state = pipe.lora_state_dict(given, use_safetensors=True)  # nothing is unpickled
        state = state[0] if isinstance(state, tuple) else state
        _check(pipe, state)
        try:
            pipe.load_lora_weights(given, adapter_name=handle, use_safetensors=True)
            left_out = [text for text in said if any(words in text for words in LEFT_OUT)]
            if left_out:
                raise UserError(f"parts that diffusers leaves out: {left_out[0]}")
            _check_attached(pipe, state, handle)
        except Exception:
            detach(pipe, handle)
            raise
    for part in parts_of(pipe).values():
        for key, parameter in part.named_parameters():
            if f".{handle}." in key:
                parameter.requires_grad_(False)


def _check_attached(pipe: Any, state: Mapping[str, Tensor], handle: str) -> None:
    for name, part in parts_of(pipe).items():
        want = sum(key.startswith(f"{name}.") and MATRIX.search(key) is not None for key in state)
        got = sum(f".{handle}.weight" in key for key, _ in part.named_parameters())
        if got < want:
            raise UserError(f"{want - got} of {want} tensors that find no layer in its {name}")
    if not any(handle in getattr(part, "peft_config", {}) for part in parts_of(pipe).values()):
        raise UserError("no weight of it belongs to this transformer")


def detach(pipe: Any, handle: str) -> None:
    """Takes a LoRA off every part; a part without any is what it was before its first."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers
    from peft.tuners.tuners_utils import BaseTunerLayer

    for part in parts_of(pipe).values():
        for module in part.modules():
            if isinstance(module, BaseTunerLayer):
                module.delete_adapter(handle)
        config = getattr(part, "peft_config", None)
        if config is None:
            continue
        config.pop(handle, None)
        if not config:
            recurse_remove_peft_layers(part)
            del part.peft_config
            part._hf_peft_config_loaded = False  # type: ignore[assignment]


def set_weights(pipe: Any, weights: Mapping[str, float]) -> None:
    """Weights of LoRAs by handle, on every part that holds them; 0 switches one off, what is not named is off."""
    from diffusers.utils.peft_utils import set_weights_and_activate_adapters

    for part in parts_of(pipe).values():
        names = [name for name in weights if name in getattr(part, "peft_config", {})]
        if names:
            set_weights_and_activate_adapters(part, names, [weights[name] for name in names])
            for key, parameter in part.named_parameters():  # activating them makes them trainable
                if any(f".{name}." in key for name in names if name != "default"):
                    parameter.requires_grad_(False)
