"""A loaded model: one object, made once, in place of a pipeline whose kind everybody guesses anew."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from multicrafter.models.backbones import Backbone, backbone_of
from multicrafter.models.flux.model import Text
from multicrafter.models.flux.packing import Grid
from multicrafter.models.placing import Quantization, bring_encoders, lacks_room, place_transformer

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class LoadedModel:
    """A pipeline of diffusers and the backbone that knows its parts.

    Attributes:
        pipe: The pipeline; adapters may sit on its transformer.
        backbone: How it encodes, decodes, and is asked for a velocity.
    """

    pipe: Any
    backbone: Backbone

    @classmethod
    def of(cls, model: LoadedModel | DiffusionPipeline, backbone: Backbone | None = None) -> LoadedModel:
        """A loaded model as it is; a bare pipeline with ``backbone``, by default the one known for its class.

        Raises:
            ValueError: None is known for it.
        """
        if isinstance(model, LoadedModel):
            return model if backbone is None else cls(model.pipe, backbone)
        return cls(model, backbone or backbone_of(model))

    @property
    def transformer(self) -> Any:
        """What velocities come from, and what adapters sit on."""
        return self.pipe.transformer

    @property
    def text_encoders(self) -> list[nn.Module]:
        """Modules that only prompts need."""
        return self.backbone.text_encoders(self.pipe)

    @property
    def token_side(self) -> int:
        """Pixels of a token's side."""
        return self.backbone.token_side(self.pipe)

    @property
    def size_step(self) -> int:
        """Pixels that every side of a picture is a multiple of."""
        return self.token_side * self.backbone.grid_step

    @property
    def picture_size(self) -> int:
        """Side of a picture in pixels that the pipeline was made for."""
        return self.backbone.picture_size(self.pipe)

    @property
    def device(self) -> torch.device:
        """Where it computes: where the transformer is or, before it is brought there, the VAE."""
        vae = getattr(self.pipe, "vae", None)
        here: torch.device = next(self.transformer.parameters()).device
        return here if here.type != "cpu" or vae is None else next(vae.parameters()).device

    def to(
        self, device: torch.device | str, *, quantization: Quantization = "none", transformer: bool = True
    ) -> LoadedModel:
        """Moves what it computes with, the transformer as `place_transformer` does it, and returns itself.

        Text encoders stay where they are until something is to be encoded. Without ``transformer`` that one stays too: a stage brings it
        once its texts are encoded.
        """
        texts = {id(encoder) for encoder in self.text_encoders}
        for part in self.pipe.components.values():
            if isinstance(part, nn.Module) and part is not self.transformer and id(part) not in texts:
                part.to(device)
        if transformer:
            place_transformer(self.transformer, device, quantization)
        return self

    @contextmanager
    def _encoding(self) -> Iterator[None]:
        """Text encoders at work, where the model computes; the transformer steps aside meanwhile where both have no room."""
        device, encoders = self.device, self.text_encoders
        aside = lacks_room(encoders, device) and next(self.transformer.parameters()).device == device
        if aside:
            self.transformer.to("cpu")
        try:
            bring_encoders(encoders, device)
            yield
        finally:
            if aside:
                bring_encoders(encoders, torch.device("cpu"))
                self.transformer.to(device)

    def encode_prompts(self, prompts: Sequence[str]) -> Text:
        """See `Backbone.encode_prompts`, as for the methods below."""
        with self._encoding():
            return self.backbone.encode_prompts(self.pipe, prompts)

    def encode_prompts_with(
        self, prompts: Sequence[str], references: Sequence[Sequence[Float[Tensor, "3 h w"]]]
    ) -> Text:
        """Encoded prompts, each with its references."""
        with self._encoding():
            return self.backbone.encode_prompts_with(self.pipe, prompts, references)

    def encode_pictures(self, pictures: Float[Tensor, "b 3 H W"]) -> Float[Tensor, "b n d"]:
        """Tokens of pictures in [0, 1]."""
        return self.backbone.encode_pictures(self.pipe, pictures)

    def decode_pictures(self, tokens: Float[Tensor, "b n d"], grid: Grid) -> Float[Tensor, "b 3 H W"]:
        """Pictures in [0, 1] of tokens."""
        return self.backbone.decode_pictures(self.pipe, tokens, grid)

    def sigmas(self, num_steps: int, num_tokens: int) -> Float[Tensor, " t"]:
        """Noise levels from 1 to 0, one more than steps."""
        return self.backbone.sigmas(self.pipe, num_steps, num_tokens)

    def velocity(
        self, tokens: Float[Tensor, "b n d"], sigma: Float[Tensor, " b"], text: Text, **context: Any
    ) -> Float[Tensor, "b n d"]:
        """``noise - latents`` of the image tokens."""
        return self.backbone.velocity(self.transformer, tokens, sigma, text, **context)
