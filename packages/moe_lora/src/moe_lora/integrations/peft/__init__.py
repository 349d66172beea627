"""Mixtures as adapters of PEFT: `get_peft_model`, diffusers' and transformers' `add_adapter`, several adapters, files.

Importing this makes the type ``MOE_LORA`` known to PEFT (docs/adr/0032). A process that has not imported it cannot take a mixture's file for
an ordinary LoRA: PEFT fails with the name of the unknown type.
"""

from __future__ import annotations

try:
    from peft.tuners.lora import LoraModel
except ImportError as error:  # pragma: no cover
    raise ImportError('moe_lora.integrations.peft needs peft: pip install "moe-lora[peft]"') from error

if not hasattr(LoraModel, "_remap_adapter_state_dict_for_load"):  # pragma: no cover
    raise ImportError('moe_lora.integrations.peft needs peft>=0.21: pip install "moe-lora[peft]"')

from moe_lora.integrations.peft.config import MixtureType, PeftMoELoRAConfig
from moe_lora.integrations.peft.files import load_adapter, save_adapter
from moe_lora.integrations.peft.handle import PeftMoELoRA, handle
from moe_lora.integrations.peft.layer import PeftMoELoRALayer
from moe_lora.integrations.peft.tuner import MoELoRAModel, register

register()

__all__ = [
    "MixtureType",
    "MoELoRAModel",
    "PeftMoELoRA",
    "PeftMoELoRAConfig",
    "PeftMoELoRALayer",
    "handle",
    "load_adapter",
    "save_adapter",
]
