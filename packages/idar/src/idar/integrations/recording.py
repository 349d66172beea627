"""Runs a multi-reference pipeline of diffusers once and records every block's subject maps at every step."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from numbers import Integral
from os import PathLike
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from idar.attention import DIRECTIONS, Direction
from idar.capture import CapturedMaps
from idar.integrations.diffusers import (
    Layout,
    capture_subject_attention,
    flux_kv_layout,
    flux_layout,
    qwen21_layout,
    qwen_layout,
)
from idar.integrations.pictures import read_picture, to_tensor
from idar.layout import SubjectLayout

# how references reach the model, and how many at most
SUPPORTED: dict[str, tuple[str, int | None]] = {
    "FluxPipeline": ("context", None),
    "FluxKontextPipeline": ("flux", 1),
    "Flux2Pipeline": ("flux", None),
    "Flux2KleinPipeline": ("flux", None),
    "Flux2KleinKVPipeline": ("flux-kv", None),
    "QwenImageEditPlusPipeline": ("qwen", None),
    "QwenImage21Pipeline": ("qwen-21", None),
}
FROM_THE_IMAGE: tuple[str, ...] = ("flux-kv", "qwen-21")
"""Whose references never attend to the image, so that "image_to_reference" is their only direction."""


@dataclass(frozen=True, kw_only=True)
class Recording:
    """One picture and what its making looked at.

    Attributes:
        picture: (3, H, W) in [0, 1].
        references: The references' pictures in [0, 1].
        maps: By direction: (k, t, s, n), k blocks, t steps, s subjects, n image tokens.
        blocks: Names of the blocks.
        sigmas: Noise level of each step.
        grid: Token rows and columns of the picture.
    """

    picture: Float[Tensor, "3 H W"]
    references: tuple[Float[Tensor, "3 _h _w"], ...]
    maps: dict[Direction, Float[Tensor, "k t s n"]]
    blocks: tuple[str, ...]
    sigmas: tuple[float, ...]
    grid: tuple[int, int]


def record(
    pipe: Any,
    references: Sequence[Any],
    prompt: str,
    *,
    directions: Sequence[Direction] = DIRECTIONS,
    blocks: Sequence[str] | None = None,
    size: tuple[int, int] | None = None,
    reference_size: int | None = None,
    num_steps: int = 20,
    seed: int = 0,
    options: dict[str, Any] | None = None,
) -> Recording:
    """Generates one picture with the pipeline's own code and records the maps of every block and step.

    FLUX.1 (`FluxPipeline`) gets its references in context, in UNO's layout (arXiv 2504.02160): their clean tokens follow the image's, with
    position ids diagonally behind it. FLUX.1-Kontext, FLUX.2, Qwen-Image-Edit and Qwen-Image 2.1 take references themselves.

    Args:
        pipe: One of `SUPPORTED`, adapters already loaded.
        references: One picture per subject, see `idar.integrations.pictures.read_picture`.
        prompt: What the picture shows; an empty one with ``options={"prompt_embeds": ...}``.
        directions: One or both directions; Flux2KleinKVPipeline and QwenImage21Pipeline have "image_to_reference" only.
        blocks: Names of attention modules; the double-stream blocks by default.
        size: Height and width in pixels; by default the size the autoencoder was made for.
        reference_size: Of FluxPipeline the long side of references in pixels, by default half of the picture's. Of QwenImage21Pipeline
            the side of a square as large as each reference, by default the pipeline's own. Others size references themselves.
        num_steps: Denoising steps.
        seed: Of the noise.
        options: More arguments of the pipeline's call.

    Raises:
        ValueError: The pipeline is not supported, or references, directions or numbers do not fit it.
    """
    if SUPPORTED.get(type(pipe).__name__, ("",))[0] in FROM_THE_IMAGE:
        directions = [d for d in directions if d == "image_to_reference"]
    if not directions:
        raise ValueError(f"directions must hold one that {type(pipe).__name__} has, got none")
    steps = _Steps()
    with torch.no_grad(), ready(pipe, references, prompt, size=size, reference_size=reference_size) as prepared:
        given = prepared.given(num_steps=num_steps, seed=seed, options=options)
        with ExitStack() as stack:
            captured = {
                d: stack.enter_context(
                    capture_subject_attention(
                        pipe.transformer, prepared.layout, direction=d, blocks=blocks, keep_blocks=True
                    )
                )
                for d in directions
            }
            stack.enter_context(_after_each_pass(pipe.transformer, steps, captured))
            picture = drawn(pipe, given)
    if not bool(torch.isfinite(picture).all()):
        raise ValueError(
            "the picture must be finite, got NaN or infinity (a broken adapter, or too narrow a type of numbers?)"
        )
    maps = {d: torch.stack([row[d] for row in steps.maps], 1) for d in directions}
    return Recording(
        picture=picture,
        references=tuple(to_tensor(read_picture(r)) for r in references),
        maps=maps,
        blocks=tuple(captured[directions[0]].blocks),
        sigmas=tuple(steps.sigmas),
        grid=grid_of(picture, prepared.side, next(iter(maps.values())).shape[-1]),
    )


def drawn(pipe: Any, given: dict[str, Any]) -> Float[Tensor, "3 H W"]:
    """The picture that the pipeline draws, in [0, 1]; what it leaves transparent (Qwen-Image 2.1) is white."""
    picture: Tensor = pipe(**given).images[0].float().cpu().clamp(0, 1)
    colour, opacity = picture[:3], picture[3:]
    return colour * opacity + 1 - opacity if len(opacity) else colour


def grid_of(picture: Float[Tensor, "3 H W"], side: int, tokens: int) -> tuple[int, int]:
    """Token rows and columns of a picture with a token per ``side`` pixels squared.

    Raises:
        ValueError: The model saw another number of tokens.
    """
    grid = (picture.shape[1] // side, picture.shape[2] // side)
    if grid[0] * grid[1] != tokens:
        raise ValueError(f"the picture must have a token per {side} x {side} pixels, got {tokens} tokens for {grid}")
    return grid


def size_of(pipe: Any, size: tuple[int, int] | None = None) -> tuple[int, int]:
    """Height and width that a picture of the pipeline has: as asked, or what its autoencoder was made for.

    Raises:
        ValueError: It is no multiple of a token's side.
    """
    side = 2 * int(pipe.vae_scale_factor)
    default = int(getattr(pipe.vae.config, "sample_size", None) or 1024)
    pair = size is None or (isinstance(size, (tuple, list)) and len(size) == 2)
    if not pair or not all(isinstance(n, Integral) and not isinstance(n, bool) for n in size or ()):
        raise ValueError(f"size must be two whole numbers of pixels (height, width), got {size!r}")
    height, width = size or (default, default)
    if min(height, width) < side or height % side or width % side:
        raise ValueError(f"size must be multiples of {side} pixels, got {height} x {width}")
    return height, width


def listed(references: Any) -> list[Any]:
    """Pictures as a list.

    Raises:
        ValueError: It is one picture and no list.
    """
    alone = isinstance(references, (str, bytes, PathLike)) or hasattr(references, "convert")
    if alone or not isinstance(references, Iterable):
        raise ValueError(
            f"references must be a list of pictures, got {type(references).__name__}; put a single one into a list"
        )
    return list(references)


OWN = frozenset({"height", "width", "image", "num_inference_steps", "generator", "output_type"})
"""Arguments of a pipeline's call that the recording gives itself."""


