"""The page, laid out with gradio (extra ``serve``). What happens on a click is in `desk`, and what is seen in `views`."""

# No `from __future__ import annotations` here: gradio reads the annotation `gr.Request` of a handler, and is imported late.

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from id_reward.images import is_animation

from multicrafter import UserError
from multicrafter.demo.serve import views
from multicrafter.demo.serve.desk import Desk, Visitor
from multicrafter.demo.serve.drawing import WAYS, DrawRequest
from multicrafter.pipeline import to_image
from multicrafter.world.strangers import strangers

TITLE = "MultiCrafter"
INTRODUCTION = """# MultiCrafter
Give pictures of several people or things and a sentence, and get one picture with all of them. Beside it you see the same model
without the method, who was recognized as whom, and where the model looked."""
TINY = """This is the tiny model that ships with the package. It draws 64 x 64 pixels and knows only the people of its drawn world,
so photos come out as nonsense. Take drawn people to see what the method does."""
PRIVATE = """Uploaded files are read and deleted at once. Pictures stay in this server's memory while this page is open.
Nothing is sent elsewhere."""
LABELS = {
    "draft": "by a short draft",
    "in-flight": "by the first steps",
    "attention": "by each block's own attention",
    "none": "not at all",
}
REFRESH = 0.15  # seconds between two looks at how far a picture is


