"""What goes over the wire: three ways to ask for scores, one request behind them.

| path | body | answer |
|---|---|---|
| ``/score`` | JSON ``{"images", "prompts", "references"}``; pictures in base64, as files of any format | ``{"scores", "parts"}`` |
| ``/score`` or ``/`` | the same in a pickle, pictures as bytes: what verl-omni's HTTP client sends | ``{"scores"}`` in a pickle |
| ``/compute`` | JSON ``{"prompt", "image", "condition_images"}``: what Flow-Factory's remote reward sends | ``{"rewards"}`` |

``references`` has one list for each picture, of pictures or of places in ``"reference_images"``, so that a group sends its references once.
A picture without a score is ``null`` on ``/score``; the other two ways cannot say so, and get the server's ``missing_score``.
"""

from __future__ import annotations

import base64
import binascii
import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from id_reward.errors import InputError
from id_reward.floats import whole
from id_reward.serving.plain_pickle import read_plain, write_plain

Dialect = Literal["score", "pickle", "compute"]


class Refused(InputError):
    """A request that is answered with an error; ``status`` is HTTP's."""

    def __init__(self, message: str, status: int = 400) -> None:
        """Keeps both."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """How much one request may hold.

    Attributes:
        max_bytes: Of the body.
        max_pictures: Pictures to score.
        max_references: References of one picture.
        max_pixels: Width times height of any picture.
        max_total_pixels: Of all pictures and references together, each counted once: a few kilobytes may say that they are gigabytes.
    """

    max_bytes: int = 64_000_000
    max_pictures: int = 64
    max_references: int = 16
    max_pixels: int = 16_777_216
    max_total_pixels: int = 201_326_592

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            whole(name, value, least=1)


@dataclass(frozen=True)
class ScoreRequest:
    """Pictures as files in memory, their prompts, and the references of each."""

    images: Sequence[bytes]
    prompts: Sequence[str]
    references: Sequence[Sequence[bytes]]

    @property
    def files(self) -> set[bytes]:
        """Every file once."""
        return {*self.images, *(data for row in self.references for data in row)}


def pixels_of(request: ScoreRequest) -> int:
    """What its files are when they are decoded, by their headers."""
    from id_reward.images import count_pixels

    return sum(count_pixels(data) for data in request.files)


def _checked(request: ScoreRequest, limits: Limits) -> ScoreRequest:
    """The request, if all of it may be decoded."""
    pixels = pixels_of(request)
    if pixels > limits.max_total_pixels:
        raise Refused(f"a request must have at most {limits.max_total_pixels:,} pixels in all, got {pixels:,}", 413)
    return request


def _picture(value: Any, name: str) -> bytes:
    """Bytes of a file, from bytes or base64 (also as a data URI)."""
    if isinstance(value, (bytes, bytearray)):
        return bytes(value)
    if not isinstance(value, str):
        raise Refused(f"{name} must be a picture in base64, got {type(value).__name__}")
    try:
        return base64.b64decode(value.partition(",")[2] if value.startswith("data:") else value, validate=True)
    except (binascii.Error, ValueError):
        raise Refused(f"{name} must be a picture in base64, got {value[:30]!r}") from None


def _list(value: Any, name: str, longest: int) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise Refused(f"{name} must be a list, got {type(value).__name__}")
    if len(value) > longest:
        raise Refused(f"{name} must have at most {longest} entries, got {len(value)}", 413)
    return list(value)


KNOWN = ("images", "prompts", "references", "reference_images", "metadata", "prompt", "image", "condition_images")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose names are all different: of two answers JSON would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise Refused("the body must name everything once, got a name that is there twice")
    return found


def _spelled(content: Mapping[str, Any]) -> None:
    """Refuses what is nearly a name: "refrences" would be scored without references, and every score be null."""
    for name in content:
        near = difflib.get_close_matches(name, KNOWN, n=1, cutoff=0.8) if isinstance(name, str) else ["images"]
        if near and name not in KNOWN and name not in ("video", "condition_videos", "videos"):
            raise Refused(f"the body must spell {near[0]!r} so, got {str(name)[:40]!r}")
    if "reference_images" in content and content.get("references") is None:
        raise Refused("reference_images must come with references that name them, got none")


def _content(body: bytes) -> Mapping[str, Any]:
    """The dictionary in a body."""
    try:
        content = read_plain(body) if body[:1] == b"\x80" else json.loads(body, object_pairs_hook=_once)
    except Refused:
        raise
    except InputError as error:
        raise Refused(str(error)) from None
    except (ValueError, RecursionError) as error:
        raise Refused(f"the body must be JSON, got: {type(error).__name__}") from None
    if not isinstance(content, dict):
        raise Refused(f"the body must be an object, got {type(content).__name__}")
    return content


def parse(body: bytes, path: str, limits: Limits, references: Sequence[bytes] = ()) -> tuple[ScoreRequest, Dialect]:
    """The request in a body, and the way in which it was asked.

    Args:
        body: JSON, or a pickle of plain data.
        path: Of the URL.
        limits: What it may hold.
        references: For every picture of a request that names none.

    Raises:
        Refused: It does not fit, or holds too much.
    """
    content = _content(body)
    _spelled(content)
    dialect: Dialect = "compute" if path == "/compute" else "pickle" if body[:1] == b"\x80" else "score"
    names = ("image", "prompt", "condition_images") if dialect == "compute" else ("images", "prompts", "references")
    images = [
        _picture(v, f"{names[0]}[{n}]")
        for n, v in enumerate(_list(content.get(names[0]), names[0], limits.max_pictures))
    ]
    prompts = _list(content.get(names[1]), names[1], limits.max_pictures)
    if len(prompts) != len(images) or not all(isinstance(prompt, str) for prompt in prompts):
        raise Refused(f"{names[1]} must be {len(images)} strings, one for each picture, got {len(prompts)} entries")
    if not images:
        raise Refused(f"{names[0]} must hold at least one picture, got none")
    given = content.get(names[2])
    if given is None and isinstance(content.get("metadata"), dict):
        given = content["metadata"].get("references")
    if given is None:
        return _checked(ScoreRequest(images, prompts, [list(references)] * len(images)), limits), dialect
    shared = _list(content.get("reference_images", []), "reference_images", limits.max_pictures * limits.max_references)
    pool = [_picture(value, f"reference_images[{n}]") for n, value in enumerate(shared)]
    rows = _list(given, names[2], limits.max_pictures)
    if len(rows) != len(images):
        raise Refused(f"{names[2]} must have one list for each picture ({len(images)}), got {len(rows)}")
    found = [_row(row, f"{names[2]}[{n}]", pool, limits) for n, row in enumerate(rows)]
    return _checked(ScoreRequest(images, prompts, found), limits), dialect


def _row(row: Any, name: str, pool: Sequence[bytes], limits: Limits) -> list[bytes]:
    """The references of one picture."""
    found = []
    for number, value in enumerate(_list(row, name, limits.max_references)):
        if isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < len(pool):
                raise Refused(
                    f"{name}[{number}] must be a place in reference_images, of which there are {len(pool)}, got {value}"
                )
            found.append(pool[value])
        else:
            found.append(_picture(value, f"{name}[{number}]"))
    return found


def answer(dialect: Dialect, result: Mapping[str, Any], missing_score: float) -> tuple[bytes, str]:
    """A body and its content type."""
    known = [missing_score if value is None else value for value in result["scores"]]
    if dialect == "pickle":
        return write_plain({"scores": known}), "application/octet-stream"
    content = {"rewards": known} if dialect == "compute" else result
    return json.dumps(content).encode(), "application/json"


def error_answer(dialect: Dialect, message: str) -> tuple[bytes, str]:
    """The same for an error."""
    if dialect == "pickle":
        return write_plain({"error": message}), "application/octet-stream"
    return json.dumps({"error": message}).encode(), "application/json"
