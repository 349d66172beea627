"""The page without a browser: a request drawn, visitors in line, pieces of HTML, and what is closed on the port."""

from __future__ import annotations

import asyncio
import dataclasses
import io
import re
import socket
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from idar.integrations.diffusers import capture_subject_attention
from multicrafter import UserError
from multicrafter.cli import main
from multicrafter.demo.serve import desk as desks
from multicrafter.demo.serve import drawing as drawings
from multicrafter.demo.serve import page, views
from multicrafter.demo.serve.desk import DEFECT, Desk, Visitor
from multicrafter.demo.serve.drawing import (
    Cancelled,
    Drawing,
    Drawn,
    DrawRequest,
    Limits,
    Maps,
    Recorder,
    draw,
    read_upload,
)
from multicrafter.demo.serve.server import CLOSED, Guard, listening
from multicrafter.models.finding import IdentityFinder, MapFinder, Places
from multicrafter.pipeline import MultiCrafterPipeline
from multicrafter.world.strangers import strangers
from multicrafter_tiny import MAKERS
from PIL import Image


def picture(colour: tuple[int, int, int] = (200, 30, 30), size: tuple[int, int] = (40, 30)) -> Image.Image:
    return Image.new("RGB", size, colour)


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def asked(**changes: Any) -> DrawRequest:
    two = (picture(), picture((30, 30, 200)))
    plain = {"references": two, "prompt": "two people", "seed": 3, "num_steps": 4, "guidance": 3.5, "size": 32}
    return DrawRequest(**{**plain, "separation": "draft", **changes})  # type: ignore[arg-type]


@pytest.fixture
def pipeline(pipe: Any) -> MultiCrafterPipeline:
    return MultiCrafterPipeline(pipe, notes={"num_references": 2, "size": 32, "reference_size": 16})


def same(a: Image.Image, b: Image.Image) -> bool:
    return np.array_equal(np.asarray(a), np.asarray(b))


# A request


@pytest.mark.parametrize("way", drawings.WAYS)
def test_both_pictures_are_those_of_the_pipeline(pipeline: MultiCrafterPipeline, way: Any) -> None:
    seen: list[tuple[int, int]] = []
    drawing = draw(pipeline, asked(separation=way), progress=lambda *at: seen.append(at))
    given: dict[str, Any] = {"seed": 3, "num_steps": 4, "guidance": 3.5, "size": 32, "reference_size": 16}
    references = list(asked().references)
    assert same(drawing.method.picture, pipeline("two people", references, separation=way, **given)[0])
    bound = pipeline.bindings[0]
    assert (drawing.draft is None) == (bound.places is None)
    plain = drawing.method if way == "none" else drawing.plain
    assert (drawing.plain is None) == (way == "none") and plain is not None
    assert same(plain.picture, pipeline("two people", references, separation="none", **given)[0])
    expected = bound.num_function_evaluations + (0 if way == "none" else 4)
    assert drawing.passes == expected == {"draft": 11, "none": 4}.get(way, 8)
    of = 4 if way == "none" else 8
    assert seen[-1] == (of, of) and [at for at, _ in seen] == sorted({at for at, _ in seen})


MADE = {name: make for name, make in MAKERS.items() if name != "qwen_image_edit_2509"}


@pytest.mark.parametrize("name", MADE)
def test_every_backbone_draws_with_maps_of_every_block(name: str) -> None:
    """Where guidance takes a second pass, the maps are still one of each step."""
    pipeline = MultiCrafterPipeline(MADE[name]())
    assert pipeline.backbone.name == name
    size = 4 * pipeline.backbone.token_side(pipeline.pipe)
    drawing = draw(pipeline, asked(num_steps=2, size=size))
    assert drawing.plain is not None and drawing.plain.maps is not None
    guided = pipeline.backbone.has_true_guidance(pipeline.pipe) and pipeline.backbone.default_true_guidance != 1
    assert drawing.passes == (3 + 2 + 2) * (2 if guided else 1)
    maps = drawing.plain.maps
    assert maps.steps == (0, 1) and maps.values.shape == (2, len(maps.blocks), 2, 16)
    assert all(
        part in " ".join(maps.blocks) for part in (("transformer_blocks.0", "single") if "qwen" not in name else ("0",))
    )
    assert float(maps.values.min()) >= 0 and float(maps.values.sum(2).max()) <= 1.01 and float(maps.values.max()) > 0