def build(desk: Desk) -> Any:
    """The page as ``gradio.Blocks``.

    Raises:
        ImportError: gradio is missing.
    """
    import_gradio()
    import gradio as gr

    pipeline, limits = desk.pipeline, desk.limits
    has_adapter = pipeline.adapters is not None

    def key(request: gr.Request) -> str:
        return str(request.session_hash)

    def shown(html: str) -> Any:
        """An update, not a bare value: where ``gr.skip()`` came before, gradio 6.31 would file a bare value under a new id and keep it."""
        return gr.HTML(value=html)

    def shown_references(who: str) -> list[Any]:
        """References, and one button to take each away."""
        visitor = desk.visitor(who)
        buttons = [gr.Button(visible=i < len(visitor.references)) for i in range(limits.max_references)]
        return [views.references(visitor), *buttons]

    def upload(files: list[str] | None, request: gr.Request) -> list[Any]:
        """Reads uploaded files into memory and takes them off the disk."""
        problems, moving = [], []
        for path in map(Path, files or []):
            try:
                content = path.read_bytes()
                desk.add_upload(key(request), content, path.name)
                moving += [path.name[:60]] if is_animation(content) else []
            except UserError as error:
                problems.append(str(error))
            finally:
                forget(path)
        first = f"{moving[0]} holds several pictures, and the first was taken. " if moving else ""
        text = problems[0] if problems else f"{first}Now write what the picture shows."
        return [
            gr.File(value=None), views.sentence(text, "error" if problems else ""), *shown_references(key(request)),
        ]  # fmt: skip

    def take_drawn(request: gr.Request) -> list[Any]:
        """Two people of the drawn world, other ones at every click, and their caption."""
        visitor = desk.visitor(key(request))
        portraits, caption = strangers(min(2, limits.max_references), visitor.drawn_people)
        visitor.drawn_people += 1
        desk.set_references(key(request), [to_image(p) for p in portraits])
        return [caption, views.sentence("Now press Draw."), *shown_references(key(request))]

    def remover(index: int) -> Any:
        def remove(request: gr.Request) -> list[Any]:
            del desk.visitor(key(request)).references[index : index + 1]
            return shown_references(key(request))

        return remove

    async def draw(
        prompt: str,
        seed: float,
        steps: float,
        guidance: float,
        height: float,
        width: float,
        separation: str,
        reference_shape: str,
        counts: str,
        request: gr.Request,
    ) -> AsyncIterator[list[Any]]:
        """Puts the request into the line and says how far it is until it is over."""
        idle, busy = [gr.Button(interactive=True), gr.Button(interactive=False)], [
            gr.Button(interactive=False), gr.Button(interactive=True)]  # fmt: skip
        try:
            job = desk.submit(
                key(request),
                DrawRequest(
                    references=tuple(desk.visitor(key(request)).references), prompt=prompt, seed=_number("seed", seed),
                    num_steps=_number("number of steps", steps), guidance=guidance,
                    size=(_number("height", height), _number("width", width)), separation=separation,  # type: ignore[arg-type]
                    reference_shape=reference_shape, references_per_subject=_counts(counts),  # type: ignore[arg-type]
                ),
            )  # fmt: skip
        except UserError as error:
            yield [views.sentence(str(error), "error"), *[gr.skip()] * 5, *idle]
            return
        while not job.over.is_set():
            yield [views.waiting(desk, job), *[gr.skip()] * 5, *busy]
            await asyncio.sleep(REFRESH)
        if job.drawing is None:
            kind = "error" if job.state == "failed" else ""
            yield [views.sentence(job.sentence, kind), *[gr.skip()] * 5, *idle]
            return
        drawing, recorded = job.drawing, job.drawing.method.maps
        last, count = (max(recorded.steps) + 1, len(recorded.blocks)) if recorded is not None else (1, 1)
        middle = (last + 1) // 2
        yield [
            views.sentence(f"Done in {drawing.seconds:.1f} s.", down=True),
            shown(
                views.result(
                    drawing,
                    finder=pipeline.finder,
                    adapter=has_adapter,
                    trained_for=pipeline.max_references,
                    of_each=pipeline.max_references_per_subject,
                )
            ),
            shown(views.maps(drawing, middle, 0)),
            gr.Slider(maximum=max(drawing.request.num_steps, 2), value=middle),
            gr.Slider(maximum=count, value=0),
            gr.Column(visible=recorded is not None),
            *idle,
        ]

    def look(step: float, block: float, request: gr.Request) -> Any:
        """The maps of another step or block."""
        drawing = desk.visitor(key(request)).drawing
        if drawing is None:
            return shown(views.sentence("Draw a picture first."))
        return shown(views.maps(drawing, _number("step", step), _number("block", block)))

    def cancel(request: gr.Request) -> None:
        desk.cancel(key(request))

    def leave(request: gr.Request) -> None:
        desk.leave(key(request))

    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gr.Markdown(INTRODUCTION)
        if desk.tiny:
            gr.Markdown(TINY, elem_classes="mc-note")
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                gr.Markdown("### 1. Who is in it")
                files = gr.File(
                    label=f"Pictures, at most {limits.max_references}", file_count="multiple", height=150,
                    elem_id="mc-upload",
                )  # fmt: skip
                drawn = gr.Button("Take two drawn people", elem_id="mc-people")
                references = gr.HTML(views.references(Visitor()), elem_id="mc-references")
                with gr.Row():
                    removers = [
                        gr.Button(f"Remove {views.letter(i)}", visible=False, size="sm", min_width=60, elem_id=f"mc-remove-{i}")
                        for i in range(limits.max_references)
                    ]  # fmt: skip
                gr.Markdown("### 2. What it shows")
                prompt = gr.Textbox(
                    label="Prompt", lines=2, elem_id="mc-prompt",
                    placeholder="two people in the park by day",
                )  # fmt: skip
                with gr.Row():
                    go = gr.Button("Draw", variant="primary", min_width=110, elem_id="mc-draw")
                    stop = gr.Button("Cancel", interactive=False, min_width=110, elem_id="mc-cancel")
                status = gr.HTML(views.sentence("Add pictures, or take two drawn people."), elem_id="mc-status")
                with gr.Accordion("Settings", open=False):
                    settings = _settings(gr, desk)
            with gr.Column(scale=3, min_width=300):
                result = gr.HTML(views.nothing_yet(), elem_id="mc-result")
                with gr.Column(visible=False) as looking:
                    gr.Markdown("### Where the model looked")
                    step = gr.Slider(1, 2, value=1, step=1, label="Step", elem_id="mc-step")
                    block = gr.Slider(0, 1, value=0, step=1, label="Block (0 is the mean of all)", elem_id="mc-block")
                    maps = gr.HTML(elem_id="mc-maps")
        gr.Markdown(PRIVATE, elem_classes="mc-faint mc-end")
        here: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private", "concurrency_limit": None}
        files.upload(upload, files, [files, status, references, *removers], **here)
        drawn.click(take_drawn, None, [prompt, status, references, *removers], **here)
        for index, button in enumerate(removers):
            button.click(remover(index), None, [references, *removers], **here)
        asked = [prompt, *settings]
        outputs = [status, result, maps, step, block, looking, go, stop]
        go.click(draw, asked, outputs, **here)
        prompt.submit(draw, asked, outputs, **here)
        stop.click(cancel, None, None, **here)
        for slider in (step, block):
            slider.input(look, [step, block], maps, trigger_mode="always_last", **here)
        page.unload(leave)
    return page


