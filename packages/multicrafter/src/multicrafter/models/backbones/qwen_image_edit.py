"""Qwen-Image-Edit-2509 and -2511: references go in twice, through the vision-language encoder of the prompt and as clean latents."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from multicrafter.models.backbones.base import (
    Backbone,
    ReferenceCache,
    check_references,
    count_parameters,
    on_meta,
    pad_texts,
    refuse_cache,
)
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid, pack_latents, unpack_latents
from multicrafter.models.pictures import open_picture


class QwenImageEdit(Backbone):
    """Qwen-Image-Edit-2509 and -2511 (20B, Apache-2.0); the second modulates references as if they had no noise (``zero_cond_t``).

    Every block has two streams. Text tokens differ in number from prompt to prompt, so a batch is padded and masked.
    """

    name = "qwen_image_edit"
    pipeline_class = "QwenImageEditPlusPipeline"
    transformer_class = "QwenImageTransformer2DModel"
    parts = ("model_index.json", "transformer", "vae", "text_encoder", "tokenizer", "processor", "scheduler")
    hub_id = "Qwen/Qwen-Image-Edit-2511"
    licence = "Apache-2.0"
    attention = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out)"
    ffn_linears = r"transformer_blocks\.\d+\.(img|txt)_mlp\.net\.(0\.proj|2)"
    ffn_blocks = (r"transformer_blocks\.\d+\.(img|txt)_mlp",)
    full_config: ClassVar[dict[str, Any]] = {
        "patch_size": 2,
        "in_channels": 64,
        "out_channels": 16,
        "num_layers": 60,
        "attention_head_dim": 128,
        "num_attention_heads": 24,
        "joint_attention_dim": 3584,
        "axes_dims_rope": (16, 56, 56),
        "guidance_embeds": False,
        "zero_cond_t": True,
    }
    text_sees_references = True
    default_true_guidance = 4.0
    default_num_steps = 40

    # Text

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Text:
        """See `Backbone.encode_prompts`; the encoder is shown no picture."""
        return self.encode_prompts_with(pipe, prompts, [()] * len(prompts))

    def encode_prompts_with(self, pipe: Any, prompts: Sequence[str], references: Sequence[Sequence[Tensor]]) -> Text:
        """Last hidden states of Qwen2.5-VL for each prompt and its references, padded with zeros; the mask says which are real.

        One prompt at a time, as in diffusers, whose own function counts the pictures of a whole batch for every prompt.
        """
        rows = []
        for prompt, pictures in zip(prompts, references, strict=True):
            seen = [self._seen(pipe, open_picture(picture)) for picture in pictures] or None
            embeds, mask = pipe.encode_prompt(prompt=[prompt], image=seen, device=pipe.text_encoder.device)
            rows.append(Text(embeds, None, mask))
        return pad_texts(rows)

    def _seen(self, pipe: Any, picture: Any) -> Any:
        """A picture at the size that the encoder is shown."""
        from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as diffusers_pipeline

        width, height = diffusers_pipeline.calculate_dimensions(
            diffusers_pipeline.CONDITION_IMAGE_SIZE, picture.width / picture.height
        )
        return pipe.image_processor.resize(picture, height, width)

    def count_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        """See `Backbone.count_tokens`; nothing is cut off, but 1,024 tokens is what diffusers allows."""
        return len(pipe.tokenizer(prompt).input_ids), int(pipe.tokenizer_max_length)

    def empty_text(self, transformer: nn.Module, batch: int, length: int) -> Text:
        """Zeros."""
        config: Any = transformer.config
        return Text(torch.zeros(batch, length, config.joint_attention_dim), None)

    # Pictures

    def vae_factor(self, config: Mapping[str, Any]) -> int:
        """See `Backbone.vae_factor`."""
        return int(2 ** len(config["temperal_downsample"]))

    def picture_size(self, pipe: Any) -> int:
        """See `Backbone.picture_size`; the VAE of a video model names none."""
        return int(pipe.default_sample_size * pipe.vae_scale_factor)

    def _statistics(self, vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, (1, c, 1, 1, 1)."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """Posterior modes of a video of one frame, normalised per channel, then packed."""
        latents = pipe.vae.encode((pictures.to(pipe.vae.device, pipe.vae.dtype) * 2 - 1)[:, :, None]).latent_dist.mode()
        mean, std = self._statistics(pipe.vae, latents)
        return pack_latents(((latents - mean) / std)[:, :, 0])

    def decode_pictures(self, pipe: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """Inverse of `encode_pictures`."""
        latents = unpack_latents(tokens.to(pipe.vae.dtype), grid)[:, :, None]
        mean, std = self._statistics(pipe.vae, latents)
        found: Tensor = (pipe.vae.decode(latents * std + mean).sample[:, :, 0].float() / 2 + 0.5).clamp(0, 1)
        return found

    # Places

    def position_ids(self, image: Grid, references: Sequence[Grid] = ()) -> Tensor:
        """(plane, row, column): plane 0 is the image, plane i + 1 reference i; rows and columns count from the middle of each.

        The transformer makes these itself, from the shapes that it is given.

        >>> QwenImageEdit().position_ids((2, 2), [(1, 1)]).tolist()
        [[0.0, -1.0, -1.0], [0.0, -1.0, 0.0], [0.0, 0.0, -1.0], [0.0, 0.0, 0.0], [1.0, -1.0, -1.0]]
        """
        parts = []
        for plane, (rows, columns) in enumerate((image, *references)):
            ids = torch.full((rows, columns, 3), float(plane))
            ids[..., 1] = torch.arange(rows)[:, None] - (rows - rows // 2)
            ids[..., 2] = torch.arange(columns)[None, :] - (columns - columns // 2)
            parts.append(ids.reshape(-1, 3))
        return torch.cat(parts)

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
        """See `Backbone.velocity`. References attend to the noisy picture, so a cache is refused; no guidance is embedded.

        Raises:
            ValueError: ``references`` and ``reference_grids`` disagree, or a cache was given.
        """
        check_references(references, reference_grids)
        refuse_cache(self.name, cache)
        shapes = [(1, rows, columns) for rows, columns in (image_grid, *reference_grids)]
        return transformer(  # type: ignore[no-any-return]
            hidden_states=torch.cat([tokens, *references], dim=1),
            timestep=sigma,
            encoder_hidden_states=text.embeds,
            encoder_hidden_states_mask=text.mask,
            img_shapes=[shapes] * len(tokens),
            return_dict=False,
        )[0][:, : tokens.shape[1]]

    def embeds_guidance(self, transformer: Any) -> bool:
        """Never: the pipeline of diffusers has the argument for models that do not exist yet."""
        return False

    def guide(self, positive: Tensor, negative: Tensor, scale: float) -> Tensor:
        """Classifier-free guidance whose result keeps the length that each token's velocity has with the prompt.

        v = negative + scale * (positive - negative),   v * |positive| / |v|   (QwenImageEditPlusPipeline of diffusers)
        """
        combined = super().guide(positive, negative, scale)
        return combined * (torch.norm(positive, dim=-1, keepdim=True) / torch.norm(combined, dim=-1, keepdim=True))

    # Size

    def without_effect(self, transformer: nn.Module) -> str:
        """What makes the last block's text, which is thrown away; its keys and values are still read."""
        config: Any = transformer.config
        return rf"transformer_blocks\.{config.num_layers - 1}\.(attn\.(to_add_out|add_q_proj)|txt_mlp(\..+)?)"

    def text_encoder_parameters(self) -> int:
        """Qwen2.5-VL-7B."""
        from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
                "num_attention_heads": 28, "num_key_value_heads": 4,
            },
            vision_config={
                "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 3584,
            },
        )  # fmt: skip
        return count_parameters(on_meta(lambda: Qwen2_5_VLForConditionalGeneration(config)))

    def vae_parameters(self) -> int:
        """Of the Qwen-Image VAE."""
        from diffusers import AutoencoderKLQwenImage

        return count_parameters(on_meta(AutoencoderKLQwenImage))
