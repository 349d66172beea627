"""Keeps the attention of different subjects apart while a model runs; any torch model will do."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from idar.flex import attend_by_blocks, can_take
from idar.intercept import ATTENTION, Call, Visitor, additive, by_name, meet
from idar.layout import SubjectLayout, Text, check_sequence
from idar.masks import is_whole
from idar.separation import (
    SUBJECT_ARROWS,
    Arrow,
    Background,
    TokenRoles,
    as_layouts,
    check_rules,
    check_separation,
    separates_nothing,
    separation_bias,
)

Backend = Literal["auto", "mask", "flex"]
Strength = float | Tensor | Callable[[Tensor], Tensor]
Layouts = SubjectLayout | Sequence[SubjectLayout] | Callable[[dict[str, Any]], SubjectLayout]
Router = Callable[[Tensor, Tensor, SubjectLayout], Tensor]
"""(query, key, layout) of one attention call to masks (b, s, m): who owns a token is read off the attention itself."""


def _is_whole(value: Any) -> bool:
    """A whole number of Python, NumPy or torch."""
    if isinstance(value, Tensor):
        return (
            value.dim() == 0 and not value.is_floating_point() and not value.is_complex() and value.dtype != torch.bool
        )
    return is_whole(value)


def as_masks(masks: Any) -> Any:
    """Masks as a tensor; a router and None as they are.

    Raises:
        ValueError: They are none of these.
    """
    if masks is None or callable(masks):
        return masks
    if not isinstance(masks, Tensor):
        try:
            masks = torch.as_tensor(masks)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"masks must be a tensor (b, s, m) or a function, got {type(masks).__name__}") from error
    if masks.layout != torch.strided or masks.is_meta:
        raise ValueError(f"masks must be a dense tensor with values, got {masks.layout} on {masks.device}")
    return masks


def as_strength(strength: Any) -> Any:
    """A strength as a number, a tensor, or a function.

    Raises:
        ValueError: It is none of these.
    """
    if isinstance(strength, Tensor) or callable(strength):
        return strength
    if isinstance(strength, numbers.Real) and not isinstance(strength, bool):
        return float(strength)
    raise ValueError(f"strength must be a number, a tensor (b,) or a function of noise levels, got {strength!r}")


@dataclass(kw_only=True)
class Separation:
    """What is kept apart in the next pass; everything but the backend may be changed between passes (binding in flight).

    Attributes:
        masks: (b, s, m) in [0, 1], a `Router`, or None: nothing is separated.
        strength: One number, one per row, or a function of the noise levels (b,) of the rows.
        background: See `separation_bias`.
        arrows: See `separation_bias`.
        heads: Only these heads; None is all of them.
        backend: "mask" adds a bias to torch's attention, "flex" skips what is forbidden (FlexAttention), "auto" takes flex on a GPU.
        layout: Of the last pass.
    """

    masks: Tensor | Router | None
    strength: Strength = 1.0
    background: Background = "none"
    arrows: Sequence[Arrow] = SUBJECT_ARROWS
    heads: Sequence[int] | None = None
    backend: Backend = "auto"
    layout: SubjectLayout | list[SubjectLayout] | None = None
    _power: Tensor | float = field(default=0.0, repr=False)
    _bias: Tensor | None = field(default=None, repr=False)
    _roles: TokenRoles | None = field(default=None, repr=False)
    _active: bool = field(default=False, repr=False)
    _hard: bool = field(default=False, repr=False)
    _of: tuple[Any, ...] = field(default=(), repr=False)
    _text: Text | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if self.backend not in ("auto", "mask", "flex"):
            raise ValueError(f"backend must be 'auto', 'mask' or 'flex', got {self.backend!r}")
        if self.heads is not None:
            heads = list(self.heads) if isinstance(self.heads, Iterable) and not isinstance(self.heads, str) else []
            if not heads or not all(_is_whole(head) and head >= 0 for head in heads):
                raise ValueError(f"heads must be at least one whole number from 0 on, got {self.heads!r}")
            self.heads = [int(head) for head in heads]
        if isinstance(self.arrows, Iterable) and not isinstance(self.arrows, str):
            self.arrows = tuple(self.arrows)
        check_rules(self.background, self.arrows)
        self.masks, self.strength = as_masks(self.masks), as_strength(self.strength)

    @property
    def num_keys(self) -> int:
        """Keys that a call must hold at least."""
        return max(one.stop for one in self._layouts)

    @property
    def _layouts(self) -> list[SubjectLayout]:
        assert self.layout is not None
        return [self.layout] if isinstance(self.layout, SubjectLayout) else self.layout

    def start(self, layout: SubjectLayout | Sequence[SubjectLayout], sigma: Tensor | None = None) -> None:
        """Before each pass: what holds in it. Called by the model's forward.

        Raises:
            ValueError: Masks, strength or layout do not fit, or the strength depends on noise levels that are unknown.
        """
        self.layout = layout if isinstance(layout, SubjectLayout) else as_layouts(layout)
        if self.masks is None:
            self._active = False
            return
        self.masks = as_masks(self.masks)
        power = as_strength(self.strength)
        if not isinstance(power, (int, float, Tensor)):
            if sigma is None:
                raise ValueError("strength must be a number where the model's forward has no timestep, got a function")
            power = power(sigma)
        self._power = power
        if not isinstance(self.masks, Tensor):
            self._active = bool((torch.as_tensor(power) > 0).any()) and len(self.arrows) > 0
            self._bias, self._roles = None, None
            return
        version = power._version if isinstance(power, Tensor) else 0  # it may be changed in place, as the masks may
        of = (self.masks, self.masks._version, self.layout, self.background, tuple(self.arrows), power, version)
        if len(self._of) == len(of) and all(
            a is b or (not isinstance(a, Tensor) and a == b) for a, b in zip(self._of, of)
        ):
            return
        layouts = check_separation(self.layout, self.masks, power, self.background, self.arrows)
        self._of = of
        self._active = not separates_nothing(power, self.masks, self.background, self.arrows)
        self._bias, self._roles = None, None
        if not self._active:
            return
        given = torch.as_tensor(power, dtype=torch.float32)
        self._hard = bool(((self.masks == 0) | (self.masks == 1)).all()) and bool(((given == 0) | (given == 1)).all())
        if self.backend == "flex" or (self.backend == "auto" and self.masks.is_cuda):
            self._roles = TokenRoles(layouts, self.masks, self.background, self.arrows, self.num_keys)
        else:
            self._bias = self._bias_of(self.masks)

    def change(self, call: Call) -> Call:
        """The attention call with the arrows between subjects weighed."""
        if not self._active:
            return call
        query, key = call["query"], call["key"]
        if self._layouts[0].causal:
            bias = self._causal_bias(query, key)
            if bias is None:
                return call
        elif key.shape[2] < self.num_keys:
            bias = self._among_references(query, key)
            if bias is None:
                return call
        elif self._roles is not None and can_take(call):
            return self._flex(call, self._roles)
        else:
            bias = _fitted(self._bias_for(query, key), query, key, self.layout)
        chosen = self._chosen(query)
        if chosen is not None:
            bias = torch.where(chosen[None, :, None, None], bias, torch.zeros_like(bias))
        there = additive(call.get("attn_mask"), query)
        return {**call, "attn_mask": bias if there is None else bias + there}

    def _causal_bias(self, query: Tensor, key: Tensor) -> Tensor | None:
        """The bias of the last queries of the first keys; None where no arrow of theirs is weighed."""
        stop = key.shape[2]
        start = stop - query.shape[2]
        image = stop >= self.num_keys
        touched = [(a, b) for one in self._layouts for a, b in one.subject_spans if a < stop and b > start]
        if not image and not touched and not {"text_to_reference"} & set(self.arrows):
            return None
        if image or isinstance(self.masks, Tensor):
            bias = self._bias_for(query, key)
        else:  # before the image no arrow depends on who owns it
            layout = self._layouts[0]
            bias = self._bias_of(
                torch.zeros(query.shape[0], len(layout.subject_spans), layout.num_image, device=query.device)
            )
        return _rows_of(bias, query)[:, :, start:stop, :stop]

    def _bias_of(self, masks: Tensor) -> Tensor:
        assert self.layout is not None
        with torch.no_grad():
            return separation_bias(
                self.layout, masks, strength=self._power, background=self.background, arrows=self.arrows
            )

    def _bias_for(self, query: Tensor, key: Tensor) -> Tensor:
        """The bias of the pass, or of this call where its own attention says who owns a token."""
        if not isinstance(self.masks, Tensor):
            if self.masks is None or not isinstance(self.layout, SubjectLayout):
                raise ValueError("layout must be one for all rows where masks are a router, got one per row")
            found = as_masks(self.masks(query.detach(), key.detach(), self.layout))
            if not isinstance(found, Tensor):
                raise ValueError(f"a router must return masks (b, s, m), got {type(found).__name__}")
            return self._bias_of(found)
        if self._bias is None:  # FlexAttention cannot take this call
            self._bias = self._bias_of(self.masks)
        return self._bias

    def _among_references(self, query: Tensor, key: Tensor) -> Tensor | None:
        """The bias of a call that holds the references alone, as FLUX.2-klein-KV makes; None for other short calls, or nothing to do."""
        if "reference_to_reference" not in self.arrows or len(self._layouts) != 1:
            return None
        spans = sorted((span, i) for i, span in enumerate(self._layouts[0].subject_spans))
        owners = [i for (start, stop), i in spans for _ in range(stop - start)]
        if len(spans) < 2 or not query.shape[2] == key.shape[2] == len(owners):
            return None
        owner = torch.tensor(owners, device=query.device)
        allowed = (owner[:, None] == owner).float()
        power = torch.as_tensor(self._power, dtype=torch.float32, device=query.device).reshape(-1, 1, 1, 1)
        if query.shape[0] % len(power):
            raise ValueError(f"strength must have one row per sample ({query.shape[0]}), got {len(power)}")
        if len(power) > 1:
            power = power.repeat(query.shape[0] // len(power), 1, 1, 1)
        return (1 - power * (1 - allowed)).log().to(query.dtype)

    def _chosen(self, query: Tensor) -> Tensor | None:
        """Which heads are separated, (h,); None is all of them."""
        if self.heads is None:
            return None
        if max(self.heads) >= query.shape[1]:
            raise ValueError(f"heads must be below the attention's {query.shape[1]}, got {list(self.heads)}")
        chosen = torch.zeros(query.shape[1], dtype=torch.bool, device=query.device)
        chosen[list(self.heads)] = True
        return chosen

    def _flex(self, call: Call, roles: TokenRoles) -> Call:
        """The call through FlexAttention, which skips blocks of forbidden arrows and weighs the others."""
        query, key = call["query"], call["key"]
        rows, length = query.shape[0], key.shape[2]
        repeats = rows // len(roles.masks) if rows % len(roles.masks) == 0 else 0
        if not repeats:
            raise ValueError(f"masks must have one row per sample ({rows}) or divide them, got {len(roles.masks)}")
        power = torch.as_tensor(self._power, dtype=torch.float32, device=query.device).reshape(-1)
        power = power.expand(len(roles.masks)) if len(power) == 1 else power
        heads = self._chosen(query)
        stop = roles.subject.shape[1]

        def weight(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            row = b % len(roles.masks)
            inside = (q < stop) & (k < stop)
            w = 1 - power[row] * (1 - roles.allowed(row, q.clamp(max=stop - 1), k.clamp(max=stop - 1)))
            return torch.where(inside if heads is None else inside & heads[h], w, torch.ones_like(w))

        attend = functools.partial(attend_by_blocks, weight=weight, hard=self._hard, per_head=heads is not None)
        return {**call, "attend": attend, "rows": rows, "length": length}


def _fitted(
    bias: Tensor, query: Tensor, key: Tensor, layout: SubjectLayout | list[SubjectLayout] | None
) -> Float[Tensor, "b_or_1 1 q k"]:
    """The bias for the rows, queries and keys of a call, in its type."""
    extra = key.shape[2] - bias.shape[-1]
    if extra:  # text that comes last
        bias = nn.functional.pad(bias, (0, extra, 0, extra))
    if query.shape[2] != key.shape[2]:  # FLUX.2-klein-KV: the references' queries are elsewhere
        if not isinstance(layout, SubjectLayout):
            raise ValueError("layout must be one for all rows where references have no queries, got one per row")
        kept = torch.ones(key.shape[2], dtype=torch.bool)
        for start, stop in layout.subject_spans:
            kept[start:stop] = False
        if int(kept.sum()) != query.shape[2]:
            raise ValueError(
                f"attention must hold a query for every key or for all but the references', got {query.shape[2]} and {key.shape[2]}"
            )
        bias = bias[:, :, kept.to(bias.device)]
    return _rows_of(bias, query)


def _rows_of(bias: Tensor, query: Tensor) -> Tensor:
    """The bias for the rows of a call, in its type."""
    rows = query.shape[0]
    if rows % len(bias):
        raise ValueError(f"masks must have one row per sample ({rows}) or divide them, got {len(bias)}")
    bias = bias.to(device=query.device, dtype=query.dtype)
    return bias if len(bias) in (1, rows) else bias.repeat(rows // len(bias), 1, 1, 1)  # one row serves all


@contextmanager
def separate_attention(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    layout: Layouts,
    masks: Float[Tensor, "b s m"] | Router | None,
    *,
    strength: Strength = 1.0,
    background: Background = "none",
    arrows: Sequence[Arrow] = SUBJECT_ARROWS,
    heads: Sequence[int] | None = None,
    backend: Backend = "auto",
    sigma_of: Callable[[dict[str, Any]], Tensor | None] = lambda _: None,
    check: Callable[[SubjectLayout | Sequence[SubjectLayout], dict[str, Any]], Text | None] = lambda _, __: None,
) -> Iterator[Separation]:
    """Weighs arrows between subjects in the attention of ``modules`` during the forward passes of ``model``.

    The model is restored on exit, also after an exception. Where gradient checkpointing is on, call ``backward`` inside the context:
    the blocks run again there. Contexts may be nested (another strength for other blocks); their weights multiply.

    Args:
        model: What a pass is a pass of.
        modules: Modules of it, by name, whose forward calls ``torch.nn.functional.scaled_dot_product_attention``.
        layout: Where everything is in the joint sequence; one, one per row, or a function of the arguments (by name) of the model's forward.
        masks: Where each subject is in the picture, for every row or for rows that repeat (guidance doubles the batch); or a `Router`.
        strength: See `separation_bias`; or a function from the rows' noise levels (b,) to strengths (b,).
        background: See `separation_bias`.
        arrows: See `separation_bias`.
        heads: Only these heads.
        backend: See `Separation`.
        sigma_of: Noise levels of the rows, from the arguments (by name) of the model's forward.
        check: See `idar.capture_attention`.

    Yields:
        The `Separation`; change its masks or strength between passes.

    Raises:
        ValueError: Something does not fit; at entry where it can be known, else in the pass.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"model must be a module, got {type(model).__name__}")
    if not callable(layout):
        as_layouts(layout)
    if not modules:
        raise ValueError("modules must hold at least one module of the model, got none")
    masks = as_masks(masks)
    state = Separation(
        masks=masks, strength=strength, background=background, arrows=arrows, heads=heads, backend=backend,
        layout=SubjectLayout.in_order(0, 1, [1]),
    )  # fmt: skip
    if not callable(layout) and isinstance(masks, Tensor):
        check_separation(
            layout,
            masks,
            state.strength if isinstance(state.strength, (int, float, Tensor)) else 1.0,
            background,
            state.arrows,
        )

    def begin(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = by_name(model, args, kwargs)
        found = layout(given) if callable(layout) else layout
        state._text = check(found, given)
        state.start(found, sigma_of(given))

    def visitor_of(_: str) -> Visitor:
        return Visitor(
            num_keys=lambda: state.num_keys,
            check=lambda keys: check_sequence(state._layouts, keys, state._text),
            change=state.change,
        )

    hook = model.register_forward_pre_hook(begin, with_kwargs=True)
    try:
        with meet(modules, visitor_of):
            yield state
    finally:
        hook.remove()


__all__ = ["ATTENTION", "Backend", "Router", "Separation", "Strength", "separate_attention"]
