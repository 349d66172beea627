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
from idar import Separation
from PIL import Image
from torch import Tensor

from multicrafter import UserError
from multicrafter.models import foreign_loras
from multicrafter.models.adapters import Adapters
from multicrafter.models.backbones import Backbone, ReferenceCache
from multicrafter.models.binding import Binding, BindingConfig, Mode, sample_bound, separable
from multicrafter.models.checks import finite, whole
from multicrafter.models.export import check_base
from multicrafter.models.finding import Finder, MapFinder, Places
from multicrafter.models.flux.model import Text
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
    to_shape,
    to_tensor,
)

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
            sampler = _Sampler(
                self, grid, grids, own_shapes=reference_shape == "own", counts=references_per_subject,
                num_images=num_images, num_steps=num_steps, guidance=guidance, scale=scale, keep=keep,
                negative_prompts=[negatives[i] for i in rows], binding=binding,
                masks=None if places is None else torch.stack([places[i] for i in rows]),
            )  # fmt: skip
            tokens = sampler.run(
                rows,
                [prompts[i] for i in rows],
                [lists[i] for i in rows],
                [seeds[i] for i in rows],
                progress,
                callback_on_step_end,
            )
            for i, group in zip(rows, tokens.unflatten(0, (len(rows), num_images)), strict=True):
                results[i] = self._finish(group, grid, output_type)
            bound.update(zip(rows, _per_prompt(sampler.bound, len(rows)), strict=True))
        self.bindings = [bound[i] for i in range(len(prompts))]
        _say_missing(self.bindings)
        return [picture for i in range(len(prompts)) for picture in results[i]]

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


def _per_prompt(binding: Binding, count: int) -> list[Binding]:
    """The rows of each prompt."""

    def rows(value: Tensor | None) -> list[Any]:
        return [None] * count if value is None else list(value.chunk(count))

    places = (
        [None] * count
        if binding.places is None
        else [Places(*pair) for pair in zip(*(x.chunk(count) for x in binding.places), strict=True)]
    )
    return [
        Binding(m, p, c, binding.num_function_evaluations)
        for m, p, c in zip(rows(binding.masks), places, rows(binding.complete), strict=True)
    ]


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


