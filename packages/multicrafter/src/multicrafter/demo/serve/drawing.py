"""One request and one result: a picture with the method, the same noise without it, who was found where, and where the model looked."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from id_reward.images import open_image
from idar import SubjectLayout, box_masks, leakage, stack_blocks
from idar.integrations.diffusers import capture_subject_attention
from jaxtyping import Float
from PIL import Image
from torch import Tensor

from multicrafter import UserError, user_input
from multicrafter.models.binding import Mode, by_subject
from multicrafter.models.checks import finite, whole
from multicrafter.models.finding import Places
from multicrafter.models.flux.packing import Grid
from multicrafter.pipeline import MultiCrafterPipeline, to_image, to_tensor

WAYS: tuple[Mode, ...] = ("draft", "in-flight", "attention", "none")
"""How subjects are kept apart where nobody draws masks."""
MOST_CELLS = 32
"""Rows and columns of a map that is kept; finer ones are averaged."""
LARGEST_SEED = 2**53 - 1
"""A page's numbers are floats, which hold every whole number up to this one: a larger seed would silently be another."""
KEPT_SIDE = 1024
"""Longest side in pixels of a reference that is kept."""


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one visitor may ask for.

    Attributes:
        max_references: Pictures of one request.
        max_bytes: Of one uploaded file.
        max_pixels: Of one uploaded picture.
        max_size: Side of the picture that is drawn, in pixels.
        max_steps: Steps of one picture.
        max_characters: Of a prompt.
        max_waiting: Requests that wait at the same time.
        max_visitors: Visitors whose references and last result are kept; the one who was away longest is forgotten first.
    """

    max_references: int = 4
    max_bytes: int = 10_000_000
    max_pixels: int = 40_000_000
    max_size: int = 1024
    max_steps: int = 50
    max_characters: int = 1000
    max_waiting: int = 8
    max_visitors: int = 64

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            whole(name, getattr(self, name), least=1)


@dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """What somebody wants drawn.

    Attributes:
        references: One picture per subject, or as many as ``references_per_subject`` says.
        prompt: What the picture shows.
        seed: Of the noise, from 0 to `LARGEST_SEED`.
        num_steps: Steps of the picture.
        guidance: Embedded guidance.
        size: Side of the picture in pixels, or (height, width).
        separation: One of `WAYS`.
        reference_shape: "square" or "own", see `MultiCrafterPipeline`.
        references_per_subject: How many neighbouring references show each subject; None is one each.
    """

    references: tuple[Image.Image, ...]
    prompt: str
    seed: int
    num_steps: int
    guidance: float
    size: int | tuple[int, int]
    separation: Mode
    reference_shape: Literal["square", "own"] = "square"
    references_per_subject: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.references:
            raise UserError("Add at least one picture first, or take two drawn people.")
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise UserError("Write what the picture should show, for example: two people in the park by day.")
        whole("num_steps", self.num_steps, least=1)
        for side in self.height_width:
            whole("size", side, least=1)
        if self.reference_shape not in ("square", "own"):
            raise UserError(f"The references' shape must be square or own, got {self.reference_shape!r}.")
        counts = self.references_per_subject
        if counts is not None and (sum(counts) != len(self.references) or min(counts, default=0) < 1):
            raise UserError(
                f"The pictures of each person must add up to the {len(self.references)} that you gave, got "
                f"{' '.join(map(str, counts)) or 'none'}."
            )
        if not 0 <= whole("seed", self.seed) <= LARGEST_SEED:
            raise UserError(f"The seed must be a whole number from 0 to {LARGEST_SEED}, got {self.seed:.10g}.")
        if not 0 <= finite("guidance", self.guidance) <= 100:
            raise UserError(f"The guidance must be a number from 0 to 100, got {self.guidance:g}.")
        if self.separation not in WAYS:
            raise UserError(f"The separation must be one of {', '.join(WAYS)}, got {self.separation!r}.")

    @property
    def height_width(self) -> tuple[int, int]:
        """Of the picture in pixels."""
        return (self.size, self.size) if isinstance(self.size, int) else self.size

    def check(self, limits: Limits) -> None:
        """Raises a UserError where the request asks for more than is allowed."""
        for what, asked, most in (
            ("pictures", len(self.references), limits.max_references),
            ("characters in the prompt", len(self.prompt), limits.max_characters),
            ("steps", self.num_steps, limits.max_steps),
            ("pixels on a side", max(self.height_width), limits.max_size),
        ):
            if asked > most:
                raise UserError(f"This page draws with at most {most} {what}, got {asked}.")


class Maps(NamedTuple):
    """Attention mass that each image token paid to each reference, per step and block: (t, k, s, n) in [0, 1], half precision."""

    values: Float[Tensor, "t k s n"]
    grid: Grid
    steps: tuple[int, ...]
    blocks: tuple[str, ...]

    def at(self, step: int, block: int) -> Float[Tensor, "s n"]:
        """The maps of one step (counted from 0 in ``steps``) and one block; block -1 is the mean of all blocks."""
        chosen = self.values[step].float()
        return chosen.mean(0) if block < 0 else chosen[block]


class Drawn(NamedTuple):
    """One picture, where each reference's subject was found in it, and where the model looked while drawing it."""

    picture: Image.Image
    places: Places
    maps: Maps | None

    def leakage(self, step: int, block: int) -> Float[Tensor, " s"]:
        """Share of the attention on each reference that comes from another subject's place, see `idar.leakage`; NaN where unknown."""
        if self.maps is None:
            return torch.full((self.places.boxes.shape[1],), torch.nan)
        size = (self.picture.height, self.picture.width)
        masks = box_masks(self.places.boxes, self.maps.grid, size, margin=0.0)
        return leakage(self.maps.at(step, block)[None], masks)[0]


