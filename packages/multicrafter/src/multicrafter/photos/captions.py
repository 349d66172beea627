"""Captions: a sentence from the number of people, or a vision-language model."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

from id_reward.backends.loading import load

if TYPE_CHECKING:
    from PIL import Image

NUMBERS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight")
PROMPT = "Describe this photo in one sentence: who is there, what they wear and do, and where they are."


def template(people: int) -> str:
    """A caption that says no more than the number of people.

    >>> template(2)
    'a photo of two people'
    """
    return f"a photo of {NUMBERS[people]} {'person' if people == 1 else 'people'}"


class VisionLanguageCaptioner:
    """Any image-text-to-text model of transformers (BLIP, LLaVA, Qwen-VL, SmolVLM, ...) from a local folder."""

    def __init__(self, folder: str, *, prompt: str = PROMPT, max_new_tokens: int = 60) -> None:
        """Loads model and processor; ``prompt`` is given to models that chat."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.model = load(AutoModelForImageTextToText, folder, "captions vlm:PATH").eval()
        self.processor = load(AutoProcessor, folder, "captions vlm:PATH")
        self.prompt, self.max_new_tokens = prompt, max_new_tokens

    def __call__(self, pictures: Sequence[Image.Image]) -> list[str]:
        """One caption per picture, greedy, so that the same photo has the same caption again."""
        return [answer(self.model, self.processor, [picture], self.prompt, self.max_new_tokens) for picture in pictures]


def answer(model: object, processor: object, pictures: Sequence[Image.Image], prompt: str, max_new_tokens: int) -> str:
    """What a vision-language model says about pictures; a model without a chat template just captions the last one."""
    import torch

    chats = getattr(processor, "chat_template", None) is not None
    if chats:
        content = [{"type": "image", "image": p} for p in pictures] + [{"type": "text", "text": prompt}]
        inputs = processor.apply_chat_template(  # type: ignore[attr-defined]
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        )
    else:
        inputs = processor(images=pictures[-1], return_tensors="pt")  # type: ignore[operator]
    with torch.inference_mode():
        tokens = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)  # type: ignore[attr-defined]
    new = tokens[:, inputs["input_ids"].shape[1] :] if chats else tokens
    return " ".join(str(processor.batch_decode(new, skip_special_tokens=True)[0]).split())  # type: ignore[attr-defined]


@lru_cache(maxsize=1)
def captioner(folder: str) -> VisionLanguageCaptioner:
    """The captioner, loaded once a process."""
    return VisionLanguageCaptioner(folder)
