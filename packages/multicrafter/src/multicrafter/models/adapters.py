"""The trained part of a model: ordinary LoRA (peft) on attention, a mixture of LoRA experts (or ordinary LoRA) on the FFNs.

A saved adapter is a folder: ``adapter.json`` (what it is), ``lora.safetensors`` (peft's keys) and, with experts, ``moe/``.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from moe_lora import MoELoRA, MoELoRAConfig, inject
from torch import Tensor, nn

from multicrafter import UserError, __version__
from multicrafter.files import follow_umask, read_json, source_commit
from multicrafter.models.backbones import Backbone, backbone_of
from multicrafter.models.checks import check_finite, finite, whole

if TYPE_CHECKING:
    from diffusers import FluxTransformer2DModel

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """What is trained.

    Attributes:
        rank: Rank of every LoRA and of every expert (paper: 512).
        alpha: Scale; the update is multiplied by alpha / rank.
        num_experts: Experts in the FFNs; 0 puts an ordinary LoRA there.
        top_k: Experts per token.
        experts_on_linears: One mixture on each linear layer of an FFN, instead of one beside the whole FFN as in the paper; there every
            single expert is a LoRA that other programs can load (docs/guides/export.md).
        gating: How a token's experts are weighed, see `moe_lora.MoELoRAConfig`.
        balance_coef: Weight of the loss that spreads tokens evenly over experts.
        z_coef: Weight of the loss that keeps the router's logits small.
    """

    rank: int = 16
    alpha: float = 16.0
    num_experts: int = 4
    top_k: int = 1
    experts_on_linears: bool = False
    gating: str = "softmax_then_topk"
    balance_coef: float = 0.01
    z_coef: float = 0.001

    def __post_init__(self) -> None:
        check_finite(self)
        for name, least in (("rank", 1), ("num_experts", 0), ("top_k", 1)):
            object.__setattr__(self, name, whole(name, getattr(self, name), least=least))
        for name in ("alpha", "balance_coef", "z_coef"):
            finite(name, getattr(self, name))
        if self.rank < 1 or self.alpha <= 0:
            raise UserError(f"rank must be at least 1 and alpha positive, got {self.rank} and {self.alpha}")
        if not isinstance(self.experts_on_linears, bool):
            raise UserError(f"experts_on_linears must be true or false, got {self.experts_on_linears!r}")
        if self.num_experts:
            self.moe()
        elif self.num_experts < 0:
            raise UserError(f"num_experts must not be negative, got {self.num_experts}")

    def moe(self) -> MoELoRAConfig:
        """Configuration of the experts."""
        return MoELoRAConfig(
            rank=self.rank, alpha=self.alpha, num_experts=self.num_experts, top_k=self.top_k,
            gating=self.gating, balance_coef=self.balance_coef, z_coef=self.z_coef,  # type: ignore[arg-type]
            check_gate=False,  # a step that is not finite is skipped by the loop, on all ranks at once
        )  # fmt: skip


def adapted(backbone: Backbone, transformer: nn.Module, config: AdapterConfig) -> tuple[str, list[str]]:
    """Regex of the linears that get an ordinary LoRA, and regexes of the modules that the experts sit beside, both for whole names."""
    idle = backbone.without_effect(transformer)
    but = f"(?!({idle})$)" if idle else ""
    if config.num_experts:
        places = (f"({backbone.ffn_linears})",) if config.experts_on_linears else backbone.ffn_blocks
        return f"^{but}({backbone.attention})$", [but + place for place in places]
    return f"^{but}({backbone.attention}|{backbone.ffn_linears})$", []


class Adapters:
    """Adapters attached to one transformer."""

    def __init__(
        self,
        transformer: FluxTransformer2DModel,
        config: AdapterConfig,
        *,
        seed: int = 0,
        backbone: Backbone | None = None,
    ) -> None:
        """Freezes the transformer and adds zero-initialised adapters: no output changes.

        The backbone says where attention and FFNs are; by default it follows from the transformer's class.
        """
        from peft import LoraConfig

        self.transformer, self.config = transformer, config
        self.notes: dict[str, Any] = {}  # of the file it was loaded from
        self.backbone = backbone or backbone_of(transformer)
        transformer.requires_grad_(False)
        ordinary, mixed = adapted(self.backbone, transformer, config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            transformer.add_adapter(LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=ordinary))
            try:
                self.experts: MoELoRA | None = inject(transformer, config.moe(), mixed) if mixed else None
            except BaseException:  # no half of an adapter stays on the model
                transformer.delete_adapters("default")
                raise
        # everything else was frozen a moment ago; from now on the names say what is ours, whoever freezes what
        self.names = frozenset(n for n, p in transformer.named_parameters() if p.requires_grad)
        for parameter in self.parameters():  # peft makes them in the base's dtype
            parameter.data = parameter.data.float()

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """The adapters' parameters, frozen or not, and none of the base or of another LoRA.

        Raises:
            ValueError: Some are no longer on the transformer.
        """
        found = [(n, p) for n, p in self.transformer.named_parameters() if n in self.names]
        if len(found) != len(self.names):
            raise UserError(
                f"the adapter must be on the transformer, but {len(self.names) - len(found)} of its {len(self.names)} tensors are "
                "gone (unload_lora_weights and delete_adapters take them off): load it again"
            )
        return iter(found)

    def parameters(self) -> Iterator[nn.Parameter]:
        """See `named_parameters`."""
        return (p for _, p in self.named_parameters())

    def aux_loss(self) -> Tensor:
        """Weighted router losses of the last forward pass; 0 without experts."""
        return self.experts.aux_loss() if self.experts is not None else torch.zeros(())

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The base model, exactly."""
        self.transformer.disable_adapters()
        try:
            if self.experts is None:
                yield
            else:
                with self.experts.disable():
                    yield
        finally:
            self.transformer.enable_adapters()

    def detach(self) -> None:
        """Takes the adapters off: the transformer is what it was, other LoRAs on it stay."""
        if self.experts is not None:
            self.experts.remove()
        others = set(getattr(self.transformer, "peft_config", {}))
        if others == {"default"}:
            self.transformer.unload_lora()
        elif "default" in others:
            self.transformer.delete_adapters("default")

    def state_dict(self) -> dict[str, Tensor]:
        """The adapters' tensors by name."""
        return {n: p.detach().clone() for n, p in self.named_parameters()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state_dict`; names the key that is wrong."""
        own = dict(self.named_parameters())
        for key in sorted(own.keys() | state.keys()):
            if key not in state or key not in own or own[key].shape != state[key].shape:
                got = tuple(state[key].shape) if key in state else "nothing"
                want = tuple(own[key].shape) if key in own else "nothing"
                raise UserError(f"adapter must hold {key!r} with shape {want}, got {got}")
        with torch.no_grad():
            for key, parameter in own.items():
                parameter.copy_(state[key])

    def save(self, folder: Path, *, state: Mapping[str, Tensor] | None = None, **notes: Any) -> Path:
        """Writes the adapter (or ``state`` in its place), in float32; ``notes`` (stage, number of references, ...) go into adapter.json.

        Raises:
            ValueError: A part of it is missing; nothing is written then.
        """
        from safetensors.torch import save_file

        tensors = {k: t.float().contiguous() for k, t in (state or self.state_dict()).items()}
        if tensors.keys() != self.names:
            missing = sorted(self.names ^ tensors.keys())
            raise UserError(f"state must hold exactly the adapter's tensors, but {missing[0]!r} differs")
        check_tensors("adapter to save", tensors)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, folder / "adapter.safetensors.tmp")
        follow_umask(folder / "adapter.safetensors.tmp")
        meta = {
            "format": FORMAT,
            "config": asdict(self.config),
            "base": fingerprint(self.transformer),
            "backbone": self.backbone.name,
            "code": __version__,
            "commit": source_commit(),
            **notes,
        }
        (folder / "adapter.json.tmp").write_text(json.dumps(meta, indent=2) + "\n")
        os.replace(folder / "adapter.safetensors.tmp", folder / "adapter.safetensors")
        os.replace(folder / "adapter.json.tmp", folder / "adapter.json")
        return folder

    @classmethod
    def load(
        cls, transformer: FluxTransformer2DModel, folder: str | Path, *, backbone: Backbone | None = None
    ) -> tuple[Adapters, dict[str, Any]]:
        """Attaches a saved adapter; returns it and its notes.

        Raises:
            ValueError: A part is missing or broken, its numbers are no floats, or it belongs to another backbone or shape.
        """
        config, state, meta = read_adapter(folder)
        backbone = backbone or backbone_of(transformer)
        if meta.get("backbone", backbone.name) != backbone.name:
            raise UserError(f"adapter {folder} must be of the backbone {backbone.name}, got one of {meta['backbone']}")
        if meta.get("base") != fingerprint(transformer):
            raise UserError(
                f"adapter {folder} must belong to this base {fingerprint(transformer)}, got {meta.get('base')}"
            )
        adapters = cls(transformer, config, backbone=backbone)
        try:
            adapters.load_state_dict(state)
        except ValueError as error:
            adapters.detach()
            raise UserError(f"adapter {folder}: {error}") from error
        adapters.notes = meta
        return adapters, meta


def read_adapter(folder: str | Path) -> tuple[AdapterConfig, dict[str, Tensor], dict[str, Any]]:
    """Configuration, tensors and notes of a saved adapter; nothing is attached to anything.

    Raises:
        UserError: A part is missing or broken, or its numbers are no floats, not finite, or not of the shapes that it says.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    for name in ("adapter.json", "adapter.safetensors"):
        if not (folder / name).is_file():
            raise UserError(f"adapter {folder} must hold {name}, but it is missing")
    try:
        meta = read_json(folder / "adapter.json")
        if not isinstance(meta, dict):
            raise UserError(f"adapter.json must hold an object, got {type(meta).__name__}")
        config = AdapterConfig(**meta["config"])
        if meta["format"] != FORMAT:
            raise UserError(f"format must be {FORMAT}, got {meta['format']!r}")
        state = load_file(folder / "adapter.safetensors")
    except (
        KeyError,
        TypeError,
        ValueError,
        SafetensorError,
        OSError,
    ) as error:
        raise UserError(
            f"adapter {folder} must be written by multicrafter, got {type(error).__name__}: {error}"
        ) from error
    dtypes = {str(t.dtype).removeprefix("torch.") for t in state.values()}
    if not dtypes <= {"float32", "bfloat16", "float16"}:
        raise UserError(f"adapter {folder} must hold float32, bfloat16 or float16, got {', '.join(sorted(dtypes))}")
    check_shapes(f"adapter {folder}", state, config)
    check_tensors(f"adapter {folder}", state)
    check_notes(f"adapter {folder}", meta)
    return config, state, meta


def check_shapes(what: str, tensors: Mapping[str, Tensor], config: AdapterConfig) -> None:
    """Raises ValueError where the tensors are not of the configured rank: it says how much memory is made for them."""
    found = {("rank", t.shape[0]) for k, t in tensors.items() if ".lora_A." in k and t.dim() == 2}
    for key, tensor in tensors.items():
        if key.endswith(".lora_a") and tensor.dim() == 3:
            found |= {("num_experts", tensor.shape[0]), ("rank", tensor.shape[1])}
    if not found:
        raise UserError(f"{what} must hold LoRA matrices, got none")
    if config.num_experts and not any(name == "num_experts" for name, _ in found):
        raise UserError(f"{what} must hold tensors of {config.num_experts} experts, as its adapter.json says, got none")
    for name, value in sorted(found):
        if value != getattr(config, name):
            raise UserError(
                f"{what} must hold tensors of {name} {getattr(config, name)}, as its adapter.json says, got {value}"
            )


def check_tensors(what: str, tensors: Mapping[str, Tensor]) -> None:
    """Raises ValueError where a tensor holds NaN or infinity: what it draws would be black."""
    for key, tensor in tensors.items():
        if not bool(torch.isfinite(tensor).all()):
            raise UserError(f"{what} must be finite, got NaN or infinity in {key!r}")


def check_notes(what: str, notes: Mapping[str, Any]) -> None:
    """Raises ValueError where a number in an adapter's notes is none, so that it is named before anything is drawn."""
    for name in ("size", "reference_size", "num_references"):
        if notes.get(name) is not None:
            whole(f"{what}: {name}", notes[name], least=1)
    sampling = notes.get("sampling") or {}
    if not isinstance(sampling, Mapping):
        raise UserError(f"{what}: sampling must be an object, got {sampling!r}")
    if "num_steps" in sampling:
        whole(f"{what}: sampling.num_steps", sampling["num_steps"], least=1)
    if "guidance" in sampling:
        finite(f"{what}: sampling.guidance", sampling["guidance"])


def fingerprint(transformer: FluxTransformer2DModel) -> dict[str, int]:
    """Sizes that an adapter must agree with."""
    config = transformer.config
    names = ("in_channels", "num_layers", "num_single_layers", "attention_head_dim", "num_attention_heads")
    return {name: int(getattr(config, name, 0)) for name in names}  # a model without single-stream blocks names none
