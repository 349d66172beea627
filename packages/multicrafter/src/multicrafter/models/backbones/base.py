"""What training and inference ask of a base model: one small class, one file a model (docs/guides/backbones.md)."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from idar import SubjectLayout
from jaxtyping import Float
from torch import Tensor, nn

from multicrafter import UserError
from multicrafter.models.flux.model import Text, decode_latents, encode_images, sigma_schedule
from multicrafter.models.flux.packing import Grid, pack_latents, unpack_latents


class Backbone(ABC):
    """One family of pipelines: where things are, how they are encoded, how the velocity is asked for.

    An instance has no state: pipelines and transformers are passed. Subclasses set the attributes and the abstract methods.

    Attributes:
        name: Written into every adapter; an adapter of another backbone is refused.
        pipeline_class: Class in diffusers, as in ``model_index.json``.
        transformer_class: Class in diffusers.
        parts: What a pipeline directory must hold.
        hub_id: Where the weights are.
        licence: Of the weights.
        attention: Regex of the linears that get an ordinary LoRA.
        ffn_linears: Regex of the linears that get an ordinary LoRA where there are no experts.
        ffn_blocks: Regexes of the modules that the experts sit beside.
        caches_references: Whether keys and values of reference tokens are the same at every sigma, so that they may be kept.
        full_config: Configuration of the full-size transformer.
        default_guidance: Embedded guidance where the caller names none.
        default_true_guidance: Scale of the second pass where the caller names none and the pipeline has it; 1 is off.
        default_num_steps: Steps of a picture where neither the caller nor the adapter names them.
        latents_per_token: Latents of a token's side.
        grid_step: Rows and columns of every picture are multiples of this many tokens.
        text_width_name: What the transformer's configuration calls the width of encoded prompts.
        padding_moves_picture: Whether padding behind a prompt changes the places of the picture, so that prompts are drawn one by one.
        text_sees_references: Whether an encoded prompt depends on the references: then it is encoded with them, scene by scene.
    """

    name: ClassVar[str]
    pipeline_class: ClassVar[str]
    transformer_class: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    hub_id: ClassVar[str]
    licence: ClassVar[str]
    attention: ClassVar[str]
    ffn_linears: ClassVar[str]
    ffn_blocks: ClassVar[tuple[str, ...]]
    caches_references: ClassVar[bool] = False
    full_config: ClassVar[Mapping[str, Any]]
    default_guidance: ClassVar[float] = 1.0
    default_true_guidance: ClassVar[float] = 1.0
    default_num_steps: ClassVar[int] = 20
    latents_per_token: ClassVar[int] = 2
    grid_step: ClassVar[int] = 1
    text_width_name: ClassVar[str] = "joint_attention_dim"
    padding_moves_picture: ClassVar[bool] = False
    text_sees_references: ClassVar[bool] = False

    # Text

    @abstractmethod
    def encode_prompts(self, pipe: Any, prompts: Sequence[str]) -> Text:
        """Encoded prompts, exactly as the pipeline of diffusers encodes them."""

    def encode_prompts_with(
        self, pipe: Any, prompts: Sequence[str], references: Sequence[Sequence[Float[Tensor, "3 h w"]]]
    ) -> Text:
        """Encoded prompts, each with its references in [0, 1]; they change nothing unless `text_sees_references`."""
        return self.encode_prompts(pipe, prompts)

    @abstractmethod
    def empty_text(self, transformer: nn.Module, batch: int, length: int) -> Text:
        """Zeros of the shape that `encode_prompts` gives (for `multicrafter plan` and shape tests)."""

    def text_encoders(self, pipe: Any) -> list[nn.Module]:
        """Modules of the pipeline that only prompts need."""
        return [m for n in self.parts if n.startswith("text_encoder") and (m := getattr(pipe, n, None)) is not None]

    def count_tokens(self, pipe: Any, prompt: str) -> tuple[int, int]:
        """Tokens of a prompt for the encoder that reads it word by word, and how many of them it reads at most."""
        tokenizer = getattr(pipe, "tokenizer_2", None) or pipe.tokenizer
        return len(tokenizer(prompt).input_ids), min(int(tokenizer.model_max_length), 512)

    def check_prompts(self, pipe: Any, prompts: Sequence[str]) -> None:
        """Refuses prompts whose end no encoder would read: two that begin alike would give the same picture.

        Raises:
            ValueError: Names the prompt, its tokens and the limit.
        """
        for prompt in dict.fromkeys(prompts):
            count, limit = self.count_tokens(pipe, prompt)
            if count > limit:
                shown = prompt if len(prompt) <= 60 else prompt[:57] + "..."
                raise UserError(
                    f"prompt must have at most {limit} tokens for this text encoder, got {count} in {shown!r}"
                )

    # Pictures

    def encode_pictures(self, pipe: Any, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n d"]:
        """Tokens of pictures in [0, 1], rows first."""
        return pack_latents(encode_images(pipe.vae, pictures))

    def decode_pictures(self, pipe: Any, tokens: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1] of tokens, the inverse of `encode_pictures`."""
        return decode_latents(pipe.vae, unpack_latents(tokens, grid))

    def token_side(self, pipe: Any) -> int:
        """Pixels of a token's side: the VAE's factor times the latents of a token."""
        return self.latents_per_token * self.vae_factor(pipe.vae.config)

    def vae_factor(self, config: Mapping[str, Any]) -> int:
        """Pixels of a latent's side, by the VAE's configuration."""
        return int(2 ** (len(config["block_out_channels"]) - 1))

    def picture_size(self, pipe: Any) -> int:
        """Side of a picture in pixels that the pipeline was made for."""
        return int(pipe.vae.config.sample_size)

    # Places

    @abstractmethod
    def position_ids(self, image: Grid, references: Sequence[Grid] = ()) -> Float[Tensor, "n axes"]:
        """Position ids of the image stream, in the order in which `velocity` lays it out."""

    def layout(self, num_text: int, image: Grid, references: Sequence[Grid]) -> SubjectLayout:
        """Where text, image and references are in the joint sequence of attention."""
        return SubjectLayout.in_order(num_text, image[0] * image[1], [r * c for r, c in references])

    def layout_of(self, text: Text, image: Grid, references: Sequence[Grid]) -> SubjectLayout:
        """`layout` of a pass with this text."""
        return self.layout(text.embeds.shape[1], image, references)

    def layout_of_pass(self, kwargs: Mapping[str, Any], image: Grid, references: Sequence[Grid]) -> SubjectLayout:
        """`layout` of a pass, from the arguments (by name) of the transformer's forward."""
        return self.layout(kwargs["encoder_hidden_states"].shape[1], image, references)

    # Velocity

    @abstractmethod
    def velocity(
        self,
        transformer: Any,
        tokens: Float[Tensor, "b n d"],
        sigma: Float[Tensor, " b"],
        text: Text,
        *,
        image_grid: Grid,
        references: Sequence[Float[Tensor, "b m d"]] = (),
        reference_grids: Sequence[Grid] = (),
        guidance: float = 1.0,
        cache: ReferenceCache | None = None,
    ) -> Float[Tensor, "b n d"]:
        """``noise - latents`` of the image tokens, given text and clean references.

        With a ``cache`` (only where `caches_references`) the first call fills it and the next ones read it.
        """

    def sigmas(self, pipe: Any, num_steps: int, num_tokens: int) -> Float[Tensor, " t"]:
        """Noise levels from 1 to 0, shifted as the pipeline's own scheduler shifts them."""
        shift = self.shift(pipe.scheduler.config, num_steps, num_tokens)
        return to_terminal(sigma_schedule(num_steps, shift=shift), pipe.scheduler.config.get("shift_terminal"))

    def shift(self, config: Any, num_steps: int, num_tokens: int) -> float:
        """How far a scheduler shifts noise levels, see `sigma_schedule`."""
        if not config.get("use_dynamic_shifting", False):
            return float(config.get("shift", 1.0))
        return math.exp(self.shift_exponent(config, num_steps, num_tokens))

    def shift_exponent(self, config: Any, num_steps: int, num_tokens: int) -> float:
        """Exponent mu of dynamic shifting, linear in the number of image tokens (arXiv 2403.03206, section 5.3.2)."""
        low, high = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        base, top = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        return float(base + (top - base) * (num_tokens - low) / (high - low))

    # Guidance

    def has_true_guidance(self, pipe: Any) -> bool:
        """Whether a second pass with a negative prompt means something."""
        return True

    def embeds_guidance(self, transformer: Any) -> bool:
        """Whether the transformer takes the guidance as an input (guidance distillation)."""
        return bool(transformer.config.guidance_embeds)

    def guide(
        self, positive: Float[Tensor, "b n d"], negative: Float[Tensor, "b n d"], scale: float
    ) -> Float[Tensor, "b n d"]:
        """Classifier-free guidance of two velocities: ``negative + scale * (positive - negative)`` (arXiv 2207.12598, Eq. 6)."""
        return negative + scale * (positive - negative)

    # Construction

    def matches(self, pipe_or_transformer: Any) -> bool:
        """Whether this is the backbone of a pipeline or transformer, by its class."""
        return type(pipe_or_transformer).__name__ in (self.pipeline_class, self.transformer_class)

    def without_effect(self, transformer: nn.Module) -> str:
        """Regex of the modules whose output nothing reads, which get no adapter: none by default, the empty text."""
        return ""

    def build_transformer(self, **overrides: Any) -> Any:
        """The full-size transformer, randomly initialised; ``overrides`` replace entries of `full_config`."""
        import diffusers

        return getattr(diffusers, self.transformer_class)(**{**self.full_config, **overrides})

    @abstractmethod
    def text_encoder_parameters(self) -> int:
        """Parameters of the full-size text encoders."""

    def vae_parameters(self) -> int:
        """Parameters of the full-size VAE."""
        from diffusers import AutoencoderKL

        blocks: dict[str, Any] = {
            "down_block_types": ("DownEncoderBlock2D",) * 4,
            "up_block_types": ("UpDecoderBlock2D",) * 4,
            "block_out_channels": (128, 256, 512, 512),
            "layers_per_block": 2,
            "latent_channels": 16,
            "use_quant_conv": False,
            "use_post_quant_conv": False,
        }
        return count_parameters(on_meta(lambda: AutoencoderKL(**blocks)))


