"""The leakage report: one picture, and where every block at every step let its subjects bleed."""

from __future__ import annotations

import base64
import html
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from idar.attention import Direction
from idar.integrations.pictures import read_masks, read_picture
from idar.integrations.recording import SUPPORTED, Recording
from idar.metrics import AttentionProfile, attention_profile, leakage, map_iou, map_overlap, peak_in_mask
from idar.plot import plot_blocks, plot_maps, plot_profile, short_names

WORDS: dict[Direction, str] = {
    "image_to_reference": "What the picture takes from each reference (image queries on reference keys)",
    "reference_to_image": "Where each reference looks in the picture (reference queries on image keys)",
}
NOTES = {
    "overlap": "Share of a subject's map that lies where another's lies: 0 apart, 1 the same map. Needs no masks.",
    "leakage": "Attention on other subjects as a share of that on any subject; one half: not told apart.",
    "map_iou": "Intersection over union of the hot half of the map and the mask.",
    "peak_in_mask": "1 where the hottest token lies inside the subject's mask.",
}


def load_pipeline(
    model: str, *, dtype: torch.dtype = torch.float32, device: str = "cpu", lora: str | None = None
) -> Any:
    """A supported pipeline from a folder or hub id.

    Raises:
        ValueError: It cannot be read, or is not one of `recording.SUPPORTED`.
        ImportError: diffusers is missing; the message names the pip line.
    """
    try:
        from diffusers import DiffusionPipeline
    except ImportError as error:
        raise ImportError('reports need diffusers: pip install "idar[diffusers,plot]"') from error
    folder = Path(model)
    if folder.exists() and not (folder / "model_index.json").exists():
        raise ValueError(f"MODEL must be a diffusers pipeline folder, but {model} has no model_index.json")
    if folder.exists():
        try:
            name = json.loads((folder / "model_index.json").read_text()).get("_class_name")
        except (ValueError, AttributeError):
            raise ValueError(
                f"MODEL must be a diffusers pipeline folder, but model_index.json of {model} is broken"
            ) from None
        if name not in SUPPORTED:
            raise ValueError(f"MODEL must hold one of {', '.join(SUPPORTED)}, got {name}")
    try:
        pipe = DiffusionPipeline.from_pretrained(model, torch_dtype=dtype)
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise ValueError(f"MODEL {model} must be a readable pipeline, got {type(error).__name__}: {reason}") from error
    if lora is not None:
        try:
            pipe.load_lora_weights(lora)
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise ValueError(
                f"--lora {lora} must be readable LoRA weights, got {type(error).__name__}: {reason}"
            ) from error
    return pipe.to(device)


def load_picture(path: str) -> Any:
    """A PIL picture in RGB from a file, see `idar.integrations.pictures.read_picture`.

    Raises:
        ValueError: There is none, or it cannot be read.
    """
    return read_picture(path, f"picture {path}")


def pictures_as_masks(masks: Sequence[Any], grid: tuple[int, int]) -> Tensor:
    """(s, n) coverage from one mask per subject, see `idar.integrations.pictures.read_masks`."""
    return read_masks(masks, grid)


def masks_of(recording: Recording, masks: Sequence[Any]) -> Tensor:
    """(s, n) coverage of a recording's tokens; warns where a mask is black, which leaves its subject without numbers.

    Raises:
        ValueError: A mask cannot be read, or has other proportions than the picture.
    """
    truth = read_masks(masks, recording.grid, (recording.picture.shape[1], recording.picture.shape[2]))
    for i, row in enumerate(truth):
        if not bool(row.any()):
            warnings.warn(f"masks[{i}] is black: its subject counts as absent and gets no leakage", stacklevel=3)
    return truth


