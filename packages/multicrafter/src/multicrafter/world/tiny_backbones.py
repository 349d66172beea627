"""Tiny random pipelines of the real classes, for tests of a backbone without its weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from multicrafter.world.tiny_flux import TinyFluxConfig, build_pipeline, grammar

if TYPE_CHECKING:
    from transformers import Qwen2TokenizerFast

CHAT = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MISTRAL_CHAT = (
    "<s>{% for message in messages %}{% if message['role'] == 'system' %}[SYSTEM]{{ message['content'][0]['text'] }}[/SYSTEM]"
    "{% else %}[INST]{% for part in message['content'] %}{{ part['text'] }}{% endfor %}[/INST]{% endif %}{% endfor %}"
)
QWEN3_CHAT = "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'][0]['text'] }}<|im_end|>\n{% endfor %}"
TEXT_TOKENS = 32


def tiny_flux1(config: TinyFluxConfig | None = None, *, guidance_embeds: bool = False, seed: int = 0) -> Any:
    """A `FluxPipeline`; with ``guidance_embeds`` it takes the guidance as FLUX.1-dev does."""
    pipe = build_pipeline(config, seed=seed)
    if guidance_embeds:
        from diffusers import FluxTransformer2DModel

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipe.register_modules(
                transformer=FluxTransformer2DModel.from_config({**pipe.transformer.config, "guidance_embeds": True})
            )
    return pipe


def tiny_kontext(config: TinyFluxConfig | None = None, *, seed: int = 0) -> Any:
    """A `FluxKontextPipeline`."""
    from diffusers import FluxKontextPipeline

    return FluxKontextPipeline(**{**tiny_flux1(config, guidance_embeds=True, seed=seed).components})


VISION_MARKS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def build_qwen_tokenizer(
    *, marks: Sequence[str] = (), texts: Sequence[str] = (), vocab_size: int = 512, max_length: int = TEXT_TOKENS
) -> Qwen2TokenizerFast:
    """A byte-level BPE with the chat marks of Qwen (and ``marks``), trained on the captions of the tiny world (and ``texts``)."""
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import Qwen2TokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *marks]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        [*grammar(), *texts],
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=marks,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    made: Qwen2TokenizerFast = Qwen2TokenizerFast(
        vocab=model["vocab"], merges=merges, model_max_length=max_length, unk_token=marks[0], pad_token=marks[0],
        eos_token=marks[2], additional_special_tokens=marks[1:],
    )  # fmt: skip
    made.chat_template = CHAT
    return made


def tiny_flux2_parts(
    *, num_heads: int, head_dim: int, num_double: int, num_single: int, width: int, guidance_embeds: bool
) -> dict[str, Any]:
    """VAE (divides by 4), transformer and scheduler of a tiny FLUX.2, by the names of its pipelines; ``width`` is the text encoder's."""
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    channels = 4
    vae = AutoencoderKLFlux2(
        in_channels=3, out_channels=3, down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3, block_out_channels=(8, 8, 8), layers_per_block=1,
        latent_channels=channels, norm_num_groups=8, sample_size=64, mid_block_add_attention=False,
    )  # fmt: skip
    vae.bn.running_mean.uniform_(-0.5, 0.5)
    vae.bn.running_var.uniform_(0.5, 2.0)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * channels, num_layers=num_double, num_single_layers=num_single, attention_head_dim=head_dim,
        num_attention_heads=num_heads, joint_attention_dim=3 * width, timestep_guidance_channels=16,
        axes_dims_rope=(head_dim // 4,) * 4, guidance_embeds=guidance_embeds,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    return {"vae": vae, "transformer": transformer, "scheduler": scheduler}


def tiny_flux2_dev(
    *, num_heads: int = 2, head_dim: int = 32, num_double: int = 1, num_single: int = 2, seed: int = 0
) -> Any:
    """A `Flux2Pipeline` with a Mistral 3 of four layers, whose pictures nobody uses, and a VAE that divides by 4."""
    from diffusers import Flux2Pipeline
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PixtralImageProcessor, PixtralProcessor

    marks = ["<s>", "</s>", "[SYSTEM]", "[/SYSTEM]", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = build_qwen_tokenizer(marks=marks, texts=[SYSTEM_MESSAGE] * 50, vocab_size=640, max_length=64)
    width, patch = 16, 14
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = Mistral3Config(
            text_config={
                "model_type": "mistral", "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width,
                "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
            },
            vision_config={
                "model_type": "pixtral", "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 1,
                "num_attention_heads": 2, "head_dim": 8, "patch_size": patch, "image_size": 4 * patch,
            },
            image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        )  # fmt: skip
        encoder = Mistral3ForConditionalGeneration(config)
        parts = tiny_flux2_parts(
            num_heads=num_heads, head_dim=head_dim, num_double=num_double, num_single=num_single, width=width,
            guidance_embeds=True,
        )  # fmt: skip
    processor = PixtralProcessor(
        PixtralImageProcessor(patch_size=patch), tokenizer, patch_size=patch, chat_template=MISTRAL_CHAT
    )
    return Flux2Pipeline(text_encoder=encoder, tokenizer=processor, **parts)


def tiny_klein(
    *,
    kv: bool = False,
    distilled: bool = False,
    num_heads: int = 2,
    head_dim: int = 32,
    num_double: int = 1,
    num_single: int = 2,
    seed: int = 0,
) -> Any:
    """A `Flux2KleinPipeline` (or `Flux2KleinKVPipeline`) with a Qwen3 of four layers and a VAE that divides by 4."""
    from diffusers import Flux2KleinKVPipeline, Flux2KleinPipeline
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = build_qwen_tokenizer()
    width = 16
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        encoder = Qwen3ForCausalLM(
            Qwen3Config(
                vocab_size=len(tokenizer),
                hidden_size=width,
                intermediate_size=2 * width,
                num_hidden_layers=4,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=8,
                tie_word_embeddings=True,
            )
        )
        parts = tiny_flux2_parts(
            num_heads=num_heads, head_dim=head_dim, num_double=num_double, num_single=num_single, width=width,
            guidance_embeds=False,
        )  # fmt: skip
    parts = {"text_encoder": encoder, "tokenizer": tokenizer, **parts}
    return Flux2KleinKVPipeline(**parts) if kv else Flux2KleinPipeline(**parts, is_distilled=distilled)


def tiny_qwen(
    *, zero_cond_t: bool = True, num_heads: int = 2, head_dim: int = 32, num_layers: int = 2, seed: int = 0
) -> Any:
    """A `QwenImageEditPlusPipeline`, as of 2511 or, without ``zero_cond_t``, 2509; a reference is four text tokens, the VAE divides by 4."""
    import inspect

    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImageEditPlusPipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import (
        Qwen2_5_VLConfig,
        Qwen2_5_VLForConditionalGeneration,
        Qwen2VLImageProcessor,
        Qwen2VLProcessor,
        Qwen2VLVideoProcessor,
    )

    template = inspect.getsource(
        QwenImageEditPlusPipeline.__init__
    )  # its words are to be tokens, as in the real vocabulary
    tokenizer = build_qwen_tokenizer(marks=VISION_MARKS, texts=[template] * 50, vocab_size=1024, max_length=1024)
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(mark) for n, mark in zip(names, VISION_MARKS, strict=True)}
    width, channels, side = 16, 4, 28
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=channels, dim_mult=[1, 1, 1], num_res_blocks=1, attn_scales=[], temperal_downsample=[False, True],
            latents_mean=[-0.3, -0.1, 0.1, 0.3], latents_std=[0.5, 0.8, 1.2, 1.5],
        )  # fmt: skip
        config = Qwen2_5_VLConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 0,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            },
            vision_config={
                "depth": 2, "hidden_size": width, "intermediate_size": 2 * width, "num_heads": 2, "out_hidden_size": width,
                "fullatt_block_indexes": [1], "window_size": 56,
            },
            **ids,
        )  # fmt: skip
        transformer = QwenImageTransformer2DModel(
            patch_size=2, in_channels=4 * channels, out_channels=channels, num_layers=num_layers, attention_head_dim=head_dim,
            num_attention_heads=num_heads, joint_attention_dim=width, zero_cond_t=zero_cond_t,
            axes_dims_rope=(head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8),
        )  # fmt: skip
        sizes = {"min_pixels": side**2 * 4, "max_pixels": side**2 * 4}
        processor = Qwen2VLProcessor(
            Qwen2VLImageProcessor(**sizes), tokenizer, Qwen2VLVideoProcessor(**sizes), chat_template=CHAT
        )
        return QwenImageEditPlusPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0), vae=vae,
            text_encoder=Qwen2_5_VLForConditionalGeneration(config), tokenizer=tokenizer, processor=processor,
            transformer=transformer,
        )  # fmt: skip


