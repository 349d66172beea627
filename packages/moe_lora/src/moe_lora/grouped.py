"""The fast dispatch: tokens sorted by expert, one matmul per expert or one grouped matmul for all.

One operator forward, one backward (docs/adr/0031). Forward keeps h itself (the base module keeps it too) and ``A h``, as a plain
LoRA does; sorted copies of tokens are made again in backward. On a CPU each expert's tokens are gathered into one small buffer that
stays in cache; on an accelerator `torch.nn.functional.grouped_mm` does all experts at once and the host never waits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor


def _sort(index: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Flat positions (token * k + slot) sorted by expert, unrouted ones last, and where each expert ends."""
    flat = index.flatten()
    flat = torch.where(flat < 0, num_experts, flat)
    order = flat.argsort(stable=True)
    ends = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
    return order, ends[:-1].cumsum(0).to(torch.int32)


def use_grouped_mm(*tensors: Tensor) -> bool:
    """Whether `grouped_mm` helps (on an accelerator) and can: it wants strides in multiples of 16 bytes."""
    fits = all(t.shape[-1] * t.element_size() % 16 == 0 for t in tensors)
    return fits and tensors[0].device.type != "cpu" and hasattr(torch.nn.functional, "grouped_mm")


class _Groups(NamedTuple):
    """Sorted tokens cut by expert; what is left after the last expert is not routed."""

    rows: tuple[Tensor, ...]
    sizes: list[int]
    largest: int
    covers_all: bool

    def cut(self, by_expert: Tensor) -> tuple[Tensor, ...]:
        """Slices of something sorted by expert."""
        return torch.split(by_expert, self.sizes)


