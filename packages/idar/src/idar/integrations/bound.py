"""Draws with somebody else's pipeline so that nobody is blended: a draft says who stands where, then attention is separated."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from idar.integrations.diffusers import capture_subject_attention, separate_subjects
from idar.integrations.recording import drawn, grid_of, ready
from idar.masks import box_masks, map_boxes
from idar.separation import Background

Find = Callable[[Float[Tensor, "3 H W"], Sequence[Any]], Float[Tensor, "s 4"]]
"""A picture in [0, 1] and the references to one box (left, top, right, bottom) per reference, NaN where its subject is not there."""


@dataclass(frozen=True, kw_only=True)
class BoundPicture:
    """A picture, and how its subjects were kept apart.

    Attributes:
        picture: (3, H, W) in [0, 1].
        draft: The draft likewise.
        boxes: Where each reference's subject is in the draft, in pixels; NaN where it was not found.
        masks: (s, n), the tokens of each subject.
        complete: Whether every subject was found; one that was not may be drawn anywhere where the others are not.
        num_steps: Denoising steps, the draft's included.
    """

    picture: Float[Tensor, "3 H W"]
    draft: Float[Tensor, "3 H W"]
    boxes: Float[Tensor, "s 4"]
    masks: Float[Tensor, "s n"]
    complete: bool
    num_steps: int


def draw_bound(
    pipe: Any,
    references: Sequence[Any],
    prompt: str,
    *,
    find: Find | None = None,
    draft_steps: int = 3,
    num_steps: int = 20,
    seed: int = 0,
    size: tuple[int, int] | None = None,
    reference_size: int | None = None,
    margin: float = 1 / 32,
    background: Background = "none",
    options: dict[str, Any] | None = None,
) -> BoundPicture:
    """Draws a short draft, finds each reference's subject in it, and draws again from the same noise with attention between them cut.

    Works on pipelines as they are, without training: FLUX.1 with references in context (UNO's layout), FLUX.2 and its klein variants,
    Qwen-Image-Edit-Plus and Qwen-Image 2.1, with any LoRA loaded.

    Args:
        pipe: One of `idar.integrations.recording.SUPPORTED` that takes several references.
        references: One picture per subject, see `idar.integrations.pictures.read_picture`.
        prompt: See `idar.integrations.recording.record`.
        find: Where each reference's subject is in the draft, such as a face detector with a match by identity; by default the
            attention maps of the draft say it (`idar.map_boxes`).
        draft_steps: Steps of the draft.
        num_steps: Steps of the picture.
        seed: Of the noise, the same for draft and picture.
        size: Height and width in pixels.
        reference_size: See `record`.
        margin: Added to each side of a box, as a share of the picture's longer side.
        background: Whether tokens of nobody look at no reference or at all of them.
        options: More arguments of the pipeline's call.

    Raises:
        ValueError: The pipeline is not supported, something does not fit it, or ``find`` gave something else than boxes.
    """
    if not 0 <= margin < float("inf"):
        raise ValueError(f"margin must be at least 0, got {margin}")
    if background not in ("none", "all"):
        raise ValueError(f"background must be 'none' or 'all', got {background!r}")
    maps: list[Tensor] = []
    with torch.no_grad(), ready(pipe, references, prompt, size=size, reference_size=reference_size) as prepared:
        drafted = prepared.given(num_steps=draft_steps, seed=seed, options=options)
        final = prepared.given(num_steps=num_steps, seed=seed, options=options)
        with capture_subject_attention(
            pipe.transformer, prepared.layout, direction="image_to_reference", blocks=lambda _: True
        ) as captured:
            hook = pipe.transformer.register_forward_hook(lambda *_: maps.append(captured.maps[:1].float().cpu()))
            try:
                draft = drawn(pipe, drafted)
            finally:
                hook.remove()
        looked = torch.stack(maps).mean(0)
        grid = grid_of(draft, prepared.side, looked.shape[-1])
        shape = (draft.shape[1], draft.shape[2])
        if find is None:
            boxes = map_boxes(looked, grid, shape)[0]
        else:
            boxes = torch.as_tensor(find(draft, references)).float()
        if boxes.shape != (len(references), 4):
            raise ValueError(f"find must give one box per reference, ({len(references)}, 4), got {tuple(boxes.shape)}")
        masks = box_masks(boxes[None], grid, shape, margin=margin * max(shape))
        missing = boxes.isnan().any(-1)
        masks = torch.where(missing[None, :, None], (1 - masks.amax(1, keepdim=True)).expand_as(masks), masks)
        masks = masks.to(pipe.transformer.device)
        with separate_subjects(pipe.transformer, prepared.layout, masks, background=background):
            picture = drawn(pipe, final)
    return BoundPicture(
        picture=picture, draft=draft, boxes=boxes, masks=masks[0].cpu(), complete=not bool(missing.any()),
        num_steps=draft_steps + num_steps,
    )  # fmt: skip