def tiny_qwen21(
    *, num_heads: int = 2, head_dim: int = 32, num_layers: int = 2, causal_condition: bool = True, seed: int = 0
) -> Any:
    """A `QwenImage21Pipeline`; its VAE divides by 16, as the pipeline wants it, and a token has 16 pixels."""
    import inspect

    from diffusers import (
        AutoencoderKLQwenImage21,
        FlowMatchEulerDiscreteScheduler,
        QwenImage21Pipeline,
        QwenImage21Transformer2DModel,
    )
    from transformers import (
        Qwen2VLImageProcessor,
        Qwen3VLConfig,
        Qwen3VLForConditionalGeneration,
        Qwen3VLProcessor,
        Qwen3VLVideoProcessor,
    )

    template = inspect.getsource(QwenImage21Pipeline.__init__) + "".join(f"<image{i}>" for i in range(1, 6))
    tokenizer = build_qwen_tokenizer(marks=VISION_MARKS, texts=[template] * 50, vocab_size=1024, max_length=1024)
    names = ("vision_start", "vision_end", "image", "video")
    ids = {f"{n}_token_id": tokenizer.convert_tokens_to_ids(mark) for n, mark in zip(names, VISION_MARKS, strict=True)}
    width, channels, side = 16, 4, 32
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = AutoencoderKLQwenImage21(
            base_dim=8, decoder_base_dim=8, z_dim=channels, dim_mult=[1, 1, 1, 1, 1], num_res_blocks=1, attn_scales=[],
            temperal_downsample=[False, True, True, True], latents_mean=[-0.3, -0.1, 0.1, 0.3], latents_std=[0.5, 0.8, 1.2, 1.5],
        )  # fmt: skip
        config = Qwen3VLConfig(
            text_config={
                "vocab_size": len(tokenizer), "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2,
                "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0,
                "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            },
            vision_config={
                "depth": 2, "hidden_size": width, "intermediate_size": 2 * width, "num_heads": 2, "out_hidden_size": width,
                "num_position_embeddings": 64, "deepstack_visual_indexes": [0],
            },
            **ids,
        )  # fmt: skip
        transformer = QwenImage21Transformer2DModel(
            in_channels=channels, out_channels=channels, num_layers=num_layers, attention_head_dim=head_dim,
            num_attention_heads=num_heads, context_in_dim=width, causal_condition=causal_condition,
            axes_dims_rope=(head_dim // 4, 3 * head_dim // 8, 3 * head_dim // 8),
        )  # fmt: skip
        sizes = {"size": {"shortest_edge": side**2, "longest_edge": 64 * side**2}, "patch_size": 16}
        processor = Qwen3VLProcessor(
            Qwen2VLImageProcessor(**sizes), tokenizer, Qwen3VLVideoProcessor(patch_size=16), chat_template=QWEN3_CHAT
        )
        return QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=1.0), vae=vae,
            text_encoder=Qwen3VLForConditionalGeneration(config), processor=processor, transformer=transformer,
        )  # fmt: skip


TINY = {
    "flux1_dev": tiny_flux1,
    "flux1_kontext": tiny_kontext,
    "flux2_klein": tiny_klein,
    "flux2_dev": tiny_flux2_dev,
    "qwen_image_edit": tiny_qwen,
    "qwen_image_21": tiny_qwen21,
}
"""Builders by backbone name; the KV variant is ``tiny_klein(kv=True)``."""
