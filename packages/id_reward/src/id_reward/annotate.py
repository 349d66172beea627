"""A picture of a score: boxes and matches, with the references beside it (extra ``image``)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from id_reward.alignment import IdentityScore
from id_reward.images import as_image
from id_reward.outputs import MARK
from id_reward.protocols import Faces

if TYPE_CHECKING:
    from PIL import Image

# Okabe and Ito's colours, which the colour-blind can tell apart; gray for a face that is nobody's
COLOURS = ((0, 114, 178), (230, 159, 0), (0, 158, 115), (204, 121, 167), (86, 180, 233), (213, 94, 0), (240, 228, 66))
NOBODY, MISSING, PAPER, INK = (128, 128, 128), (180, 0, 0), (255, 255, 255), (20, 20, 20)
SIDE = 768  # of the picture's long side on the sheet


def annotate(
    image: Any, faces: Faces, score: IdentityScore | None, references: Sequence[Any], names: Sequence[str]
) -> Image.Image:
    """A sheet: the picture with a box around every face, and every reference in the colour of the face matched to it.

    A face that is nobody's is gray; a reference without a face is crossed out.

    Args:
        image: Anything `id_reward.images.as_array` takes.
        faces: Faces found in it.
        score: Its score, or None where it could not be scored.
        references: The references, in the score's order.
        names: Their names.

    Raises:
        ImportError: Pillow is missing.
    """
    try:
        from PIL import Image, ImageDraw, ImageFont
    except ImportError:
        raise ImportError('drawing needs Pillow: pip install "id-reward[image]"') from None
    picture = as_image(image)
    scale = SIDE / max(picture.size)
    picture = picture.resize((max(round(picture.width * scale), 1), max(round(picture.height * scale), 1)))
    owner = {face: reference for reference, face in score.matching.pairs} if score else {}
    font, thumb = ImageFont.load_default(size=16), 128
    columns = max(1, -(-len(references) * (thumb + 30) // max(picture.height, thumb + 30)))
    per_column = -(-len(references) // columns) if references else 1
    height = max(picture.height, per_column * (thumb + 30) + 10) + 34
    sheet = Image.new("RGB", (picture.width + 10 + columns * (thumb + 20), height), PAPER)
    draw = ImageDraw.Draw(sheet)
    sheet.paste(picture, (0, 0))
    for face, box in enumerate(faces.boxes * scale):
        colour = COLOURS[owner[face] % len(COLOURS)] if face in owner else NOBODY
        left, top, right, bottom = np.maximum(box, 0).tolist()
        draw.rectangle((left, top, max(right, left), max(bottom, top)), outline=colour, width=4)
        label = f"{owner[face] + 1}: {score.per_reference[owner[face]]:.2f}" if score and face in owner else "nobody"
        width = draw.textlength(label, font=font) + 8
        label_top = top - 22 if top >= 22 else top
        draw.rectangle((left, label_top, left + width, label_top + 22), fill=colour)
        draw.text((left + 4, label_top + 2), label, fill=_ink(colour), font=font)
    for number, reference in enumerate(references):
        column, row = divmod(number, per_column)
        left, top = picture.width + 15 + column * (thumb + 20), 5 + row * (thumb + 30)
        small = as_image(reference)
        small.thumbnail((thumb, thumb))
        sheet.paste(small, (left, top))
        colour = COLOURS[number % len(COLOURS)]
        draw.rectangle((left, top, left + small.width - 1, top + small.height - 1), outline=colour, width=4)
        label = f"{number + 1} {names[number]}"
        if score and number in score.matching.unmatched_references:
            draw.line((left, top, left + small.width, top + small.height), fill=MISSING, width=4)
            draw.line((left, top + small.height, left + small.width, top), fill=MISSING, width=4)
            label = f"{number + 1} missing"
        while label and draw.textlength(label, font=font) > thumb + 15:
            label = label[:-1]
        draw.text((left, top + thumb + 4), label, fill=INK, font=font)
    text = f"reward {score.reward:.3f}" if score else "cannot be scored"
    draw.text((8, height - 28), f"{text}, {len(faces.boxes)} faces, {len(references)} references", fill=INK, font=font)
    return sheet


def png(sheet: Image.Image) -> bytes:
    """The sheet as a PNG that says who wrote it, so that it may be written anew, and a picture of the user's never is."""
    from PIL.PngImagePlugin import PngInfo

    about = PngInfo()
    for key, value in MARK.items():
        about.add_text(key, value)
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG", pnginfo=about)
    return buffer.getvalue()


def _ink(colour: tuple[int, int, int]) -> tuple[int, int, int]:
    """Black or white, whichever is easier to read on the colour."""
    return INK if 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] > 140 else PAPER
