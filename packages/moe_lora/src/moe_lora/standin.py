"""A layer that stands where another module stood: callers see that module's attributes and call it as before."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Mapping
from typing import Any, ClassVar

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

# PEFT and diffusers take whatever has these for a layer of theirs, and unload or merge it
HIDDEN = frozenset({"base_layer", "unload_and_optionally_merge_module"})


def _returns(module: nn.Module) -> object:
    """What the annotation of ``forward`` says it returns: a type, a string, or None."""
    try:
        return typing.get_type_hints(module.forward).get("return")
    except Exception:  # names that exist for type checkers only
        return getattr(module.forward, "__annotations__", {}).get("return")


def _no_tensor(module: nn.Module) -> str | None:
    """What a module is known to return instead of one tensor."""
    if isinstance(module, (nn.MultiheadAttention, nn.RNNBase)):
        return "a tuple"
    said = _returns(module)
    kind = typing.get_origin(said) or said
    if isinstance(kind, type) and issubclass(kind, (tuple, list, Mapping)):
        return f"a {kind.__name__}"
    if isinstance(said, str) and said.removeprefix("typing.").lower().startswith(("tuple", "list[", "dict[")):
        return said
    return None


def check_one_place(model: nn.Module, targets: Mapping[str, nn.Module]) -> None:
    """Refuses a module that the model uses under two names: only one of them would get the mixture.

    Raises:
        ValueError: Naming the first.
    """
    places: dict[int, int] = {}
    for outer in model.modules():
        for child in outer._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
    for name, module in targets.items():
        if places.get(id(module), 0) > 1:
            raise ValueError(
                f"targets must stand in one place of the model, got {name!r}, which is used under another name too and would stay as it is there"
            )


def check_target(module: nn.Module, name: str = "") -> None:
    """Refuses what no mixture can stand beside.

    Raises:
        ValueError: It is never called (a list of modules, the last linear of `torch.nn.MultiheadAttention`), or is known to return something
            else than one tensor. What its annotations do not tell, the first forward pass does.

    >>> check_target(nn.ModuleList([nn.Linear(2, 2)]), "layers")
    Traceback (most recent call last):
    ValueError: target 'layers' must be a module that is called, got ModuleList, whose contents are: name those
    """
    where = f"target {name!r}" if name else "base"
    kind = type(module).__name__
    if getattr(type(module).forward, "__name__", "") == "_forward_unimplemented":
        raise ValueError(f"{where} must be a module that is called, got {kind}, whose contents are: name those")
    if isinstance(module, NonDynamicallyQuantizableLinear):
        raise ValueError(
            f"{where} must be a module that is called, got the last linear of nn.MultiheadAttention, which only reads its weight"
        )
    if other := _no_tensor(module):
        raise ValueError(
            f"{where} must return one tensor, got {kind}, which returns {other}: name the linears inside it"
        )


def first_argument(module: nn.Module) -> str | None:
    """Name of the argument that ``forward`` takes first, None if it has no names."""
    try:
        parameters = inspect.signature(module.forward).parameters.values()
    except (TypeError, ValueError):
        return None
    first = next(iter(parameters), None)
    return None if first is None or first.kind in (first.VAR_POSITIONAL, first.VAR_KEYWORD) else first.name


def _called(module: nn.Module, args: Any, out: Any) -> None:
    """Does nothing; that a hook is there keeps `torch.nn.TransformerEncoderLayer` from reading weights instead of calling its linears."""


class StandIn(nn.Module):
    """Reads and writes of public attributes that are not its own go to the module that it stands for.

    Names that begin with an underscore do not: whoever hooks into modules keeps notes there. The module itself is the attribute that `wrapped`
    names. Iteration and indexing are not passed on: going through the parts would go past the mixture.
    """

    wrapped: ClassVar[str] = "base"

    def stand_for(self, module: nn.Module, name: str = "") -> None:
        """To be called at the end of construction, when the module is in place."""
        self._first_argument, self._target = first_argument(module), name
        if isinstance(module, nn.Linear):
            self.register_forward_hook(_called)
        self._stands = True

    def __getattr__(self, name: str) -> Any:
        """What the layer has not, the module may have."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("_") or name in HIDDEN or name == self.wrapped:
                raise
            module = self._modules.get(self.wrapped)
            if module is None or not hasattr(module, name):
                raise
            return getattr(module, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What the layer has not and the module has is set there, so that ties of weights reach it."""
        if self.__dict__.get("_stands") and not name.startswith("_") and name != self.wrapped and not self._has(name):
            module = self._modules[self.wrapped]
            if module is not None and hasattr(module, name):
                setattr(module, name, value)
                return
        super().__setattr__(name, value)

    def _has(self, name: str) -> bool:
        own = (self.__dict__, self._parameters, self._buffers, self._modules)
        return any(name in names for names in own) or hasattr(type(self), name)

    def tokens(self, args: tuple[Any, ...], kwargs: Mapping[str, Any], width: int) -> Float[Tensor, "*tokens d"]:
        """The tokens among the arguments of a call: the first argument, by place or by name.

        Raises:
            ValueError: It is no floating-point tensor of this width.
        """
        given: Any = args[0] if args else kwargs.get(self._first_argument) if self._first_argument else None
        if given is None:
            fitting = [t for t in kwargs.values() if isinstance(t, Tensor) and t.ndim and t.shape[-1] == width]
            given = fitting[0] if len(fitting) == 1 else None
        flat = isinstance(given, Tensor) and not given.is_nested and given.ndim > 0
        if flat and given.is_floating_point() and given.shape[-1] == width:
            tokens: Tensor = given
            return tokens
        raise ValueError(
            f"{self._where()} must be called with tokens of shape (..., {width}) as its first argument, got {_described(given)}"
        )

    def joined(
        self, out: Any, delta: Float[Tensor, "n o"], tokens: Float[Tensor, "*tokens d"]
    ) -> Float[Tensor, "*tokens o"]:
        """The module's output plus the mixture's.

        Raises:
            ValueError: The output is not one tensor (..., o) with the tokens' leading shape.
        """
        if not isinstance(out, Tensor):
            raise ValueError(
                f"{self._where()} must return one tensor, got {_described(out)}: name the linears inside it instead"
            )
        wanted = (*tokens.shape[:-1], delta.shape[-1])
        if out.shape != wanted:
            raise ValueError(
                f"{self._where()} must map tokens {tuple(tokens.shape)} to {wanted}, got {tuple(out.shape)}"
            )
        result: Tensor = out + delta.to(out.dtype).view_as(out)
        return result

    def _where(self) -> str:
        kind = type(self._modules[self.wrapped]).__name__
        return f"target {self._target!r} ({kind})" if self._target else f"base ({kind})"


def _described(value: object) -> str:
    if isinstance(value, Tensor):
        return (
            "a nested tensor" if value.is_nested else f"{str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
        )
    if isinstance(value, (tuple, list)):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}" if value is not None else "none"
