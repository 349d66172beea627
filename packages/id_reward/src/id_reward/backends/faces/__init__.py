"""Face backends by name, all behind the protocol `id_reward.FaceBackend`."""

from __future__ import annotations

import importlib.util
from typing import Any, Literal

from id_reward.errors import InputError
from id_reward.protocols import FaceBackend

FaceBackendName = Literal["auto", "dlib", "insightface", "torch"]


def get_face_backend(name: FaceBackendName = "auto", **options: Any) -> FaceBackend:
    """A face backend, ready to use.

    Args:
        name: "dlib" (works with no download), "insightface" (ArcFace; non-commercial weights that you provide), "torch" (dlib's network
            as a differentiable module), or "auto": dlib where it is installed, else insightface.
        **options: Passed to `DlibBackend`, `InsightFaceBackend` or `TorchFaceBackend`.

    Raises:
        ValueError: The name is unknown.
        ImportError: The extra is missing; names the pip line.
    """
    if name not in ("auto", "dlib", "insightface", "torch"):
        raise InputError(f"name must be 'auto', 'dlib', 'insightface' or 'torch', got {name!r}")
    if name == "auto":
        found = [candidate for candidate in ("dlib", "insightface") if importlib.util.find_spec(candidate)]
        if not found:
            raise ImportError('no face backend is installed: pip install "id-reward[dlib]"')
        name = "dlib" if found[0] == "dlib" else "insightface"
    if name == "dlib":
        from id_reward.backends.faces.dlib_faces import DlibBackend

        return DlibBackend(**options)
    if name == "insightface":
        from id_reward.backends.faces.insightface_faces import InsightFaceBackend

        return InsightFaceBackend(**options)
    from id_reward.backends.faces.torch_faces import TorchFaceBackend

    return TorchFaceBackend(**options)
