"""Scoring a folder of pictures against a manifest."""

from __future__ import annotations

import hashlib
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from id_reward import Faces, cosine_similarity, score_similarity
from id_reward.images import open_image
from tqdm import tqdm

from multicrafter import UserError
from multicrafter.files import content_digest, read_json, write_whole
from multicrafter.scoring import metrics
from multicrafter.scoring.judges import Judges
from multicrafter.scoring.manifest import Benchmark, Case, Prompt, Reference
from multicrafter.scoring.statistics import Estimate, bootstrap_interval

if TYPE_CHECKING:
    from PIL import Image

SCHEMA = 1


@dataclass
class Scores:
    """Scores of a run.

    Attributes:
        name: Of the run.
        about: Judges, format and prompts; runs are comparable if these agree.
        cases: key, group, category, picture, faces and metrics of each.
        missing: Prompts without a picture.
        problems: What could not be scored, and why.
    """

    name: str
    about: dict[str, Any]
    cases: list[dict[str, Any]]
    missing: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def values(self, metric: str, rows: Sequence[int] | None = None) -> np.ndarray:
        """One metric over the cases; NaN where it is not defined."""
        chosen = self.cases if rows is None else [self.cases[i] for i in rows]
        return np.array([np.nan if (v := c["metrics"].get(metric)) is None else v for c in chosen], np.float64)

    @property
    def groups(self) -> list[str]:
        """The prompt of each case."""
        return [c["group"] for c in self.cases]

    @property
    def names(self) -> list[str]:
        """Metrics that have a value somewhere, in the order of `metrics.METRICS`."""
        return [n for n in metrics.METRICS if any(c["metrics"].get(n) is not None for c in self.cases)]

    def summary(self) -> dict[str, Estimate]:
        """Mean and interval of every metric."""
        return {n: bootstrap_interval(self.values(n), self.groups) for n in self.names}

    def by_category(self) -> dict[str, dict[str, Estimate]]:
        """The same for every category; with "macro" the mean over categories, each counting once, as OmniContext reports."""
        rows: dict[str, list[int]] = {}
        for i, case in enumerate(self.cases):
            rows.setdefault(case["category"], []).append(i)
        if len(rows) < 2:
            return {}
        result = {
            c: {n: bootstrap_interval(self.values(n, r), [self.groups[i] for i in r]) for n in self.names}
            for c, r in sorted(rows.items())
        }
        nan = float("nan")
        macro = {}
        for name in self.names:
            means = [part[name].mean for part in result.values() if np.isfinite(part[name].mean)]
            macro[name] = Estimate(
                float(np.mean(means)) if means else nan,
                nan,
                nan,
                sum(p[name].cases for p in result.values()),
                len(means),
            )
        return {**result, "macro": macro}

    def save(self, path: Path) -> Path:
        """Writes JSON; NaN becomes null."""
        content = {
            "schema": SCHEMA, "name": self.name, "about": self.about, "missing": self.missing, "problems": self.problems,
            "summary": {n: _clean(e._asdict()) for n, e in self.summary().items()},
            "by_category": {c: {n: _clean(e._asdict()) for n, e in part.items()} for c, part in self.by_category().items()},
            "what": {n: metrics.METRICS[n].text for n in self.names}, "cases": self.cases,
        }  # fmt: skip
        return write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    @classmethod
    def load(cls, path: Path) -> Scores:
        """Reads what `save` wrote; a folder stands for its scores.json.

        Raises:
            ValueError: The file is something else.
        """
        path = path / "scores.json" if path.is_dir() else path
        try:
            if not path.exists():
                raise UserError("there is none")
            content = read_json(path)
            if content["schema"] != SCHEMA:
                raise UserError(f"schema {content['schema']!r} is not {SCHEMA}")
            loaded = cls(content["name"], content["about"], content["cases"], content["missing"], content["problems"])
            _check(loaded)
            return loaded
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"scores {path} must be written by multicrafter evaluate, got {type(error).__name__}: {error}"
            ) from error


