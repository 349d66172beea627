"""What was asked for, and which picture answers it: our manifest, and the prompt lists of published benchmarks, read from local files."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from multicrafter import UserError
from multicrafter.files import parse_json, read_json, read_text

Kind = Literal["human", "object"]
Box = tuple[float, float, float, float]
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


class Reference(NamedTuple):
    """A reference: a file, or its bytes out of a table; what it shows; where it should be (shares of the picture's sides), if that was asked."""

    image: Path | bytes
    kind: Kind = "human"
    box: Box | None = None


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """One entry of a prompt list.

    Attributes:
        key: Its pictures are called KEY.png, or KEY_0.png, KEY_1.png, ...
        prompt: What the picture should show.
        references: One per subject.
        target: A real picture of these subjects, if the benchmark has one.
        count: People the picture should show; None: as many as human references.
        category: A part of the benchmark that is also reported on its own.
    """

    key: str
    prompt: str
    references: tuple[Reference, ...]
    target: Path | bytes | None = None
    count: int | None = None
    category: str = ""

    @property
    def people(self) -> int:
        """How many people the picture should show."""
        return self.count if self.count is not None else sum(r.kind == "human" for r in self.references)


@dataclass(frozen=True, kw_only=True)
class Case:
    """A picture to score; ``group`` is the prompt's key: pictures of one prompt are not independent."""

    key: str
    picture: Path
    group: str
    prompt: Prompt


@dataclass(frozen=True)
class Benchmark:
    """Prompts and the cases found for them; ``missing``: keys of prompts without a picture."""

    format: str
    cases: list[Case]
    missing: list[str] = field(default_factory=list)


def _fail(where: str, what: str) -> UserError:
    return UserError(f"{where}: {what}")


def _native(rows: Sequence[Mapping[str, Any]], where: str, root: Path) -> list[Prompt]:
    prompts = []
    for number, row in enumerate(rows, 1):
        at = f"{where}, entry {number}"
        if not isinstance(row.get("prompt"), str) or not row["prompt"].strip():
            raise _fail(at, f"prompt must be a sentence, got {row.get('prompt')!r}")
        key = row.get("key", row.get("picture", str(number - 1)))
        if not isinstance(key, (str, int)) or isinstance(key, bool):
            raise _fail(at, f"key must be a text or a whole number, got {key!r}")
        _spelled(row, at)
        count = row.get("count")
        if count is not None and (not isinstance(count, int) or isinstance(count, bool) or count < 0):
            raise _fail(at, f"count must be a whole number, got {count!r}")
        references = []
        for item in _listed(row.get("references") or [], f"{at}: references"):
            item = {"image": item} if isinstance(item, str) else item
            if (
                not isinstance(item, Mapping)
                or not isinstance(item.get("image"), str)
                or item.get("kind", "human") not in ("human", "object")
            ):
                raise _fail(
                    at, f"a reference must be a path, or an object with image and kind human or object, got {item!r}"
                )
            box = item.get("box")
            if box is not None and not _is_box(box):
                raise _fail(at, f"box must be left, top, right, bottom as shares of the picture in [0, 1], got {box!r}")
            place: Any = tuple(map(float, box)) if box else None
            references.append(Reference(root / item["image"], item.get("kind", "human"), place))
        prompts.append(
            Prompt(
                key=os.path.splitext(str(key))[0] if "picture" in row and "key" not in row else str(key),
                prompt=row["prompt"], references=tuple(references), target=root / row["target"] if row.get("target") else None,
                count=count, category=str(row.get("category", "")),
            )
        )  # fmt: skip
    return prompts


NATIVE = ("prompt", "key", "picture", "count", "references", "target", "category")


def _spelled(row: Mapping[str, Any], at: str) -> None:
    """Refuses what is nearly a name of ours: "refrences" would be scored without any. Other names are somebody else's."""
    for name in row:
        near = difflib.get_close_matches(name, NATIVE, n=1, cutoff=0.8)
        if near and name not in (*NATIVE, "pictures", "prompts"):
            raise _fail(at, f"{name!r} must be spelled {near[0]!r}, or differently altogether")


def _listed(value: Any, what: str) -> list[Any]:
    """A list; a text would be read letter by letter."""
    if not isinstance(value, list):
        raise UserError(f"{what} must be a list, got {value!r}"[:300])
    return value


def _is_box(box: Any) -> bool:
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, (int, float)) and 0 <= x <= 1 for x in box)
    return bool(numbers and box[0] < box[2] and box[1] < box[3])


def _xverse(rows: Sequence[Mapping[str, Any]], where: str, root: Path) -> list[Prompt]:
    """XVerseBench_single.json, XVerseBench_multi.json: a reference under .../human/ is a person (arXiv 2506.21416)."""
    prompts = []
    for number, row in enumerate(rows):
        sources = [s for part in row["modulation"] for s in part.get("src_inputs", ())]
        references = tuple(
            Reference(root / s["image_path"], "human" if "/human/" in s["image_path"] else "object") for s in sources
        )
        category = f"{sum(r.kind == 'human' for r in references)} people, {sum(r.kind == 'object' for r in references)} objects"
        prompts.append(
            Prompt(key=str(row.get("index", number)), prompt=row["prompt"], references=references, category=category)
        )
    return prompts


