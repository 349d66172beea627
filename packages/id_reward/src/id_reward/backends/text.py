"""Text alignment (extra ``clip``): the CLIP score, through transformers or open_clip.

``R_text = cos(image, prompt)``: CLIP-T of the papers. Pictures and prompts of one encoder also give CLIP-I.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np

from id_reward.backends.loading import load, transformers_module
from id_reward.errors import InputError
from id_reward.images import as_image
from id_reward.shapes import Float

try:
    import torch
    import torch.nn.functional as F
    from torch import Tensor
except ImportError:
    raise ImportError('CLIP needs torch and Pillow: pip install "id-reward[clip]"') from None


@runtime_checkable
class ClipEncoder(Protocol):
    """Embeds pictures and prompts into one space, as unit vectors."""

    def embed_pictures(self, images: Sequence[Any]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of pictures."""
        ...

    def embed_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of prompts; what does not fit into the context is cut off."""
        ...


def _in_batches(items: Sequence[Any], size: int, embed: Callable[[list[Any]], Tensor]) -> np.ndarray:
    """Unit rows of ``embed``, batch by batch."""
    parts = []
    with torch.inference_mode():
        for start in range(0, len(items), size):
            rows = embed(list(items[start : start + size])).float()
            parts.append(F.normalize(rows, dim=-1).cpu().double().numpy())
    return np.concatenate(parts) if parts else np.zeros((0, 1))


def _distinct(prompts: Sequence[str], embed: Callable[[list[str]], np.ndarray]) -> np.ndarray:
    """Every prompt embedded once; the pictures of a group share theirs."""
    unique = list(dict.fromkeys(prompts))
    rows = embed(unique)
    result: np.ndarray = rows[[unique.index(prompt) for prompt in prompts]] if len(prompts) else rows
    return result


class TransformersClip:
    """A `transformers.CLIPModel` with its processor."""

    def __init__(self, model: Any, processor: Any, *, batch_size: int = 32) -> None:
        """Takes model and processor."""
        self.model, self.processor, self.batch_size = model.eval(), processor, batch_size

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path,
        *,
        processor: str | Path | None = None,
        device: str = "cpu",
        batch_size: int = 32,
        local_files_only: bool = True,
    ) -> TransformersClip:
        """Loads a folder in transformers' format, for example of openai/clip-vit-large-patch14: safetensors, else the tensors of a .bin.

        Args:
            folder: The model.
            processor: Where its processor is; None: with the model.
            device: Where the model runs.
            batch_size: Pictures, or prompts, at a time.
            local_files_only: Whether folder names must be folders; False allows hub ids.

        Raises:
            ValueError: The folder is missing, cannot be read, or holds another kind of model.
        """
        hf, options = transformers_module("clip"), {"local_files_only": local_files_only}
        model = load(hf.AutoModel, folder, "clip", weights_only=True, **options).to(device)
        if not isinstance(
            model, hf.CLIPModel
        ):  # CLIPModel.from_pretrained would fill what it misses with random numbers
            raise InputError(
                f"clip must be a CLIPModel, of pictures and text, but {folder} holds a {type(model).__name__}"
            )
        found = load(hf.CLIPProcessor, folder if processor is None else processor, "clip's processor", **options)
        return cls(model, found, batch_size=batch_size)

    def to(self, device: Any) -> TransformersClip:
        """Moves the model."""
        self.model.to(device)
        return self

    def embed_pictures(self, images: Sequence[Any]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of pictures."""

        def embed(some: list[Any]) -> Tensor:
            inputs = self.processor(images=[as_image(image) for image in some], return_tensors="pt")
            found = self.model.get_image_features(inputs["pixel_values"].to(self.model.device, self.model.dtype))
            features: Tensor = getattr(found, "pooler_output", found)
            return features

        return _in_batches(images, self.batch_size, embed)

    def embed_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of prompts."""
        length = self.model.config.text_config.max_position_embeddings

        def embed(some: list[Any]) -> Tensor:
            tokens = self.processor.tokenizer(
                some, padding=True, truncation=True, max_length=length, return_tensors="pt"
            ).to(self.model.device)
            found = self.model.get_text_features(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            features: Tensor = getattr(found, "pooler_output", found)
            return features

        return _distinct(prompts, lambda unique: _in_batches(unique, self.batch_size, embed))


class OpenClip:
    """A model of open_clip with its preprocessing (a PIL picture to a tensor) and its tokenizer."""

    def __init__(
        self,
        model: Any,
        preprocess: Callable[[Any], Tensor],
        tokenizer: Callable[[list[str]], Tensor],
        *,
        batch_size: int = 32,
    ) -> None:
        """Takes model, preprocessing and tokenizer."""
        self.model, self.preprocess, self.tokenizer = model.eval(), preprocess, tokenizer
        self.batch_size = batch_size

    @classmethod
    def from_pretrained(
        cls, name: str, checkpoint: str | Path | None = None, *, device: str = "cpu", batch_size: int = 32
    ) -> OpenClip:
        """Loads an architecture of open_clip ("ViT-L-14") with a checkpoint file, or a folder "local-dir:PATH".

        Raises:
            ValueError: The checkpoint or folder is missing or does not fit.
            ImportError: open_clip is missing.
        """
        library = open_clip_module()
        local = name.startswith("local-dir:")
        if checkpoint is None and not local:
            raise InputError(f"checkpoint must be a file for {name}, got None (or name a folder: local-dir:PATH)")
        if checkpoint is not None and not Path(checkpoint).is_file():
            raise InputError(f"checkpoint must be a file, but there is no {checkpoint}")
        try:
            model, _, preprocess = library.create_model_and_transforms(
                name, pretrained=None if checkpoint is None else str(checkpoint), device=device
            )
            tokenizer = library.get_tokenizer(name)
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise InputError(f"{name} with {checkpoint or 'its own weights'} cannot be loaded: {first}") from error
        return cls(model, preprocess, tokenizer, batch_size=batch_size)

    @property
    def device(self) -> Any:
        """Where the model is."""
        return next(self.model.parameters()).device

    def to(self, device: Any) -> OpenClip:
        """Moves the model."""
        self.model.to(device)
        return self

    def embed_pictures(self, images: Sequence[Any]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of pictures."""

        def embed(some: list[Any]) -> Tensor:
            batch = torch.stack([self.preprocess(as_image(image)) for image in some])
            features: Tensor = self.model.encode_image(batch.to(self.device))
            return features

        return _in_batches(images, self.batch_size, embed)

    def embed_text(self, prompts: Sequence[str]) -> Float[np.ndarray, "b d"]:
        """Unit embeddings of prompts."""

        def embed(some: list[Any]) -> Tensor:
            features: Tensor = self.model.encode_text(self.tokenizer(some).to(self.device))
            return features

        return _distinct(prompts, lambda unique: _in_batches(unique, self.batch_size, embed))


