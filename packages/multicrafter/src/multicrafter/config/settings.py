"""Configurations as YAML and back, and overrides from the command line: nested frozen dataclasses, strictly typed.

TrlParser reads flat dataclasses only (docs/adr/0072); this does the same for nested ones, in one page.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import re
import reprlib
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from gspo import KERNELS
from gspo.sde import Kernel

from multicrafter import UserError
from multicrafter.files import read_text
from multicrafter.models.checks import finite

Config = TypeVar("Config")


def to_dict(config: Any) -> Any:
    """A configuration as what YAML and JSON have: dicts, lists, numbers, strings, None."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        return {f.name: to_dict(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, (list, tuple)):
        return [to_dict(x) for x in config]
    if isinstance(config, Mapping):
        return {str(k): to_dict(v) for k, v in config.items()}
    return config


def from_dict(cls: type[Config], content: Any, *, path: str = "") -> Config:
    """Inverse of `to_dict`; what is left out takes its default.

    Raises:
        ValueError: An unknown key (the nearest is named), a value of the wrong type, or one that the class itself refuses.
    """
    where = path or "configuration"
    if not isinstance(content, Mapping):
        raise UserError(f"{where} must be a mapping, got {short(content)}")
    content = getattr(cls, "modern", dict)(content)  # a class that has moved its values says where
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls) if f.init]  # type: ignore[arg-type]
    for key in content:
        if key not in names:
            near = difflib.get_close_matches(str(key)[:80], names, n=1, cutoff=0.0)
            raise UserError(f"{where} must have keys among {', '.join(names)}, got {short(key)}; nearest: {near[0]!r}")
    values = {k: convert(hints[k], v, path=f"{path}.{k}".lstrip(".")) for k, v in content.items()}
    try:
        return cls(**values)
    except TypeError as error:
        raise UserError(f"{where} is incomplete: {error}") from error
    except ValueError as error:
        raise UserError(f"{path}: {error}" if path else str(error)) from error