def test_a_wide_picture_of_people_with_several_references(pipeline: MultiCrafterPipeline) -> None:
    """Height and width, references of their own shapes, two of the first person: one map, one box and one row of the table a person."""
    three = (picture(), picture((220, 90, 30), size=(20, 40)), picture((30, 30, 200)))
    request = asked(references=three, size=(32, 64), reference_shape="own", references_per_subject=(2, 1), num_steps=2)
    drawing = draw(pipeline, request)
    assert drawing.method.picture.size == (64, 32) and drawing.draft is not None
    maps = drawing.method.maps
    assert maps is not None and maps.grid == (4, 8) and maps.values.shape == (2, 2, 2, 32)
    assert drawing.method.places.boxes.shape == drawing.draft.boxes.shape == (1, 2, 4)
    given = {"seed": 3, "num_steps": 2, "guidance": 3.5, "size": (32, 64), "reference_size": 16, "separation": "draft"}
    (want,) = pipeline("two people", list(three), reference_shape="own", references_per_subject=[2, 1], **given)
    assert same(drawing.method.picture, want)
    html = views.result(drawing, finder=pipeline.finder, adapter=True, trained_for=2)
    assert "A is shown by pictures 1 to 2. B is shown by picture 3." in html and "32 x 64 pixels" in html
    assert html.count("<td><b") == 2 and views.maps(drawing, 1, 0).count("<figure") == 4


@pytest.mark.parametrize(("text", "counts"), [("", None), (" 2 1 ", (2, 1)), ("2,1", (2, 1))])
def test_pictures_of_each_person_are_read(text: str, counts: Any) -> None:
    assert page._counts(text) == counts
    with pytest.raises(UserError, match="must be whole numbers, such as 2 1"):
        page._counts(text + "x")


def test_maps_are_those_of_the_step_and_the_block(pipeline: MultiCrafterPipeline) -> None:
    """Against maps captured one step at a time by a capture of our own."""
    drawing = draw(pipeline, asked(separation="none"))
    recorded = drawing.method.maps
    assert recorded is not None and recorded.steps == (0, 1, 2, 3) and recorded.grid == (4, 4)
    assert recorded.blocks == ("transformer_blocks.0.attn", "single_transformer_blocks.0.attn")
    num_text = pipeline.backbone.encode_prompts(pipeline.pipe, ["two people"]).embeds.shape[1]
    layout = pipeline.backbone.layout(num_text, (4, 4), [(2, 2)] * 2)
    own: list[dict[str, torch.Tensor]] = []
    with capture_subject_attention(
        pipeline.pipe.transformer, layout, blocks=lambda _: True, keep_blocks=True
    ) as captured:
        pipeline(
            "two people", list(asked().references), seed=3, num_steps=4, guidance=3.5, size=32, reference_size=16,
            callback_on_step_end=lambda *_: own.append({k: v[0].clone() for k, v in captured.blocks.items()}),
        )  # fmt: skip
    for step, blocks in enumerate(own):
        for index, name in enumerate(recorded.blocks):
            torch.testing.assert_close(recorded.at(step, index), blocks[name], atol=1e-3, rtol=0)
        torch.testing.assert_close(recorded.at(step, -1), torch.stack(list(blocks.values())).mean(0), atol=1e-3, rtol=0)
    assert not torch.allclose(recorded.at(0, 0), recorded.at(3, 0)) and not torch.allclose(
        recorded.at(0, 0), recorded.at(0, 1)
    )


def test_separated_attention_leaks_nothing(pipeline: MultiCrafterPipeline) -> None:
    """Under the masks that it was drawn with: image tokens of one subject do not look at the other's reference at all."""
    drawing = draw(pipeline, asked())
    masks = pipeline.bindings  # of the plain picture, the last one
    assert masks[0].masks is None and drawing.plain is not None
    assert drawing.method.maps is not None and drawing.plain.maps is not None
    pipeline(
        "two people", list(asked().references), seed=3, num_steps=4, guidance=3.5, size=32, reference_size=16, separation="draft"
    )  # fmt: skip
    owners = pipeline.bindings[0].masks
    assert owners is not None
    for maps, most in ((drawing.method.maps, 1e-6), (drawing.plain.maps, 1.0)):
        other = (maps.at(2, -1) * owners[0].flip(0)).max()
        assert float(other) <= most
    assert float((drawing.plain.maps.at(2, -1) * owners[0].flip(0)).max()) > 0