def write_report(
    recording: Recording,
    out: str | Path,
    *,
    masks: Sequence[Any] | None = None,
    names: Sequence[str] | None = None,
    notes: dict[str, Any] | None = None,
    max_steps: int = 10,
) -> dict[str, Any]:
    """Writes ``report.html`` (self-contained), its figures as PNG, and ``report.json`` into a folder.

    Args:
        recording: From `idar.integrations.recording.record`.
        out: Folder; it is made where it is missing.
        masks: Where each subject is in the generated picture, one per subject; files, pictures or arrays, see
            `idar.integrations.pictures.read_mask`. Without them, only the overlap of the subjects' maps is known.
        names: One per subject.
        notes: What else the report should say (model, prompt, seed).
        max_steps: Steps shown, evenly chosen.

    Returns:
        What is in ``report.json``.

    Raises:
        ValueError: Not one mask or name per subject, or a mask that cannot be read in one way.
        ImportError: matplotlib is missing; the message names the pip line.
    """
    count, folder = len(recording.references), Path(out)
    names = list(names or [f"subject {chr(65 + i)}" for i in range(count)])
    for what, given in (("masks", masks), ("names", names)):
        if given is not None and len(given) != count:
            raise ValueError(f"{what} must be one per reference, got {len(given)} for {count}")
    truth = None if masks is None else masks_of(recording, masks)
    folder.mkdir(parents=True, exist_ok=True)
    steps = len(recording.sigmas)
    shown = sorted({round(i * (steps - 1) / max(1, min(steps, max_steps) - 1)) for i in range(min(steps, max_steps))})
    found: dict[str, Any] = {"notes": notes or {}, "subjects": names, "grid": recording.grid, "directions": {}}
    body = [_summary_of(recording, notes or {})]
    for direction, maps in recording.maps.items():
        mean = maps.mean((0, 1))
        profile = attention_profile(
            maps[:, :, None], None if truth is None else truth[None], blocks=recording.blocks, sigmas=recording.sigmas
        )
        overall = _metrics(mean[None], None if truth is None else truth[None])
        found["directions"][direction] = {"overall": overall, "profile": profile.to_dict()}
        figures = [(f"maps_{direction}.png", "Mean over blocks and steps")]
        plot_maps(
            recording.picture, mean, recording.grid, masks=truth, references=recording.references, names=names,
            path=folder / figures[0][0],
        )  # fmt: skip
        figures.append((f"profile_{direction}.png", "Where in the network, and when"))
        plot_profile(profile, path=folder / figures[1][0])
        for s, name in enumerate(names):
            figures.append((f"blocks_{direction}_{s}.png", f"{name}, by block and step"))
            plot_blocks(
                maps[:, shown, s], recording.grid, blocks=recording.blocks,
                sigmas=[recording.sigmas[i] for i in shown], title=name, path=folder / figures[-1][0],
            )  # fmt: skip
        body.append(_section(direction, names, overall, profile, [(folder / f, caption) for f, caption in figures]))
    _write(folder / "report.json", json.dumps(found, indent=1) + "\n")
    _write(folder / "report.html", PAGE.format(body="\n".join(body)))
    return found


def _metrics(maps: Tensor, masks: Tensor | None) -> dict[str, list[float | None]]:
    values = {"overlap": map_overlap(maps)[0]}
    if masks is not None:
        values |= {
            "leakage": leakage(maps, masks)[0],
            "map_iou": map_iou(maps, masks)[0],
            "peak_in_mask": peak_in_mask(maps, masks)[0],
        }
    return {k: [None if v != v else round(v, 4) for v in row.tolist()] for k, row in values.items()}


def _summary_of(recording: Recording, notes: dict[str, Any]) -> str:
    facts = {**notes, "picture": f"{recording.picture.shape[2]} x {recording.picture.shape[1]} pixels"}
    facts |= {"steps": len(recording.sigmas), "blocks": len(recording.blocks)}
    rows = "".join(f"<tr><th>{html.escape(str(k))}</th><td>{html.escape(str(v))}</td></tr>" for k, v in facts.items())
    return f"<table>{rows}</table>"


def _section(
    direction: Direction,
    names: Sequence[str],
    overall: dict[str, list[float | None]],
    profile: AttentionProfile,
    figures: Sequence[tuple[Path, str]],
) -> str:
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    rows = "".join(
        f"<tr><th title='{NOTES[k]}'>{k.replace('_', ' ')}</th>"
        + "".join(f"<td>{'–' if v is None else f'{v:.3f}'}</td>" for v in row)
        + f"<td class=note>{NOTES[k]}</td></tr>"
        for k, row in overall.items()
    )
    name = "leakage" if "leakage" in profile.values else "overlap"
    table = profile.values[name].nanmean(-1)
    worst = ""
    if not bool(table.isnan().all()):
        i, j = divmod(int(table.nan_to_num(-1).argmax()), table.shape[1])
        where = short_names(profile.blocks)[i]
        worst = f"<p>Most {name}: block {where} at sigma {profile.sigmas[j]:.2f} ({table[i, j]:.3f}).</p>"
    pictures = "".join(
        f"<figure><img alt='{html.escape(caption)}' src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}'>"
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
        for path, caption in figures
    )
    return f"<h2>{WORDS[direction]}</h2><table><tr><th></th>{head}<th></th></tr>{rows}</table>{worst}{pictures}"


def _write(path: Path, text: str) -> None:
    unfinished = path.with_name(f".{path.name}.unfinished")
    unfinished.write_text(text)
    os.replace(unfinished, path)


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Attention leakage</title>
<style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 2em auto; padding: 0 1em; color: #222; }}
h1, h2 {{ line-height: 1.2; }} h2 {{ margin-top: 2em; font-size: 1.2em; }}
table {{ border-collapse: collapse; margin: 1em 0; }} th, td {{ text-align: left; padding: .2em .9em .2em 0; vertical-align: top; }}
td {{ font-variant-numeric: tabular-nums; }} .note {{ color: #777; font-size: .85em; }}
figure {{ margin: 1.5em 0; }} img {{ max-width: 100%; }} figcaption {{ color: #555; font-size: .9em; }}
</style></head><body><h1>Attention leakage</h1>
{body}
</body></html>
"""