def _check(scores: Scores) -> None:
    """Raises ValueError where what was read is no `Scores`."""
    about = scores.about
    if not isinstance(scores.name, str) or not scores.name.strip() or not isinstance(about["judges"], dict):
        raise ValueError("a name that is no text, or judges that are no object")
    _, _ = about["format"], about["prompts"]
    if not (scores.cases and all(isinstance(x, list) for x in (scores.cases, scores.missing, scores.problems))):
        raise ValueError("no list of cases")
    seen: set[str] = set()
    for case in scores.cases:
        if not all(isinstance(case[name], str) for name in ("key", "group", "category")) or case["key"] in seen:
            raise ValueError(f"the case {case['key']!r} twice, or one whose names are no text")
        seen.add(case["key"])
        for name, value in case["metrics"].items():
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and np.isfinite(value)
            if value is not None and not number:
                raise ValueError(f"{name} = {value!r} in {case['key']!r}")


def _clean(row: dict[str, Any]) -> dict[str, Any]:
    return {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in row.items()}


class _References:
    """References and targets, opened and judged once each."""

    def __init__(self, judges: Judges, problems: list[str]) -> None:
        self.judges, self.problems = judges, problems
        self._known: dict[Any, dict[str, Any]] = {}

    def get(self, image: Path | bytes, *, face: bool, target: bool = False) -> dict[str, Any]:
        """size, thumb, and from the judges that are there: whole, faces, head (of a human reference); empty if it cannot be opened."""
        key = (image, face, target)
        if key not in self._known:
            self._known[key] = self._judge(image, face, target)
        return self._known[key]

    def _judge(self, image: Path | bytes, face: bool, target: bool) -> dict[str, Any]:
        name = str(image) if isinstance(image, Path) else "a reference in the table"
        try:
            picture = open_any(image)
        except ValueError as error:
            self.problems.append(str(error))
            return {}
        judges = self.judges
        known: dict[str, Any] = {"size": picture.size, "thumb": _thumbnail(picture)}
        known["whole"] = {name: embed([picture])[0] for name, embed in judges.embed.items()}
        if judges.vlm:
            known["picture"] = picture
        if face and judges.faces:
            find = judges.faces.detect_and_embed
            faces = (find if target else getattr(judges.faces, "detect_and_embed_references", find))([picture])[0]
            largest = metrics.largest_face(faces)
            if largest is None:
                self.problems.append(f"{name} shows no face")
            known["faces"], known["largest"] = faces, largest
            if largest is not None:
                head = picture.crop(metrics.head_box(faces.boxes[largest], picture.size))
                known["head"] = {name: embed([head])[0] for name, embed in judges.embed.items()}
        return known


def open_any(image: Path | bytes) -> Image.Image:
    """A picture from a file or from bytes.

    Raises:
        ValueError: It is none.
    """
    return open_image(image if isinstance(image, Path) else io.BytesIO(image))  # type: ignore[arg-type]


def _thumbnail(picture: Image.Image, side: int = 160) -> Image.Image:
    small = picture.copy()
    small.thumbnail((side, side))
    return small


def score(benchmark: Benchmark, judges: Judges, *, name: str, batch: int = 8, progress: bool = True) -> Scores:
    """Scores every case; a picture that cannot be read is a problem of its own and counts as missing."""
    prompts = sorted({(c.group, c.prompt.prompt) for c in benchmark.cases} | {(k, "") for k in benchmark.missing})
    about = {
        "judges": judges.describe(),
        "format": benchmark.format,
        "prompts": content_digest([g for g, _ in prompts]),
    }
    scores = Scores(name, about, [], list(benchmark.missing))
    references = _References(judges, scores.problems)
    with tqdm(total=len(benchmark.cases), desc="score", unit="picture", disable=not progress, file=sys.stderr) as bar:
        for start in range(0, len(benchmark.cases), batch):
            part = benchmark.cases[start : start + batch]
            opened = []
            for case in part:
                try:
                    opened.append((case, open_any(case.picture)))
                except ValueError as error:
                    scores.problems.append(str(error))
                    scores.missing.append(case.key)
            scores.cases += _score_batch(opened, judges, references)
            bar.update(len(part))
    if not scores.cases:
        raise UserError(
            f"--pictures must hold readable pictures, but none of {len(benchmark.cases)} is: {scores.problems[0]}"
        )
    scores.problems = list(dict.fromkeys(scores.problems))
    return scores