def test_in_flight_the_steps_before_the_binding_are_not_shown(pipeline: MultiCrafterPipeline) -> None:
    drawing = draw(pipeline, asked(separation="in-flight", num_steps=6))
    assert drawing.method.maps is not None and drawing.plain is not None and drawing.plain.maps is not None
    assert drawing.method.maps.steps[0] > 0 and drawing.method.maps.steps[-1] == 5
    assert drawing.plain.maps.steps == tuple(range(6))


def test_of_a_guided_step_the_pass_with_the_prompt_is_kept() -> None:
    recorder = Recorder((1, 1), passes_per_step=2)
    for value in (9.0, 9.0, 1.0, 2.0):  # a guided draft of one step, then a guided step
        recorder.after_pass(torch.full((1, 1, 1), value))
    recorder.after_step(0)
    for value in (3.0, 4.0):
        recorder.after_pass(torch.full((1, 1, 1), value))
    recorder.after_step(1)
    assert recorder.maps is not None and recorder.maps.values.flatten().tolist() == [1.0, 3.0]
    assert recorder.mean is not None and float(recorder.mean) == 2.0 and recorder.passes == 6


def test_large_maps_are_averaged_not_cut() -> None:
    maps = torch.rand(1, 2, 64 * 64, generator=torch.Generator().manual_seed(0))
    small = drawings.coarser(maps, (64, 64))
    assert small.shape == (1, 2, 32 * 32)
    torch.testing.assert_close(small.mean(-1), maps.mean(-1))
    assert drawings.coarser(maps[..., : 8 * 8], (8, 8)).shape == (1, 2, 64)


def test_cancelling_stops_before_the_next_pass_and_leaves_the_model_as_it_was(pipeline: MultiCrafterPipeline) -> None:
    before = draw(pipeline, asked()).method.picture
    passes = 0

    def after_two() -> bool:
        nonlocal passes
        passes += 1
        return passes > 2

    transformer = pipeline.pipe.transformer
    hooks = len(transformer._forward_hooks), len(transformer._forward_pre_hooks)
    with pytest.raises(Cancelled):
        draw(pipeline, asked(), cancelled=after_two)
    assert passes == 3 and (len(transformer._forward_hooks), len(transformer._forward_pre_hooks)) == hooks
    assert same(draw(pipeline, asked()).method.picture, before)


def test_leakage_is_the_share_from_the_others_place() -> None:
    """A stands left, B right; reference A gets 3 from its own place and 1 from B's, reference B nothing from A's."""
    values = torch.tensor([[3.0, 1.0, 3.0, 1.0], [0.0, 2.0, 0.0, 2.0]])[None, None]
    places = Places(torch.tensor([[[0.0, 0.0, 8.0, 16.0], [8.0, 0.0, 16.0, 16.0]]]), torch.ones(1, 2))
    drawn = Drawn(picture(size=(16, 16)), places, Maps(values, (2, 2), (0,), ("x",)))
    assert drawn.leakage(0, -1).tolist() == pytest.approx([0.25, 0.0])
    lost = Places(torch.cat([places.boxes[:, :1], torch.full((1, 1, 4), torch.nan)], 1), places.similarity)
    assert drawn._replace(places=lost).leakage(0, 0).isnan().all()
    assert drawn._replace(maps=None).leakage(0, 0).isnan().all()


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"references": ()}, "at least one picture"),
        ({"prompt": "  "}, "what the picture should show"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**53}, "seed must be a whole number from 0 to 9007199254740991"),  # as a float it would be another
        ({"num_steps": 0}, "num_steps"),
        ({"guidance": float("nan")}, "guidance"),
        ({"guidance": -1.0}, "guidance"),
        ({"separation": "masks"}, "separation"),
        ({"size": 0}, "size"),
        ({"size": (32, 0)}, "size"),
        ({"reference_shape": "round"}, "shape must be square or own, got 'round'"),
        ({"references_per_subject": (2, 1)}, "must add up to the 2 that you gave, got 2 1"),
        ({"references_per_subject": (0, 2)}, "must add up to the 2"),
    ],
)
def test_a_wrong_request_is_one_sentence(changes: dict[str, Any], word: str) -> None:
    with pytest.raises(UserError, match=word):
        asked(**changes)


