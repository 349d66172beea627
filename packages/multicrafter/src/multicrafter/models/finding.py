"""Where the subjects of references are in a picture: by a detector and a match of identities, by boxes and maps, or by attention alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from id_reward import FaceBackend, match
from idar import box_masks, map_boxes
from jaxtyping import Float
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.checks import check_finite
from multicrafter.models.flux.packing import Grid


class Places(NamedTuple):
    """Where each reference's subject was found: boxes (b, s, 4) in pixels and its similarity (b, s); NaN where it was not."""

    boxes: Float[Tensor, "b s 4"]
    similarity: Float[Tensor, "b s"]


class Finder(Protocol):
    """Finds the subjects of the references in pictures."""

    def __call__(
        self,
        pictures: Float[Tensor, "b 3 H W"],
        references: Sequence[Sequence[Any]],
        maps: Float[Tensor, "b s n"] | None,
        grid: Grid,
    ) -> Places:
        """Places in each picture, in the order of its references.

        Args:
            pictures: In [0, 1].
            references: One list of pictures (PIL, or tensors (3, h, w) in [0, 1]) per picture.
            maps: How much each image token looked at each reference while the pictures were drawn, where ``needs_maps``.
            grid: Token rows and columns of the pictures.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class IdentityFinder:
    """Boxes of a detector that also embeds identities; a Hungarian match by cosine says whose box is whose.

    Attributes:
        backend: Any face or object backend of `id_reward`.
        grow: How far a box is widened to the left, top, right and bottom, in widths and heights of itself: a face is a part of a person.
        min_similarity: Matches below this cosine do not count.
    """

    backend: FaceBackend
    grow: tuple[float, float, float, float] = (0.0, 0.0, 0.0, 0.0)
    min_similarity: float = -1.0
    needs_maps: bool = False

    def __post_init__(self) -> None:
        check_finite(self)
        if not isinstance(self.backend, FaceBackend) or isinstance(self.backend, type):
            raise UserError(f"backend must be an object with detect_and_embed, got {self.backend!r}"[:300])

    def __call__(
        self,
        pictures: Float[Tensor, "b 3 H W"],
        references: Sequence[Sequence[Any]],
        maps: Float[Tensor, "b s n"] | None,
        grid: Grid,
    ) -> Places:
        """See `Finder`. Of more boxes than references those with the best scores are matched."""
        count = len(references[0])
        flat = [picture for row in references for picture in row]
        known = getattr(self.backend, "detect_and_embed_references", self.backend.detect_and_embed)(flat)
        boxes = torch.full((len(pictures), count, 4), torch.nan)
        similarity = torch.full((len(pictures), count), torch.nan)
        for row, faces in enumerate(self.backend.detect_and_embed(list(pictures))):
            own = [known[row * count + s] for s in range(count)]
            shown = [s for s in range(count) if len(own[s].scores)]
            best = np.argsort(-faces.scores, kind="stable")[:count]
            if not shown or not len(best):
                continue
            embedded = np.stack([own[s].embeddings[int(np.argmax(own[s].scores))] for s in shown])
            cosine = embedded @ faces.embeddings[best].T
            for i, j in match(cosine).pairs:
                if cosine[i, j] >= self.min_similarity:
                    boxes[row, shown[i]] = self._grown(torch.as_tensor(faces.boxes[best[j]], dtype=torch.float32))
                    similarity[row, shown[i]] = float(cosine[i, j])
        return Places(boxes, similarity)

    def _grown(self, box: Tensor) -> Tensor:
        width, height = box[2] - box[0], box[3] - box[1]
        left, top, right, bottom = self.grow
        return box + torch.stack([-left * width, -top * height, right * width, bottom * height])


@dataclass(frozen=True, kw_only=True)
class BoxFinder:
    """Boxes of a detector that knows no identities; who is who is read off the attention of the draft.

    A Hungarian match of the share that each reference has of the attention inside each box.

    Attributes:
        backend: Any face or object backend of `id_reward`; its embeddings are not looked at.
    """

    backend: FaceBackend
    needs_maps: bool = True

    def __call__(
        self,
        pictures: Float[Tensor, "b 3 H W"],
        references: Sequence[Sequence[Any]],
        maps: Float[Tensor, "b s n"] | None,
        grid: Grid,
    ) -> Places:
        """See `Finder`."""
        assert maps is not None
        count, size = len(references[0]), (pictures.shape[2], pictures.shape[3])
        boxes = torch.full((len(pictures), count, 4), torch.nan)
        similarity = torch.full((len(pictures), count), torch.nan)
        shares = maps / maps.sum(1, keepdim=True).clamp_min(1e-12)
        for row, faces in enumerate(self.backend.detect_and_embed(list(pictures))):
            best = np.argsort(-faces.scores, kind="stable")[:count]
            if not len(best):
                continue
            found = torch.as_tensor(faces.boxes[best], dtype=torch.float32)
            inside = box_masks(found[None], grid, size)[0]  # (f, n)
            share = (shares[row].cpu() @ inside.T) / inside.sum(1).clamp_min(1)
            for i, j in match(share.double().numpy()).pairs:
                boxes[row, i], similarity[row, i] = found[j], float(share[i, j])
        return Places(boxes, similarity)


@dataclass(frozen=True, kw_only=True)
class MapFinder:
    """Places from the attention of the draft alone: no detector, any kind of subject; see `idar.map_boxes`."""

    needs_maps: bool = True

    def __call__(
        self,
        pictures: Float[Tensor, "b 3 H W"],
        references: Sequence[Sequence[Any]],
        maps: Float[Tensor, "b s n"] | None,
        grid: Grid,
    ) -> Places:
        """See `Finder`."""
        assert maps is not None
        boxes = map_boxes(maps.float().cpu(), grid, (pictures.shape[2], pictures.shape[3]))
        shares = maps.cpu() / maps.cpu().sum(1, keepdim=True).clamp_min(1e-12)
        inside = box_masks(boxes, grid, (pictures.shape[2], pictures.shape[3]), margin=0.0)
        share = (shares * inside).sum(-1) / inside.sum(-1)
        return Places(boxes, torch.where(boxes.isnan().any(-1), torch.nan, share))
