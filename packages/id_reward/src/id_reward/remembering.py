"""A face backend that remembers the pictures it has just seen, so that several parts of a reward find their faces once."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from id_reward.errors import InputError
from id_reward.inputs import content_key
from id_reward.protocols import FaceBackend, Faces


class RememberingBackend:
    """The faces of the last pictures, by their content; everything else is the backend's own. Thread-safe.

    Give one of it to all scorers of a composite: `IdentityScorer`, `id_reward.copying.CopyPaste` and `OffPairSimilarity` then find faces once.

    Args:
        backend: Finds and embeds.
        pictures: How many are remembered; as many as there are in a batch, at least.
    """

    def __init__(self, backend: FaceBackend, *, pictures: int = 512) -> None:
        """Nothing is known yet."""
        if pictures < 1:
            raise InputError(f"pictures must be at least 1, got {pictures}")
        self.backend, self.pictures = backend, pictures
        self._known: OrderedDict[Hashable, Faces] = OrderedDict()
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        if name in ("backend", "_known", "_lock"):  # a copy that is being made has none yet
            raise AttributeError(name)
        found = getattr(self.backend, name)
        if name == "detect_and_embed_references":
            return lambda images: self._remember(images, found, "references")
        return found

    def detect_and_embed(self, images: Sequence[Any]) -> list[Faces]:
        """One `Faces` per picture."""
        return self._remember(images, self.backend.detect_and_embed, "pictures")

    def _remember(self, images: Sequence[Any], find: Callable[[Sequence[Any]], list[Faces]], kind: str) -> list[Faces]:
        """What is known, and what is found anew; who asks for the same pictures meanwhile waits for them."""
        keys = [None if (key := content_key(image)) is None else (kind, key) for image in images]
        with self._lock:
            new: dict[Hashable, int] = {}
            for number, key in enumerate(keys):
                if key is None or key not in self._known:
                    new.setdefault(number if key is None else key, number)
            found = dict(zip(new, find([images[number] for number in new.values()]))) if new else {}
            result = [
                found[number if key is None else key] if (number if key is None else key) in found else self._known[key]
                for number, key in enumerate(keys)
            ]
            for key, faces in zip(keys, result):
                if key is not None:
                    self._known[key] = faces
                    self._known.move_to_end(key)
            while len(self._known) > self.pictures:
                self._known.popitem(last=False)
        return result