@pytest.mark.parametrize(
    "changes",
    [{"references": (picture(),) * 3}, {"prompt": "x" * 21}, {"num_steps": 6}, {"size": 65}, {"size": (32, 65)}],
)
def test_a_request_beyond_the_limits_is_refused(changes: dict[str, Any]) -> None:
    limits = Limits(max_references=2, max_characters=20, max_steps=5, max_size=64)
    asked(num_steps=5, size=64).check(limits)
    with pytest.raises(UserError, match="at most"):
        asked(**changes).check(limits)


def test_uploads_are_read_or_refused_in_one_sentence_without_a_path() -> None:
    limits = Limits(max_bytes=5000, max_pixels=2_000_000)
    read = read_upload(png(Image.new("RGBA", (1500, 20), (255, 0, 0, 0))), "a.png", limits)
    assert read.mode == "RGB" and read.size == (1024, 14)
    noise = np.random.default_rng(0).integers(0, 255, (60, 60, 3), dtype=np.uint8)
    for content, word in (
        (b"hello", "cannot be read as a picture"),
        (png(picture())[:60], "cannot be read as a picture"),
        (b"", "cannot be read as a picture"),
        (png(Image.fromarray(noise)), "at most 0.0 MB"),
        (png(Image.new("1", (2000, 1001))), "too many pixels"),
    ):
        with pytest.raises(UserError, match=word) as refused:
            read_upload(content, "holiday.png", limits)
        said = str(refused.value)
        assert said.startswith("holiday.png ") and said.endswith(".") and "/" not in said and "\n" not in said


# Visitors


class Model:
    """Stands for `draw`: waits until it is let go, counts, fails where the prompt says so."""

    def __init__(self) -> None:
        self.go, self.started, self.prompts = threading.Event(), threading.Event(), list[str]()
        self.go.set()

    def __call__(self, pipeline: Any, request: DrawRequest, *, progress: Any, cancelled: Any) -> Drawing:
        self.prompts.append(request.prompt)
        self.started.set()
        progress(1, 8)
        while not self.go.wait(0.005):
            if cancelled():
                raise Cancelled
        if request.prompt == "wrong":
            raise UserError("size must be small, got 9")
        if request.prompt == "broken":
            raise RuntimeError("/secret/path")
        nowhere = Places(torch.full((1, 2, 4), torch.nan), torch.full((1, 2), torch.nan))
        drawn = Drawn(picture(), nowhere, None)
        return Drawing(request=request, method=drawn, plain=drawn, draft=None, passes=1, seconds=1.0)


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Model:
    made = Model()
    monkeypatch.setattr(desks, "draw", made)
    return made


@pytest.fixture
def desk(model: Model) -> Any:
    made = Desk(None, Limits(max_waiting=2, max_visitors=3, max_references=2))  # type: ignore[arg-type]
    yield made
    model.go.set()
    made.close()
    assert not made._thread.is_alive()


def test_requests_are_drawn_in_their_order_and_each_gets_its_own(desk: Desk, model: Model) -> None:
    model.go.clear()
    jobs = [desk.submit("ann", asked(prompt="a"))]
    assert model.started.wait(10)
    jobs += [desk.submit(who, asked(prompt=who)) for who in ("bob", "cy")]
    assert [desk.ahead(job) for job in jobs] == [0, 1, 2]
    assert "2 requests are ahead" in views.waiting(desk, jobs[2]) and "step 1 of 8" in views.waiting(desk, jobs[0])
    with pytest.raises(UserError, match="2 requests are waiting"):
        desk.submit("dan", asked())
    with pytest.raises(UserError, match="of yours"):
        desk.submit("ann", asked())
    model.go.set()
    assert all(job.over.wait(10) for job in jobs) and model.prompts == ["a", "bob", "cy"]
    assert [job.state for job in jobs] == ["done"] * 3
    assert {desk.visitor(w).drawing.request.prompt for w in ("bob", "cy")} == {"bob", "cy"}  # type: ignore[union-attr]


