"""Inference: pictures from references and prompts, on any backbone, with adapters and other people's LoRAs."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from multicrafter import UserError
from multicrafter.models import foreign_loras
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import Backbone
from multicrafter.models.binding import Binding, BindingConfig, Mode
from multicrafter.models.checks import finite, whole
from multicrafter.models.export import check_base
from multicrafter.models.finding import Finder, MapFinder
from multicrafter.models.flux.packing import Grid
from multicrafter.models.loaded import LoadedModel
from multicrafter.models.loading import get_device, load_flux, load_model, resolve_adapter
from multicrafter.models.needs import drawing_bytes, require_drawing
from multicrafter.models.pictures import open_picture
from multicrafter.models.publish import base_of, push_to_hub, save_pretrained
from multicrafter.models.request import (
    References,
    binding_config,
    first_of_each,
    mask_lists,
    own_shape,
    reference_lists,
    seed_list,
    text_list,
    to_image,
    to_tensor,
)
from multicrafter.models.sampler import After, Sampler, per_prompt

MAX_STEPS = 10_000


class MultiCrafterPipeline:
    """Several given subjects in one picture: a pipeline of diffusers, plus references.

    ``interrupt`` set to True by a callback ends the sampling after the step.

    >>> # MultiCrafterPipeline.from_pretrained(adapter="runs/demo/stage2/adapter")("two people in the park", references=[a, b])[0]
    """

    def __init__(
        self,
        pipe: LoadedModel | Any,
        adapters: Adapters | None = None,
        notes: dict[str, Any] | None = None,
        *,
        backbone: Backbone | None = None,
        separation: Mode | BindingConfig | None = None,
        finder: Finder | None = None,
    ) -> None:
        """Takes a loaded pipeline, with adapters already attached.

        Args:
            pipe: Of diffusers, or what `load_model` made.
            adapters: On its transformer.
            notes: Of the adapter.
            backbone: Yours, if it is none of `multicrafter.models.backbones.BACKBONES`.
            separation: How subjects are kept apart while a picture is drawn: "none", "draft", "in-flight", "masks", or a
                `BindingConfig` with its numbers; by default as the adapter says, else "none".
            finder: Finds subjects in drafts, such as ``IdentityFinder(backend=id_reward.get_face_backend("dlib"))``; by default
                the attention of the draft alone says where they are (`MapFinder`).

        Raises:
            ValueError: The separation is unknown.
        """
        self.model = LoadedModel.of(pipe, backbone)
        self.pipe, self.backbone = self.model.pipe, self.model.backbone
        self.adapters, self.notes = adapters, notes or {}
        self.separation = binding_config(self.sampling.get("separation", "none") if separation is None else separation)
        self.finder: Finder = finder or MapFinder()
        self.bindings: list[Binding] = []
        self.loras: dict[str, float] = {}
        self._handles: dict[str, str] = {}
        self._numbers = itertools.count()
        self.interrupt = False

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | None = None,
        *,
        adapter: str | Path | None = None,
        dtype: str | torch.dtype = torch.float32,
        backbone: Backbone | None = None,
        device: str | torch.device | None = None,
        separation: Mode | BindingConfig | None = None,
        finder: Finder | None = None,
        **options: Any,
    ) -> MultiCrafterPipeline:
        """Loads a base and an adapter, or what `save_pretrained` wrote.

        Args:
            model: A base (folder or hub id, by default the shipped tiny one), or a folder or hub id that `save_pretrained` or
                `push_to_hub` wrote: then the base named in it is loaded too.
            adapter: Folder or hub id of an adapter.
            dtype: Of the base; adapters keep theirs.
            backbone: Yours, if it is none of `multicrafter.models.backbones.BACKBONES`.
            device: Where to run.
            separation: See the class.
            finder: See the class.
            options: For ``from_pretrained`` of diffusers: ``revision``, ``token``, ``quantization_config``, ...

        Raises:
            ValueError: See `load_model` and `Adapters.load`.
        """
        if model is not None and adapter is None and (base := base_of(model)) is not None:
            adapter, model = model, base
        where = None if device is None else get_device(device)
        loaded = load_model(model, dtype=dtype, backbone=backbone, **options)
        if where is not None:
            loaded.to(where)
        kept_apart: dict[str, Any] = {"separation": separation, "finder": finder}
        if adapter is None:
            return cls(loaded, **kept_apart)
        folder = resolve_adapter(adapter)
        adapters, notes = Adapters.load(loaded.transformer, folder, backbone=loaded.backbone)
        notes = {**notes, "folder": str(folder), "base_model": str(model) if model is not None else None}
        return cls(loaded, adapters, notes, **kept_apart)

    def save_pretrained(self, folder: str | Path, *, base: bool = False) -> Path:
        """Writes adapter and model card into ``folder``, with ``base`` also the pipeline itself; see `multicrafter.models.publish`."""
        return save_pretrained(self, Path(folder), base=base)

    def push_to_hub(self, repo_id: str, *, base: bool = False, private: bool | None = None, **options: Any) -> str:
        """Uploads what `save_pretrained` writes; returns the address of the commit."""
        return push_to_hub(self, repo_id, base=base, private=private, **options)

    @property
    def size(self) -> int:
        """Side of a picture in pixels: what the adapter was trained at, or the VAE's."""
        return int(self.notes.get("size") or self.backbone.picture_size(self.pipe))

    @property
    def reference_size(self) -> int:
        """Side of a reference in pixels: what the adapter was trained at, or half the picture's."""
        return int(self.notes.get("reference_size") or self.size // 2)

    @property
    def sampling(self) -> dict[str, Any]:
        """How pictures of this adapter are drawn where nobody says otherwise: steps, guidance and separation, from the adapter."""
        return dict(self.notes.get("sampling") or {})

    @property
    def num_steps(self) -> int:
        """Steps of a picture where nobody says otherwise."""
        return int(self.sampling.get("num_steps", self.backbone.default_num_steps))

    @property
    def guidance(self) -> float:
        """Embedded guidance where nobody says otherwise."""
        return float(self.sampling.get("guidance", self.backbone.default_guidance))

    @property
    def max_references(self) -> int:
        """Subjects the adapter was trained for; 1 for a base."""
        return int(self.notes.get("num_references", 1))

    @property
    def max_references_per_subject(self) -> int:
        """References of each subject the adapter was trained for."""
        return int(self.notes.get("references_per_subject", 1))

    @property
    def device(self) -> torch.device:
        """Where the transformer runs (also when it is offloaded meanwhile)."""
        here: torch.device = self.pipe.transformer.device
        return here if here.type not in ("cpu", "meta") else torch.device(getattr(self.pipe, "_execution_device", here))

    def load_lora(self, source: str | Path | dict[str, Tensor], *, weight: float = 1.0, name: str | None = None) -> str:
        """Mixes in a plain LoRA of another trainer (diffusers, kohya, ai-toolkit: what diffusers reads); returns its name.

        Args:
            source: File, folder, hub id or state dict.
            weight: Scale of its update, on the transformer and on the text encoder; change it with `set_loras`.
            name: To call it by; by default the file's, with a number where that is taken.

        Raises:
            ValueError: It cannot be read, is not finite, or does not fit this pipeline in whole; the pipeline is then unchanged.
        """
        weight = finite("weight", weight)
        if name is None:
            stem = ("lora" if isinstance(source, dict) else Path(source).stem).replace(".", "_").replace("-", "_")
            numbered = (f"{stem}_{i}" for i in itertools.count(2))
            name = next(n for n in itertools.chain([stem], numbered) if n not in self.loras)
        if name in self.loras:
            raise UserError(f"name must be new, got {name!r} beside {sorted(self.loras)}")
        handle = f"mixed_in_{next(self._numbers)}"  # peft's names may hold no dots, and none may be that of a layer
        with self._adapters_off():
            try:
                if not isinstance(source, dict) and Path(source).is_file():
                    check_base(source, self.pipe.transformer, self.backbone)
                foreign_loras.attach(self.pipe, source, handle)
            except Exception as error:
                reason = " ".join(str(error).split())[:300]
                what = name if isinstance(source, dict) else source
                raise UserError(f"lora {what} must fit {self.backbone.name}, got {reason}") from error
        self.loras[name], self._handles[name] = weight, handle
        self._activate()
        return name

    @contextmanager
    def _adapters_off(self) -> Iterator[None]:
        """LoRAs find their layers by name, so they go on while no experts wrap the FFNs."""
        state = self.adapters.state_dict() if self.adapters is not None else None
        if self.adapters is not None:
            self.adapters.detach()
        try:
            yield
        finally:
            if self.adapters is not None and state is not None:
                self.adapters = Adapters(self.pipe.transformer, self.adapters.config, backbone=self.backbone)
                self.adapters.load_state_dict(state)
            self._activate()

    def unload_lora(self, name: str) -> None:
        """Takes a mixed-in LoRA off again.

        Raises:
            ValueError: It is not loaded.
        """
        if name not in self.loras:
            raise UserError(f"name must be a loaded LoRA, one of {sorted(self.loras)}, got {name!r}")
        foreign_loras.detach(self.pipe, self._handles.pop(name))
        del self.loras[name]
        self._activate()

    def set_loras(self, weights: dict[str, float]) -> None:
        """New weights of LoRAs that are loaded; 0 switches one off.

        Raises:
            ValueError: A name is not loaded, or a weight not finite; nothing is changed then.
        """
        unknown = sorted(weights.keys() - self.loras.keys())
        if unknown:
            raise UserError(f"weights must name loaded LoRAs {sorted(self.loras)}, got {unknown}")
        self.loras.update({name: finite(f"weight of {name}", weight) for name, weight in weights.items()})
        self._activate()

    def _activate(self) -> None:
        own = {"default": 1.0} if self.adapters is not None else {}
        if self.loras or own:
            foreign_loras.set_weights(self.pipe, {**own, **{self._handles[n]: w for n, w in self.loras.items()}})

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str],
        references: References | Sequence[References],
        *,
        negative_prompt: str | Sequence[str] | None = "",
        true_guidance: float | None = None,
        num_images: int = 1,
        num_steps: int | None = None,
        seed: int | Sequence[int] = 0,
        guidance: float | None = None,
        size: int | tuple[int, int] | None = None,
        reference_size: int | None = None,
        reference_shape: Literal["square", "own"] = "square",
        references_per_subject: Sequence[int] | None = None,
        cache_references: bool | None = None,
        separation: Mode | BindingConfig | None = None,
        masks: Sequence[Any] | Tensor | None = None,
        progress: Callable[[int], object] | None = None,
        callback_on_step_end: Callable[[MultiCrafterPipeline, int, float, dict[str, Any]], dict[str, Any] | None]
        | None = None,
        output_type: str = "pil",
        force: bool = False,
    ) -> list[Any]:
        """Draws ``num_images`` pictures per prompt; a batch gives what its prompts give alone, up to rounding.

        Args:
            prompt: What the picture shows, or one text per picture.
            references: One picture per subject (path, PIL, array or tensor), padded to a square; with several prompts, one list per prompt.
                The lists may differ in length: prompts with equally many references run together, nothing is padded.
            negative_prompt: What to steer away from, or one text per prompt; used where ``true_guidance`` is not 1.
            true_guidance: ``velocity = negative + true_guidance * (positive - negative)`` (arXiv 2207.12598), a second pass a step.
                Default: 1 (off) where the model embeds its guidance or was distilled, else the backbone's.
            num_images: Pictures per prompt, each from its own noise.
            num_steps: Euler steps; default: what the adapter says, else the backbone's.
            seed: Of the noise; one per prompt, or the same for all.
            guidance: Distilled guidance, where the model embeds it; default: what the adapter says, else the backbone's.
            size: Side, or (height, width), in pixels; multiples of a token's side.
            reference_size: Side of the references, at most the picture's.
            reference_shape: "square" pads references to squares; "own" gives each the shape of its picture, with about as many tokens.
                Prompts whose references have the same shapes run together.
            references_per_subject: How many neighbouring references show each subject, such as ``[2, 1]`` for two pictures of the first
                person and one of the second; of every prompt. None is one each. A warning says where the adapter was trained with fewer.
            cache_references: Keep keys and values of the references between steps. Default: where that is exact.
            separation: How subjects are kept apart, in place of the pipeline's own. What was bound is in ``pipeline.bindings``,
                one a prompt, afterwards. Where a draft does not show every subject, a warning says so, and the missing ones
                may be drawn anywhere where the others are not.
            masks: For separation "masks": where each reference's subject is to be, one black and white picture (PIL, or a tensor
                (H, W) in [0, 1]) per reference; with several prompts, one list per prompt.
            progress: Called with the number of steps done (of the current group of prompts).
            callback_on_step_end: As in diffusers: ``(pipeline, step, timestep, {"latents": ..., "rows": ...})``, where rows are the
                prompts of the latents; may return ``{"latents": ...}`` and may set ``pipeline.interrupt``.
            output_type: "pil", "pt" (tensors (3, H, W) in [0, 1]) or "latent" (tokens (n, d)).
            force: Draw even what by arithmetic does not fit into memory (`multicrafter.models.needs.drawing_bytes`).

        Raises:
            ValueError: No prompt, or one that is longer than the text encoder reads; no reference, or one that is no picture; a number out
                of range; something that does not fit into memory, or that the backbone does not have; or a picture that came out as NaN.
        """
        negative_prompt = "" if negative_prompt is None else negative_prompt
        for name, hook in (("progress", progress), ("callback_on_step_end", callback_on_step_end)):
            if hook is not None and not callable(hook):
                raise UserError(f"{name} must be a function, got {type(hook).__name__}")
        prompts = text_list("prompt", prompt)
        if not prompts or not all(p.strip() for p in prompts):
            raise UserError("prompt must not be empty")
        negatives = text_list("negative_prompt", negative_prompt)
        negatives = negatives * len(prompts) if isinstance(negative_prompt, str) else negatives
        if len(negatives) != len(prompts):
            raise UserError(
                f"negative_prompt must be one text or one per prompt ({len(prompts)}), got {len(negatives)}"
            )
        lists = reference_lists(prompts, references)
        seeds = seed_list(seed, len(prompts))
        num_steps = whole("num_steps", self.num_steps if num_steps is None else num_steps, least=1)
        if num_steps > MAX_STEPS:
            raise UserError(f"num_steps must be at most {MAX_STEPS:,}, got {num_steps}")
        num_images = whole("num_images", num_images, least=1)
        if output_type not in ("pil", "pt", "latent"):
            raise UserError(f"output_type must be 'pil', 'pt' or 'latent', got {output_type!r}")
        grid, reference_grid = self._grids(size, reference_size)
        if not force:
            self._require_memory(grid, reference_grid, max(map(len, lists)), len(prompts) * num_images)
        scale = self._true_guidance(true_guidance)
        guidance = finite("guidance", self.guidance if guidance is None else guidance)
        self.backbone.check_prompts(self.pipe, [*prompts, *(negatives if scale != 1 else ())])
        keep = self.backbone.caches_references if cache_references is None else cache_references
        if keep and not self.backbone.caches_references:
            raise UserError(f"cache_references must be off: the reference keys of {self.backbone.name} depend on sigma")
        binding = self.separation if separation is None else binding_config(separation)
        subjects = first_of_each(references_per_subject, lists)
        shapes = self._reference_grids(lists, reference_grid, reference_shape)
        places = mask_lists(masks, subjects, grid) if binding.mode == "masks" else None
        if masks is not None and places is None:
            raise UserError(f"masks are for separation 'masks', got separation {binding.mode!r}")
        if self.adapters is not None and references_per_subject is not None:
            _say_untrained(max(map(int, references_per_subject)), self.max_references_per_subject)
        self.interrupt = False
        self.bindings = []
        results: dict[int, list[Any]] = {}
        bound: dict[int, Binding] = {}
        together: dict[tuple[Any, ...], list[int]] = {}
        for i, own in enumerate(shapes):
            together.setdefault((len(own), own, i if self.backbone.padding_moves_picture else 0), []).append(i)
        for (_, grids, _), rows in sorted(together.items()):
            sampler = Sampler(
                self.model, self.device, self.finder, grid, grids, own_shapes=reference_shape == "own", counts=references_per_subject,
                num_images=num_images, num_steps=num_steps, guidance=guidance, scale=scale, keep=keep,
                negative_prompts=[negatives[i] for i in rows], binding=binding,
                masks=None if places is None else torch.stack([places[i] for i in rows]),
            )  # fmt: skip
            tokens = sampler.run(
                [prompts[i] for i in rows],
                [lists[i] for i in rows],
                [seeds[i] for i in rows],
                self._after(rows, progress, callback_on_step_end),
            )
            for i, group in zip(rows, tokens.unflatten(0, (len(rows), num_images)), strict=True):
                results[i] = self._finish(group, grid, output_type)
            bound.update(zip(rows, per_prompt(sampler.bound, len(rows)), strict=True))
        self.bindings = [bound[i] for i in range(len(prompts))]
        _say_missing(self.bindings)
        return [picture for i in range(len(prompts)) for picture in results[i]]

    def _after(
        self, rows: list[int], progress: Callable[[int], object] | None, callback: Callable[..., Any] | None
    ) -> After:
        """What happens after a step: the caller is told, may change the latents, and may have asked to stop."""

        def after(step: int, sigma: float, x: Tensor) -> Tensor | None:
            if progress is not None:
                progress(step + 1)
            if callback is not None:
                x = _changed(callback(self, step, 1000 * sigma, {"latents": x, "rows": rows}), x)
            return None if self.interrupt else x

        return after

    def _reference_grids(self, lists: list[list[Image.Image]], square: Grid, shape: str) -> list[tuple[Grid, ...]]:
        """Token rows and columns of every reference of every prompt."""
        if shape not in ("square", "own"):
            raise UserError(f"reference_shape must be 'square' or 'own', got {shape!r}")
        if shape == "square":
            return [(square,) * len(row) for row in lists]
        return [tuple(own_shape(p.width, p.height, square, self.backbone.grid_step) for p in row) for row in lists]

    def grids(
        self,
        references: References,
        size: int | tuple[int, int] | None = None,
        *,
        reference_size: int | None = None,
        reference_shape: Literal["square", "own"] = "square",
    ) -> tuple[Grid, tuple[Grid, ...]]:
        """Token rows and columns of a picture and of its references, as a call with these arguments draws it.

        Raises:
            ValueError: See the call.
        """
        grid, square = self._grids(size, reference_size)
        opened = [open_picture(p, name=f"reference {i}") for i, p in enumerate(references)]
        return grid, self._reference_grids([opened], square, reference_shape)[0]

    def _require_memory(self, grid: Grid, reference_grid: Grid, references: int, pictures: int) -> None:
        side = self.backbone.token_side(self.pipe)
        size = (grid[0] * side, grid[1] * side)
        need = drawing_bytes(
            self.pipe.transformer.config, self.pipe.vae.config, size=size, reference_size=reference_grid[0] * side,
            references=references, pictures=pictures, text_tokens=1, itemsize=self.pipe.transformer.dtype.itemsize,
            token_side=side,
        )  # fmt: skip
        require_drawing(need, device=self.device, what=f"{pictures} pictures of {size[0]} x {size[1]} pixels at once")

    def _finish(self, tokens: Tensor, grid: Grid, output_type: str) -> list[Any]:
        if not bool(torch.isfinite(tokens).all()):
            raise UserError(
                "the picture must be finite, but NaN or infinity came out of the sampler: look at the guidance, the weights of LoRAs, and "
                "the dtype (float16 overflows where bfloat16 does not)"
            )
        if output_type == "latent":
            return list(tokens)
        pictures = self.backbone.decode_pictures(self.pipe, tokens, grid)
        return list(pictures) if output_type == "pt" else [to_image(p) for p in pictures]

    def _grids(self, size: int | tuple[int, int] | None, reference_size: int | None) -> tuple[Grid, Grid]:
        """Token grids of picture and reference."""
        side, step = self.model.token_side, self.model.size_step
        sides = [self.size] * 2 if size is None else list(size) if np.ndim(size) == 1 else [size] * 2  # type: ignore[arg-type]
        if len(sides) != 2:
            raise UserError(f"size must be a side, or (height, width), got {size!r}")
        height, width = (whole("size", x) for x in sides)
        if reference_size is not None:
            reference_size = whole("reference_size", reference_size, least=1)
        small = reference_size or (self.reference_size if size is None else min(self.reference_size, height, width))
        for name, value in (("size", height), ("size", width), ("reference_size", small)):
            if value < step or value % step:
                raise UserError(f"{name} must be a positive multiple of {step} pixels, got {value}")
        if small > max(height, width):
            raise UserError(f"reference_size must be at most the picture's {max(height, width)} pixels, got {small}")
        return (height // side, width // side), (small // side, small // side)

    def _true_guidance(self, value: float | None) -> float:
        """1 means one pass."""
        has = self.backbone.has_true_guidance(self.pipe)
        if value is None:
            return self.backbone.default_true_guidance if has else 1.0
        value = finite("true_guidance", value)
        if value != 1 and not has:
            raise UserError(f"true_guidance must be 1: this {self.backbone.name} was distilled, got {value}")
        return value


def _say_untrained(given: int, trained: int) -> None:
    if given > trained:
        warnings.warn(
            f"{given} references of one subject, but the adapter was trained with {trained} of each; it may draw each of them as a subject "
            "of its own",
            stacklevel=3,
        )


def _say_missing(bindings: list[Binding]) -> None:
    for index, binding in enumerate(bindings):
        if binding.places is not None and not bool(binding.complete.all()):
            found = (~binding.places.boxes.isnan().any(-1)).sum(-1)
            warnings.warn(
                f"prompt {index}: the draft shows {', '.join(str(int(n)) for n in found)} of "
                f"{binding.places.boxes.shape[1]} subjects; the others may be drawn where these are not",
                stacklevel=3,
            )


def _changed(answer: Any, latents: Tensor) -> Tensor:
    """The latents that a callback wants to go on from."""
    if answer is not None and not isinstance(answer, Mapping):
        raise UserError(f"callback_on_step_end must return a dictionary or nothing, got {type(answer).__name__}")
    found = (answer or {}).get("latents")
    if found is None:
        return latents
    if not isinstance(found, Tensor) or found.shape != latents.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise UserError(f"callback_on_step_end must return latents of shape {tuple(latents.shape)}, got {got}")
    return found


__all__ = ["MultiCrafterPipeline", "load_flux", "to_image", "to_tensor"]
