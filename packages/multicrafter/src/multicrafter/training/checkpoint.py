"""Checkpoints: folders that are there whole or not at all, and that any number of processes can read.

``step_000200/`` holds one safetensors file per rank and ``state.json``: sizes and SHA-256 of the files, where the pieces of sharded
tensors belong, the code's version, and what the stage says about itself. Nothing is pickled (docs/adr/0080-checkpoints.md).
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import random
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor

from multicrafter import __version__
from multicrafter.files import follow_umask, write_whole
from multicrafter.training import distributed

logger = logging.getLogger(__name__)
FORMAT = 2
STEP = re.compile(r"step_[0-9]+")
RANK = "rank."  # keys under it are each rank's own


class CheckpointError(OSError):
    """A checkpoint could not be written (disk full, no permission) or read (damaged)."""


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on disk, its manifest read.

    Attributes:
        path: Its folder.
        step: Steps done.
        manifest: ``state.json``.
    """

    path: Path
    step: int
    manifest: dict[str, Any]

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Reads the manifest and checks every file against it.

        Raises:
            CheckpointError: A file is missing, short or altered.
        """
        try:
            manifest = json.loads((path / "state.json").read_text())
            if manifest["format"] != FORMAT:
                raise CheckpointError(f"format must be {FORMAT}, got {manifest['format']}")
            for name, (size, digest) in manifest["files"].items():
                file = path / name
                if file.stat().st_size != size or sha256(file) != digest:
                    raise CheckpointError(f"{name} is not what was written")
            return cls(path, int(manifest["step"]), manifest)
        except (OSError, KeyError, ValueError, TypeError, AttributeError, RecursionError) as error:
            raise CheckpointError(f"checkpoint {path} cannot be read ({type(error).__name__}: {error})") from error

    def tensors(self) -> CheckpointTensors:
        """Its tensors, read when they are asked for."""
        return CheckpointTensors(self)


class CheckpointTensors(Mapping[str, Tensor]):
    """Whole tensors by name, put together from the pieces of all ranks, one at a time: no rank ever holds everything."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Opens the files."""
        names = list(checkpoint.manifest["files"])
        self._files = {name: safe_open(str(checkpoint.path / name), framework="pt") for name in names}
        self._shards: dict[str, Any] = checkpoint.manifest["shards"]
        own = names[distributed.rank()] if distributed.rank() < len(names) else None
        self._where = {
            key: name
            for name in names
            for key in self._files[name].keys()  # noqa: SIM118
            if key not in self._shards and (not key.startswith(RANK) or name == own)
        }

    def __getitem__(self, key: str) -> Tensor:
        if key in self._where:
            return _tensor(self._files[self._where[key]], key)
        shard = self._shards[key]
        out: Tensor | None = None
        for name, offset in shard["pieces"]:
            piece = _tensor(self._files[name], key)
            out = torch.empty(shard["shape"], dtype=piece.dtype) if out is None else out
            out[tuple(slice(o, o + n) for o, n in zip(offset, piece.shape, strict=True))] = piece
        assert out is not None
        return out

    def __iter__(self) -> Iterator[str]:
        yield from self._where
        yield from self._shards

    def __len__(self) -> int:
        return len(self._where) + len(self._shards)


def _tensor(file: Any, key: str) -> Tensor:
    value: Tensor = file.get_tensor(key)
    return value


class Section(Mapping[str, Tensor]):
    """The tensors of a mapping under a prefix, without it; still read one at a time."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str) -> None:
        """Nothing is read yet."""
        self._tensors, self._prefix = tensors, prefix
        self._keys = [k.removeprefix(prefix) for k in tensors if k.startswith(prefix)]

    def __getitem__(self, key: str) -> Tensor:
        return self._tensors[self._prefix + key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._keys)

    def __len__(self) -> int:
        return len(self._keys)


def sha256(path: Path) -> str:
    """Digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Forces a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomic(path: Path, text: str) -> None:
    """Writes a small file: temporary name, fsync, rename."""
    write_whole(path, text, sync=True)


