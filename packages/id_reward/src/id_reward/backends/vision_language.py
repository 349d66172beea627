"""Vision-language models as judges and readers (extra ``preference``): they are asked in words, and answer in words.

UnifiedReward and its like are such models: they rate a picture on several scales, in a text out of which the numbers are read.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from id_reward.backends.loading import load, transformers_module
from id_reward.errors import InputError
from id_reward.images import as_image
from id_reward.shapes import Float

try:
    import torch
except ImportError:
    raise ImportError('vision-language models need torch: pip install "id-reward[preference]"') from None

NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)"
QUESTION = """Look at the picture and judge it as an answer to this request: {prompt}

Give three ratings from 1 (very bad) to 5 (very good).
Alignment: does the picture show what was asked for?
Coherence: is what it shows possible, without defects?
Style: is it pleasing to look at, whatever was asked for?

Answer with three lines and nothing else:
Alignment Score (1-5): X
Coherence Score (1-5): Y
Style Score (1-5): Z"""


class VisionLanguageModel:
    """Any model of transformers' ``AutoModelForImageTextToText`` with its processor and chat template: pictures and questions in, answers out.

    Args:
        model: The model.
        processor: Its processor.
        batch_size: Questions at a time.
        max_new_tokens: Length of an answer.
        side: Long side that larger pictures are brought to; None: as they are.
    """

    def __init__(
        self, model: Any, processor: Any, *, batch_size: int = 8, max_new_tokens: int = 256, side: int | None = 1024
    ) -> None:
        """Takes model and processor; answers are made without chance."""
        if batch_size < 1 or max_new_tokens < 1 or (side is not None and side < 28):
            raise InputError(
                "batch_size and max_new_tokens must be at least 1 and side at least 28, "
                f"got {batch_size}, {max_new_tokens} and {side}"
            )
        self.model, self.processor = model.eval(), processor
        self.batch_size, self.max_new_tokens, self.side = batch_size, max_new_tokens, side
        processor.tokenizer.padding_side = "left"  # answers begin where questions end

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        device: str = "cpu",
        dtype: Literal["bfloat16", "float32", "auto"] = "auto",
        local_files_only: bool = True,
        **options: Any,
    ) -> VisionLanguageModel:
        """Loads a folder in transformers' format, for example of CodeGoat24/UnifiedReward-2.0-qwen3vl-2b or Qwen/Qwen2.5-VL-3B-Instruct.

        Raises:
            ValueError: The folder is missing, or holds another kind of model.
            ImportError: transformers is missing.
        """
        hf, local = transformers_module("preference"), {"local_files_only": local_files_only}
        kind = dtype if dtype == "auto" else getattr(torch, dtype)
        model = load(hf.AutoModelForImageTextToText, folder, "model", use_safetensors=True, torch_dtype=kind, **local)
        return cls(model.to(device), load(hf.AutoProcessor, folder, "model", **local), **options)

    def to(self, device: Any) -> VisionLanguageModel:
        """Moves the model."""
        self.model.to(device)
        return self

    def _picture(self, image: Any) -> Any:
        picture = as_image(image)
        if self.side is not None:
            picture.thumbnail((self.side, self.side))
        return picture

    def answer(self, images: Sequence[Any], questions: Sequence[str]) -> list[str]:
        """What it says to each picture and question."""
        if len(images) != len(questions):
            raise InputError(f"questions must have one entry per picture ({len(images)}), got {len(questions)}")
        answers: list[str] = []
        for start in range(0, len(images), self.batch_size):
            pictures = [self._picture(image) for image in images[start : start + self.batch_size]]
            texts = [
                self.processor.apply_chat_template(
                    [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}],
                    tokenize=False,
                    add_generation_prompt=True,
                )
                for question in questions[start : start + self.batch_size]
            ]
            inputs = self.processor(text=texts, images=pictures, padding=True, return_tensors="pt").to(
                self.model.device
            )
            if "pixel_values" in inputs:
                inputs["pixel_values"] = inputs["pixel_values"].to(self.model.dtype)
            with torch.inference_mode():
                tokens = self.model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
            new = tokens[:, inputs["input_ids"].shape[1] :]
            answers += [text.strip() for text in self.processor.batch_decode(new, skip_special_tokens=True)]
        return answers


def read_ratings(answer: str, names: Sequence[str]) -> Float[np.ndarray, " n"]:
    """The number that follows each name in an answer; NaN where there is none.

    A scale in brackets, as in "Style Score (1-5): 4", is passed over.

    >>> read_ratings("Alignment Score (1-5): 4.5; style: 3/5", ["Alignment", "Coherence", "Style"]).tolist()
    [4.5, nan, 3.0]
    """
    found = []
    for name in names:
        pattern = rf"{re.escape(name)}(?:\s+score)?\s*(?:\([^)]*\))?\s*[*_]*\s*[:=]\s*[*_]*\s*({NUMBER})"
        match = re.search(pattern, answer, re.IGNORECASE)
        found.append(float(match[1]) if match else np.nan)
    return np.array(found)


class JudgeScorer:
    """The mean of a judge's ratings, brought to [0, 1], as a scorer.

    ``(mean over names of rating - low) / (high - low)``; NaN where a rating is missing from the answer, or outside its scale.

    Args:
        judge: Answers.
        question: Asked of every picture, with ``{prompt}`` in it. The default is this package's own; a checkpoint that was trained with
            another text, as UnifiedReward was, is to be given that one.
        names: What the answer calls its ratings.
        low: The worst rating.
        high: The best.
    """

    releases_gil = True

    def __init__(
        self,
        judge: VisionLanguageModel,
        *,
        question: str = QUESTION,
        names: Sequence[str] = ("Alignment", "Coherence", "Style"),
        low: float = 1.0,
        high: float = 5.0,
    ) -> None:
        """Checks the question and the scale."""
        if "{prompt}" not in question:
            raise InputError("question must hold {prompt}, where the prompt goes")
        if not names or not high > low:
            raise InputError(
                f"names must hold at least one, and high be above low, got {list(names)}, {low} and {high}"
            )
        self.judge, self.question, self.names, self.low, self.high = judge, question, tuple(names), low, high

    def to(self, device: Any) -> JudgeScorer:
        """Moves the judge."""
        self.judge.to(device)
        return self

    def ratings(self, images: Sequence[Any], prompts: Sequence[str]) -> Float[np.ndarray, "b n"]:
        """Every rating of every picture; NaN where it is missing or outside its scale."""
        answers = self.judge.answer(images, [self.question.replace("{prompt}", prompt) for prompt in prompts])
        found = np.array([read_ratings(answer, self.names) for answer in answers]).reshape(-1, len(self.names))
        return np.where((found >= self.low) & (found <= self.high), found, np.nan)

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture; references do not matter."""
        return np.asarray((self.ratings(images, prompts).mean(1) - self.low) / (self.high - self.low))