def _multihuman(rows: Sequence[Mapping[str, Any]], where: str, root: Path) -> list[Prompt]:
    """multihuman_metadata.json (arXiv 2506.20879): pictures are numbered; the first 1,500 prompts are the simple ones."""
    return [
        Prompt(
            key=str(number), prompt=row["prompt"], references=tuple(Reference(root / p) for p in _listed(row["people"], f"{where}: people")),
            category=f"{'simple' if number < 1500 else 'complex'}, {len(row['people'])} people",
        )
        for number, row in enumerate(rows)
    ]  # fmt: skip


def _multiid(rows: Sequence[Mapping[str, Any]], where: str, root: Path) -> list[Prompt]:
    """Index files of MultiID-Bench (v202.json and others, arXiv 2510.14975): with the real picture as target."""
    return [
        Prompt(
            key=Path(row["ori_img_path"]).stem, prompt=row["prompt"],
            references=tuple(Reference(root / p) for p in _listed(row["image_paths"], f"{where}: image_paths")),
            target=root / row["ori_img_path"], category=f"{len(row['image_paths'])} people",
        )
        for row in rows
    ]  # fmt: skip


def _omnicontext(rows: Sequence[Mapping[str, Any]], where: str, root: Path) -> list[Prompt]:
    """OmniContext (arXiv 2506.18871), as JSON lines with paths or as Parquet with pictures inside; tasks named *character* show people."""
    prompts = []
    for row in rows:
        kind: Kind = "human" if "character" in row["task_type"] else "object"
        images = [root / i if isinstance(i, str) else i["bytes"] or root / i["path"] for i in row["input_images"]]
        prompts.append(
            Prompt(
                key=str(row["key"]),
                prompt=row["instruction"],
                references=tuple(Reference(i, kind) for i in images),
                category=row["task_type"],
            )
        )
    return prompts


class _Format(NamedTuple):
    read: Callable[[Sequence[Mapping[str, Any]], str, Path], list[Prompt]]
    fields: frozenset[str]


FORMATS: Mapping[str, _Format] = {
    "xverse": _Format(_xverse, frozenset({"prompt", "modulation"})),
    "multihuman": _Format(_multihuman, frozenset({"prompt", "people", "vlm_questions"})),
    "multiid": _Format(_multiid, frozenset({"prompt", "image_paths", "ori_img_path"})),
    "omnicontext": _Format(_omnicontext, frozenset({"key", "task_type", "instruction", "input_images"})),
    "native": _Format(_native, frozenset({"prompt"})),
}


def _rows(path: Path) -> list[Mapping[str, Any]]:
    try:
        if path.suffix == ".parquet":
            import pyarrow.parquet as pq

            return list(pq.read_table(path).to_pylist())
        text = read_text(path)
        rows = (
            [parse_json(line, f"line {n}") for n, line in enumerate(text.split("\n"), 1) if line.strip()]
            if path.suffix == ".jsonl"
            else parse_json(text, "it")
        )
    except (OSError, ValueError) as error:
        raise UserError(f"manifest {path} must be JSON, JSON lines or Parquet, got: {str(error)[:300]}") from error
    if not isinstance(rows, list) or not rows or not all(isinstance(r, dict) for r in rows):
        raise UserError(f"manifest {path} must be a list of objects with at least one entry")
    return rows


def read_prompts(path: Path, *, format: str = "auto", root: Path | None = None) -> tuple[str, list[Prompt]]:
    """Prompts of a manifest or of a published list, and the name of its format.

    Args:
        path: JSON, JSON lines or Parquet; or a folder of MultiID-Bench's evaluation layout (ID/meta.json, ref_1.jpg, ..., ori.jpg).
        format: "auto" recognises it by its fields.
        root: Folder that paths in the file are relative to; None takes the file's.

    Raises:
        ValueError: Names the entry and what is wrong with it.
    """
    if path.is_dir():
        return "multiid", _layout(path)
    rows = _rows(path)
    if format == "auto":
        format = next((n for n, f in FORMATS.items() if f.fields <= rows[0].keys()), "")
    if format not in FORMATS:
        raise UserError(
            f"format must be auto or one of {', '.join(FORMATS)}; {path} has the fields {', '.join(sorted(rows[0]))}"
        )
    try:
        prompts = FORMATS[format].read(rows, str(path), root or path.parent)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"manifest {path} must be in the format {format}, but {type(error).__name__}: {error}"
        ) from error
    for prompt in prompts:
        if not isinstance(prompt.prompt, str) or not prompt.prompt.strip():
            raise UserError(f"manifest {path}: the prompt of {prompt.key!r} must be a sentence, got {prompt.prompt!r}")
        if not prompt.key.strip():
            raise UserError(f"manifest {path}: every key must name a picture, got {prompt.key!r}")
    twice = (
        {p.key for p in prompts if sum(q.key == p.key for q in prompts) > 1}
        if len({p.key for p in prompts}) < len(prompts)
        else set()
    )
    if twice:
        raise UserError(f"manifest {path} must have every key once, but {sorted(twice)[0]!r} is there twice")
    return format, prompts


