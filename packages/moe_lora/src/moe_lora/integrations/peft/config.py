"""PEFT's LoraConfig with the fields of a mixture."""

from __future__ import annotations

import enum
import numbers
from dataclasses import MISSING, dataclass, field, fields
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists

from moe_lora.config import MoELoRAConfig


class _Name(str):
    """A name that compares as a string."""


class MixtureType(_Name, enum.Enum):
    """PEFT's name of this kind of adapter; its own enumeration cannot be extended."""

    MOE_LORA = "MOE_LORA"


# what a LoraConfig may say of a mixture; any other field must have its default, also those of PEFT's coming versions
HONOURED = frozenset({
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "runtime_config",
    "r", "lora_alpha", "lora_dropout", "use_rslora", "init_lora_weights", "rank_pattern", "alpha_pattern", "bias", "fan_in_fan_out",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "modules_to_save", "trainable_token_indices",
})  # fmt: skip


@dataclass
class PeftMoELoRAConfig(LoraConfig):  # type: ignore[misc]
    """PEFT's LoraConfig for mixtures: ``r``, ``lora_alpha``, ``target_modules``, ``lora_dropout``, ``use_rslora`` mean what they mean there.

    Attributes:
        num_experts, top_k, gating, dispatch, jitter, balance_coef, z_coef: See `moe_lora.MoELoRAConfig`.
        mixture_modules: Which of the targets become mixtures, as in ``target_modules`` (suffixes, or one regex); the others, which have to be
            linear, become ordinary LoRAs. None: all of them; an empty list: none, so that this is an ordinary LoRA beside other mixtures.

    Raises:
        ValueError: See `moe_lora.MoELoRAConfig`; or an option that a mixture does not have (DoRA, special initialisations, ...).
    """

    num_experts: int = field(default=4, metadata={"help": "Experts per mixture."})
    top_k: int = field(default=1, metadata={"help": "Experts per token."})
    gating: str = field(default="softmax_then_topk", metadata={"help": "How gate weights are made."})
    dispatch: str = field(default="grouped", metadata={"help": "How experts are computed."})
    jitter: float = field(default=0.0, metadata={"help": "Noise on the router's input in training."})
    balance_coef: float = field(default=0.01, metadata={"help": "Weight of the load-balance loss."})
    z_coef: float = field(default=0.001, metadata={"help": "Weight of the router z-loss."})
    mixture_modules: list[str] | str | None = field(default=None, metadata={"help": "Targets that become mixtures."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = MixtureType.MOE_LORA
        self.mixture()
        own = {f.name for f in fields(PeftMoELoRAConfig)} - {f.name for f in fields(LoraConfig)}
        for option in fields(self):
            default = option.default_factory() if option.default_factory is not MISSING else option.default
            if option.name not in HONOURED | own and getattr(self, option.name) != default:
                raise ValueError(
                    f"{option.name} must be {default!r} for mixtures, which do not have it, got {getattr(self, option.name)!r}"
                )
        if not isinstance(self.lora_dropout, numbers.Real) or not 0 <= float(self.lora_dropout) <= 1:
            raise ValueError(f"lora_dropout must be a number in [0, 1], got {self.lora_dropout!r}")
        if not isinstance(self.init_lora_weights, bool):
            raise ValueError(f"init_lora_weights must be a bool for mixtures, got {self.init_lora_weights!r}")

    def mixture(self, rank: int | None = None, alpha: int | float | None = None) -> MoELoRAConfig:
        """The mixture's own config, for a layer of another rank or alpha if PEFT's patterns say so."""
        return MoELoRAConfig(
            rank=self.r if rank is None else rank,
            alpha=self.lora_alpha if alpha is None else alpha,
            num_experts=self.num_experts, top_k=self.top_k, gating=self.gating, dispatch=self.dispatch,  # type: ignore[arg-type]
            jitter=self.jitter, balance_coef=self.balance_coef, z_coef=self.z_coef,
        )  # fmt: skip

    def wants_mixture(self, name: str) -> bool:
        """Whether the module of this name becomes a mixture."""
        if self.mixture_modules is None or not self.mixture_modules:
            return self.mixture_modules is None
        chosen = LoraConfig(target_modules=self.mixture_modules)
        return bool(check_target_module_exists(chosen, name))

    @classmethod
    def from_peft_type(cls, **kwargs: Any) -> PeftMoELoRAConfig:
        """From the fields of a file: of a mixture, or of an ordinary LoRA, which it then stays (``mixture_modules=[]``).

        Raises:
            ValueError: It is of another kind of adapter.
        """
        kind = kwargs.pop("peft_type", MixtureType.MOE_LORA)
        if kind not in (MixtureType.MOE_LORA.value, "LORA"):
            raise ValueError(f"peft_type must be MOE_LORA or LORA to be read as a mixture, got {kind}")
        if kind == "LORA" and "num_experts" not in kwargs:
            kwargs["mixture_modules"] = []
        made: PeftMoELoRAConfig = super().from_peft_type(peft_type=MixtureType.MOE_LORA, **kwargs)
        return made
