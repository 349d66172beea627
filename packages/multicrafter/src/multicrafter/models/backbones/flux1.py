"""FLUX.1-dev, and FLUX.1-Kontext-dev with the reference ids it was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multicrafter.models.backbones.base import Backbone, ReferenceCache, count_parameters, on_meta, refuse_cache
from multicrafter.models.flux.model import Text, encode_prompts, predict_velocity
from multicrafter.models.flux.packing import Grid, diagonal_ids, grid_ids


class Flux1(Backbone):
    """FLUX.1-dev (and everything of its class): T5 and CLIP, 3 position axes, references on the diagonal (UNO)."""

    name = "flux1_dev"
    pipeline_class = "FluxPipeline"
    transformer_class = "FluxTransformer2DModel"
    parts = (
        "model_index.json", "transformer", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2", "scheduler",
    )  # fmt: skip
    hub_id = "black-forest-labs/FLUX.1-dev"
    licence = "FLUX.1 [dev] Non-Commercial License"
    attention = r"(single_)?transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    ffn_linears = r"transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)|single_transformer_blocks\.\d+\.proj_mlp"
    ffn_blocks = (
        r"transformer_blocks\.\d+\.ff",
        r"transformer_blocks\.\d+\.ff_context",
        r"single_transformer_blocks\.\d+\.proj_mlp",
    )
    full_config: ClassVar[dict[str, Any]] = {
        "patch_size": 1,
        "in_channels": 64,
        "num_layers": 19,
        "num_single_layers": 38,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 4096,
        "pooled_projection_dim": 768,
        "guidance_embeds": True,
        "axes_dims_rope": (16, 56, 56),
    }
    default_guidance = 3.5

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Text:
        """T5 states and CLIP's pooled vector."""
        return encode_prompts(pipe, prompts)

    def empty_text(self, transformer: nn.Module, batch: int, length: int) -> Text:
        """Zeros."""
        config: Any = transformer.config
        return Text(
            torch.zeros(batch, length, config.joint_attention_dim), torch.zeros(batch, config.pooled_projection_dim)
        )

    def position_ids(self, image: Grid, references: Sequence[Grid] = ()) -> Tensor:
        """(0, row, column); reference i starts diagonally after everything before it."""
        return diagonal_ids(image, references)

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
        """See `Backbone.velocity`. References see the noise here, so a cache is refused.

        Raises:
            ValueError: ``references`` and ``reference_grids`` disagree, or a cache was given.
        """
        refuse_cache(self.name, cache)
        return predict_velocity(
            transformer, tokens, sigma, text, image_grid=image_grid, references=references,
            reference_grids=reference_grids, guidance=guidance, position_ids=self.position_ids(image_grid, reference_grids),
        )  # fmt: skip

    def text_encoder_parameters(self) -> int:
        """T5-XXL's encoder and CLIP ViT-L/14's text model."""
        from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

        t5 = T5Config(
            vocab_size=32128, d_model=4096, d_kv=64, d_ff=10240, num_layers=24, num_heads=64,
            feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
        )  # fmt: skip
        clip = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        return sum(
            count_parameters(on_meta(lambda f=f, c=c: f(c))) for f, c in ((T5EncoderModel, t5), (CLIPTextModel, clip))
        )


class Flux1Kontext(Flux1):
    """FLUX.1-Kontext-dev: the same network, but reference i lies on plane i + 1 of the first axis, its grid from (0, 0).

    One reference gets exactly the ids of FluxKontextPipeline; several count on (docs/adr/0070).
    """

    name = "flux1_kontext"
    pipeline_class = "FluxKontextPipeline"
    hub_id = "black-forest-labs/FLUX.1-Kontext-dev"
    default_guidance = 2.5

    def matches(self, pipe_or_transformer: Any) -> bool:
        """By the pipeline alone: the transformer is FLUX.1-dev's class."""
        return type(pipe_or_transformer).__name__ == self.pipeline_class

    def position_ids(self, image: Grid, references: Sequence[Grid] = ()) -> Tensor:
        """(plane, row, column): plane 0 is the image, plane i + 1 reference i.

        >>> Flux1Kontext().position_ids((2, 2), [(1, 1), (1, 1)])[4:].tolist()
        [[1.0, 0.0, 0.0], [2.0, 0.0, 0.0]]
        """
        parts = [grid_ids(image)]
        for plane, grid in enumerate(references, start=1):
            ids = grid_ids(grid)
            ids[:, 0] = plane
            parts.append(ids)
        return torch.cat(parts)
