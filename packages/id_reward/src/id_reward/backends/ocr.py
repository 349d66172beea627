"""Is the text that was asked for written in the picture? A reader and a comparison.

Readers are functions of pictures that give one text each: `RapidReader` (extra ``ocr``, no download), `FlorenceReader` (extra ``objects``),
or any other, such as a `VisionLanguageModel` that is asked what it reads.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from id_reward.errors import InputError
from id_reward.images import as_array, as_image
from id_reward.shapes import Float

if TYPE_CHECKING:
    from id_reward.backends.objects import FlorenceLocator

Reader = Callable[[Sequence[Any]], Sequence[str]]
QUOTES = re.compile("\"([^\"]+)\"|“([^”]+)”|«([^»]+)»|„([^“”]+)[“”]|'([^']+)'(?!\\w)")


def edit_distance(a: str, b: str) -> int:
    """Fewest insertions, deletions and substitutions of letters that turn one into the other (Levenshtein 1966).

    >>> edit_distance("kitten", "sitting")
    3
    """
    row = np.arange(len(b) + 1)
    letters = np.frombuffer(b.encode("utf-32-le"), np.uint32)
    for count, letter in enumerate(a, 1):
        best = np.concatenate([[count], np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)))])
        # an insertion costs one more for every place that it is carried along
        row = np.minimum.accumulate(best - np.arange(len(best))) + np.arange(len(best))
    return int(row[-1])


def wanted_text(prompt: str) -> str:
    """What a prompt says should be written: everything in quotation marks, or all of it where there are none.

    >>> wanted_text('a shop called "Open late"'), wanted_text("exit")
    ('Open late', 'exit')
    """
    found = ["".join(groups) for groups in QUOTES.findall(prompt)]
    return " ".join(found) if found else prompt


def text_score(read: str, wanted: str) -> float:
    """``max(1 - d / n, 0)``: d, the edit distance of what is read from what is wanted, n letters; 1 where it is read among other text.

    Case and white space do not count. As in Flow-GRPO (arXiv 2505.05470). NaN where nothing is wanted.

    >>> text_score("OPEN LATE tonight", "Open late"), text_score("Open gate", "Open late"), text_score("", "Open")
    (1.0, 0.875, 0.0)
    """
    left, right = ("".join(text.split()).casefold() for text in (read, wanted))
    if not right:
        return float("nan")
    return 1.0 if right in left else max(1 - edit_distance(left, right) / len(right), 0.0)


class OCRScorer:
    """`text_score` of what a reader reads, as a scorer.

    Args:
        reader: Gives the text in each picture.
        wanted: The text that each prompt asks for; by default what stands in quotation marks.
    """

    releases_gil = True

    def __init__(self, reader: Reader, *, wanted: Callable[[str], str] = wanted_text) -> None:
        """Takes a reader."""
        if not callable(reader) or not callable(wanted):
            raise InputError(f"reader and wanted must be functions, got {reader!r} and {wanted!r}"[:200])
        self.reader, self.wanted = reader, wanted

    def to(self, device: Any) -> OCRScorer:
        """Moves the reader, where it can be moved."""
        if hasattr(self.reader, "to"):
            self.reader.to(device)
        return self

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture; references do not matter."""
        if len(images) != len(prompts):
            raise InputError(f"prompts must have one entry per picture ({len(images)}), got {len(prompts)}")
        texts = list(self.reader(images)) if len(images) else []
        if len(texts) != len(images):
            raise InputError(f"reader must give one text per picture ({len(images)}), got {len(texts)}")
        return np.array([text_score(text, self.wanted(prompt)) for text, prompt in zip(texts, prompts)])


class RapidReader:
    """PP-OCR by rapidocr, on onnxruntime: the models come with the package (Apache-2.0). Lines are read from top to bottom.

    Args:
        min_confidence: Lines read with less are left out.
        **parameters: Of `rapidocr.RapidOCR`, such as ``{"Rec.lang_type": ...}``.

    Raises:
        ImportError: rapidocr or onnxruntime is missing.
    """

    def __init__(self, *, min_confidence: float = 0.5, **parameters: Any) -> None:
        """Loads the models."""
        try:
            importlib.import_module("onnxruntime")
            engine = importlib.import_module("rapidocr").RapidOCR
        except ImportError:
            raise ImportError('reading text needs rapidocr: pip install "id-reward[ocr]"') from None
        if not 0 <= min_confidence <= 1:
            raise InputError(f"min_confidence must be in [0, 1], got {min_confidence}")
        self.min_confidence = min_confidence
        self._engine = engine(params={"Global.log_level": "critical", **parameters})

    def __call__(self, images: Sequence[Any]) -> list[str]:
        """One text per picture, empty where nothing is read."""
        texts = []
        for image in images:
            found = self._engine(np.ascontiguousarray(as_array(image)[..., ::-1]))  # it takes BGR
            lines = zip(found.txts or (), found.scores or ())
            texts.append(" ".join(text for text, score in lines if score >= self.min_confidence))
        return texts


class FlorenceReader:
    """Florence-2's task "<OCR>" (arXiv 2311.06242), by the model of `FlorenceLocator`."""

    def __init__(self, locator: FlorenceLocator) -> None:
        """Takes the locator whose model reads."""
        self.locator = locator

    def to(self, device: Any) -> FlorenceReader:
        """Moves the model."""
        self.locator.model.to(device)
        return self

    def __call__(self, images: Sequence[Any]) -> list[str]:
        """One text per picture."""
        pictures = [as_image(image) for image in images]
        texts = []
        for picture, answer in zip(pictures, self.locator.generate(pictures, ["<OCR>"] * len(pictures)), strict=True):
            found = self.locator.processor.post_process_generation(text=answer, task="<OCR>", image_size=picture.size)
            texts.append(str(found["<OCR>"]).strip())
        return texts
