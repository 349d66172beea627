"""One call for a notebook: draw with any supported pipeline, and see what each subject's reference gave to which part of the picture."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor

from idar.integrations.recording import Recording, listed, record
from idar.integrations.report import load_pipeline, masks_of
from idar.masks import box_masks, map_boxes
from idar.metrics import leakage, map_overlap
from idar.plot import plot_maps


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What `watch` saw; a notebook shows it as its figure.

    Attributes:
        picture: (3, H, W) in [0, 1].
        maps: What each image token took from each subject's reference, mean over blocks and steps (image to reference).
        leakage: Of each subject, see `idar.leakage`: 0 none, 0.5 not told apart; NaN for one that is absent or alone.
        overlap: Of each subject's map with the others', see `idar.map_overlap`.
        masks: Where each subject is: those that were given, or boxes found from the maps.
        masks_given: Whether they were given. Places that come from the maps themselves make leakage look smaller than it is.
        names: Of the subjects.
        recording: Every block and step, for `idar.attention_profile` or `idar.integrations.report.write_report`.
    """

    picture: Float[Tensor, "3 H W"]
    maps: Float[Tensor, "s rows columns"]
    leakage: Float[Tensor, " s"]
    overlap: Float[Tensor, " s"]
    masks: Float[Tensor, "s rows columns"]
    masks_given: bool
    names: tuple[str, ...]
    recording: Recording

    def figure(self, path: str | Path | None = None) -> Any:
        """Heat maps over the picture, a column a subject, with its leakage; written to ``path`` too, where one is given.

        Raises:
            ImportError: matplotlib is missing; the message names the pip line.
        """
        about = "leakage" if self.masks_given else "leakage at least"
        titles = [
            f"{n}, {about} {v:.2f}" if v == v else n for n, v in zip(self.names, self.leakage.tolist(), strict=True)
        ]
        return plot_maps(
            self.picture, self.maps.flatten(1), self.recording.grid, masks=self.masks.flatten(1), names=titles,
            references=self.recording.references, path=path,
        )  # fmt: skip

    def __str__(self) -> str:
        """A line a subject."""
        about = "leakage" if self.masks_given else "leakage at least"
        return "\n".join(
            f"{name}: {about} {_number(leak)}, overlap {_number(over)}"
            for name, leak, over in zip(self.names, self.leakage.tolist(), self.overlap.tolist(), strict=True)
        )

    def _repr_png_(self) -> bytes:
        """What a notebook shows."""
        raw = io.BytesIO()
        self.figure().savefig(raw, format="png", dpi=110)
        return raw.getvalue()


def watch(
    pipe: Any,
    references: Sequence[Any],
    prompt: str,
    *,
    masks: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    blocks: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    reference_size: int | None = None,
    num_steps: int = 20,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Watched:
    """Draws one picture and says what its subjects took from each other's references: maps, leakage, and a figure.

    Args:
        pipe: One of `idar.integrations.recording.SUPPORTED`, or the folder or hub id of one.
        references: One picture per subject: files, PIL pictures or arrays.
        prompt: What the picture shows.
        masks: Where each subject is in the picture that comes out, white on black; files, PIL pictures or arrays. Without them each
            subject is looked for in the maps (`idar.map_boxes`), and leakage is a lower estimate.
        names: One per subject.
        blocks: Names of attention modules; the double-stream blocks by default.
        size: Height and width in pixels.
        reference_size: Long side of references in pixels (FluxPipeline only).
        num_steps: Denoising steps.
        seed: Of the noise.
        options: More arguments of the pipeline's call.

    Raises:
        ValueError: The pipeline is not supported, or something does not fit it.
        ImportError: diffusers is missing; the message names the pip line.
    """
    references = listed(references)
    for what, given in (("masks", masks), ("names", names)):
        if isinstance(given, str):
            raise ValueError(f"{what} must be a list, one per reference, got {given!r}")
        if given is not None and len(given) != len(references):
            raise ValueError(f"{what} must be one per reference, got {len(given)} for {len(references)}")
    if isinstance(pipe, (str, Path)):
        pipe = load_pipeline(str(pipe))
    recording = record(
        pipe, references, prompt, directions=["image_to_reference"], blocks=blocks, size=size,
        reference_size=reference_size, num_steps=num_steps, seed=seed, options=options,
    )  # fmt: skip
    return watched(recording, masks=masks, names=names)


def watched(recording: Recording, *, masks: Sequence[Any] | None = None, names: Sequence[str] | None = None) -> Watched:
    """`watch` of a picture that was recorded before (in the direction "image_to_reference").

    Raises:
        ValueError: The direction is not in the recording, or masks do not fit.
    """
    if "image_to_reference" not in recording.maps:
        raise ValueError(f"recording must hold 'image_to_reference', got {', '.join(recording.maps)}")
    maps = recording.maps["image_to_reference"].mean((0, 1))
    height, width = recording.picture.shape[1:]
    if masks is None:
        boxes = map_boxes(maps[None], recording.grid, (height, width))
        places = box_masks(boxes, recording.grid, (height, width), margin=0.0)[0]
    else:
        places = masks_of(recording, masks)
    return Watched(
        picture=recording.picture,
        maps=maps.view(-1, *recording.grid),
        leakage=leakage(maps[None], places[None])[0],
        overlap=map_overlap(maps[None])[0],
        masks=places.view(-1, *recording.grid),
        masks_given=masks is not None,
        names=tuple(names or (f"subject {chr(65 + i)}" for i in range(len(maps)))),
        recording=recording,
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if value == value else "-"
