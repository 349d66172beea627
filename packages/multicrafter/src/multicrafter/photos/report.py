"""The report of a build: counts, what was dropped and why, histograms, contact sheets with masks."""

from __future__ import annotations

import io
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from id_reward.images import open_image

from multicrafter.files import write_whole
from multicrafter.pages import render
from multicrafter.photos.cache import Result
from multicrafter.photos.pictures import open_planes, unpack_masks
from multicrafter.photos.select import Photo
from multicrafter.photos.write import Record

PAPER_AESTHETICS = 0.2552  # mean HPSv2 score of the paper's data (arXiv 2509.21953, Fig. 1)
COLOURS = (
    (230, 60, 60),
    (50, 120, 230),
    (40, 170, 80),
    (240, 170, 20),
    (160, 70, 200),
    (0, 180, 190),
    (240, 110, 170),
    (130, 130, 60),
)
CELL, PAD, STRIP, PER_SHEET, SHEETS = 240, 6, 76, 20, 3


def histograms(path: Path, kept: Sequence[Photo], records: Sequence[Record], scorer: str) -> Path:
    """Six histograms of what was kept, as a PNG."""
    from matplotlib.figure import Figure

    subjects = [s for r in records for s in r["subjects"]]
    photos_of = Counter(identity for p in kept for identity in p.identities.values())
    aesthetics = [p.aesthetics for p in kept if p.aesthetics is not None]
    whole = [
        ("usable faces of a photo", [len(p.usable) for p in kept]),
        ("photos of an identity", list(photos_of.values())),
        ("references of a subject", [len(s["references"]) for s in subjects]),
    ]
    real = [
        ("sharpness", [p.sharpness for p in kept]),
        (f"aesthetics ({scorer.partition(':')[0]})", aesthetics),
        ("mask, share of the picture", [s["mask_share"] for s in subjects]),
    ]
    figure = Figure(figsize=(10.5, 5), layout="constrained")
    axes = figure.subplots(2, 3)
    for axis, (title, values) in zip(axes.flat, [*whole, *real], strict=True):
        if (title, values) in whole and values:
            axis.hist(
                values,
                bins=np.arange(min(values) - 0.5, max(values) + 1.5) if max(values) < 40 else 40,
                color="tab:blue",
                rwidth=0.9,
            )
        elif values:
            axis.hist(values, bins=40, color="tab:blue")
            axis.axvline(float(np.mean(values)), color="black", linewidth=1, label=f"mean {np.mean(values):.4g}")
        if title.startswith("aesthetics (hps"):
            axis.axvline(
                PAPER_AESTHETICS, color="tab:red", linewidth=1, linestyle="--", label=f"paper {PAPER_AESTHETICS}"
            )
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8)
        axis.yaxis.get_major_locator().set_params(integer=True)
        axis.xaxis.get_major_locator().set_params(integer=(title, values) in whole, min_n_ticks=1)
        axis.set_title(title, fontsize=10)
        axis.tick_params(labelsize=8)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    return write_whole(path, buffer.getvalue())