def asked(prompt: Prompt) -> str:
    """Digest of what a prompt asks for: its words, its references' kinds, places and bytes, and how many people there should be."""
    references = []
    for r in prompt.references:
        try:
            content = r.image.read_bytes() if isinstance(r.image, Path) else r.image
        except OSError:
            content = b""
        references.append([r.kind, r.box, hashlib.sha256(content).hexdigest()])
    return content_digest([prompt.prompt, prompt.people, references])


def _score_batch(
    opened: Sequence[tuple[Case, Image.Image]], judges: Judges, references: _References
) -> list[dict[str, Any]]:
    if not opened:
        return []
    pictures = [picture for _, picture in opened]
    texts = [case.prompt.prompt for case, _ in opened]
    features = {name: embed(pictures) for name, embed in judges.embed.items()}
    faces = judges.faces.detect_and_embed(pictures) if judges.faces else None
    sentences = judges.clip.embed_text(texts) if judges.clip else None
    aes = judges.aesthetics(pictures, texts, [()] * len(pictures)) if judges.aesthetics else None
    rows = []
    for i, (case, picture) in enumerate(opened):
        values: dict[str, float] = {}
        if sentences is not None:
            values["clip_t"] = float(features["clip"][i] @ sentences[i])
        if aes is not None:
            values["aes"] = float(aes[i])
        given = [(r, references.get(r.image, face=r.kind == "human")) for r in case.prompt.references]
        if given and all(k for _, k in given):
            for name, rows_of in features.items():
                values[f"{name}_i"] = metrics.mean_similarity(
                    rows_of[i], np.stack([k["whole"][name] for _, k in given])
                )
        if faces is not None:
            values |= _faces(case, picture, faces[i], given, judges, references)
        if "face_sim" in values and "clip_t" in values:
            values["id_omnicontext"] = metrics.omnicontext(10 * values["clip_t"], 10 * values["face_sim"])
        if judges.vlm and given and all(k for _, k in given):
            values |= judges.vlm(picture, [k["picture"] for _, k in given], case.prompt.prompt)
            values["vlm_overall"] = metrics.omnicontext(values["vlm_pf"], values["vlm_sc"])
        rows.append(
            {
                "key": case.key, "asked": asked(case.prompt),
                "group": case.group, "category": case.prompt.category, "picture": str(case.picture),
                "references": [str(r.image) if isinstance(r.image, Path) else None for r in case.prompt.references],
                "faces": None if faces is None else len(faces[i].boxes),
                "metrics": {n: round(v, 6) for n, v in values.items() if np.isfinite(v)},
            }
        )  # fmt: skip
    return rows


def _faces(
    case: Case,
    picture: Image.Image,
    found: Faces,
    given: Sequence[tuple[Reference, dict[str, Any]]],
    judges: Judges,
    references: _References,
) -> dict[str, float]:
    """Identity metrics of one picture; only counts where a human reference shows no face: it cannot be looked for."""
    people = [(r, k) for r, k in given if r.kind == "human"]
    values = metrics.count_metrics(len(found.boxes), case.prompt.people)
    if not people or any(not k or k["largest"] is None for _, k in people):
        return values
    known = np.stack([k["faces"].embeddings[k["largest"]] for _, k in people])
    similarity = cosine_similarity(known, found.embeddings) if len(found.boxes) else np.zeros((len(known), 0))
    values |= metrics.identity_metrics(similarity, people=case.prompt.people)
    values["swap_rate"] = metrics.swaps(similarity, found.boxes, [r.box for r, _ in people], picture.size)
    pairs = score_similarity(similarity).matching.pairs
    heads = [picture.crop(metrics.head_box(box, picture.size)) for box in found.boxes]
    for name, embed in judges.embed.items():
        crops = embed(heads) if heads else np.zeros((0, 1))
        values[f"{name}_i_matched"] = metrics.matched_similarity(
            np.stack([k["head"][name] for _, k in people]), crops, pairs
        )
    if case.prompt.target is not None:
        target = references.get(case.prompt.target, face=True, target=True)
        if target and target.get("faces") is not None:
            values["copy_paste"] = metrics.copy_paste_metric(known, found.embeddings, target["faces"].embeddings)
    return values
