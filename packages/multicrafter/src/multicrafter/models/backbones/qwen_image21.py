"""Qwen-Image 2.1: words and references are one causal sequence, which the text encoder lays out; the picture that is drawn is its end."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from idar import SubjectLayout
from torch import Tensor, nn

from multicrafter import UserError
from multicrafter.models.backbones.base import (
    Backbone,
    ReferenceCache,
    check_references,
    count_parameters,
    on_meta,
    pad_texts,
    to_terminal,
)
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid
from multicrafter.models.pictures import open_picture

SLOT = 4
"""Tokens of a picture that one position of the text encoder stands for: 2x2."""


class QwenImage21(Backbone):
    """Qwen-Image 2.1 (7B, research licence); the guidance was distilled in, so that one pass draws a good picture.

    Every block has one stream. Words and references attend only to what precedes them, at sigma 0, so their keys are the same at every step.
    """

    name = "qwen_image_21"
    pipeline_class = "QwenImage21Pipeline"
    transformer_class = "QwenImage21Transformer2DModel"
    parts = ("model_index.json", "transformer", "vae", "text_encoder", "processor", "scheduler")
    hub_id = "Qwen/Qwen-Image-2.1"
    licence = "Qwen Research License"
    attention = r"transformer_blocks\.\d+\.attn\.(to_[qkv]|to_out\.0)"
    ffn_linears = r"transformer_blocks\.\d+\.img_mlp\.(proj|gate_layer|out)"
    ffn_blocks = (r"transformer_blocks\.\d+\.img_mlp",)
    full_config: ClassVar[dict[str, Any]] = {
        "patch_size": 1,
        "in_channels": 64,
        "out_channels": 64,
        "num_layers": 32,
        "attention_head_dim": 128,
        "num_attention_heads": 32,
        "context_in_dim": 4096,
        "mlp_ratio": 3,
        "axes_dims_rope": (16, 56, 56),
        "causal_condition": True,
    }
    caches_references = True
    padding_moves_picture = True
    text_sees_references = True
    default_num_steps = 40
    latents_per_token = 1
    grid_step = 2
    text_width_name = "context_in_dim"

    # Text

    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Text:
        """See `Backbone.encode_prompts`; the encoder is shown no picture."""
        return self.encode_prompts_with(pipe, prompts, [()] * len(prompts))

    def encode_prompts_with(self, pipe: Any, prompts: Sequence[str], references: Sequence[Sequence[Tensor]]) -> Text:
        """States of Qwen3-VL at the words of each prompt, and how many of them precede each reference.

        The states at the pictures themselves are left out: the transformer puts the references' latents in their place. One prompt at a
        time, because diffusers shows all prompts of a call the same pictures. In a batch the picture follows the longest prompt, as it does
        in diffusers: another batch gives it other places. With ``micro_batch`` 1 nothing is padded.
        """
        rows = []
        for prompt, pictures in zip(prompts, references, strict=True):
            seen = [open_picture(picture) for picture in pictures] or None
            embeds, mask, shown = pipe.encode_prompt(prompt=[prompt], image=seen, device=pipe.text_encoder.device)
            if mask is not None:
                raise ValueError(f"a single prompt must not be padded, got a mask {tuple(mask.shape)}")
            pads = shown[0].tolist()
            starts = [i for i, pad in enumerate(pads) if pad and not (i and pads[i - 1])]
            if len(starts) != len(pictures):
                raise UserError(f"the text encoder must be shown {len(pictures)} references, got {len(starts)}")
            slots = torch.tensor([[pads[:start].count(False) for start in starts]]) if pictures else None
            rows.append(Text(embeds[:, ~shown[0]], None, None, slots))
        return pad_texts(rows)

    def count_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        """See `Backbone.count_tokens`; nothing is cut off, but the rotary table ends at 8,192 places, half of which are left to pictures."""
        tokenizer = pipe.processor.tokenizer
        return len(tokenizer(prompt).input_ids), min(int(tokenizer.model_max_length), 4096)

    def empty_text(self, transformer: nn.Module, batch: int, length: int) -> Text:
        """Zeros; references stand before them."""
        config: Any = transformer.config
        return Text(torch.zeros(batch, length, config.context_in_dim), None)

    # Pictures

    def vae_factor(self, config: Mapping[str, Any]) -> int:
        """See `Backbone.vae_factor`."""
        return int(2 ** len(config["temperal_downsample"]))

    def picture_size(self, pipe: Any) -> int:
        """See `Backbone.picture_size`; what the pipeline of diffusers draws where nobody says otherwise."""
        return 1024

    def _statistics(self, vae: Any, like: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each latent channel, (1, c, 1, 1, 1)."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1) for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return mean.to(like.device, like.dtype), std.to(like.device, like.dtype)

    def encode_pictures(self, pipe: Any, pictures: Tensor) -> Tensor:
        """Posterior modes of opaque pictures (the VAE has a fourth channel for transparency), normalised per channel, one token a latent."""
        frames = torch.cat([pictures, torch.ones_like(pictures[:, :1])], dim=1).to(pipe.vae.device, pipe.vae.dtype)
        latents = pipe.vae.encode((frames * 2 - 1)[:, :, None]).latent_dist.mode()
        mean, std = self._statistics(pipe.vae, latents)
        return ((latents - mean) / std)[:, :, 0].flatten(2).transpose(1, 2)

    def decode_pictures(self, pipe: Any, tokens: Tensor, grid: Grid) -> Tensor:
        """Inverse of `encode_pictures`; what is transparent shows white."""
        latents = tokens.to(pipe.vae.dtype).transpose(1, 2).unflatten(2, grid)[:, :, None]
        mean, std = self._statistics(pipe.vae, latents)
        found = (pipe.vae.decode(latents * std + mean).sample[:, :, 0].float() / 2 + 0.5).clamp(0, 1)
        colour, opacity = found[:, :3], found[:, 3:]
        return colour * opacity + 1 - opacity

    # Places

    def position_ids(self, image: Grid, references: Sequence[Grid] = ()) -> Tensor:
        """(frame, row, column) of ``[references | image]`` before any word; rows and columns count from the middle of each.

        The transformer makes these itself. A picture has one frame, and the next one follows after as many as its longer side has tokens.

        >>> QwenImage21().position_ids((2, 2), [(2, 2)])[:, 0].tolist()
        [0.0, 0.0, 0.0, 0.0, 2.0, 2.0, 2.0, 2.0]
        """
        return self._places(0, [0] * len(references), [*references, image])

    def _places(self, num_text: int, slots: Sequence[int], grids: Sequence[Grid]) -> Tensor:
        """(n, 3) of the whole joint sequence: a word advances all three axes by one."""
        parts, frame, word = [], 0, 0
        for slot, (rows, columns) in zip([*slots, num_text], grids, strict=True):
            parts.append(torch.arange(frame, frame + slot - word, dtype=torch.float32)[:, None].expand(-1, 3))
            frame, word = frame + slot - word, slot
            ids = torch.full((rows, columns, 3), float(frame))
            ids[..., 1] = torch.arange(rows)[:, None] - (rows - rows // 2)
            ids[..., 2] = torch.arange(columns)[None, :] - (columns - columns // 2)
            parts.append(ids.reshape(-1, 3))
            frame += max(rows, columns)
        return torch.cat(parts)

    def layout(self, num_text: int, image: Grid, references: Sequence[Grid]) -> SubjectLayout:
        """``[references | text | image]``, for a text that knows of no references; see `layout_of`."""
        return self._layout(num_text, [0] * len(references), image, references)

    def layout_of(self, text: Text, image: Grid, references: Sequence[Grid]) -> SubjectLayout:
        """``[words | reference_1 | words | reference_2 | ... | words | image]``."""
        return self._layout(text.embeds.shape[1], self._slots(text, len(references)), image, references)

    def layout_of_pass(self, kwargs: Mapping[str, Any], image: Grid, references: Sequence[Grid]) -> SubjectLayout:
        """See `Backbone.layout_of_pass`; read off ``img_mask``."""
        from idar.integrations.diffusers import qwen21_layout

        return qwen21_layout(dict(kwargs))

    def _layout(
        self, num_text: int, slots: Sequence[int], image: Grid, references: Sequence[Grid]
    ) -> SubjectLayout:  # fmt: skip
        spans = []
        before = 0
        for slot, (rows, columns) in zip(slots, references, strict=True):
            spans.append((slot + before, slot + before + rows * columns))
            before += rows * columns
        start = num_text + before
        stop = start + image[0] * image[1]
        return SubjectLayout(
            num_text=num_text, image_span=(start, stop), subject_spans=tuple(spans), length=stop, causal=True
        )

    @staticmethod
    def _slots(text: Text, count: int) -> list[int]:
        """Words before each reference; none where the text was encoded without references.

        Raises:
            ValueError: It was encoded with another number of them.
        """
        if text.slots is None:
            return [0] * count
        slots: list[list[int]] = text.slots.tolist()
        if any(len(row) != count or row != slots[0] for row in slots):
            raise UserError(f"text must be encoded with the {count} references of the pass, got their places {slots}")
        return slots[0]

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
        """See `Backbone.velocity`; no guidance is embedded.

        Raises:
            ValueError: ``references`` and ``reference_grids`` disagree, a grid has odd sides, the text was encoded with other references, or a
                cache was given to a transformer whose references see the noise level.
        """
        check_references(references, reference_grids)
        grids = [*reference_grids, image_grid]
        if odd := [grid for grid in grids if grid[0] % 2 or grid[1] % 2]:
            raise UserError(f"grids must have even rows and columns for {self.name}, got {odd[0]}")
        if cache is not None and not transformer.config.causal_condition:
            raise UserError(f"cache must be None: this {self.name} shows its references the noise level")
        slots, sizes = self._slots(text, len(references)), [r.shape[1] for r in references]
        edges = list(itertools.pairwise([0, *slots, text.embeds.shape[1]]))
        embeds, mask, pads = [], [], []
        for (start, stop), size in zip(edges, [*sizes, 0], strict=True):
            words, slot = text.embeds[:, start:stop], size // SLOT
            embeds += [words, words.new_zeros(len(words), slot, words.shape[2])]
            if text.mask is not None:
                mask += [text.mask[:, start:stop], text.mask.new_ones(len(words), slot)]
            pads += [False] * (stop - start) + [True] * slot
        pads += [True] * (tokens.shape[1] // SLOT)
        kept = {}
        if cache is not None:
            kept = {"kv_cache_mode": "cached" if cache.filled else "extract", "kv_cache": _kept(transformer, cache)}
        with self._without_values(transformer, text, slots, grids) if _has_no_values(tokens) else _as_it_is():
            output = transformer(
                hidden_states=torch.cat([*references, tokens], dim=1),
                timestep=sigma,
                encoder_hidden_states=torch.cat(embeds, dim=1),
                encoder_hidden_states_mask=torch.cat(mask, dim=1) if mask else None,
                img_shapes=[[(1, rows, columns) for rows, columns in grids]] * len(tokens),
                img_mask=torch.tensor([pads], device=tokens.device).expand(len(tokens), -1),
                return_dict=False,
                **kept,
            )[0]
        return output[:, -tokens.shape[1] :]  # type: ignore[no-any-return]

    @contextmanager
    def _without_values(
        self, transformer: Any, text: Text, slots: Sequence[int], grids: Sequence[Grid]
    ) -> Iterator[None]:
        """The transformer's forward on tensors without values (`multicrafter plan`): what it reads off masks is given in numbers."""
        own = vars(transformer).get("forward")

        def assembled(*, hidden_states: Tensor, timestep: Tensor, **_: Any) -> tuple[Tensor]:
            return (self.joint_pass(transformer, hidden_states, timestep, text, slots, grids),)

        transformer.forward = assembled
        try:
            yield
        finally:
            if own is None:
                del transformer.forward
            else:
                transformer.forward = own

    def joint_pass(
        self,
        transformer: Any,
        hidden_states: Tensor,
        timestep: Tensor,
        text: Text,
        slots: Sequence[int],
        grids: Sequence[Grid],
    ) -> Tensor:
        """The transformer's pass with places in numbers, where it reads them off tensors: equal to its own, for prompts without padding.

        Args:
            transformer: A QwenImage21Transformer2DModel.
            hidden_states: Tokens of references and image, (b, m, d).
            timestep: Noise levels (b,).
            text: Encoded prompts.
            slots: Words before each reference.
            grids: Token rows and columns of references and image.
        """
        pictures = transformer.img_in(hidden_states).split([rows * columns for rows, columns in grids], dim=1)
        slots_of_pictures = (
            sum(p.shape[1] for p in pictures[:-1]) // SLOT
        )  # it projects these, too, before latents stand there
        words = transformer.txt_in(nn.functional.pad(text.embeds, (0, 0, 0, slots_of_pictures)))[
            :, : text.embeds.shape[1]
        ]
        parts, segments, word, at = [], [], 0, 0
        for slot, picture in zip([*slots, words.shape[1]], pictures, strict=True):
            for part, is_text in ((words[:, word:slot], True), (picture, False)):
                if part.shape[1]:
                    parts.append(part)
                    segments.append((at, at + part.shape[1], is_text))
                    at += part.shape[1]
            word = slot
        joint, prefix = torch.cat(parts, dim=1), segments[-1][0]
        places = self._places(words.shape[1], slots, grids).long().to(joint.device)
        rope = torch.cat(
            [table.to(joint.device)[i] for table, i in zip(transformer.pos_embed.freqs, places.T, strict=True)], dim=-1
        )
        level, drawn = timestep.to(joint.dtype), None
        if transformer.config.causal_condition:
            level = torch.cat([level, level.new_zeros(1)])
            drawn = torch.arange(at, device=joint.device) >= prefix
        embedded = transformer.time_text_embed(level, joint)
        given = {
            "modulation": transformer.modulation(embedded), "rotary_emb": rope, "target_token_mask": drawn, "segments": segments[:-1],
        }  # fmt: skip
        for block in transformer.transformer_blocks:
            if torch.is_grad_enabled() and transformer.gradient_checkpointing:
                joint = torch.utils.checkpoint.checkpoint(block, joint, use_reentrant=False, **given)
            else:
                joint = block(joint, **given)
        found: Tensor = transformer.proj_out(transformer.norm_out(joint, embedded, drawn))
        return found

    def embeds_guidance(self, transformer: Any) -> bool:
        """Never: what was distilled in is one guidance, and no input."""
        return False

    def sigmas(self, pipe: Any, num_steps: int, num_tokens: int) -> Tensor:
        """See `Backbone.sigmas`; a checkpoint may name its own levels, which are taken where their number is asked for."""
        own = pipe.config.get("sample_sigmas")
        if own is None or len(own) != num_steps:
            return super().sigmas(pipe, num_steps, num_tokens)
        config, levels = pipe.scheduler.config, torch.tensor([*own, 0.0], dtype=torch.float64)
        shift = self.shift(config, num_steps, num_tokens)
        return to_terminal((shift * levels / (1 + (shift - 1) * levels)).float(), config.get("shift_terminal"))

    # Size

    def text_encoder_parameters(self) -> int:
        """Qwen3-VL-8B."""
        from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

        config = Qwen3VLConfig(
            text_config={
                "vocab_size": 151936, "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
                "num_attention_heads": 32, "num_key_value_heads": 8,
            },
            vision_config={
                "depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "num_heads": 16, "out_hidden_size": 4096,
            },
        )  # fmt: skip
        return count_parameters(on_meta(lambda: Qwen3VLForConditionalGeneration(config)))

    def vae_parameters(self) -> int:
        """Of the Qwen-Image 2.1 VAE."""
        from diffusers import AutoencoderKLQwenImage21

        return count_parameters(on_meta(AutoencoderKLQwenImage21))


def _has_no_values(tensor: Tensor) -> bool:
    """Whether a tensor is on the meta device, or a fake one."""
    from torch._subclasses.fake_tensor import FakeTensor

    return tensor.is_meta or isinstance(tensor, FakeTensor)


@contextmanager
def _as_it_is() -> Iterator[None]:
    yield


def _kept(transformer: Any, cache: ReferenceCache) -> Any:
    """The transformer's own cache of keys and values, made at the first step."""
    from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache

    if not cache.filled:
        cache.content = QwenImage21KVCache(len(transformer.transformer_blocks))
    return cache.content
