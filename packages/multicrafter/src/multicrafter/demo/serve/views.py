"""Pieces of HTML for the page, each with its pictures inside: no file is written, and none has to be fetched."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from multicrafter.demo.serve.desk import Desk, Job, Visitor
from multicrafter.demo.serve.drawing import Drawing, Drawn
from multicrafter.models.finding import IdentityFinder, Places
from multicrafter.models.pictures import shared
from multicrafter.pages import embedded, render

HERE = Path(__file__).parent
COLOURS = ((194, 65, 12), (25, 113, 194), (39, 128, 58), (156, 54, 181))
"""Of the references, in their order; style.css has the same."""
MAP_SIDE = 384
"""Least side in pixels of a picture of a map, so that tokens have sharp edges."""
THUMB = 160


def letter(index: int) -> str:
    """What a reference is called: A, B, ...

    >>> letter(0), letter(3)
    ('A', 'D')
    """
    return chr(65 + index)


def png(picture: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


def two(value: float) -> str:
    """Two decimals, or a dash for what is not known.

    >>> two(0.934), two(float("nan"))
    ('0.93', '–')
    """
    return f"{value:.2f}" if math.isfinite(value) else "–"


def percent(value: float) -> str:
    """A share.

    >>> percent(0.574), percent(float("nan"))
    ('57 %', '–')
    """
    return f"{100 * value:.0f} %" if math.isfinite(value) else "–"


def sentence(text: str, kind: str = "", *, down: bool = False) -> str:
    """One line of status; kind "error" marks it, ``down`` leads to the pictures on a phone, where they stand below."""
    return render(HERE, "status.jinja", text=text, kind=kind, share=None, down=down)


def waiting(desk: Desk, job: Job) -> str:
    """How far a request is."""
    if job.state == "waiting":
        ahead = desk.ahead(job)
        people = "1 request is" if ahead == 1 else f"{ahead} requests are"
        return sentence(f"In line: {people} ahead of yours." if ahead else "In line: yours is next.")
    if not job.step:
        return render(HERE, "status.jinja", text="Looking at the references ...", kind="", share=0, down=False)
    text = f"Drawing: step {job.step} of {job.of}."
    return render(HERE, "status.jinja", text=text, kind="", share=100 * job.step // max(job.of, 1), down=False)


def references(visitor: Visitor) -> str:
    """The visitor's references, small."""
    shown = []
    for index, picture in enumerate(visitor.references):
        small = picture.copy()
        small.thumbnail((THUMB, THUMB), Image.Resampling.LANCZOS)
        shown.append({"letter": letter(index), "src": embedded(png(small))})
    return render(HERE, "references.jinja", references=shown)


def nothing_yet() -> str:
    """What stands in the place of the result before there is one."""
    return render(HERE, "nothing.jinja")


def boxes(places: Places) -> list[dict[str, Any]]:
    """Boxes of who was found, for a drawing over the picture."""
    found = []
    for index, (box, similarity) in enumerate(
        zip(places.boxes[0].tolist(), places.similarity[0].tolist(), strict=True)
    ):
        if all(math.isfinite(v) for v in box):
            left, top, right, bottom = box
            found.append(
                {"letter": letter(index), "x": left, "y": top, "width": right - left, "height": bottom - top,
                 "similarity": two(similarity)}
            )  # fmt: skip
    return found


def _picture(drawn: Drawn, title: str, text: str, drawing: Drawing, name: str) -> dict[str, Any]:
    width, height = drawn.picture.size
    found = ", ".join(f"{b['letter']} with similarity {b['similarity']}" for b in boxes(drawn.places)) or "nobody"
    return {
        "title": title, "text": text, "width": width, "height": height, "src": embedded(png(drawn.picture)),
        "boxes": boxes(drawn.places), "line": max(width, height) / 90, "file": f"multicrafter_{name}_seed{drawing.request.seed}.png",
        "alt": f"{title}: {drawing.request.prompt}. Found in it: {found}.",
    }  # fmt: skip


