"""Reading a dataset back: records of a split, and the bytes of the files they name, from folders or shards alike."""

from __future__ import annotations

import io
import json
import os
import tarfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from id_reward.images import to_rgb

from multicrafter import UserError
from multicrafter.photos.pictures import open_planes
from multicrafter.photos.schema import SPLITS, read_dataset_json
from multicrafter.photos.write import Record

if TYPE_CHECKING:
    from PIL import Image


def safe_path(folder: Path, name: str) -> Path:
    """The path of a file that a record names.

    Raises:
        ValueError: The name is absolute, or leaves the dataset's folder, by ``..`` or by a link.
    """
    if not name or PurePosixPath(name).is_absolute() or "\\" in name or "\0" in name:
        raise UserError(f"{name!r} must be a path inside the dataset")
    path = folder / name
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{name!r} must be a path inside the dataset, but it leads to {path.resolve()}")
    return path


@dataclass(frozen=True)
class Store:
    """Records of one split and their files.

    ``places`` says where a file is within a shard: name -> (shard, offset, size); empty for folders.
    """

    folder: Path
    about: dict[str, Any]
    records: list[Record]
    places: dict[str, tuple[str, int, int]]

    def read(self, name: str) -> bytes:
        """The bytes of a file.

        Raises:
            ValueError: The record names no file of this dataset.
        """
        if not self.places:
            try:
                return safe_path(self.folder, name).read_bytes()
            except OSError as error:
                raise UserError(f"{self.folder} must hold {name}, got {error.strerror}") from error
        if name not in self.places:
            raise UserError(f"{self.folder} must hold {name}, but no shard does")
        shard, offset, size = self.places[name]
        descriptor = os.open(self.folder / shard, os.O_RDONLY)
        try:
            return os.pread(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def open(self, name: str, *, box: tuple[int, int, int, int] | None = None, side: int | None = None) -> Image.Image:
        """A picture, upright RGB as everywhere (`id_reward.images`), cut to ``box``.

        With ``side`` a JPEG may be decoded smaller, but no smaller than that on its shorter side.
        """
        from PIL import Image

        picture = Image.open(io.BytesIO(self.read(name)))
        if side is not None and box is None and picture.format == "JPEG":
            shorter = min(picture.size)
            picture.draft("RGB", (max(1, picture.width * side // shorter), max(1, picture.height * side // shorter)))
        upright = to_rgb(picture)
        return upright.crop(box) if box is not None else upright

    def planes(self, name: str) -> Image.Image:
        """A mask picture, see `pictures.open_planes`."""
        return open_planes(self.read(name))


def manifest_files(folder: Path, about: dict[str, Any], split: str) -> list[Path]:
    """Files of a split's records, in order."""
    if split not in SPLITS:
        raise UserError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    return [safe_path(folder, name) for name in about["files"].get(split, [])]


def read_manifest(path: Path) -> list[Record]:
    """Records of one Parquet or JSON lines file.

    Raises:
        ValueError: The file cannot be read.
    """
    try:
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line]
        import pyarrow.parquet as pq

        rows: list[Record] = pq.read_table(path).to_pylist()
        return rows
    except Exception as error:
        raise UserError(
            f"{path} must be a manifest of this dataset, got {type(error).__name__}: {' '.join(str(error).split())[:200]}"
        ) from error


def read_shard(path: Path) -> tuple[list[Record], dict[str, tuple[str, int, int]]]:
    """Records of one shard, and where each member is: name -> (shard, offset, size)."""
    records, places = [], {}
    relative = f"{path.parent.name}/{path.name}"
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                places[member.name] = (relative, member.offset_data, member.size)
                if member.name.endswith(".json") and (file := tar.extractfile(member)) is not None:
                    records.append(json.load(file))
    except (tarfile.TarError, OSError, ValueError) as error:
        raise UserError(f"{path} must be a shard of this dataset, got {type(error).__name__}: {error}") from error
    return records, places


def open_split(folder: str | Path, split: str = "train") -> Store:
    """A split of a dataset.

    Raises:
        ValueError: It is no dataset, or its manifest is broken.
    """
    folder = Path(folder)
    about = read_dataset_json(folder)
    records: list[Record] = []
    places: dict[str, tuple[str, int, int]] = {}
    for path in manifest_files(folder, about, split):
        if about["format"] == "webdataset":
            part, where = read_shard(path)
            places |= where
        else:
            part = read_manifest(path)
        records += part
    return Store(folder, about, records, places)