def open_clip_module() -> Any:
    """open_clip, or an ImportError that names the extra."""
    try:
        import open_clip
    except ImportError:
        raise ImportError('open_clip is needed: pip install "id-reward[clip]"') from None
    return open_clip


class ClipScorer:
    """Cosine of picture and prompt, as a scorer.

    Args:
        encoder: Embeds both.
        scale: "cosine" in [-1, 1] (CLIP-T of the papers), "clipscore": ``2.5 max(cos, 0)`` (Hessel et al. 2021, arXiv 2104.08718, Eq. 1), or
            "unit": ``(1 + cos) / 2``.

    Raises:
        ValueError: The scale is none of these.
    """

    releases_gil = True

    def __init__(self, encoder: ClipEncoder, *, scale: Literal["cosine", "clipscore", "unit"] = "cosine") -> None:
        """Takes an encoder."""
        if scale not in ("cosine", "clipscore", "unit"):
            raise InputError(f"scale must be 'cosine', 'clipscore' or 'unit', got {scale!r}")
        self.encoder, self.scale = encoder, scale

    def to(self, device: Any) -> ClipScorer:
        """Moves the encoder."""
        if hasattr(self.encoder, "to"):
            self.encoder.to(device)
        return self

    def __call__(
        self, images: Sequence[Any], prompts: Sequence[str], references: Sequence[Sequence[Any]]
    ) -> Float[np.ndarray, " b"]:
        """One number per picture; references do not matter."""
        if len(images) != len(prompts):
            raise InputError(f"prompts must have one entry per picture ({len(images)}), got {len(prompts)}")
        if not len(images):
            return np.zeros(0)
        cosine = (self.encoder.embed_pictures(images) * self.encoder.embed_text(prompts)).sum(1)
        if self.scale == "clipscore":
            return np.asarray(2.5 * np.maximum(cosine, 0))
        return np.asarray(cosine if self.scale == "cosine" else (1 + cosine) / 2)