def convert(hint: Any, value: Any, *, path: str) -> Any:
    """``value`` as the type ``hint``; an int may stand for a float, a list for a tuple, and nothing else for anything else.

    >>> convert(tuple[int, ...], [1, 2], path="numbers"), convert(float, "1e-4", path="lr")
    ((1, 2), 0.0001)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        for choice in sorted(arguments, key=lambda a: a is not type(None)):
            try:
                return convert(choice, value, path=path)
            except ValueError as error:
                problem = error
        raise problem
    if origin is typing.Literal:
        if isinstance(value, (str, int)) and value in arguments:
            return value
        raise UserError(f"{path} must be one of {arguments}, got {short(value)}")
    if origin is tuple and isinstance(value, (list, tuple)):
        kinds = [arguments[0]] * len(value) if arguments[-1] is Ellipsis else list(arguments)
        if len(kinds) == len(value):
            return tuple(convert(k, v, path=f"{path}[{i}]") for i, (k, v) in enumerate(zip(kinds, value, strict=True)))
    if origin is Mapping and isinstance(value, Mapping):
        return {str(k): convert(arguments[1], v, path=f"{path}.{k}") for k, v in value.items()}
    if hint is Kernel:
        return _kernel(value, path)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_dict(hint, value, path=path)
    if hint is type(None) and value is None:
        return None
    if hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return finite(path, value)
    if hint is float and isinstance(value, str) and value[:1] in "+-.0123456789":  # YAML reads 1e-4 as text
        try:
            number = float(value)
        except ValueError:
            pass
        else:
            return finite(path, number)
    if hint is int and type(value) is int and abs(value) >= 2**63:
        raise UserError(f"{path} must be a whole number of 64 bits, got one of {len(str(abs(value)))} digits")
    if hint in (int, str, bool) and type(value) is hint:
        return value
    name = "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))
    raise UserError(f"{path} must be {name}, got {short(value)}")


def _kernel(value: Any, path: str) -> Any:
    """One of `gspo.KERNELS`: its ``kind`` and its knobs, or its kind alone."""
    content = dict(value) if isinstance(value, Mapping) else {"kind": value}
    kind = content.pop("kind", None)
    if kind not in KERNELS:
        raise UserError(f"{path}.kind must be one of {', '.join(KERNELS)}, got {kind!r}")
    return from_dict(KERNELS[kind], content, path=path)


def override(config: Config, changes: Sequence[str]) -> Config:
    """A copy with ``dotted.name=value`` changed; values are read as YAML. The front of a name may be left out where one fits only.

    Raises:
        ValueError: A change has no "=", names nothing, or has a value that does not fit.
    """
    content = to_dict(config)
    for change in changes:
        name, equals, text = change.partition("=")
        if not equals:
            raise UserError(f"--set must be NAME=VALUE, got {change!r}")
        *parents, leaf = _full_name(content, name, moved_names(config)).split(".")
        node: Any = content
        for part in parents:
            node = node[part]
        node[leaf] = parse(text)
    return from_dict(type(config), content)


def moved_names(config: Any, path: str = "") -> dict[str, str]:
    """Names of earlier versions and where their values are now, both dotted (a class says so itself, as ``moved``)."""
    prefix = f"{path}." if path else ""
    found = {f"{prefix}{old}": f"{prefix}{now}" for old, now in getattr(config, "moved", {}).items()}
    for field in dataclasses.fields(config):
        if dataclasses.is_dataclass(inner := getattr(config, field.name)):
            found |= moved_names(inner, f"{prefix}{field.name}")
    return found


def _full_name(content: Any, name: str, moved: Mapping[str, str]) -> str:
    """The dotted name itself, or the only one that ends with it; names of earlier versions too."""
    known = leaves(content)
    nodes = {".".join(k.split(".")[:n]) for k in known for n in range(1, k.count(".") + 2)}
    if name in nodes:
        return name
    for old, now in moved.items():
        if f"{name}.".startswith(f"{old}.") and now + name.removeprefix(old) in nodes:
            return now + name.removeprefix(old)
    fitting = sorted(n for n in nodes if n.endswith("." + name))
    if len(fitting) == 1:
        return fitting[0]
    once = {old for old in moved if old.endswith("." + name)}
    homes = tuple(now.rpartition(".")[0] + "." for now in moved.values())
    before = sorted(once | {n for n in fitting if not n.startswith(homes)})
    if once and len(before) == 1:
        return moved[before[0]]
    fitting = before if once else fitting
    found = (
        f"it may be {' or '.join(fitting)}"
        if fitting
        else f"nearest: {difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]!r}"
    )
    raise UserError(f"--set must name a value of the configuration, got {name!r}; {found}")


def parse(text: str) -> Any:
    """A value as YAML reads it.

    >>> [parse(t) for t in ("3", "[1, 2]", "true", "null", "bfloat16")]
    [3, [1, 2], True, None, 'bfloat16']
    """
    import yaml  # type: ignore[import-untyped]

    try:
        return yaml.load(text, _loader())
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(
            f"value must be readable YAML, got {short(text)}: {' '.join(str(error).split())[:200]}"
        ) from error


def short(value: Any) -> str:
    """A value as a message shows it: a few kilobytes of YAML may stand for more text than there is memory."""
    shown = reprlib.Repr()
    shown.maxstring, shown.maxother, shown.maxlong, shown.maxlevel = 80, 80, 40, 3
    return shown.repr(value)[:300]


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, strict where YAML 1.1 is not what it looks like: 010 is 8 there, 1:30 is 90, and of two keys the last counts."""
    import yaml

    class Loader(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            own = [
                key.value
                for key, _ in node.value
                if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge"
            ]
            if twice := [key for key in own if own.count(key) > 1]:
                raise yaml.YAMLError(f"every key must be there once, but {twice[0]!r} is there twice")
            return super().construct_mapping(node, deep)

    def number(kind: Callable[[str], Any], plain: str) -> Callable[[Any, Any], Any]:
        usual = getattr(yaml.SafeLoader, f"construct_yaml_{kind.__name__}")

        def construct(loader: Any, node: Any) -> Any:
            text = loader.construct_scalar(node)
            if not re.fullmatch(plain, text):
                raise yaml.YAMLError(f"a number must be written plainly, got {short(text)}")
            return usual(loader, node)

        return construct

    Loader.add_constructor("tag:yaml.org,2002:int", number(int, r"[-+]?(0|[1-9][0-9_]*)"))
    Loader.add_constructor("tag:yaml.org,2002:float", number(float, r"[^:]*"))
    return Loader


def leaves(content: Any, path: str = "") -> dict[str, Any]:
    """Values by dotted name.

    >>> leaves({"a": {"b": 1}, "c": [2]})
    {'a.b': 1, 'c': [2]}
    """
    if isinstance(content, Mapping) and content:
        return {k: v for name, inner in content.items() for k, v in leaves(inner, f"{path}.{name}".lstrip(".")).items()}
    return {path: content}


def as_yaml(content: Mapping[str, Any], marks: Mapping[str, str] | None = None) -> str:
    """YAML, each value with its mark as a comment."""
    import yaml

    marks, lines = marks or {}, []

    def scalar(value: Any) -> str:
        odd = (
            isinstance(value, str) and not value.isprintable()
        )  # line breaks that YAML knows, and spaces that are none
        style = {"default_style": '"', "allow_unicode": False} if odd else {"allow_unicode": True}
        text = yaml.safe_dump(value, default_flow_style=True, width=10**9, **style)
        return str(text).removesuffix("\n").removesuffix("\n...")

    def write(node: Mapping[str, Any], path: str, depth: int) -> None:
        for key, value in node.items():
            name, indent = f"{path}.{key}".lstrip("."), "  " * depth
            if isinstance(value, Mapping) and value:
                lines.append(f"{indent}{scalar(key)}:")
                write(value, name, depth + 1)
                continue
            lines.append(f"{indent}{scalar(key)}: {scalar(value)}" + (f"  # {marks[name]}" if name in marks else ""))

    write(content, "", 0)
    return "\n".join(lines) + "\n"


def read(path: str | Path) -> dict[str, Any]:
    """A YAML (or JSON) file as a dict.

    Raises:
        ValueError: It is missing or no mapping.
    """
    import yaml

    try:
        content = yaml.load(read_text(Path(path)), _loader())
    except UserError as error:
        raise UserError(f"{path} must be a configuration, but it cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path} must be YAML, got {' '.join(str(error).split())[:200]}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a mapping, got {type(content).__name__}")
    return content
