"""FLUX.2-klein: Qwen3 states of three layers, 4 position axes, a VAE whose packed latents are normalised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multicrafter.models.backbones.base import (
    Backbone,
    ReferenceCache,
    check_references,
    count_parameters,
    on_meta,
    refuse_cache,
)
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid, grid_ids, pack_latents, unpack_latents

REFERENCE_SPACING = 10  # planes between references on the T axis, as in Flux2KleinPipeline


class Flux2Klein(Backbone):
    """FLUX.2-klein (4B, Apache-2.0): the base one for training, the distilled one (4 steps, no guidance) for speed."""

    name = "flux2_klein"
    pipeline_class = "Flux2KleinPipeline"
    transformer_class = "Flux2Transformer2DModel"
    parts = ("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "scheduler")
    hub_id = "black-forest-labs/FLUX.2-klein-base-4B"
    licence = "Apache-2.0"
    attention = (
        r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
        r"|single_transformer_blocks\.\d+\.attn\.to_qkv_mlp_proj"
    )
    ffn_linears = (
        r"transformer_blocks\.\d+\.ff(_context)?\.linear_(in|out)|single_transformer_blocks\.\d+\.attn\.to_out"
    )
    ffn_blocks = (
        r"transformer_blocks\.\d+\.ff",
        r"transformer_blocks\.\d+\.ff_context",
        r"single_transformer_blocks\.\d+\.attn\.to_out",  # attention and FFN are one projection: docs/adr/0071
    )
    full_config: ClassVar[dict[str, Any]] = {
        "patch_size": 1,
        "in_channels": 128,
        "num_layers": 5,
        "num_single_layers": 20,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 7680,
        "timestep_guidance_channels": 256,
        "mlp_ratio": 3.0,
        "axes_dims_rope": (32, 32, 32, 32),
        "rope_theta": 2000,
        "eps": 1e-6,
        "guidance_embeds": False,
    }
    default_true_guidance = 4.0

    # Text

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Text:
        """Hidden states of Qwen3 after a quarter, a half and three quarters of its layers, side by side (b, n, 3d)."""
        layers = pipe.text_encoder.config.num_hidden_layers
        embeds, _ = pipe.encode_prompt(
            prompt=list(prompts),
            device=pipe.text_encoder.device,
            max_sequence_length=min(int(pipe.tokenizer.model_max_length), 512),
            text_encoder_out_layers=tuple(layers * k // 4 for k in (1, 2, 3)),
        )
        return Text(embeds, None)

    def count_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        """See `Backbone.count_tokens`; the chat template around a prompt counts."""
        text = pipe.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        return len(pipe.tokenizer(text).input_ids), min(int(pipe.tokenizer.model_max_length), 512)

    def empty_text(self, transformer: nn.Module, batch: int, length: int) -> Text:
        """Zeros."""
        config: Any = transformer.config
        return Text(torch.zeros(batch, length, config.joint_attention_dim), None)

    # Pictures

    def _statistics(self, vae: Any) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation (d,) of packed latents, kept in the VAE's batch norm."""
        return vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """Packed posterior modes, normalised per channel."""
        mean, std = self._statistics(pipe.vae)
        latents = pipe.vae.encode(pictures.to(pipe.vae.device, pipe.vae.dtype) * 2 - 1).latent_dist.mode()
        tokens = pack_latents(latents)
        return (tokens - mean.to(tokens.dtype)) / std.to(tokens.dtype)

    def decode_pictures(self, pipe: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """Inverse of `encode_pictures`."""
        mean, std = self._statistics(pipe.vae)
        tokens = tokens.to(pipe.vae.dtype)
        latents = unpack_latents(tokens * std.to(tokens.dtype) + mean.to(tokens.dtype), grid)
        found: Tensor = (pipe.vae.decode(latents).sample.float() / 2 + 0.5).clamp(0, 1)
        return found

    # Places

    def position_ids(self, image: Grid, references: Sequence[Grid] = ()) -> Tensor:
        """(t, row, column, 0): the image at t = 0, reference i at t = 10 (i + 1).

        >>> Flux2Klein().position_ids((2, 2), [(1, 1), (1, 1)])[4:].tolist()
        [[10.0, 0.0, 0.0, 0.0], [20.0, 0.0, 0.0, 0.0]]
        """
        parts = []
        for plane, grid in enumerate((image, *references)):
            ids = nn.functional.pad(grid_ids(grid), (0, 1))
            ids[:, 0] = REFERENCE_SPACING * plane
            parts.append(ids)
        return torch.cat(parts)

    def text_ids(self, length: int) -> Tensor:
        """(0, 0, 0, i)."""
        return nn.functional.pad(torch.arange(length, dtype=torch.float32)[:, None], (3, 0))

    # Velocity

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
        check_references(references, reference_grids)
        refuse_cache(self.name, cache)
        return transformer(  # type: ignore[no-any-return]
            hidden_states=torch.cat([tokens, *references], dim=1),
            img_ids=self.position_ids(image_grid, reference_grids).to(tokens.device),
            **self._inputs(transformer, tokens, sigma, text, guidance),
        )[0][:, : tokens.shape[1]]

    def _inputs(self, transformer: Any, tokens: Tensor, sigma: Tensor, text: Text, guidance: float) -> dict[str, Any]:
        embedded = torch.full((len(tokens),), guidance, device=tokens.device)
        return {
            "encoder_hidden_states": text.embeds,
            "timestep": sigma,
            "guidance": embedded if self.embeds_guidance(transformer) else None,
            "txt_ids": self.text_ids(text.embeds.shape[1]).to(tokens.device),
            "return_dict": False,
        }

    def shift_exponent(self, config: Any, num_steps: int, num_tokens: int) -> float:
        """Exponent mu as FLUX.2 computes it from tokens and steps."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        return float(compute_empirical_mu(image_seq_len=num_tokens, num_steps=num_steps))

    def has_true_guidance(self, pipe: Any) -> bool:
        """Not where the model was distilled into few steps."""
        return not getattr(pipe.config, "is_distilled", False)

    def text_encoder_parameters(self) -> int:
        """Qwen3-4B."""
        from transformers import Qwen3Config, Qwen3ForCausalLM

        config = Qwen3Config(
            vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, num_attention_heads=32,
            num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        )  # fmt: skip
        return count_parameters(on_meta(lambda: Qwen3ForCausalLM(config)))

    def vae_parameters(self) -> int:
        """Of the FLUX.2 VAE."""
        from diffusers import AutoencoderKLFlux2

        return count_parameters(on_meta(AutoencoderKLFlux2))
