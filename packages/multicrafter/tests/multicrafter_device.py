"""A device without float64, as Apple's MPS is one, where there is none: its tensors lie on the CPU and say that they do not.

What MPS refuses is refused here: float64, tensors of two devices in one operation, NumPy, and a generator of the CPU. diffusers and torch
take the device for MPS, by its name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

NAME = torch.device("mps")
BELOW = torch.device("meta")  # what torch's own code in C++ takes the tensors for
WIDE = (torch.float64, torch.complex128)
ACROSS = {"aten::copy_", "aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}
"""Operations that take tensors of two devices: copies, and indices that lie on the CPU."""


class NoFloat64(TypeError):
    """A tensor in double precision was to be made on the device."""


class There(torch.Tensor):
    """A tensor of the device.

    Attributes:
        held: Its numbers.
    """

    held: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> There:
        return torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=BELOW
        )

    def __init__(self, held: torch.Tensor) -> None:
        if held.dtype in WIDE:
            raise NoFloat64("the device has no float64")
        self.held = held

    is_meta, is_mps = False, True

    @property
    def device(self) -> torch.device:
        return NAME

    def __repr__(self, **_: Any) -> str:
        return f"There({self.held!r})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


@contextmanager
def without_float64() -> Iterator[None]:
    """Inside, ``torch.device("mps")`` is such a device."""
    with _FromPython(), _Everything():
        yield


class _Everything(TorchDispatchMode):
    """Sees what makes tensors from nothing, too."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})


class _FromPython(TorchFunctionMode):
    """Tells torch's code in C++ nothing of MPS, for which it was not built; numbers of Python and NumPy become a tensor on the CPU first."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args = tuple(_below(a) for a in args)
        kwargs = {name: _below(a) for name, a in (kwargs or {}).items()}
        if func is torch.Tensor.tolist and isinstance(args[0], There):
            return args[0].cpu().tolist()
        if func in (
            torch.Tensor.__getitem__,
            torch.Tensor.__setitem__,
        ):  # a list as an index would be made on the device, in C++
            where = args[1] if isinstance(args[1], tuple) else (args[1],)
            where = tuple(torch.tensor(w) if isinstance(w, list) else w for w in where)
            args = (args[0], where if isinstance(args[1], tuple) else where[0], *args[2:])
        if func not in (torch.tensor, torch.as_tensor, torch.asarray) or isinstance(args[0], torch.Tensor):
            return func(*args, **kwargs)
        device = kwargs.pop("device", None)
        made = func(*args, **kwargs)
        return made if device is None else made.to(device)


def _below(value: Any) -> Any:
    """What stands for the device in C++; all else as it is."""
    is_device = isinstance(value, torch.device | str) and str(value).partition(":")[0] == NAME.type
    return BELOW if is_device else value


def _map(kind: type, change: Callable[[Any], Any], value: Any) -> Any:
    """Changes what is of a kind in nested lists and tuples (torch's pytrees do so too, ten times slower)."""
    if isinstance(value, kind):
        return change(value)
    return type(value)([_map(kind, change, v) for v in value]) if type(value) in (list, tuple) else value


def _tensors(values: Any) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    tensors = [*_tensors(args), *_tensors(kwargs.values())]
    there = any(isinstance(t, There) for t in tensors)
    name, target = func._schema.name, kwargs.get("device")
    if target is not None:
        there = torch.device(target) in (NAME, BELOW)
        kwargs = {**kwargs, "device": torch.device("cpu")}
        if there and kwargs.get("generator") is not None:
            raise RuntimeError("Expected a 'mps' device type for generator but found 'cpu'")
    elif there:
        others = [t for t in tensors if not isinstance(t, There) and t.dim()]
        at_home = name in ACROSS and (name == "aten::copy_" or isinstance(args[0], There))
        if others and not at_home:
            raise RuntimeError(f"{name}: Expected all tensors to be on the same device, but got mps and cpu")
    if name == "aten::_to_copy" and kwargs.get("dtype") in WIDE and isinstance(args[0], There):
        raise NoFloat64("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")
    out = func(*_map(There, _held, args), **{key: _map(There, _held, value) for key, value in kwargs.items()})
    if func._schema.is_mutable and (changed := _changed(func, args, kwargs)) is not None:
        return changed
    return _map(torch.Tensor, There, out) if there else out


def _held(tensor: There) -> torch.Tensor:
    return tensor.held


def _changed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """What an operation in place returns: the tensor that it was given; None for one that returns something new."""
    returns = func._schema.returns
    if len(returns) != 1 or returns[0].alias_info is None or not returns[0].alias_info.is_write:
        return None
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            return args[index] if index < len(args) else kwargs[argument.name]
    return None
