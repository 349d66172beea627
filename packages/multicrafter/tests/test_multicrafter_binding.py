"""Binding: places are found in what the model draws, and the picture is drawn with attention between subjects cut."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from id_reward import Faces
from idar import owner_masks
from idar.integrations.diffusers import capture_subject_attention
from multicrafter.models.backbones import backbone_of
from multicrafter.models.binding import BindingConfig, masks_of_places, sample_bound, separable
from multicrafter.models.finding import BoxFinder, IdentityFinder, MapFinder, Places
from multicrafter.models.flux.model import sample, sigma_schedule
from multicrafter.models.request import binding_config
from multicrafter.pipeline import MultiCrafterPipeline, load_flux, to_image
from multicrafter.scoring.evaluate import EvaluateConfig, case_noise, cases, draw_cases
from multicrafter.world import judges
from multicrafter.world.judges.people import PeopleBackend
from PIL import Image

CONFIG = EvaluateConfig(num_cases=3, num_sampling_steps=4, split="validation", seed=11)


@pytest.fixture(scope="module")
def pipe() -> Any:
    return load_flux(None)


@pytest.fixture(scope="module")
def scenes(pipe: Any) -> Any:
    return cases(pipe, CONFIG)


@pytest.fixture(scope="module")
def people() -> IdentityFinder:
    return IdentityFinder(backend=PeopleBackend.from_pretrained(judges.shipped()))


class Fixed:
    """A detector that knows what it finds: references are flat colours, faces have the red channel as embedding."""

    def __init__(self, found: list[tuple[list[float], list[float]]]) -> None:
        self.found = found

    def detect_and_embed(self, images: Any) -> list[Faces]:
        result = []
        for image in images:
            picture = torch.as_tensor(np.asarray(image))
            if picture.shape[-1] == 4:  # a reference
                red = float(picture[0].float().mean())
                box, vectors, scores = [[0.0, 0.0, 4.0, 4.0]], [[red, 1 - red]], [1.0]
            else:
                box = [f[0] for f in self.found]
                vectors = [f[1] for f in self.found]
                scores = [1.0 - 0.1 * i for i in range(len(self.found))]
            result.append(
                Faces(np.array(box).reshape(-1, 4), np.array(scores), np.array(vectors, float).reshape(-1, 2))
            )
        return result


RED, BLUE = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, 4, 4), torch.zeros(3, 4, 4)
LEFT, RIGHT = [2.0, 4.0, 12.0, 30.0], [18.0, 4.0, 30.0, 30.0]
PICTURES = torch.zeros(1, 3, 32, 32)


def test_who_is_who_is_a_match_by_identity() -> None:
    finder = IdentityFinder(backend=Fixed([(RIGHT, [1.0, 0.0]), (LEFT, [0.0, 1.0])]))
    places = finder(PICTURES, [[RED, BLUE]], None, (4, 4))
    assert places.boxes[0].tolist() == [RIGHT, LEFT]
    swapped = finder(PICTURES, [[BLUE, RED]], None, (4, 4))
    assert swapped.boxes[0].tolist() == [LEFT, RIGHT]
    assert places.similarity[0].tolist() == [1.0, 1.0]


def test_somebody_who_is_not_found_may_be_where_the_others_are_not() -> None:
    finder = IdentityFinder(backend=Fixed([(LEFT, [1.0, 0.0])]))
    places = finder(PICTURES, [[RED, BLUE]], None, (4, 4))
    assert places.boxes[0, 1].isnan().all() and places.boxes[0, 0].tolist() == LEFT
    masks = masks_of_places(places, (4, 4), (32, 32), margin=0.0)
    assert torch.equal(masks[0, 1], 1 - masks[0, 0]) and 0 < masks[0, 0].sum() < 16
    nobody = IdentityFinder(backend=Fixed([]))(PICTURES, [[RED, BLUE]], None, (4, 4))
    assert bool((masks_of_places(nobody, (4, 4), (32, 32), margin=0.0) == 1).all())


def test_weak_matches_do_not_count_and_boxes_grow() -> None:
    backend = Fixed([(LEFT, [0.6, 0.8]), (RIGHT, [0.1, 0.2])])
    places = IdentityFinder(backend=backend, min_similarity=0.5)(PICTURES, [[RED, BLUE]], None, (4, 4))
    assert (~places.boxes.isnan().any(-1)).sum() == 1
    grown = IdentityFinder(backend=Fixed([(LEFT, [1.0, 0.0])]), grow=(1.0, 0.0, 0.5, 2.0))
    assert grown(PICTURES, [[RED]], None, (4, 4)).boxes[0, 0].tolist() == [-8.0, 4.0, 17.0, 82.0]


def test_boxes_without_identities_go_by_attention() -> None:
    maps = torch.zeros(1, 2, 4, 4)
    maps[0, 0, :, 2:], maps[0, 1, :, :2] = 0.5, 0.5
    finder = BoxFinder(backend=Fixed([(LEFT, [0.0, 0.0]), (RIGHT, [0.0, 0.0])]))
    assert finder(PICTURES, [[RED, BLUE]], maps.flatten(2), (4, 4)).boxes[0].tolist() == [RIGHT, LEFT]


def test_places_from_maps_alone() -> None:
    maps = torch.full((1, 2, 8, 8), 0.01)
    maps[0, 0, 2:6, 0:3], maps[0, 1, 2:6, 5:8] = 0.4, 0.3
    places = MapFinder()(torch.zeros(1, 3, 64, 64), [[RED, BLUE]], maps.flatten(2), (8, 8))
    assert places.boxes[0].tolist() == [[0.0, 16.0, 24.0, 48.0], [40.0, 16.0, 64.0, 48.0]]


def test_the_draft_costs_its_steps_and_the_picture_starts_from_its_noise(pipe: Any, scenes: Any, people: Any) -> None:
    """A binding by hand: draft, boxes, masks, and the plain sampler under separated attention."""
    config = replace(CONFIG, separation=BindingConfig(mode="draft", draft_steps=2))
    drawn = draw_cases(pipe, scenes, config, finder=people)
    assert drawn.num_function_evaluations == 6
    draft = draw_cases(pipe, scenes, replace(CONFIG, num_sampling_steps=2))
    places = people(draft.pictures, [list(r) for r in scenes.reference_images], None, scenes.grid)
    masks = masks_of_places(places, scenes.grid, (64, 64), margin=config.separation.margin)
    assert torch.equal(drawn.complete, ~places.boxes.isnan().any(-1).any(-1))
    by_hand = draw_cases(pipe, replace(scenes, masks=masks), replace(CONFIG, separation=BindingConfig(mode="masks")))
    assert torch.equal(drawn.pictures, by_hand.pictures)
    plain = draw_cases(pipe, scenes, CONFIG)
    assert plain.num_function_evaluations == 4 and not torch.equal(plain.pictures, drawn.pictures)


@torch.no_grad()
def test_in_flight_costs_nothing_and_leaves_the_first_steps_as_they_are(pipe: Any, scenes: Any, people: Any) -> None:
    backbone, part = backbone_of(pipe), slice(0, 2)
    text = backbone.encode_prompts(pipe, scenes.captions[part])
    context = scenes.context(part)
    noise = case_noise(scenes, 3)[part]
    seen: list[torch.Tensor] = []

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        seen.append(x.clone())
        return backbone.velocity(pipe.transformer, x, sigma, text, **context)

    config = BindingConfig(mode="in-flight", bind_at=0.75)
    steps = []
    with separable(pipe.transformer, backbone, scenes.grid, [scenes.reference_grid] * 2, config) as separation:
        tokens, binding = sample_bound(
            velocity, noise, sigma_schedule, 4, config=config, separation=separation, finder=people, grid=scenes.grid,
            decode=lambda x: backbone.decode_pictures(pipe, x, scenes.grid),
            references=[list(r) for r in scenes.reference_images[part]], after=lambda i, x: steps.append(i) or x,
        )  # fmt: skip
    assert binding.num_function_evaluations == 4 and steps == [2, 3]
    bound, seen = seen, []
    plain = sample(velocity, noise, sigma_schedule(4))
    assert all(torch.equal(a, b) for a, b in zip(bound[:3], seen[:3], strict=True))
    assert not torch.equal(bound[3], seen[3]) or not torch.equal(tokens, plain)
    assert not torch.equal(tokens, plain)


class _Listed:
    """Says where somebody is, another place at every look, and remembers what it was shown."""

    def __init__(self, *boxes: list[list[float]], needs_maps: bool = False) -> None:
        self.boxes, self.shown, self.needs_maps = boxes, [], needs_maps

    def __call__(self, pictures: torch.Tensor, references: Any, maps: Any, grid: Any) -> Places:
        boxes = torch.tensor(self.boxes[len(self.shown)]).expand(len(pictures), -1, -1)
        self.shown.append(pictures)
        return Places(boxes, torch.ones(boxes.shape[:2]))


@pytest.mark.parametrize("mode", ["in-flight", "draft"])
@torch.no_grad()
def test_looking_again_takes_the_clearer_picture(pipe: Any, scenes: Any, mode: Any) -> None:
    """By hand: every step under the places that the last look found, in the clean picture predicted at its level."""
    backbone, part = backbone_of(pipe), slice(0, 2)
    text, context, noise = (
        backbone.encode_prompts(pipe, scenes.captions[part]),
        scenes.context(part),
        case_noise(scenes, 3)[part],
    )
    places = [[LEFT, RIGHT], [RIGHT, LEFT], [LEFT, [16.0, 4.0, 40.0, 60.0]]]
    config = BindingConfig(mode=mode, draft_steps=1, bind_at=0.75, look_until=0.5)
    finder, grids = _Listed(*places), [scenes.reference_grid] * 2

    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        return backbone.velocity(pipe.transformer, x, sigma, text, **context)

    def decode(x: torch.Tensor) -> torch.Tensor:
        return backbone.decode_pictures(pipe, x, scenes.grid)

    with separable(pipe.transformer, backbone, scenes.grid, grids, config) as separation:
        tokens, binding = sample_bound(
            velocity, noise, sigma_schedule, 4, config=config, separation=separation, finder=finder, grid=scenes.grid,
            decode=decode, references=[list(r) for r in scenes.reference_images[part]],
        )  # fmt: skip
    with separable(pipe.transformer, backbone, scenes.grid, grids, config) as by_hand:
        looks, x, sigmas, shown = iter(places), noise, sigma_schedule(4), []

        def look(clean: torch.Tensor) -> None:
            shown.append(decode(clean).clamp(0, 1))
            boxes = torch.tensor(next(looks)).expand(2, -1, -1)
            by_hand.masks = masks_of_places(Places(boxes, boxes[..., 0]), scenes.grid, (64, 64), margin=config.margin)

        if mode == "draft":
            look(x - velocity(x, torch.ones(2)))
        for sigma, after in zip(sigmas[:-1], sigmas[1:], strict=True):
            v = velocity(x, sigma.expand(2))
            if 0.5 <= sigma <= 0.75:
                look(x - sigma * v)
            x = x + (after - sigma) * v
    assert torch.equal(tokens, x) and binding.num_function_evaluations == 4 + (mode == "draft")
    assert len(finder.shown) == len(shown) == 2 + (mode == "draft")
    assert all(torch.equal(a, b) for a, b in zip(finder.shown, shown, strict=True))
    assert binding.places is not None and binding.places.boxes[0].tolist() == places[len(shown) - 1]


@torch.no_grad()
def test_attention_maps_are_read_once(pipe: Any, scenes: Any) -> None:
    """After the first look they show the masks, and would confirm whatever it said."""
    finder = _Listed([LEFT, RIGHT], needs_maps=True)
    config = replace(CONFIG, separation=BindingConfig(mode="in-flight", bind_at=0.9, look_until=0.1))
    watched: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: watched.append(len(pipe.transformer._forward_hooks)))
    assert draw_cases(pipe, scenes, config, finder=finder).num_function_evaluations == 4 and len(finder.shown) == 1
    hook.remove()
    assert watched == [1, 1, 0, 0], "nobody watches the steps after the look"


def test_a_mode_by_its_name_has_the_settings_that_validation_chose() -> None:
    assert binding_config("in-flight") == BindingConfig(mode="in-flight", look_until=0.7)
    assert binding_config("draft") == BindingConfig(mode="draft")
    assert BindingConfig.chosen("in-flight", look_until=None) == BindingConfig(mode="in-flight")
    assert BindingConfig.chosen("in-flight", bind_at=0.5) == BindingConfig(mode="in-flight", bind_at=0.5), "once"
    for wrong in ("a", float("nan"), None, 1.0):
        with pytest.raises(ValueError, match="bind_at"):
            BindingConfig.chosen("in-flight", bind_at=wrong)


def test_true_masks_hold_exactly_while_the_picture_is_drawn(pipe: Any, scenes: Any) -> None:
    crossing = []
    layout = backbone_of(pipe).layout(16, scenes.grid, [scenes.reference_grid] * 2)
    with capture_subject_attention(
        pipe.transformer, layout, direction="image_to_reference", blocks=lambda _: True
    ) as captured:
        hook = pipe.transformer.register_forward_hook(lambda *_: crossing.append(captured.maps.clone()))
        draw_cases(pipe, scenes, replace(CONFIG, separation=BindingConfig(mode="masks")))
        hook.remove()
    owners = owner_masks(scenes.masks)
    assert len(crossing) == 4
    assert all(float((maps * (1 - owners)).abs().max()) == 0 for maps in crossing)


def test_cases_and_noise_do_not_depend_on_how_many_there_are(pipe: Any) -> None:
    few, many = cases(pipe, replace(CONFIG, num_cases=2)), cases(pipe, replace(CONFIG, num_cases=5))
    assert torch.equal(few.images, many.images[:2]) and torch.equal(few.identities, many.identities[:2])
    assert few.captions == many.captions[:2] and torch.equal(few.references, many.references[:2])
    assert few.strangers is not None and many.strangers is not None
    assert torch.equal(few.strangers, many.strangers[:2])
    assert torch.equal(case_noise(few, 5), case_noise(many, 5)[:2])
    assert not torch.equal(many.identities[0], many.identities[1])


class TestPipeline:
    """The same through `MultiCrafterPipeline`."""

    @pytest.fixture(scope="class")
    def pipeline(self, people: IdentityFinder) -> MultiCrafterPipeline:
        return MultiCrafterPipeline.from_pretrained(None, separation="draft", finder=people)

    @pytest.fixture(scope="class")
    def asked(self, scenes: Any) -> tuple[list[str], list[list[Image.Image]]]:
        return scenes.captions[:2], [[to_image(r) for r in row] for row in scenes.reference_images[:2]]

    def test_bindings_say_what_was_found(self, pipeline: MultiCrafterPipeline, asked: Any) -> None:
        prompts, references = asked
        pictures = pipeline(prompts, references, num_steps=4, num_images=2, seed=[1, 2], output_type="pt")
        assert len(pictures) == 4 and len(pipeline.bindings) == 2
        for binding in pipeline.bindings:
            assert binding.masks is not None and binding.masks.shape == (2, 2, 64)
            assert binding.places is not None and binding.places.boxes.shape == (2, 2, 4)
            assert binding.num_function_evaluations == 7
        alone = pipeline(prompts[1], references[1], num_steps=4, num_images=2, seed=2, output_type="pt")
        assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(alone, pictures[2:], strict=True))
        plain = pipeline(prompts, references, num_steps=4, seed=[1, 2], separation="none", output_type="pt")
        assert pipeline.bindings[0].masks is None and pipeline.bindings[0].num_function_evaluations == 4
        assert not torch.equal(plain[0], pictures[0])

    def test_given_masks(self, pipeline: MultiCrafterPipeline, asked: Any) -> None:
        prompts, references = asked
        left = torch.zeros(64, 64)
        left[:, :32] = 1
        masks = [left, to_image((1 - left).expand(3, 64, 64))]
        pipeline(prompts[0], references[0], num_steps=1, separation="masks", masks=masks)
        owners = pipeline.bindings[0].masks
        assert owners is not None
        assert owners[0].view(2, 8, 8)[0, :, :4].min() == 1 and owners[0].sum() == 64
        with pytest.raises(ValueError, match="masks must be given"):
            pipeline(prompts[0], references[0], num_steps=1, separation="masks")
        with pytest.raises(ValueError, match="one per reference"):
            pipeline(prompts[0], references[0], num_steps=1, separation="masks", masks=masks[:1])
        with pytest.raises(ValueError, match="are for separation 'masks'"):
            pipeline(prompts[0], references[0], num_steps=1, separation="draft", masks=masks)

    def test_a_draft_that_lacks_somebody_is_said(self, asked: Any) -> None:
        prompts, references = asked
        pipeline = MultiCrafterPipeline.from_pretrained(
            None, separation="draft", finder=IdentityFinder(backend=_Blind())
        )
        with pytest.warns(UserWarning, match="the draft shows 0 of 2 subjects"):
            pipeline(prompts[0], references[0], num_steps=1)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            pipeline(prompts[0], references[0], num_steps=1, separation="none")

    def test_maps_find_places_without_a_detector(self, asked: Any) -> None:
        prompts, references = asked
        pipeline = MultiCrafterPipeline.from_pretrained(None, separation="draft")
        pipeline(prompts[0], references[0], num_steps=2)
        places = pipeline.bindings[0].places
        assert isinstance(pipeline.finder, MapFinder) and places is not None
        assert bool((places.boxes[0, :, 2] > places.boxes[0, :, 0]).all())

    @pytest.mark.parametrize("mode", ["sideways", "", None])
    def test_an_unknown_separation_is_refused(self, mode: Any) -> None:
        with pytest.raises(ValueError, match="separation must be one of"):
            BindingConfig(mode=mode)


class _Blind:
    def detect_and_embed(self, images: Any) -> list[Faces]:
        return [Faces(np.zeros((0, 4)), np.zeros(0), np.zeros((0, 2))) for _ in images]


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"draft_steps": 0}, "draft_steps"),
        ({"bind_at": 1.0}, "bind_at"),
        ({"bind_at": float("nan")}, "bind_at"),
        *(({"mode": "draft", "look_until": value}, "look_until") for value in (0.0, 0.96, float("nan"), "0.7")),
        ({"mode": "masks", "look_until": 0.7}, "look_until must be None where no places are looked for"),
        ({"margin": -0.1}, "margin"),
        ({"strength": 1.5}, "strength"),
        ({"strength": float("nan")}, "strength"),
        ({"background": "some"}, "background"),
    ],
)
def test_numbers_out_of_range(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(ValueError, match=word):
        BindingConfig(**changes)


def test_a_finder_is_needed() -> None:
    with pytest.raises(ValueError, match="finder must be given"):
        sample_bound(
            lambda x, s: x, torch.zeros(1, 4, 2), sigma_schedule, 2, config=BindingConfig(mode="draft"),
            separation=object(),  # type: ignore[arg-type]
        )  # fmt: skip


def test_places_are_nan_where_nobody_is() -> None:
    places = Places(torch.full((1, 1, 4), torch.nan), torch.full((1, 1), torch.nan))
    assert masks_of_places(places, (2, 2), (8, 8), margin=0.1).tolist() == [[[1, 1, 1, 1]]]
