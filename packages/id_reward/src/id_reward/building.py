"""A scorer from options that a configuration file, a command line or a trainer can hold: names, numbers and paths."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from id_reward.aggregate import CompositeReward, as_composite
from id_reward.errors import InputError

BACKEND = ("model", "threshold", "reference_threshold", "side", "workers")
IDENTITY = (
    *("missing_penalty", "extra_penalty", "off_pair_penalty", "min_similarity"),
    *("convention", "several_faces", "no_face", "cache_size"),
)


def load_object(name: str) -> Any:
    """What ``package.module:name`` names.

    Raises:
        InputError: There is no such module, or nothing of that name in it.
    """
    module, _, attribute = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not (attribute and all(part.isidentifier() for part in module.split("."))):
        raise InputError(f"scorer must be package.module:name, got {name!r}")
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise  # the module is there, and lacks something itself
        raise InputError(f"scorer must be package.module:name, but there is no module {module}") from None
    if not hasattr(found, attribute):
        raise InputError(f"scorer must be package.module:name, but {module} has no {attribute}")
    return getattr(found, attribute)


def build_scorer(options: Mapping[str, Any]) -> CompositeReward:
    """The reward that options describe, refusing what it does not know.

    Args:
        options: Either ``scorer``, which names a function "package.module:name" that gives a scorer, a composite, or a dictionary of parts
            (all other options are its arguments); or options of the identity reward: ``backend``, ``device``, and those of the face
            backends and of `IdentityScorer`.

    Raises:
        InputError: An option is unknown or does not fit.
    """
    if not isinstance(options, Mapping):
        raise InputError(f"options must be a dictionary, got {type(options).__name__}")
    given = {name: value for name, value in options.items() if value is not None}
    if "scorer" in given:
        factory = load_object(given.pop("scorer"))
        if not callable(factory):
            return as_composite(factory)
        return as_composite(factory(**given))
    from id_reward.backends.faces import get_face_backend
    from id_reward.identity import IdentityScorer

    backend, device = given.pop("backend", "auto"), given.pop("device", None)
    unknown = sorted(given.keys() - {*BACKEND, *IDENTITY})
    if unknown:
        known = ", ".join(("scorer", "backend", "device", *BACKEND, *IDENTITY))
        raise InputError(f"options of the identity reward must be among {known}, got {', '.join(unknown)}")
    if "model" in given and backend != "insightface":
        raise InputError(f"model needs the backend insightface, got {backend}")
    faces = get_face_backend(backend, **{name: given[name] for name in BACKEND if name in given})
    scorer = IdentityScorer(faces, **{name: given[name] for name in IDENTITY if name in given})
    return as_composite(scorer if device is None else scorer.to(device), "identity")