@dataclass(frozen=True, kw_only=True)
class Drawing:
    """What came of a request.

    Attributes:
        request: What was asked for.
        method: The picture with subjects kept apart, or the only one where ``separation`` is "none".
        plain: The same model from the same noise with attention as it is; None where that is ``method``.
        draft: Where subjects were found in the draft; None where there was none.
        passes: Passes of the model, both pictures and the draft.
        seconds: Of both pictures, by the wall clock.
    """

    request: DrawRequest
    method: Drawn
    plain: Drawn | None
    draft: Places | None
    passes: int
    seconds: float


class Cancelled(Exception):
    """Somebody asked to stop."""


def read_upload(content: bytes, name: str, limits: Limits) -> Image.Image:
    """An uploaded file as an upright RGB picture, at most `KEPT_SIDE` pixels long.

    Raises:
        ValueError: The file is too large, no picture, or damaged; one sentence that names the file and no path.
    """
    shown = name[:60] or "the file"
    if len(content) > limits.max_bytes:
        raise UserError(
            f"{shown} has {len(content) / 1e6:.1f} MB, but a picture may have at most {limits.max_bytes / 1e6:.1f} MB."
        )
    try:
        with user_input():
            picture = open_image(content, max_pixels=limits.max_pixels)
    except UserError as error:
        if "pixels" in str(error):
            raise UserError(f"{shown} has too many pixels, at most {limits.max_pixels:,} are read.") from error
        raise UserError(f"{shown} cannot be read as a picture: send a PNG, JPEG or WebP file.") from error
    picture.thumbnail((KEPT_SIDE, KEPT_SIDE), Image.Resampling.LANCZOS)
    return picture


@dataclass
class Recorder:
    """Maps of the steps of a picture, while it is drawn.

    ``passes`` counts the passes of the model; the draft's maps are not kept. ``mean`` is the mean over steps and blocks, (1, s, n).
    """

    grid: Grid
    passes_per_step: int
    passes: int = 0
    steps: list[int] = field(default_factory=list)
    kept: list[Tensor] = field(default_factory=list)
    total: Tensor | None = None
    blocks: tuple[str, ...] = ()
    recent: deque[Tensor] = field(default_factory=deque)

    def after_pass(self, maps: Float[Tensor, "k s n"]) -> None:
        """Remembers the maps of a pass until the step is over."""
        self.passes += 1
        self.recent.append(maps)
        if len(self.recent) > self.passes_per_step:
            self.recent.popleft()

    def after_step(self, step: int) -> None:
        """Keeps the maps of the step's first pass, the one with the prompt."""
        whole_maps = self.recent[0].float().cpu()
        self.total = whole_maps.mean(0) if self.total is None else self.total + whole_maps.mean(0)
        self.steps.append(step)
        self.kept.append(coarser(whole_maps, self.grid).half())

    @property
    def mean(self) -> Float[Tensor, "1 s n"] | None:
        """Over steps and blocks, at the tokens' resolution."""
        return None if self.total is None else self.total[None] / len(self.steps)

    @property
    def maps(self) -> Maps | None:
        """What was kept; None where no step was seen."""
        if not self.kept:
            return None
        return Maps(torch.stack(self.kept), coarse_grid(self.grid), tuple(self.steps), self.blocks)


