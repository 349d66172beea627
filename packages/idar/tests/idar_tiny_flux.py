"""A whole `FluxPipeline` of a few thousand random weights, and a plain picture: for tests that need a pipeline of the real class."""

from __future__ import annotations

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
from PIL import Image

WORDS = ["two", "people", "in", "a", "park"]


def picture(width: int, height: int, color: tuple[int, int, int] = (200, 30, 30)) -> Image.Image:
    return Image.new("RGB", (width, height), color)


def tiny_flux() -> FluxPipeline:
    """Every part of a FLUX.1 pipeline in its real format; nothing of it trained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import CLIPTextConfig, CLIPTextModel, PreTrainedTokenizerFast, T5Config, T5EncoderModel

    torch.manual_seed(0)
    vocabulary = {w: i for i, w in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizers = [
        PreTrainedTokenizerFast(
            tokenizer_object=raw, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=6
        )
        for _ in range(2)
    ]
    clip = CLIPTextConfig(
        vocab_size=8, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=6,
        bos_token_id=0, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=8, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, is_encoder_decoder=False, use_cache=False
    )
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        layers_per_block=1, latent_channels=4, norm_num_groups=4, sample_size=24, scaling_factor=0.5, shift_factor=0.1,
        use_quant_conv=False, use_post_quant_conv=False, mid_block_add_attention=False,
    )  # fmt: skip
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=2, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    return FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae, text_encoder=CLIPTextModel(clip), tokenizer=tokenizers[0],
        text_encoder_2=T5EncoderModel(t5).eval(), tokenizer_2=tokenizers[1], transformer=transformer,
    )  # fmt: skip