def test_a_request_can_be_cancelled_while_it_waits_and_while_it_is_drawn(desk: Desk, model: Model) -> None:
    model.go.clear()
    drawn, waits = desk.submit("ann", asked()), desk.submit("bob", asked(prompt="never"))
    assert model.started.wait(10)
    assert desk.cancel("bob") and waits.state == "cancelled" and not desk.cancel("bob")
    assert desk.cancel("ann") and drawn.over.wait(10) and drawn.state == "cancelled"
    assert desk.visitor("ann").drawing is None and not desk.cancel("nobody")
    model.go.set()
    assert desk.submit("ann", asked(prompt="again")).over.wait(10)
    assert model.prompts == ["two people", "again"]


def test_who_leaves_is_forgotten_and_stops_working(desk: Desk, model: Model) -> None:
    model.go.clear()
    desk.add_upload("ann", png(picture()), "a.png")
    job = desk.submit("ann", asked())
    assert model.started.wait(10)
    desk.leave("ann")
    assert job.over.wait(10) and job.state == "cancelled"
    assert "ann" not in desk._visitors and desk.visitor("ann").references == []


def test_the_one_who_was_away_longest_is_forgotten_but_nobody_who_waits(desk: Desk, model: Model) -> None:
    model.go.clear()
    desk.submit("busy", asked())
    for who in ("a", "b", "c", "d"):
        desk.visitor(who)
    assert list(desk._visitors) == ["busy", "c", "d"]


def test_failures_are_sentences_and_the_next_request_is_drawn(desk: Desk, model: Model) -> None:
    wrong, broken = desk.submit("ann", asked(prompt="wrong")), desk.submit("bob", asked(prompt="broken"))
    assert wrong.over.wait(10) and broken.over.wait(10)
    assert (wrong.state, wrong.sentence) == ("failed", "Size must be small, got 9.")
    assert (broken.state, broken.sentence) == ("failed", DEFECT) and "secret" not in broken.sentence
    after = desk.submit("ann", asked())
    assert after.over.wait(10) and after.state == "done"


def test_no_more_references_than_allowed(desk: Desk) -> None:
    for name in ("a.png", "b.png"):
        desk.add_upload("ann", png(picture()), name)
    with pytest.raises(UserError, match="room for 2"):
        desk.add_upload("ann", png(picture()), "c.png")
    desk.set_references("bob", [picture()] * 5)
    assert len(desk.visitor("bob").references) == 2


def test_a_closed_desk_takes_nothing(desk: Desk, model: Model) -> None:
    model.go.clear()
    first, second = desk.submit("ann", asked()), desk.submit("bob", asked())
    desk.close()
    assert first.over.is_set() and second.state == "cancelled"
    with pytest.raises(UserError, match="closing"):
        desk.submit("cy", asked())


# Pieces of HTML


@pytest.fixture
def drawing(pipeline: MultiCrafterPipeline) -> Drawing:
    return draw(pipeline, asked(prompt="<b>two</b>"))


def test_pieces_have_words_for_pictures_and_nothing_unescaped(drawing: Drawing) -> None:
    visitor = Visitor(references=list(drawing.request.references))
    whole = (
        views.result(drawing, finder=MapFinder(), adapter=True, trained_for=2)
        + views.maps(drawing, 1, 0)
        + views.references(visitor)
    )
    images = re.findall(r"<img[^>]*>", whole)
    assert len(images) == 2 + 4 + 2 and all(re.search(r'alt="[^"]+"', tag) for tag in images)
    assert all('src="data:image/png;base64,' in tag for tag in images)
    assert "<b>two" not in whole and "&lt;b&gt;two" in whole
    assert not re.search(r'(src|href)="(?!data:)', whole)
    assert whole.index("With the method") < whole.index(">Without the method<")
    assert "No recognizer" in whole and "cosine" in views.result(
        drawing, finder=IdentityFinder(backend=SimpleNamespace(detect_and_embed=list)), adapter=True, trained_for=2
    )  # type: ignore[arg-type]
    assert views.sentence("<i>", "error").count("&lt;i&gt;") == 1
    assert "#mc-result" in views.sentence("Done.", down=True) and "#mc-result" not in views.sentence("Done.")