def _settings(gr: Any, desk: Desk) -> list[Any]:
    """Seed, steps, guidance, height, width, separation, the references' shape, and how many show each person.

    Fields hold no bounds of their own where gradio would cut, round or refuse in its own words: `DrawRequest` says what is wrong.
    """
    pipeline, limits = desk.pipeline, desk.limits
    side = pipeline.model.size_step
    sizes = {"step": side, "value": min(pipeline.size, limits.max_size)}
    ways = [(LABELS[way], way) for way in WAYS]
    default = pipeline.separation.mode if pipeline.separation.mode in WAYS else "none"
    return [
        gr.Number(0, label="Seed", info="Another seed, another picture", elem_id="mc-seed"),
        gr.Slider(
            1, limits.max_steps, value=min(pipeline.num_steps, limits.max_steps), step=1, label="Steps", elem_id="mc-steps"
        ),
        gr.Slider(0, 10, value=min(pipeline.guidance, 10), step=0.1, label="Guidance", elem_id="mc-guidance"),
        *(
            gr.Slider(
                2 * side, max(limits.max_size, 2 * side), label=f"{name} in pixels", elem_id=f"mc-{name.lower()}", **sizes
            )
            for name in ("Height", "Width")
        ),
        gr.Dropdown(ways, value=default, label="How people are kept apart", elem_id="mc-separation"),
        gr.Dropdown(
            [("padded to squares", "square"), ("as they are", "own")], value="square", label="Shape of the pictures you gave",
            elem_id="mc-shape",
        ),
        gr.Textbox(
            "", label="Pictures of each person", info="Such as 2 1: the first two show one person. Empty: one each.", elem_id="mc-counts",
        ),
    ]  # fmt: skip


def _counts(text: str) -> tuple[int, ...] | None:
    """Whole numbers of a field, or None where it is empty."""
    parts = (text or "").replace(",", " ").split()
    if not all(part.isdigit() and part.isascii() for part in parts):
        raise UserError("The pictures of each person must be whole numbers, such as 2 1.")
    return tuple(int(part) for part in parts) or None


def _number(what: str, value: Any) -> int:
    """A whole number of a field, which arrives as a float, or as nothing where it was emptied."""
    if (
        isinstance(value, bool)
        or not isinstance(value, (int, float))
        or value != value
        or value in (float("inf"), -float("inf"))
        or value % 1
    ):
        raise UserError(f"The {what} must be a whole number.")
    return int(value)


def forget(path: Path) -> None:
    """Takes an uploaded file off the disk, with its folder and the empty files that gradio makes beside it.

    Raises:
        ValueError: It is not in the folder of uploads.
    """
    folder = Path(os.environ["GRADIO_TEMP_DIR"])
    if not path.resolve().is_relative_to(folder.resolve()):
        raise ValueError(f"path must be in the folder of uploads {folder}, got {path}")
    path.unlink(missing_ok=True)
    with suppress(OSError):  # another upload of the same content is on its way
        path.parent.rmdir()
    for beside in folder.glob("tmp*"):
        if beside.is_file() and not beside.stat().st_size:
            beside.unlink(missing_ok=True)


def import_gradio() -> Any:
    """Gradio, told to report nothing to anybody.

    Raises:
        ImportError: It is missing.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        import gradio
    except ImportError as error:
        raise ImportError('the page needs gradio: pip install "multicrafter[serve]"') from error
    return gradio