class ReferenceCache:
    """Keys and values of reference tokens, kept between the steps of one picture."""

    def __init__(self) -> None:
        """Empty; `Backbone.velocity` fills it."""
        self.content: Any = None

    @property
    def filled(self) -> bool:
        """Whether a first step has run."""
        return self.content is not None


def check_references(references: Sequence[Tensor], grids: Sequence[Grid]) -> None:
    """Raises ValueError unless every reference has as many tokens as its grid."""
    sizes = [r.shape[1] for r in references]
    if sizes != [rows * columns for rows, columns in grids]:
        raise UserError(f"reference_grids must match the references' token counts {sizes}, got {list(grids)}")


def refuse_cache(name: str, cache: object) -> None:
    """Raises ValueError where references see the noise, so that their keys and values are others at every step, and a cache was given."""
    if cache is not None:
        raise UserError(f"cache must be None: the reference keys of {name} depend on sigma")


def to_terminal(sigmas: Float[Tensor, " t"], terminal: float | None) -> Float[Tensor, " t"]:
    """Noise levels stretched so that the last one before 0 is ``terminal`` (diffusers' ``shift_terminal``); None leaves them.

        s' = 1 - (1 - s) * (1 - terminal) / (1 - s_last)

    >>> to_terminal(torch.tensor([1.0, 0.5, 0.0]), 0.2).tolist()
    [1.0, 0.20000000298023224, 0.0]
    """
    if not terminal or len(sigmas) < 3:
        return sigmas
    s = sigmas.double()
    s[:-1] = 1 - (1 - s[:-1]) * (1 - terminal) / (1 - s[-2])
    return s.float()


