"""The tiny FLUX: a genuine diffusers pipeline, small enough to train on two CPU cores.

Every part is the real class (FluxTransformer2DModel, AutoencoderKL, T5EncoderModel, CLIPTextModel, both tokenizers,
FlowMatchEulerDiscreteScheduler), so that `FluxPipeline.from_pretrained` loads what `save_pretrained` wrote.
"""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from multicrafter import UserError
from multicrafter.models.checks import check_finite
from multicrafter.world import ARRANGEMENTS, FAMILIES, SETTINGS, TIMES, caption

if TYPE_CHECKING:
    from diffusers import AutoencoderKL, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextModel, CLIPTokenizer, T5EncoderModel, T5TokenizerFast

TEXT_TOKENS = 16  # the longest caption of the grammar has 13 words


@dataclass(frozen=True, kw_only=True)
class TinyFluxConfig:
    """Sizes of the tiny FLUX.

    Attributes:
        num_heads: Attention heads of `head_dim` each; the width is their product.
        head_dim: Width of a head; the rotary axes take (1/4, 3/8, 3/8) of it.
        num_double: Double-stream blocks.
        num_single: Single-stream blocks.
        latent_channels: Channels of the VAE's latents; a token holds 4 of them per channel.
        vae_channels: Widths of the VAE's three levels (two of them halve the resolution).
        text_width: Width of the T5 encoder and of the CLIP text model.
        guidance_embeds: Whether the transformer takes the guidance as an input, as FLUX.1-dev does.
    """

    num_heads: int = 4
    head_dim: int = 32
    num_double: int = 3
    num_single: int = 4
    latent_channels: int = 8
    vae_channels: tuple[int, int, int] = (24, 48, 96)
    text_width: int = 64
    guidance_embeds: bool = False

    def __post_init__(self) -> None:
        check_finite(self)
        if self.head_dim % 16:
            raise UserError(f"head_dim must be a multiple of 16, got {self.head_dim}")
        for name in ("num_heads", "num_double", "num_single", "latent_channels", "text_width"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, got {getattr(self, name)}")

    @property
    def width(self) -> int:
        """Width of the transformer."""
        return self.num_heads * self.head_dim


def build_vae(config: TinyFluxConfig) -> AutoencoderKL:
    """A randomly initialised AutoencoderKL that divides the resolution by 4."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=config.vae_channels,
        layers_per_block=1,
        latent_channels=config.latent_channels,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=1.0,
        shift_factor=0.0,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def build_transformer(config: TinyFluxConfig) -> FluxTransformer2DModel:
    """A randomly initialised FluxTransformer2DModel."""
    from diffusers import FluxTransformer2DModel

    quarter = config.head_dim // 4
    return FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * config.latent_channels,
        num_layers=config.num_double,
        num_single_layers=config.num_single,
        attention_head_dim=config.head_dim,
        num_attention_heads=config.num_heads,
        joint_attention_dim=config.text_width,
        pooled_projection_dim=config.text_width,
        guidance_embeds=config.guidance_embeds,
        axes_dims_rope=(quarter, 3 * quarter // 2, 3 * quarter // 2),
    )


def grammar() -> list[str]:
    """Every caption of the tiny world, people and objects."""
    rows = itertools.product(range(1, 5), range(len(SETTINGS)), range(len(TIMES)))
    return [
        caption(n, s, t, a, family)
        for n, s, t in rows
        for a in range(len(ARRANGEMENTS[n]))
        for family in FAMILIES.values()
    ]


def build_tokenizers(captions: Sequence[str]) -> tuple[CLIPTokenizer, T5TokenizerFast]:
    """A CLIP tokenizer (byte-level BPE) and a T5 tokenizer (unigram) whose vocabularies cover the captions.

    Other text still encodes: to bytes in CLIP's vocabulary, to characters or <unk> in T5's.
    """
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import CLIPTokenizer, T5TokenizerFast

    bpe = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token="<|endoftext|>"))
    bpe.normalizer = normalizers.Lowercase()
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe.train_from_iterator(
        captions,
        trainers.BpeTrainer(
            vocab_size=1024,
            special_tokens=["<|startoftext|>", "<|endoftext|>"],
            initial_alphabet=alphabet,
            end_of_word_suffix="</w>",
            show_progress=False,
        ),
    )
    model = json.loads(bpe.to_str())["model"]
    vocab: dict[str, int] = dict(model["vocab"])
    for letter in alphabet:  # a letter may end a word that the captions never end with it
        vocab.setdefault(letter + "</w>", len(vocab))
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "vocab.json").write_text(json.dumps(vocab))
        Path(folder, "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
        clip = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=TEXT_TOKENS + 2, pad_token="<|endoftext|>")
    words = sorted({w for c in captions for w in c.split()})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -20.0)]
    pieces += (
        [("▁" + w, -4.0) for w in words]
        + [("▁", -8.0)]
        + [(c, -10.0) for c in "abcdefghijklmnopqrstuvwxyz0123456789.,'-"]
    )
    t5 = T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=TEXT_TOKENS)
    return clip, t5


def build_text_encoders(
    config: TinyFluxConfig, clip: CLIPTokenizer, t5: T5TokenizerFast
) -> tuple[CLIPTextModel, T5EncoderModel]:
    """Randomly initialised text encoders for these tokenizers."""
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    width = config.text_width
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=2,
            projection_dim=width,
            max_position_embeddings=TEXT_TOKENS + 2,
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    encoder = T5EncoderModel(
        T5Config(
            vocab_size=len(t5),
            d_model=width,
            d_kv=width // 2,
            d_ff=2 * width,
            num_layers=2,
            num_heads=2,
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
    )
    return text, encoder


def build_pipeline(config: TinyFluxConfig | None = None, *, seed: int = 0) -> FluxPipeline:
    """A randomly initialised tiny FLUX as a diffusers pipeline."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline

    config = config or TinyFluxConfig()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        clip, t5 = build_tokenizers(grammar())
        text, encoder = build_text_encoders(config, clip, t5)
        return FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0, use_dynamic_shifting=False),
            vae=build_vae(config),
            text_encoder=text,
            tokenizer=clip,
            text_encoder_2=encoder,
            tokenizer_2=t5,
            transformer=build_transformer(config),
        )
