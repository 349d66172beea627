"""Face backends by name, all behind the protocol `id_reward.FaceBackend`."""

from __future__ import annotations

from typing import Any, Literal

from id_reward.protocols import FaceBackend

FaceBackendName = Literal["auto", "dlib"]


def get_face_backend(name: FaceBackendName = "auto", **options: Any) -> FaceBackend:
    """A face backend, ready to use.

    Args:
        name: "dlib" (works with no download), or "auto": what is installed.
        **options: Passed to `DlibBackend`.

    Raises:
        ValueError: The name is unknown.
        ImportError: The extra is missing; names the pip line.
    """
    if name not in ("auto", "dlib"):
        raise ValueError(f"name must be 'auto' or 'dlib', got {name!r}")
    from id_reward.backends.faces.dlib_faces import DlibBackend

    return DlibBackend(**options)