def overlay(picture: Any, planes: np.ndarray, subjects: Sequence[Mapping[str, Any]]) -> Any:
    """The picture with each subject's mask tinted and its face framed in the subject's colour."""
    from PIL import Image, ImageDraw

    pixels = np.asarray(picture.convert("RGB"), np.float32)
    masks = unpack_masks(planes, 8)
    for number, subject in enumerate(subjects):
        mask = masks[subject["mask_bit"]]
        pixels[mask] = 0.55 * pixels[mask] + 0.45 * np.array(COLOURS[number % 8], np.float32)
    result = Image.fromarray(pixels.round().astype(np.uint8))
    draw = ImageDraw.Draw(result)
    for number, subject in enumerate(subjects):
        draw.rectangle(subject["face_box"], outline=COLOURS[number % 8], width=max(2, result.width // 200))
    return result


def contact_sheet(records: Sequence[Record], files: Path) -> Any:
    """Pictures with masks, five a row, and under each its references framed in the colours of their subjects."""
    from PIL import Image, ImageDraw, ImageOps

    columns = min(5, len(records))
    rows = -(-len(records) // columns)
    sheet = Image.new("RGB", (columns * (CELL + PAD) + PAD, rows * (CELL + STRIP + 2 * PAD) + PAD), (245, 245, 245))
    draw = ImageDraw.Draw(sheet)
    for place, record in enumerate(records):
        left, top = PAD + place % columns * (CELL + PAD), PAD + place // columns * (CELL + STRIP + 2 * PAD)
        planes = np.asarray(open_planes(files / record["masks"]))
        shown = overlay(open_image(files / record["image"]), planes, record["subjects"])
        shown = ImageOps.contain(shown, (CELL, CELL))
        sheet.paste(shown, (left + (CELL - shown.width) // 2, top + (CELL - shown.height) // 2))
        x = left
        for number, subject in enumerate(record["subjects"]):
            reference = subject["references"][0]
            side = min(STRIP - 6, CELL // len(record["subjects"]) - 6)
            small = open_image(files / reference["image"]).resize((side, side))
            y = top + CELL + 4
            draw.rectangle((x, y, x + side + 3, y + side + 3), fill=COLOURS[number % 8])
            sheet.paste(small, (x + 2, y + 2))
            if reference["augmented"]:
                draw.rectangle((x + 2, y + 2, x + 12, y + 14), fill=(255, 255, 255))
                draw.text((x + 4, y + 2), "a", fill=(0, 0, 0))
            x += side + 6
    return sheet


def write_report(
    out: Path,
    about: Mapping[str, Any],
    splits: Mapping[str, Sequence[Record]],
    kept: Sequence[Photo],
    masks: Mapping[str, Result],
    files: Path,
) -> Path:
    """Writes ``out/report.html`` and its pictures in ``out/report/``."""
    records = [r for part in splits.values() for r in part]
    for old in (out / "report").glob("*"):
        old.unlink()
    histograms(out / "report" / "histograms.png", kept, records, about["config"]["aesthetics"])
    chosen = random.Random(0).sample(records, min(len(records), PER_SHEET * SHEETS))
    sheets = []
    for index in range(0, len(chosen), PER_SHEET):
        name = f"sheet_{index // PER_SHEET}.jpg"
        buffer = io.BytesIO()
        contact_sheet(chosen[index : index + PER_SHEET], files).save(buffer, "JPEG", quality=88)
        write_whole(out / "report" / name, buffer.getvalue())
        sheets.append(name)
    subjects = [s for r in records for s in r["subjects"]]
    augmented = sum(s["references"][0]["augmented"] for s in subjects)
    unknown = sum(r["consent"] != "yes" for r in records)
    aesthetics = [p.aesthetics for p in kept if p.aesthetics is not None]
    facts = [
        ("files looked at", about["files_scanned"]),
        *((f"records, {split}", count) for split, count in about["splits"].items()),
        ("subjects", len(subjects)),
        ("identities", about["identities"]),
        ("subjects with references from other photos", len(subjects) - augmented),
        ("subjects with an augmented crop only", augmented),
        ("mean aesthetics of the photos kept", f"{np.mean(aesthetics):.4f}" if aesthetics else "not measured"),
        ("records without a statement of consent", unknown),
    ]
    timing = [
        (
            name,
            t["photos"],
            t["computed"],
            t["failed"],
            f"{t['seconds']:.1f}",
            f"{1000 * t['seconds'] / t['computed']:.1f}" if t["computed"] else "–",
        )
        for name, t in about["stages"].items()
    ]
    page = render(
        Path(__file__).parent, "report.html", title=f"Dataset {out.name}", unknown=unknown, facts=facts, dropped=list(about["dropped"].items()),
        paper_aesthetics=PAPER_AESTHETICS, sheets=sheets, timing=timing,
    )  # fmt: skip
    return write_whole(out / "report.html", page)
