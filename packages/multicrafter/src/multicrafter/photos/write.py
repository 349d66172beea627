"""Writing the dataset: manifests, shards, card. Everything appears under its name only when it is whole."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from multicrafter.files import appearing, write_whole
from multicrafter.photos import schema
from multicrafter.photos.config import WriteConfig

Record = dict[str, Any]


def _chunks(records: Sequence[Record], size: int) -> list[Sequence[Record]]:
    return [records[i : i + size] for i in range(0, len(records), size)]


def write_parquet(folder: Path, split: str, records: Sequence[Record], config: WriteConfig) -> list[str]:
    """Parquet files of one split."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = []
    parts = _chunks(records, config.shard_size)
    for index, part in enumerate(parts):
        name = f"manifest/{split}-{index:05d}-of-{len(parts):05d}.parquet"
        buffer = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(list(part), schema=schema.arrow_schema()), buffer)
        write_whole(folder / name, buffer.getvalue())
        names.append(name)
    return names


def write_jsonl(folder: Path, split: str, records: Sequence[Record], config: WriteConfig) -> list[str]:
    """JSON lines of one split."""
    names = []
    parts = _chunks(records, config.shard_size)
    for index, part in enumerate(parts):
        name = f"manifest/{split}-{index:05d}-of-{len(parts):05d}.jsonl"
        write_whole(folder / name, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in part))
        names.append(name)
    return names


def write_shards(folder: Path, split: str, records: Sequence[Record], config: WriteConfig, *, files: Path) -> list[str]:
    """WebDataset shards of one split, from files rendered under ``files``; equal records give equal bytes."""
    names = []
    for index, part in enumerate(_chunks(records, config.shard_size)):
        name = f"shards/{split}-{index:06d}.tar"
        target = folder / name
        with appearing(target) as temporary, tarfile.open(temporary, "w", format=tarfile.USTAR_FORMAT) as tar:
            for record in part:
                for suffix, content in shard_entries(record, files, config.quality):
                    info = tarfile.TarInfo(f"{record['key']}.{suffix}")
                    info.size, info.mode = len(content), 0o644
                    tar.addfile(info, io.BytesIO(content))
        names.append(name)
    return names


def shard_entries(record: Record, files: Path, quality: int) -> list[tuple[str, bytes]]:
    """The four members of a record: jpg, masks.png, refs.jpg, json."""
    from id_reward.images import open_image
    from PIL import Image

    from multicrafter.photos.pictures import encode_jpeg

    crops = []
    left = 0
    moved = json.loads(json.dumps(record))
    key = record["key"]
    for subject in moved["subjects"]:
        for reference in subject["references"]:
            crops.append(open_image(files / reference["image"]))
            reference["strip_box"] = [left, 0, left + crops[-1].width, crops[-1].height]
            reference["image"] = f"{key}.refs.jpg"
            left += crops[-1].width
    strip = Image.new("RGB", (left, max(c.height for c in crops)))
    left = 0
    for crop in crops:
        strip.paste(crop, (left, 0))
        left += crop.width
    moved |= {"image": f"{key}.jpg", "masks": f"{key}.masks.png"}
    return [
        ("jpg", (files / record["image"]).read_bytes()),
        ("masks.png", (files / record["masks"]).read_bytes()),
        ("refs.jpg", encode_jpeg(strip, quality)),
        ("json", json.dumps(moved, ensure_ascii=False).encode()),
    ]


def card(name: str, about: Mapping[str, Any]) -> str:
    """The dataset card; its header is what makes ``datasets.load_dataset`` find the splits."""
    files = "\n".join(
        f"  - split: {split}\n    path: {about['pattern'].format(split=split)}"
        for split in schema.SPLITS
        if about["splits"].get(split)
    )
    splits = ", ".join(f"{split}: {count}" for split, count in about["splits"].items())
    fields = "\n".join(f"| {field} | {what} |" for field, what in schema.FIELDS.items())
    return f"""---
configs:
- config_name: default
  data_files:
{files}
---
# {name}

Pictures of people with subject masks, and references of each subject, written by `multicrafter data build` (schema {schema.VERSION}).
Records: {splits}.

**This is personal data.** Faces and identities of real people are in it, and biometric data in `.build/`. Use it for the purpose its
people agreed to, keep it no longer than needed, and rebuild when somebody withdraws: whatever the new build does not name is removed.
Mind the licences of the photos.

| field | what it is |
|---|---|
{fields}
"""


def write_dataset(
    folder: Path, splits: Mapping[str, Sequence[Record]], config: WriteConfig, about: Mapping[str, Any], *, files: Path
) -> dict[str, Any]:
    """Manifests or shards, card, and at last dataset.json; then everything the new dataset does not name is removed."""
    writers: dict[str, tuple[Callable[[str, Sequence[Record]], list[str]], str]] = {
        "parquet": (lambda s, r: write_parquet(folder, s, r, config), "manifest/{split}-*.parquet"),
        "jsonl": (lambda s, r: write_jsonl(folder, s, r, config), "manifest/{split}-*.jsonl"),
        "webdataset": (lambda s, r: write_shards(folder, s, r, config, files=files), "shards/{split}-*.tar"),
    }
    write, pattern = writers[config.format]
    named = {split: write(split, records) for split, records in splits.items() if records}
    whole = {
        "schema": schema.VERSION, "format": config.format, "splits": {s: len(r) for s, r in splits.items()},
        "files": named, "pattern": pattern, **about,
    }  # fmt: skip
    write_whole(folder / "README.md", card(folder.name, whole))
    write_whole(folder / "dataset.json", json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    keep = {name for names in named.values() for name in names}
    if config.format != "webdataset":
        keep |= {path for records in splits.values() for record in records for path in record_files(record)}
    remove_others(folder, keep)
    return whole


def record_files(record: Mapping[str, Any]) -> Iterable[str]:
    """Every file a record names."""
    yield record["image"]
    yield record["masks"]
    for subject in record["subjects"]:
        for reference in subject["references"]:
            yield reference["image"]


def remove_others(folder: Path, keep: set[str]) -> int:
    """Removes files of earlier builds from the folders that belong to the dataset; returns how many."""
    gone = 0
    for part in ("manifest", "shards", "images", "masks", "references"):
        for path in sorted((folder / part).rglob("*"), reverse=True):
            if path.is_dir() and not path.is_symlink():
                if not any(path.iterdir()):
                    path.rmdir()
            elif path.relative_to(folder).as_posix() not in keep:
                path.unlink()
                gone += 1
        if (folder / part).is_dir() and not any((folder / part).iterdir()):
            shutil.rmtree(folder / part)
    return gone