def test_one_picture_says_that_nothing_was_kept_apart(drawing: Drawing) -> None:
    alone = dataclasses.replace(drawing, plain=None, draft=None)
    text = views.result(alone, finder=MapFinder(), adapter=False, trained_for=2)
    assert "Attention as it is" in text and "With the method" not in text and text.count("<img") == 1


def test_more_references_than_trained_for_are_said(drawing: Drawing) -> None:
    few = [views.result(drawing, finder=MapFinder(), adapter=True, trained_for=n) for n in (1, 2)]
    assert (
        "You gave 2 pictures, but the adapter was trained for 1: expect blending." in few[0] and "expect" not in few[1]
    )
    both = dataclasses.replace(drawing, request=dataclasses.replace(drawing.request, references_per_subject=(2,)))
    each = [views.result(both, finder=MapFinder(), adapter=True, trained_for=2, of_each=n) for n in (1, 2)]
    assert "You gave 2 pictures of one person, but the adapter was trained with 1 of each" in each[0]
    assert "of each" not in each[1] and "of each" not in few[0]


def test_two_people_with_one_picture_are_told(drawing: Drawing) -> None:
    def said(references: tuple[Image.Image, ...], counts: Any = None) -> str:
        request = dataclasses.replace(
            drawing.request, references=references, references_per_subject=counts, num_steps=1
        )
        text = views.result(
            dataclasses.replace(drawing, request=request), finder=MapFinder(), adapter=True, trained_for=2
        )
        assert " 1 step, " in text
        return text

    red, blue = picture(), picture((30, 30, 200))
    assert "A and B have the same picture" in said((red, picture()))
    assert "A and C have the same picture" in said((red, red, blue, red), (2, 1, 1))
    assert "same picture" not in said((red, blue)) + said((red, red, blue), (2, 1))


def test_who_is_missing_in_the_draft_is_named(drawing: Drawing) -> None:
    half = Places(torch.tensor([[[0.0, 0.0, 8.0, 8.0], [torch.nan] * 4]]), torch.tensor([[0.5, torch.nan]]))
    text = views.result(dataclasses.replace(drawing, draft=half), finder=MapFinder(), adapter=True, trained_for=2)
    assert "The draft does not show B" in text and "not found" in text
    assert [b["letter"] for b in views.boxes(half)] == ["A"] and views.boxes(half)[0]["similarity"] == "0.50"


def test_sliders_choose_step_and_block(drawing: Drawing) -> None:
    pieces = {(s, b): views.maps(drawing, s, b) for s in (1, 4) for b in (0, 1, 2)}
    assert len(set(pieces.values())) == 6
    assert "step 4, single transformer blocks 0" in pieces[4, 2] and "step 1, mean of all blocks" in pieces[1, 0]
    nowhere = Places(torch.full((1, 2, 4), torch.nan), torch.full((1, 2), torch.nan))
    lost = dataclasses.replace(drawing, method=drawing.method._replace(places=nowhere), plain=None)
    assert views.maps(lost, 1, 0).count("not found in the picture") == 2
    assert views.maps(drawing, 99, 99) == pieces[4, 2] and views.maps(drawing, -3, 0) == pieces[1, 0]


def test_a_map_has_the_colour_of_its_reference_where_it_is_highest() -> None:
    values = torch.tensor([[0.0, 0.5, 0.25, 0.0], [0.0, 0.0, 0.0, 0.1]])[None, None]
    places = Places(torch.full((1, 2, 4), torch.nan), torch.full((1, 2), torch.nan))
    drawn = Drawn(picture((128, 128, 128), (8, 8)), places, Maps(values, (2, 2), (0,), ("x",)))
    made = np.asarray(views.map_picture(drawn, 0, 0, 0, top=0.5)).astype(int)
    side = made.shape[0] // 2
    top_left, top_right, bottom_left = made[0, 0], made[0, side], made[side, 0]
    assert top_left.tolist() == [128] * 3
    assert top_right.tolist() == [round(0.1 * 128 + 0.9 * c) for c in views.COLOURS[0]]
    assert np.abs(bottom_left - (top_left + top_right) / 2).max() <= 1
    style = (Path(views.__file__).parent / "style.css").read_text()
    for index, colour in enumerate(views.COLOURS):
        assert f".mc-{views.letter(index)} {{ --mc: #{bytes(colour).hex()}; }}" in style