def count_parameters(module: nn.Module) -> int:
    """Parameters, tied ones once."""
    return sum(p.numel() for p in module.parameters())


def on_meta(build: Any) -> Any:
    """Builds a module without memory."""
    with torch.device("meta"):
        return build()


def pad_texts(texts: Sequence[Text]) -> Text:
    """Texts of different lengths as one batch: zeros behind the shorter ones, and a mask (None where nothing is padded).

    Words before a reference are counted from the front, so that ``slots`` stay what they are.

    >>> pad_texts([Text(torch.ones(1, 2, 3), None), Text(torch.ones(1, 1, 3), None)]).mask.tolist()
    [[True, True], [True, False]]
    """
    length = max(text.embeds.shape[1] for text in texts)
    embeds, masks = [], []
    for text in texts:
        missing = length - text.embeds.shape[1]
        mask = (
            torch.ones(text.embeds.shape[:2], dtype=torch.bool, device=text.embeds.device)
            if text.mask is None
            else text.mask
        )
        embeds.append(nn.functional.pad(text.embeds, (0, 0, 0, missing)))
        masks.append(nn.functional.pad(mask.bool(), (0, missing)))
    mask = torch.cat(masks)
    slots = [text.slots for text in texts if text.slots is not None]
    return Text(torch.cat(embeds), None, None if bool(mask.all()) else mask, torch.cat(slots) if slots else None)
