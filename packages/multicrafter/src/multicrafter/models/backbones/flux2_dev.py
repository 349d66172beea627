"""FLUX.2-dev: klein's network, larger and guidance-distilled, with Mistral's states as text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from multicrafter.models.backbones.base import count_parameters, on_meta
from multicrafter.models.backbones.flux2_klein import Flux2Klein
from multicrafter.models.flux.model import Text


class Flux2Dev(Flux2Klein):
    """FLUX.2-dev (32B, and a text encoder of 24B). The guidance is embedded, as in FLUX.1-dev."""

    name = "flux2_dev"
    pipeline_class = "Flux2Pipeline"
    hub_id = "black-forest-labs/FLUX.2-dev"
    licence = "FLUX [dev] Non-Commercial License"
    full_config: ClassVar[dict[str, Any]] = {
        **Flux2Klein.full_config,
        "num_layers": 8,
        "num_single_layers": 48,
        "num_attention_heads": 48,
        "joint_attention_dim": 15360,
        "guidance_embeds": True,
    }
    default_guidance = 4.0
    default_true_guidance = 1.0
    default_num_steps = 28

    def matches(self, pipe_or_transformer: Any) -> bool:
        """By the pipeline alone: the transformer is klein's class."""
        return type(pipe_or_transformer).__name__ == self.pipeline_class

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Text:
        """Hidden states of Mistral after a quarter, a half and three quarters of its layers, side by side (b, n, 3d)."""
        layers = pipe.text_encoder.config.text_config.num_hidden_layers
        embeds, _ = pipe.encode_prompt(
            prompt=list(prompts),
            device=pipe.text_encoder.device,
            max_sequence_length=self._text_length(pipe),
            text_encoder_out_layers=tuple(layers * k // 4 for k in (1, 2, 3)),
        )
        return Text(embeds, None)

    def _text_length(self, pipe: Any) -> int:
        """Tokens that a prompt is padded to."""
        return min(int(pipe.tokenizer.tokenizer.model_max_length), int(pipe.tokenizer_max_length))

    def count_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        """See `Backbone.count_tokens`; the system message and the chat template around a prompt count."""
        from diffusers.pipelines.flux2.pipeline_flux2 import format_input

        messages = format_input(prompts=[prompt], system_message=pipe.system_message)
        found = pipe.tokenizer.apply_chat_template(
            messages, add_generation_prompt=False, tokenize=True, return_dict=True, return_tensors="pt"
        )
        return int(found["input_ids"].shape[1]), self._text_length(pipe)

    def has_true_guidance(self, pipe: Any) -> bool:
        """A second pass means something; it is off unless asked for, because guidance was distilled in."""
        return True

    def text_encoder_parameters(self) -> int:
        """Mistral Small 3, 24B, its vision part included."""
        from transformers import Mistral3Config, Mistral3ForConditionalGeneration

        config = Mistral3Config(
            text_config={
                "model_type": "mistral", "vocab_size": 131072, "hidden_size": 5120, "intermediate_size": 32768,
                "num_hidden_layers": 40, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
                "tie_word_embeddings": False,
            },
            vision_config={
                "model_type": "pixtral", "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                "num_attention_heads": 16, "head_dim": 64, "patch_size": 14, "image_size": 1540,
            },
            tie_word_embeddings=False,
        )  # fmt: skip
        return count_parameters(on_meta(lambda: Mistral3ForConditionalGeneration(config)))
