"""Live bytes, floating-point operations and traffic of whatever runs inside a context, on real or fake tensors alike."""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensor, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count
from torch.utils.weak import WeakIdKeyDictionary

from multicrafter import renamed

renamed(__name__, {"Tracker": "MemoryTracker"})


def _attention_flops(query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))


def _attention_backward_flops(grad: Any, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> int:
    return int(sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))


def _experts_flops(h: Any, a: Any, b: Any, weights: Any, index: Any, *_: Any) -> int:
    """Every assignment passes one A and one B: 2 n k r (d + o)."""
    return int(2 * index.shape[0] * index.shape[1] * a.shape[1] * (a.shape[2] + b.shape[1]))


def _experts_backward_flops(grad: Any, h: Any, a: Any, b: Any, weights: Any, *_: Any) -> int:
    """Twice the forward, and the product with B that gives the gates their gradient is among it."""
    return int(2 * 2 * weights.shape[0] * weights.shape[1] * a.shape[1] * (a.shape[2] + b.shape[1]))


def _extra_formulas() -> dict[str, Any]:
    return {
        "aten._scaled_dot_product_flash_attention_for_cpu": _attention_flops,
        "aten._scaled_dot_product_flash_attention_for_cpu_backward": _attention_backward_flops,
        "moe_lora.experts": _experts_flops,
        "moe_lora.experts_backward": _experts_backward_flops,
    }


class MemoryTracker(TorchDispatchMode):
    """Counts the storages that operations inside the context make, until they are freed.

    Attributes:
        live: Bytes of storages that exist now and were tracked.
        peak: Largest ``live`` since the last `reset_peak`.
        flops: Multiplications and additions of matrix products and attention (an addition and a multiplication are two).
        moved: Bytes that operations read and wrote: the traffic without any fusion.
    """

    def __init__(self) -> None:
        """Nothing tracked."""
        super().__init__()
        self.live = self.peak = self.flops = self.moved = 0
        self._known = WeakIdKeyDictionary()
        self._formulas = _extra_formulas()

    def track(self, tensors: Iterable[Tensor]) -> int:
        """Counts tensors made before; returns the bytes that were new."""
        before = self.live
        for tensor in tensors:
            self._add(tensor)
        return self.live - before

    def _add(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = size
            weakref.finalize(storage, self._free, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _free(self, size: int) -> None:
        self.live -= size

    def reset_peak(self) -> None:
        """Starts a new maximum."""
        self.peak = self.live

    @contextmanager
    def phase(self) -> Iterator[MemoryTracker]:
        """Peak, operations and traffic of a block alone."""
        self.reset_peak()
        self.flops = self.moved = 0
        with self:
            yield self

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and looks at what it took and gave."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        for tensor in outputs:
            self._add(tensor)
        packet = func._overloadpacket
        if packet in flop_registry:
            self.flops += flop_registry[packet](*args, **kwargs, out_val=result)
        elif str(packet) in self._formulas:
            self.flops += self._formulas[str(packet)](*args, **kwargs)
        if not _is_view(func, outputs, args):
            inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            self.moved += sum(t.numel() * t.element_size() for t in (*inputs, *outputs))
        return result


def _is_view(func: Any, outputs: list[Tensor], args: Any) -> bool:
    """Whether nothing is read or written: views, and questions about shapes."""
    return not outputs or (not func._schema.is_mutable and any(r.alias_info is not None for r in func._schema.returns))


class Answers(TorchDispatchMode):
    """Lets code that looks at values run on fake tensors, which have none.

    A value either depends on the network or it does not. A schedule, an index, a reward given as numbers do not: such tensors, if they are
    small, are computed for real beside the fake ones, and answered truly. What depends on the network is answered as in a step in which
    all goes well: nothing is NaN, every other flag is true, and every number is 0 (the policy that is updated is still the one that drew).
    """

    def __init__(self) -> None:
        """Nothing known yet."""
        super().__init__()
        self._false = WeakIdKeyDictionary()
        self._real = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation on fake tensors, and on real ones where all of its tensors are known."""
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self._answer(args[0])
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = all(not isinstance(t, FakeTensor) or t in self._real for t in inputs) and _repeats(func)
        try:
            result = func(*args, **kwargs)
        except DynamicOutputShapeException:  # as many rows as a mask has flags, or as there are different numbers
            real = self._computed(func, args, kwargs)
            fake = next(t for t in inputs if isinstance(t, FakeTensor)).fake_mode
            result = tree_map_only(Tensor, fake.from_tensor, real)
        outputs = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if known and all(t.numel() <= SMALL for t in outputs):
            computed = [t for t in tree_leaves(self._computed(func, args, kwargs)) if isinstance(t, Tensor)]
            self._real.update(zip(outputs, computed, strict=True))
        elif func._schema.is_mutable:
            self._forget(inputs)
        self._note_nan(func, inputs, result)
        return result

    def _answer(self, scalar: Tensor) -> Any:
        """The value of a scalar, or what it is when all goes well."""
        if scalar in self._real:
            with unset_fake_temporarily():
                return self._real[scalar].item()
        return scalar not in self._false if scalar.dtype == torch.bool else 0

    def _computed(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation on real tensors; for those that nobody knows stands what they are when all goes well."""

        def real(tensor: Tensor) -> Tensor:
            if not isinstance(tensor, FakeTensor) or tensor in self._real:
                return self._real.get(tensor, tensor)
            return torch.full(tuple(tensor.shape), tensor.dtype == torch.bool, dtype=tensor.dtype)

        with unset_fake_temporarily():
            args, kwargs = tree_map_only(Tensor, real, (args, kwargs))
            return func(*args, **kwargs)

    def _forget(self, inputs: list[Tensor]) -> None:
        """What the network has written into is no longer known, nor is anything that shares its memory."""
        written = {t.untyped_storage()._cdata for t in inputs if t in self._real}
        for tensor in [t for t in self._real if t.untyped_storage()._cdata in written] if written else ():
            del self._real[tensor]

    def _note_nan(self, func: Any, inputs: list[Tensor], result: Any) -> None:
        """Remembers which flags stem from a test for NaN."""
        name = str(func._overloadpacket)
        nan = name == "aten.isnan" or (name == "aten.ne" and len(inputs) == 2 and inputs[0] is inputs[1])
        if isinstance(result, Tensor) and (nan or (name in _FLAGS and all(t in self._false for t in inputs))):
            self._false[result] = True


SMALL = 4096
"""Elements up to which a tensor that does not depend on the network is computed for real."""

_FLAGS = ("aten.any", "aten.all", "aten.bitwise_or", "aten.logical_or", "aten.__or__")


def _repeats(func: Any) -> bool:
    """Whether an operation gives the same again: draws do not, and would move a generator on twice."""
    return torch.Tag.nondeterministic_seeded not in func.tags


def bytes_of(tensors: Iterable[Tensor]) -> int:
    """Bytes of distinct storages."""
    return sum({t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors}.values())


__all__ = ["Answers", "MemoryTracker", "bytes_of"]
