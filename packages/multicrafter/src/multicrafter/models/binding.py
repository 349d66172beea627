"""Binding: a layout that nobody gave, found in what the model itself draws, and whose place is whose in it.

Separated attention (`idar.separate_subjects`) needs to know where each subject will be. Nobody gives a layout, so the model draws a
short draft, a detector finds people (or things) in it, a Hungarian match by identity says who is who, and the picture is drawn again
from the same noise with attention between subjects forbidden. "In flight" saves the draft: it looks at the clean picture that the model
predicts at some noise level, and goes on from there; it may look again at the levels that follow, where the picture is clearer.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from idar import (
    SUBJECT_ARROWS,
    Arrow,
    Background,
    Separation,
    SubjectLayout,
    attention_owners,
    box_masks,
)
from idar.integrations.diffusers import capture_subject_attention, separate_subjects
from jaxtyping import Bool, Float
from torch import Tensor

from multicrafter import UserError
from multicrafter.models.backbones import Backbone
from multicrafter.models.checks import check_finite, finite
from multicrafter.models.finding import BoxFinder as BoxFinder
from multicrafter.models.finding import Finder as Finder
from multicrafter.models.finding import IdentityFinder as IdentityFinder
from multicrafter.models.finding import MapFinder as MapFinder
from multicrafter.models.finding import Places as Places
from multicrafter.models.flux.model import sample
from multicrafter.models.flux.packing import Grid

Mode = Literal["none", "draft", "in-flight", "attention", "masks"]
MODES: tuple[Mode, ...] = ("none", "draft", "in-flight", "attention", "masks")
LOOK_UNTIL = 0.7
"""Noise level of the last look in flight; who is who is decided above it."""


@dataclass(frozen=True, kw_only=True)
class BindingConfig:
    """How subjects are kept apart while a picture is drawn; the defaults were chosen on validation (docs/results/bleeding.md).

    Attributes:
        mode: "none", "draft" (find places in a short draft), "in-flight" (in the predicted picture of the same trajectory),
            "attention" (each block's own attention says who owns a token: no draft and no finder, but no better than the attention
            is), or "masks" (they are given).
        draft_steps: Steps of the draft.
        bind_at: In flight, places are looked for at the first noise level that is not above this one; in (0, 1).
        look_until: Places are looked for again at every noise level from ``bind_at`` down to this one, after a draft too; None does not.
            Finders that read attention maps never do: once attention is separated, its maps show the masks.
        margin: Added to each side of a box, as a share of the picture's longer side.
        background: Whether tokens of nobody look at no reference or at all, see `idar.separation_bias`.
        strength: 1 forbids attention between subjects, 0 changes nothing.
        arrows: Which kinds of attention are separated, see `idar.ARROWS`.
        blocks: "all", or only the "double" or "single" stream blocks.
        sigmas: Noise levels (from, to) at which attention is separated; outside it is as it is.
    """

    mode: Mode = "none"
    draft_steps: int = 3
    bind_at: float = 0.95
    look_until: float | None = None
    margin: float = 1 / 32
    background: Background = "none"
    strength: float = 1.0
    arrows: tuple[Arrow, ...] = SUBJECT_ARROWS
    blocks: Literal["all", "double", "single"] = "all"
    sigmas: tuple[float, float] = (0.0, 1.0)

    def __post_init__(self) -> None:
        if self.mode not in MODES:
            raise UserError(f"separation must be one of {', '.join(map(repr, MODES))}, got {self.mode!r}")
        check_finite(self)
        if not 1 <= self.draft_steps <= 10_000:
            raise UserError(f"draft_steps must be at least 1 and at most 10,000, got {self.draft_steps}")
        if not 0 < self.bind_at < 1:
            raise UserError(f"bind_at must be a noise level in (0, 1), got {self.bind_at}")
        if self.look_until is not None and not 0 < finite("look_until", self.look_until) <= self.bind_at:
            raise UserError(f"look_until must be in (0, bind_at = {self.bind_at}], got {self.look_until}")
        if self.look_until is not None and self.mode not in ("draft", "in-flight"):
            raise UserError(f"look_until must be None where no places are looked for, got separation {self.mode!r}")
        if not 0 <= self.margin < 1:
            raise UserError(f"margin must be in [0, 1), got {self.margin}")
        if not 0 <= self.strength <= 1:
            raise UserError(f"strength must be in [0, 1], got {self.strength}")
        low, high = self.sigmas
        if not 0 <= low < high <= 1:
            raise UserError(f"sigmas must be (from, to) with 0 <= from < to <= 1, got {self.sigmas}")

    @classmethod
    def chosen(cls, mode: Mode, **settings: Any) -> BindingConfig:
        """What validation chose for a mode (docs/adr/0054-binding.md): in flight looks again where ``bind_at`` leaves room; ``settings`` win.

        >>> BindingConfig.chosen("in-flight").look_until, BindingConfig.chosen("draft").look_until
        (0.7, None)
        """
        again = mode == "in-flight" and finite("bind_at", settings.get("bind_at", cls.bind_at)) >= LOOK_UNTIL
        return cls(mode=mode, **{"look_until": LOOK_UNTIL if again else None} | settings)

    def steps_of_looks(self, sigmas: Sequence[float]) -> list[int]:
        """In which steps places are looked for, for noise levels ``sigmas`` (one more than steps).

        >>> BindingConfig(mode="in-flight", bind_at=0.8, look_until=0.4).steps_of_looks([1.0, 0.75, 0.5, 0.25, 0.0])
        [1, 2]
        >>> BindingConfig(mode="draft").steps_of_looks([1.0, 0.5, 0.0])
        []
        """
        below = [step for step, sigma in enumerate(sigmas[:-1]) if sigma <= self.bind_at]
        first = (below or [len(sigmas) - 2])[:1] if self.mode == "in-flight" else []
        again = [] if self.look_until is None else [step for step in below if sigmas[step] >= self.look_until]
        return sorted({*first, *again})

    def strength_at(self, sigma: Float[Tensor, " b"]) -> Float[Tensor, " b"]:
        """Strength at some noise levels."""
        low, high = self.sigmas
        return self.strength * ((sigma >= low) & (sigma <= high)).float()


class Binding(NamedTuple):
    """What was bound.

    Attributes:
        masks: (b, s, n) that the picture was drawn with; None where nothing was separated.
        places: Where subjects were found; None where masks were given or nothing was separated.
        complete: (b,) whether every subject of a row was found.
        num_function_evaluations: Passes of the model, the draft included (a guided step has two).
    """

    masks: Float[Tensor, "b s n"] | None
    places: Places | None
    complete: Bool[Tensor, " b"]
    num_function_evaluations: int


def masks_of_places(places: Places, grid: Grid, size: tuple[int, int], *, margin: float) -> Float[Tensor, "b s n"]:
    """Token masks of found subjects. A subject that was not found may be anywhere where the others are not.

    M_i = box of i, where it is the nearest;   M_i = 1 - sum over found k of M_k   where i was not found
    """
    masks = box_masks(places.boxes, grid, size, margin=margin * max(size))
    missing = places.boxes.isnan().any(-1)
    free = 1 - masks.amax(1, keepdim=True)
    return torch.where(missing[..., None], free.expand_as(masks), masks)


def by_subject(layout: SubjectLayout, counts: Sequence[int] | None) -> SubjectLayout:
    """A layout whose references belong to fewer subjects: ``counts`` neighbouring ones to each, whose tokens become one span.

    >>> by_subject(SubjectLayout.in_order(0, 4, [2, 2, 2]), [2, 1]).subject_spans
    ((4, 8), (8, 10))

    Raises:
        ValueError: The counts do not add up to the references.
    """
    if counts is None:
        return layout
    if sum(counts) != len(layout.subject_spans) or min(counts, default=0) < 1:
        raise UserError(
            f"references_per_subject must add up to {len(layout.subject_spans)} references, got {list(counts)}"
        )
    ends = list(itertools.accumulate(counts))
    spans = layout.subject_spans
    return replace(
        layout, subject_spans=tuple((spans[end - n][0], spans[end - 1][1]) for n, end in zip(counts, ends, strict=True))
    )


@contextmanager
def separable(
    transformer: Any,
    backbone: Backbone,
    grid: Grid,
    reference_grids: Sequence[Grid],
    config: BindingConfig,
    *,
    counts: Sequence[int] | None = None,
) -> Iterator[Separation | None]:
    """The transformer with subjects that can be separated; None, and nothing changed, for mode "none".

    ``counts`` says how many neighbouring references show each subject; None is one.
    """
    if config.mode == "none":
        yield None
        return

    def layout(kwargs: dict[str, Any]) -> SubjectLayout:
        return by_subject(backbone.layout_of_pass(kwargs, grid, reference_grids), counts)

    chosen: dict[str, Callable[[str], bool] | None] = {
        "all": None,
        "double": lambda name: not name.startswith("single"),
        "single": lambda name: name.startswith("single"),
    }
    strength = config.strength if config.sigmas == (0.0, 1.0) else config.strength_at
    with separate_subjects(
        transformer, layout, attention_owners if config.mode == "attention" else None, strength=strength,
        background=config.background, arrows=config.arrows, blocks=chosen[config.blocks],
    ) as separation:  # fmt: skip
        yield separation


def sample_bound(
    velocity_fn: Callable[[Tensor, Tensor], Tensor],
    noise: Float[Tensor, "b n d"],
    schedule: Callable[[int], Float[Tensor, " t"]],
    num_steps: int,
    *,
    config: BindingConfig,
    separation: Separation | None = None,
    decode: Callable[[Tensor], Float[Tensor, "b 3 H W"]] | None = None,
    finder: Any = None,
    references: Sequence[Sequence[Any]] = (),
    grid: Grid = (0, 0),
    masks: Float[Tensor, "b s n"] | None = None,
    watch: tuple[Any, Backbone, Sequence[Grid]] | None = None,
    after: Callable[[int, Tensor], Tensor | None] | None = None,
    counts: Sequence[int] | None = None,
) -> tuple[Float[Tensor, "b n d"], Binding]:
    """`sample` with subjects kept apart as the configuration says.

    Args:
        velocity_fn: Maps (tokens, sigma (b,)) to the velocity.
        noise: Where to start; the draft starts from it too.
        schedule: Noise levels for a number of steps.
        num_steps: Steps of the picture.
        config: See `BindingConfig`.
        separation: From `separable`.
        decode: Pictures of tokens.
        finder: See `Finder`.
        references: One list of pictures per row.
        grid: Token rows and columns.
        masks: For mode "masks".
        watch: Transformer, backbone and reference grids, for finders that need attention maps.
        after: See `sample`; called in the steps that places are known in, so neither in a draft nor up to the first look in flight.
        counts: See `separable`.

    Returns:
        Tokens, and what was bound.

    Raises:
        ValueError: Masks or a finder are missing.
    """
    calls = 0

    def counted(x: Tensor, sigma: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return velocity_fn(x, sigma)

    everybody = torch.ones(len(noise), dtype=torch.bool)
    sigmas = schedule(num_steps)
    if config.mode in ("none", "attention") or separation is None:
        tokens = sample(counted, noise, sigmas, after=after)
        return tokens, Binding(None, None, everybody, calls)
    if config.mode == "masks":
        if masks is None:
            raise UserError("masks must be given for separation 'masks', got none")
        separation.masks = masks
        tokens = sample(counted, noise, sigmas, after=after)
        return tokens, Binding(masks, None, everybody, calls)
    if finder is None or decode is None:
        raise UserError(f"finder must be given for separation {config.mode!r}, got none")
    bind: dict[str, Any] = {
        "config": config, "separation": separation, "decode": decode, "finder": finder, "references": references, "grid": grid,
        "watch": watch, "counts": counts,
    }  # fmt: skip
    looks = [bind_by_draft(counted, noise, schedule, **bind)] if config.mode == "draft" else []
    steps = config.steps_of_looks(sigmas.tolist())
    if getattr(finder, "needs_maps", False):
        steps = [] if looks else steps[:1]
    if after is not None and not looks:
        first, every = steps[0], after
        after = lambda step, x: x if step <= first else every(step, x)  # noqa: E731
    drawn: Callable[[Tensor, Tensor], Tensor] = counted
    with ExitStack() as watching:
        if steps:
            found_in = watching.enter_context(_finding(**bind))
            drawn = _looking(counted, steps, lambda x: looks.append(found_in(x)), watching.close)
        tokens = sample(drawn, noise, sigmas, after=after)
    assert isinstance(separation.masks, Tensor)
    return tokens, Binding(separation.masks, looks[-1], ~looks[-1].boxes.isnan().any(-1).any(-1), calls)


def bind_by_draft(
    velocity_fn: Callable[[Tensor, Tensor], Tensor],
    noise: Float[Tensor, "b n d"],
    schedule: Callable[[int], Float[Tensor, " t"]],
    *,
    config: BindingConfig,
    separation: Separation,
    decode: Callable[[Tensor], Float[Tensor, "b 3 H W"]],
    finder: Any,
    references: Sequence[Sequence[Any]],
    grid: Grid,
    watch: tuple[Any, Backbone, Sequence[Grid]] | None = None,
    counts: Sequence[int] | None = None,
) -> Places:
    """Places in a short draft from ``noise``; ``separation.masks`` are theirs from then on. Arguments as of `sample_bound`."""
    with _finding(
        config=config, separation=separation, decode=decode, finder=finder, references=references, grid=grid, watch=watch, counts=counts,
    ) as found_in:  # fmt: skip
        return found_in(sample(velocity_fn, noise, schedule(config.draft_steps)))


@contextmanager
def _finding(
    *, config: BindingConfig, separation: Separation, decode: Callable[[Tensor], Float[Tensor, "b 3 H W"]], finder: Any,
    references: Sequence[Sequence[Any]], grid: Grid, watch: tuple[Any, Backbone, Sequence[Grid]] | None, counts: Sequence[int] | None,
) -> Iterator[Callable[[Tensor], Places]]:  # fmt: skip
    """Finds places in tokens that are drawn inside, and separates by them."""
    with _watched(finder, watch, grid, counts) as maps:

        def found_in(tokens: Tensor) -> Places:
            pictures = decode(tokens).float().clamp(0, 1).cpu()
            places: Places = finder(pictures, references, maps(), grid)
            size = (pictures.shape[2], pictures.shape[3])
            separation.masks = masks_of_places(places, grid, size, margin=config.margin).to(tokens.device)
            return places

        yield found_in


def _looking(
    velocity_fn: Callable[[Tensor, Tensor], Tensor],
    steps: Sequence[int],
    look: Callable[[Tensor], object],
    stop: Callable[[], object],
) -> Callable[[Tensor, Tensor], Tensor]:
    """The velocity of each step in turn; in some the clean picture predicted there, ``x - sigma v``, is looked at, and then it stops looking."""
    number = itertools.count()

    def velocity(x: Tensor, sigma: Tensor) -> Tensor:
        found, step = velocity_fn(x, sigma), next(number)
        if step in steps:
            look(x - sigma.reshape(-1, *[1] * (x.dim() - 1)) * found)
        if step == steps[-1]:
            stop()
        return found

    return velocity


@contextmanager
def _watched(
    finder: Any, watch: tuple[Any, Backbone, Sequence[Grid]] | None, grid: Grid, counts: Sequence[int] | None
) -> Iterator[Callable[[], Tensor | None]]:
    """Where the finder asks for them: attention maps (b, s, n), image to reference, mean over all passes inside."""
    if not getattr(finder, "needs_maps", False):
        yield lambda: None
        return
    if watch is None:
        raise UserError("watch must be given for a finder that needs attention maps, got none")
    transformer, backbone, reference_grids = watch
    total: list[Tensor] = []

    def layout(kwargs: dict[str, Any]) -> SubjectLayout:
        return by_subject(backbone.layout_of_pass(kwargs, grid, reference_grids), counts)

    with capture_subject_attention(
        transformer, layout, direction="image_to_reference", blocks=lambda _: True
    ) as captured:
        hook = transformer.register_forward_hook(lambda *_: total.append(captured.maps.detach().clone()))
        try:
            yield lambda: torch.stack(total).mean(0)
        finally:
            hook.remove()
