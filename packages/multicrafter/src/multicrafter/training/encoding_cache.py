"""Encoded texts and pictures on disk: computed once, read ever after, also by other runs and other ranks.

An entry is one safetensors file, ``<folder>/<model>/<ab>/<content>.safetensors``: the model's key is a digest of its weights, the
content's key a digest of the text or the pixels, so nothing stale is ever read. Once all is cached, the encoders can go.
"""

from __future__ import annotations

import gc
import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from multicrafter.files import appearing, follow_umask
from multicrafter.models.backbones.base import pad_texts
from multicrafter.models.flux.model import Text
from multicrafter.models.loaded import LoadedModel
from multicrafter.models.placing import bring_encoders
from multicrafter.training import distributed
from multicrafter.training.checkpoint import CheckpointError

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

WAITING = torch.device("cpu")  # all texts and pictures wait in the machine's memory


def content_key(content: str | Tensor) -> str:
    """Digest of a text, or of a tensor's shape, dtype and values.

    >>> content_key("two people") == content_key("two people"), content_key("a") == content_key("b")
    (True, False)
    """
    digest = hashlib.sha256()
    if isinstance(content, str):
        digest.update(b"text:" + content.encode())
    else:
        digest.update(f"{content.dtype}{tuple(content.shape)}:".encode())
        digest.update(content.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def model_key(*modules: nn.Module, note: str = "") -> str:
    """Digest of modules' weights, by name, and of a note (settings that change what they give)."""
    digest = hashlib.sha256(note.encode())
    for module in modules:
        for name, value in sorted(module.state_dict().items()):
            digest.update(f"{name}{value.dtype}{tuple(value.shape)}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


class TensorCache:
    """Entries of one model in one folder."""

    def __init__(self, folder: str | Path, model: str) -> None:
        """Takes the folder shared by all models and this model's `model_key`."""
        self.folder = Path(folder) / model

    def path(self, key: str) -> Path:
        """Where an entry is."""
        return self.folder / key[:2] / f"{key}.safetensors"

    def read(self, key: str) -> dict[str, Tensor] | None:
        """An entry, or None if there is none that can be read."""
        try:
            entry: dict[str, Tensor] = load_file(self.path(key))
            return entry
        except (OSError, SafetensorError):
            return None

    def write(self, key: str, entry: Mapping[str, Tensor]) -> None:
        """Writes an entry through a temporary name of this process's own."""
        try:
            with appearing(self.path(key)) as temporary:
                save_file({k: v.detach().cpu().contiguous() for k, v in entry.items()}, temporary)
                follow_umask(temporary)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(f"cache {self.folder} must be writable, got {error}") from error

    def fill(
        self, contents: Mapping[str, Any], compute: Callable[[list[Any]], Mapping[str, Tensor]], *, batch: int = 16
    ) -> int:
        """Computes what is missing, shared out among the ranks, and waits until all is there.

        Args:
            contents: What to encode, by `content_key`.
            compute: Encodes a list; returns tensors with one row per item.
            batch: Items at once.

        Returns:
            Number of entries computed by this rank.
        """
        missing = [key for key in contents if self.read(key) is None] if distributed.is_main() else None
        missing = distributed.broadcast_object(missing)
        mine = missing[distributed.rank() :: distributed.world_size()]
        for start in range(0, len(mine), batch):
            keys = mine[start : start + batch]
            encoded = compute([contents[key] for key in keys])
            for row, key in enumerate(keys):
                self.write(key, {name: value[row].clone() for name, value in encoded.items()})
        distributed.broadcast_object(None)
        return len(mine)

    def stack(self, keys: Sequence[str]) -> dict[str, Tensor]:
        """Entries as a batch.

        Raises:
            CheckpointError: One is missing or damaged (deleted since `fill`).
        """
        entries = []
        for key in keys:
            entry = self.read(key)
            if entry is None:
                raise CheckpointError(
                    f"cache {self.folder} must hold {key[:12]}..., but it is missing or damaged: start again"
                )
            entries.append(entry)
        return {name: torch.stack([e[name] for e in entries]) for name in entries[0]}


class ScenesText:
    """Encoded prompts of scenes, where the text encoder looks at the references as well: one entry a scene, encoded when the scene is.

    From disk with a folder, else in memory. Batches are padded to their longest prompt.
    """

    def __init__(self, model: LoadedModel | DiffusionPipeline, folder: str | Path | None = None) -> None:
        """Takes the model whose text encoder encodes; with a folder it is needed no more once all is there."""
        self._model = model = LoadedModel.of(model)
        self._cache: TensorCache | None = None
        if folder is not None:
            key = model_key(*model.text_encoders, note=_tokenizers(model.pipe))
            self._cache = TensorCache(folder, key)
        self._kept: list[Text | str] = []

    @torch.no_grad()
    def add(self, captions: Sequence[str], references: Float[Tensor, "b m 3 h w"]) -> None:
        """Encodes the next scenes."""

        def compute(items: list[tuple[str, Tensor]]) -> list[Text]:
            return [self._model.encode_prompts_with([text], [list(pictures)]).to(WAITING) for text, pictures in items]

        items = list(zip(captions, references, strict=True))
        if self._cache is None:
            self._kept += compute(items)
            return
        keys = [content_key(f"{content_key(text)} {content_key(pictures)}") for text, pictures in items]
        self._cache.fill(dict(zip(keys, items, strict=True)), lambda batch: _entries(compute(batch)[0]), batch=1)
        self._kept += keys

    def __call__(self, rows: Tensor | slice | Sequence[int]) -> Text:
        """The prompts of these scenes, padded to the longest of them."""
        chosen = self._kept[rows] if isinstance(rows, slice) else [self._kept[int(row)] for row in rows]
        return pad_texts([self._read(entry) if isinstance(entry, str) else entry for entry in chosen])

    def _read(self, key: str) -> Text:
        assert self._cache is not None
        entry = self._cache.stack([key])
        return Text(entry["embeds"], entry.get("pooled"), entry.get("mask"), entry.get("slots"))


class CachedText:
    """Encoded prompts, by their text: from disk with a folder, else in memory. The text encoders are needed only to make it."""

    def __init__(
        self,
        model: LoadedModel | DiffusionPipeline,
        captions: Sequence[str],
        folder: str | Path | None = None,
    ) -> None:
        """Encodes every caption once. None are given where all scenes hold their text (`ScenesText`)."""
        model, unique = LoadedModel.of(model), sorted(set(captions))
        self._cache: TensorCache | None = None
        self.num_tokens = 0
        if not unique:
            return

        @torch.no_grad()
        def compute(texts: list[str]) -> Text:
            return model.encode_prompts(texts).to(WAITING)

        if folder is None:
            self._text = compute(unique)
            self._row = {caption: row for row, caption in enumerate(unique)}
            self.num_tokens = int(self._text.embeds.shape[1])
            return
        self._cache = TensorCache(folder, model_key(*model.text_encoders, note=_tokenizers(model.pipe)))
        self._cache.fill({content_key(c): c for c in unique}, lambda texts: _entries(compute(texts)))
        self.num_tokens = int(self(unique[:1]).embeds.shape[1])

    def __call__(self, captions: Sequence[str]) -> Text:
        """Rows for these captions."""
        if self._cache is not None:
            entries = self._cache.stack([content_key(c) for c in captions])
            return Text(entries["embeds"], entries.get("pooled"))
        return self._text[torch.tensor([self._row[c] for c in captions])]  # type: ignore[return-value]


def _entries(text: Text) -> dict[str, Tensor]:
    return {name: value for name, value in text._asdict().items() if value is not None}


def _tokenizers(pipe: Any) -> str:
    """What of the tokenizers changes an encoding: their vocabularies and lengths."""
    found = [t for n in ("tokenizer", "tokenizer_2") if (t := getattr(pipe, n, None)) is not None]
    digest = hashlib.sha256()
    for tokenizer in found:
        digest.update(repr((tokenizer.model_max_length, sorted(tokenizer.get_vocab().items()))).encode())
    if (
        processor := getattr(pipe, "processor", None)
    ) is not None:  # of a vision-language encoder: at which size it sees pictures
        digest.update(repr(sorted(processor.image_processor.to_dict().items())).encode())
        if not found:
            digest.update(repr(sorted(processor.tokenizer.get_vocab().items())).encode())
    return digest.hexdigest()


class CachedPictures:
    """Encoded pictures, by their pixels: each is encoded once where there is a folder, each time without one."""

    def __init__(self, model: LoadedModel | DiffusionPipeline, folder: str | Path | None = None) -> None:
        """Takes the model whose VAE encodes."""
        self._model = model = LoadedModel.of(model)
        self._cache = (
            None if folder is None else TensorCache(folder, model_key(model.pipe.vae, note=model.backbone.name))
        )

    @torch.no_grad()
    def __call__(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n d"]:
        """Tokens of pictures in [0, 1]."""
        if self._cache is None:
            return self._model.encode_pictures(pictures).to(WAITING)
        keys = [content_key(p) for p in pictures]
        self._cache.fill(
            dict(zip(keys, pictures, strict=True)),
            lambda batch: {"tokens": self._model.encode_pictures(torch.stack(batch))},
        )
        return self._cache.stack(keys)["tokens"]


def rest_encoders(model: LoadedModel | DiffusionPipeline) -> None:
    """Lets text encoders wait in the machine's memory: the card is the training's, as `multicrafter plan` counts it."""
    bring_encoders(LoadedModel.of(model).text_encoders, WAITING)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def free_encoders(pipe: Any, *, vae: bool = False) -> None:
    """Drops the text encoders, and the VAE if asked, from a pipeline whose texts and pictures are cached, and their memory with them."""
    names = [n for n in pipe.components if n.startswith("text_encoder")] + (["vae"] if vae else [])
    pipe.register_modules(**dict.fromkeys(names))
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