def test_a_reference_has_one_colour_in_the_maps_and_on_the_page() -> None:
    style = (Path(views.__file__).parent / "style.css").read_text()
    for index, colour in enumerate(views.COLOURS):
        assert f".mc-{views.letter(index)} {{ --mc: #{bytes(colour).hex()}; }}" in style


def test_every_class_of_a_piece_has_a_style() -> None:
    folder = Path(views.__file__).parent
    style = (folder / "style.css").read_text()
    used = {n for p in folder.glob("*.jinja") for n in re.findall(r"(?<!#)mc-[a-z]+", p.read_text())}
    assert {name for name in used if f".{name}" not in style} == set()


# The port


def call(app: Any, path: str, method: str = "GET", **headers: str) -> tuple[int, dict[str, str]]:
    sent: list[Any] = []

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def send(message: Any) -> None:
        sent.append(message)

    given = [(k.replace("_", "-").encode(), v.encode()) for k, v in {"host": "127.0.0.1:7860", **headers}.items()]
    asyncio.run(app({"type": "http", "path": path, "method": method, "headers": given}, receive, send))
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}


async def answers(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b""})


def test_files_of_the_machine_are_closed_and_uploads_bounded() -> None:
    app = Guard(answers, max_upload=1000, hosts=("127.0.0.1", "localhost"))
    status, headers = call(app, "/")
    assert status == 200 and "default-src 'self'" in headers["content-security-policy"]
    for path in CLOSED:
        assert call(app, path)[0] == 404
    assert call(app, "/gradio_api/file=/etc/passwd")[0] == call(app, "/gradio_api/file=http://example.org")[0] == 404
    upload = "/gradio_api/upload"
    assert call(app, upload, "POST", content_length="1000")[0] == 200
    assert call(app, upload, "POST", content_length="1001")[0] == 413
    assert call(app, upload, "POST")[0] == 411
    for length, status in (("20000", 200), ("1000001", 413), ("", 411)):  # a prompt, and a flood
        assert call(app, "/gradio_api/queue/join", "POST", content_length=length)[0] == status


def test_on_loopback_another_name_is_refused() -> None:
    app = Guard(answers, max_upload=1, hosts=("127.0.0.1", "localhost", "::1"))
    assert call(app, "/", host="evil.example")[0] == 403 and call(app, "/", host="[::1]:80")[0] == 200
    assert call(Guard(answers, max_upload=1, hosts=None), "/", host="evil.example")[0] == 200


def test_a_port_that_is_taken_is_one_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="must be free to listen on"):
            listening("127.0.0.1", taken.getsockname()[1])
    with listening("127.0.0.1", 0) as free:
        assert free.getsockname()[1] > 0
    with pytest.raises(UserError, match="--host"):
        listening("no such host", 0)


def test_only_uploads_are_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path / "up"))
    upload = tmp_path / "up" / "abc" / "a.png"
    upload.parent.mkdir(parents=True)
    upload.write_bytes(b"x")
    (tmp_path / "up" / "tmp1").touch()
    (tmp_path / "up" / "tmp2").write_bytes(b"half")
    page.forget(upload)
    assert sorted(p.name for p in (tmp_path / "up").rglob("*")) == ["tmp2"]
    mine = tmp_path / "mine.png"
    mine.write_bytes(b"x")
    with pytest.raises(ValueError, match="folder of uploads"):
        page.forget(mine)
    assert mine.exists()


@pytest.mark.parametrize("value", [None, "3", True, 2.5, float("nan"), float("inf")])
def test_a_field_that_holds_no_whole_number_is_one_sentence(value: Any) -> None:
    assert page._number("seed", 7.0) == 7
    with pytest.raises(UserError, match="seed must be a whole number"):
        page._number("seed", value)


def test_without_gradio_the_command_names_the_line_to_install_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["serve"]) == 2
    assert 'pip install "multicrafter[serve]"' in capsys.readouterr().err


def test_strangers_are_as_many_as_asked_for_and_others_with_another_seed() -> None:
    portraits, caption = strangers(3, 1)
    assert portraits.shape == (3, 3, 128, 128) and caption.startswith("three people")
    assert torch.equal(strangers(3, 1)[0], portraits) and not torch.equal(strangers(3, 2)[0], portraits)