def result(drawing: Drawing, *, finder: Any, adapter: bool, trained_for: int, of_each: int = 1) -> str:
    """The picture with the method and the one without, side by side, and who was found where.

    Args:
        drawing: What came of the request.
        finder: Of the pipeline; says what a similarity is.
        adapter: Whether the model has one.
        trained_for: People that it was trained for.
        of_each: Pictures of each that it was trained for.
    """
    base = "the adapter" if adapter else "the model"
    if drawing.plain is None:
        pictures = [_picture(drawing.method, "Attention as it is", f"By {base}, nothing kept apart.", drawing, "plain")]
    else:
        pictures = [
            _picture(
                drawing.method, "With the method", "Where one of them is drawn, the model may not look at the others' pictures.", drawing, "with"
            ),
            _picture(
                drawing.plain, "Without the method", "The same model, and the same noise. It may look anywhere.", drawing, "without"
            ),
        ]  # fmt: skip
    columns: list[tuple[str, Places]] = [
        *([("in the draft", drawing.draft)] if drawing.draft is not None else []),
        (pictures[0]["title"].lower() if drawing.plain is not None else "in the picture", drawing.method.places),
        *([("without", drawing.plain.places)] if drawing.plain is not None else []),
    ]
    rows = [
        {"letter": letter(i), "cells": [_found(places, i) for _, places in columns]}
        for i in range(drawing.method.places.boxes.shape[1])
    ]
    size = " x ".join(map(str, drawing.request.height_width))
    identity = isinstance(finder, IdentityFinder)
    missing = [] if drawing.draft is None else [
        letter(i) for i, gone in enumerate(drawing.draft.boxes[0].isnan().any(-1).tolist()) if gone
    ]  # fmt: skip
    twins = shared(drawing.request.references, drawing.request.references_per_subject)
    return render(
        HERE, "result.jinja", pictures=pictures, prompt=drawing.request.prompt, columns=[name for name, _ in columns], rows=rows,
        identity=identity, missing=missing, twins=[letter(i) for i in twins or ()], base=base, trained_for=trained_for, of_each=of_each,
        several=max(drawing.request.references_per_subject or (1,)), seed=drawing.request.seed, steps=drawing.request.num_steps,
        guidance=f"{drawing.request.guidance:g}", size=size, shows=_shows(drawing), passes=drawing.passes, seconds=f"{drawing.seconds:.1f}",
    )  # fmt: skip


def _shows(drawing: Drawing) -> str:
    """Which pictures show whom, where somebody has several."""
    counts, texts, done = drawing.request.references_per_subject or (), [], 0
    if max(counts, default=1) == 1:
        return ""
    for index, count in enumerate(counts):
        pictures = f"picture {done + 1}" if count == 1 else f"pictures {done + 1} to {done + count}"
        texts.append(f"{letter(index)} is shown by {pictures}.")
        done += count
    return " ".join(texts)


def _found(places: Places, index: int) -> str:
    similarity = float(places.similarity[0, index])
    return two(similarity) if math.isfinite(similarity) else "not found"


def map_picture(drawn: Drawn, step: int, block: int, index: int, top: float) -> Image.Image:
    """A map over the faint picture: the more attention a token paid to the reference, the fuller the reference's colour.

    ``top`` is the attention that gets the full colour.
    """
    assert drawn.maps is not None
    rows, columns = drawn.maps.grid
    cell = max(1, math.ceil(MAP_SIDE / max(rows, columns)))
    size = (columns * cell, rows * cell)
    ground = np.asarray(drawn.picture.convert("L").resize(size, Image.Resampling.NEAREST), np.float32)[..., None]
    ground = 128 + 0.45 * (ground - 128)
    share = (drawn.maps.at(step, block)[index].reshape(rows, columns).numpy() / max(top, 1e-9)).clip(0, 1)
    weight = 0.9 * np.kron(share, np.ones((cell, cell), np.float32))[..., None]
    mixed = (1 - weight) * ground + weight * np.array(COLOURS[index % len(COLOURS)], np.float32)
    return Image.fromarray(mixed.round().clip(0, 255).astype(np.uint8))


def maps(drawing: Drawing, step: int, block: int) -> str:
    """Where each reference was looked at in one step and one block, with the method and without.

    Args:
        drawing: The result.
        step: From 1; one that was not recorded gives the nearest that was.
        block: From 1; 0 is the mean of all.
    """
    shown = [
        (label, drawn, drawn.maps)
        for label, drawn in (
            ("with the method" if drawing.plain is not None else "attention as it is", drawing.method),
            ("without", drawing.plain),
        )
        if drawn is not None and drawn.maps is not None
    ]
    rows = []
    at = [min(range(len(m.steps)), key=lambda i: abs(m.steps[i] + 1 - step)) for _, _, m in shown]
    block_index = [min(block, len(m.blocks)) - 1 for _, _, m in shown]
    tops = [float(m.at(s, b).max()) for (_, _, m), s, b in zip(shown, at, block_index, strict=True)]
    top = max(tops, default=0.0)
    for (label, drawn, of), s, b in zip(shown, at, block_index, strict=True):
        leaks = drawn.leakage(s, b).tolist()
        name = "mean of all blocks" if b < 0 else of.blocks[b].removesuffix(".attn").replace("_", " ").replace(".", " ")
        rows.append(
            {
                "label": label,
                "where": f"step {of.steps[s] + 1}, {name}",
                "maps": [
                    {
                        "letter": letter(i),
                        "src": embedded(png(map_picture(drawn, s, b, i, top))),
                        "leak": percent(leaks[i]),
                        "alt": f"Where the picture {label} looked at reference {letter(i)}; from others' places: {percent(leaks[i])}",
                    }
                    for i in range(len(leaks))
                ],
            }
        )
    return render(HERE, "maps.jinja", rows=rows, top=percent(top), several=drawing.method.places.boxes.shape[1] > 1)