def _groups(order: Tensor, ends: Tensor, k: int) -> _Groups:
    bounds = [0, *ends.tolist(), len(order)]
    sizes = [end - start for start, end in zip(bounds, bounds[1:], strict=False)]
    rows = torch.split(order if k == 1 else order // k, sizes)
    return _Groups(rows, sizes, max(sizes[:-1], default=0), sizes[-1] == 0 and k == 1)


def _put(target: Tensor, rows: Tensor, values: Tensor, k: int) -> None:
    """Adds rows where a token has several experts, writes them where it has one."""
    if k == 1:
        target[rows] = values  # in half the time of index_copy_ on a CPU
    else:
        target.index_add_(0, rows, values)


def _forward_slices(
    h: Tensor, a: Tensor, b: Tensor, weight: Tensor, order: Tensor, ends: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    groups = _groups(order, ends, k)
    out = (h.new_empty if groups.covers_all else h.new_zeros)(len(h), b.shape[1])
    middle = h.new_empty(len(order), a.shape[1])
    x, y = h.new_empty(groups.largest, h.shape[1]), h.new_empty(groups.largest, b.shape[1])
    parts = (a.unbind(0), b.unbind(0), groups.rows, groups.cut(middle), groups.cut(weight))
    for a_i, b_i, rows, mid, w in zip(*parts, strict=False):
        if size := len(rows):
            x_i, y_i = x[:size], y[:size]
            torch.index_select(h, 0, rows, out=x_i)
            torch.mm(x_i, a_i.T, out=mid)
            torch.mm(mid * w, b_i.T, out=y_i)
            _put(out, rows, y_i, k)
    return out, middle


def _forward_grouped(
    h: Tensor, a: Tensor, b: Tensor, weight: Tensor, order: Tensor, ends: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    mm = torch.nn.functional.grouped_mm
    middle = mm(h[order // k], a.transpose(1, 2), offs=ends)
    return _combine(mm(middle * weight, b.transpose(1, 2), offs=ends), order, ends, k), middle


def _combine(by_expert: Tensor, order: Tensor, ends: Tensor, k: int) -> Tensor:
    """Sorted rows back to tokens, summed over slots in a fixed order (no atomics)."""
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    rows = by_expert[place].masked_fill_((place >= ends[-1])[:, None], 0)
    return rows if k == 1 else rows.view(-1, k, rows.shape[1]).sum(1)


def _backward_slices(
    grad: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    order: Tensor,
    ends: Tensor,
    middle: Tensor,
    k: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    need_h, need_a, need_b, _ = needs
    groups = _groups(order, ends, k)
    grad_h = (torch.empty_like if groups.covers_all else torch.zeros_like)(h) if need_h else h.new_empty(0)
    grad_a, grad_b = (torch.empty_like(t) if need else t.new_empty(0) for t, need in ((a, need_a), (b, need_b)))
    grad_weight = weight.new_zeros(len(order), 1, dtype=torch.float32)
    x, y = h.new_empty(groups.largest, h.shape[1]), h.new_empty(groups.largest, b.shape[1])
    nothing = [h.new_empty(0)] * len(a)
    parts = (
        a.unbind(0), b.unbind(0), grad_a.unbind(0) if need_a else nothing, grad_b.unbind(0) if need_b else nothing,
        groups.rows, groups.cut(middle), groups.cut(weight), groups.cut(grad_weight),
    )  # fmt: skip
    for a_i, b_i, grad_a_i, grad_b_i, rows, mid, w, grad_w in zip(*parts, strict=False):
        size = len(rows)
        if not size:
            grad_a_i.zero_()
            grad_b_i.zero_()
            continue
        x_i, y_i = x[:size], y[:size]
        torch.index_select(grad, 0, rows, out=y_i)
        grad_gated = torch.mm(y_i, b_i)
        torch.sum(grad_gated * mid, -1, keepdim=True, dtype=torch.float32, out=grad_w)
        if need_b:
            torch.mm(y_i.T, mid * w, out=grad_b_i)
        grad_middle = grad_gated.mul_(w)
        if need_a:
            torch.index_select(h, 0, rows, out=x_i)
            torch.mm(grad_middle.T, x_i, out=grad_a_i)
        if need_h:
            torch.mm(grad_middle, a_i, out=x_i)
            _put(grad_h, rows, x_i, k)
    return grad_h, grad_a, grad_b, grad_weight


def _backward_grouped(
    grad: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    weight: Tensor,
    order: Tensor,
    ends: Tensor,
    middle: Tensor,
    k: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mm, rows = torch.nn.functional.grouped_mm, order // k
    routed = (torch.arange(len(order), device=order.device) < ends[-1])[:, None]
    y = grad[rows]
    grad_gated = mm(y, b, offs=ends)
    grad_weight = torch.where(routed, (grad_gated * middle).float().sum(-1, keepdim=True), 0.0)
    grad_b = mm(y.T, middle * weight, offs=ends) if needs[2] else b.new_empty(0)
    grad_middle = grad_gated * weight
    grad_a = mm(grad_middle.T, h[rows], offs=ends) if needs[1] else a.new_empty(0)
    grad_h = _combine(mm(grad_middle, a, offs=ends), order, ends, k) if needs[0] else h.new_empty(0)
    return grad_h, grad_a, grad_b, grad_weight


_FOUR = "(Tensor, Tensor, Tensor, Tensor)"


@torch.library.custom_op(
    "moe_lora::experts",
    mutates_args=(),
    schema=f"(Tensor h, Tensor a, Tensor b, Tensor weights, Tensor index) -> {_FOUR}",
)
def _experts(h: Tensor, a: Tensor, b: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    order, ends = _sort(index, len(a))
    weight = weights.flatten()[order, None].to(h.dtype)
    compute = _forward_grouped if use_grouped_mm(h, a, b) and len(h) else _forward_slices
    with torch.autocast(h.device.type, enabled=False):
        out, middle = compute(h, a, b, weight, order, ends, index.shape[1])
    return out, middle, order, ends


@_experts.register_fake
def _(h: Tensor, a: Tensor, b: Tensor, weights: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n = index.shape[0] * index.shape[1]
    order, ends = index.new_empty(n, dtype=torch.int64), index.new_empty(a.shape[0], dtype=torch.int32)
    return h.new_empty(h.shape[0], b.shape[1]), h.new_empty(n, a.shape[1]), order, ends


@torch.library.custom_op(
    "moe_lora::experts_backward",
    mutates_args=(),
    schema="(Tensor grad, Tensor h, Tensor a, Tensor b, Tensor weights, Tensor order, Tensor ends, Tensor middle, bool[] needs)"
    f" -> {_FOUR}",
)
def _experts_backward(
    grad: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    middle: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weight = weights.flatten()[order, None].to(h.dtype)
    compute = _backward_grouped if use_grouped_mm(h, a, b) and len(h) else _backward_slices
    with torch.autocast(h.device.type, enabled=False):
        *grads, by_expert = compute(grad, h, a, b, weight, order, ends, middle, weights.shape[1], needs)
    grad_weights = torch.empty_like(weights).view(-1).scatter_(0, order, by_expert.flatten().to(weights.dtype))
    return (*grads, grad_weights.view_as(weights))  # type: ignore[return-value]


@_experts_backward.register_fake
def _(
    grad: Tensor,
    h: Tensor,
    a: Tensor,
    b: Tensor,
    weights: Tensor,
    order: Tensor,
    ends: Tensor,
    middle: Tensor,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wanted = [torch.empty_like(t) if need else t.new_empty(0) for t, need in zip((h, a, b), needs, strict=False)]
    return (*wanted, torch.empty_like(weights))  # type: ignore[return-value]


def _setup(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    h, a, b, weights, _ = inputs
    _, middle, order, ends = output
    ctx.save_for_backward(h, a, b, weights, order, ends, middle)
    ctx.mark_non_differentiable(middle, order, ends)
    ctx.set_materialize_grads(False)


def _grads(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    needs = list(ctx.needs_input_grad[:4])
    if grad is None:
        return None, None, None, None, None
    grads = _experts_backward(grad.contiguous(), *ctx.saved_tensors, needs)
    return *(g if need else None for g, need in zip(grads, needs, strict=True)), None


_experts.register_autograd(_grads, setup_context=_setup)


def grouped_experts(h: Tensor, lora_a: Tensor, lora_b: Tensor, weights: Tensor, index: Tensor) -> Tensor:
    """See `moe_lora.dispatch.experts`; differentiable once."""
    out: Tensor = _experts(h, lora_a, lora_b, weights, index)[0]
    return out
