"""FLUX.2-klein-KV: references attend to themselves only and are modulated at sigma 0, so their keys and values can be kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from idar import SubjectLayout
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.backbones.base import ReferenceCache, check_references
from multicrafter.models.backbones.flux2_klein import Flux2Klein
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid


class Flux2KleinKV(Flux2Klein):
    """FLUX.2-klein-9B-KV. Image stream ``[references | image]``; a step with a filled cache leaves the references out."""

    name = "flux2_klein_kv"
    pipeline_class = "Flux2KleinKVPipeline"
    hub_id = "black-forest-labs/FLUX.2-klein-9b-kv"
    licence = "FLUX Non-Commercial License"
    caches_references = True
    default_num_steps = 4
    full_config: ClassVar[dict[str, Any]] = {
        **Flux2Klein.full_config,
        "num_layers": 8,
        "num_single_layers": 24,
        "num_attention_heads": 32,
        "joint_attention_dim": 12288,
    }

    def matches(self, pipe_or_transformer: Any) -> bool:
        """By the pipeline alone: the transformer is klein's class."""
        return type(pipe_or_transformer).__name__ == self.pipeline_class

    def layout(self, num_text: int, image: Grid, references: Sequence[Grid]) -> SubjectLayout:
        """``[text | references | image]``."""
        spans, start = [], num_text
        for rows, columns in references:
            spans.append((start, start + rows * columns))
            start += rows * columns
        return SubjectLayout(
            num_text=num_text, image_span=(start, start + image[0] * image[1]), subject_spans=tuple(spans)
        )

    def velocity(
        self,
        transformer: Any,
        tokens: Tensor,
        sigma: Tensor,
        text: Text,
        *,
        image_grid: Grid,
        references: Sequence[Tensor] = (),
        reference_grids: Sequence[Grid] = (),
        guidance: float = 1.0,
        cache: ReferenceCache | None = None,
    ) -> Tensor:
        """See `Backbone.velocity`.

        Raises:
            ValueError: ``references`` and ``reference_grids`` disagree.
        """
        check_references(references, reference_grids)
        inputs = self._inputs(transformer, tokens, sigma, text, guidance)
        ids = self.position_ids(image_grid, reference_grids).to(tokens.device)
        num_image = tokens.shape[1]
        if not references:
            return transformer(hidden_states=tokens, img_ids=ids, **inputs)[0]  # type: ignore[no-any-return]
        use_processors(transformer)
        if cache is not None and cache.filled:
            return transformer(  # type: ignore[no-any-return]
                hidden_states=tokens, img_ids=ids[:num_image], kv_cache=cache.content, kv_cache_mode="cached", **inputs
            )[0]
        velocity, kept = transformer(
            hidden_states=torch.cat([*references, tokens], dim=1),
            img_ids=torch.cat([ids[num_image:], ids[:num_image]]),
            kv_cache_mode="extract",
            num_ref_tokens=len(ids) - num_image,
            **inputs,
        )
        if cache is not None:
            cache.content = kept
        return velocity  # type: ignore[no-any-return]

    def has_true_guidance(self, pipe: Any) -> bool:
        """Never: it was distilled."""
        return False

    def text_encoder_parameters(self) -> int:
        """Qwen3-8B."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        from multicrafter.models.backbones.base import count_parameters, on_meta

        config = Qwen3Config(
            vocab_size=151936, hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=False,
        )  # fmt: skip
        return count_parameters(on_meta(lambda: Qwen3ForCausalLM(config)))


def use_processors(transformer: Any) -> None:
    """Puts diffusers' KV processors in where the plain ones are.

    Raises:
        ValueError: Another processor is there (a capture's, say): it would not see the keywords, and attend to everything.
    """
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2AttnProcessor,
        Flux2KVAttnProcessor,
        Flux2KVParallelSelfAttnProcessor,
        Flux2ParallelSelfAttnProcessor,
    )

    for block in (*transformer.transformer_blocks, *transformer.single_transformer_blocks):
        if type(block.attn.processor) is Flux2AttnProcessor:
            block.attn.set_processor(Flux2KVAttnProcessor())
        elif type(block.attn.processor) is Flux2ParallelSelfAttnProcessor:
            block.attn.set_processor(Flux2KVParallelSelfAttnProcessor())
        elif not isinstance(block.attn.processor, (Flux2KVAttnProcessor, Flux2KVParallelSelfAttnProcessor)):
            found = type(block.attn.processor).__name__
            raise UserError(
                f"transformer must have diffusers' own attention processors for flux2_klein_kv, got {found}"
            )
