"""A FLUX of some hundred thousand weights that paints stripes after seconds of teaching: it has all parts, so examples need no download."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch


def _tokenizer(words: Sequence[str], length: int) -> Any:
    """Whole words, whitespace between."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: number for number, word in enumerate(["<pad>", "<unk>", *sorted(set(words))])}
    model = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", unk_token="<unk>", eos_token="<unk>", model_max_length=length
    )


def tiny_flux(prompts: Sequence[str], *, seed: int = 0) -> Any:
    """A ``FluxPipeline`` with weights drawn at random, for pictures whose sides are multiples of 4; it knows the words of ``prompts``.

    Args:
        prompts: Sentences.
        seed: Of the weights.
    """
    import diffusers
    import transformers

    words = " ".join(prompts).split()
    clip = transformers.CLIPTextConfig(
        vocab_size=len(words) + 2, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=16, projection_dim=32, bos_token_id=None, eos_token_id=1,
    )  # fmt: skip
    t5 = transformers.T5Config(vocab_size=len(words) + 2, d_model=32, d_kv=16, d_ff=32, num_layers=1, num_heads=2)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        pipe = diffusers.FluxPipeline(
            diffusers.FlowMatchEulerDiscreteScheduler(),
            diffusers.AutoencoderKL(
                in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(16, 16), norm_num_groups=4,
                down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2, shift_factor=0.0,
                scaling_factor=0.3, use_quant_conv=False, use_post_quant_conv=False,
            ),
            transformers.CLIPTextModel(clip),
            _tokenizer(words, 16),
            transformers.T5EncoderModel(t5),
            _tokenizer(words, 8),
            diffusers.FluxTransformer2DModel(
                in_channels=16, num_layers=1, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
                joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
            ),
        )  # fmt: skip
    for part in (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2):
        part.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def striped_latents(count: int, side: int, generator: torch.Generator) -> torch.Tensor:
    """What it is taught to draw, packed as FLUX packs: (count, side * side, 16), one colour with waves of any height and length."""
    place = torch.arange(2 * side) / (2 * side)
    length = torch.randint(1, side, (count, 1, 1, 2), generator=generator)
    height, colour = torch.rand(count, 1, 1, 1, generator=generator), torch.randn(count, 4, 1, 1, generator=generator)
    waves = (2 * torch.pi * (length[..., :1] * place[:, None] + length[..., 1:] * place)).sin()
    pictures = 0.5 * colour + 2 * height * waves * torch.tensor([1.0, -1.0, 1.0, -1.0])[:, None, None]
    parts = pictures.reshape(count, 4, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5)
    return parts.reshape(count, side * side, 16)


def teach(pipe: Any, *, side: int = 8, steps: int = 200, seed: int = 0) -> list[float]:
    """Flow matching on `striped_latents`, without prompts; returns the losses. Some seconds on a CPU."""
    generator, transformer = torch.Generator().manual_seed(seed), pipe.transformer
    rows, columns = torch.arange(side).repeat_interleave(side), torch.arange(side).repeat(side)
    ids = torch.stack([torch.zeros(side * side), rows, columns], 1)  # where each token stands, as FLUX counts
    text, pooled, text_ids = torch.zeros(16, 8, 32), torch.zeros(16, 32), torch.zeros(8, 3)
    optimizer, losses = torch.optim.Adam(transformer.parameters(), lr=3e-3), []
    for step in range(steps):
        data = striped_latents(16, side, generator)
        noise, sigma = torch.randn(data.shape, generator=generator), torch.rand(16, generator=generator)
        mixed = torch.lerp(data, noise, sigma[:, None, None])
        velocity = transformer(mixed, text, pooled, sigma, ids, text_ids, return_dict=False)[0]
        loss = (velocity - (noise - data)).square().mean()
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
