"""Nodes for ComfyUI: a mixture of experts of MultiCrafter, exactly, and a map of who reads whose reference.

Put this folder (or a link to it) into ComfyUI's ``custom_nodes``, and install multicrafter into ComfyUI's Python. FLUX.1 only: other models'
modules have other names in ComfyUI, and nobody has checked them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from idar import SubjectLayout, box_masks, leakage, map_boxes
from idar.attention import subject_attention
from moe_lora.layer import Mixture
from multicrafter import UserError
from multicrafter.models.adapters import read_adapter
from multicrafter.models.backbones import get_backbone
from multicrafter.models.export import PlainLoRA, ordinary_layers, tensors
from torch import Tensor

# module in diffusers -> module in ComfyUI, and whether the experts' output belongs to its rows behind query, key and value
PLACES = (
    (r"transformer_blocks\.(\d+)\.ff", r"double_blocks.\1.img_mlp", False),
    (r"transformer_blocks\.(\d+)\.ff_context", r"double_blocks.\1.txt_mlp", False),
    (r"transformer_blocks\.(\d+)\.ff\.net\.0\.proj", r"double_blocks.\1.img_mlp.0", False),
    (r"transformer_blocks\.(\d+)\.ff\.net\.2", r"double_blocks.\1.img_mlp.2", False),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.0\.proj", r"double_blocks.\1.txt_mlp.0", False),
    (r"transformer_blocks\.(\d+)\.ff_context\.net\.2", r"double_blocks.\1.txt_mlp.2", False),
    (r"single_transformer_blocks\.(\d+)\.proj_mlp", r"single_blocks.\1.linear1", True),
)


def place(name: str) -> tuple[str, bool]:
    """Where the experts beside a module of diffusers' FLUX.1 sit in ComfyUI's.

    Raises:
        UserError: Nobody has said.
    """
    for pattern, target, behind in PLACES:
        if match := re.fullmatch(pattern, name):
            return match.expand(target), behind
    raise UserError(f"experts must sit on an FFN of FLUX.1, got some at {name!r}")


def with_experts(forward: Callable[[Tensor], Tensor], mixture: Mixture, strength: float, *, behind: bool) -> Any:
    """``forward(x) + strength * mixture(x)``; ``behind`` says that the mixture is added to the last rows alone."""

    def added(x: Tensor) -> Tensor:
        out = forward(x)
        delta = strength * mixture.to(x.device)(x).reshape(*out.shape[:-1], -1).to(out.dtype)
        if behind:
            first = out.shape[-1] - delta.shape[-1]
            return torch.cat([out[..., :first], out[..., first:] + delta], -1)
        return out + delta

    return added


def check_base(base: dict[str, Any], unet: dict[str, Any]) -> None:
    """Refuses a model of another size than the adapter's.

    Raises:
        UserError: It is one.
    """
    wanted = {
        "depth": base["num_layers"],
        "depth_single_blocks": base["num_single_layers"],
        "hidden_size": base["num_attention_heads"] * base["attention_head_dim"],
    }
    got = {name: unet.get(name) for name in wanted}
    if got != wanted:
        raise UserError(f"the model must be the adapter's base, with {wanted}, got {got}")


class LoadMixture:
    """An adapter as it was trained: LoRA on attention by ComfyUI's own loader, the experts beside the FFNs."""

    RETURN_TYPES = ("MODEL",)
    FUNCTION = "load"
    CATEGORY = "MultiCrafter"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI draws the node with."""
        return {
            "required": {
                "model": ("MODEL",),
                "adapter": ("STRING", {"default": "runs/stage1/adapter", "tooltip": "folder that holds adapter.json"}),
                "strength": ("FLOAT", {"default": 1.0, "min": -2.0, "max": 2.0, "step": 0.01}),
            }
        }

    def load(self, model: Any, adapter: str, strength: float) -> tuple[Any]:
        """A copy of the model with the adapter on it.

        Raises:
            UserError: It is no adapter, of no FLUX.1, or of a model of another size.
        """
        import comfy.sd  # type: ignore[import-not-found]

        config, state, notes = read_adapter(Path(adapter))
        backbone = get_backbone(str(notes.get("backbone", "flux1_dev")))
        if backbone.transformer_class != "FluxTransformer2DModel":
            raise UserError(f"adapter {adapter} must be of a FLUX.1, got one of {backbone.name}")
        check_base(notes["base"], model.model.model_config.unet_config)
        plain = PlainLoRA(layers=ordinary_layers(state, config), backbone=backbone, notes=notes)
        patched, _ = comfy.sd.load_lora_for_models(model, None, tensors(plain, "diffusers"), strength, 0.0)
        for key in [key for key in state if key.endswith(".router.weight")]:
            name = key.removesuffix(".router.weight")
            a, b = state[f"{name}.lora_a"], state[f"{name}.lora_b"]
            mixture = Mixture(config.moe(), a.shape[2], b.shape[1])
            mixture.load_state_dict({"router.weight": state[key], "lora_a": a, "lora_b": b})
            target, behind = place(name)
            path = f"diffusion_model.{target}.forward"
            forward = with_experts(
                patched.get_model_object(path), mixture.float().eval().requires_grad_(False), strength, behind=behind
            )
            patched.add_object_patch(path, forward)
        return (patched,)


@dataclass
class Watch:
    """What is seen of the attention of one sampling: a running mean over steps and double-stream blocks.

    Attributes:
        maps: Share of each image token's attention that each reference gets, (s, n); of the first picture of a batch.
        passes: How many were averaged.
        grid: Rows and columns of image tokens.
    """

    maps: Tensor | None = None
    passes: int = 0
    grid: tuple[int, int] = (0, 0)
    layout: SubjectLayout | None = field(default=None, repr=False)
    left: int = 0  # double-stream blocks to come in this pass

    def begin(self, layout: SubjectLayout | None, grid: tuple[int, int], blocks: int) -> None:
        """A pass of the model begins."""
        if (layout, grid) != (self.layout, self.grid):
            self.maps, self.passes = None, 0
        self.layout, self.grid, self.left = layout, grid, blocks

    def see(self, query: Tensor, key: Tensor) -> None:
        """One attention, (b, h, n, d)."""
        if self.layout is None or self.left <= 0 or query.shape[2] != self.layout.length:
            return
        self.left -= 1
        found = subject_attention(
            query[:1], key[:1], self.layout.subject_spans, self.layout.image_span, direction="image_to_reference"
        )[0].cpu()
        self.passes += 1
        self.maps = found if self.maps is None else self.maps + (found - self.maps) / self.passes


class WatchAttention:
    """A model that is watched while it draws."""

    RETURN_TYPES = ("MODEL", "MULTICRAFTER_WATCH")
    FUNCTION = "watch"
    CATEGORY = "MultiCrafter"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI draws the node with."""
        return {"required": {"model": ("MODEL",)}}

    def watch(self, model: Any) -> tuple[Any, Watch]:
        """A copy of the model, and what it will have been seen to do."""
        import comfy.patcher_extension  # type: ignore[import-not-found]

        watched, seen = model.clone(), Watch()
        blocks = int(model.model.model_config.unet_config["depth"])
        options = watched.model_options.setdefault("transformer_options", {})
        other = options.get("optimized_attention_override")

        def attention(func: Any, *args: Any, **kwargs: Any) -> Any:
            if kwargs.get("skip_reshape"):
                seen.see(args[0], args[1])
            return func(*args, **kwargs) if other is None else other(func, *args, **kwargs)

        def passes(executor: Any, x: Tensor, timestep: Tensor, context: Tensor, *args: Any, **kwargs: Any) -> Any:
            references = args[2] if len(args) > 2 else kwargs.get("ref_latents")
            grid, *others = [(-(-t.shape[-2] // 2), -(-t.shape[-1] // 2)) for t in (x, *(references or ()))]
            sizes = [h * w for h, w in (grid, *others)]
            layout = SubjectLayout.in_order(context.shape[1], sizes[0], sizes[1:]) if others else None
            seen.begin(layout, grid, blocks)
            return executor(x, timestep, context, *args, **kwargs)

        options["optimized_attention_override"] = attention
        watched.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.DIFFUSION_MODEL, "multicrafter", passes)
        return watched, seen


class LeakageMap:
    """Where each reference was read, and how much of that by the places of others."""

    RETURN_TYPES = ("IMAGE", "STRING")
    RETURN_NAMES = ("maps", "leakage")
    FUNCTION = "draw"
    CATEGORY = "MultiCrafter"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """What ComfyUI draws the node with."""
        inputs = {
            "watch": ("MULTICRAFTER_WATCH",),
            "latent": ("LATENT", {"tooltip": "of the sampler that was watched"}),
        }
        return {"required": inputs}

    def draw(self, watch: Watch, latent: dict[str, Any]) -> tuple[Tensor, str]:
        """The maps side by side, (1, H, s W, 3), each share of the attention on all references; and a line of text.

        Raises:
            UserError: Nothing was watched.
        """
        if watch.maps is None:
            raise UserError(
                "watch must have seen a sampling with references, got none: sample with the watched model first"
            )
        height, width = (8 * side for side in latent["samples"].shape[-2:])
        shares = watch.maps / watch.maps.sum(0, keepdim=True).clamp_min(1e-12)
        rows = shares.unflatten(1, watch.grid)[:, None]
        large = torch.nn.functional.interpolate(rows, (height, width), mode="nearest")[:, 0]
        boxes = map_boxes(watch.maps[None], watch.grid, (height, width))
        found = leakage(watch.maps[None], box_masks(boxes, watch.grid, (height, width)))[0]
        text = ", ".join(f"reference {i + 1}: {value:.2f}" for i, value in enumerate(found.tolist()))
        return torch.cat(list(large), -1)[None, ..., None].expand(-1, -1, -1, 3).contiguous(), text


NODE_CLASS_MAPPINGS = {
    "MultiCrafterLoadMixture": LoadMixture,
    "MultiCrafterWatchAttention": WatchAttention,
    "MultiCrafterLeakageMap": LeakageMap,
}
NODE_DISPLAY_NAME_MAPPINGS = {
    "MultiCrafterLoadMixture": "Load MultiCrafter adapter (exact)",
    "MultiCrafterWatchAttention": "Watch who reads whose reference",
    "MultiCrafterLeakageMap": "Leakage map",
}
