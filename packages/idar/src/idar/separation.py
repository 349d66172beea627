"""Attention kept apart by subject: each arrow of the joint attention is weighed by whose tokens it joins.

An *arrow* goes from a query to a key. Two people in one picture have four kinds of tokens: text, image, and the references of each
person. What one person's image tokens read from the other person's reference is how attributes leak, so these arrows are cut.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from idar.attention import streaming_maps
from idar.layout import SubjectLayout
from idar.masks import MAX_TOKENS, is_whole, one_line, owner_masks, require_tensor

Arrow = Literal[
    "image_to_reference",
    "reference_to_image",
    "reference_to_reference",
    "image_to_image",
    "reference_to_text",
    "text_to_reference",
]
Background = Literal["none", "all"]
ARROWS: tuple[Arrow, ...] = (
    "image_to_reference",
    "reference_to_image",
    "reference_to_reference",
    "image_to_image",
    "reference_to_text",
    "text_to_reference",
)
SUBJECT_ARROWS: tuple[Arrow, ...] = ARROWS[:3]
"""What is separated by default: everything that joins a reference to what is not its own."""


def separation_bias(
    layout: SubjectLayout | Sequence[SubjectLayout],
    masks: Float[Tensor, "b s m"],
    *,
    strength: float | Float[Tensor, " b"] = 1.0,
    background: Background = "none",
    arrows: Sequence[Arrow] = SUBJECT_ARROWS,
    num_tokens: int | None = None,
) -> Float[Tensor, "b 1 n n"]:
    """Additive bias that keeps the attention of different subjects apart.

        p_qk ~ w_qk exp(q . k / sqrt(d)),   bias_qk = log w_qk,   w_qk = 1 - strength (1 - a_qk)

    ``a`` says how far an arrow is allowed. With ``M_ij`` the mask of subject i at image token j and ``c_j = max_i M_ij``:

        image j <-> reference i      M_ij, plus 1 - c_j where the background may look at all references
        reference i -> reference k   1 for i = k, else 0
        image j -> image k           max(1 - min(c_j, c_k), max_i min(M_ij, M_ik))
        reference <-> text           0

    Every other arrow is 1, and so are the arrows that ``arrows`` does not name (our choice: docs/adr/0025).

    Args:
        layout: Where text, image and references are; one for all rows, or one per row of equal length.
        masks: Where each subject is in the picture, in [0, 1], at token resolution (`token_masks`, `owner_masks`).
        strength: 0 changes nothing, 1 forbids what the masks forbid; in [0, 1], one number or one per row.
        background: Whether image tokens of nobody look at no reference, or at all of them.
        arrows: Which kinds of arrows are weighed; see `ARROWS`.
        num_tokens: n, where the sequence goes on after the layout (text that comes last).

    Returns:
        The bias in fp32; -inf where an arrow is forbidden. It is the twin of the mask that runs fast on a GPU (`separation_weight`).

    Raises:
        ValueError: Shapes, numbers or names do not fit.

    >>> layout = SubjectLayout.in_order(1, 2, [1, 1])
    >>> separation_bias(layout, torch.eye(2)[None])[0, 0, 1:3].exp().tolist()  # both image tokens: text, image, references
    [[1.0, 1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0]]
    """
    layouts = check_separation(layout, masks, strength, background, arrows)
    length = max(one.stop for one in layouts) if num_tokens is None else num_tokens
    if not is_whole(length) or not length <= MAX_TOKENS:
        raise ValueError(f"num_tokens must be a whole number, got {one_line(length)}")
    if length < max(one.stop for one in layouts):
        raise ValueError(f"num_tokens must be at least the layout's {max(o.stop for o in layouts)}, got {length}")
    allowed = torch.ones(len(masks), length, length, dtype=torch.float32, device=masks.device)
    if len(layouts) == 1:
        _allow(allowed, layouts[0], masks.float(), background, arrows)
    else:
        for row, one in enumerate(layouts):
            _allow(allowed[row : row + 1], one, masks[row : row + 1].float(), background, arrows)
    power = torch.as_tensor(strength, dtype=torch.float32, device=masks.device).reshape(-1, 1, 1)
    return (1 - power * (1 - allowed)).log()[:, None]


def check_separation(
    layout: SubjectLayout | Sequence[SubjectLayout],
    masks: Tensor,
    strength: float | Tensor,
    background: str,
    arrows: Sequence[str],
) -> list[SubjectLayout]:
    """The layouts, one for all rows or one per row; raises ValueError where something does not fit."""
    layouts = as_layouts(layout)
    require_tensor(masks=masks)
    if masks.dim() != 3 or not len(masks):
        raise ValueError(f"masks must be (b, s, m) and of at least one row, got {tuple(masks.shape)}")
    if len(layouts) not in (1, len(masks)):
        raise ValueError(f"layout must be one, or one per row of masks ({len(masks)}), got {len(layouts)}")
    for one in layouts:
        if masks.shape[2] != one.num_image or masks.shape[1] < len(one.subject_spans):
            raise ValueError(
                f"masks must be (b, {len(one.subject_spans)}, {one.num_image}) for this layout, got {tuple(masks.shape)}"
            )
    if masks.shape[1] != max(len(one.subject_spans) for one in layouts):
        most = max(len(one.subject_spans) for one in layouts)
        raise ValueError(f"masks must be of the layout's {most} subjects, got {masks.shape[1]}")
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError("masks must lie in [0, 1], got values outside or NaN")
    given = _as_power(strength)
    if given.dim() > 1 or (given.dim() == 1 and len(given) not in (1, len(masks))):
        raise ValueError(f"strength must be one number or one per row ({len(masks)}), got {tuple(given.shape)}")
    if not bool(((given >= 0) & (given <= 1)).all()):
        raise ValueError(f"strength must lie in [0, 1], got {one_line(strength)}")
    check_rules(background, arrows)
    return layouts


def _as_power(strength: float | Tensor) -> Tensor:
    """A strength as a tensor; raises ValueError where it holds no numbers."""
    try:
        if isinstance(strength, bool):
            raise TypeError
        return torch.as_tensor(strength, dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"strength must be one number or one per row, got {one_line(strength)}") from error


def as_layouts(layout: SubjectLayout | Sequence[SubjectLayout]) -> list[SubjectLayout]:
    """One layout, or one per row, as a list; raises ValueError where it is neither."""
    layouts = [layout] if isinstance(layout, SubjectLayout) else list(layout) if isinstance(layout, Sequence) else []
    if not layouts or not all(isinstance(one, SubjectLayout) for one in layouts):
        raise ValueError(f"layout must be a SubjectLayout, or one per row, got {one_line(layout)}")
    return layouts


def check_rules(background: str, arrows: Sequence[str]) -> None:
    """Raises ValueError where there is no such rule for the background, or no such arrow."""
    if not isinstance(background, str) or background not in ("none", "all"):
        raise ValueError(f"background must be 'none' or 'all', got {one_line(background)}")
    several = isinstance(arrows, Sequence | Set) and not isinstance(arrows, str)
    if not several or [a for a in arrows if a not in ARROWS]:
        raise ValueError(f"arrows must be chosen from {ARROWS}, got {one_line(arrows)}")


def _allow(
    allowed: Tensor, layout: SubjectLayout, masks: Tensor, background: Background, arrows: Sequence[Arrow]
) -> None:
    """Writes ``a`` (b, n, n) of one layout."""
    image = slice(*layout.image_span)
    covered = masks.amax(1)
    for i, span in enumerate(layout.subject_spans):
        reference = slice(*span)
        own = masks[:, i] if background == "none" else (masks[:, i] + 1 - covered).clamp(max=1)
        if "image_to_reference" in arrows:
            allowed[:, image, reference] = own[:, :, None]
        if "reference_to_image" in arrows:
            allowed[:, reference, image] = own[:, None]
        if "reference_to_reference" in arrows:
            for k, other in enumerate(layout.subject_spans):
                if k != i:
                    allowed[:, reference, slice(*other)] = 0
        for text in _text(layout, allowed.shape[-1]):
            if "reference_to_text" in arrows:
                allowed[:, reference, text] = 0
            if "text_to_reference" in arrows:
                allowed[:, text, reference] = 0
    if "image_to_image" in arrows:
        nobody = 1 - torch.minimum(covered[:, :, None], covered[:, None])
        shared = torch.minimum(masks[:, :, :, None], masks[:, :, None]).amax(1)
        allowed[:, image, image] = torch.maximum(nobody, shared)


def _text(layout: SubjectLayout, length: int) -> list[slice]:
    """What is neither image nor reference."""
    taken = sorted([layout.image_span, *layout.subject_spans])
    edges = [0, *[edge for span in taken for edge in span], length]
    return [slice(a, b) for a, b in zip(edges[::2], edges[1::2], strict=True) if b > a]


class TokenRoles:
    """What `separation_bias` needs to know of single tokens, for kernels that never hold an n x n matrix (FlexAttention)."""

    def __init__(
        self,
        layouts: Sequence[SubjectLayout],
        masks: Float[Tensor, "b s m"],
        background: Background,
        arrows: Sequence[Arrow],
        length: int,
    ) -> None:
        """One layout for all rows, or one per row."""
        rows = len(masks)
        self.subject = torch.full((rows, length), -1, device=masks.device, dtype=torch.int64)
        self.image = torch.full_like(self.subject, -1)
        for row in range(rows):
            layout = layouts[row if len(layouts) > 1 else 0]
            self.image[row, slice(*layout.image_span)] = torch.arange(layout.num_image, device=masks.device)
            for i, span in enumerate(layout.subject_spans):
                self.subject[row, slice(*span)] = i
        self.masks = masks.float()
        self.covered = self.masks.amax(1)
        self.reach = self.masks if background == "none" else (self.masks + 1 - self.covered[:, None]).clamp(max=1)
        self.arrows = tuple(arrows)

    def allowed(self, row: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """``a`` of single arrows, elementwise over broadcast indices; the formula of `separation_bias`, one arrow at a time."""
        rq, rk = self.subject[row, query], self.subject[row, key]
        iq, ik = self.image[row, query], self.image[row, key]
        one = torch.ones_like(self.covered[row, iq.clamp_min(0) + 0 * ik])
        a = one
        ref_q, ref_k, img_q, img_k = rq >= 0, rk >= 0, iq >= 0, ik >= 0
        text_q, text_k = ~ref_q & ~img_q, ~ref_k & ~img_k
        rq, rk, iq, ik = rq.clamp_min(0), rk.clamp_min(0), iq.clamp_min(0), ik.clamp_min(0)
        zero = torch.zeros_like(one)
        if "image_to_reference" in self.arrows:
            a = torch.where(img_q & ref_k, self.reach[row, rk, iq], a)
        if "reference_to_image" in self.arrows:
            a = torch.where(ref_q & img_k, self.reach[row, rq, ik], a)
        if "reference_to_reference" in self.arrows:
            a = torch.where(ref_q & ref_k & (rq != rk), zero, a)
        if "reference_to_text" in self.arrows:
            a = torch.where(ref_q & text_k, zero, a)
        if "text_to_reference" in self.arrows:
            a = torch.where(text_q & ref_k, zero, a)
        if "image_to_image" in self.arrows:
            nobody = 1 - torch.minimum(self.covered[row, iq], self.covered[row, ik])
            shared = zero
            for i in range(self.masks.shape[1]):
                shared = torch.maximum(shared, torch.minimum(self.masks[row, i, iq], self.masks[row, i, ik]))
            a = torch.where(img_q & img_k, torch.maximum(nobody, shared), a)
        return a


def separates_nothing(strength: float | Tensor, masks: Tensor, background: Background, arrows: Sequence[Arrow]) -> bool:
    """Whether the bias is 0 everywhere, so that the model may run as if there were none."""
    if not len(arrows) or not bool((torch.as_tensor(strength) > 0).any()):
        return True
    if "image_to_image" in arrows or (masks.shape[1] > 1 and "reference_to_reference" in arrows):
        return False
    if "reference_to_text" in arrows or "text_to_reference" in arrows:
        return False
    masks = masks.float()
    reach = masks if background == "none" else (masks + 1 - masks.amax(1, keepdim=True)).clamp(max=1)
    return bool((reach == 1).all())


def attention_owners(
    query: Float[Tensor, "b h n d"], key: Float[Tensor, "b h n d"], layout: SubjectLayout
) -> Float[Tensor, "b s m"]:
    """Who owns each image token by the attention of the block itself: the reference that it looks at most.

        owner(j) = argmax_i mean over heads of sum over k in reference i of softmax_k(Q_j K_k^T / sqrt(d))

    Routing by the model's own attention (after MUSAR, arXiv 2505.02823, section 3.3); a `Router` for `separate_subjects`. Every image
    token gets an owner, whether it shows somebody or not.
    """
    require_tensor(query=query, key=key)
    if not isinstance(layout, SubjectLayout):
        raise ValueError(f"layout must be a SubjectLayout, got {one_line(layout)}")
    alike = query.dim() == key.dim() == 4 and query.shape[:2] == key.shape[:2] and query.shape[3] == key.shape[3]
    if not alike or key.shape[2] < layout.stop:
        shapes = f"{tuple(query.shape)} and {tuple(key.shape)}"
        raise ValueError(f"query and key must be (b, h, n, d) of at least {layout.stop} keys, got {shapes}")
    image = layout.image_queries(query.shape[2], key.shape[2]) if layout.causal else layout.image_span
    maps = streaming_maps(query, key, [], layout.subject_spans, image, layout.image_span, "image_to_reference")
    return owner_masks(maps, threshold=1e-12)