class _Sampler:
    """One group of prompts with references of the same shapes."""

    def __init__(
        self, owner: MultiCrafterPipeline, grid: Grid, reference_grids: tuple[Grid, ...], *, own_shapes: bool,
        counts: Sequence[int] | None, num_images: int, num_steps: int,
        guidance: float, scale: float, keep: bool, negative_prompts: list[str], binding: BindingConfig, masks: Tensor | None,
    ) -> None:  # fmt: skip
        self.owner, self.backbone, self.pipe = owner, owner.backbone, owner.pipe
        self.grid, self.num_images, self.num_steps = grid, num_images, num_steps
        self.reference_grids, self.own_shapes, self.counts = list(reference_grids), own_shapes, counts
        self.guidance, self.scale, self.negative_prompts = guidance, scale, negative_prompts
        self.binding, self.masks = binding, masks
        # what is kept holds for one separation: at noise levels of its own it would be another at every step
        self.keep = keep and (binding.mode == "none" or binding.sigmas == (0.0, 1.0))
        self.separation: Separation | None = None
        self.kept_under: Any = None
        self.caches = self._new_caches()
        self.bound, self.passes = Binding(None, None, torch.ones(0, dtype=torch.bool), 0), 0

    def run(
        self, rows: list[int], prompts: list[str], lists: list[list[Image.Image]], seeds: list[int],
        progress: Callable[[int], object] | None, callback: Callable[..., Any] | None,
    ) -> Tensor:  # fmt: skip
        """Tokens (prompts x num_images, n, d)."""
        owner, device, dtype = self.owner, self.owner.device, self.pipe.transformer.dtype
        seen = [self._pictures(references) for references in lists]
        self.references = [
            r.repeat_interleave(self.num_images, 0) if len(prompts) > 1 else r.expand(self.num_images, -1, -1)
            for r in self._encode_references(seen)
        ]
        self.text = self._encode(prompts, seen, dtype)
        self.negative = self._encode(self.negative_prompts, seen, dtype) if self.scale != 1 else None
        shape = (self.num_images, self.grid[0] * self.grid[1], self.references[0].shape[-1])
        noise = torch.cat([torch.randn(shape, generator=torch.Generator().manual_seed(s)) for s in seeds]).to(device)

        def schedule(steps: int) -> Tensor:
            return self.backbone.sigmas(self.pipe, steps, shape[1])

        sigmas = schedule(self.num_steps)

        def after(step: int, x: Tensor) -> Tensor | None:
            if progress is not None:
                progress(step + 1)
            if callback is not None:
                changed = callback(owner, step, 1000 * float(sigmas[step]), {"latents": x, "rows": rows})
                x = _changed(changed, x)
            return None if owner.interrupt else x

        shown = first_of_each(
            self.counts, [[p.cpu() for p in row] for row in seen]
        )  # a finder sees references as the model does
        grids = self.reference_grids
        masks = None if self.masks is None else self.masks.repeat_interleave(self.num_images, 0).to(device)
        with separable(
            self.pipe.transformer, self.backbone, self.grid, grids, self.binding, counts=self.counts
        ) as separation:
            self.separation = separation
            tokens, bound = sample_bound(
                self._velocity, noise, schedule, self.num_steps, config=self.binding, separation=separation, masks=masks,
                decode=lambda x: self.backbone.decode_pictures(self.pipe, x, self.grid), finder=owner.finder, grid=self.grid,
                references=[row for row in shown for _ in range(self.num_images)], counts=self.counts,
                watch=(self.pipe.transformer, self.backbone, grids), after=after,
            )  # fmt: skip
        self.bound = bound._replace(num_function_evaluations=self.passes)
        return tokens

    def _pictures(self, references: list[Image.Image]) -> list[Tensor]:
        """One prompt's references as the model sees them."""
        side, device = self.backbone.token_side(self.pipe), self.owner.device
        if not self.own_shapes:
            return [to_tensor(p, self.reference_grids[0][0] * side).to(device) for p in references]
        return [
            to_shape(p, (rows * side, columns * side)).to(device)
            for p, (rows, columns) in zip(references, self.reference_grids, strict=True)
        ]

    def _encode_references(self, seen: list[list[Tensor]]) -> list[Tensor]:
        """Tokens (prompts, n, d) of each reference; all at once where all have one shape."""
        dtype = self.pipe.transformer.dtype
        if len(set(self.reference_grids)) == 1:
            pictures = torch.stack([p for row in seen for p in row])
            encoded = self.backbone.encode_pictures(self.pipe, pictures).to(dtype).unflatten(0, (len(seen), -1))
            return list(encoded.unbind(1))
        return [
            self.backbone.encode_pictures(self.pipe, torch.stack(column)).to(dtype)
            for column in map(list, zip(*seen, strict=True))
        ]

    def _encode(self, prompts: list[str], references: list[list[Tensor]], dtype: torch.dtype) -> Text:
        """One row per picture."""
        rows = torch.arange(len(prompts)).repeat_interleave(self.num_images)
        if self.backbone.text_sees_references:  # one prompt at a time, so that repeating it is for free
            text = self.owner.model.encode_prompts_with(prompts, references).rows(rows)
        else:
            text = self.owner.model.encode_prompts([prompts[row] for row in rows.tolist()])
        return text.to(self.owner.device, dtype)

    def _new_caches(self) -> list[ReferenceCache | None]:
        """For the passes with the prompt, and with the negative one."""
        return [ReferenceCache(), ReferenceCache()] if self.keep else [None, None]

    def _velocity(self, x: Tensor, sigma: Tensor) -> Tensor:
        masks = None if self.separation is None else self.separation.masks
        if masks is not self.kept_under:  # a draft's references attended to each other
            self.kept_under, self.caches = masks, self._new_caches()
        positive = self._pass(x, sigma, self.text, self.caches[0])
        if self.negative is None:
            return positive
        negative = self._pass(x, sigma, self.negative, self.caches[1])
        return self.backbone.guide(positive, negative, self.scale)

    def _pass(self, x: Tensor, sigma: Tensor, text: Text, cache: ReferenceCache | None) -> Tensor:
        """The model works in its dtype, the sampler in fp32."""
        self.passes += 1
        velocity = self.backbone.velocity(
            self.pipe.transformer, x.to(self.pipe.transformer.dtype), sigma.to(x.device), text, image_grid=self.grid,
            references=self.references, reference_grids=self.reference_grids, guidance=self.guidance,
            cache=cache,
        )  # fmt: skip
        return velocity.to(x.dtype)


__all__ = ["MultiCrafterPipeline", "load_flux", "to_image", "to_tensor"]
