"""The two streaming operators behind `idar.subject_attention`, their backward passes, and their registration with autograd and compilers.

They are custom operators, so that torch.compile sees one opaque node each instead of an unrolled loop. With ``S = scale * Q K^T``,
``e = exp(S - row maximum)`` and ``r`` the row sums of e, probabilities are ``p = e / r``. For a loss L with ``G = dL/dp``:

    dL/dS = p * (G - c),   c_q = sum_k p_qk G_qk

Both directions have a G of low rank, which is what makes a slice cheap: G_qk = g_k / (h r) for reference queries (the same for
every query), and G_qk = g_q,s(k) / h for image queries (constant over the keys of a reference, zero elsewhere).
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

SCHEMA = "Tensor? key_mask, Tensor? bias, float scale, int chunk"
"""Said, because torch before 2.8 does not read it off ``list[Tensor]``."""


def _split(heads: int, queries: int, keys: int, chunk: int) -> tuple[list[slice], int]:
    """Slices of heads, and how many queries to take at a time, so that about ``chunk`` scores are held (at least a query of two heads).

    Two heads at least, so that two threads have one each; queries in equal parts.
    """
    together = min(heads, max(2, chunk // (queries * keys)))
    parts = math.ceil(queries / max(1, chunk // (keys * together)))
    return [slice(h, min(h + together, heads)) for h in range(0, heads, together)], math.ceil(queries / parts)


class _Scratch:
    """Buffers that the slices reuse: fresh memory for each would cost more than the arithmetic."""

    def __init__(self, like: Tensor) -> None:
        self.device = like.device
        self.wide = torch.promote_types(like.dtype, torch.float32)
        # CUDA multiplies bf16 and fp16 into fp32 exactly (from torch 2.8 on); else it is given fp32
        exact = like.is_cuda and hasattr(torch.ops.aten.bmm, "dtype_out")
        self.narrow = like.dtype if exact else self.wide
        self.buffers: dict[str, Tensor] = {}

    def get(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        size, buffer = math.prod(shape), self.buffers.get(name)
        if buffer is None or buffer.numel() < size:
            buffer = self.buffers[name] = torch.empty(size, dtype=dtype or self.wide, device=self.device)
        return buffer[:size].view(shape)

    def copy(self, name: str, source: Tensor) -> Tensor:
        """A contiguous copy, in the type that matrices are multiplied in."""
        return self.get(name, *source.shape, dtype=self.narrow).copy_(source)

    def query(self, source: Tensor, scale: float) -> Tensor:
        """A copy of queries, scaled unless it is of a narrow type."""
        copied = self.copy("query", source)
        return copied.mul_(scale) if self.narrow == self.wide else copied

    def matmul(self, name: str, a: Tensor, b: Tensor) -> Tensor:
        """``a @ b`` in fp32 (fp64 for fp64)."""
        out = self.get(name, a.shape[0], a.shape[1], b.shape[2])
        if a.dtype == self.wide:
            return torch.bmm(a, b, out=out)
        return torch.ops.aten.bmm.dtype_out(a, b, self.wide, out=out)  # type: ignore[no-any-return]

    def exponentials(
        self, query: Tensor, key: Tensor, scale: float, hidden: Tensor | None, bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """``e = exp(scale * Q K^T + bias - row maximum)`` (h, q, k) and its row sums r (h, q, 1); query comes scaled where it is wide.

        A row whose keys are all forbidden is zero, and its sum the smallest number that may divide.
        """
        scores = self.matmul("scores", query, key.transpose(1, 2))
        if self.narrow != self.wide:
            scores.mul_(scale)
        if bias is not None:
            scores.add_(bias)
        if hidden is not None:
            scores.masked_fill_(hidden, -math.inf)
        scores.sub_(scores.amax(-1, keepdim=True).clamp_min_(torch.finfo(self.wide).min)).exp_()
        return scores, scores.sum(-1, keepdim=True).clamp_min_(torch.finfo(self.wide).tiny)

    def gradients(
        self, d_scores: Tensor, query: Tensor, key: Tensor, total: Tensor, scale: float, d_key: Tensor
    ) -> Tensor:
        """Returns ``scale * (dS / r) K`` and adds ``scale * (dS / r)^T Q`` to d_key, for dS that lacks its division by the row sums r."""
        if self.narrow == self.wide:
            d_key.baddbmm_(d_scores.transpose(1, 2), query.div_(total))
            return self.matmul("d_query", d_scores, key).mul_(scale / total)
        d = self.copy("narrow", d_scores)
        d_key += self.matmul("d_key_part", d.transpose(1, 2), self.copy("divided", query * (scale / total)))
        return self.matmul("d_query", d, key).mul_(scale / total)


def _hidden(key_mask: Tensor | None, sample: int, keys: slice) -> Tensor | None:
    return None if key_mask is None else ~key_mask[sample, keys]


def _bias(bias: Tensor | None, sample: int, heads: slice, rows: Tensor | slice, keys: slice) -> Tensor | None:
    """Slice (heads or 1, rows, keys) of a bias (b or 1, h or 1, q, k)."""
    if bias is None:
        return None
    chosen = bias[sample if bias.shape[0] > 1 else 0]
    return chosen[heads if chosen.shape[0] > 1 else slice(None)][:, rows, keys]


@torch.library.custom_op(
    "idar::reference_to_image",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, Tensor[] rows, int[] image, {SCHEMA}) -> Tensor",
)
def reference_to_image(
    query: Tensor,
    key: Tensor,
    rows: list[Tensor],
    image: list[int],
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    chunk: int,
) -> Tensor:
    """Maps (b, s, m): ``mean over h and q in rows[s] of softmax_j(scale * Q_q K_j^T)``, j in the image."""
    b, h, _, _ = query.shape
    keys = slice(*image)
    count = keys.stop - keys.start
    with torch.autocast(query.device.type, enabled=False):
        buffers = _Scratch(query)
        maps = torch.zeros(b, len(rows), count, dtype=buffers.wide, device=query.device)
        slices, step = _split(h, max(map(len, rows)), count, chunk)
        for i, heads in itertools.product(range(b), slices):
            k, hidden = buffers.copy("key", key[i, heads, keys]), _hidden(key_mask, i, keys)
            for s, positions in enumerate(rows):
                for part in torch.split(positions, step):
                    q = buffers.query(query[i, heads].index_select(1, part), scale)
                    e, total = buffers.exponentials(q, k, scale, hidden, _bias(bias, i, heads, part, keys))
                    maps[i, s] += torch.bmm(total.reciprocal_().transpose(1, 2), e).sum((0, 1)) / (h * len(positions))
    return maps


@torch.library.custom_op(
    "idar::reference_to_image_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor query, Tensor key, Tensor[] rows, int[] image, {SCHEMA}) -> (Tensor, Tensor)",
)
def _reference_to_image_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    rows: list[Tensor],
    image: list[int],
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    b, h, _, _ = query.shape
    keys = slice(*image)
    grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
    with torch.autocast(query.device.type, enabled=False):
        buffers = _Scratch(query)
        slices, step = _split(h, max(map(len, rows)), keys.stop - keys.start, chunk)
        for i, heads in itertools.product(range(b), slices):
            k, hidden = buffers.copy("key", key[i, heads, keys]), _hidden(key_mask, i, keys)
            d_key = buffers.get("d_key", *k.shape).zero_()
            for s, positions in enumerate(rows):
                g = grad[i, s].to(buffers.wide) / (h * len(positions))
                for part in torch.split(positions, step):
                    q = buffers.query(query[i, heads].index_select(1, part), scale)
                    e, total = buffers.exponentials(q, k, scale, hidden, _bias(bias, i, heads, part, keys))
                    c = (e @ g)[..., None].div_(total)
                    for e_head, c_head in zip(e, c, strict=True):
                        e_head.mul_(torch.sub(g, c_head, out=buffers.get("difference", *e_head.shape)))
                    d_query = buffers.gradients(e, q, k, total, scale, d_key)
                    grad_query[i, heads].index_add_(1, part, d_query.to(query.dtype))
            grad_key[i, heads, keys] = d_key.to(key.dtype)
    return grad_query, grad_key


@torch.library.custom_op(
    "idar::image_to_reference",
    mutates_args=(),
    schema=f"(Tensor query, Tensor key, int[] image, int[] spans, {SCHEMA}) -> Tensor",
)
def image_to_reference(
    query: Tensor,
    key: Tensor,
    image: list[int],
    spans: list[int],
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    chunk: int,
) -> Tensor:
    """Maps (b, s, m): ``mean over h of sum over k in span s of softmax_k(scale * Q_j K_k^T)``, k over all keys, j in the image."""
    b, h, _, _ = query.shape
    count = image[1] - image[0]
    pairs = list(zip(spans[::2], spans[1::2], strict=True))
    with torch.autocast(query.device.type, enabled=False):
        buffers = _Scratch(query)
        maps = torch.zeros(b, len(pairs), count, dtype=buffers.wide, device=query.device)
        slices, step = _split(h, count, key.shape[2], chunk)
        for i, heads in itertools.product(range(b), slices):
            k, hidden = buffers.copy("key", key[i, heads]), _hidden(key_mask, i, slice(None))
            for first in range(0, count, step):
                part = slice(first, min(first + step, count))
                where = slice(image[0] + part.start, image[0] + part.stop)
                q = buffers.query(query[i, heads, where], scale)
                e, total = buffers.exponentials(q, k, scale, hidden, _bias(bias, i, heads, where, slice(None)))
                for s, (start, stop) in enumerate(pairs):
                    maps[i, s, part] += e[..., start:stop].sum(-1).div_(total[..., 0]).sum(0)
    return maps.div_(h)


@torch.library.custom_op(
    "idar::image_to_reference_backward",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor query, Tensor key, int[] image, int[] spans, {SCHEMA}) -> (Tensor, Tensor)",
)
def _image_to_reference_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    image: list[int],
    spans: list[int],
    key_mask: Tensor | None,
    bias: Tensor | None,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor]:
    b, h, _, _ = query.shape
    pairs = list(zip(spans[::2], spans[1::2], strict=True))
    grad_query, grad_key = torch.zeros_like(query), torch.zeros_like(key)
    with torch.autocast(query.device.type, enabled=False):
        buffers = _Scratch(query)
        slices, step = _split(h, image[1] - image[0], key.shape[2], chunk)
        for i, heads in itertools.product(range(b), slices):
            k, hidden = buffers.copy("key", key[i, heads]), _hidden(key_mask, i, slice(None))
            g, d_key = grad[i, :, :, None].to(buffers.wide) / h, buffers.get("d_key", *k.shape).zero_()
            for first in range(0, image[1] - image[0], step):
                part = slice(first, min(first + step, image[1] - image[0]))
                where = slice(image[0] + part.start, image[0] + part.stop)
                q = buffers.query(query[i, heads, where], scale)
                e, total = buffers.exponentials(q, k, scale, hidden, _bias(bias, i, heads, where, slice(None)))
                c = torch.zeros_like(total)
                for s, (start, stop) in enumerate(pairs):
                    c += e[..., start:stop].sum(-1, keepdim=True).mul_(g[s, part])
                c /= total
                end = 0
                for s, (start, stop) in sorted(enumerate(pairs), key=lambda pair: pair[1]):
                    e[..., end:start].mul_(-c)
                    e[..., start:stop].mul_(g[s, part] - c)
                    end = stop
                e[..., end:].mul_(-c)
                grad_query[i, heads, where] = buffers.gradients(e, q, k, total, scale, d_key).to(query.dtype)
            grad_key[i, heads] = d_key.to(key.dtype)
    return grad_query, grad_key


@reference_to_image.register_fake
def _(query: Tensor, key: Tensor, rows: list[Tensor], image: list[int], *_: Any) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape[0], len(rows), image[1] - image[0], dtype=dtype)


@image_to_reference.register_fake
def _(query: Tensor, key: Tensor, image: list[int], spans: list[int], *_: Any) -> Tensor:
    dtype = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(query.shape[0], len(spans) // 2, image[1] - image[0], dtype=dtype)


@_reference_to_image_backward.register_fake
@_image_to_reference_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    return torch.empty_like(query), torch.empty_like(key)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    query, key, where, spans, key_mask, bias, ctx.scale, ctx.chunk = inputs
    ctx.sampled = isinstance(where[0], Tensor)
    ctx.where, ctx.spans = (len(where) if ctx.sampled else where), spans
    ctx.save_for_backward(query, key, key_mask, bias, *(where if ctx.sampled else ()))


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
    query, key, key_mask, bias, *rows = ctx.saved_tensors
    if ctx.sampled:
        found = _reference_to_image_backward(grad, query, key, rows, ctx.spans, key_mask, bias, ctx.scale, ctx.chunk)
        return *found, [None] * len(rows), None, None, None, None, None
    found = _image_to_reference_backward(grad, query, key, ctx.where, ctx.spans, key_mask, bias, ctx.scale, ctx.chunk)
    return *found, None, None, None, None, None, None


reference_to_image.register_autograd(_differentiate, setup_context=_keep)
image_to_reference.register_autograd(_differentiate, setup_context=_keep)