def _layout(folder: Path) -> list[Prompt]:
    """MultiID-Bench's evaluation layout: one folder per prompt."""
    prompts = []
    for meta in sorted(folder.glob("*/meta.json")):
        references = sorted(meta.parent.glob("ref_*.*"), key=lambda p: (len(p.stem), p.stem))
        target = next(iter(sorted(meta.parent.glob("ori.*"))), None)
        try:
            prompt = read_json(meta)["prompt"]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{meta} must hold a prompt, got {type(error).__name__}") from error
        prompts.append(
            Prompt(
                key=meta.parent.name, prompt=prompt, references=tuple(Reference(r) for r in references), target=target,
                category=f"{len(references)} people",
            )
        )  # fmt: skip
    if not prompts:
        raise UserError(f"manifest {folder} must be a file, or a folder with ID/meta.json in it")
    return prompts


NUMBERED = re.compile(r"_(?:(?:seed|sample|image|img)[-_]?)?[0-9]+$")


def find_cases(prompts: Iterable[Prompt], pictures: Path, *, format: str = "native") -> Benchmark:
    """The pictures of each prompt: KEY.png; or KEY_0.png, KEY_1.png, ... (KEY_seed0.png, too); or KEY/out.png.

    In OmniContext's folders they are called .../TASK/KEY.png. Hidden files and folders are left alone. Pictures may also lie in one
    folder below ``pictures``. A picture belongs to one key only.

    Raises:
        ValueError: ``pictures`` is no folder, holds a picture for no prompt, or two that could both be meant.
    """
    if not pictures.is_dir():
        raise UserError(f"--pictures must be a folder, but {pictures} is none")
    known = list(prompts)
    names = {p: p.relative_to(pictures) for p in sorted(pictures.rglob("*")) if p.suffix.lower() in SUFFIXES}
    names = {p: n for p, n in names.items() if not any(part.startswith(".") for part in n.parts)}
    found = _match(known, names)
    if not any(found.values()):
        below = {n.parts[0] for n in names.values() if len(n.parts) > 1}
        answers = {top for top in below if any(_match(known, _inside(names, top)).values())}
        if len(answers) > 1:
            first, second = sorted(answers)[:2]
            raise UserError(
                f"--pictures {pictures} must hold the pictures of one run, but {first} and {second} both hold some"
            )
        if answers:
            found = _match(known, _inside(names, answers.pop()))
    if not any(found.values()):
        raise UserError(
            f"--pictures {pictures} must hold pictures named after the manifest's keys ({known[0].key}.png, ...), but holds none"
        )
    cases = [
        Case(
            key=f"{prompt.key}/{p.name}" if len(chosen) > 1 else prompt.key, picture=p, group=prompt.key, prompt=prompt
        )
        for prompt in known
        for chosen in [found[prompt.key]]
        for p in chosen
    ]
    return Benchmark(format, cases, [p.key for p in known if not found[p.key]])


def _inside(names: Mapping[Path, Path], top: str) -> dict[Path, Path]:
    return {p: n.relative_to(top) for p, n in names.items() if n.parts[0] == top and len(n.parts) > 1}


def _match(prompts: Sequence[Prompt], names: Mapping[Path, Path]) -> dict[str, list[Path]]:
    """Pictures by key; the most exact name counts."""
    keys = {p.key for p in prompts}
    exact: dict[str, list[Path]] = {}
    numbered: dict[str, list[Path]] = {}
    deep: dict[tuple[str, str], list[Path]] = {}
    for path, name in names.items():
        stem = name.with_suffix("").as_posix()
        exact.setdefault(stem.removesuffix("/out"), []).append(path)
        if stem not in keys and NUMBERED.search(stem):
            numbered.setdefault(NUMBERED.sub("", stem), []).append(path)
        for folder in name.parts[:-1]:
            deep.setdefault((folder, name.stem), []).append(path)
    found = {}
    for prompt in prompts:
        chosen = exact.get(prompt.key) or (deep.get((prompt.category, prompt.key)) if prompt.category else None) or []
        if len(chosen) > 1:
            raise UserError(
                f"key {prompt.key!r} must have one picture of that name, but {chosen[0]} and {chosen[1]} both are"
            )
        several = numbered.get(prompt.key, [])
        found[prompt.key] = chosen or sorted(several, key=lambda p: (len(p.stem), p.stem))
    return found
