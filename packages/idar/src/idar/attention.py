"""Maps of where subjects look, or are looked at, without ever holding the attention matrix.

Both directions stream over slices of (batch x heads) and of queries, and recompute the slice's softmax in the backward pass. A
slice holds at most ``chunk_size`` scores, so the extra memory depends neither on the number of heads nor of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

Span = tuple[int, int]
Direction = Literal["reference_to_image", "image_to_reference"]
DEFAULT_CHUNK = 1 << 22  # scores in a slice: 16 MiB in fp32


def check_spans(length: int, subject_spans: Sequence[Span], image_span: Span) -> None:
    """Raises ValueError unless all spans are non-empty, inside the sequence and apart from each other."""
    if not subject_spans:
        raise ValueError("subject_spans must hold at least one (start, stop), got none")
    for name, (start, stop) in [
        ("image_span", image_span),
        *[(f"subject_spans[{i}]", s) for i, s in enumerate(subject_spans)],
    ]:
        if not 0 <= start < stop <= length:
            raise ValueError(f"{name} must satisfy 0 <= start < stop <= {length}, got ({start}, {stop})")
    ordered = sorted([image_span, *subject_spans])
    for (a, b), (c, d) in zip(ordered[:-1], ordered[1:], strict=True):
        if c < b:
            raise ValueError(f"spans must not overlap, got ({a}, {b}) and ({c}, {d})")


def _slices(rows: int, queries: int, keys: int, chunk_size: int) -> Iterator[tuple[slice, slice]]:
    """Slices over (batch x heads) and queries of at most ``chunk_size`` scores (at least one query)."""
    per_row = max(1, min(rows, chunk_size // (queries * keys)))
    per_query = queries if per_row > 1 or queries * keys <= chunk_size else max(1, chunk_size // keys)
    for r in range(0, rows, per_row):
        for q in range(0, queries, per_query):
            yield slice(r, r + per_row), slice(q, q + per_query)


def _probabilities(query: Tensor, key: Tensor, scale: float) -> Tensor:
    scores = torch.bmm(query, key.transpose(1, 2)).to(torch.promote_types(query.dtype, torch.float32))
    return torch.softmax(scores.mul_(scale), dim=-1)


class _ReferenceToImage(torch.autograd.Function):
    """``maps[b, j] = mean over h, q of softmax_j(Q K^T / sqrt(d))``: query (b, h, q, d), key (b, h, k, d) -> (b, k)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, chunk_size: int) -> Tensor:
        b, h, n, d = query.shape
        q, k = query.reshape(b * h, n, d), key.reshape(b * h, key.shape[2], d)
        ctx.save_for_backward(query, key)
        ctx.chunk_size = chunk_size
        total = torch.zeros(b * h, k.shape[1], dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for rows, part in _slices(b * h, n, k.shape[1], chunk_size):
            total[rows] += _probabilities(q[rows, part], k[rows], d**-0.5).sum(1)
        return total.view(b, h, -1).sum(1) / (h * n)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        query, key = ctx.saved_tensors
        b, h, n, d = query.shape
        q, k = query.reshape(b * h, n, d), key.reshape(b * h, key.shape[2], d)
        grad = (grad_outputs[0] / (h * n)).repeat_interleave(h, 0)[:, None]  # (b h, 1, k): every query's dP
        grad_q, grad_k = torch.empty_like(q), torch.zeros(k.shape, dtype=grad.dtype, device=k.device)
        for rows, part in _slices(b * h, n, k.shape[1], ctx.chunk_size):
            p = _probabilities(q[rows, part], k[rows], d**-0.5)
            ds = p.mul(grad[rows]).sub_(p.mul((p * grad[rows]).sum(-1, keepdim=True))).mul_(d**-0.5).to(q.dtype)
            grad_q[rows, part] = torch.bmm(ds, k[rows])
            grad_k[rows] += torch.bmm(ds.transpose(1, 2), q[rows, part])
        return grad_q.view_as(query), grad_k.to(key.dtype).view_as(key), None


class _ImageToReference(torch.autograd.Function):
    """``maps[b, s, j] = mean over h of sum over k in span s of softmax_k(Q K^T / sqrt(d))``: all keys take part."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, spans: tuple[Span, ...], chunk_size: int) -> Tensor:
        b, h, n, d = query.shape
        q, k = query.reshape(b * h, n, d), key.reshape(b * h, key.shape[2], d)
        ctx.save_for_backward(query, key)
        ctx.spans, ctx.chunk_size = spans, chunk_size
        mass = torch.empty(b * h, len(spans), n, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for rows, part in _slices(b * h, n, k.shape[1], chunk_size):
            p = _probabilities(q[rows, part], k[rows], d**-0.5)
            for s, (start, stop) in enumerate(spans):
                mass[rows, s, part] = p[..., start:stop].sum(-1)
        return mass.view(b, h, len(spans), n).mean(1)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        query, key = ctx.saved_tensors
        b, h, n, d = query.shape
        q, k = query.reshape(b * h, n, d), key.reshape(b * h, key.shape[2], d)
        grad = (grad_outputs[0] / h).repeat_interleave(h, 0)  # (b h, s, q)
        grad_q, grad_k = torch.empty_like(q), torch.zeros(k.shape, dtype=grad.dtype, device=k.device)
        for rows, part in _slices(b * h, n, k.shape[1], ctx.chunk_size):
            p = _probabilities(q[rows, part], k[rows], d**-0.5)
            inner = torch.zeros_like(p[..., :1])
            for s, (start, stop) in enumerate(ctx.spans):
                inner += p[..., start:stop].sum(-1, keepdim=True) * grad[rows, s, part, None]
            ds = p * -inner
            for s, (start, stop) in enumerate(ctx.spans):
                ds[..., start:stop] += p[..., start:stop] * grad[rows, s, part, None]
            ds = ds.mul_(d**-0.5).to(q.dtype)
            grad_q[rows, part] = torch.bmm(ds, k[rows])
            grad_k[rows] += torch.bmm(ds.transpose(1, 2), q[rows, part])
        return grad_q.view_as(query), grad_k.to(key.dtype).view_as(key), None, None


def subject_attention(
    query: Float[Tensor, "b h n d"],
    key: Float[Tensor, "b h n d"],
    subject_spans: Sequence[Span],
    image_span: Span,
    *,
    direction: Direction = "reference_to_image",
    chunk_size: int | None = None,
    num_samples: int | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, "b s m"]:
    """Attention maps of subjects over the image tokens, exact and differentiable.

    "reference_to_image" (MultiCrafter, arXiv 2509.21953, section 3.2): ``softmax(Q_ref K_image^T / sqrt(d))``, the softmax over the
    image tokens only, averaged over heads and reference tokens; every row sums to 1.

    "image_to_reference": for every image token the attention mass on each reference (softmax over ALL keys, summed over the
    reference's tokens, averaged over heads): the arrows that carry features into the picture.

    Args:
        query: Queries of the joint sequence after normalisation and RoPE.
        key: Keys likewise.
        subject_spans: (start, stop) of each reference in the sequence.
        image_span: (start, stop) of the m image tokens.
        direction: See above.
        chunk_size: Scores held at a time; default 4 Mi (16 MiB in fp32).
        num_samples: Use a stratified random subset of so many queries per subject ("reference_to_image" only): one query drawn
            uniformly from each of ``num_samples`` equal strata. Unbiased where ``num_samples`` divides the reference's length;
            the variance is at most the within-stratum variance of single-query maps divided by ``num_samples``.
        generator: Source of the subset.

    Returns:
        (b, s, m) maps in fp32 (fp64 for fp64 input).

    Raises:
        ValueError: Shapes differ, spans leave the sequence or overlap, or queries are not finite.

    >>> q = torch.zeros(1, 2, 6, 4)
    >>> subject_attention(q, q, [(4, 6)], (0, 4)).tolist()
    [[[0.25, 0.25, 0.25, 0.25]]]
    """
    if query.dim() != 4 or query.shape != key.shape:
        raise ValueError(f"query and key must both be (b, h, n, d), got {tuple(query.shape)} and {tuple(key.shape)}")
    check_spans(query.shape[2], subject_spans, image_span)
    chunk = chunk_size or DEFAULT_CHUNK
    if chunk < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}")
    image = slice(*image_span)
    if direction == "image_to_reference":
        return _ImageToReference.apply(query[:, :, image], key, tuple(subject_spans), chunk)  # type: ignore[no-any-return]
    if direction != "reference_to_image":
        raise ValueError(f"direction must be 'reference_to_image' or 'image_to_reference', got {direction!r}")
    maps = []
    for start, stop in subject_spans:
        rows = query[:, :, start:stop]
        if num_samples is not None:
            rows = rows[:, :, stratified_subset(stop - start, num_samples, generator)]
        maps.append(_ReferenceToImage.apply(rows, key[:, :, image], chunk))
    return torch.stack(maps, 1)


def stratified_subset(length: int, num_samples: int, generator: torch.Generator | None = None) -> Tensor:
    """One index drawn uniformly from each of ``num_samples`` equal strata of range(length)."""
    if not 1 <= num_samples <= length:
        raise ValueError(f"num_samples must be in [1, {length}], got {num_samples}")
    edges = torch.arange(num_samples) * (length / num_samples)
    return (edges + torch.rand(num_samples, generator=generator) * (length / num_samples)).long().clamp_(max=length - 1)
