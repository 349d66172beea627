"""The one place where the attention call of a module is met: changed on its way in, then shown to those who watch.

Nothing in the model is replaced but the entry of each met module: inside it, the call of
``torch.nn.functional.scaled_dot_product_attention`` is seen on its way, with the very queries and keys (normalised, rotated) that the
model uses. Changes come first and watchers second, whoever came first: what is watched is the attention that takes place.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

ATTENTION = torch.nn.functional.scaled_dot_product_attention
NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")

Call = dict[str, Any]
"""Arguments of an attention call by name; "attend" holds the function that is called, where it is another than torch's."""


@dataclass(eq=False)
class Visitor:
    """Somebody who meets the attention calls of a module.

    Attributes:
        num_keys: Calls with fewer keys are not watched (as a function: it may change between passes).
        check: Raises ValueError where a call of so many keys is not one of the layout; not asked about calls with fewer.
        change: Returns the call that takes place in place of this one; it is asked about calls with fewer keys too.
        watch: Is shown the first call that takes place, after the module has run; its result counts as seen.
    """

    num_keys: Callable[[], int]
    check: Callable[[int], None] = lambda _: None
    change: Callable[[Call], Call] | None = None
    watch: Callable[[Call], None] | None = None


@dataclass(eq=False)
class _Entry:
    """What sits at the entry of one module."""

    name: str
    forward: Callable[..., Any]
    own: Any
    visitors: list[Visitor] = field(default_factory=list)


class _Meeting(TorchFunctionMode):
    """One pass through a module: applies the changes, and remembers the first call that holds every key for each visitor."""

    def __init__(self, visitors: list[Visitor]) -> None:
        super().__init__()
        self.visitors = visitors
        self.seen: list[Call | None] = [None for _ in visitors]
        self.most = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not ATTENTION:
            return func(*args, **kwargs)
        call: Call = {**dict(zip(NAMES, args, strict=False)), **kwargs}
        keys, changed = call["key"].shape[2], False
        self.most = max(self.most, keys)
        for visitor in self.visitors:
            if keys >= visitor.num_keys():
                visitor.check(keys)
            if visitor.change is not None:
                new = visitor.change(call)
                changed, call = changed or new is not call, new
        for index, visitor in enumerate(self.visitors):
            if keys >= visitor.num_keys() and self.seen[index] is None:
                self.seen[index] = call
        if not changed:
            return func(*args, **kwargs)
        attend = call.get("attend", func)
        return attend(**{k: v for k, v in call.items() if k != "attend"})


def _met(entry: _Entry) -> Callable[..., Any]:
    def met_forward(*args: Any, **kwargs: Any) -> Any:
        meeting = _Meeting(entry.visitors)
        with meeting:
            output = entry.forward(*args, **kwargs)
        for visitor, call in zip(meeting.visitors, meeting.seen, strict=True):
            if call is None and meeting.most:
                raise ValueError(
                    f"layout must be that of the attention of {entry.name}, on a sequence that holds the layout's "
                    f"{visitor.num_keys()} tokens, got {meeting.most}"
                )
            if call is None:
                raise ValueError(
                    f"{entry.name} must call torch's scaled_dot_product_attention (diffusers' 'native' attention backend) on a "
                    f"sequence that holds the layout's {visitor.num_keys()} tokens, got no such call"
                )
            if visitor.watch is not None:
                visitor.watch(call)
        return output

    met_forward.idar_entry = entry  # type: ignore[attr-defined]
    return met_forward


@contextmanager
def meet(modules: Mapping[str, nn.Module], visitor_of: Callable[[str], Visitor]) -> Iterator[None]:
    """While open, a visitor meets the attention calls of each module. Modules are restored on exit, also after an exception.

    Args:
        modules: By name; their forward calls ``torch.nn.functional.scaled_dot_product_attention``.
        visitor_of: The visitor of a module, by its name.
    """
    joined: list[tuple[nn.Module, _Entry, Visitor]] = []
    try:
        for name, module in modules.items():
            entry = getattr(module.__dict__.get("forward"), "idar_entry", None)
            if entry is None:
                entry = _Entry(name, module.forward, module.__dict__.get("forward"))
                module.forward = _met(entry)
            visitor = visitor_of(name)
            # changes stand before watchers: a list in that order is also the order of the meeting
            place = len(entry.visitors) if visitor.change is None else sum(v.change is not None for v in entry.visitors)
            entry.visitors = [*entry.visitors[:place], visitor, *entry.visitors[place:]]
            joined.append((module, entry, visitor))
        yield
    finally:
        for module, entry, visitor in joined:
            entry.visitors = [v for v in entry.visitors if v is not visitor]
            if not entry.visitors:
                module.__dict__.pop("forward", None)
                if entry.own is not None:
                    module.__dict__["forward"] = entry.own


def additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """An attention mask in its additive form: boolean masks become 0 and -inf."""
    if mask is None or mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(~mask, -torch.inf)


def inner(model: nn.Module) -> nn.Module:
    """The model inside wrappers such as DDP, torch.compile's and PEFT's."""
    while True:
        base = getattr(model, "get_base_model", None)
        found = base() if callable(base) else getattr(model, "module", getattr(model, "_orig_mod", None))
        if not isinstance(found, nn.Module) or found is model:
            return model
        model = found


def by_name(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model's forward by name, those given by position too."""
    if not args:
        return kwargs
    try:
        return dict(inspect.signature(inner(model).forward).bind_partial(*args, **kwargs).arguments)
    except TypeError:  # not its arguments: the model itself will say so
        return kwargs