def _piece(value: Tensor) -> tuple[Tensor, list[int] | None]:
    """What this rank writes of a tensor, and where it belongs; nowhere if the tensor is whole."""
    if not isinstance(value, DTensor):
        return value, None
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(value.shape, value.device_mesh, value.placements)
    return value.to_local(), list(offset)


def _write_mine(folder: Path, tensors: Mapping[str, Tensor]) -> tuple[str, tuple[int, str], dict[str, Any]]:
    """Writes this rank's file, synced; returns its name, (size, digest) and the pieces in it."""
    number = distributed.world_size()
    name = "state.safetensors" if number == 1 else f"state-{distributed.rank():05d}-of-{number:05d}.safetensors"
    mine, pieces = {}, {}
    for key, value in tensors.items():
        part, offset = _piece(value.detach())
        if offset is not None:
            pieces[key] = {"shape": list(value.shape), "offset": offset if part.numel() else None}
        if (offset is not None and part.numel()) or (
            offset is None and (distributed.is_main() or key.startswith(RANK))
        ):
            mine[key] = part.contiguous()
    path = folder / name
    save_file(mine, path)
    follow_umask(path)
    sync(path)
    return name, (path.stat().st_size, sha256(path)), pieces


def _together(action: Callable[[], Any], what: str) -> list[Any]:
    """Runs ``action`` on every rank and returns all results; an error of one is an error of all.

    Raises:
        CheckpointError: With the first rank's reason.
    """
    error, value = None, None
    try:
        value = action()
    except (OSError, SafetensorError) as raised:
        reason = os.strerror(raised.errno) if isinstance(raised, OSError) and raised.errno else str(raised)
        error = f"{reason} (rank {distributed.rank()})" if distributed.active() else reason
    results = distributed.gather_objects((error, value))
    failed = [e for e, _ in results if e is not None]
    if failed:
        raise CheckpointError(errno.EIO, f"{what}: {failed[0]}")
    return [v for _, v in results]


def save_checkpoint(
    folder: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    *,
    keep: int = 2,
    notes: dict[str, Any] | None = None,
    score: float | None = None,
) -> Path:
    """Writes ``folder/step_XXXXXX``: temporary name, fsync, rename. All ranks call it.

    Args:
        folder: Where checkpoints are.
        step: Steps done.
        tensors: DTensors are written in pieces; of others rank 0's, except keys that start with "rank.", which each rank has.
        keep: Newest checkpoints kept; the one with the best score stays besides.
        notes: JSON that goes into ``state.json``.
        score: How good it is, higher is better.

    Raises:
        CheckpointError: It could not be written; nothing is left of it, and the older ones are as they were.
    """
    target, temporary = folder / f"step_{step:06d}", folder / f".step_{step:06d}.tmp"
    what = f"checkpoint {target} cannot be written"

    def begin() -> None:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)

    def finish(written: list[Any]) -> None:
        if not distributed.is_main():
            return
        shards: dict[str, Any] = {}
        for name, _, pieces in written:
            for key, piece in pieces.items():
                entry = shards.setdefault(key, {"shape": piece["shape"], "pieces": []})
                if piece["offset"] is not None:
                    entry["pieces"].append([name, piece["offset"]])
        manifest = {
            "format": FORMAT,
            "step": step,
            "score": score,
            "code": {"multicrafter": __version__, "torch": torch.__version__},
            "world_size": distributed.world_size(),
            "notes": notes or {},
            "files": {name: written_as for name, written_as, _ in written},
            "shards": shards,
        }
        (temporary / "state.json").write_text(json.dumps(manifest, indent=1))
        sync(temporary / "state.json")
        sync(temporary)
        if target.exists():  # a damaged one that the run fell back from
            _discard(target)
        os.replace(temporary, target)
        sync(folder)

    try:
        _together(begin, what)
        written = _together(lambda: _write_mine(temporary, tensors), what)
        _together(lambda: finish(written), what)
    except CheckpointError:
        if distributed.is_main():
            shutil.rmtree(temporary, ignore_errors=True)
        raise
    if distributed.is_main():
        rotate(folder, keep)
    return target


