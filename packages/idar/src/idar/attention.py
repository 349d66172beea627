"""Maps of where subjects look, or are looked at, without ever holding the attention matrix.

Both directions stream over slices of heads and queries, and recompute the slice's softmax in the backward pass. A slice holds at most
``chunk_size`` scores, and what autograd keeps for the backward are the query and key that attention itself keeps: the extra
memory depends neither on the number of heads nor of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from idar import streaming
from idar.masks import MAX_TOKENS, is_whole, one_line, require_tensor

Span = tuple[int, int]
Direction = Literal["reference_to_image", "image_to_reference"]
DIRECTIONS: tuple[Direction, ...] = ("reference_to_image", "image_to_reference")


def check_spans(length: int, subject_spans: Sequence[Span], image_span: Span) -> None:
    """Raises ValueError unless all spans are non-empty, inside the sequence and apart from each other."""
    if not isinstance(subject_spans, Sequence) or isinstance(subject_spans, str):
        raise ValueError(f"subject_spans must be a list of (start, stop), got {one_line(subject_spans)}")
    if not subject_spans:
        raise ValueError("subject_spans must hold at least one (start, stop), got none")
    for name, span in [
        ("image_span", image_span),
        *[(f"subject_spans[{i}]", s) for i, s in enumerate(subject_spans)],
    ]:
        pair = isinstance(span, Sequence) and len(span) == 2
        if not pair or not all(is_whole(end) for end in span):
            raise ValueError(f"{name} must be two whole numbers (start, stop), got {one_line(span)}")
        start, stop = span
        if not 0 <= start < stop <= length:
            raise ValueError(f"{name} must satisfy 0 <= start < stop <= {length}, got ({start}, {stop})")
    ordered = sorted([tuple(image_span), *map(tuple, subject_spans)])
    for (a, b), (c, d) in zip(ordered[:-1], ordered[1:], strict=True):
        if c < b:
            raise ValueError(f"spans must not overlap, got ({a}, {b}) and ({c}, {d})")


def check_direction(direction: str) -> None:
    """Raises ValueError unless the direction is one of the two."""
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be 'reference_to_image' or 'image_to_reference', got {one_line(direction)}")


def subject_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    subject_spans: Sequence[Span],
    image_span: Span,
    *,
    direction: Direction = "reference_to_image",
    chunk_size: int | None = None,
    scale: float | None = None,
    key_mask: Bool[Tensor, "b n"] | None = None,
    bias: Float[Tensor, "_b _h n n"] | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b s m"]:
    """Attention maps of subjects over the image tokens, exact and differentiable.

    "reference_to_image" (MultiCrafter, arXiv 2509.21953, section 3.2), for every reference i:

        maps_ij = mean over heads and q in reference i of softmax_j(Q_q K_j^T / sqrt(d)),  j over the image tokens only

    so every row sums to 1. "image_to_reference" (docs/adr/0021), for every image token j:

        maps_ij = mean over heads of sum over k in reference i of softmax_k(Q_j K_k^T / sqrt(d)),  k over ALL tokens

    the share of its attention that token j spends on reference i: the arrows that carry features into the picture. Without a
    direction this function is the paper's equation; what is worth supervising is the other (docs/adr/0020), and what
    `idar.capture_attention` collects by default.

    Args:
        query: Queries of the joint sequence after normalisation and RoPE.
        key: Keys likewise.
        subject_spans: (start, stop) of each of the s references in the sequence.
        image_span: (start, stop) of the m image tokens.
        direction: See above.
        chunk_size: Scores held at a time, at least 1; by default 2^20 on CPU (4 MiB in fp32), 2^22 elsewhere.
        scale: Factor of the scores, in place of ``d ** -0.5``.
        key_mask: False where a key takes no part (padding of the text).
        bias: Added to the scores, (b or 1, h or 1, n, n), such as `idar.separation_bias`; -inf forbids an arrow. No gradient flows
            into it. The map of a reference that may look nowhere in the picture is 0.
        num_samples: Estimate from so many queries of each reference instead of all ("reference_to_image" only), see
            `stratified_subset`. Unbiased. With f_q the map of query q alone, the variance of every entry is
            ``(1 / num_samples^2) * sum over strata of Var_stratum(f_q)``, at most ``Var(f_q) / num_samples``.
        generator: Source of the subset.

    Returns:
        (b, s, m) maps in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: Shapes differ, spans leave the sequence or overlap, a mask hides every image token, or queries or keys are not finite.

    >>> q = torch.zeros(1, 2, 6, 4)
    >>> subject_attention(q, q, [(4, 6)], (0, 4)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """
    require_tensor(query=query, key=key)
    if query.dim() != 4 or query.shape != key.shape:
        raise ValueError(f"query and key must both be (b, h, n, d), got {tuple(query.shape)} and {tuple(key.shape)}")
    if not (query.is_floating_point() and key.is_floating_point()):
        raise ValueError(f"query and key must be floating, got {query.dtype} and {key.dtype}")
    check_spans(query.shape[2], subject_spans, image_span)
    check_direction(direction)
    if chunk_size is not None and not (is_whole(chunk_size) and 1 <= chunk_size < 2**63):
        raise ValueError(f"chunk_size must be at least 1, as a whole number of 64 bits, got {one_line(chunk_size)}")
    if scale is not None and not (isinstance(scale, Real) and not isinstance(scale, bool) and 0 < scale < float("inf")):
        raise ValueError(f"scale must be positive, got {one_line(scale)}")
    if key_mask is not None:
        require_tensor(key_mask=key_mask)
    if bias is not None:
        require_tensor(bias=bias)
    if key_mask is not None and key_mask.shape != (query.shape[0], query.shape[2]):
        raise ValueError(f"key_mask must be (b, n) = {(query.shape[0], query.shape[2])}, got {tuple(key_mask.shape)}")
    if key_mask is not None and not bool(key_mask[:, slice(*image_span)].any(1).all()):
        raise ValueError("key_mask must leave at least one image token to every sample, got one that hides them all")
    if bias is not None:
        b, h, n, _ = query.shape
        if bias.dim() != 4 or bias.shape[0] not in (1, b) or bias.shape[1] not in (1, h) or bias.shape[2:] != (n, n):
            raise ValueError(f"bias must be ({b} or 1, {h} or 1, {n}, {n}), got {tuple(bias.shape)}")
    rows = draw_queries(subject_spans, direction, num_samples, generator)
    maps = streaming_maps(
        query, key, rows, subject_spans, image_span, image_span, direction, chunk_size, scale, key_mask, bias
    )
    if not bool(torch.isfinite(maps.detach()).all()):
        raise ValueError("query and key must be finite, got NaN or infinity where subjects and image meet")
    return maps


def draw_queries(
    subject_spans: Sequence[Span],
    direction: Direction,
    num_samples: int | None,
    generator: torch.Generator | None,
) -> list[Int[Tensor, " r"]]:
    """Positions of the queries that speak for each reference: all of them, or a stratified subset."""
    if num_samples is None:
        return [torch.arange(start, stop) for start, stop in subject_spans]
    if direction != "reference_to_image":
        raise ValueError(
            f"num_samples must be None for direction {direction!r}: every image token has a map of its own"
        )
    return [start + stratified_subset(stop - start, num_samples, generator) for start, stop in subject_spans]


def streaming_maps(
    query: Tensor,
    key: Tensor,
    rows: list[Tensor],
    subject_spans: Sequence[Span],
    image_queries: Span,
    image_keys: Span,
    direction: Direction,
    chunk_size: int | None = None,
    scale: float | None = None,
    key_mask: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """`subject_attention` without its checks; image tokens may have other places among the queries than among the keys."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chunk = chunk_size or (1 << 20 if query.device.type == "cpu" else 1 << 22)
    if direction == "reference_to_image":
        rows = [r.to(query.device) for r in rows]
        looks: Tensor = streaming.reference_to_image(query, key, rows, list(image_keys), key_mask, bias, scale, chunk)
        return looks
    spans = [edge for span in subject_spans for edge in span]
    takes: Tensor = streaming.image_to_reference(query, key, list(image_queries), spans, key_mask, bias, scale, chunk)
    return takes


def stratified_subset(
    length: int, num_samples: int, generator: torch.Generator | None = None
) -> Int[Tensor, " {num_samples}"]:
    """One position drawn uniformly from each of ``num_samples`` equal strata of [0, length), rounded down.

    Every position is drawn ``num_samples / length`` times on average, also where the strata end between two positions, so the mean
    over the subset is an unbiased estimate of the mean over all.

    Raises:
        ValueError: ``num_samples`` is not in [1, length].

    >>> stratified_subset(4, 4).tolist()
    [0, 1, 2, 3]
    """
    if not is_whole(length) or not 1 <= length <= MAX_TOKENS:
        raise ValueError(f"length must be a whole number in [1, {MAX_TOKENS}], got {one_line(length)}")
    if not is_whole(num_samples) or not 1 <= num_samples <= length:
        raise ValueError(f"num_samples must be in [1, {length}], got {one_line(num_samples)}")
    step = length / num_samples
    where = (torch.arange(num_samples) + torch.rand(num_samples, generator=generator, dtype=torch.float64)) * step
    return where.long().clamp_(max=length - 1)
