"""Text alignment by a tiny, real `transformers.CLIPModel`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from multicrafter.world.judges.people import as_tensor
from multicrafter.world.tiny_flux import TEXT_TOKENS, build_tokenizers, grammar

if TYPE_CHECKING:
    from transformers import CLIPModel, CLIPTokenizer

MEAN, STD = 0.5, 0.25  # how pictures in [0, 1] are normalised


def build_clip() -> tuple[CLIPModel, CLIPTokenizer]:
    """An untrained CLIP for 64x64 pictures and the captions of the grammar."""
    from transformers import CLIPConfig, CLIPModel

    tokenizer, _ = build_tokenizers(grammar())
    shared = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **shared, "num_hidden_layers": 2, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_TOKENS + 2,
            "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={**shared, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8},
        projection_dim=64,
    )  # fmt: skip
    return CLIPModel(config), tokenizer


class ClipScorer:
    """Cosine between picture and prompt, mapped to [0, 1] by (1 + cos) / 2; signature of id_reward's scorers."""

    def __init__(self, model: CLIPModel, tokenizer: CLIPTokenizer) -> None:
        """Takes a trained CLIP."""
        self.model, self.tokenizer = model.eval(), tokenizer

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipScorer:
        """Loads a CLIPModel directory with its tokenizer."""
        from transformers import CLIPModel, CLIPTokenizer

        return cls(CLIPModel.from_pretrained(folder).float(), CLIPTokenizer.from_pretrained(folder))

    def embed_text(self, prompts: Sequence[str]) -> Tensor:
        """Unit text embeddings (b, d)."""
        tokens = self.tokenizer(
            list(prompts), padding=True, truncation=True, max_length=TEXT_TOKENS + 2, return_tensors="pt"
        )
        return torch.nn.functional.normalize(self.model.get_text_features(**tokens).pooler_output, dim=1)

    def embed_pictures(self, images: Sequence[Any] | Tensor) -> Tensor:
        """Unit picture embeddings (b, d); pictures are resized to 64x64."""
        pixels = torch.stack(
            [
                p
                if p.shape[1:] == (64, 64)
                else torch.nn.functional.interpolate(p[None], (64, 64), mode="bilinear", antialias=True)[0]
                for p in as_tensor(images)
            ]
        )
        return torch.nn.functional.normalize(
            self.model.get_image_features(pixel_values=(pixels - MEAN) / STD).pooler_output, dim=1
        )

    @torch.inference_mode()
    def __call__(
        self, images: Sequence[Any] | Tensor, prompts: Sequence[str], references: Sequence[Sequence[Any]] = ()
    ) -> np.ndarray:
        """One score per picture."""
        return ((1 + (self.embed_pictures(images) * self.embed_text(prompts)).sum(1)) / 2).numpy().astype(np.float64)