def _discard(path: Path) -> None:
    """Removes a folder so that no half of it is ever taken for a checkpoint."""
    trash = path.with_name(f".{path.name}.trash")
    shutil.rmtree(trash, ignore_errors=True)
    os.replace(path, trash)
    shutil.rmtree(trash, ignore_errors=True)


def checkpoints_in(folder: Path) -> list[Path]:
    """Folders of checkpoints, oldest first: by their number, which outgrows six digits at step 1,000,000."""
    found = [p for p in folder.glob("step_*") if STEP.fullmatch(p.name) and p.is_dir()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """The number in a checkpoint's name.

    >>> step_of(Path("checkpoints/step_1000000"))
    1000000
    """
    return int(path.name.removeprefix("step_"))


def _score(path: Path) -> float:
    try:
        return float(json.loads((path / "state.json").read_text())["score"])
    except (OSError, KeyError, ValueError, TypeError, RecursionError):
        return -float("inf")


def rotate(folder: Path, keep: int) -> None:
    """Removes all but the newest ``keep`` checkpoints and the best one, and what a killed process left half-done."""
    for left in [*folder.glob(".step_*.tmp"), *folder.glob(".step_*.trash")]:
        shutil.rmtree(left, ignore_errors=True)
    found = checkpoints_in(folder)
    spare = found[:-keep] if keep else found
    best = max(found, key=_score, default=None)
    for path in spare:
        if path != best or _score(path) == -float("inf"):
            _discard(path)


def find_checkpoint(folder: Path) -> Checkpoint | None:
    """The newest undamaged checkpoint of a folder, or None; a damaged one is skipped, and said so. The same on every rank."""
    chosen: Path | None = None
    if distributed.is_main():
        for path in reversed(checkpoints_in(folder)):
            try:
                chosen = Checkpoint.open(path).path
                break
            except CheckpointError as error:
                logger.warning(f"{error}: falling back to the one before")
    chosen = distributed.broadcast_object(chosen)
    if chosen is None:
        return None
    manifest = json.loads((chosen / "state.json").read_text())
    return Checkpoint(chosen, int(manifest["step"]), manifest)


def rng_tensors() -> dict[str, Tensor]:
    """State of this process's generators: torch (CPU and this rank's GPU), numpy, random. Keys start with "rank.rng."."""
    kind, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    assert kind == "MT19937"
    version, internal, normal = random.getstate()
    state = {
        "torch": torch.get_rng_state(),
        "numpy.keys": torch.from_numpy(np.asarray(keys, np.int64)),
        "numpy.rest": torch.tensor([float(position), float(has_gauss), float(gauss)], dtype=torch.float64),
        "random.state": torch.tensor(internal, dtype=torch.int64),
        "random.rest": torch.tensor([float(version), torch.nan if normal is None else normal], dtype=torch.float64),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return {f"{RANK}rng.{name}": value for name, value in state.items()}


def restore_rng(tensors: Mapping[str, Tensor]) -> None:
    """Restores `rng_tensors`; a rank that the saved run did not have keeps its own state."""
    own = Section(tensors, f"{RANK}rng.")
    if not len(own):
        return
    torch.set_rng_state(own["torch"])
    position, has_gauss, gauss = own["numpy.rest"].tolist()
    np.random.set_state(("MT19937", own["numpy.keys"].numpy().astype(np.uint32), int(position), int(has_gauss), gauss))
    version, normal = own["random.rest"].tolist()
    random.setstate((int(version), tuple(own["random.state"].tolist()), None if normal != normal else normal))
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