def coarse_grid(grid: Grid) -> Grid:
    """Rows and columns of the maps that are kept."""
    return min(grid[0], MOST_CELLS), min(grid[1], MOST_CELLS)


def coarser(maps: Float[Tensor, "k s n"], grid: Grid) -> Float[Tensor, "k s m"]:
    """Maps averaged to at most `MOST_CELLS` rows and columns.

    >>> coarser(torch.ones(1, 1, 64 * 64), (64, 64)).shape
    torch.Size([1, 1, 1024])
    """
    if coarse_grid(grid) == grid:
        return maps
    return torch.nn.functional.adaptive_avg_pool2d(maps.unflatten(-1, grid), coarse_grid(grid)).flatten(-2)


@contextmanager
def recorded(
    pipeline: MultiCrafterPipeline,
    grid: Grid,
    reference_grids: Sequence[Grid],
    cancelled: Callable[[], bool],
    counts: Sequence[int] | None = None,
) -> Iterator[Recorder]:
    """Records every block's maps while a picture is drawn, and raises `Cancelled` before the next pass once ``cancelled()``."""
    transformer, backbone = pipeline.pipe.transformer, pipeline.backbone
    guided = backbone.has_true_guidance(pipeline.pipe) and backbone.default_true_guidance != 1
    recorder = Recorder(grid, 2 if guided else 1)

    def layout(kwargs: dict[str, Any]) -> SubjectLayout:
        return by_subject(backbone.layout_of_pass(kwargs, grid, reference_grids), counts)

    def before(*_: Any) -> None:
        if cancelled():
            raise Cancelled

    with capture_subject_attention(transformer, layout, blocks=lambda _: True, keep_blocks=True) as captured:

        def after(*_: Any) -> None:
            recorder.blocks = tuple(captured.blocks)
            recorder.after_pass(stack_blocks(captured)[:, 0].detach())

        hooks = [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after)]
        try:
            yield recorder
        finally:
            for hook in hooks:
                hook.remove()


def draw(
    pipeline: MultiCrafterPipeline,
    request: DrawRequest,
    *,
    progress: Callable[[int, int], object] = lambda done, of: None,
    cancelled: Callable[[], bool] = lambda: False,
) -> Drawing:
    """Draws the picture with subjects kept apart, and the same noise with attention as it is.

    Args:
        pipeline: With a finder.
        request: What to draw.
        progress: Called with the steps done and the steps in all, of both pictures.
        cancelled: Asked before every pass of the model.

    Raises:
        ValueError: What `MultiCrafterPipeline` refuses.
        Cancelled: ``cancelled`` said so.
    """
    start, of = time.perf_counter(), request.num_steps * (1 if request.separation == "none" else 2)
    method, draft, passes = _draw_one(pipeline, request, request.separation, lambda n: progress(n, of), cancelled)
    plain = None
    if request.separation != "none":
        plain, _, more = _draw_one(pipeline, request, "none", lambda n: progress(request.num_steps + n, of), cancelled)
        passes += more
    return Drawing(
        request=request, method=method, plain=plain, draft=draft, passes=passes, seconds=time.perf_counter() - start
    )


def _draw_one(
    pipeline: MultiCrafterPipeline,
    request: DrawRequest,
    separation: Mode,
    progress: Callable[[int], object],
    cancelled: Callable[[], bool],
) -> tuple[Drawn, Places | None, int]:
    """A picture, where subjects were in its draft, and the passes of the model."""
    references, counts = list(request.references), request.references_per_subject
    reference_size = min(pipeline.reference_size, *request.height_width)
    grid, reference_grids = pipeline.grids(
        references, request.size, reference_size=reference_size, reference_shape=request.reference_shape
    )
    with recorded(pipeline, grid, reference_grids, cancelled, counts) as recorder:

        def step_done(_: Any, step: int, __: float, ___: dict[str, Any]) -> None:
            recorder.after_step(step)
            progress(step + 1)

        (picture,) = pipeline(
            request.prompt, references, seed=request.seed, num_steps=request.num_steps, guidance=request.guidance,
            size=request.size, reference_size=reference_size, separation=separation, callback_on_step_end=step_done,
            output_type="pt", reference_shape=request.reference_shape, references_per_subject=counts,
        )  # fmt: skip
    draft = pipeline.bindings[0].places
    picture = picture.float().clamp(0, 1).cpu()
    first = references if counts is None else [references[sum(counts[:i])] for i in range(len(counts))]
    seen = [to_tensor(r, reference_size) for r in first]
    places = pipeline.finder(picture[None], [seen], recorder.mean, grid)
    return Drawn(to_image(picture), places, recorder.maps), draft, recorder.passes
