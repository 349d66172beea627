"""Prompts that are drawn together: references are encoded once, subjects kept apart, and true guidance takes two passes a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from idar import Separation
from PIL import Image
from torch import Tensor

from multicrafter.models.backbones import ReferenceCache
from multicrafter.models.binding import Binding, BindingConfig, sample_bound, separable
from multicrafter.models.finding import Finder, Places
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid
from multicrafter.models.loaded import LoadedModel
from multicrafter.models.request import first_of_each, to_shape, to_tensor

After = Callable[[int, float, Tensor], Tensor | None]
"""``(step, sigma, latents) -> latents`` to go on from, or None to stop."""


class Sampler:
    """One group of prompts with references of the same shapes."""

    def __init__(
        self, model: LoadedModel, device: torch.device, finder: Finder, grid: Grid, reference_grids: tuple[Grid, ...], *, own_shapes: bool,
        counts: Sequence[int] | None, num_images: int, num_steps: int,
        guidance: float, scale: float, keep: bool, negative_prompts: list[str], binding: BindingConfig, masks: Tensor | None,
    ) -> None:  # fmt: skip
        self.model, self.backbone, self.pipe = model, model.backbone, model.pipe
        self.device, self.finder = device, finder
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

    def run(self, prompts: list[str], lists: list[list[Image.Image]], seeds: list[int], after: After) -> Tensor:
        """Tokens (prompts x num_images, n, d); ``after`` sees the latents of every step of the final pass."""
        device, dtype = self.device, self.pipe.transformer.dtype
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
        # a finder sees references as the model does
        shown = first_of_each(self.counts, [[p.cpu() for p in row] for row in seen])
        grids = self.reference_grids
        masks = None if self.masks is None else self.masks.repeat_interleave(self.num_images, 0).to(device)
        with separable(
            self.pipe.transformer, self.backbone, self.grid, grids, self.binding, counts=self.counts
        ) as separation:
            self.separation = separation
            tokens, bound = sample_bound(
                self._velocity, noise, schedule, self.num_steps, config=self.binding, separation=separation, masks=masks,
                decode=lambda x: self.backbone.decode_pictures(self.pipe, x, self.grid), finder=self.finder, grid=self.grid,
                references=[row for row in shown for _ in range(self.num_images)], counts=self.counts,
                watch=(self.pipe.transformer, self.backbone, grids),
                after=lambda step, x: after(step, float(sigmas[step]), x),
            )  # fmt: skip
        self.bound = bound._replace(num_function_evaluations=self.passes)
        return tokens

    def _pictures(self, references: list[Image.Image]) -> list[Tensor]:
        """One prompt's references as the model sees them."""
        side, device = self.backbone.token_side(self.pipe), self.device
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
            text = self.model.encode_prompts_with(prompts, references).rows(rows)
        else:
            text = self.model.encode_prompts([prompts[row] for row in rows.tolist()])
        return text.to(self.device, dtype)

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


def per_prompt(binding: Binding, count: int) -> list[Binding]:
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