def guided(pipe: Any, guidance: float) -> dict[str, Any]:
    """The arguments of a pipeline's call that mean ``guidance``: by its own name, and where it is a second pass with what that steers from.

    >>> from types import SimpleNamespace
    >>> guided(SimpleNamespace(), 3.5)
    {'guidance_scale': 3.5}
    """
    way, _ = SUPPORTED.get(type(pipe).__name__, ("", None))
    return {"true_cfg_scale": guidance, "negative_prompt": " "} if "qwen" in way else {"guidance_scale": guidance}


@dataclass(frozen=True, kw_only=True)
class Ready:
    """A pipeline that is ready to draw with its references.

    Attributes:
        layout: Where everything is in the joint sequence, from the keyword arguments of the transformer's forward.
        side: Pixels of a token's side.
        size: Height and width of the picture in pixels.
        arguments: Of the pipeline's call, but for steps and seed.
    """

    layout: Layout
    side: int
    size: tuple[int, int]
    arguments: dict[str, Any]

    def given(self, *, num_steps: int, seed: int, options: dict[str, Any] | None) -> dict[str, Any]:
        """All arguments of the pipeline's call.

        Raises:
            ValueError: There are no steps, or options are no more arguments of the call.
        """
        if not isinstance(num_steps, Integral) or not 1 <= num_steps <= 10_000:
            raise ValueError(f"num_steps must be at least 1 and at most 10,000, got {num_steps!r}")
        if not isinstance(seed, Integral) or isinstance(seed, bool) or not -(2**63) <= seed < 2**63:
            raise ValueError(f"seed must be a whole number of 64 bits, got {str(seed)[:40]}")
        if not isinstance(options or {}, dict) or (taken := OWN & (options or {}).keys()):
            got = sorted(taken) if isinstance(options, dict) else type(options).__name__
            raise ValueError(f"options must be more arguments of the pipeline's call, by name, got {got}")
        drawn = {"num_inference_steps": int(num_steps), "generator": torch.Generator().manual_seed(int(seed))}
        return {**self.arguments, **drawn, **(options or {})}


@contextmanager
def ready(
    pipe: Any,
    references: Sequence[Any],
    prompt: str,
    *,
    size: tuple[int, int] | None = None,
    reference_size: int | None = None,
) -> Iterator[Ready]:
    """While open, the pipeline draws with the references, each model in its own way; see `record`.

    Raises:
        ValueError: The pipeline is not supported, or references or sizes do not fit it.
    """
    name = type(pipe).__name__
    if name not in SUPPORTED:
        raise ValueError(f"pipeline must be one of {', '.join(SUPPORTED)}, got {name}")
    way, most = SUPPORTED[name]
    references = listed(references)
    if not references:
        raise ValueError("references must hold at least one picture, got none")
    references = [read_picture(given, f"references[{i}]") for i, given in enumerate(references)]
    if most is not None and len(references) > most:
        raise ValueError(f"references must be at most {most} for {name}, got {len(references)}")
    height, width = size_of(pipe, size)
    side = int(pipe.vae_scale_factor) * (1 if way == "qwen-21" else 2)  # pixels per token
    given: dict[str, Any] = {"prompt": prompt or None, "height": height, "width": width, "output_type": "pt"}
    layouts: dict[str, Layout] = {"qwen": qwen_layout, "qwen-21": qwen21_layout, "flux-kv": flux_kv_layout()}
    layout = layouts.get(way, flux_layout)
    with ExitStack() as stack:
        if way == "context":
            longest = int(getattr(pipe.tokenizer_2, "model_max_length", 512)) if pipe.tokenizer_2 else 512
            given["max_sequence_length"] = min(longest, 512)
            layout = stack.enter_context(
                references_in_context(pipe, references, reference_size or max(height, width) // 2, (height, width))
            )
        else:
            given["image"] = references[0] if most == 1 else list(references)
            if way == "qwen-21" and reference_size is not None:
                if reference_size < 32:
                    raise ValueError(f"reference_size must be at least 32 pixels for {name}, got {reference_size}")
                given["output_resolution"] = reference_size
        if "_auto_resize" in inspect.signature(pipe.__call__).parameters:  # Kontext would change the size
            given |= {"_auto_resize": False, "max_area": height * width}
        yield Ready(layout=layout, side=side, size=(height, width), arguments=given)


class _Steps:
    """Maps (k, s, n) by direction, and the noise level, of every step."""

    def __init__(self) -> None:
        self.maps: list[dict[Direction, Tensor]] = []
        self.sigmas: list[float] = []


@contextmanager
def _after_each_pass(transformer: Any, steps: _Steps, captured: dict[Direction, CapturedMaps]) -> Iterator[None]:
    """Takes the maps after every pass; guidance's second pass at the same noise level is left out."""

    def take(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        sigma = float(kwargs["timestep"].flatten()[0])
        if not steps.sigmas or sigma != steps.sigmas[-1]:
            steps.sigmas.append(sigma)
            steps.maps.append(
                {d: torch.stack([m[0] for m in c.blocks.values()]).float().cpu() for d, c in captured.items()}
            )

    hook = transformer.register_forward_hook(take, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def references_in_context(
    pipe: Any, references: Sequence[Any], reference_size: int, size: tuple[int, int]
) -> Iterator[Layout]:
    """While open, every pass of a FluxPipeline's transformer sees the references' tokens behind the image's.

    Position ids: the image starts at (0, 0), reference i diagonally after everything before it (UNO, arXiv 2504.02160, section 3).

    Yields:
        The layout, as a function of the transformer's keyword arguments.
    """
    side = 2 * int(pipe.vae_scale_factor)
    tokens, ids, offset = [], [], (size[0] // side, size[1] // side)
    for picture in references:
        width, height = picture.size
        scale = reference_size / max(width, height)
        rows, columns = (max(1, round(extent * scale / side)) for extent in (height, width))
        pixels = pipe.image_processor.preprocess(picture.convert("RGB"), height=rows * side, width=columns * side)
        latents = pipe.vae.encode(pixels.to(pipe.vae.device, pipe.vae.dtype)).latent_dist.mode()
        latents = (latents - (pipe.vae.config.shift_factor or 0.0)) * pipe.vae.config.scaling_factor
        patches = latents.unflatten(3, (columns, 2)).unflatten(2, (rows, 2))  # b c rows 2 columns 2
        tokens.append(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        place = torch.zeros(rows, columns, 3)
        place[..., 1] = torch.arange(rows)[:, None] + offset[0]
        place[..., 2] = torch.arange(columns)[None] + offset[1]
        ids.append(place.flatten(0, 1))
        offset = (offset[0] + rows, offset[1] + columns)
    counts = [t.shape[1] for t in tokens]

    def append(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        image = kwargs["hidden_states"]
        extra = [t.to(image).expand(len(image), -1, -1) for t in tokens]
        places = [p.to(kwargs["img_ids"]) for p in ids]
        more = {"hidden_states": torch.cat([image, *extra], 1), "img_ids": torch.cat([kwargs["img_ids"], *places])}
        return args, {**kwargs, **more}

    def cut(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        image = kwargs["hidden_states"].shape[1] - sum(counts)
        return (output[0][:, :image], *output[1:])

    def layout(kwargs: dict[str, Any]) -> SubjectLayout:
        image = kwargs["hidden_states"].shape[1] - sum(counts)
        return SubjectLayout.in_order(kwargs["txt_ids"].shape[0], image, counts)

    hooks = [
        pipe.transformer.register_forward_pre_hook(append, with_kwargs=True),
        pipe.transformer.register_forward_hook(cut, with_kwargs=True),
    ]
    try:
        yield layout
    finally:
        for hook in hooks:
            hook.remove()
